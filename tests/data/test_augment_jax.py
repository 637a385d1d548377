"""Against `augment_tf`, which `test_augment_tf.py` compares with Pillow: all is equal to the bit, whatever XLA does."""

import functools

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance

from resnet_jax.data import augment_jax, augment_tf, sampling
from resnet_jax.data.sampling import JITTER_ORDERS

B = 96
SHAPES = [(32, 32), (8, 8), (9, 15), (32, 20), (1, 1)]


def some_images(shape, count=B):
    """Noise, flat colours, gradients and dark or bright images: uint8 [count, *shape, 3]."""
    rng = np.random.default_rng(0)
    scale = rng.choice([0.0, 0.05, 0.3, 1.0], (count, 1, 1, 1))
    shift = rng.integers(0, 256, (count, 1, 1, 3))
    ramp = np.linspace(-60, 60, shape[1]).reshape(1, 1, -1, 1) * rng.choice([-1, 0, 1], (count, 1, 1, 1))
    noise = rng.integers(0, 256, (count, *shape, 3))
    return np.clip(scale * noise + (1 - scale) * shift + ramp, 0, 255).astype(np.uint8)


def draws_for(config, shape, start=0):
    return sampling.augment_draws(0, start, start + B, 1000, config.augment, shape)


def assert_same(ours, theirs):
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("padding", "fill"), [(0, "black"), (1, "black"), (4, "black"), (40, "black"), (1, "reflect"), (7, "reflect")]
)
def test_flip_and_crop(final_config, shape, padding, fill):
    padding = min(padding, min(shape) - 1) if fill == "reflect" else padding
    final_config.augment.crop_padding = padding
    images, draws, indices = some_images(shape), draws_for(final_config, shape), np.arange(B)[::-1].copy()
    jitted = jax.jit(augment_jax.flip_and_crop, static_argnums=(4, 5))
    ours = jitted(images, indices.astype(np.int32), draws["flip"], draws["crop"], padding, fill)
    assert_same(
        ours, augment_tf.flip_and_crop(tf.constant(images), indices, draws["flip"], draws["crop"], padding, fill)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_resized_crop(shape):
    images, crops = some_images(shape), sampling.resized_crops(0, 0, B, 1000, 0.08, shape)
    flip = np.arange(B) % 3 == 0
    ours = jax.jit(augment_jax.resized_crop)(images, flip, crops)
    assert_same(ours, augment_tf.resized_crop(tf.constant(images), flip, crops))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [1, 5, 8])
def test_cutout(shape, side):
    images, centres = some_images(shape), sampling.cutout_centres(0, 0, B, 1000, shape)
    ours = jax.jit(augment_jax.cutout, static_argnums=2)(images, centres, side)
    assert_same(ours, augment_tf.cutout(tf.constant(images), centres, side))


@pytest.mark.parametrize("shape", SHAPES)
def test_rotate(shape):
    degrees = np.concatenate([np.random.default_rng(1).uniform(-180, 180, B - 4), [0.0, 15.0, -90.0, 45.0]])
    images, rotation = some_images(shape), sampling.rotation_map(degrees, *shape)
    assert_same(jax.jit(augment_jax.rotate)(images, rotation), augment_tf.rotate(tf.constant(images), rotation))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.2, 0.99])
def test_jitter(final_config, shape, strength):
    augment = final_config.augment
    augment.brightness = augment.contrast = augment.saturation = strength
    images, draws = some_images(shape), draws_for(final_config, shape)
    ours = jax.jit(augment_jax.jitter)(images, draws["jitter"], draws["order"])
    assert_same(ours, augment_tf.jitter(tf.constant(images), draws["jitter"], draws["order"]))


@pytest.mark.parametrize("order", JITTER_ORDERS.tolist())
def test_jitter_in_each_order_at_every_value_of_a_pixel(order):
    grid = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    images = np.stack([np.roll(grid, 37 * i, axis=1 + i % 2) for i in range(3 * B)], axis=-1).reshape(B, 16, 16, 3)
    factors = np.random.default_rng(2).integers(0, 8192, (B, 3)).astype(np.float32) / 4096
    orders = np.tile(np.array(order, np.int32), (B, 1))
    ours = jax.jit(augment_jax.jitter)(images, factors, orders)
    assert_same(ours, augment_tf.jitter(tf.constant(images), factors, orders))


def test_the_contrast_of_large_images_is_pillows_in_both():
    """2,100 x 2,100 pixels of 250: twice the sum of their greys is above 2**31."""
    images = np.full((1, 2100, 2100, 3), 250, np.uint8)
    images[:, :2] = 0
    factors, order = np.array([[1, 0.5, 1]], np.float32), np.array([[0, 1, 2]], np.int32)
    theirs = np.asarray(ImageEnhance.Contrast(Image.fromarray(images[0])).enhance(0.5))[None]
    assert np.array_equal(augment_tf.jitter(tf.constant(images), factors, order), theirs)
    assert np.array_equal(jax.jit(augment_jax.jitter)(images, factors, order), theirs)


def test_the_mean_of_the_largest_images_that_are_augmented_is_exact():
    grey = np.full((1, 4096, 4096), 255, np.int32)
    assert np.array_equal(augment_jax._mean(grey), [[[255]]])
    assert np.array_equal(augment_tf._mean(tf.constant(grey)), [[[255]]])


@pytest.mark.parametrize("off", ["nothing", "flip_probability", "crop_padding", "jitter", "rotation_degrees", "all"])
@pytest.mark.parametrize("shape", [(32, 32), (9, 15)])
def test_all_together(final_config, shape, off):
    names = {"nothing": (), "jitter": ("brightness", "contrast", "saturation"), "all": tuple(final_config.augment)}
    for name in names.get(off, (off,)):
        final_config.augment[name] = type(final_config.augment[name])()
    images, draws = some_images(shape, count=1000), draws_for(final_config, shape, start=960)  # into the next epoch
    indices = sampling.indices(0, 960, 960 + B, 1000)
    ours = jax.jit(functools.partial(augment_jax.augment, config=final_config.augment))(
        images, indices.astype(np.int32), draws
    )
    assert_same(ours, augment_tf.augment(tf.constant(images), indices, draws, final_config.augment))
