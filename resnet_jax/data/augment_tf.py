"""The augmentation in TensorFlow, batched: crop, flip, colour jitter, AutoAugment, rotation, Cutout.

With the same draws, each transform gives exactly the pixels of torchvision on Pillow images. All arithmetic is on
integers, so the result does not depend on the order of operations, the batch size or the machine. Images stay
uint8; the step normalises them on the device.

XLA compiles each transform separately. Compiled as one function, they take twice as long, because XLA recomputes pixels
for each use.
"""

import tensorflow as tf
from ml_collections import ConfigDict

from resnet_jax.data.auto_augment import Kind
from resnet_jax.data.sampling import JITTER_BITS, RESIZE_BITS

_compiled = tf.function(jit_compile=True, autograph=False)


def augment(images: tf.Tensor, indices: tf.Tensor, draws: dict[str, tf.Tensor], config: ConfigDict) -> tf.Tensor:
    """Apply the augmentations that have draws, in the report's order (section 2c).

    A policy is not in the report. It is applied between jitter and rotation, as in the authors' notebook. Cutout
    comes last.

    Args:
        images: uint8 [N, H, W, 3], all that `indices` name.
        indices: int32 or int64 [B], the examples to take.
        draws: of the examples, from `sampling.augment_draws`; with a policy also "operations", int32 [B, 1 to 4, 8].
        config: `config.augment`.

    Returns:
        uint8 [B, H, W, 3].
    """
    if "resized_crop" in draws:
        images = resized_crop(tf.gather(images, indices), draws["flip"], draws["resized_crop"])
    elif "crop" in draws:
        images = flip_and_crop(images, indices, draws["flip"], draws["crop"], config.crop_padding, config.crop_fill)
    else:
        images = tf.gather(images, indices)
    if "jitter" in draws:
        images = jitter(images, draws["jitter"], draws["order"])
    if "operations" in draws:
        for operation in tf.unstack(draws["operations"], axis=1):
            images = operate(images, operation)
    if "rotation" in draws:
        images = rotate(images, draws["rotation"])
    if "cutout" in draws:
        images = cutout(images, draws["cutout"], config.cutout)
    return images


@_compiled
def resized_crop(images: tf.Tensor, flip: tf.Tensor, crops: tf.Tensor) -> tf.Tensor:
    """Scale a crop of each image to its whole size, bilinearly, and mirror it where `flip`: Pillow's `crop` and `resize`.

    Args:
        images: uint8 [B, H, W, 3].
        flip: bool [B].
        crops: int32 [B, H + W, 2], from `sampling.resized_crops`.

    Returns:
        uint8 [B, H, W, 3].
    """
    height = images.shape[1]
    pixels = tf.cast(images, tf.int32)
    rows, columns = crops[:, :height], crops[:, height:]
    columns = tf.where(flip[:, tf.newaxis, tf.newaxis], columns[:, ::-1], columns)
    for axis, places in ((2, columns), (1, rows)):
        before, weight = places[..., 0], places[..., 1]
        after = tf.minimum(before + 1, images.shape[axis] - 1)
        first, second = (tf.gather(pixels, place, axis=axis, batch_dims=1) for place in (before, after))
        weight = weight[:, tf.newaxis, :, tf.newaxis] if axis == 2 else weight[:, :, tf.newaxis, tf.newaxis]
        rounded = first * 2**RESIZE_BITS + (second - first) * weight + 2 ** (RESIZE_BITS - 1)
        pixels = tf.bitwise.right_shift(rounded, RESIZE_BITS)
    return tf.cast(pixels, tf.uint8)


@_compiled
def flip_and_crop(
    images: tf.Tensor, indices: tf.Tensor, flip: tf.Tensor, crop: tf.Tensor, padding: int, fill: str
) -> tf.Tensor:
    """Mirror left to right where `flip`, pad with `padding` pixels, and cut out H x W pixels at `crop`.

    Args:
        images: uint8 [N, H, W, 3].
        indices: int32 or int64 [B].
        flip: bool [B].
        crop: int32 [B, 2], row and column of the cut in the padded image.
        padding: pixels on every side; less than H and W if they reflect.
        fill: what they hold: "black", or "reflect": the image mirrored at its outermost pixels.

    Returns:
        uint8 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    y = tf.range(height)[tf.newaxis] + crop[:, :1] - padding  # [B, H]
    x = tf.range(width)[tf.newaxis] + crop[:, 1:] - padding  # [B, W]
    x = tf.where(flip[:, tf.newaxis], width - 1 - x, x)
    if fill == "reflect":
        y, x = (side - 1 - tf.abs(side - 1 - tf.abs(place)) for side, place in ((height, y), (width, x)))
    return _take_pixels(images, indices, y[:, :, tf.newaxis], x[:, tf.newaxis, :])


@_compiled
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
    return _take_pixels(images, tf.range(tf.shape(images)[0]), source_y, source_x)


@_compiled
def cutout(images: tf.Tensor, centres: tf.Tensor, side: int) -> tf.Tensor:
    """Blacken a square of each image; the part of it that is outside the image is lost (arXiv:1708.04552).

    Args:
        images: uint8 [B, H, W, 3].
        centres: int32 [B, 2], row and column of each square's centre.
        side: pixels of the square's side.

    Returns:
        uint8 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    first = centres - side // 2
    y = tf.range(height)[tf.newaxis] - first[:, :1]  # [B, H], from the square's corner
    x = tf.range(width)[tf.newaxis] - first[:, 1:]  # [B, W], likewise
    inside = ((y >= 0) & (y < side))[:, :, tf.newaxis] & ((x >= 0) & (x < side))[:, tf.newaxis]
    return tf.where(inside[..., tf.newaxis], tf.constant(0, tf.uint8), images)


def _take_pixels(images: tf.Tensor, indices: tf.Tensor, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Return images[indices][:, y, x], black outside the image; y and x broadcast to [B, H, W]."""
    _, height, width, channels = images.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    first = tf.cast(indices, tf.int64)[:, tf.newaxis, tf.newaxis] * height * width
    pixel = first + tf.cast(tf.where(inside, y * width + x, 0), tf.int64)
    taken = tf.gather(tf.reshape(images, [-1, channels]), pixel)
    return taken * tf.cast(inside, tf.uint8)[..., tf.newaxis]


@_compiled
def jitter(images: tf.Tensor, factors: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Change brightness, contrast and saturation in each image's own order: `PIL.ImageEnhance`.

    Each computes x -> floor(base + factor * (x - base)), clamped to 0..255. The base is 0 for brightness, the mean grey
    of the image for contrast and the grey of the pixel for saturation.

    Args:
        images: uint8 [B, H, W, 3].
        factors: float32 [B, 3], multiples of 1/4096 below 2.
        order: int32 [B, 3].

    Returns:
        uint8 [B, H, W, 3].
    """
    pixels = tf.cast(images, tf.int32)
    whole = tf.cast(factors * 2**JITTER_BITS, tf.int32)
    in_order = tf.gather(whole, order, batch_dims=1)
    for i in range(3):
        kind, factor = order[:, i, tf.newaxis, tf.newaxis], in_order[:, i, tf.newaxis, tf.newaxis, tf.newaxis]
        grey = _grey(pixels)
        base = tf.where(kind == 2, grey, tf.where(kind == 1, _mean(grey), 0))[..., tf.newaxis]
        pixels = _blend(pixels, base, factor)
    return tf.cast(pixels, tf.uint8)


@_compiled
def operate(images: tf.Tensor, operation: tf.Tensor) -> tf.Tensor:
    """Apply one AutoAugment operation to each image: `PIL.Image.transform`, `PIL.ImageEnhance` and `PIL.ImageOps`.

    Args:
        images: uint8 [B, H, W, 3].
        operation: int32 [B, 8], as `auto_augment.operation` returns it.

    Returns:
        uint8 [B, H, W, 3].
    """
    pixels = tf.cast(rotate(images, operation[:, 2:]), tf.int32)
    kind, amount = (operation[:, i, tf.newaxis, tf.newaxis, tf.newaxis] for i in range(2))
    grey = _grey(pixels)
    base = tf.where(kind == Kind.SHARPNESS, _smooth(pixels), 0)
    base = tf.where(kind == Kind.COLOR, grey[..., tf.newaxis], base)
    base = tf.where(kind == Kind.CONTRAST, _mean(grey)[..., tf.newaxis], base)
    result = _blend(pixels, base, amount)
    for of_kind, operated in (
        (Kind.GEOMETRY, pixels),
        (Kind.POSTERIZE, tf.bitwise.bitwise_and(pixels, amount)),
        (Kind.SOLARIZE, tf.where(pixels < amount, pixels, 255 - pixels)),
        (Kind.AUTO_CONTRAST, _auto_contrast(pixels)),
        (Kind.EQUALIZE, _equalize(pixels)),
    ):
        result = tf.where(kind == of_kind, operated, result)
    return tf.cast(result, tf.uint8)


def _smooth(pixels: tf.Tensor) -> tf.Tensor:
    """Pillow's SMOOTH: the rounded mean of 3x3 pixels, the middle one with weight 5; the border is unchanged."""
    _, height, width, _ = pixels.shape
    around = [tf.roll(pixels, (y, x), axis=(1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    total = tf.add_n([4 * pixels, *around])
    y, x = tf.range(height)[:, tf.newaxis, tf.newaxis], tf.range(width)[:, tf.newaxis]
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return tf.where(inside, (2 * total + 13) // 26, pixels)


def _auto_contrast(pixels: tf.Tensor) -> tf.Tensor:
    """Stretch each channel so that its lowest value becomes 0 and its highest 255, rounded down."""
    low, high = (reduce(pixels, axis=(1, 2), keepdims=True) for reduce in (tf.reduce_min, tf.reduce_max))
    return tf.where(high > low, 255 * (pixels - low) // tf.maximum(high - low, 1), pixels)


def _equalize(pixels: tf.Tensor) -> tf.Tensor:
    """Equalize the histogram of each channel over 0..255."""
    _, height, width, channels = pixels.shape
    of_channel = tf.reshape(tf.transpose(pixels, (0, 3, 1, 2)), [-1, height * width])
    rows = tf.shape(of_channel)[0]
    cells = tf.range(rows)[:, tf.newaxis] * 256 + of_channel
    counts = tf.reshape(tf.math.unsorted_segment_sum(tf.ones_like(cells), cells, rows * 256), [-1, 256])
    highest = tf.reduce_max(of_channel, axis=1, keepdims=True)
    of_highest = tf.reduce_sum(tf.cast(of_channel == highest, tf.int32), axis=1, keepdims=True)
    step = (height * width - of_highest) // 255
    spread = tf.minimum((step // 2 + tf.cumsum(counts, axis=1, exclusive=True)) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, spread, tf.range(256))
    result = tf.reshape(tf.gather(table, of_channel, batch_dims=1), [-1, channels, height, width])
    return tf.transpose(result, (0, 2, 3, 1))


def _blend(pixels: tf.Tensor, base: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """floor(base + factor / 2**JITTER_BITS * (pixels - base)), clamped to 0..255: `PIL.Image.blend`."""
    return tf.clip_by_value(base + tf.bitwise.right_shift(factor * (pixels - base), JITTER_BITS), 0, 255)


def _grey(pixels: tf.Tensor) -> tf.Tensor:
    """Pillow's conversion to "L", ITU-R 601-2 luma: int32 [B, H, W, 3] -> [B, H, W]."""
    red, green, blue = tf.unstack(pixels, axis=-1)
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 32768, 16)


def _mean(grey: tf.Tensor) -> tf.Tensor:
    """The mean of each image, rounded half up: int32 [B, H, W] -> [B, 1, 1]."""
    count = grey.shape[1] * grey.shape[2]
    total = tf.reduce_sum(tf.cast(grey, tf.int64), axis=(1, 2), keepdims=True)
    return tf.cast((2 * total + count) // (2 * count), tf.int32)
