"""Image files are read in one way, whoever reads them."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import make_tiny_config, tool
from PIL import Image

from resnet_jax import training
from resnet_jax.data import datasets, images
from resnet_jax.inference import trained_model

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_images_are_read_as_people_see_them(tmp_path):
    path = tmp_path / "image.png"

    def read(image, **more):
        image.save(path, "PNG", **more)
        return np.asarray(images.read(path))

    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (read(Image.fromarray(grey)) == grey[..., None]).all()
    assert (read(Image.fromarray(grey.astype(np.uint16) * 257)) == grey[..., None]).all()
    assert (read(Image.fromarray(grey > 99)) == 255 * (grey > 99)[..., None]).all()
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    assert read(half).tolist() == [[[*RED], [*WHITE]]]
    assert read(half.convert("P")).tolist()[0][0] == [*RED]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert read(palette).tolist() == [[[*RED], [0, 0, 255]]]
    assert read(palette, transparency=1).tolist() == [[[*RED], [*WHITE]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cameras_rotation_is_undone(tmp_path, orientation):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # the upper left is white
    undo = [None, Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE, Image.ROTATE_90,
            Image.TRANSVERSE, Image.ROTATE_270]  # fmt: skip
    stored = Image.fromarray(upright)
    if (way := undo[orientation - 1]) is not None:
        stored = stored.transpose(way)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    found = np.asarray(images.read(tmp_path / "photo.jpg"))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 5


def odd_kinds(rng, bright):
    """Images of 12 x 10 pixels in each odd kind, as (name, image, settings to save it with); dark or bright."""
    shade = rng.integers(0, 60, (12, 10, 3), dtype=np.uint8) + (180 if bright else 0)
    image = Image.fromarray(shade)
    alpha = Image.fromarray(np.where(np.arange(10) < 5, 255, 90).astype(np.uint8) * np.ones((12, 1), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    rgba, grey_alpha = image.copy(), image.convert("L")
    rgba.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return [
        ("turned.jpg", image, {"exif": turned}),
        ("cmyk.jpg", image.convert("CMYK"), {}),
        ("transparent.png", rgba, {}),
        ("transparent.webp", rgba, {"lossless": True}),
        ("grey and transparent.png", grey_alpha, {}),
        ("palette.png", image.quantize(8), {"transparency": 1}),
        ("deep.png", deep, {}),
        ("deep.tiff", deep, {}),
        ("bits.png", image.convert("1"), {}),
        ("old.bmp", image, {}),
        ("moving.gif", image.quantize(8), {"save_all": True, "append_images": [image.rotate(90).quantize(8)]}),
        ("no suffix", image, {"format": "PNG"}),
        ("within/a/folder.png", image, {}),
    ]


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """A data set of two classes, dark and bright, with every odd kind in both parts, and files that are no images."""
    root, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("bright", "dark"):
            for name, image, settings in odd_kinds(rng, label == "bright"):
                path = root / part / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, **settings)
            for name in (".hidden.png", "Thumbs.db", "desktop.ini", "__MACOSX/._a.png"):
                (root / part / label / name).parent.mkdir(exist_ok=True)
                (root / part / label / name).write_text("left behind")
            (root / part / label / "notes.txt").write_text("no image")
    return root


def test_prediction_sees_the_pixels_of_evaluation(odd_folder, tmp_path, cache_dir, capsys):
    config = make_tiny_config(cache_dir)
    config.batch_size = 8
    config.data.name, config.data.image_size, config.data.validation_ratio = f"folder:{odd_folder}", 8, 0.0
    training.train(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "left out 4 files that are no images" in capsys.readouterr().out

    test = datasets.load(config.data).test
    model = trained_model.load(tmp_path / "run", "latest")
    paths, others = images.find(odd_folder / "test")
    assert (len(paths), others) == (26, 2)
    batch = np.concatenate([trained_model.as_batch(np.asarray(images.read(path)), model.image_shape) for path in paths])
    np.testing.assert_array_equal(batch, test.images)
    np.testing.assert_array_equal(model.logits(batch), model.logits(test.images))

    capsys.readouterr()
    tool("predict", tmp_path / "run", odd_folder / "test", "--checkpoint=latest", "--json", "--top=1")
    printed = capsys.readouterr()
    assert f"{odd_folder}/test: left out 2 files that are no images" in printed.err
    right = [row["predictions"][0]["class"] in Path(row["file"]).parts for row in json.loads(printed.out)]
    assert len(right) == 26
    assert np.mean(right) == result["test_accuracy"]


def test_formats_that_start_programs_are_not_read_whatever_their_name(tmp_path):
    for name in ("cat.jpg", "cat"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert images.find(tmp_path) == ([tmp_path / "cat.jpg"], 1)
    with pytest.raises(Image.UnidentifiedImageError):
        images.read(tmp_path / "cat.jpg")


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert images.find(tmp_path) == ([], 1)


def test_a_tiff_of_tiles_that_would_fill_the_memory_is_refused(tmp_path):
    tags = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 20_000, 324: 8, 325: 9}  # 9 x 9 pixels
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "tiles.tif").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4))
    with pytest.raises(ValueError, match="it has tiles of more than 100,000,000 pixels"):
        images.read(tmp_path / "tiles.tif")


@pytest.mark.parametrize(("size", "why"), [((20_000, 5_001), "more than the limit"), ((1, 1001), "1000 times as long")])
def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, size, why):
    Image.new("1", size).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=why):
        images.read(tmp_path / "large.png")
