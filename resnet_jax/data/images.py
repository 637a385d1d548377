"""The one reader of image files, for training, evaluation, prediction and the page: all see the same pixels."""

import io
import math
import os
import warnings
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from resnet_jax.disk import files

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's other readers start programs or are rarely fuzzed
NAMES = "PNG, JPEG, WebP, BMP, GIF or TIFF"
MAX_PIXELS = 100_000_000  # of an image: a small file can decode to billions
MAX_RATIO = 1000  # of an image's sides: scaled to cover a square, a narrower one would fill the memory
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read(source: Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as people see it, in RGB: turned as its camera says, on white where it is transparent.

    Of several frames it reads the first. Grey of 16 bits is rounded to 8. Reading takes up to 25 bytes of memory a pixel.

    Raises:
        OSError, ValueError, SyntaxError: if it cannot be read, is of another format, or has too many pixels or too narrow a shape.
    """
    source = files.readable(source) if isinstance(source, Path) else source
    with warnings.catch_warnings(action="ignore"), Image.open(source, formats=FORMATS) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise ValueError(f"it has {width} x {height} pixels, more than the limit of {max_pixels:,}")
        if _tile_pixels(opened) > max_pixels:
            raise ValueError(f"it has tiles of more than {max_pixels:,} pixels")
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ValueError(
                f"it has {width} x {height} pixels: one side may be at most {MAX_RATIO} times as long as the other"
            )
        return to_rgb(opened)


def _tile_pixels(opened: Image.Image) -> int:
    """Return the pixels of a tile of a TIFF, which is decoded as a whole, even if it is larger than the image."""
    tags = getattr(opened, "tag_v2", {})
    sides = [tags.get(tag) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
    return math.prod(side if isinstance(side, int) else 0 for side in sides)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as people see it: turned as its camera says, and on white where it is transparent.

    16 bits of grey are rounded to 8.

    Raises:
        ValueError: if its pixels have neither 8 nor 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its pixels do not have 8 or 16 bits (mode {image.mode})")
        image = Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image, bilinearly, until it just covers (height, width), and crop the centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    new_height, new_width = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    x, y = (new_width - width) // 2, (new_height - height) // 2
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return image.crop((x, y, x + width, y + height))


def png(image: np.ndarray) -> bytes:
    """A uint8 [H, W, 3] image as the content of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def find(folder: Path) -> tuple[list[Path], int]:
    """Find the images in a folder and the folders within it: their paths, sorted, and the number of other files.

    Links to folders are not followed, and count as other files. Hidden files and folders, and what macOS and Windows leave behind, are passed over and not counted.

    Raises:
        OSError: if a folder cannot be read.
    """
    paths, others = [], 0
    for directory, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not _is_left_behind(name)]
        others += sum(Path(directory, name).is_symlink() for name in folders)
        for name in names:
            path = Path(directory, name)
            if _is_left_behind(name):
                continue
            if is_image(path):
                paths.append(path)
            else:
                others += 1
    return sorted(paths), others


def _raise(error: OSError) -> NoReturn:
    raise error


def is_image(path: Path) -> bool:
    """Whether a file has an image's suffix, or starts like an image; a link to nowhere counts, to be named when it is read."""
    regular = path.is_file() or path.is_symlink()
    return regular and (path.suffix.lower() in _SUFFIXES or _has_image_header(path))


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without those that `find` passes over."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_left_behind(path.name))


def left_out(count: int) -> str:
    """Say how many files were left out because they are no images."""
    return f"left out {count} files that are no images" if count > 1 else "left out a file that is no image"


def _is_left_behind(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")


def _has_image_header(path: Path) -> bool:
    """Whether a file without an image's suffix starts like an image."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS):
            return True
    except Exception:  # a reader can raise anything for other files
        return False
