"""The report's augmentation as a tutorial writes it, to measure `resnet_jax.data.pipelines` against: one image at a time.

The transforms have the strengths of `config.augment` and draw their own random numbers. They are not exact: rotation rounds to the
nearest pixel, and the order of the jitter is fixed.
"""

import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from resnet_jax.data.datasets import Split


def batches(train: Split, batch_size: int, config: ConfigDict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return an endless stream of shuffled, augmented batches.

    Args:
        train: the training examples.
        batch_size: images of a batch.
        config: `config.augment`, with no other augmentation than the report's.

    Returns:
        Pairs of uint8 [B, H, W, 3] and int32 [B].
    """
    height, width, _ = train.images.shape[1:]

    def augment(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if config.flip_probability > 0:
            image = tf.image.random_flip_left_right(image)
        if config.crop_padding > 0:
            image = tf.pad(image, ((config.crop_padding,) * 2, (config.crop_padding,) * 2, (0, 0)))
            image = tf.image.random_crop(image, (height, width, 3))
        image = tf.cast(image, tf.float32) / 255
        if config.brightness > 0:
            image *= tf.random.uniform((), 1 - config.brightness, 1 + config.brightness)
        if config.contrast > 0:
            image = tf.image.random_contrast(image, 1 - config.contrast, 1 + config.contrast)
        if config.saturation > 0:
            image = tf.image.random_saturation(image, 1 - config.saturation, 1 + config.saturation)
        if config.rotation_degrees > 0:
            image = _rotate(image, tf.random.uniform((), -config.rotation_degrees, config.rotation_degrees))
        return tf.cast(tf.clip_by_value(image, 0, 1) * 255, tf.uint8), label

    dataset = tf.data.Dataset.from_tensor_slices((train.images, train.labels))
    dataset = dataset.shuffle(len(train.labels)).repeat().map(augment, tf.data.AUTOTUNE)
    return iter(dataset.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def _rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
    """Rotate about the centre, by the nearest pixel; what comes from outside is black."""
    height, width, _ = image.shape
    angle = degrees * (math.pi / 180)
    cos, sin, x, y = tf.cos(angle), tf.sin(angle), (width - 1) / 2, (height - 1) / 2
    transform = tf.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y, 0.0, 0.0])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=transform[None],
        output_shape=(height, width),
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]
