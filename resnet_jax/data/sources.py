"""The readers of `datasets.load`: each reads one kind of source into the same five arrays."""

import http.client
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from resnet_jax.data import images, sampling
from resnet_jax.data.lazy_tensorflow import import_tensorflow
from resnet_jax.errors import UserError

KEYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
Arrays = dict[str, np.ndarray]  # KEYS -> uint8 [N, H, W, 3] and int [N] for each part, and str [num_classes]


def read_digits(size: int) -> Arrays:
    """Read 1,797 digits; a fifth of each class becomes the test set, because the source has none.

    They have 8x8 pixels, and are scaled to `size` pixels per side unless it is 0.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    if size:
        grey = np.stack([np.asarray(images.fit(Image.fromarray(image), (size, size))) for image in grey])
    pixels, labels = np.repeat(grey[..., np.newaxis], 3, axis=3), digits.target.astype(np.int32)
    train, test = sampling.stratified_split(labels, 0.2, seed=0)
    return {
        "train_images": pixels[train],
        "train_labels": labels[train],
        "test_images": pixels[test],
        "test_labels": labels[test],
        "class_names": np.array([str(name) for name in digits.target_names]),
    }


def read_npz(path: Path) -> Arrays:
    """Read an `.npz` of train_images, train_labels, test_images, test_labels and, optionally, class_names."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: give config.data.name as npz:FILE")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # NumPy and zipfile raise many kinds of errors for a corrupt file
        raise UserError(f"{path} cannot be read as an .npz of arrays: {error}") from error
    missing = [key for key in KEYS[:4] if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it holds {', '.join(arrays) or 'nothing'}")
    if "class_names" not in arrays:
        labels = arrays["train_labels"]
        count = int(labels.max()) + 1 if labels.size and labels.dtype.kind in "iu" else 0
        if labels.size and labels.dtype.kind in "iu" and labels.min() < 0:
            raise UserError(f"{path}: train labels run from {labels.min()}: number the classes from 0")
        if count > labels.size:
            raise UserError(
                f"{path}: train labels run to {count - 1} with {labels.size} images: number the classes from 0"
            )
        arrays["class_names"] = np.array([str(label) for label in range(count)], np.str_)
    return arrays


class LabelledFile(NamedTuple):
    """The path of an image file, its part ("train" or "test") and its class."""

    path: Path
    part: str
    label: str


def list_folder(folder: Path) -> list[LabelledFile]:
    """List the images of a folder with train/<class>/* and test/<class>/*, sorted, also those in folders within a class.

    Raises:
        UserError: if a part is missing, a part or a class is empty, or test has a class that train does not have.
    """
    files = []
    others = 0
    for part in ("train", "test"):
        classes = sorted((folder / part).glob("[!.]*/"))
        if not classes:
            raise UserError(f"{folder / part} holds no images: put them in {folder / part}/<class>/")
        for directory in classes:
            found, others_here = images.find(directory)
            others += others_here
            if not found:
                raise UserError(f"{directory} holds no images ({images.NAMES}): add some, or remove the folder")
            files += [LabelledFile(path, part, directory.name) for path in found]
    unseen = sorted({f.label for f in files if f.part == "test"} - {f.label for f in files if f.part == "train"})
    if unseen:
        raise UserError(
            f"{folder / 'test'} has classes that {folder / 'train'} does not have: {', '.join(unseen)}: add them to train, or remove them"
        )
    if others:
        print(f"{folder}: {images.left_out(others)}")
    return files


def read_folder(files: list[LabelledFile], image_size: int) -> Arrays:
    """Decode the images of a folder; the classes are the names of train's folders, sorted.

    Raises:
        UserError: if files are not images, all of which it names, or the images' sizes differ and `image_size` is 0.
    """
    class_names = sorted({file.label for file in files if file.part == "train"})
    arrays: Arrays = {"class_names": np.array(class_names)}
    unreadable = []
    for part in ("train", "test"):
        members = [file for file in files if file.part == part]
        decoded = []
        for file in members:
            try:
                decoded.append(_as_array(images.read(file.path), image_size))
            except Exception as error:  # a decoder can raise anything on hostile bytes
                unreadable.append((file.path, str(error) or type(error).__name__))
        arrays[f"{part}_images"] = np.zeros((0, 0, 0, 3), np.uint8) if unreadable else _stack(decoded)
        arrays[f"{part}_labels"] = np.array([class_names.index(file.label) for file in members], np.int32)
    if len(unreadable) == 1:
        raise UserError("{} cannot be read as an image ({}): fix or remove it".format(*unreadable[0]))
    if unreadable:
        named = ", ".join(f"{path} ({reason})" for path, reason in unreadable)
        raise UserError(f"{len(unreadable)} files cannot be read as images: {named}: fix or remove them")
    return arrays


def _as_array(image: Image.Image, image_size: int) -> np.ndarray:
    """Convert an RGB image to uint8 [H, W, 3]; `image_size` > 0 scales the shorter side to it and crops the centre."""
    return np.asarray(images.fit(image, (image_size, image_size)) if image_size else image)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    """Stack images of one size into one array.

    Raises:
        UserError: if their sizes differ.
    """
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1:
        raise UserError(
            f"the images have {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}: set config.data.image_size to resize "
            "them"
        )
    return np.stack(arrays)


def prepared_tfds_builder(name: str, data_dir: str) -> Any:
    """Return the TFDS builder of a data set that is prepared on disk; download it first if necessary.

    Raises:
        UserError: if TFDS has no such set, it is not image classification, or it is neither on disk nor reachable.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError, AssertionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join([lines[0], *(line for line in lines[1:] if line.startswith("Did you mean"))])
        raise UserError(
            f"config.data.name {name!r}: {reason} Give a TFDS name such as cifar10, or digits, npz:FILE or folder:DIR"
        ) from error
    features = dict(getattr(builder.info.features, "items", dict)())
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"config.data.name {name!r} is not an image-classification set: it lacks an image or a label feature"
        )
    if image.np_dtype != np.uint8:
        raise UserError(
            f"config.data.name {name!r} has {image.np_dtype} images, not uint8: convert them and give an .npz"
        )
    if not builder.is_prepared():
        _download(builder)
    return builder


def read_tfds(builder: Any, image_size: int, num_threads: int) -> Arrays:
    """Decode a prepared TFDS set in its own order; if it has no split "test", "validation" is the test set."""
    import tensorflow_datasets as tfds

    tf = import_tensorflow(num_threads)
    splits = {"train": "train", "test": "test" if "test" in builder.info.splits else "validation"}
    for split in splits.values():
        if split not in builder.info.splits:
            raise UserError(f"{builder.name} has the splits {', '.join(builder.info.splits)}: it lacks {split}")
    arrays: Arrays = {"class_names": np.array(builder.info.features["label"].names)}
    one_by_one = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    for part, split in splits.items():
        print(
            f"decoding {builder.info.splits[split].num_examples} images of {builder.name}'s {split} split", flush=True
        )
        examples = builder.as_dataset(split=split, shuffle_files=False, read_config=one_by_one)
        decoded, labels = [], []
        try:
            for example in tfds.as_numpy(examples):
                pixels = example["image"]
                image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                decoded.append(_as_array(images.to_rgb(image), image_size))
                labels.append(example["label"])
        except tf.errors.OpError as error:
            raise UserError(
                f"{builder.data_path} is corrupt ({error.message}): delete it and prepare it again"
            ) from error
        arrays[f"{part}_images"] = _stack(decoded)
        arrays[f"{part}_labels"] = np.array(labels, np.int32)
    return arrays


def _download(builder: Any) -> None:
    """Download and prepare a set if its server answers; without that check, TFDS would retry for minutes."""
    remedy = (
        f"{builder.name} is not prepared in {builder.data_path}, and {{}}. Prepare it on a machine with a network and set "
        "TFDS_DATA_DIR (or --config.data.data_dir) to that folder, or give the images as --config.data.name=npz:FILE"
    )
    for host, url in {urllib.parse.urlsplit(url).netloc: url for url in builder.url_infos or {}}.items():
        if not _answers(url):
            raise UserError(remedy.format(f"{host} cannot be reached to download it"))
    print(f"downloading {builder.name} to {builder.data_path}", flush=True)
    try:
        builder.download_and_prepare()
    except Exception as error:  # the network, a full disk, a wrong checksum, a set that needs a manual download
        raise UserError(remedy.format(f"its download failed ({type(error).__name__}: {error})")) from error


def _answers(url: str, timeout_seconds: float = 5.0) -> bool:
    """Whether a server answers; asked in a thread, because a name lookup can exceed the timeout."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_seconds).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # it answered, even if it refused the HEAD request
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * timeout_seconds)
    return bool(answers) and answers[0]
