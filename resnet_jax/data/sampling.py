"""All randomness that shapes the data, as functions of (seed, stream, epoch, position in the epoch).

The training stream is continuous: global position p = step * batch_size + i lies in epoch p // N, and an epoch visits
each of its N examples once, in its own order. Nothing is carried from one step to the next, so any run, process or
pipeline that asks for position p gets the same example with the same augmentation.

The bits are the raw output of NumPy's counter-based Philox4x64, keyed by (seed, stream) with the epoch in the counter;
this module turns them into numbers, so that no library version changes the numbers.
"""

from functools import lru_cache

import numpy as np
from ml_collections import ConfigDict

# Never renumber: it would change every run.
STREAMS = {"order": 0, "augment": 1, "split": 2, "policy": 3, "flip": 4, "cutout": 5, "mix": 6, "resized_crop": 7}

_WORDS = 8  # 64-bit words that each position draws: two Philox blocks
JITTER_BITS = 12  # factors are multiples of 1/4096, so that integer arithmetic can apply them
RESIZE_BITS = 22  # Pillow's, of the weights of a resized image
_ATTEMPTS = 10  # torchvision's, to draw a crop that lies inside the image
_RATIOS = (3 / 4, 4 / 3)  # torchvision's, from the narrowest crop to the widest

# The three jitters in each of their 6 orders: 0 brightness, 1 contrast, 2 saturation.
JITTER_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], np.int32)


def random_bits(seed: int, stream: str, epoch: int, start: int, count: int) -> np.ndarray:
    """Draw `count` words of 64 raw bits of one epoch of a stream, from word `start`, a multiple of 4."""
    counter = np.array([start // 4, 0, epoch, 0], np.uint64)
    key = np.array([seed, STREAMS[stream]], np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Convert raw bits to float64 in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53


def below(bits: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Convert raw bits to int32 in 0..n-1, uniform to within n / 2**32."""
    return (((bits >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)).astype(np.int32)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int, stream: str = "order") -> np.ndarray:
    """The order in which an epoch visits its examples: int64 [num_examples], read-only."""
    order = np.argsort(random_bits(seed, stream, epoch, 0, num_examples), kind="stable")
    order.flags.writeable = False
    return order


def _by_epoch(start: int, stop: int, num_examples: int) -> list[tuple[int, int, int]]:
    """Split global positions [start, stop) by epoch: (epoch, first position in it, last position + 1)."""
    pieces = []
    while start < stop:
        epoch, first = divmod(start, num_examples)
        last = min(first + stop - start, num_examples)
        pieces.append((epoch, first, last))
        start += last - first
    return pieces


def indices(seed: int, start: int, stop: int, num_examples: int) -> np.ndarray:
    """The examples at global positions [start, stop): int64 [stop - start], each in 0..num_examples-1."""
    pieces = _by_epoch(start, stop, num_examples)
    return np.concatenate([permutation(seed, epoch, num_examples)[first:last] for epoch, first, last in pieces])


def words(seed: int, stream: str, start: int, stop: int, num_examples: int, count: int = _WORDS) -> np.ndarray:
    """Raw bits for global positions [start, stop): uint64 [stop - start, count], with a multiple of 4 as `count`."""
    pieces = [
        random_bits(seed, stream, epoch, first * count, (last - first) * count)
        for epoch, first, last in _by_epoch(start, stop, num_examples)
    ]
    return np.concatenate(pieces).reshape(-1, count)


def augment_draws(
    seed: int, start: int, stop: int, num_examples: int, augment: ConfigDict, image_shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Draw the augmentation of global positions [start, stop), without a policy's operations and without mixing.

    Args:
        seed: the run's seed.
        start: first global position.
        stop: last global position + 1.
        num_examples: examples in an epoch.
        augment: `config.augment`; switching one augmentation off does not change the draws of the others.
        image_shape: (H, W) of the images, for the rotation about the centre.

    Returns:
        What `augment` switches on, for each of the B positions:
        "flip": bool [B], mirror left to right; "crop": int32 [B, 2], row and column of the crop in the padded image,
        0..2*padding; either comes with the other;
        "jitter": float32 [B, 3], factors of brightness, contrast and saturation, multiples of 1/4096;
        "order": int32 [B, 3], the columns of "jitter" in the order in which they are applied;
        "rotation": int32 [B, 6], the map from output to input pixels, as `rotation_map` returns it;
        "resized_crop": int32 [B, H + W, 2], as `resized_crops` returns it; it comes with "flip" and "crop";
        "cutout": int32 [B, 2], the centres of its squares.
    """
    where = seed, start, stop, num_examples
    bits = words(seed, "augment", start, stop, num_examples)
    draws = {}
    if augment.flip_probability > 0 or augment.crop_padding > 0 or augment.resized_crop_area > 0:
        draws["flip"] = uniform(bits[:, 0]) < augment.flip_probability
        if augment.flip == "alternating" and augment.flip_probability > 0:
            draws["flip"] = alternating_flip(*where, augment.flip_probability)
        draws["crop"] = below(bits[:, 1:3], 2 * augment.crop_padding + 1)
    if augment.brightness > 0 or augment.contrast > 0 or augment.saturation > 0:
        strength = np.array([augment.brightness, augment.contrast, augment.saturation])
        factors = 1.0 + strength * (2.0 * uniform(bits[:, 3:6]) - 1.0)
        draws["jitter"] = (np.round(factors * 2**JITTER_BITS) / 2**JITTER_BITS).astype(np.float32)
        draws["order"] = JITTER_ORDERS[below(bits[:, 6], len(JITTER_ORDERS))]
    if augment.rotation_degrees > 0:
        degrees = augment.rotation_degrees * (2.0 * uniform(bits[:, 7]) - 1.0)
        draws["rotation"] = rotation_map(degrees, *image_shape)
    if augment.resized_crop_area > 0:
        draws["resized_crop"] = resized_crops(*where, augment.resized_crop_area, image_shape)
    if augment.cutout > 0:
        draws["cutout"] = cutout_centres(*where, image_shape)
    return draws


def alternating_flip(seed: int, start: int, stop: int, num_examples: int, probability: float) -> np.ndarray:
    """Draw the flips of global positions [start, stop) as arXiv:2404.00498 does: bool [stop - start].

    Epoch 0 mirrors each image with `probability`, and each later epoch mirrors the images that the one before did not.
    """
    odd_epoch = np.arange(start, stop) // num_examples % 2 == 1
    first = _first_flips(seed, num_examples, probability)
    return first[indices(seed, start, stop, num_examples)] ^ odd_epoch


@lru_cache(maxsize=4)
def _first_flips(seed: int, num_examples: int, probability: float) -> np.ndarray:
    """Whether epoch 0 mirrors each example, by its index: bool [num_examples]."""
    return uniform(random_bits(seed, "flip", 0, 0, num_examples)) < probability


def resized_crops(
    seed: int, start: int, stop: int, num_examples: int, least_area: float, image_shape: tuple[int, int]
) -> np.ndarray:
    """Draw the crops of global positions [start, stop) as torchvision's `RandomResizedCrop` does, and scale them to the whole image.

    A crop's share of the area is uniform in least_area..1, the logarithm of its width by its height is uniform between those of
    3/4 and 4/3, and its place is uniform inside the image. If ten attempts are too wide or too high, it is the largest crop
    in the centre.

    Returns:
        int32 [stop - start, H + W, 2]: for each row, then for each column, of the scaled crop, the first of the two rows or columns
        of the image between which it lies, and the weight of the second, times 2**22.
    """
    height, width = image_shape
    bits = words(seed, "resized_crop", start, stop, num_examples, count=24)
    drawn = uniform(bits[:, : 2 * _ATTEMPTS]).reshape(-1, _ATTEMPTS, 2)
    area = height * width * (least_area + (1.0 - least_area) * drawn[..., 0])
    low, high = np.log(_RATIOS)
    ratio = np.exp(low + (high - low) * drawn[..., 1])
    central = min(height, round(width / _RATIOS[0])), min(width, round(height * _RATIOS[1]))
    sizes = []
    inside = np.ones(ratio.shape, bool)
    for extent, side in ((np.sqrt(area / ratio), height), (np.sqrt(area * ratio), width)):
        sizes.append(np.rint(extent).astype(np.int64))
        inside &= (sizes[-1] > 0) & (sizes[-1] <= side)
    fits, chosen = inside.any(axis=1), (np.arange(len(bits)), inside.argmax(axis=1))
    crops = []
    for axis, (side, size) in enumerate(zip(image_shape, sizes, strict=True)):
        length = np.where(fits, size[chosen], central[axis])
        place = below(bits[:, 2 * _ATTEMPTS + axis], side - length + 1)
        first = np.where(fits, place, (side - length) // 2)
        crops.append(_between(first, length, side))
    return np.concatenate(crops, axis=1).astype(np.int32)


def _between(first: np.ndarray, length: np.ndarray, side: int) -> np.ndarray:
    """Return where the pixels of a scaled crop lie in the image, along one axis, for bilinear interpolation.

    Args:
        first: int [B], the crop's first pixel.
        length: int [B], its pixels, at most `side`.
        side: pixels that it is scaled to.

    Returns:
        int64 [B, side, 2]: the pixel before, and the weight of the one after it, times 2**22.
    """
    # Pixel i of the scaled crop lies at (i + 1/2) * length / side - 1/2 in the crop.
    halves = (2 * np.arange(side) + 1) * length[:, None] - side
    before, rest = np.divmod(np.clip(halves, 0, 2 * side * (length[:, None] - 1)), 2 * side)
    weight = (rest * 2**RESIZE_BITS + side) // (2 * side)
    return np.stack([first[:, None] + before, weight], axis=2)


def cutout_centres(seed: int, start: int, stop: int, num_examples: int, image_shape: tuple[int, int]) -> np.ndarray:
    """Draw the row and column of the centre of Cutout's square, uniform over the pixels: int32 [stop - start, 2]."""
    bits = words(seed, "cutout", start, stop, num_examples)
    return np.stack([below(bits[:, axis], side) for axis, side in enumerate(image_shape)], axis=1)


def mixes(augment: ConfigDict) -> bool:
    """Whether a config mixes the images of a batch."""
    return bool(augment.mixup_alpha > 0 or augment.cutmix_alpha > 0)


def mixing_weights(
    seed: int, start_step: int, count: int, augment: ConfigDict, image_shape: tuple[int, int]
) -> np.ndarray:
    """Draw how steps [start_step, start_step + count) mix each image with its partner.

    A step draws its method, if both are on, and the image's own share from Beta(alpha, alpha), which is rounded to a
    multiple of 1/4096, so that SciPy's version does not matter. Mixup (arXiv:1710.09412) gives the partner the rest in
    every pixel. CutMix (arXiv:1905.04899) gives it the whole of a box, whose area is the rest where the box is inside
    the image.

    Returns:
        float32 [count, H + W]: the partner's weight in a pixel is that of its row, of H, times that of its column, of W.
    """
    from scipy import special

    bits = random_bits(seed, "mix", 0, start_step * _WORDS, count * _WORDS).reshape(count, _WORDS)
    cut = (augment.mixup_alpha == 0) | ((augment.cutmix_alpha > 0) & (below(bits[:, 0], 2) == 1))
    alpha = np.where(cut, augment.cutmix_alpha, augment.mixup_alpha)
    rest = 1.0 - np.round(special.betaincinv(alpha, alpha, uniform(bits[:, 1])) * 4096) / 4096
    weights = []
    for axis, side in enumerate(image_shape):
        half = np.floor(side * np.sqrt(rest) / 2)
        from_centre = np.arange(side) - below(bits[:, 2 + axis], side)[:, None]
        in_box = (from_centre >= -half[:, None]) & (from_centre < half[:, None])
        everywhere = rest if axis == 0 else np.ones(count)
        weights.append(np.where(cut[:, None], in_box, everywhere[:, None]))
    return np.concatenate(weights, axis=1).astype(np.float32)


def rotation_map(degrees: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the inverse map of a counter-clockwise rotation about the image's centre, in 16.16 fixed point.

    The centre of output pixel (x, y) comes from input pixel (floor(u), floor(v)) with u = a x + b y + c and
    v = d x + e y + f. With integers, every backend chooses the same pixels: those of Pillow's `Image.rotate` with
    nearest neighbour.

    Args:
        degrees: float64 [B].
        height: H of the images.
        width: W of the images.

    Returns:
        int32 [B, 6]: (a, b, c, d, e, f) * 65536.
    """
    cos, sin = np.cos(-np.radians(degrees)), np.sin(-np.radians(degrees))
    y, x = 0.5 - height / 2, 0.5 - width / 2  # the centre of pixel (0, 0), relative to the image's centre
    rows = [cos, sin, cos * x + sin * y + width / 2, -sin, cos, -sin * x + cos * y + height / 2]
    return np.floor(np.stack(rows, axis=1) * 65536.0 + 0.5).astype(np.int32)


def stratified_split(labels: np.ndarray, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split examples in two parts, class by class; the split is the same on every machine.

    Args:
        labels: int [N], in the source's own order.
        ratio: share of the second part, >= 0 and < 1: it gets round(ratio * N) examples, and of each class its share to
            within one example. Each class keeps an example in the first part, so the second may get fewer.
        seed: seed of the split.

    Returns:
        (first, second): sorted int64 indices; each example is in exactly one of them.
    """
    counts = np.bincount(labels)
    share = counts * ratio
    quota = np.floor(share).astype(np.int64)
    short = round(len(labels) * ratio) - quota.sum()
    largest_remainders_first = np.argsort(quota - share, kind="stable")
    quota[[label for label in largest_remainders_first if counts[label] - quota[label] > 1][:short]] += 1
    chosen = np.zeros(len(labels), bool)
    for label, (count, size) in enumerate(zip(counts, quota, strict=True)):
        members = np.flatnonzero(labels == label)
        chosen[members[permutation(seed, label, int(count), "split")[:size]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
