import errno
import gc
import http.server
import io
import os
import pickle
import socket
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import final
from resnet_jax.data import datasets, images, memory, on_disk, sources
from resnet_jax.disk import cache
from resnet_jax.errors import UserError

DIGITS_FINGERPRINT = "617c980d45980a2ed1f4992c26b10bd1c8fcae2ce2479ec88e0018e8507f9a00"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (125.30691805, 122.95039414, 113.86538318)  # of the training images, 0..255, as published


@pytest.fixture
def data(final_config, tmp_path):
    """`config.data` with every path inside the test's own folder."""
    final_config.data.cache_dir = str(tmp_path / "cache")
    final_config.data.data_dir = str(tmp_path / "tfds")
    return final_config.data


def load(data, name, **fields):
    data.name = str(name)
    data.update(fields)
    return datasets.load(data)


def refusal(data, name, *words, **fields):
    with pytest.raises(UserError) as refused:
        load(data, name, **fields)
    for word in words:
        assert str(word) in str(refused.value)
    return str(refused.value)


def same(a, b):
    return a.fingerprint == b.fingerprint and all(
        np.array_equal(x, y) for p, q in ((a.train, b.train), (a.test, b.test)) for x, y in zip(p, q, strict=True)
    )


def arrays(**changed):
    """The arrays of a valid source, 6 + 4 images of 5x7 pixels in three classes; None takes one out."""
    rng = np.random.default_rng(0)
    return {
        key: value
        for key, value in {
            "train_images": rng.integers(0, 256, (6, 5, 7, 3), np.uint8),
            "train_labels": np.arange(6) % 3,
            "test_images": rng.integers(0, 256, (4, 5, 7, 3), np.uint8),
            "test_labels": np.arange(4) % 3,
            "class_names": np.array(["ant", "bee", "cat"]),
            **changed,
        }.items()
        if value is not None
    }


def npz(tmp_path, **changed):
    np.savez(tmp_path / "data.npz", **arrays(**changed))
    return f"npz:{tmp_path / 'data.npz'}"


COLOURS = {"ant": (250, 10, 20), "bee": (10, 240, 30)}


def save_image(path, colour=(1, 2, 3), size=(7, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def folder(tmp_path):
    """train: 2 ants, 2 bees; test: one of each."""
    root = tmp_path / "images"
    for label, colour in COLOURS.items():
        for file in ("train/{}/0.png", "train/{}/1.png", "test/{}/0.png"):
            save_image(root / file.format(label), colour)
    return root


def cached_file(data):
    (file,) = Path(data.cache_dir).iterdir()
    return file


def forbid(*_):
    raise AssertionError("decoded again")


def test_digits_are_scaled_and_are_the_same_digits(data):
    digits, scaled = load(data, "digits"), load(data, "digits", image_size=32)
    assert scaled.train.images.shape == (*digits.train.images.shape[:1], 32, 32, 3)
    np.testing.assert_array_equal(scaled.train.labels, digits.train.labels)
    means = (images.mean(axis=(1, 2, 3)) for images in (scaled.test.images, digits.test.images))
    np.testing.assert_allclose(*means, atol=2.0)  # of 255: bilinear


def test_digits_are_stratified_and_always_the_same(data):
    digits = load(data, "digits")
    assert digits.fingerprint == DIGITS_FINGERPRINT
    assert same(digits, load(data, "digits"))
    assert len(digits.train.images) + len(digits.test.images) == 1797
    assert digits.class_names == tuple("0123456789")
    for split, share in ((digits.train, 0.8), (digits.test, 0.2)):
        assert split.images.shape == (len(split.labels), 8, 8, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.max() == 255
        both = np.bincount(digits.train.labels) + np.bincount(digits.test.labels)
        assert np.abs(np.bincount(split.labels) - share * both).max() < 1


def test_an_npz_gives_back_its_arrays(data, tmp_path):
    name = npz(tmp_path)
    dataset, expected = load(data, name), arrays()
    assert dataset.name == name
    assert dataset.class_names == ("ant", "bee", "cat")
    for part in ("train", "test"):
        split = getattr(dataset, part)
        assert np.array_equal(split.images, expected[f"{part}_images"])
        assert np.array_equal(split.labels, expected[f"{part}_labels"])
        assert split.labels.dtype == np.int32


def test_an_npz_without_class_names_counts_them_from_the_labels(data, tmp_path):
    assert load(data, npz(tmp_path, class_names=None)).class_names == ("0", "1", "2")


def test_the_labels_integer_type_does_not_change_the_fingerprint(data, tmp_path):
    fingerprints = {
        load(data, npz(tmp_path, train_labels=(np.arange(6) % 3).astype(kind))).fingerprint
        for kind in (np.int64, np.uint8, ">i4")
    }
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"test_labels": None}, ["lacks test_labels", "it holds train_images"]),
        ({"train_labels": None, "test_images": None}, ["lacks train_labels, test_images"]),
        (
            {"test_images": np.zeros((4, 5, 7, 4), np.uint8)},
            ["test_images is uint8 [4, 5, 7, 4]", "test_images[..., :3]"],
        ),
        (
            {"test_images": np.zeros((4, 35), np.uint8)},
            ["test_images is uint8 [4, 35]: images must be [N, H, W, 3] or"],
        ),
        ({"test_images": np.zeros((4, 49), np.uint8)}, ["use test_images.reshape(-1, 7, 7)"]),
        ({"train_images": np.zeros((6, 75), np.uint8)}, ["use train_images.reshape(-1, 3, 5, 5)"]),
        (
            {"train_images": np.full((6, 5, 7, 3), -1.5)},
            ["train_images is float64", "values from -1.5 to -1.5", "LOW of black"],
        ),
        (
            {"train_images": np.full((6, 5, 7, 3), 16)},
            ["train_images is int64", "values from 16 to 16"],
        ),  # of what scale?
        ({"test_images": np.full((4, 5, 7, 3), np.nan)}, ["test_images is float64", "values from nan"]),
        ({"test_images": np.full((4, 5, 7, 3), "x")}, ["test_images is <U1", "astype(np.uint8)"]),
        ({"train_labels": np.full(6, 0.5)}, ["train_labels is float64 [6]: give one whole number"]),
        (
            {"train_labels": np.full((6, 3), 0.3)},
            ["train_labels is float64 [6, 3] and not one-hot", "train_labels.argmax(axis=1)"],
        ),
        ({"test_labels": np.array(["ant", "bee", "cat", "ant"])}, ["test_labels is <U3 [4]: give one whole number"]),
        (
            {"train_labels": np.array(["ant", "bee", "cat"] * 2)},
            ["test_labels is int64 [4], and train_labels are names"],
        ),
        (
            {
                "train_labels": np.array(["ant", "bee", "cat"] * 2),
                "test_labels": np.array(["ant", "bee", "cat", "wasp"]),
            },
            ["test_labels has 'wasp', which class_names does not have"],
        ),
        ({"train_labels": np.arange(6)}, ["train labels run from 0 to 5", "must be in 0..2"]),
        ({"test_labels": np.arange(4) - 1}, ["test labels run from -1 to 2", "must be in 0..2"]),
        ({"test_labels": np.array([0, 1, 2, 3]), "class_names": None}, ["test labels run from 0 to 3"]),
        ({"train_labels": np.arange(5) % 3}, ["train labels are int64 (5,) for 6 images"]),
        (
            {"test_images": np.zeros((0, 5, 7, 3), np.uint8), "test_labels": np.zeros(0, int)},
            ["test", "at least one image"],
        ),
        ({"train_images": np.zeros((6, 0, 7, 3), np.uint8)}, ["train_images is uint8 [6, 0, 7, 3]"]),
        (
            {"class_names": np.array(["ant", "bee", "cat", "dog", "eel"])},
            ["no training image for 2 of 5 classes (dog, eel)"],
        ),
        ({"class_names": np.array([b"a", b"b", b"c"])}, ["class_names must be unique strings"]),
        ({"class_names": np.array([["a"], ["b"], ["c"]])}, ["class_names must be unique strings"]),
        ({"class_names": np.array("a")}, ["class_names must be unique strings"]),
        ({"class_names": np.array(["a", "b", "a"])}, ["class_names must be unique strings"]),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 2**31]), "class_names": None}, ["labels run to 2147483648"]),
        (
            {"test_images": np.zeros((4, 5, 8, 3), np.uint8)},
            ["train images are (5, 7, 3)", "test images (5, 8, 3)", "must have the same size"],
        ),
    ],
)
def test_an_npz_that_is_not_a_data_set_is_refused(data, tmp_path, changed, words):
    refusal(data, npz(tmp_path, **changed), *words)


GREY = np.random.default_rng(2).integers(0, 256, (6, 5, 7, 1), np.uint8)
RGB = arrays()["train_images"]
BINARY = GREY > 127
LABELS = np.arange(6) % 3


@pytest.mark.parametrize(
    ("key", "stored", "meant"),
    [
        ("train_images", GREY, np.repeat(GREY, 3, axis=3)),
        ("train_images", GREY[..., 0], np.repeat(GREY, 3, axis=3)),
        ("train_images", np.moveaxis(GREY, 3, 1), np.repeat(GREY, 3, axis=3)),
        ("train_images", np.moveaxis(RGB, 3, 1), RGB),
        ("train_images", (RGB / 255).astype(np.float32), RGB),
        ("train_images", RGB / 255 * (1 + 1e-6), RGB),
        ("train_images", (GREY[..., 0] / 255).astype(np.float16), np.repeat(GREY, 3, axis=3)),
        ("train_images", RGB.astype(np.float64), RGB),
        ("train_images", RGB.astype(np.int64), RGB),
        ("train_images", BINARY[..., 0], np.repeat(BINARY, 3, axis=3) * np.uint8(255)),
        ("train_labels", LABELS.astype(np.float32), LABELS),
        ("train_labels", LABELS[:, None], LABELS),
        ("train_labels", np.eye(3)[LABELS], LABELS),
        ("train_labels", np.eye(3, dtype=bool)[LABELS], LABELS),
        ("train_labels", np.eye(3, dtype=np.uint8)[LABELS], LABELS),
    ],
)
def test_other_forms_of_images_and_labels_are_converted_and_a_line_says_so(data, tmp_path, capsys, key, stored, meant):
    converted = load(data, npz(tmp_path, **{key: stored}))
    line = f"converted {key} from {stored.dtype} {list(stored.shape)} to "
    assert line in capsys.readouterr().out
    assert same(converted, load(data, npz(tmp_path, **{key: meant})))
    assert "converted" not in capsys.readouterr().out


def test_labels_can_be_bool_or_names(data, tmp_path):
    two = {"test_labels": np.array([True, False] * 2), "class_names": None}
    assert load(data, npz(tmp_path, train_labels=LABELS > 0, **two)).train.labels.tolist() == [0, 1, 1, 0, 1, 1]
    words = np.array(["cat", "bee", "ant"])
    expected = load(data, npz(tmp_path))
    for kind in ("U", "S"):
        train, test = (words[::-1][np.arange(n) % 3].astype(kind) for n in (6, 4))
        assert same(expected, load(data, npz(tmp_path, train_labels=train, test_labels=test, class_names=None)))
    named = load(data, npz(tmp_path, train_labels=words[LABELS], test_labels=words[LABELS[:4]], class_names=words))
    assert (named.class_names, named.train.labels.tolist()) == (("cat", "bee", "ant"), LABELS.tolist())


def test_images_of_all_parts_have_one_scale(data, tmp_path):
    dark = {"train_images": RGB.astype(np.float32), "test_images": np.ones((4, 5, 7, 3), np.float32)}
    assert (load(data, npz(tmp_path, **dark)).test.images == 1).all()  # of 255, as in train


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_with_any_bit_flipped_is_read_or_refused_and_never_a_traceback(data, tmp_path, compressed):
    whole = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(whole, **arrays())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole.getvalue())
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (tmp_path / "data.npz").write_bytes(damaged)
        try:
            load(data, f"npz:{tmp_path / 'data.npz'}")
        except UserError:
            refused += 1
    assert refused > 100


def test_a_file_that_is_no_npz_is_named(data, tmp_path):
    refusal(data, f"npz:{tmp_path}/none.npz", tmp_path / "none.npz", "is not a file")
    refusal(data, f"npz:{tmp_path}", tmp_path, "is not a file")
    for content in (b"", b"not an npz", Path(npz(tmp_path)[4:]).read_bytes()[:500]):
        (tmp_path / "bad.npz").write_bytes(content)
        refusal(data, f"npz:{tmp_path}/bad.npz", tmp_path / "bad.npz", "cannot be read as an .npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refusal(data, f"npz:{tmp_path}/one.npy", tmp_path / "one.npy", "cannot be read as an .npz")
    gc.collect()


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_in_an_npz_is_refused_and_never_executed(data, tmp_path):
    trap = Trap(tmp_path / "executed")
    refusal(data, npz(tmp_path, train_labels=np.array([trap] * 6, object)), "cannot be read as an .npz")
    (tmp_path / "data.npz").write_bytes(pickle.dumps(trap))
    refusal(data, f"npz:{tmp_path}/data.npz", "cannot be read as an .npz")
    assert not (tmp_path / "executed").exists()


def test_a_folders_classes_are_its_sorted_names(data, tmp_path):
    dataset = load(data, f"folder:{folder(tmp_path)}")
    assert dataset.class_names == ("ant", "bee")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.train.images.shape == (4, 5, 7, 3)
    for split in (dataset.train, dataset.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert (image == COLOURS[dataset.class_names[label]]).all()


def test_images_of_every_mode_become_rgb(data, tmp_path):
    root = folder(tmp_path)
    colours = {"L": (90, 90, 90), "RGBA": (9, 8, 7), "P": (255, 0, 0), "1": (255, 255, 255), "LA": (5, 5, 5)}
    for mode, colour in colours.items():
        save_image(root / "train" / mode / "0.png", colour, mode=mode)
    dataset = load(data, f"folder:{root}")
    for mode, colour in colours.items():
        (image,) = dataset.train.images[dataset.train.labels == dataset.class_names.index(mode)]
        assert (image == colour).all(), mode


def test_images_of_two_sizes_need_an_image_size(data, tmp_path):
    root = folder(tmp_path)
    save_image(root / "train/ant/tall.png", size=(5, 9))
    refusal(data, f"folder:{root}", "some images have 5x7 pixels, others 9x5 pixels: set config.data.image_size")
    dataset = load(data, f"folder:{root}", image_size=4)
    assert dataset.train.images.shape == (5, 4, 4, 3)
    assert dataset.test.images.shape == (2, 4, 4, 3)


def test_image_size_scales_the_shorter_side_and_cuts_out_the_centre(data, tmp_path):
    root = folder(tmp_path)
    stripes = Image.new("RGB", (16, 8))
    stripes.paste((255, 0, 0), (4, 0, 12, 8))  # red in the middle half
    for part in ("train", "test"):
        stripes.save(root / part / "ant/0.png")
    dataset = load(data, f"folder:{root}", image_size=4)
    middle = dataset.test.images[0]
    assert middle.shape == (4, 4, 3)
    assert (middle[:, 1:3] == (255, 0, 0)).all()
    assert (middle[..., 0] > 128).all()
    assert load(data, f"folder:{root}", image_size=20).train.images.shape[1:] == (20, 20, 3)


def test_a_class_that_only_test_has_is_refused(data, tmp_path):
    root = folder(tmp_path)
    save_image(root / "test/wasp/0.png")
    refusal(data, f"folder:{root}", root / "test", root / "train", "wasp")


def test_a_folder_without_images_in_a_part_is_refused(data, tmp_path):
    root = folder(tmp_path)
    for file in (root / "test").glob("*/*"):
        file.unlink()
    refusal(data, f"folder:{root}", root / "test", "holds no images")  # empty classes alone
    refusal(
        data, f"folder:{tmp_path}/nowhere", tmp_path / "nowhere", "is not a folder: give config.data.name as folder:DIR"
    )


def tree(root, *files):
    """Images of different colours at these paths."""
    for i, file in enumerate(files):
        save_image(root / file, (i, i // 200, 0))
    return root


def sizes(dataset, data):
    train, validation = datasets.validation_split(dataset, data)
    return [len(split.labels) for split in (train, validation, dataset.test)]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_a_folders_val_is_the_validation_set_and_no_share_of_train_is_taken(data, tmp_path, name):
    files = [f"{part}/{label}/{i}.png" for part in ("train", name, "test") for label in "ab" for i in range(3)]
    files.remove(f"{name}/b/2.png")
    root = tree(tmp_path / "birds", *files)
    assert data.validation_ratio > 0
    for _ in range(2):  # the second from the cache
        dataset = load(data, f"folder:{root}")
        train, validation = datasets.validation_split(dataset, data)
        assert validation.labels.tolist() == [0, 0, 0, 1, 1]
        assert validation.images[:, 0, 0, 0].tolist() == [6, 7, 8, 9, 10]
        assert sizes(dataset, data) == [6, 5, 6]
    assert datasets.summary(dataset, train, validation, data) == (
        f"folder:{root}: 6 training, 5 validation and 6 test images of 2 classes (train/, {name}/, test/; "
        "config.data.validation_ratio is not used)"
    )
    assert datasets.source_positions(dataset, data, np.array([5, 2])).tolist() == [5, 2]


def test_images_of_a_folder_without_a_test_set_become_one_by_class_always_the_same(data, tmp_path):
    files = [f"{label}/{i}.png" for label, count in (("a", 30), ("b", 10)) for i in range(count)]
    data.validation_ratio = 0.25
    flat = load(data, f"folder:{tree(tmp_path / 'flat', *files)}")
    assert flat.class_names == ("a", "b")
    assert sizes(flat, data) == [24, 8, 8]
    assert np.bincount(flat.test.labels).tolist() == [6, 2]
    shown = {image.tobytes() for split in (flat.train, flat.test) for image in split.images}
    assert len(shown) == 40
    assert flat.layout == "<class>/; the test images are a fifth of each class"
    only_train = load(data, f"folder:{tree(tmp_path / 'only', *(f'train/{file}' for file in files))}")
    assert same(flat, only_train)
    assert only_train.layout.startswith("train/; ")
    assert same(flat, load(data, f"folder:{tmp_path}/flat"))  # from the cache
    val = [f"val/{label}/x.png" for label in "ab"]
    with_val = load(data, f"folder:{tree(tmp_path / 'val', *(f'train/{file}' for file in files), *val)}")
    assert sizes(with_val, data) == [32, 2, 8]


def test_a_folder_with_too_few_images_to_take_a_test_set_from_is_refused(data, tmp_path):
    root = tree(tmp_path / "few", "a/0.png", "b/0.png")
    refusal(data, f"folder:{root}", root, "has no test set, and its 2 images are too few to take a fifth of each class")
    refusal(data, f"folder:{tree(tmp_path / 'singles', *(f'{c}/0.png' for c in 'abcde'))}", "5 images are too few")


def test_a_class_can_be_called_train(data, tmp_path):
    root = tree(tmp_path / "vehicles", *(f"{label}/{i}.png" for label in ("car", "train") for i in range(10)))
    assert load(data, f"folder:{root}").class_names == ("car", "train")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["test/a/0.png", "val/a/0.png"], ["holds val/, test/ but not train/", "train/<class>/"]),
        (["train/a/0.png", "Training/a/0.png"], ["are both for train: keep one of them"]),
        (["train/a/0.png", "val/a/0.png", "val/c/0.png"], ["val has classes that", "train does not have: c"]),
        (["train/a/0.png", "test/0.png"], ["test holds no images: put them in"]),
        (["train/0.png", "test/0.png"], ["train holds no images: put them in"]),
        (["0.png"], ["holds no images: put them in"]),
    ],
)
def test_a_folder_of_an_unclear_layout_is_refused_saying_what_to_do(data, tmp_path, files, words):
    refusal(data, f"folder:{tree(tmp_path / 'birds', *files)}", tmp_path / "birds", *words)


def test_composed_and_decomposed_names_are_the_same_class(data, tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    files = [
        f"train/{composed}/0.png",
        f"train/{decomposed}/1.png",
        "train/tea/0.png",
        f"test/{decomposed}/0.png",
        "test/tea/0.png",
    ]
    dataset = load(data, f"folder:{tree(tmp_path / 'cups', *files)}")
    assert dataset.class_names == (composed, "tea")
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert load(data, npz(tmp_path, class_names=np.array(["ant", decomposed, "tea"]))).class_names == (
        "ant",
        composed,
        "tea",
    )
    refusal(
        data, npz(tmp_path, class_names=np.array(["ant", decomposed, composed])), "class_names must be unique strings"
    )


@pytest.mark.parametrize("part", ["", "train"])
def test_a_class_whose_name_is_not_utf_8_is_named(data, tmp_path, part):
    root = folder(tmp_path)
    (root / part / os.fsdecode(b"caf\xe9")).mkdir()
    refusal(data, f"folder:{root}", root / part, r"the folder b'caf\xe9', whose name is not UTF-8: rename it")


def test_one_class_is_refused(data, tmp_path):
    root = tree(tmp_path / "birds", *(f"{part}/wren/{i}.png" for part in ("train", "test") for i in range(3)))
    refusal(data, f"folder:{root}", "has only one class, wren: give images of two or more")
    refusal(
        data,
        npz(tmp_path, class_names=None, train_labels=np.zeros(6, int), test_labels=np.zeros(4, int)),
        "has only one class, 0",
    )


def test_folders_beside_the_parts_are_named(data, tmp_path):
    root = folder(tmp_path)
    tree(root, "raw/ant/0.png")
    assert load(data, f"folder:{root}").layout == "train/, test/; left out: raw/"


def test_validation_images_that_are_training_images_too_are_counted_in_a_warning(data, tmp_path, capsys):
    root = folder(tmp_path)
    save_image(root / "val/ant/0.png", COLOURS["ant"])
    load(data, f"folder:{root}")
    assert (
        "1 of 1 validation images are training images too, so the validation accuracy is too high"
        in capsys.readouterr().err
    )


def test_an_npz_can_have_validation_images_and_no_test_images(data, tmp_path):
    rng = np.random.default_rng(1)
    train = {"train_images": rng.integers(0, 256, (30, 5, 7, 3), np.uint8), "train_labels": np.arange(30) % 3}
    name = npz(tmp_path, **train, test_images=None, test_labels=None)
    dataset = load(data, name)
    assert (len(dataset.train.labels), np.bincount(dataset.test.labels).tolist()) == (24, [2, 2, 2])
    assert dataset.layout == "train_images; the test images are a fifth of each class"
    with_validation = load(
        data,
        npz(tmp_path, **train, validation_images=train["train_images"][:4] // 2, validation_labels=np.arange(4) % 3),
    )
    assert sizes(with_validation, data) == [30, 4, 4]
    assert len({dataset.fingerprint, with_validation.fingerprint, load(data, npz(tmp_path, **train)).fingerprint}) == 3
    refusal(data, npz(tmp_path, validation_images=train["train_images"]), "lacks validation_labels")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_of_a_folder_without_images_is_refused(data, tmp_path, part):
    root = folder(tmp_path)
    (root / part / "wasp").mkdir()
    (root / part / "wasp/.DS_Store").write_bytes(b"\0")
    refusal(data, f"folder:{root}", root / part / "wasp", "holds no images")


def test_a_folder_within_a_class_that_cannot_be_read_is_named(data, tmp_path, monkeypatch):
    root = folder(tmp_path)
    (root / "train/ant/more").mkdir()
    scan = os.scandir

    def scandir(directory="."):
        if str(directory).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(directory))
        return scan(directory)

    monkeypatch.setattr(os, "scandir", scandir)
    refusal(data, f"folder:{root}", "cannot be read", "Permission denied", root / "train/ant/more")


def test_links_to_folders_within_a_class_are_counted_as_left_out(data, tmp_path, capsys):
    root = folder(tmp_path)
    (root / "train/ant/elsewhere").symlink_to(root / "train/bee")
    assert load(data, f"folder:{root}").train.labels.tolist() == [0, 0, 1, 1]
    assert "left out a file that is no image" in capsys.readouterr().out


def test_test_images_that_are_training_images_too_are_counted_in_a_warning(data, tmp_path, capsys):
    root = folder(tmp_path)
    load(data, f"folder:{root}")
    assert "2 of 2 test images are training images too" in capsys.readouterr().err
    save_image(root / "test/ant/0.png", (1, 1, 1))
    load(data, f"folder:{root}")
    assert "1 of 2 test images are training images too" in capsys.readouterr().err
    save_image(root / "test/bee/0.png", (2, 2, 2))
    load(data, f"folder:{root}")
    load(data, npz(tmp_path, train_images=np.asfortranarray(arrays()["train_images"])))
    assert capsys.readouterr().err == ""


def test_hidden_and_loose_files_are_passed_over(data, tmp_path):
    root = folder(tmp_path)
    before = load(data, f"folder:{root}")
    (root / "train/ant/.DS_Store").write_bytes(b"\0")
    (root / "train/README").write_text("loose")
    save_image(root / "train/.ipynb_checkpoints/0.png")
    assert same(before, load(data, f"folder:{root}"))


@pytest.mark.parametrize("content", [b"text", b"", b"\x89PNG\r\n\x1a\n cut"])
def test_a_file_that_is_no_image_is_named(data, tmp_path, content):
    root = folder(tmp_path)
    (root / "train/ant/notes.png").write_bytes(content)
    refusal(data, f"folder:{root}", root / "train/ant/notes.png", "cannot be read as an image")
    assert not list(Path(data.cache_dir).iterdir())


def test_pixels_of_more_than_16_bits_are_refused_for_they_would_be_clipped(data, tmp_path):
    root = folder(tmp_path)
    Image.new("F", (7, 5)).save(root / "train" / "ant" / "deep.tiff")
    refusal(data, f"folder:{root}", root / "train" / "ant" / "deep.tiff", "do not have 8 or 16 bits (mode F)")


def test_all_files_that_cannot_be_read_are_named_at_once(data, tmp_path):
    root = folder(tmp_path)
    broken = [root / "train/ant/a.png", root / "test/ant/b.jpg"]
    for path in broken:
        path.write_bytes(b"broken")
    refusal(data, f"folder:{root}", "2 files cannot be read as images", *broken)


def test_a_cut_off_image_is_named(data, tmp_path):
    root = folder(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(root / "test/ant/cut.png")
    whole = (root / "test/ant/cut.png").read_bytes()
    (root / "test/ant/cut.png").write_bytes(whole[: len(whole) // 2])
    refusal(data, f"folder:{root}", root / "test/ant/cut.png", "cannot be read as an image")


def test_a_second_load_comes_from_the_cache(data, tmp_path, monkeypatch):
    root = folder(tmp_path)
    first = load(data, f"folder:{root}")
    monkeypatch.setattr(sources, "read_folder", forbid)
    assert same(first, load(data, f"folder:{root}"))


def test_the_cache_is_an_npz_data_set_itself(data, tmp_path):
    first = load(data, f"folder:{folder(tmp_path)}")
    assert same(first, load(data, f"npz:{cached_file(data)}"))


def cut(content):
    return content[: len(content) // 2]


def flip(key):
    """Flip the last bit of an array's first value in an uncompressed .npz."""

    def damage(content):
        start = content.index(b"\x93NUMPY", content.index(f"{key}.npy".encode()))
        first = start + 10 + int.from_bytes(content[start + 8 : start + 10], "little")
        return content[:first] + bytes([content[first] ^ 1]) + content[first + 1 :]

    return damage


def test_images_that_would_not_fit_in_the_memory_are_refused_before_they_are_decoded(data, tmp_path, monkeypatch):
    """As of ImageNet-1k at 224 pixels, which take 193 GB."""
    import toy_tfds

    toy_tfds.ToyGrey(data_dir=data.data_dir).download_and_prepare()
    root, file = folder(tmp_path), npz(tmp_path)
    whole = load(data, f"folder:{root}")
    decoded, read = [], images.read
    monkeypatch.setattr(images, "read", lambda path: decoded.append(path) or read(path))
    monkeypatch.setattr(memory, "free", lambda: 6 * 7 * 5 * 3 - 1)
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=6 * 7 * 5 * 3 - 1))
    refusal(data, f"folder:{root}", "6 images of 5x7 pixels take 0.0 GB, and")  # and not: the cache is corrupt
    decoded.clear()
    refusal(data, f"folder:{root}", "6 images of 8x8 pixels take 0.0 GB, and", "image_size", image_size=8)
    assert len(decoded) == 1
    refusal(data, "toy_grey", "10 images of 8x8 pixels take", "such as toy_grey:train[:10%]", image_size=8)
    refusal(data, file, "the arrays of", "take", image_size=0)
    (root / "train" / "ant" / "0.png").write_bytes(b"")
    refusal(data, f"folder:{root}", "6 images of 8x8 pixels take", image_size=8)  # not: one file cannot be read
    save_image(root / "train" / "ant" / "0.png", COLOURS["ant"])
    monkeypatch.undo()
    assert same(whole, load(data, f"folder:{root}", image_size=0))


def test_what_is_decoded_already_is_not_counted_again(data, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(memory, "check", lambda what, num_bytes, remedy: needed.append(num_bytes))
    load(data, f"folder:{folder(tmp_path)}")
    assert needed == [6 * 7 * 5 * 3, 2 * 7 * 5 * 3]  # train and test; test


@pytest.mark.parametrize(
    "damage", [cut, *map(flip, ("train_images", "test_labels", "class_names", "fingerprint")), lambda _: b""]
)
def test_a_damaged_cache_is_noticed_and_rebuilt(data, tmp_path, monkeypatch, capsys, damage):
    root = folder(tmp_path)
    first = load(data, f"folder:{root}")
    file = cached_file(data)
    file.write_bytes(damage(file.read_bytes()))
    assert same(first, load(data, f"folder:{root}"))
    gc.collect()
    assert f"{file} is corrupt" in capsys.readouterr().out
    monkeypatch.setattr(sources, "read_folder", forbid)
    assert same(first, load(data, f"folder:{root}"))


def test_cached_data_are_hashed_once(data, tmp_path, monkeypatch):
    root, calls = folder(tmp_path), []
    first = load(data, f"folder:{root}")
    fingerprint = datasets.fingerprint
    monkeypatch.setattr(datasets, "fingerprint", lambda arrays: calls.append(1) or fingerprint(arrays))
    assert same(first, load(data, f"folder:{root}"))
    assert len(calls) == 1


def test_a_cache_that_is_whole_but_of_other_data_is_noticed(data, tmp_path, capsys):
    root = folder(tmp_path)
    first = load(data, f"folder:{root}")
    file = cached_file(data)
    with np.load(file) as content:
        np.savez(file, **{**content, "train_labels": content["train_labels"][::-1]})
    assert same(first, load(data, f"folder:{root}"))
    assert "is corrupt" in capsys.readouterr().out


def test_changing_adding_or_removing_a_file_makes_the_cache_stale(data, tmp_path):
    root = folder(tmp_path)
    file = root / "train/ant/1.png"
    seen = [load(data, f"folder:{root}")]
    for change in (lambda: save_image(file, (77, 0, 0)), lambda: save_image(file.with_name("2.png")), file.unlink):
        change()
        if file.exists():
            os.utime(file, ns=(0, len(seen)))  # whatever the file system's clock resolves
        seen.append(load(data, f"folder:{root}"))
    assert [len(dataset.train.images) for dataset in seen] == [4, 4, 5, 4]
    assert len({dataset.fingerprint for dataset in seen}) == 4


def test_image_size_has_a_cache_of_its_own(data, tmp_path, monkeypatch):
    root = folder(tmp_path)
    sizes = {size: load(data, f"folder:{root}", image_size=size) for size in (0, 4)}
    assert sizes[0].train.images.shape[1:] == (5, 7, 3)
    assert sizes[4].train.images.shape[1:] == (4, 4, 3)
    monkeypatch.setattr(sources, "read_folder", forbid)
    assert all(same(sizes[size], load(data, f"folder:{root}", image_size=size)) for size in (4, 0))


def test_a_cache_folder_that_cannot_be_made_is_named(data, tmp_path):
    root = folder(tmp_path)
    (tmp_path / "file").write_text("")
    refusal(
        data, f"folder:{root}", tmp_path / "file/cache", "config.data.cache_dir", cache_dir=f"{tmp_path}/file/cache"
    )


def test_a_full_disk_leaves_nothing_behind_and_does_not_stop_a_run_that_has_its_images(
    data, tmp_path, monkeypatch, capsys
):
    root = folder(tmp_path)

    def full(file, **_):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(load(data, f"folder:{root}").train.labels) == 4
    said = capsys.readouterr().err
    assert (
        f"{data.cache_dir} cannot store the decoded data ([Errno 28] No space left on device): the next run decodes"
        in said
    )
    assert list(Path(data.cache_dir).rglob("*")) == []


def test_the_cache_goes_to_the_users_cache_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(data, f"folder:{folder(tmp_path)}", cache_dir="")
    assert [file.suffix for file in (tmp_path / "xdg/resnet_jax").iterdir()] == [".npz"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache/resnet_jax"


@pytest.mark.parametrize("why", ["HOME cannot be written", "no HOME and no entry in passwd"])
def test_without_a_cache_folder_data_are_decoded_each_time_and_a_line_says_so_once_before(
    data, tmp_path, monkeypatch, capsys, why
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/none")
    if why != "HOME cannot be written":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as Python does for such a user
    cache._say_once.cache_clear()
    printed = []
    read_folder = sources.read_folder
    monkeypatch.setattr(sources, "read_folder", lambda *a: printed.append(capsys.readouterr().err) or read_folder(*a))
    root = folder(tmp_path)
    save_image(root / "test/ant/0.png", (1, 1, 1))
    save_image(root / "test/bee/0.png", (2, 2, 2))
    first, second = (load(data, f"folder:{root}", cache_dir="") for _ in range(2))
    assert same(first, second)
    said, nothing = printed
    assert said.startswith("running without caches (")
    assert "set XDG_CACHE_HOME to a folder" in said
    assert nothing == ""


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_validation_is_taken_out_of_train(data, ratio):
    digits = load(data, "digits", validation_ratio=ratio)
    train, validation = datasets.validation_split(digits, data)
    total = len(digits.train.labels)
    assert len(validation.images) == len(validation.labels) == round(ratio * total)
    assert len(train.images) == len(train.labels) == total - len(validation.labels)
    parts = sorted(image.tobytes() for split in (train, validation) for image in split.images)
    assert parts == sorted(image.tobytes() for image in digits.train.images)


def test_the_seed_chooses_the_validation_images(data):
    digits = load(data, "digits", validation_ratio=0.1)
    images = []
    for data.split_seed in (0, 0, 1):
        images.append(datasets.validation_split(digits, data)[1].images)
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_a_ratio_of_zero_leaves_validation_empty_and_train_whole(data):
    digits = load(data, "digits", validation_ratio=0.0)
    train, validation = datasets.validation_split(digits, data)
    assert validation.images.shape == (0, 8, 8, 3)
    assert validation.labels.shape == (0,)
    assert np.array_equal(train.images, digits.train.images)


def test_a_ratio_that_leaves_a_part_empty_is_refused(data):
    digits = load(data, "digits", validation_ratio=0.0001)
    with pytest.raises(UserError, match=r"config.data.validation_ratio 0.0001 of 1438 .* leaves no image in one part"):
        datasets.validation_split(digits, data)


def test_the_highest_ratio_leaves_an_image_of_each_class_for_training(data):
    train, validation = datasets.validation_split(load(data, "digits", validation_ratio=0.9999), data)
    assert sorted(train.labels) == list(range(10))
    assert len(validation.labels) == 1428


def test_the_fingerprint_changes_with_any_byte_name_shape_or_type():
    prints = [datasets.fingerprint(arrays())]
    for key, array in arrays().items():
        changed = array.copy()
        changed.flat[-1] = "cow" if key == "class_names" else changed.flat[-1] ^ 1
        prints.append(datasets.fingerprint(arrays(**{key: changed})))
    prints.append(datasets.fingerprint(arrays(train_images=arrays()["train_images"].reshape(6, 7, 5, 3))))
    prints.append(datasets.fingerprint(arrays(train_labels=arrays()["train_labels"].astype(np.uint64))))
    assert len(set(prints)) == len(prints) == 8
    assert datasets.fingerprint(arrays()) == prints[0]


@pytest.fixture
def offline(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["cifarr10", "cifar10:9.9.9", "cifar10/nothing", "a b"])
def test_a_name_that_tfds_does_not_know_is_refused_saying_what_would_do(data, offline, name):
    refusal(
        data,
        name,
        repr(name),
        "Give a TFDS name such as cifar10 or cifar10:train[:80%], or digits, npz:FILE or folder:DIR",
    )


def test_a_set_that_cannot_be_downloaded_says_so_soon_and_names_two_remedies(data, offline):
    start = time.monotonic()
    message = refusal(data, "cifar10", "cifar10 is not prepared in", Path(data.data_dir) / "cifar10/3.0.2")
    assert time.monotonic() - start < 15
    for words in ("www.cs.toronto.edu cannot be reached", "TFDS_DATA_DIR", "--config.data.data_dir", "npz:FILE"):
        assert words in message


def with_download(monkeypatch, download):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(sources, "_answers", lambda url: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)


def test_a_download_that_fails_is_one_line_with_its_reason(data, monkeypatch):
    def fail(self):
        raise OSError("the line went dead")

    with_download(monkeypatch, fail)
    refusal(data, "cifar10", "its download failed (OSError: the line went dead)", data.data_dir, "npz:FILE")


def test_a_set_whose_servers_answer_is_downloaded(data, monkeypatch):
    import toy_tfds

    asked = []
    prepare = toy_tfds.ToyGrey.download_and_prepare

    def record(self):
        asked.append(self.name)
        prepare(self)

    with_download(monkeypatch, record)
    for _ in range(2):
        assert len(load(data, "toy_grey").train.images) == 6
    assert asked == ["toy_grey"]  # once


def test_any_tfds_classification_set_loads_as_rgb_in_its_own_order(data, monkeypatch):
    import toy_tfds

    toy_tfds.ToyGrey(data_dir=data.data_dir).download_and_prepare()
    toy = load(data, "toy_grey")
    assert toy.class_names == ("even", "odd")
    for split, count in ((toy.train, 6), (toy.test, 4)):
        assert split.images.shape == (count, 5, 7, 3)
        assert split.images.dtype == np.uint8
        assert (split.images == 10 * np.arange(count).reshape(-1, 1, 1, 1)).all()
        assert split.labels.tolist() == [i % 2 for i in range(count)]
    assert load(data, "toy_grey", image_size=4).train.images.shape == (6, 4, 4, 3)
    monkeypatch.setattr(sources, "read_tfds", forbid)
    assert same(toy, load(data, "toy_grey", image_size=0))


def test_a_tfds_set_with_one_split_gives_a_fifth_of_each_class_to_the_test_set(data):
    import toy_tfds

    toy_tfds.ToyOneSplit(data_dir=data.data_dir).download_and_prepare()
    for _ in range(2):
        toy = load(data, "toy_one_split")
        assert (np.bincount(toy.train.labels).tolist(), np.bincount(toy.test.labels).tolist()) == ([4, 4], [1, 1])
        assert toy.layout == "splits full; the test images are a fifth of each class"


def test_a_tfds_test_split_without_labels_is_not_the_test_set(data):
    import toy_tfds

    toy_tfds.ToyContest(data_dir=data.data_dir).download_and_prepare()
    toy = load(data, "toy_contest")
    assert toy.layout == "splits train, validation"
    assert (toy.train.labels.tolist(), toy.test.labels.tolist()) == ([0, 1] * 3, [0, 1] * 2)


def test_a_tfds_validation_split_is_the_validation_set(data):
    import toy_tfds

    toy_tfds.ToyValidated(data_dir=data.data_dir).download_and_prepare()
    for _ in range(2):  # the second from the cache
        toy = load(data, "toy_validated")
        assert toy.layout == "splits train, test, validation"
        train, validation = datasets.validation_split(toy, data)
        assert [len(split.labels) for split in (train, validation, toy.test)] == [6, 2, 4]


def test_a_part_of_a_tfds_set_is_its_training_set_and_has_a_cache_of_its_own(data, monkeypatch):
    import toy_tfds

    toy_tfds.ToyGrey(data_dir=data.data_dir).download_and_prepare()
    whole, part = load(data, "toy_grey"), load(data, "toy_grey:train[:50%]")
    assert np.array_equal(part.train.images, whole.train.images[:3])
    assert np.array_equal(part.test.images, whole.test.images)
    assert part.layout == "splits train[:50%], test"
    assert part.fingerprint != whole.fingerprint
    both = load(data, "toy_grey:train[:1]+train[4:]")
    assert np.array_equal(both.train.images, whole.train.images[[0, 4, 5]])
    middle = load(data, "toy_grey:1.0.0:train[2:4]")
    assert np.array_equal(middle.train.images, whole.train.images[2:4])
    monkeypatch.setattr(sources, "read_tfds", forbid)
    assert same(load(data, "toy_grey:train[:50%]"), part)
    assert same(load(data, "toy_grey"), whole)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("trian[:2]", "trian[:2] is no part of a split"),
        ("train[:x]", "train[:x] is no part of a split"),
        ("train[:200%]", "train[:200%] is no part of a split"),
        ("test[:2]", "test[:2] is not of the training images alone (test)"),
        ("train[:2]+test[:2]", "train[:2]+test[:2] is not of the training images alone (test)"),
        ("train[3:3]", "train[3:3] holds no image"),
        ("train[:50%]+train[2:]", "train[:50%]+train[2:] names an image twice"),
        ("train[4:]+train[:5]", "names an image twice"),
    ],
)
def test_a_part_that_is_none_is_refused(data, part, words):
    import toy_tfds

    toy_tfds.ToyGrey(data_dir=data.data_dir).download_and_prepare()
    refusal(data, f"toy_grey:{part}", words, "give one such as toy_grey:train[:80%]")


@pytest.mark.parametrize("name", ["folder:", "npz: ", "npz", "digits:train[:10%]"])
def test_a_name_without_its_path_or_with_one_too_many_is_refused(data, name):
    refusal(data, name, repr(name), "give npz:FILE, folder:DIR or digits, which has no parts")


@contextmanager
def server(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/file"
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("status", [200, 403, 404, 405, 500])
def test_a_server_answers_whatever_it_says(no_proxy, status):
    with server(status) as url:
        assert sources._answers(url)


def test_a_server_that_is_not_there_or_never_replies_does_not_answer(no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        start = time.monotonic()
        assert not sources._answers(url, timeout_seconds=0.3)
        assert time.monotonic() - start < 5
    assert not sources._answers(url)  # closed now


def test_a_name_whose_look_up_hangs_does_not_answer(monkeypatch):
    released = threading.Event()

    def hang(*_, **__):
        released.wait(20)
        raise OSError

    monkeypatch.setattr(sources.urllib.request, "urlopen", hang)
    start = time.monotonic()
    assert not sources._answers("http://example.invalid/", timeout_seconds=0.1)
    assert time.monotonic() - start < 5
    released.set()


@pytest.fixture(scope="module")
def cifar10_config(cache_dir):
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not Path(folder, "cifar10/3.0.2").is_dir():
        pytest.skip("set TFDS_DATA_DIR to a folder with CIFAR-10 prepared")
    config = final.get_config().data
    config.cache_dir = cache_dir
    return config


@pytest.fixture(scope="module")
def cifar10(cifar10_config):
    return datasets.load(cifar10_config)


def test_cifar10_is_what_was_published(cifar10):
    assert cifar10.class_names == CIFAR10_CLASSES
    for split, count in ((cifar10.train, 50_000), (cifar10.test, 10_000)):
        assert split.images.shape == (count, 32, 32, 3)
        assert split.images.dtype == np.uint8
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
    mean = cifar10.train.images.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    assert np.abs(mean - CIFAR10_MEAN).max() < 1e-6


def test_the_configs_mean_and_std_are_those_of_cifar10(cifar10, final_config):
    levels = np.arange(256) / 255
    for channel in range(3):
        share = np.bincount(cifar10.train.images[..., channel].ravel(), minlength=256) / (50_000 * 32 * 32)
        mean = share @ levels
        assert abs(mean - final_config.data.mean[channel]) < 1e-4
        assert abs(np.sqrt(share @ (levels - mean) ** 2) - final_config.data.std[channel]) < 1e-4


def test_cifar10_is_read_in_the_order_of_its_files(cifar10):
    import tensorflow_datasets as tfds

    read_config = tfds.ReadConfig(interleave_cycle_length=1)
    source = tfds.load("cifar10", split="train[:20]", shuffle_files=False, download=False, read_config=read_config)
    for i, example in enumerate(tfds.as_numpy(source)):
        assert np.array_equal(cifar10.train.images[i], example["image"])
        assert cifar10.train.labels[i] == example["label"]
    assert i == 19


def test_cifar10_comes_from_the_cache_the_second_time(cifar10, cifar10_config, monkeypatch):
    monkeypatch.setattr(sources, "read_tfds", forbid)
    assert same(cifar10, datasets.load(cifar10_config))
