import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from resnet_jax.data import augment_tf, sampling

B = 64
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.fixture(scope="module")
def images():
    """Noise, flat colours, gradients and dark or bright images: uint8 [B, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (B, 32, 32, 3))
    scale = rng.choice([0.0, 0.05, 0.3, 1.0], (B, 1, 1, 1))
    shift = rng.integers(0, 256, (B, 1, 1, 3))
    ramp = np.linspace(-60, 60, 32).reshape(1, 1, 32, 1) * rng.choice([-1, 0, 1], (B, 1, 1, 1))
    return np.clip(scale * noise + (1 - scale) * shift + ramp, 0, 255).astype(np.uint8)


@pytest.fixture
def draws(final_config):
    return sampling.augment_draws(0, 0, B, B, final_config.augment, (32, 32))


def each(images, transform):
    """Apply a Pillow transform to each image."""
    return np.stack([np.asarray(transform(i, Image.fromarray(image))) for i, image in enumerate(images)])


def pillow_flip_and_crop(image, flip, crop, padding, fill="black"):
    image = ImageOps.mirror(image) if flip else image
    if fill == "black":
        image = ImageOps.expand(image, padding)
    else:
        image = Image.fromarray(np.pad(image, ((padding,) * 2, (padding,) * 2, (0, 0)), fill))
    top, left = map(int, crop)
    return image.crop((left, top, left + 32, top + 32))


def pillow_jitter(image, factors, order):
    for kind in order:
        image = ENHANCERS[kind](image).enhance(float(factors[kind]))
    return image


@pytest.mark.parametrize(
    ("padding", "fill"), [(0, "black"), (1, "black"), (4, "black"), (1, "reflect"), (4, "reflect"), (31, "reflect")]
)
def test_flip_and_crop_equal_pillow_and_numpy(images, final_config, padding, fill):
    final_config.augment.crop_padding = padding
    draws = sampling.augment_draws(0, 0, B, B, final_config.augment, (32, 32))
    indices, crop = np.arange(B)[::-1].copy(), draws["crop"]
    ours = augment_tf.flip_and_crop(tf.constant(images), tf.constant(indices), draws["flip"], crop, padding, fill)
    theirs = each(
        images[indices], lambda i, image: pillow_flip_and_crop(image, draws["flip"][i], crop[i], padding, fill)
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(32, 32), (7, 13), (1, 5), (224, 160)])
def test_a_resized_crop_equals_pillow(shape):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (B, *shape, 3), dtype=np.uint8)
    crops = sampling.resized_crops(0, 0, B, B, 0.08, shape)
    flip = np.arange(B) % 3 == 0
    ours = augment_tf.resized_crop(tf.constant(images), flip, crops)
    for image, mirrored, crop, own in zip(images, flip, crops, ours.numpy(), strict=True):
        (top, height), (left, width) = (extent(axis) for axis in np.split(crop, [shape[0]]))
        box = left, top, left + width, top + height
        theirs = Image.fromarray(image).crop(box).resize(shape[::-1], Image.Resampling.BILINEAR)
        assert np.array_equal(own, ImageOps.mirror(theirs) if mirrored else theirs)


def extent(places):
    """The first pixel of a crop and how many it has, along an axis, from where the pixels of the scaled crop lie."""
    before, weight = places.T.tolist()
    return before[0], before[-1] + (weight[-1] > 0) + 1 - before[0]


@pytest.mark.parametrize("side", [2, 7, 16, 32])
def test_cutout_is_that_of_the_papers_code(images, side):
    centres = sampling.cutout_centres(0, 0, B, B, (32, 32))
    ours = augment_tf.cutout(tf.constant(images), centres, side)
    theirs = images.copy()
    for image, (y, x) in zip(theirs, centres - side // 2, strict=True):
        image[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)] = 0
    assert np.array_equal(ours, theirs)


def test_cutout_comes_last(images, final_config):
    augment = final_config.augment
    draws = sampling.augment_draws(0, 0, B, B, augment, (32, 32))
    before = augment_tf.augment(tf.constant(images), tf.range(B), draws, augment)
    augment.cutout, draws["cutout"] = 9, sampling.cutout_centres(0, 0, B, B, (32, 32))
    ours = augment_tf.augment(tf.constant(images), tf.range(B), draws, augment)
    assert np.array_equal(ours, augment_tf.cutout(before, draws["cutout"], 9))


def test_jitter_equals_pillow(images, draws):
    ours = augment_tf.jitter(tf.constant(images), draws["jitter"], draws["order"])
    theirs = each(images, lambda i, image: pillow_jitter(image, draws["jitter"][i], draws["order"][i]))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.0, 0.800048828125, 1.0, 1.199951171875, 1.999755859375])
def test_each_jitter_alone_equals_pillow(images, kind, factor):
    factors = np.ones((B, 3), np.float32)
    factors[:, kind] = factor
    order = np.tile(np.array([[0, 1, 2]], np.int32), (B, 1))
    ours = augment_tf.jitter(tf.constant(images), factors, order)
    theirs = each(images, lambda i, image: pillow_jitter(image, factors[i], order[i]))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(32, 32), (32, 20), (9, 15)])
def test_rotation_equals_pillow(images, shape):
    height, width = shape
    images = images[:, :height, :width]
    degrees = np.concatenate([np.random.default_rng(1).uniform(-180, 180, B - 4), [0.0, 15.0, -15.0, 45.0]])
    ours = augment_tf.rotate(tf.constant(images), sampling.rotation_map(degrees, height, width))
    theirs = each(images, lambda i, image: image.rotate(degrees[i]))
    assert np.array_equal(ours, theirs)


def test_all_together_equal_pillow_in_the_reports_order(images, draws, final_config):
    degrees = np.degrees(np.arctan2(-draws["rotation"][:, 1], draws["rotation"][:, 0]))
    ours = augment_tf.augment(tf.constant(images), tf.range(B, dtype=tf.int64), draws, final_config.augment)

    def theirs(i, image):
        image = pillow_flip_and_crop(image, draws["flip"][i], draws["crop"][i], 4)
        return pillow_jitter(image, draws["jitter"][i], draws["order"][i]).rotate(degrees[i])

    same = np.all(ours == each(images, theirs), axis=-1)
    assert same.mean() > 0.999  # all but where the angle, read back from 16 bits, rounds to another pixel


@pytest.mark.parametrize("off", ["flip_probability", "crop_padding", "jitter", "rotation_degrees"])
def test_each_augmentation_can_be_switched_off(images, final_config, off):
    augment = final_config.augment
    everything = sampling.augment_draws(0, 0, B, B, augment, (32, 32))
    for name in ("brightness", "contrast", "saturation") if off == "jitter" else (off,):
        augment[name] = type(augment[name])()
    draws = sampling.augment_draws(0, 0, B, B, augment, (32, 32))
    ours = augment_tf.augment(tf.constant(images), tf.range(B, dtype=tf.int64), draws, augment)
    step = images
    if off == "flip_probability":
        everything["flip"] = np.zeros(B, bool)
    if off == "crop_padding":
        step = np.where(everything["flip"].reshape(B, 1, 1, 1), step[:, :, ::-1], step)
    else:
        step = each(step, lambda i, image: pillow_flip_and_crop(image, everything["flip"][i], everything["crop"][i], 4))
    if off != "jitter":
        step = augment_tf.jitter(tf.constant(step), everything["jitter"], everything["order"])
    if off != "rotation_degrees":
        step = augment_tf.rotate(tf.constant(step), everything["rotation"])
    assert np.array_equal(ours, step)


def test_everything_off_gives_the_images(images, final_config):
    for name in final_config.augment:
        final_config.augment[name] = type(final_config.augment[name])()
    draws = sampling.augment_draws(0, 0, B, B, final_config.augment, (32, 32))
    indices = np.arange(B)[::-1].copy()
    ours = augment_tf.augment(tf.constant(images), tf.constant(indices), draws, final_config.augment)
    assert np.array_equal(ours, images[indices])
