"""The report's augmentation in TensorFlow, batched: flip, crop, colour jitter, rotation.

Given the same draws, each transform gives the very pixels that torchvision gives for Pillow images. All arithmetic is
exact (integers, or floats that hold the result without rounding), so the result does not depend on the order of
operations, the batch's size or the machine. Images stay uint8; the step normalises them on the device.
"""

import tensorflow as tf
from ml_collections import ConfigDict


def augment(images: tf.Tensor, indices: tf.Tensor, draws: dict[str, tf.Tensor], config: ConfigDict) -> tf.Tensor:
    """Apply the augmentations that `config.augment` switches on, in the report's order (section 2c).

    Args:
        images: uint8 [N, H, W, 3], the whole training set.
        indices: int64 [B], the examples to take.
        draws: the fields of `sampling.Draws` for the B examples.
        config: `config.augment`.

    Returns:
        uint8 [B, H, W, 3].
    """
    if config.flip_probability > 0 or config.crop_padding > 0:
        images = flip_and_crop(images, indices, draws["flip"], draws["crop"], config.crop_padding)
    else:
        images = tf.gather(images, indices)
    if config.brightness > 0 or config.contrast > 0 or config.saturation > 0:
        images = jitter(images, draws["jitter"], draws["order"])
    if config.rotation_degrees > 0:
        images = rotate(images, draws["rotation"])
    return images


def flip_and_crop(images: tf.Tensor, indices: tf.Tensor, flip: tf.Tensor, crop: tf.Tensor, padding: int) -> tf.Tensor:
    """Mirror left to right where `flip`, pad with `padding` black pixels, and cut out H x W pixels at `crop`.

    Args:
        images: uint8 [N, H, W, 3].
        indices: int64 [B].
        flip: bool [B].
        crop: int32 [B, 2], row and column of the cut in the padded image.
        padding: pixels on every side.

    Returns:
        uint8 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    y = tf.range(height)[tf.newaxis] + crop[:, :1] - padding  # [B, H]
    x = tf.range(width)[tf.newaxis] + crop[:, 1:] - padding  # [B, W]
    x = tf.where(flip[:, tf.newaxis], width - 1 - x, x)
    return _take_pixels(images, indices, y[:, :, tf.newaxis], x[:, tf.newaxis, :])


def rotate(images: tf.Tensor, rotation: tf.Tensor) -> tf.Tensor:
    """Rotate about the centre, nearest neighbour, black outside: `PIL.Image.rotate`.

    Args:
        images: uint8 [B, H, W, 3].
        rotation: int32 [B, 6], from `sampling.rotation_map`.

    Returns:
        uint8 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    a, b, c, d, e, f = (v[:, tf.newaxis, tf.newaxis] for v in tf.unstack(rotation, axis=1))
    x, y = tf.range(width)[tf.newaxis, tf.newaxis, :], tf.range(height)[tf.newaxis, :, tf.newaxis]
    source_x = tf.bitwise.right_shift(a * x + b * y + c, 16)
    source_y = tf.bitwise.right_shift(d * x + e * y + f, 16)
    return _take_pixels(images, tf.range(tf.shape(images, tf.int64)[0]), source_y, source_x)


def _take_pixels(images: tf.Tensor, indices: tf.Tensor, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """images[indices][:, y, x], and black where (y, x), which broadcast to [B, H, W], lie outside the image."""
    _, height, width, channels = images.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = tf.cast(tf.where(inside, y * width + x, 0), tf.int64) + indices[:, tf.newaxis, tf.newaxis] * height * width
    taken = tf.gather(tf.reshape(images, [-1, channels]), pixel)
    return taken * tf.cast(inside, tf.uint8)[..., tf.newaxis]


def jitter(images: tf.Tensor, factors: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Brightness, contrast and saturation by the given factors, each image in its own order: `PIL.ImageEnhance`.

    Each is x -> floor(base + factor * (x - base)), clamped to 0..255, with base 0 for brightness, the image's mean grey
    for contrast and the pixel's grey for saturation. Factors are multiples of 1/4096 below 2, so float32 is exact.

    Args:
        images: uint8 [B, H, W, 3].
        factors: float32 [B, 3].
        order: int32 [B, 3].

    Returns:
        uint8 [B, H, W, 3].
    """
    pixels = tf.cast(images, tf.float32)
    for kind in tf.unstack(order, axis=1):
        kind = kind[:, tf.newaxis, tf.newaxis]
        factor = tf.gather(factors, kind[:, :, 0], batch_dims=1)[:, :, tf.newaxis, tf.newaxis]
        grey = _grey(pixels)
        base = tf.where(kind == 2, grey, tf.where(kind == 1, _mean(grey), 0.0))[..., tf.newaxis]
        pixels = tf.clip_by_value(tf.floor(base + factor * (pixels - base)), 0.0, 255.0)
    return tf.cast(pixels, tf.uint8)


def _grey(pixels: tf.Tensor) -> tf.Tensor:
    """Pillow's conversion to "L": float32 [B, H, W, 3] whole numbers -> [B, H, W]."""
    weights = tf.constant([19595.0, 38470.0, 7471.0])  # ITU-R 601-2 luma, times 65536
    total = tf.linalg.matvec(pixels, weights)
    return tf.floor((total + 32768.0) * 2.0**-16)


def _mean(grey: tf.Tensor) -> tf.Tensor:
    """The mean of each image, rounded half up: [B, H, W] -> [B, 1, 1]."""
    count = grey.shape[1] * grey.shape[2]
    total = tf.reduce_sum(tf.cast(grey, tf.int32), axis=(1, 2), keepdims=True)
    return tf.cast((2 * total + count) // (2 * count), tf.float32)
