"""Load a data set by name into memory: uint8 images, labels, class names and a fingerprint.

A name is `digits` (part of scikit-learn), `npz:FILE`, `folder:DIR` (train/<class>/*, test/<class>/*) or the name of a
TFDS image-classification set. Decoded folders and TFDS sets are cached as one `.npz`, which the `npz:` source can read.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from resnet_jax import host
from resnet_jax.data import sampling, sources
from resnet_jax.data.sources import KEYS, Arrays
from resnet_jax.errors import UserError


class Split(NamedTuple):
    """N examples: images uint8 [N, H, W, 3], labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set in memory; `fingerprint` is the SHA-256 of its arrays, in hexadecimal."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str


_DECODER = 2  # counts the versions of `images`: what an earlier one decoded is decoded again


def load(config: ConfigDict) -> Dataset:
    """Load the data set that `config.data` names.

    Args:
        config: `config.data`; reads `name`, `data_dir` (TFDS's folder, "" for its default), `cache_dir` ("" for the
            user's cache folder), `image_size` (0 keeps the images as they are; otherwise the shorter side is scaled
            to it and the centre is cropped) and `num_threads`.

    Raises:
        UserError: if the data are missing, unreadable or not image classification.
    """
    try:
        dataset = _checked(config.name, _read(config))
    except OSError as error:
        raise UserError(f"config.data.name {config.name!r} cannot be read: {error}") from error
    if config.name.startswith(("npz:", "folder:")):
        _check_own(dataset)
    return dataset


def _read(config: ConfigDict) -> Arrays:
    source, _, path = config.name.partition(":")
    if config.image_size and source == "npz":
        raise UserError(f"config.data.image_size does not apply to {source}, whose images have one size: set it to 0")
    if config.name == "digits":
        return sources.read_digits(config.image_size)
    if source == "npz":
        arrays = sources.read_npz(Path(os.path.expanduser(path)))
        return {key: arrays[key] for key in KEYS}
    if source == "folder":
        folder = Path(os.path.realpath(os.path.expanduser(path)))
        files = sources.list_folder(folder)
        return _cached(config, folder, [f.path for f in files], lambda: sources.read_folder(files, config.image_size))
    builder = sources.prepared_tfds_builder(config.name, config.data_dir)
    folder = Path(builder.data_path)
    read = partial(sources.read_tfds, builder, config.image_size, config.num_threads)
    return _cached(config, folder, folder.iterdir(), read)


def validation_split(dataset: Dataset, config: ConfigDict) -> tuple[Split, Split]:
    """Split the training set into (train, validation), by `config.data`'s `validation_ratio` and `split_seed`.

    Raises:
        UserError: if no training image is left, or no validation image with a ratio above 0.
    """
    train, validation = sampling.stratified_split(dataset.train.labels, config.validation_ratio, config.split_seed)
    for part, wanted in ((train, True), (validation, config.validation_ratio > 0)):
        if wanted and not len(part):
            raise UserError(
                f"config.data.validation_ratio {config.validation_ratio} of {len(dataset.train.labels)} training images "
                "leaves no image in one part: change the ratio"
            )
    return tuple(Split(dataset.train.images[part], dataset.train.labels[part]) for part in (train, validation))  # type: ignore[return-value]


def source_positions(dataset: Dataset, config: ConfigDict, examples: np.ndarray) -> np.ndarray:
    """Convert positions in the training part, int [B], to positions in `dataset.train`, int [B]."""
    train, _ = sampling.stratified_split(dataset.train.labels, config.validation_ratio, config.split_seed)
    return np.asarray(train[examples])


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 of the name, dtype, shape and bytes of each array, in the order of their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(KEYS):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.dtype.kind != "U" else "\n".join(array.tolist()).encode())
    return digest.hexdigest()


def _checked(name: str, arrays: Arrays) -> Dataset:
    images = arrays["train_images"], arrays["test_images"]
    try:
        class_names = tuple(arrays["class_names"].tolist()) if arrays["class_names"].ndim == 1 else ()
        "".join(class_names).encode()
    except (SystemError, TypeError, ValueError) as error:
        raise UserError(f"{name}: class_names must be unique strings in one dimension ({error})") from error
    if not class_names or len(set(class_names)) < len(class_names):
        raise UserError(f"{name}: class_names must be unique strings in one dimension")
    for part, split, labels in zip(
        ("train", "test"), images, (arrays["train_labels"], arrays["test_labels"]), strict=True
    ):
        if split.dtype != np.uint8 or split.ndim != 4 or split.shape[3] != 3 or 0 in split.shape[1:]:
            raise UserError(
                f"{name}: {part} images are {split.dtype} {split.shape}: they must be uint8 [N, H, W, 3]; convert grey images "
                "with np.repeat(images[..., None], 3, axis=3)"
            )
        if labels.shape != split.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise UserError(
                f"{name}: {part} labels are {labels.dtype} {labels.shape} for {len(split)} images: give at least one image, and "
                "one integer label for each"
            )
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise UserError(
                f"{name}: {part} labels run from {labels.min()} to {labels.max()}: with {len(class_names)} classes they "
                f"must be in 0..{len(class_names) - 1}"
            )
    if images[0].shape[1:] != images[1].shape[1:]:
        raise UserError(
            f"{name}: train images are {images[0].shape[1:]}, test images {images[1].shape[1:]}: they must have the same size"
        )
    arrays = arrays | {key: arrays[key].astype(np.int32) for key in ("train_labels", "test_labels")}
    return Dataset(
        name,
        Split(arrays["train_images"], arrays["train_labels"]),
        Split(arrays["test_images"], arrays["test_labels"]),
        class_names,
        str(arrays["fingerprint"]) if "fingerprint" in arrays else fingerprint(arrays),
    )


def _check_own(dataset: Dataset) -> None:
    """Check a user's own data for mistakes that published data sets do not have.

    Raises:
        UserError: if a class has no training image.
    """
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    if empty := [name for name, count in zip(dataset.class_names, counts, strict=True) if not count]:
        raise UserError(
            f"{dataset.name}: no training image for {len(empty)} of {len(counts)} classes ({', '.join(empty[:5])}): add "
            "images, or remove the class"
        )
    seen = {hashlib.sha256(image.tobytes()).digest() for image in dataset.train.images}
    num_shared = sum(hashlib.sha256(image.tobytes()).digest() in seen for image in dataset.test.images)
    if num_shared:
        print(
            f"warning: {dataset.name}: {num_shared} of {len(dataset.test.labels)} test images are training images too, so the "
            "test accuracy is too high: remove them from one split",
            file=sys.stderr,
        )


def _cached(config: ConfigDict, folder: Path, files: Iterable[Path], read: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of a source and their fingerprint, from the cache if it holds them, valid and up to date."""
    state = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = hashlib.sha256(repr((_DECODER, state, config.image_size)).encode()).hexdigest()[:16]
    directory = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else host.cache_dir()
    path = directory / f"{config.name.split(':')[0].replace('/', '-')}-{key}.npz"
    if path.exists():
        try:
            arrays = sources.read_npz(path)
            if fingerprint(arrays) == str(arrays["fingerprint"]):
                return arrays
        except (UserError, KeyError):
            pass
        print(f"{path} is corrupt: decoding {folder} again")
    arrays = read()
    arrays["fingerprint"] = np.array(fingerprint(arrays))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".incomplete-") as scratch:
            np.savez(Path(scratch) / "data.npz", **arrays)  # type: ignore[arg-type]
            os.replace(Path(scratch) / "data.npz", path)
    except OSError as error:
        raise UserError(
            f"{directory} cannot store the decoded data ({error}): set config.data.cache_dir to another folder"
        ) from error
    return arrays


def describe(dataset: Dataset, train: Split, validation: Split) -> dict[str, Any]:
    """Describe a data set as `result.json` stores it."""
    sizes = {"train": len(train.labels), "validation": len(validation.labels), "test": len(dataset.test.labels)}
    return {"name": dataset.name, "fingerprint": dataset.fingerprint, "splits": sizes}
