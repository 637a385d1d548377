"""From arrays in memory to batches: the training stream, which starts at any step, and padded evaluation batches.

The training stream is a tf.data pipeline over the draws of `sampling.py`; TensorFlow is imported when it is built.
Batches are host arrays; `images` are uint8 and the step normalises them.
"""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from resnet_jax import sampling
from resnet_jax.datasets import Split

Batch = dict[str, np.ndarray]


def process_slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The part [first, last) of the global batch that a process feeds; `batch_size` is a multiple of the count."""
    size = batch_size // process_count
    return process_index * size, (process_index + 1) * size


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
        config: reads `seed`, `batch_size` and `augment`.
        start_step: first step to give.
        stop_step: last step to give + 1.
        process_index: which slice of each batch to build.
        process_count: how many slices there are.

    Returns:
        An iterator over {"images": uint8 [B, H, W, 3], "labels": int32 [B]} with B = batch_size / process_count.
    """
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    from resnet_jax import augment_tf

    images = tf.constant(split.images)
    num_examples, height, width, _ = split.images.shape
    first, last = process_slice(config.batch_size, process_index, process_count)

    def draw_steps() -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        for step in range(start_step, stop_step):
            where = (config.seed, step * config.batch_size + first, step * config.batch_size + last, num_examples)
            chosen = sampling.indices(*where)
            draws = sampling.draws(*where, config.augment, (height, width))
            yield chosen, split.labels[chosen], draws._asdict()

    @tf.function(jit_compile=True, autograph=False)  # XLA fuses it, and the arithmetic is exact either way
    def build(chosen: tf.Tensor, labels: tf.Tensor, draws: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"images": augment_tf.augment(images, chosen, draws, config.augment), "labels": labels}

    size = last - first
    signature = (
        tf.TensorSpec([size], tf.int64),
        tf.TensorSpec([size], tf.int32),
        {
            "flip": tf.TensorSpec([size], tf.bool),
            "crop": tf.TensorSpec([size, 2], tf.int32),
            "jitter": tf.TensorSpec([size, 3], tf.float32),
            "order": tf.TensorSpec([size, 3], tf.int32),
            "rotation": tf.TensorSpec([size, 6], tf.int32),
        },
    )
    stream = tf.data.Dataset.from_generator(draw_steps, output_signature=signature)
    stream = stream.map(build, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)
    return stream.as_numpy_iterator()


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
