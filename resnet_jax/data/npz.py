"""Read the arrays of an `.npz` as a data set; forms that have one meaning only are converted, and a line says so."""

from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data import memory
from resnet_jax.errors import UserError, reason

PARTS = ("train", "validation", "test")
KEYS = (*(f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")), "class_names")
# KEYS -> uint8 [N, H, W, 3] and int [N] for each part there is, and str [num_classes]
Arrays = dict[str, Any]

_ROUNDING = 1e-5  # by which floats may leave 0..1


def read(path: Path) -> Arrays:
    """Read all arrays of a file as they are.

    Raises:
        UserError: if it is not an `.npz` of arrays.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give config.data.name as npz:FILE")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            memory.check(f"the arrays of {path}", size, "use fewer or smaller images")
            return {key: file[key] for key in file.files}
    except UserError:
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds of errors for a corrupt file
        raise UserError(
            f"{path} cannot be read as an .npz of arrays ({reason(error)}): fix it, or give another"
        ) from error


def read_set(path: Path) -> Arrays:
    """Read a file of train_images, train_labels and, optionally, those of validation and test, and class_names.

    Raises:
        UserError: if an array is missing, or has no one meaning as images or labels; the message names it and what to do.
    """
    stored = read(path)
    parts = [part for part in PARTS if part == "train" or any(key.startswith(f"{part}_") for key in stored)]
    missing = [key for part in parts for key in (f"{part}_images", f"{part}_labels") if key not in stored]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it holds {', '.join(stored) or 'nothing'}")
    arrays = {key: stored[key] for key in KEYS if key in stored}
    try:
        arrays |= _pixels({key: _channels_last(key, arrays[key]) for key in arrays if key.endswith("_images")})
        if arrays["train_labels"].dtype.kind in "US":
            arrays |= _numbered(arrays)
        else:
            arrays |= {key: _whole(key, arrays[key]) for key in arrays if key.endswith("_labels")}
        if "class_names" not in arrays:
            arrays["class_names"] = _names(arrays["train_labels"])
    except (SystemError, ValueError) as error:  # NumPy raises the former for text that is not Unicode
        raise UserError(f"{path}: {error}") from error
    changed = [
        f"{key} from {_form(stored[key])} to {_form(arrays[key])}"
        for key in KEYS
        if key in stored and (stored[key].dtype, stored[key].shape) != (arrays[key].dtype, arrays[key].shape)
    ]
    if changed:
        print(f"{path}: converted {', '.join(changed)}", flush=True)
    return arrays


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _channels_last(key: str, images: np.ndarray) -> np.ndarray:
    """Convert images [N, H, W], [N, H, W, 1], [N, 1, H, W] or [N, 3, H, W] to [N, H, W, 3].

    Raises:
        ValueError: if they have another shape.
    """
    shape = images.shape
    if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        images = np.moveaxis(images, 1, 3)
    elif len(shape) == 3:
        images = images[..., np.newaxis]
    if images.ndim == 4 and images.shape[3] == 1:
        images = np.repeat(images, 3, axis=3)
    if images.ndim == 4 and images.shape[3] == 3 and 0 not in images.shape[1:]:
        return images
    hint = "reshape it"
    if len(shape) == 4 and shape[3] == 4:
        hint = f"leave out the transparency with {key}[..., :3]"
    elif len(shape) == 2:
        side = round((shape[1] / 3) ** 0.5)
        of_colours = shape[1] == 3 * side**2
        side = side if of_colours else round(shape[1] ** 0.5)
        square = of_colours or shape[1] == side**2
        hint = f"use {key}.reshape(-1{', 3' * of_colours}, {side}, {side})" if square else hint
    raise ValueError(f"{key} is {_form(images)}: images must be [N, H, W, 3] or [N, H, W]; {hint}")


def _pixels(images: Arrays) -> Arrays:
    """Convert images that are bool, floats in 0..1, or whole numbers up to 255, to uint8; all of them by one rule.

    Raises:
        ValueError: if they are of another type or range.
    """
    converted = {key: array * np.uint8(255) for key, array in images.items() if array.dtype == bool}
    others = {key: a for key, a in images.items() if a.dtype not in (bool, np.uint8) and a.size}
    for key, array in others.items():
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{key} is {_form(array)}: images must be uint8; use {key}.astype(np.uint8)")
    lowest, highest = ({key: pick(array) for key, array in others.items()} for pick in (np.min, np.max))
    whole = all(array.dtype.kind in "iu" or np.array_equal(array, np.rint(array)) for array in others.values())
    floats = all(array.dtype.kind == "f" for array in others.values())
    for key, array in others.items():
        if floats and min(lowest.values()) >= -_ROUNDING and max(highest.values()) <= 1 + _ROUNDING:
            converted[key] = np.rint(np.clip(array.astype(np.float32), 0, 1) * np.float32(255)).astype(np.uint8)
        elif whole and min(lowest.values()) >= 0 and 128 <= max(highest.values()) <= 255:  # less may be another scale
            converted[key] = array.astype(np.uint8)
        else:
            raise ValueError(
                f"{key} is {_form(array)} with values from {lowest[key]:g} to {highest[key]:g}: images must be uint8, 0..255, or "
                f"floats in 0..1; use (({key} - LOW) / (HIGH - LOW)).clip(0, 1) with the values LOW of black and HIGH of white"
            )
    return images | converted


def _whole(key: str, labels: np.ndarray) -> np.ndarray:
    """Convert labels that are whole numbers in floats, bool or one-hot to integers.

    Raises:
        ValueError: if they are of another form.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind in "biuf" and labels.ndim == 2 and labels.size:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise ValueError(
                f"{key} is {_form(labels)} and not one-hot: give one class for each image, as {key}.argmax(axis=1)"
            )
        return labels.argmax(axis=1)
    if (
        labels.dtype.kind == "f"
        and np.isfinite(labels).all()
        and (np.abs(labels) < 2**31).all()
        and (labels == np.rint(labels)).all()
    ):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "biu" or labels.ndim != 1:
        raise ValueError(f"{key} is {_form(labels)}: give one whole number from 0, or one class name, for each image")
    return labels.astype(np.int64) if labels.dtype == bool else labels


def _numbered(arrays: Arrays) -> Arrays:
    """Convert labels that are class names to numbers; without class_names, those of train, sorted.

    Raises:
        ValueError: if a name is unknown or cannot be read.
    """
    labels = {key: array.ravel() for key, array in arrays.items() if key.endswith("_labels")}
    if wrong := [key for key, array in labels.items() if array.dtype.kind not in "US"]:
        raise ValueError(f"{wrong[0]} is {_form(arrays[wrong[0]])}, and train_labels are names: give names for both")
    texts = {key: np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array for key, array in labels.items()}
    names = arrays.get("class_names", np.unique(texts["train_labels"]))
    number = {name: i for i, name in enumerate(names.ravel().tolist())}
    numbered: Arrays = {"class_names": names}
    for key, array in texts.items():
        if unknown := sorted(set(array.tolist()) - number.keys()):
            holder = "class_names" if "class_names" in arrays else "train_labels"
            raise ValueError(
                f"{key} has {unknown[0]!r}, which {holder} does not have: add it there, or correct the name"
            )
        numbered[key] = np.array([number[name] for name in array.tolist()], np.int64)
    return numbered


def _names(labels: np.ndarray) -> np.ndarray:
    """Return the numbers of classes as names: as many as the largest label says.

    Raises:
        ValueError: if the classes are not numbered from 0.
    """
    count = int(labels.max()) + 1 if labels.size else 0
    if labels.size and labels.min() < 0:
        raise ValueError(f"train labels run from {labels.min()}: number the classes from 0")
    if count > labels.size:
        raise ValueError(f"train labels run to {count - 1} with {labels.size} images: number the classes from 0")
    return np.array([str(label) for label in range(count)], np.str_)
