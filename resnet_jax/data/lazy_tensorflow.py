"""TensorFlow, which takes seconds to import, where it is needed; it sees no GPU and takes no more threads than it is given."""

from contextlib import suppress
from typing import Any

from resnet_jax.host import usable_cores


def import_tensorflow(num_threads: int) -> Any:
    """The module `tensorflow`, its operations run by so many threads; 0 for one for each core this process may use.

    TensorFlow makes its threads when it first computes: what comes later in the same process has those.
    """
    import tensorflow as tf

    with suppress(RuntimeError):  # that it has computed
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(num_threads or usable_cores())
        tf.config.threading.set_inter_op_parallelism_threads(num_threads or usable_cores())
    return tf
