"""Import TensorFlow and its Datasets only when they are needed, because that takes seconds and not everyone has them."""

import importlib.util
from contextlib import suppress
from typing import Any

from resnet_jax.errors import UserError
from resnet_jax.host import usable_cores


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed; it is not imported."""
    try:
        return importlib.util.find_spec("tensorflow") is not None
    except ImportError:
        return False


def import_tfds(name: str) -> Any:
    """Return the module `tensorflow_datasets`, which reads the data set of this name.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import tensorflow_datasets
    except ImportError:
        tensorflow_datasets = None
    if not tensorflow_datasets or not has_tensorflow():
        raise UserError(
            f"config.data.name {name!r} is a set of TensorFlow Datasets, which needs pip install 'resnet_jax[tfds]': install "
            "that, or give digits, npz:FILE or folder:DIR"
        )
    return tensorflow_datasets


def import_tensorflow(num_threads: int) -> Any:
    """Return the module `tensorflow`, without GPUs and limited to `num_threads` threads; 0 means one per core this process may use.

    TensorFlow starts its threads at its first operation. Later calls in the same process do not change their number.
    """
    import tensorflow as tf

    with suppress(RuntimeError):  # raised after TensorFlow's first operation
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(num_threads or usable_cores())
        tf.config.threading.set_inter_op_parallelism_threads(num_threads or usable_cores())
    return tf
