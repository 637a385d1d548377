import gc
import http.server
import io
import os
import pickle
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import final
from resnet_jax import host
from resnet_jax.data import datasets, sources
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
        ({"train_images": np.zeros((6, 5, 7, 3), np.float32)}, ["train images are float32 (6, 5, 7, 3)", "uint8"]),
        ({"test_images": np.zeros((4, 5, 7), np.uint8)}, ["test images are uint8 (4, 5, 7)", "[N, H, W, 3]"]),
        ({"train_images": np.zeros((6, 3, 5, 7), np.uint8)}, ["train images are uint8 (6, 3, 5, 7)"]),
        ({"train_labels": np.arange(6)}, ["train labels run from 0 to 5", "must be in 0..2"]),
        ({"test_labels": np.arange(4) - 1}, ["test labels run from -1 to 2", "must be in 0..2"]),
        ({"test_labels": np.array([0, 1, 2, 3]), "class_names": None}, ["test labels run from 0 to 3"]),
        ({"train_labels": np.arange(5) % 3}, ["train labels are int64 (5,) for 6 images"]),
        ({"train_labels": np.zeros(6)}, ["train labels are float64 (6,)", "one integer label for each"]),
        ({"train_labels": np.zeros((6, 1), int)}, ["train labels are int64 (6, 1) for 6 images"]),
        (
            {"test_images": np.zeros((0, 5, 7, 3), np.uint8), "test_labels": np.zeros(0, int)},
            ["test", "at least one image"],
        ),
        ({"train_images": np.zeros((6, 0, 7, 3), np.uint8)}, ["train images are uint8 (6, 0, 7, 3)"]),
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
    refusal(data, f"folder:{root}", "2 sizes, from (5, 7) to (9, 5)", "config.data.image_size")
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
    refusal(data, f"folder:{tmp_path}/nowhere", tmp_path / "nowhere/train", "holds no images")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_of_a_folder_without_images_is_refused(data, tmp_path, part):
    root = folder(tmp_path)
    (root / part / "wasp").mkdir()
    (root / part / "wasp/.DS_Store").write_bytes(b"\0")
    refusal(data, f"folder:{root}", root / part / "wasp", "holds no images")


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
    assert not Path(data.cache_dir).exists()


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


def test_a_failed_write_leaves_nothing_behind(data, tmp_path, monkeypatch):
    root = folder(tmp_path)

    def full(file, **_):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    refusal(data, f"folder:{root}", "No space left on device", data.cache_dir, "config.data.cache_dir")
    assert list(Path(data.cache_dir).rglob("*")) == []


def test_the_cache_goes_to_the_users_cache_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(data, f"folder:{folder(tmp_path)}", cache_dir="")
    assert [file.suffix for file in (tmp_path / "xdg/resnet_jax").iterdir()] == [".npz"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert host.cache_dir() == tmp_path / ".cache/resnet_jax"


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


@pytest.mark.parametrize("ratio", [0.0001, 0.9999])
def test_a_ratio_that_leaves_a_part_empty_is_refused(data, ratio):
    digits = load(data, "digits", validation_ratio=ratio)
    with pytest.raises(
        UserError, match=rf"config.data.validation_ratio {ratio} of 1438 .* leaves no image in one part"
    ):
        datasets.validation_split(digits, data)


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
    refusal(data, name, repr(name), "Give a TFDS name such as cifar10, or digits, npz:FILE or folder:DIR")


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
