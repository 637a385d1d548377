"""Images on disk, for data sets that are larger than the memory: an index reads the images that it names."""

import errno
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data import memory, npz
from resnet_jax.data.npz import PARTS, Arrays
from resnet_jax.errors import UserError

_COPIES = 3  # in memory: the whole set, its training part, and TensorFlow's
_ARRAYS = "arrays.npz"  # all that is not images


class CorruptImageError(UserError, ValueError):
    """An image on disk is not as it was written."""


class _OpenFile:
    """A file that is closed when nothing refers to it."""

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor = os.open(path, flags, 0o666)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ImagesOnDisk:
    """N images in a file, of one size; `images[index]` reads some of them as NumPy would take them from an array.

    It stands in a `Split` for an array that does not fit in memory. Each image is checked when it is read.

    Attributes:
        path: of the file, for errors.
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, shape: tuple[int, ...], checksums: np.ndarray | None = None) -> None:
        """Open the images of a file.

        Args:
            path: of the file: the pixels of each image, one after another, with nothing in between.
            shape: (N, H, W, 3).
            checksums: of the images; None makes a new file, which `images[i] = image` fills.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: if it is not as long as the images.
        """
        self.path = path
        self._file = _OpenFile(path, os.O_RDWR | os.O_CREAT if checksums is None else os.O_RDONLY)
        self._checksums = np.zeros(shape[0], np.uint32) if checksums is None else checksums
        self._positions = np.arange(shape[0])
        self._image_shape = tuple(shape[1:])
        if checksums is not None and os.fstat(self._file.descriptor).st_size != self.nbytes:
            raise ValueError(f"{path} is not as long as {shape[0]} images")

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return (len(self), *self._image_shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all images."""
        return math.prod(self.shape)

    @property
    def checksums(self) -> np.ndarray:
        """The CRC-32 of each image, uint32 [N]."""
        return self._checksums[self._positions]

    def __len__(self) -> int:
        """N."""
        return len(self._positions)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Read one image after another."""
        return (self[i] for i in range(len(self)))

    def select(self, positions: np.ndarray) -> "ImagesOnDisk":
        """Return some of the images, int [M], still on disk."""
        chosen = object.__new__(ImagesOnDisk)
        chosen.__dict__ |= self.__dict__ | {"_positions": self._positions[positions]}
        return chosen

    def __setitem__(self, position: int, image: np.ndarray) -> None:
        """Write an image of a new file.

        Raises:
            UserError: if it cannot be written, as on a full disk.
        """
        pixels = np.ascontiguousarray(image)
        self._checksums[position] = zlib.crc32(pixels.data)
        try:
            if os.pwrite(self._file.descriptor, pixels.data, position * pixels.nbytes) < pixels.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): set config.data.cache_dir to another folder"
            ) from error

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file.descriptor)

    def prefetch(self, positions: np.ndarray) -> None:
        """Ask the operating system to read images, int [M], that will be indexed soon, where it can be asked."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        size = math.prod(self._image_shape)
        for position in self._positions[positions].tolist():
            os.posix_fadvise(self._file.descriptor, position * size, size, os.POSIX_FADV_WILLNEED)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read images: uint8 [..., H, W, 3].

        Raises:
            CorruptImageError: if one is not as it was written.
            UserError: if one cannot be read.
        """
        positions = self._positions[index]
        images = np.empty((*np.shape(positions), *self._image_shape), np.uint8)
        for image, position in zip(images.reshape(-1, *self._image_shape), np.ravel(positions).tolist(), strict=True):
            try:
                count = os.preadv(self._file.descriptor, [image], position * image.nbytes)
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be read ({error.strerror}): rerun the command to resume"
                ) from error
            if count != image.nbytes or zlib.crc32(image.data) != self._checksums[position]:
                raise CorruptImageError(
                    f"image {position} of {self.path} is corrupt: delete {self.path.parent}, and rerun the command to decode the "
                    "images again"
                )
        return images


Images = np.ndarray | ImagesOnDisk


def checksums(images: Images) -> np.ndarray:
    """Return the CRC-32 of each image, uint32 [N]."""
    if isinstance(images, ImagesOnDisk):
        return images.checksums
    return np.array([zlib.crc32(np.ascontiguousarray(image).data) for image in images], np.uint32)


class Store:
    """Where the images of a data set go while they are decoded: to memory, or to files if they need most of it."""

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        """Use an empty folder for the files, which will move to a cache; None for memory only."""
        self._folder, self._cache = folder, cache
        self._on_disk: bool | None = None  # decided by the first part

    def empty(self, part: str, shape: tuple[int, ...], rest: int, what: str, remedy: str) -> Images:
        """Return a place for the images of a part.

        Args:
            part: one of `PARTS`.
            shape: (N, H, W, 3).
            rest: the bytes of this part and those after it.
            what: the images of `rest` in words, for an error.
            remedy: what to do if there is no room for them.

        Raises:
            TooLargeError: if neither the memory nor the folder's disk has room.
            OSError: if the file cannot be made.
        """
        if self._on_disk is None:
            self._on_disk = bool(self._folder) and not fits(rest)
        if not self._folder or not self._on_disk:
            memory.check(what, rest, remedy)
            return np.empty(shape, np.uint8)
        if rest > (free := shutil.disk_usage(self._folder).free):
            raise memory.TooLargeError(
                f"{what} take {rest / 1e9:,.1f} GB, and {memory.free() / 1e9:,.1f} GB of memory and {free / 1e9:,.1f} GB of the disk of "
                f"{self._cache} are free: set config.data.cache_dir to a folder on a larger disk, or {remedy}"
            )
        return ImagesOnDisk(self._folder / f"{part}_images", shape)


def images_of(arrays: Mapping[str, Any]) -> dict[str, ImagesOnDisk]:
    """Return those of a data set's arrays that are images on disk."""
    return {name: array for name, array in arrays.items() if isinstance(array, ImagesOnDisk)}


def fits(num_bytes: int) -> bool:
    """Whether images can be held in memory, with the copies that training makes of them."""
    return _COPIES * num_bytes <= memory.free()


def write(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write the rest of a data set to the folder in which a `Store` has its images."""
    images = images_of(arrays)
    whole = {name: array for name, array in arrays.items() if name not in images}
    for name, on_disk in images.items():
        whole |= {f"{name}_shape": np.array(on_disk.shape), f"{name}_checksums": on_disk.checksums}
        on_disk.sync()
    with (folder / _ARRAYS).open("wb") as file:
        np.savez(file, **whole)
        file.flush()
        os.fsync(file.fileno())


def move(folder: Path, target: Path, old: Path, arrays: Mapping[str, Any]) -> None:
    """Move a written folder to where `read` will look for it.

    Another process may have moved an equal one there in the meantime. Images that are open stay readable in either case.

    Args:
        folder: that `write` has written.
        target: its new path; what is there was found corrupt.
        old: a path to move that to.
        arrays: that were written.
    """
    with suppress(FileNotFoundError):
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if not target.exists():
            raise
    for images in images_of(arrays).values():
        images.path = target / images.path.name


def read(folder: Path, in_memory: bool = False) -> Arrays:
    """Return the arrays of a folder: the images on disk if they do not fit in memory.

    Args:
        folder: that `write` has written.
        in_memory: return the images in memory, or raise.

    Raises:
        FileNotFoundError, KeyError, ValueError: if the folder is not as it was written.
        TooLargeError: if the images do not fit in memory and must be there.
        UserError, OSError: if it cannot be read.
    """
    try:
        arrays = npz.read(folder / _ARRAYS)
    except memory.TooLargeError:
        raise
    except UserError as error:
        raise ValueError(str(error)) from error
    for part in PARTS:
        if (checksums := arrays.pop(f"{part}_images_checksums", None)) is not None:
            shape = arrays.pop(f"{part}_images_shape").tolist()
            arrays[f"{part}_images"] = ImagesOnDisk(folder / f"{part}_images", tuple(shape), checksums)
    on_disk = images_of(arrays)
    num_bytes = sum(images.nbytes for images in on_disk.values())
    if in_memory:
        memory.check(
            f"the images in {folder}", num_bytes, "set config.pipeline to tf_data, which can read them from disk"
        )
    if in_memory or fits(num_bytes):
        return arrays | {name: images[:] for name, images in on_disk.items()}
    return arrays


def say(arrays: Mapping[str, Any]) -> None:
    """Say which images are on disk, if some are."""
    images = [*images_of(arrays).values()]
    if images:
        count, num_bytes = sum(map(len, images)), sum(array.nbytes for array in images)
        print(
            f"{count:,} images take {num_bytes / 1e9:,.1f} GB and do not fit in memory three times: batches are read from "
            f"{images[0].path.parent}",
            flush=True,
        )
