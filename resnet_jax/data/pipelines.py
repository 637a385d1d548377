"""From arrays in memory to batches: the training stream, which starts at any step, and padded evaluation batches.

There are two training pipelines, and both apply the draws of `sampling.py`, so they give the same batches: `tf_data` streams
them from the host (`train_batches`; TensorFlow is imported when its first is asked for), and `device` keeps the examples in
the devices' memory and is sent which to take and how to augment them (`train_draws`). Images are uint8; the step
normalises them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.data import auto_augment, sampling
from resnet_jax.data.datasets import Split
from resnet_jax.data.lazy_tensorflow import import_tensorflow
from resnet_jax.errors import UserError
from resnet_jax.host import usable_cores

Batch = dict[str, np.ndarray]


def process_slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The part [first, last) of the global batch that a process feeds; `batch_size` is a multiple of the count."""
    size = batch_size // process_count
    return process_index * size, (process_index + 1) * size


def train_draws(
    split: Split, config: ConfigDict, start_step: int, count: int, process_index: int = 0, process_count: int = 1
) -> dict[str, np.ndarray]:
    """Which examples a process takes in steps [start_step, start_step + count), and how they are augmented.

    Args:
        split: the training examples.
        config: reads `seed`, `batch_size` and `augment`.
        start_step: the first step.
        count: how many steps.
        process_index: which slice of each batch to draw.
        process_count: how many slices there are.

    Returns:
        {"indices": int32 [count, B], the fields of `sampling.AugmentParams`, each [count, B, ...], and where the config has a
        policy its "operations", int32 [count, B, 2, 8]} with B = batch_size / process_count.
    """
    num_examples, height, width, _ = split.images.shape
    batch_size = config.batch_size
    where = (config.seed, start_step * batch_size, (start_step + count) * batch_size, num_examples)
    first, last = process_slice(batch_size, process_index, process_count)

    draws = sampling.augment_params(*where, config.augment, (height, width))._asdict()
    draws["indices"] = sampling.indices(*where).astype(np.int32)
    if config.augment.policy:
        draws["operations"] = auto_augment.operations(*where, (height, width))
    return {name: drawn.reshape(count, batch_size, *drawn.shape[1:])[:, first:last] for name, drawn in draws.items()}


def check_fits(split: Split, mesh: Mesh) -> None:
    """Refuse examples that do not fit in the memory of each of this process's devices, before anything is copied.

    Raises:
        UserError: with the bytes that are needed and those that are free.
    """
    needed = split.images.nbytes + split.labels.nbytes
    stats = [device.memory_stats() for device in mesh.local_devices]
    if all(stats):
        free = min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    else:
        needed *= len(stats)  # on a CPU, whose devices share the host's memory
        free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"config.pipeline device needs {needed:,} bytes for the training images, and {free:,} are free: set it to "
            "tf_data"
        )


def train_batches(
    split: Split,
    config: ConfigDict,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The augmented batches of steps [start_step, stop_step): the same ones wherever the stream starts.

    Args:
        split: the training examples.
        config: reads `seed`, `batch_size`, `augment` and `data.num_threads`.
        start_step: first step to give.
        stop_step: last step to give + 1.
        process_index: which slice of each batch to build.
        process_count: how many slices there are.

    Yields:
        {"images": uint8 [B, H, W, 3], "labels": int32 [B]} with B = batch_size / process_count.
    """
    tf = import_tensorflow(config.data.num_threads)
    from resnet_jax.data import augment_tf

    images, labels = tf.constant(split.images), tf.constant(split.labels)

    def draw(step: int) -> dict[str, np.ndarray]:
        draws = train_draws(split, config, step, 1, process_index, process_count)
        return {name: drawn[0] for name, drawn in draws.items()}

    @tf.autograph.experimental.do_not_convert
    def build(draws: Any) -> Any:
        augmented = augment_tf.augment(images, draws["indices"], draws, config.augment)
        return {"images": augmented, "labels": tf.gather(labels, draws["indices"])}

    signature = {name: tf.TensorSpec(drawn.shape, drawn.dtype) for name, drawn in draw(start_step).items()}
    stream = tf.data.Dataset.from_generator(lambda: map(draw, range(start_step, stop_step)), output_signature=signature)
    threads = config.data.num_threads or usable_cores()
    stream = stream.map(build, num_parallel_calls=threads, deterministic=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1  # several batches at once, each by one thread
    yield from stream.with_options(options).as_numpy_iterator()


def eval_batches(split: Split, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Every example once, in order, the last batch padded with examples that `mask` leaves out.

    Args:
        split: the examples.
        batch_size: of the global batch.
        process_index: which slice of each batch to give.
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
