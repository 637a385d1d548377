"""Turn images and labels into batches: a training stream that can start at any step, and padded evaluation batches.

There are two training pipelines. Both apply the draws of `sampling.py`, so they give the same batches. `tf_data`
streams batches from the host (`train_batches`, which imports TensorFlow at its first batch). `device` keeps all examples
in the memory of the devices, and the host sends only the draws (`train_draws`). Images are uint8; the step normalises
them.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import kernels
from resnet_jax.data import auto_augment, memory, sampling
from resnet_jax.data.datasets import Split
from resnet_jax.data.lazy_tensorflow import has_tensorflow, import_tensorflow
from resnet_jax.data.on_disk import ImagesOnDisk
from resnet_jax.errors import UserError
from resnet_jax.host import usable_cores

Batch = dict[str, np.ndarray]
# Augmentations with sums and coordinates of 32 bits, and the largest side of their images.
_IN_INT32 = ("brightness", "contrast", "saturation", "policy", "rotation_degrees")
_MAX_SIDE = 4096


def process_slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """Return the part [first, last) of the global batch that a process feeds; `process_count` divides `batch_size`."""
    size = batch_size // process_count
    return process_index * size, (process_index + 1) * size


def train_draws(
    split: Split, config: ConfigDict, start_step: int, count: int, process_index: int = 0, process_count: int = 1
) -> dict[str, np.ndarray]:
    """Draw the examples of a process in steps [start_step, start_step + count), and their augmentation.

    Args:
        split: the training examples.
        config: reads `seed`, `batch_size` and `augment`.
        start_step: the first step.
        count: how many steps.
        process_index: which slice of each batch to draw.
        process_count: how many slices there are.

    Returns:
        "indices": int32 [count, B]; what `sampling.augment_draws` draws, each [count, B, ...]; if the config has a policy,
        "operations": int32 [count, B, 1 to 4, 8]; and if it mixes images, "mix": float32 [count, B, H + W],
        `sampling.mixing_weights` of each example's step; with B = batch_size / process_count.
    """
    num_examples, height, width, _ = split.images.shape
    batch_size = config.batch_size
    where = (config.seed, start_step * batch_size, (start_step + count) * batch_size, num_examples)
    first, last = process_slice(batch_size, process_index, process_count)

    draws = sampling.augment_draws(*where, config.augment, (height, width))
    draws["indices"] = sampling.indices(*where).astype(np.int32)
    if config.augment.policy:
        draws["operations"] = auto_augment.policy_operations(config.augment.policy, *where, (height, width))
    if sampling.mixes(config.augment):
        weights = sampling.mixing_weights(config.seed, start_step, count, config.augment, (height, width))
        draws["mix"] = np.repeat(weights, batch_size, axis=0)
    return {name: drawn.reshape(count, batch_size, *drawn.shape[1:])[:, first:last] for name, drawn in draws.items()}


def batch_shapes(
    split: Split, config: ConfigDict, sharding: NamedSharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the arrays of a global training batch."""
    shapes = {name: (array.shape[1:], array.dtype) for name, array in split._asdict().items()}
    if sampling.mixes(config.augment):
        shapes["mix"] = ((sum(split.images.shape[1:3]),), np.dtype(np.float32))
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def can_read_from_disk(config: ConfigDict) -> bool:
    """Whether a run's pipeline may be the one that reads images from disk."""
    return bool(config.pipeline != "device") and has_tensorflow()


def prefers_devices(split: Split, mesh: Mesh) -> bool:
    """Whether this process would take the device pipeline for these training images.

    It would without TensorFlow, and on accelerators if the images are in memory and need at most half of that of a device.
    """
    needed, free = _bytes_needed_and_free(split, mesh)
    on_disk = isinstance(split.images, ImagesOnDisk)
    return not has_tensorflow() or (not kernels.is_cpu(mesh) and not on_disk and needed <= free / 2)


def without_auto(config: ConfigDict, mesh: Mesh, on_devices: bool) -> ConfigDict:
    """Return a config with what "auto" stands for: bfloat16 on accelerators, float32 on a CPU, and a pipeline.

    Args:
        config: of a run.
        mesh: its devices.
        on_devices: whether to take the device pipeline, which all processes agree on.
    """
    meant = {}
    if config.model.dtype == "auto":
        meant["model.dtype"] = "float32" if kernels.is_cpu(mesh) else "bfloat16"
    if config.pipeline == "auto":
        meant["pipeline"] = "device" if on_devices else "tf_data"
    return config_lib.replaced(config, meant)


def check(config: ConfigDict, split: Split, mesh: Mesh) -> None:
    """Check that a run can train on these images and devices, before anything is written.

    Raises:
        UserError: if the batch is not divisible by the devices, or the images do not fit in their memory, or are too small
            or too large for the augmentation.
    """
    config_lib.check_batch_size(config, mesh.size)
    if config.pipeline == "device":
        check_fits(split, mesh)
    elif not has_tensorflow():
        raise UserError("config.pipeline tf_data needs TensorFlow: pip install 'resnet_jax[tfds]', or set it to device")
    smallest, largest = sorted(split.images.shape[1:3])
    in_int32 = [name for name in _IN_INT32 if config.augment[name]]
    if in_int32 and largest > _MAX_SIDE:
        raise UserError(
            f"the training images have a side of {largest} pixels, and config.augment.{in_int32[0]} takes up to {_MAX_SIDE}: "
            "set config.data.image_size, or switch it off"
        )
    if config.augment.crop_fill == "reflect" and config.augment.crop_padding >= smallest:
        raise UserError(
            f"config.augment.crop_padding {config.augment.crop_padding} is not less than the {smallest} pixels that "
            "config.augment.crop_fill reflect mirrors: reduce it, or set crop_fill to black"
        )
    if config.augment.cutout > smallest:
        raise UserError(
            f"config.augment.cutout {config.augment.cutout} is larger than the images' {smallest} pixels: reduce it"
        )
    if sampling.mixes(config.augment) and config.batch_size == config.accumulation_steps:
        raise UserError(
            f"config.batch_size {config.batch_size} leaves one image in each of config.accumulation_steps "
            f"{config.accumulation_steps} parts, and mixup and CutMix mix two: make it larger"
        )


def check_fits(split: Split, mesh: Mesh) -> None:
    """Check that the examples fit in the memory of each device of this process, before they are copied.

    Raises:
        UserError: if they do not fit; the message gives the needed and the free bytes.
    """
    needed, free = _bytes_needed_and_free(split, mesh)
    if needed > free:
        raise UserError(
            f"config.pipeline device needs {needed:,} bytes for the training images, but {free:,} are free: set it to "
            f"tf_data{'' if has_tensorflow() else ', which needs resnet_jax[tfds]'}"
        )


def _bytes_needed_and_free(split: Split, mesh: Mesh) -> tuple[int, int]:
    """Return the bytes of the examples, and those that each device of this process, or all of a CPU together, have free."""
    needed = split.images.nbytes + split.labels.nbytes
    stats = [device.memory_stats() for device in mesh.local_devices]
    if all(stats):
        return needed, min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return needed * len(stats), memory.free()  # the devices of a CPU share the host's memory


def train_batches(
    split: Split,
    config: ConfigDict,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yield the augmented batches of steps [start_step, stop_step); a batch does not depend on where the stream starts.

    Args:
        split: the training examples.
        config: reads `seed`, `batch_size`, `augment` and `data.num_threads`.
        start_step: first step to yield.
        stop_step: last step to yield + 1.
        process_index: which slice of each batch to build.
        process_count: how many slices there are.

    Yields:
        {"images": uint8 [B, H, W, 3], "labels": int32 [B]}, and "mix": float32 [B, H + W] if the config mixes images,
        with B = batch_size / process_count.
    """
    tf = import_tensorflow(config.data.num_threads)
    from resnet_jax.data import augment_tf

    on_disk = split.images if isinstance(split.images, ImagesOnDisk) else None
    in_memory, labels = tf.constant(split.images) if on_disk is None else None, tf.constant(split.labels)
    unreadable: list[UserError] = []

    def draw(step: int) -> dict[str, np.ndarray]:
        draws = train_draws(split, config, step, 1, process_index, process_count)
        return {name: drawn[0] for name, drawn in draws.items()}

    def draw_all() -> Iterator[dict[str, np.ndarray]]:
        ahead = draw(start_step)
        for step in range(start_step, stop_step):
            draws, ahead = ahead, draw(step + 1)
            if on_disk is not None:
                on_disk.prefetch(ahead["indices"])
                try:
                    draws["images"] = on_disk[draws["indices"]]
                except UserError as error:
                    unreadable.append(error)
                    raise
            yield draws

    @tf.autograph.experimental.do_not_convert
    def build(draws: Any) -> Any:
        images, positions = in_memory, draws["indices"]
        if on_disk is not None:
            images, positions = draws["images"], tf.range(tf.shape(positions)[0])
        augmented = augment_tf.augment(images, positions, draws, config.augment)
        mix = {"mix": draws["mix"]} if "mix" in draws else {}
        return {"images": augmented, "labels": tf.gather(labels, draws["indices"]), **mix}

    signature = {name: tf.TensorSpec(drawn.shape, drawn.dtype) for name, drawn in draw(start_step).items()}
    if on_disk is not None:
        signature["images"] = tf.TensorSpec((*signature["indices"].shape, *on_disk.shape[1:]), tf.uint8)
    stream = tf.data.Dataset.from_generator(draw_all, output_signature=signature)
    threads = config.data.num_threads or usable_cores()
    stream = stream.map(build, num_parallel_calls=threads, deterministic=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1  # several batches at once, each by one thread
    try:
        yield from stream.with_options(options).as_numpy_iterator()
    except tf.errors.OpError:
        if unreadable:
            raise unreadable[0] from None  # in one line, instead of TensorFlow's
        raise


def eval_batches(split: Split, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Yield every example once, in order; the last batch is padded with examples whose `mask` is False.

    Args:
        split: the examples.
        batch_size: size of the global batch.
        process_index: which slice of each batch to yield.
        process_count: how many slices there are.

    Yields:
        {"images": uint8 [B, H, W, 3], "labels": int32 [B], "mask": bool [B]} with B = batch_size / process_count.
    """
    first, last = process_slice(batch_size, process_index, process_count)
    for start in range(0, len(split.labels), batch_size):
        position = np.arange(start + first, start + last)
        chosen = np.minimum(position, len(split.labels) - 1)
        yield {
            "images": split.images[chosen],
            "labels": split.labels[chosen],
            "mask": position < len(split.labels),
        }
