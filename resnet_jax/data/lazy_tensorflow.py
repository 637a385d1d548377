"""Import TensorFlow only when it is needed, because that takes seconds; hide the GPUs from it and limit its threads."""

from contextlib import suppress
from typing import Any

from resnet_jax.host import usable_cores


def import_tensorflow(num_threads: int) -> Any:
    """Return the module `tensorflow`, limited to `num_threads` threads; 0 means one per core this process may use.

    TensorFlow starts its threads at its first operation. Later calls in the same process do not change their number.
    """
    import tensorflow as tf

    with suppress(RuntimeError):  # raised after TensorFlow's first operation
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(num_threads or usable_cores())
        tf.config.threading.set_inter_op_parallelism_threads(num_threads or usable_cores())
    return tf
