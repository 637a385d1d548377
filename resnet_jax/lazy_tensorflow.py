"""TensorFlow, which takes seconds to import, where it is needed; it sees no GPU and takes no more threads than it is given."""

import os
from contextlib import suppress
from typing import Any


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
