"""The augmentation in JAX, batched and traced into the step: crop, flip, colour jitter, AutoAugment, rotation, Cutout.

Each transform has the same name in `augment_tf.py` and gives the same pixels: all arithmetic is on integers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_jax.data.auto_augment import Kind
from resnet_jax.data.sampling import JITTER_BITS, RESIZE_BITS


def build_batch(
    data: Mapping[str, jax.Array], draws: Mapping[str, jax.Array], config: ConfigDict
) -> dict[str, jax.Array]:
    """Take the examples draws["indices"], int32 [B], from `data` and augment them with the other draws."""
    images = augment(data["images"], draws["indices"], draws, config)
    mix = {"mix": draws["mix"]} if "mix" in draws else {}
    return {"images": images, "labels": data["labels"][draws["indices"]], **mix}


def augment(images: jax.Array, indices: jax.Array, draws: Mapping[str, jax.Array], config: ConfigDict) -> jax.Array:
    """Apply the augmentations that have draws, in the report's order (section 2c).

    A policy is not in the report. It is applied between jitter and rotation, as in the authors' notebook. Cutout
    comes last.

    Args:
        images: uint8 [N, H, W, 3], the whole training set.
        indices: int32 [B], the examples to take.
        draws: of the examples, from `sampling.augment_draws`; with a policy also "operations", int32 [B, 1 to 4, 8].
        config: `config.augment`; static.

    Returns:
        uint8 [B, H, W, 3].
    """
    if "resized_crop" in draws:
        images = resized_crop(images[indices], draws["flip"], draws["resized_crop"])
    elif "crop" in draws:
        images = flip_and_crop(images, indices, draws["flip"], draws["crop"], config.crop_padding, config.crop_fill)
    else:
        images = images[indices]
    if "jitter" in draws:
        images = jitter(images, draws["jitter"], draws["order"])
    if "operations" in draws:
        for operation in jnp.unstack(draws["operations"], axis=1):
            images = operate(images, operation)
    if "rotation" in draws:
        images = rotate(images, draws["rotation"])
    if "cutout" in draws:
        images = cutout(images, draws["cutout"], config.cutout)
    return images


def resized_crop(images: jax.Array, flip: jax.Array, crops: jax.Array) -> jax.Array:
    """Scale a crop of each image to its whole size, bilinearly, and mirror it where `flip`: Pillow's `crop` and `resize`.

    Args:
        images: uint8 [B, H, W, 3].
        flip: bool [B].
        crops: int32 [B, H + W, 2], from `sampling.resized_crops`.

    Returns:
        uint8 [B, H, W, 3].
    """
    height = images.shape[1]
    pixels = images.astype(jnp.int32)
    rows, columns = crops[:, :height], crops[:, height:]
    columns = jnp.where(flip[:, None, None], columns[:, ::-1], columns)
    for axis, places in ((2, columns[:, None, :, None]), (1, rows[:, :, None, None])):
        before, weight = places[..., 0], places[..., 1]
        after = jnp.minimum(before + 1, images.shape[axis] - 1)
        first, second = (
            jnp.take_along_axis(pixels, place, axis, mode="promise_in_bounds") for place in (before, after)
        )
        rounded = first * 2**RESIZE_BITS + (second - first) * weight + 2 ** (RESIZE_BITS - 1)
        pixels = rounded >> RESIZE_BITS
    return pixels.astype(jnp.uint8)


def flip_and_crop(
    images: jax.Array, indices: jax.Array, flip: jax.Array, crop: jax.Array, padding: int, fill: str
) -> jax.Array:
    """Mirror left to right where `flip`, pad with `padding` pixels, and cut out H x W pixels at `crop`.

    Args:
        images: uint8 [N, H, W, 3].
        indices: int32 [B].
        flip: bool [B].
        crop: int32 [B, 2], row and column of the cut in the padded image.
        padding: pixels on every side; less than H and W if they reflect.
        fill: what they hold: "black", or "reflect": the image mirrored at its outermost pixels.

    Returns:
        uint8 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    y = jnp.arange(height)[None] + crop[:, :1] - padding  # [B, H]
    x = jnp.arange(width)[None] + crop[:, 1:] - padding  # [B, W]
    x = jnp.where(flip[:, None], width - 1 - x, x)
    if fill == "reflect":
        y, x = (side - 1 - jnp.abs(side - 1 - jnp.abs(place)) for side, place in ((height, y), (width, x)))
    return _take_pixels(images, indices, y[:, :, None], x[:, None, :])


def rotate(images: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotate about the centre, nearest neighbour, black outside: `PIL.Image.rotate`.

    Args:
        images: uint8 [B, H, W, 3].
        rotation: int32 [B, 6], from `sampling.rotation_map`.

    Returns:
        uint8 [B, H, W, 3].
    """
    size, height, width, _ = images.shape
    a, b, c, d, e, f = (v[:, :, None] for v in jnp.split(rotation, 6, axis=1))
    x, y = jnp.arange(width)[None, None, :], jnp.arange(height)[None, :, None]
    source_x = (a * x + b * y + c) >> 16
    source_y = (d * x + e * y + f) >> 16
    return _take_pixels(images, jnp.arange(size), source_y, source_x)


def cutout(images: jax.Array, centres: jax.Array, side: int) -> jax.Array:
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
    y = jnp.arange(height)[None] - first[:, :1]  # [B, H], from the square's corner
    x = jnp.arange(width)[None] - first[:, 1:]  # [B, W], likewise
    inside = ((y >= 0) & (y < side))[:, :, None] & ((x >= 0) & (x < side))[:, None]
    return jnp.where(inside[..., None], jnp.uint8(0), images)


def _take_pixels(images: jax.Array, indices: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Return images[indices][:, y, x], black outside the image; y and x broadcast to [B, H, W]."""
    _, height, width, _ = images.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = jnp.where(inside, y, 0), jnp.where(inside, x, 0)
    taken = images.at[indices[:, None, None], y, x].get(mode="promise_in_bounds")
    return taken * inside.astype(jnp.uint8)[..., None]


def jitter(images: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
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
    pixels = images.astype(jnp.int32)
    whole = (factors * 2**JITTER_BITS).astype(jnp.int32)
    in_order = jnp.take_along_axis(whole, order, axis=1)
    for i in range(3):
        kind, factor = order[:, i, None, None], in_order[:, i, None, None, None]
        grey = _grey(pixels)
        base = jnp.where(kind == 2, grey, jnp.where(kind == 1, _mean(grey), 0))[..., None]
        pixels = _blend(pixels, base, factor)
    return pixels.astype(jnp.uint8)


def operate(images: jax.Array, operation: jax.Array) -> jax.Array:
    """Apply one AutoAugment operation to each image: `PIL.Image.transform`, `PIL.ImageEnhance` and `PIL.ImageOps`.

    Args:
        images: uint8 [B, H, W, 3].
        operation: int32 [B, 8], as `auto_augment.operation` returns it.

    Returns:
        uint8 [B, H, W, 3].
    """
    pixels = rotate(images, operation[:, 2:]).astype(jnp.int32)
    kind, amount = operation[:, 0, None, None, None], operation[:, 1, None, None, None]
    grey = _grey(pixels)
    bases = {Kind.CONTRAST: _mean(grey)[..., None], Kind.COLOR: grey[..., None], Kind.SHARPNESS: _smooth(pixels)}
    base = jnp.select([kind == k for k in bases], list(bases.values()), 0)
    results = {
        Kind.GEOMETRY: pixels,
        Kind.POSTERIZE: pixels & amount,
        Kind.SOLARIZE: jnp.where(pixels < amount, pixels, 255 - pixels),
        Kind.AUTO_CONTRAST: _auto_contrast(pixels),
        Kind.EQUALIZE: _equalize(pixels),
    }
    blended = _blend(pixels, base, amount)
    return jnp.select([kind == k for k in results], list(results.values()), blended).astype(jnp.uint8)


def _smooth(pixels: jax.Array) -> jax.Array:
    """Pillow's SMOOTH: the rounded mean of 3x3 pixels, the middle one with weight 5; the border is unchanged."""
    _, height, width, _ = pixels.shape
    around = [jnp.roll(pixels, (y, x), axis=(1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    total = sum(around, 4 * pixels)
    y, x = jnp.arange(height)[None, :, None, None], jnp.arange(width)[None, None, :, None]
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inside, (2 * total + 13) // 26, pixels)


def _auto_contrast(pixels: jax.Array) -> jax.Array:
    """Stretch each channel so that its lowest value becomes 0 and its highest 255, rounded down."""
    low, high = pixels.min(axis=(1, 2), keepdims=True), pixels.max(axis=(1, 2), keepdims=True)
    return jnp.where(high > low, 255 * (pixels - low) // jnp.maximum(high - low, 1), pixels)


def _equalize(pixels: jax.Array) -> jax.Array:
    """Equalize the histogram of each channel over 0..255."""
    size, height, width, channels = pixels.shape
    of_channel = jnp.moveaxis(pixels, 3, 1).reshape(size * channels, height * width)
    counts = jnp.zeros((size * channels, 256), jnp.int32)
    counts = counts.at[jnp.arange(size * channels)[:, None], of_channel].add(1, mode="promise_in_bounds")
    of_highest = jnp.sum(of_channel == of_channel.max(axis=1, keepdims=True), axis=1, keepdims=True)
    step = (height * width - of_highest) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    spread = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, spread, jnp.arange(256)[None])
    result = jnp.take_along_axis(table, of_channel, axis=1).reshape(size, channels, height, width)
    return jnp.moveaxis(result, 1, 3)


def _blend(pixels: jax.Array, base: jax.Array, factor: jax.Array) -> jax.Array:
    """floor(base + factor / 2**JITTER_BITS * (pixels - base)), clamped to 0..255: `PIL.Image.blend`."""
    return jnp.clip(base + (factor * (pixels - base) >> JITTER_BITS), 0, 255)


def _grey(pixels: jax.Array) -> jax.Array:
    """Pillow's conversion to "L", ITU-R 601-2 luma: int32 [B, H, W, 3] -> [B, H, W]."""
    red, green, blue = (pixels[..., channel] for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _mean(grey: jax.Array) -> jax.Array:
    """The mean of each image, rounded half up: int32 [B, H, W] -> [B, 1, 1]."""
    count = grey.shape[1] * grey.shape[2]
    mean, rest = jnp.divmod(jnp.sum(grey, axis=(1, 2), keepdims=True, dtype=jnp.uint32), jnp.uint32(count))
    return (mean + (2 * rest >= count)).astype(jnp.int32)
