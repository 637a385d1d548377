"""Load a data set by name: uint8 images, labels, class names and a fingerprint.

A name is `digits` (part of scikit-learn), `npz:FILE`, `folder:DIR` or the name of a TFDS image-classification set. Decoded
folders and TFDS sets are cached as one `.npz`, which the `npz:` source can read, or, if they do not fit in memory, as a folder
from which each batch is read. Of a source without a test set, a share of each class becomes one.
"""

import hashlib
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.data import memory, npz, on_disk, sampling, sources
from resnet_jax.data.npz import KEYS, PARTS, Arrays
from resnet_jax.data.on_disk import Images, ImagesOnDisk
from resnet_jax.disk import cache
from resnet_jax.disk import files as files_lib
from resnet_jax.errors import UserError, one_line


class Split(NamedTuple):
    """N examples: images uint8 [N, H, W, 3], in memory or on disk, labels int32 [N]."""

    images: Images
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set, whose images are in memory or on disk.

    Attributes:
        name: `config.data.name`.
        train: the training images.
        validation: the source's own validation set; None if it has none, so that a share of `train` becomes one.
        test: the test images.
        class_names: by label.
        fingerprint: SHA-256 of the source's arrays, in hexadecimal.
        layout: what the source holds, in words.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    layout: str


_FIFTH_IS_TEST = "the test images are a fifth of each class"
_DECODER = 2  # counts the versions of `images`: what an earlier one decoded is decoded again


def load(data: ConfigDict, in_memory: bool = False) -> Dataset:
    """Load the data set that `config.data` names.

    Args:
        data: `config.data`; reads `name`, `data_dir` (TFDS's folder, "" for its default), `cache_dir` ("" for the
            user's cache folder), `image_size` (0 keeps the images as they are; otherwise the shorter side is scaled
            to it and the centre is cropped) and `num_threads`.
        in_memory: hold the images in memory, or raise, instead of leaving on disk those that do not fit there with the copies
            that training makes.

    Raises:
        UserError: if the data are missing, unreadable or not image classification.
    """
    splits, class_names, digest, layout = _load(data, in_memory)
    if "test" not in splits:
        splits |= _with_test(data.name, splits["train"])
        layout += f"; {_FIFTH_IS_TEST}"
    dataset = Dataset(data.name, splits["train"], splits.get("validation"), splits["test"], class_names, digest, layout)
    if data.name.startswith(("npz:", "folder:")):
        _check_own(dataset)
    return dataset


def load_labelled(data: ConfigDict) -> tuple[Split, tuple[str, ...], str, str]:
    """Load a labelled set for an evaluation only: its test images if it has some, else its validation images, else all.

    Args and errors are those of `load`.

    Returns:
        The images, the class names, the fingerprint of the whole set, and the part that they are.
    """
    splits, class_names, digest, _ = _load(data)
    part = [part for part in PARTS if part in splits][-1]
    return splits[part], class_names, digest, part


def _load(data: ConfigDict, in_memory: bool = False) -> tuple[dict[str, Split], tuple[str, ...], str, str]:
    """Return the parts that a source has, its class names, its fingerprint, and its layout in words."""
    try:
        arrays, layout = _read(data, in_memory)
    except OSError as error:
        raise UserError(f"config.data.name {data.name!r} cannot be read: {error}") from error
    on_disk.say(arrays)
    splits, class_names = _checked(data.name, arrays)
    arrays |= {f"{part}_labels": split.labels for part, split in splits.items()}
    return splits, class_names, str(arrays.get("fingerprint", "")) or fingerprint(arrays), layout


def _read(data: ConfigDict, in_memory: bool) -> tuple[Arrays, str]:
    """Return the arrays of a source, perhaps with their fingerprint, and its layout in words."""
    source, colon, path = data.name.partition(":")
    if (source in ("npz", "folder") and not path.strip()) or (source == "digits" and colon):
        raise UserError(f"config.data.name is {data.name!r}: give npz:FILE, folder:DIR or digits, which has no parts")
    if data.image_size and source == "npz":
        raise UserError(f"config.data.image_size does not apply to {source}, whose images have one size: set it to 0")
    if data.name == "digits":
        return sources.read_digits(data.image_size), _FIFTH_IS_TEST
    if source == "npz":
        arrays = npz.read_set(Path(os.path.expanduser(path)))
        return arrays, ", ".join(key for key in arrays if key.endswith("_images"))
    if source == "folder":
        folder = Path(os.path.realpath(os.path.expanduser(path)))
        files, layout = sources.list_folder(folder)
        read = partial(sources.read_folder, files, data.image_size)
        return _cached(data, folder, [f.path for f in files], read, in_memory), layout
    name, part = sources.tfds_name_and_part(data.name)
    builder = sources.prepared_tfds_builder(name, data.data_dir)
    folder, splits = Path(builder.data_path), sources.tfds_splits(builder, part, data.num_threads)
    if splits.get("test") != "test" and "test" in builder.info.splits:
        part += " tested on validation"
    if "validation" in splits:
        part += " validated on validation"
    read = partial(sources.read_tfds, builder, splits, data.image_size, data.num_threads)
    return _cached(data, folder, folder.iterdir(), read, in_memory, part), "splits " + ", ".join(splits.values())


def _with_test(name: str, whole: Split) -> dict[str, Split]:
    """Split the images of a source without a test set in two.

    Raises:
        UserError: if they are too few.
    """
    train, test = (_select(whole, part) for part in sources.split_test(whole.labels))
    if not len(test.labels) or set(whole.labels) != set(train.labels):
        raise UserError(
            f"{name} has no test set, and its {len(whole.labels)} images are too few to take a fifth of each class: add "
            "images, or a test set"
        )
    return {"train": train, "test": test}


def validation_split(dataset: Dataset, data: ConfigDict) -> tuple[Split, Split]:
    """Return (train, validation): the source's own, or `dataset.train` split by `config.data`'s `validation_ratio` and `split_seed`.

    Raises:
        UserError: if no training image is left, or no validation image with a ratio above 0.
    """
    if dataset.validation is not None:
        return dataset.train, dataset.validation
    train, validation = sampling.stratified_split(dataset.train.labels, data.validation_ratio, data.split_seed)
    for part, wanted in ((train, True), (validation, data.validation_ratio > 0)):
        if wanted and not len(part):
            raise UserError(
                f"config.data.validation_ratio {data.validation_ratio} of {len(dataset.train.labels)} training images "
                "leaves no image in one part: change the ratio"
            )
    if not len(validation):
        return dataset.train, _select(dataset.train, validation)  # without a copy of the images
    return _select(dataset.train, train), _select(dataset.train, validation)


def _select(split: Split, positions: np.ndarray) -> Split:
    images = split.images
    chosen = images.select(positions) if isinstance(images, ImagesOnDisk) else images[positions]
    return Split(chosen, split.labels[positions])


def source_positions(dataset: Dataset, data: ConfigDict, examples: np.ndarray) -> np.ndarray:
    """Convert positions in the training part, int [B], to positions in `dataset.train`, int [B]."""
    if dataset.validation is not None:
        return examples
    train, _ = sampling.stratified_split(dataset.train.labels, data.validation_ratio, data.split_seed)
    return np.asarray(train[examples])


def computed(config: ConfigDict, train: Split, num_classes: int) -> ConfigDict:
    """Return a run's config with numbers for what is computed from its training images.

    That is a `data.mean` or `data.std` of (), and `class_weights` of "balanced": N / (num_classes * images of the class), as
    in scikit-learn's `compute_class_weight`.

    Raises:
        UserError: if a channel has the same value in every pixel, a class has no training image, or the weights given are not
            one per class.
    """
    if config.class_weights == "balanced":
        counts = np.bincount(train.labels, minlength=num_classes)
        if not counts.all():
            raise UserError(
                f"config.class_weights is 'balanced', but class {int(counts.argmin())} has no training image: give numbers"
            )
        weights = [float(weight) for weight in len(train.labels) / (num_classes * counts)]
        config = config_lib.replaced(config, {"class_weights": ",".join(map(repr, weights))})
    num_weights = len(config_lib.class_weights(config.class_weights))
    if num_weights not in (0, num_classes):
        raise UserError(f"config.class_weights has {num_weights} numbers for {num_classes} classes: give one per class")
    wanted = [name for name in ("mean", "std") if not config.data[name]]
    if not wanted:
        return config
    statistics = dict(zip(("mean", "std"), channel_statistics(train.images), strict=True))
    if "std" in wanted and 0.0 in statistics["std"]:
        raise UserError(
            f"channel {statistics['std'].index(0.0)} of the training images has one value only: give config.data.std as "
            "three numbers"
        )
    return config_lib.replaced(config, {f"data.{name}": statistics[name] for name in wanted})


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel of uint8 images, scaled to 0..1, to six decimals.

    The sums are integers, so the numbers are the same on every machine.
    """
    histograms = np.zeros((images.shape[-1], 256), np.int64)
    for image in images:  # once, because they may be on disk
        for channel, counts in enumerate(histograms):
            counts += np.bincount(image[..., channel].ravel(), minlength=256)
    means, deviations = [], []
    for counts in histograms:
        count, total, squares = (int(counts @ np.arange(256) ** power) for power in range(3))
        means.append(round(total / (255 * count), 6))
        deviations.append(round(math.sqrt(count * squares - total**2) / (255 * count), 6))
    return tuple(means), tuple(deviations)


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 of the name, dtype, shape and bytes of each array, in the order of their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays.keys() & set(KEYS)):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        if isinstance(array, ImagesOnDisk):
            for image in array:
                digest.update(image.data)
        else:
            array = np.ascontiguousarray(array)
            digest.update(array.data if array.dtype.kind != "U" else "\n".join(array.tolist()).encode())
    return digest.hexdigest()


def _checked(name: str, arrays: Arrays) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Return the parts of a source and its class names.

    Raises:
        UserError: if the arrays are not those of a data set.
    """
    try:
        class_names = tuple(arrays["class_names"].tolist()) if arrays["class_names"].ndim == 1 else ()
        "".join(class_names).encode()
        class_names = tuple(unicodedata.normalize("NFC", label) for label in class_names)
    except (SystemError, TypeError, ValueError) as error:
        raise UserError(f"{name}: class_names must be unique strings in one dimension ({error})") from error
    if not class_names or len(set(class_names)) < len(class_names):
        raise UserError(f"{name}: class_names must be unique strings in one dimension")
    if len(class_names) == 1:
        raise UserError(f"{name} has only one class, {class_names[0]}: give images of two or more")
    splits = {}
    for part in PARTS:
        if f"{part}_images" not in arrays:
            continue
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if labels.shape != images.shape[:1] or not len(labels):
            raise UserError(
                f"{name}: {part} labels are {labels.dtype} {labels.shape} for {len(images)} images: give at least one image, and "
                "one label for each"
            )
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise UserError(
                f"{name}: {part} labels run from {labels.min()} to {labels.max()}: with {len(class_names)} classes they "
                f"must be in 0..{len(class_names) - 1}"
            )
        splits[part] = Split(images, labels.astype(np.int32))
        size = splits["train"].images.shape[1:]
        if images.shape[1:] != size:
            raise UserError(
                f"{name}: train images are {size}, {part} images {images.shape[1:]}: they must have the same size (config.data.image_size scales those of a folder)"
            )
    return splits, class_names


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
    for part, split in (("validation", dataset.validation), ("test", dataset.test)):
        if split and (num_shared := _count_shared(dataset.train.images, split.images)):
            print(
                f"warning: {dataset.name}: {num_shared} of {len(split.images)} {part} images are training images too, so the "
                f"{part} accuracy is too high: remove them from one split",
                file=sys.stderr,
            )


def _count_shared(images: Images, others: Images) -> int:
    """Count the images of `others` that are in `images` too."""
    here, there = on_disk.checksums(images), on_disk.checksums(others)
    digests = {hashlib.sha256(images[i].tobytes()).digest() for i in np.flatnonzero(np.isin(here, there))}
    return sum(hashlib.sha256(others[i].tobytes()).digest() in digests for i in np.flatnonzero(np.isin(there, here)))


def _cached(
    data: ConfigDict,
    folder: Path,
    files: Iterable[Path],
    read: Callable[[on_disk.Store], Arrays],
    in_memory: bool,
    part: str = "",
) -> Arrays:
    """Return the arrays of a source and their fingerprint, from the cache if it holds them, valid and up to date.

    They are in an `.npz`, or in a folder of the same name if they did not fit in memory. `in_memory` is that of `load`. `part`
    names the part of the files that `read` returns; "" for all.
    """
    state = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = hashlib.sha256(repr((_DECODER, state, data.image_size, *filter(None, [part]))).encode()).hexdigest()[:16]
    directory = Path(os.path.expanduser(data.cache_dir)) if data.cache_dir else cache.folder()
    if directory is None:
        return read(on_disk.Store())
    path = directory / f"{data.name.split(':')[0].replace('/', '-')}-{key}.npz"
    if arrays := _from_cache(path, folder, in_memory):
        return arrays
    with ExitStack() as stack:
        with _storing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(files_lib.scratch_directory(directory))
            (scratch / "new").mkdir()
        arrays = read(on_disk.Store(None if in_memory else scratch / "new", directory))
        arrays["fingerprint"] = np.array(fingerprint(arrays))
        if on_disk.images_of(arrays):
            with _storing(directory):
                on_disk.write(scratch / "new", arrays)
                on_disk.move(scratch / "new", path.with_suffix(""), scratch / "old", arrays)
            return arrays
        try:
            np.savez(scratch / "new" / "data.npz", **arrays)
            (scratch / "new" / "data.npz").replace(path)
        except OSError as error:  # the run has its images, which were decoded for long
            print(
                f"{directory} cannot store the decoded data ({error}): the next run decodes them again", file=sys.stderr
            )
    return arrays


def _from_cache(path: Path, folder: Path, in_memory: bool) -> Arrays | None:
    """Return what the cache holds of a source, if it is whole: the `.npz`, or the folder of images on disk."""
    on_disk_path = path.with_suffix("")
    try:
        if path.exists() and (in_memory or on_disk.fits(path.stat().st_size)):
            arrays = npz.read(path)
            if fingerprint(arrays) == str(arrays["fingerprint"]):
                return arrays
            raise ValueError("it holds other data")
    except memory.TooLargeError:
        raise
    except (KeyError, UserError, ValueError):
        print(f"{path} is corrupt: decoding {folder} again")
    try:
        if on_disk_path.exists():
            return on_disk.read(on_disk_path, in_memory)
    except (FileNotFoundError, KeyError, ValueError):
        print(f"{on_disk_path} is corrupt: decoding {folder} again")
    return None


@contextmanager
def _storing(directory: Path) -> Iterator[None]:
    """Turn a failed write to the cache into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{directory} cannot store the decoded data ({error}): set config.data.cache_dir to another folder"
        ) from error


def describe(dataset: Dataset, train: Split, validation: Split) -> dict[str, Any]:
    """Describe a data set as `result.json` stores it."""
    sizes = {"train": len(train.labels), "validation": len(validation.labels), "test": len(dataset.test.labels)}
    return {"name": dataset.name, "fingerprint": dataset.fingerprint, "splits": sizes}


def summary(dataset: Dataset, train: Split, validation: Split, data: ConfigDict) -> str:
    """Say in one line what a data set holds; `data` is `config.data`."""
    counts = (
        f"{len(train.labels):,} training, {len(validation.labels):,} validation and {len(dataset.test.labels):,} test"
    )
    own = "; config.data.validation_ratio is not used" * (dataset.validation is not None and data.validation_ratio > 0)
    return one_line(f"{dataset.name}: {counts} images of {len(dataset.class_names)} classes ({dataset.layout}{own})")
