"""The readers of `datasets.load`: each reads one kind of source into arrays of the same names."""

import http.client
import itertools
import os
import threading
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from resnet_jax.data import images, memory, sampling
from resnet_jax.data.lazy_tensorflow import import_tensorflow, import_tfds
from resnet_jax.data.npz import PARTS, Arrays
from resnet_jax.data.on_disk import Images, Store
from resnet_jax.errors import UserError, one_line, reason

_SMALLER = "set config.data.image_size, or lower it"
TEST_SHARE = 0.2  # of each class of a source without a test set
_FOLDER_NAMES = {  # part -> the names that people give to its folder, in any case
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def split_test(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions, int64, of the training and of the test images in a source without a test set."""
    return sampling.stratified_split(labels, TEST_SHARE, seed=0)


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
    train, test = split_test(labels)
    return {
        "train_images": pixels[train],
        "train_labels": labels[train],
        "test_images": pixels[test],
        "test_labels": labels[test],
        "class_names": np.array([str(name) for name in digits.target_names]),
    }


class LabelledFile(NamedTuple):
    """The path of an image file, its part (one of `PARTS`) and its class."""

    path: Path
    part: str
    label: str


def list_folder(folder: Path) -> tuple[list[LabelledFile], str]:
    """List the images of a folder, sorted, also those in folders within a class.

    The folder holds train/<class>/*, perhaps with val/<class>/* and test/<class>/*; or it holds <class>/*, which are all
    of the part "train".

    Returns:
        The files, and the layout in words.

    Raises:
        UserError: if train is missing, a part or a class is empty, or a part has a class that train does not have.
    """
    parts, layout = _parts(folder)
    files = []
    others = 0
    for part, root in parts.items():
        classes = _folders(root)
        if not classes:
            raise UserError(f"{root} holds no images: put them in {root}/<class>/")
        for directory in classes:
            paths, others_here = images.find(directory)
            others += others_here
            if not paths:
                raise UserError(f"{directory} holds no images ({images.NAMES}): add some, or remove the folder")
            label = unicodedata.normalize("NFC", directory.name)  # macOS writes names decomposed
            files += [LabelledFile(path, part, label) for path in paths]
    known = {file.label for file in files if file.part == "train"}
    for part, root in parts.items():
        if unseen := sorted({file.label for file in files if file.part == part} - known):
            raise UserError(
                f"{root} has classes that {parts['train']} does not have: {', '.join(unseen)}: add them to train, or remove "
                "them"
            )
    if others:
        print(f"{one_line(folder)}: {images.left_out(others)}")
    return files, layout


def _parts(folder: Path) -> tuple[dict[str, Path], str]:
    """Return the folder of each part, and the layout in words."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give config.data.name as folder:DIR")
    folders = _folders(folder)
    named = [(part, f) for part, names in _FOLDER_NAMES.items() for f in folders if f.name.lower() in names]
    others = [f"{f.name}/" for f in folders if f not in [f for _, f in named]]
    if not named or (others and not any(images.folders(f) for _, f in named)):  # a class can be called train
        return {"train": folder}, "<class>/"
    parts = dict(reversed(named))
    for part, f in named:
        if f != parts[part]:
            raise UserError(f"{f} and {parts[part]} are both for {part}: keep one of them")
    parts = {part: parts[part] for part in PARTS if part in parts}
    layout = ", ".join(f"{f.name}/" for f in parts.values())
    if "train" not in parts:
        raise UserError(f"{folder} holds {layout} but not train/: put the training images in {folder}/train/<class>/")
    return parts, f"{layout}; left out: {', '.join(others)}" if others else layout


def _folders(folder: Path) -> list[Path]:
    """Return `images.folders`, whose names must be UTF-8."""
    folders = images.folders(folder)
    for f in folders:
        try:
            f.name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{folder} holds the folder {os.fsencode(f.name)!r}, whose name is not UTF-8: rename it"
            ) from error
    return folders


def read_folder(files: list[LabelledFile], image_size: int, store: Store) -> Arrays:
    """Decode the images of a folder; the classes are the names of train's folders, sorted.

    Raises:
        UserError: if files are not images, all of which it names, or the images' sizes differ and `image_size` is 0.
    """
    class_names = sorted({file.label for file in files if file.part == "train"})
    arrays: Arrays = {"class_names": np.array(class_names)}
    unreadable = []

    def decode(members: list[LabelledFile]) -> Iterator[np.ndarray]:
        for file in members:
            try:
                yield _as_array(images.read(file.path), image_size)
            except Exception as error:  # a decoder can raise anything on hostile bytes
                unreadable.append((file.path, reason(error)))

    rest, remedy = len(files), f"{_SMALLER}, or use fewer images"
    for part in dict.fromkeys(file.part for file in files):
        members = [file for file in files if file.part == part]
        try:
            arrays[f"{part}_images"] = _collect(store, part, decode(members), len(members), rest, remedy)
        except memory.TooLargeError:
            raise
        except UserError:
            if not unreadable:
                raise
        arrays[f"{part}_labels"] = np.array([class_names.index(file.label) for file in members], np.int32)
        rest -= len(members)
    if len(unreadable) == 1:
        raise UserError("{} cannot be read as an image ({}): fix or remove it".format(*unreadable[0]))
    if unreadable:
        named = ", ".join(f"{path} ({why})" for path, why in unreadable)
        raise UserError(f"{len(unreadable)} files cannot be read as images: {named}: fix or remove them")
    return arrays


def _as_array(image: Image.Image, image_size: int) -> np.ndarray:
    """Convert an RGB image to uint8 [H, W, 3]; `image_size` > 0 scales the shorter side to it and crops the centre."""
    return np.asarray(images.fit(image, (image_size, image_size)) if image_size else image)


def _collect(store: Store, part: str, decoded: Iterable[np.ndarray], count: int, rest: int, remedy: str) -> Images:
    """Collect the images of a part, which have one size, as they are decoded.

    Args:
        store: where they go.
        part: one of `PARTS`.
        decoded: `count` images, uint8 [H, W, 3], or fewer if some cannot be read.
        count: of this part.
        rest: of this part and those that are read after it.
        remedy: what to do if they are too many.

    Raises:
        UserError: if their sizes differ, or there is no room for the rest of the source.
    """
    collected: Images = np.zeros((count, 0, 0, 3), np.uint8)
    for i, image in enumerate(decoded):
        pixels = f"{image.shape[0]}x{image.shape[1]} pixels"
        if i == 0:
            first = pixels
            collected = store.empty(
                part, (count, *image.shape), rest * image.nbytes, f"{rest:,} images of {pixels}", remedy
            )
        if pixels != first:
            raise UserError(f"some images have {first}, others {pixels}: set config.data.image_size to resize them")
        collected[i] = image
    return collected


def prepared_tfds_builder(name: str, data_dir: str) -> Any:
    """Return the TFDS builder of a data set that is prepared on disk; download it first if necessary.

    Raises:
        UserError: if TFDS has no such set, it is not image classification, or it is neither on disk nor reachable.
    """
    tfds = import_tfds(name)
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError, AssertionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        explanation = " ".join([lines[0], *(line for line in lines[1:] if line.startswith("Did you mean"))]).strip()
        explanation = explanation or "TFDS knows no such name."
        raise UserError(
            f"config.data.name {name!r}: {explanation} Give a TFDS name such as cifar10 or cifar10:train[:80%], or digits, npz:FILE or folder:DIR"
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


def tfds_name_and_part(name: str) -> tuple[str, str]:
    """Split the name of a part of a TFDS set: "cifar10:train[:80%]" -> ("cifar10", "train[:80%]"); ("cifar10", "") without."""
    before, bracket, inside = name.partition("[")
    builder, colon, split = before.rpartition(":")
    return (builder, f"{split}{bracket}{inside}") if colon and bracket and inside.endswith("]") else (name, "")


def tfds_splits(builder: Any, training_part: str = "", num_threads: int = 0) -> dict[str, str]:
    """Return the split of each part of a TFDS set.

    Its only split is "train". Without a labelled "test", "validation" is the test set.

    Args:
        builder: of the set.
        training_part: the part of the training split to take, in TFDS's notation, "train[:80%]"; "" for all.
        num_threads: of TensorFlow, if it must read an example.

    Raises:
        UserError: if a set of several splits has none for a part, or the training split has no such part.
    """
    there = list(builder.info.splits)
    splits = {"train": "train", "test": "test" if "test" in there else "validation"}
    if {"test", "validation"} <= set(there):
        splits["validation" if _is_labelled(builder, "test", num_threads) else "test"] = "validation"
    if len(there) == 1:
        splits = {"train": there[0]}
    for split in splits.values():
        if split not in there:
            raise UserError(f"{builder.name} has the splits {', '.join(there)}: it lacks {split}")
    if training_part:
        _check_part(builder, training_part, splits["train"])
        splits["train"] = training_part
    return splits


def _is_labelled(builder: Any, split: str, num_threads: int) -> bool:
    """Whether the first example of a split has a label; a contest that keeps them to itself, such as ImageNet's, gives -1."""
    import tensorflow_datasets as tfds

    tf = import_tensorflow(num_threads)
    undecoded = {"image": tfds.decode.SkipDecoding()}
    try:
        examples = list(tfds.as_numpy(builder.as_dataset(split=f"{split}[:1]", decoders=undecoded)))
    except tf.errors.OpError as error:
        raise _corrupt(builder, error) from error
    return all(example["label"] >= 0 for example in examples)


def _corrupt(builder: Any, error: Any) -> UserError:
    """Return what to say when TensorFlow cannot read a prepared set."""
    return UserError(f"{builder.data_path} is corrupt ({error.message}): delete it and prepare it again")


def _check_part(builder: Any, part: str, split: str) -> None:
    """Refuse a part, "train[:9]+train[20:]", that is not of this split alone, names an image twice, or holds none."""
    import tensorflow_datasets as tfds

    example = f"give one such as {builder.name}:{split}[:80%]"
    try:
        pieces = tfds.core.ReadInstruction.from_spec(part).to_absolute(builder.info.splits)
    except (ValueError, AssertionError, KeyError) as error:
        explanation = " ".join(str(error).split())[:150]
        raise UserError(f"config.data.name: {part} is no part of a split ({explanation}): {example}") from error
    if others := sorted({piece.splitname for piece in pieces} - {split}):
        raise UserError(f"config.data.name: {part} is not of the training images alone ({others[0]}): {example}")
    size = builder.info.splits[split].num_examples
    spans = sorted((piece.from_ or 0, size if piece.to is None else piece.to) for piece in pieces)
    if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
        raise UserError(f"config.data.name: {part} names an image twice: {example}")
    if all(start == end for start, end in spans):
        raise UserError(f"config.data.name: {part} holds no image: {example}")


def read_tfds(builder: Any, splits: dict[str, str], image_size: int, num_threads: int, store: Store) -> Arrays:
    """Decode the splits of a prepared TFDS set, as `tfds_splits` names them, in its own order."""
    import tensorflow_datasets as tfds

    tf = import_tensorflow(num_threads)
    arrays: Arrays = {"class_names": np.array(builder.info.features["label"].names)}
    one_by_one = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    counts = {part: builder.info.splits[split].num_examples for part, split in splits.items()}
    rest, labels = sum(counts.values()), {part: list[int]() for part in splits}
    remedy = f"{_SMALLER}, or take a part of them, such as {builder.name}:{splits['train'].partition('[')[0]}[:10%]"

    def decode(part: str, split: str) -> Iterator[np.ndarray]:
        examples = builder.as_dataset(split=split, shuffle_files=False, read_config=one_by_one)
        for example in tfds.as_numpy(examples):
            pixels = example["image"]
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            labels[part].append(example["label"])
            yield _as_array(images.to_rgb(image), image_size)

    for part, split in splits.items():
        print(f"decoding {counts[part]} images of {builder.name}'s {split} split", flush=True)
        try:
            arrays[f"{part}_images"] = _collect(store, part, decode(part, split), counts[part], rest, remedy)
        except tf.errors.OpError as error:
            raise _corrupt(builder, error) from error
        arrays[f"{part}_labels"] = np.array(labels[part], np.int32)
        rest -= counts[part]
    return arrays


def _download(builder: Any) -> None:
    """Download and prepare a set if its server answers; without that check, TFDS would retry for minutes."""
    remedy = (
        f"{builder.name} is not prepared in {builder.data_path}, and {{}}. Prepare it on a machine with a network and set "
        "TFDS_DATA_DIR (or --config.data.data_dir) to that folder, or give the images as --config.data.name=folder:DIR or npz:FILE"
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
