"""AutoAugment's policy for CIFAR-10 (arXiv:1805.09501, table 7), RandAugment and TrivialAugment, in integers.

AutoAugment: each example draws one of 25 pairs of operations. Each of the two is applied with its own probability, in
one of two directions if it has a direction. Magnitudes are the paper's 0..9 and divide its ranges evenly.

RandAugment (arXiv:1909.13719): each example draws one of 14 operations several times, each with a direction. All have
one magnitude of 0..30, which divides AutoAugment's ranges evenly.

TrivialAugment (arXiv:2103.10158, its wide ranges): each example draws one of 14 operations, one of 31 magnitudes and a
direction, each uniformly.

The rest is as in torchvision: translations are whole pixels, and the area outside the image is black.
"""

import enum
import math
from functools import lru_cache

import numpy as np

from resnet_jax import config
from resnet_jax.data import sampling


class Kind(enum.IntEnum):
    """The kinds of operations; each comment says what the amount means."""

    GEOMETRY = 0  # only the map; it may be the identity
    BRIGHTNESS = 1  # a factor, in units of 1 / 2**JITTER_BITS
    CONTRAST = 2  # likewise
    COLOR = 3  # likewise
    SHARPNESS = 4  # likewise
    POSTERIZE = 5  # mask of the bits to keep
    SOLARIZE = 6  # lowest value that is inverted
    AUTO_CONTRAST = 7
    EQUALIZE = 8


_Operation = tuple[str, float, int]  # name, probability, magnitude

_PAIRS: tuple[tuple[_Operation, _Operation], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
)
# The 14 operations of RandAugment and TrivialAugment, each with the largest value of TrivialAugment's wide range, as `_integers` takes it.
_TRIVIAL = {
    "identity": 0.0,
    "shear_x": 0.99,
    "shear_y": 0.99,
    "translate_x": 32,
    "translate_y": 32,
    "rotate": 135.0,
    "brightness": 0.99,
    "color": 0.99,
    "contrast": 0.99,
    "sharpness": 0.99,
    "posterize": 6,
    "solarize": 255,
    "auto_contrast": 0.0,
    "equalize": 0.0,
}
_BINS = 31  # of the magnitudes of both
_PROBABILITY = np.array([[probability for _, probability, _ in pair] for pair in _PAIRS])
_STILL = (65536, 0, 32768, 0, 65536, 32768)  # the map of the identity
_NOTHING = np.array([Kind.GEOMETRY, 0, *_STILL], np.int32)


def operation(name: str, magnitude: int, direction: int, height: int, width: int, most: int = 9) -> tuple[int, ...]:
    """Return one operation on images of H x W pixels as integers.

    Args:
        name: its name in the policy's table.
        magnitude: 0..most; 0 for "auto_contrast", "equalize" and "invert", which have no magnitude.
        direction: 1 or -1, of a shear, translation or rotation; or whether a factor is above or below 1; else ignored.
        height: H.
        width: W.
        most: the magnitude at which a range ends: 9 in AutoAugment, 30 in RandAugment.

    Returns:
        (kind, amount, a, b, c, d, e, f): a `Kind`, its amount, and the map from output to input pixels, as
        `sampling.rotation_map` returns it.
    """
    level = magnitude / most
    match name:
        case "shear_x" | "shear_y":
            value = direction * 0.3 * level
        case "translate_x" | "translate_y":  # up to 150 pixels of 331
            value = direction * int(150 / 331 * (width if name == "translate_x" else height) * level)
        case "rotate":
            value = direction * 30 * level
        case "brightness" | "contrast" | "color" | "sharpness":  # factors up to 0.1 and 1.9
            value = direction * 0.9 * level
        case "posterize":  # 8 bits down to 4
            value = round(4 * level)
        case "solarize":  # above 255 down to 0
            value = 255 * magnitude // most
        case _:
            value = 0
    return _integers(name, value, height, width)


def trivial_operation(name: str, magnitude: int, direction: int, height: int, width: int) -> tuple[int, ...]:
    """Return one of TrivialAugment's operations, as `operation` does; its magnitude is 0..30, also if it has none."""
    value = _TRIVIAL[name] * magnitude / (_BINS - 1)
    match name:
        case "posterize":  # 8 bits down to 2
            value = round(value)
        case "solarize":
            value = math.floor(value)
        case "translate_x" | "translate_y":
            value = direction * int(value)
        case _:
            value = direction * value
    return _integers(name, value, height, width)


def _integers(name: str, value: float, height: int, width: int) -> tuple[int, ...]:
    """Return an operation as `operation` does.

    Args:
        name: as `operation` takes it, or "identity".
        value: of a shear, pixels per pixel from the upper left corner; of a translation, whole pixels; of a rotation,
            degrees; of "brightness", "contrast", "color" and "sharpness", the factor - 1; of "posterize", the bits that
            are lost; of "solarize", 255 - the lowest value that is inverted; else ignored.
        height: H.
        width: W.
    """
    match name:
        case "identity":
            return Kind.GEOMETRY, 0, *_STILL
        case "shear_x" | "shear_y":
            along, offset = (math.floor(v * 65536 + 0.5) for v in (value, 0.5 + value * 0.5))
            a, b, c, d, e, f = _STILL
            sheared = (a, along, offset, d, e, f) if name == "shear_x" else (a, b, c, along, e, offset)
            return Kind.GEOMETRY, 0, *sheared
        case "translate_x" | "translate_y":
            x, y = (int(value), 0) if name == "translate_x" else (0, int(value))
            a, b, c, d, e, f = _STILL
            return Kind.GEOMETRY, 0, a, b, c - x * 65536, d, e, f - y * 65536
        case "rotate":
            turned = sampling.rotation_map(np.array([value]), height, width)
            return Kind.GEOMETRY, 0, *map(int, turned[0])
        case "brightness" | "contrast" | "color" | "sharpness":
            factor = round((1 + value) * 2**sampling.JITTER_BITS)
            return Kind[name.upper()], factor, *_STILL
        case "posterize":
            return Kind.POSTERIZE, 256 - 2 ** int(value), *_STILL
        case "solarize":
            return Kind.SOLARIZE, 255 - int(value), *_STILL
        case "invert":
            return Kind.SOLARIZE, 0, *_STILL
        case "auto_contrast" | "equalize":
            return Kind[name.upper()], 0, *_STILL
    raise ValueError(name)


@lru_cache(maxsize=4)
def _table(height: int, width: int) -> np.ndarray:
    """All operations of the policy: int32 [25, 2, 2, 8], by pair, position in the pair and direction (1, -1)."""
    return np.array(
        [
            [[operation(name, magnitude, way, height, width) for way in (1, -1)] for name, _, magnitude in pair]
            for pair in _PAIRS
        ],
        np.int32,
    )


@lru_cache(maxsize=4)
def _trivial_table(height: int, width: int) -> np.ndarray:
    """All operations of TrivialAugment: int32 [14, 31, 2, 8], by operation, magnitude and direction (1, -1)."""
    return np.array(
        [
            [[trivial_operation(name, magnitude, way, height, width) for way in (1, -1)] for magnitude in range(_BINS)]
            for name in _TRIVIAL
        ],
        np.int32,
    )


def trivial_operations(seed: int, start: int, stop: int, num_examples: int, image_shape: tuple[int, int]) -> np.ndarray:
    """Draw TrivialAugment's operation of each position, as `operations` does: int32 [stop - start, 1, 8]."""
    words = sampling.words(seed, "policy", start, stop, num_examples)
    place = (sampling.below(words[:, column], n) for column, n in enumerate((len(_TRIVIAL), _BINS, 2)))
    return _trivial_table(*image_shape)[tuple(place)][:, None]


def operations(seed: int, start: int, stop: int, num_examples: int, image_shape: tuple[int, int]) -> np.ndarray:
    """Draw the two operations of each of the global positions [start, stop) of the training stream.

    Args:
        seed: the run's seed.
        start: first global position.
        stop: last global position + 1.
        num_examples: examples in an epoch.
        image_shape: (H, W).

    Returns:
        int32 [stop - start, 2, 8], each as `operation` returns it; an operation that is not applied is the identity.
    """
    words = sampling.words(seed, "policy", start, stop, num_examples)
    pair = sampling.below(words[:, 0], len(_PAIRS))
    backwards = sampling.below(words[:, 3:5], 2)
    chosen = _table(*image_shape)[pair[:, None], np.arange(2), backwards]
    applied = sampling.uniform(words[:, 1:3]) < _PROBABILITY[pair]
    return np.where(applied[:, :, None], chosen, _NOTHING)


@lru_cache(maxsize=4)
def _rand_table(magnitude: int, height: int, width: int) -> np.ndarray:
    """All operations of RandAugment at a magnitude: int32 [14, 2, 8], by operation and direction (1, -1)."""
    most = _BINS - 1
    return np.array(
        [[operation(name, magnitude, way, height, width, most) for way in (1, -1)] for name in _TRIVIAL], np.int32
    )


def rand_operations(
    seed: int, start: int, stop: int, num_examples: int, image_shape: tuple[int, int], magnitude: int, count: int
) -> np.ndarray:
    """Draw RandAugment's operations of each position, as `operations` does: int32 [stop - start, count <= 4, 8]."""
    words = sampling.words(seed, "policy", start, stop, num_examples)
    names, backwards = words[:, :count], words[:, 4 : 4 + count]
    return _rand_table(magnitude, *image_shape)[sampling.below(names, len(_TRIVIAL)), sampling.below(backwards, 2)]


def policy_operations(
    policy: str, seed: int, start: int, stop: int, num_examples: int, image_shape: tuple[int, int]
) -> np.ndarray:
    """Draw the operations that `config.augment.policy` names, as `operations` does: int32 [stop - start, count, 8]."""
    where = seed, start, stop, num_examples, image_shape
    if policy == "cifar10":
        return operations(*where)
    if policy == "trivial":
        return trivial_operations(*where)
    magnitude, count = config.rand_augment(policy)
    return rand_operations(*where, magnitude, count)
