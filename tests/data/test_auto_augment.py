"""Each operation against Pillow, in both pipelines, and the policy's draws."""

import collections
import functools

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from resnet_jax.data import augment_jax, augment_tf, auto_augment, sampling

SHAPES = [(32, 32), (9, 15), (2, 3), (1, 1)]
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "color": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}
WITHOUT_MAGNITUDE = {"invert": ImageOps.invert, "equalize": ImageOps.equalize}
OPERATE_JAX = jax.jit(augment_jax.operate)
GOLDEN_OPERATIONS = [
    [[4, 4506], [4, 2867]],
    [[8, 0], [7, 0]],
    [[7, 0], [6, 170]],
]  # kind and amount, of examples 2 to 4
GOLDEN_RAND = [[[1, 5571], [1, 5571]], [[2, 5571], [1, 5571]], [[0, 0], [0, 0]], [[1, 2621], [0, 0]]]  # likewise
GOLDEN_TRIVIAL = [[1, 2068], [2, 5988], [0, 0], [1, 5177]]  # likewise, of examples 0 to 3


def some_images(shape, count=48):
    """Noise of all strengths on flat colours, and images of few values, as equalising and stretching meet them."""
    rng = np.random.default_rng(0)
    scale = rng.choice([0.0, 0.02, 0.3, 1.0], (count, 1, 1, 1))
    images = scale * rng.integers(0, 256, (count, *shape, 3)) + (1 - scale) * rng.integers(0, 256, (count, 1, 1, 3))
    images[::6] = rng.choice([0, 3, 200], (len(images[::6]), *shape, 3))
    return images.astype(np.uint8)


def pillow(image, name, magnitude, direction):
    """torchvision's operation, by Pillow's own functions."""
    level, (width, height) = magnitude / 9, image.size

    def moved(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    if name == "shear_x":
        return moved(1, direction * 0.3 * level, 0, 0, 1, 0)
    if name == "shear_y":
        return moved(1, 0, 0, direction * 0.3 * level, 1, 0)
    if name == "translate_x":
        return moved(1, 0, -direction * int(150 / 331 * width * level), 0, 1, 0)
    if name == "translate_y":
        return moved(1, 0, 0, 0, 1, -direction * int(150 / 331 * height * level))
    if name == "rotate":
        return image.rotate(direction * 30 * level)
    if name in ENHANCERS:  # the factor is in the steps that sampling.py counts in, as the jitter's are
        return ENHANCERS[name](image).enhance(round((1 + direction * 0.9 * level) * 4096) / 4096)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(magnitude / 2.25))
    if name == "solarize":
        return ImageOps.solarize(image, 255 - 255 * magnitude / 9)
    return WITHOUT_MAGNITUDE[name](image)


def operate(module, images, operation):
    """One operation on all images, by one of the pipelines' modules."""
    operations = np.tile(np.array(operation, np.int32), (len(images), 1))
    if module is augment_tf:
        return augment_tf.operate(tf.constant(images), operations).numpy()
    return np.asarray(OPERATE_JAX(images, operations))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
        *ENHANCERS,
        *("posterize", "solarize"),
        *WITHOUT_MAGNITUDE,
    ],
)
def test_each_operation_equals_pillow(name, shape):
    images = some_images(shape)
    for magnitude in (0,) if name in WITHOUT_MAGNITUDE else (0, 1, 2, 3, 5, 7, 8, 9):
        for direction in (1, -1):
            theirs = [pillow(Image.fromarray(image), name, magnitude, direction) for image in images]
            operation = auto_augment.operation(name, magnitude, direction, *shape)
            for module in (augment_tf, augment_jax):
                ours = operate(module, images, operation)
                assert np.array_equal(ours, np.stack(theirs)), (module, magnitude, direction)


def trivial_ranges(width, height):
    """The largest values of torchvision's TrivialAugmentWide."""
    translation = {"translate_x": 32.0, "translate_y": 32.0}
    return {"shear_x": 0.99, "shear_y": 0.99, "rotate": 135.0, "factor": 0.99, "bits": 6} | translation


def rand_ranges(width, height):
    """The largest values of torchvision's RandAugment."""
    translation = {"translate_x": 150.0 / 331.0 * width, "translate_y": 150.0 / 331.0 * height}
    return {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0, "factor": 0.9, "bits": 4} | translation


def torchvisions(ranges, image, name, magnitude, direction):
    """An operation of torchvision on a Pillow image; `magnitude` is a bin of 31."""

    def moved(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    most = ranges(*image.size)
    value = direction * float(np.linspace(0.0, most.get(name, most["factor"]), 31)[magnitude])
    if name == "identity":
        return image
    if name == "shear_x":
        return moved(1, value, 0, 0, 1, 0)
    if name == "shear_y":
        return moved(1, 0, 0, value, 1, 0)
    if name == "translate_x":
        return moved(1, 0, -int(value), 0, 1, 0)
    if name == "translate_y":
        return moved(1, 0, 0, 0, 1, -int(value))
    if name == "rotate":
        return image.rotate(value)
    if name in ENHANCERS:
        return ENHANCERS[name](image).enhance(round((1 + value) * 4096) / 4096)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(magnitude / (30 / most["bits"])))
    if name == "solarize":
        return ImageOps.solarize(image, float(np.linspace(255.0, 0.0, 31)[magnitude]))
    return WITHOUT_MAGNITUDE[name](image)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("name", sorted(set(auto_augment._TRIVIAL) - {"auto_contrast"}))
def test_each_operation_of_trivial_augment_equals_pillow(name, shape):
    images = some_images(shape, 12)
    for magnitude in range(31):
        for direction in (1, -1):
            theirs = [
                torchvisions(trivial_ranges, Image.fromarray(image), name, magnitude, direction) for image in images
            ]
            operation = auto_augment.trivial_operation(name, magnitude, direction, *shape)
            for module in (augment_tf, augment_jax):
                assert np.array_equal(operate(module, images, operation), np.stack(theirs)), (magnitude, direction)


def test_trivial_augment_draws_operations_magnitudes_and_directions_uniformly():
    """If the pinned draws fail, every run with the policy changes: do not update them without saying so in the release."""
    n = 100_000
    drawn = auto_augment.trivial_operations(0, 0, n, n, (32, 32))
    assert drawn.shape == (n, 1, 8)
    wanted = collections.Counter()
    for name in auto_augment._TRIVIAL:
        for magnitude in range(31):
            for direction in (1, -1):
                wanted[auto_augment.trivial_operation(name, magnitude, direction, 32, 32)] += 1 / (14 * 31 * 2)
    found = collections.Counter(map(tuple, drawn[:, 0].tolist()))
    for operation in wanted | found:
        share = wanted[operation]
        assert abs(found[operation] / n - share) <= 5 * np.sqrt(share * (1 - share) / n), operation
    parts = [auto_augment.trivial_operations(0, a, b, 1000, (32, 32)) for a, b in ((0, 1), (1, 990), (990, 2500))]
    assert np.array_equal(auto_augment.trivial_operations(0, 0, 2500, 1000, (32, 32)), np.concatenate(parts))
    assert drawn[:4, 0, :2].tolist() == GOLDEN_TRIVIAL


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("name", sorted(set(auto_augment._TRIVIAL) - {"auto_contrast"}))
def test_each_operation_of_rand_augment_equals_pillow(name, shape):
    images = some_images(shape, 12)
    for magnitude in range(31):
        table = auto_augment._rand_table(magnitude, *shape)[list(auto_augment._TRIVIAL).index(name)]
        for operation, direction in zip(table, (1, -1), strict=True):
            theirs = [torchvisions(rand_ranges, Image.fromarray(image), name, magnitude, direction) for image in images]
            for module in (augment_tf, augment_jax):
                assert np.array_equal(operate(module, images, operation), np.stack(theirs)), (magnitude, direction)


def test_rand_augment_draws_operations_and_directions_uniformly_and_each_independently():
    """If the pinned draws fail, every run with the policy changes: do not update them without saying so in the release."""
    n = 100_000
    drawn = auto_augment.policy_operations("rand-m12-n4", 0, 0, n, n, (32, 32))
    assert drawn.shape == (n, 4, 8)
    wanted = collections.Counter()
    for operation in auto_augment._rand_table(12, 32, 32).reshape(-1, 8):
        wanted[tuple(operation.tolist())] += 1 / 28
    for place in range(4):
        found = collections.Counter(map(tuple, drawn[:, place].tolist()))
        for operation in wanted | found:
            share = wanted[operation]
            assert abs(found[operation] / n - share) <= 5 * np.sqrt(share * (1 - share) / n), operation
    same = (drawn[:, :1] == drawn[:, 1:]).all(axis=2).mean(axis=0)
    assert np.allclose(same, sum(share**2 for share in wanted.values()), atol=0.005)
    parts = [auto_augment.rand_operations(0, a, b, 1000, (32, 32), 12, 2) for a, b in ((0, 1), (1, 990), (990, 2500))]
    whole = auto_augment.rand_operations(0, 0, 2500, 1000, (32, 32), 12, 2)
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole[:4, :, :2].tolist() == GOLDEN_RAND


@pytest.mark.parametrize("module", [augment_tf, augment_jax])
def test_auto_contrast_is_pillows_rounded_down_exactly(module):
    """Pillow computes in float64, which falls just short of some whole numbers: there, and only there, it is one lower."""
    images = np.concatenate([some_images((32, 32)), every_pair_of_extremes()])
    theirs = np.stack([ImageOps.autocontrast(Image.fromarray(image)) for image in images]).astype(int)
    ours = operate(module, images, auto_augment.operation("auto_contrast", 0, 1, 32, 32)).astype(int)
    low, high = images.min(axis=(1, 2), keepdims=True).astype(int), images.max(axis=(1, 2), keepdims=True).astype(int)
    whole = 255 * (images - low) % np.maximum(high - low, 1) == 0
    assert np.array_equal(ours[~whole], theirs[~whole])
    assert set(np.unique((ours - theirs)[whole])) == {0, 1}
    assert (ours == theirs).mean() > 0.98


def every_pair_of_extremes():
    """Images whose channels hold all values between two: a sample of 3 x 200 of the pairs."""
    rng = np.random.default_rng(1)
    low, high = np.sort(rng.integers(0, 256, (2, 200, 1, 3)), axis=0)
    ramp = np.arange(1024)[None, :, None] % (high - low + 1) + low
    return ramp.reshape(200, 32, 32, 3).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_pipelines_give_the_same(final_config, shape):
    final_config.augment.policy = "cifar10"
    images = some_images(shape, 1000)
    where = (0, 900, 1100, 1000)  # into the next epoch
    indices = sampling.indices(*where)
    draws = sampling.augment_draws(*where, final_config.augment, shape)
    draws["operations"] = auto_augment.operations(*where, shape)
    jitted = jax.jit(functools.partial(augment_jax.augment, config=final_config.augment))
    ours = jitted(images, indices.astype(np.int32), draws)
    theirs = augment_tf.augment(tf.constant(images), indices, draws, final_config.augment)
    assert np.array_equal(ours, theirs)
    del draws["operations"]
    without = augment_tf.augment(tf.constant(images), indices, draws, final_config.augment)
    if min(shape) > 1:
        assert not np.array_equal(theirs, without)


def test_the_policy_comes_between_jitter_and_rotation(final_config):
    final_config.augment.policy = "cifar10"
    images, where = some_images((32, 32), 200), (0, 0, 200, 200)
    draws = sampling.augment_draws(*where, final_config.augment, (32, 32))
    operations = auto_augment.operations(*where, (32, 32))
    steps = augment_tf.flip_and_crop(tf.constant(images), np.arange(200), draws["flip"], draws["crop"], 4, "black")
    steps = augment_tf.jitter(steps, draws["jitter"], draws["order"])
    for place in range(2):
        steps = augment_tf.operate(steps, operations[:, place])
    steps = augment_tf.rotate(steps, draws["rotation"])
    together = augment_tf.augment(
        tf.constant(images), np.arange(200), draws | {"operations": operations}, final_config.augment
    )
    assert np.array_equal(together, steps)


def test_the_first_draws_are_pinned_and_of_position_alone():
    """If this fails, every run with a policy changes: do not update it without saying so in the release."""
    whole = auto_augment.operations(0, 0, 2500, 1000, (32, 32))
    parts = [auto_augment.operations(0, a, b, 1000, (32, 32)) for a, b in ((0, 1), (1, 990), (990, 2500))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole[2:5, :, :2].tolist() == GOLDEN_OPERATIONS
    assert not np.array_equal(whole, auto_augment.operations(1, 0, 2500, 1000, (32, 32)))


def test_each_operation_comes_as_often_as_the_policy_says():
    n = 100_000
    drawn = auto_augment.operations(0, 0, n, n, (32, 32))
    nothing = auto_augment.operation("rotate", 0, 1, 32, 32)
    for place in range(2):
        wanted = collections.Counter()
        for pair in auto_augment._PAIRS:
            name, probability, magnitude = pair[place]
            wanted[nothing] += (1 - probability) / 25
            for direction in (1, -1):
                wanted[auto_augment.operation(name, magnitude, direction, 32, 32)] += probability / 50
        found = collections.Counter(map(tuple, drawn[:, place].tolist()))
        for operation in wanted | found:
            share = wanted[operation]
            assert abs(found[operation] / n - share) <= 5 * np.sqrt(share * (1 - share) / n), operation
