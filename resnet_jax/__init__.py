"""resnet_jax: a small, exact, fast trainer for CIFAR-scale image classifiers in JAX and Flax.

from resnet_jax import load, train
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from resnet_jax.host import __version__

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from resnet_jax.inference.trained_model import Model, load
    from resnet_jax.runs.result import RunResult

__all__ = ["Model", "__version__", "load", "train"]

if sys.argv[:1] == ["-m"]:  # `python -m resnet_jax.MODULE`, and Python looks for the module now
    from resnet_jax.cli.tools import refuse_old_spelling

    refuse_old_spelling()


def train(config: "ConfigDict", workdir: str | os.PathLike[str], max_seconds: float | None = None) -> "RunResult":
    """Train a run, or resume it, and evaluate its best checkpoint on the test split.

    Args:
        config: the config, as a file in `configs/` returns it.
        workdir: folder of the run, created if it does not exist.
        max_seconds: save the state and stop after this time.

    Returns:
        The result, as in `result.json`.

    Raises:
        resnet_jax.errors.UserError: if the config, the data or the folder does not allow the run.
        resnet_jax.runs.preemption.TrainingInterrupted: after a signal or `max_seconds`; the same call resumes the run.
        KeyboardInterrupt: at a second Ctrl-C.
    """
    from resnet_jax import config as config_lib
    from resnet_jax.cli import command_line

    config_lib.validate(config)
    directory = command_line.folder(workdir, "workdir")
    from resnet_jax import training  # only for a valid config, because JAX takes seconds to import
    from resnet_jax.inference.fine_tuning import initialise
    from resnet_jax.runs.preemption import StopRequest

    stop_request = StopRequest(max_seconds, ends_process=False)
    return training.train(config, directory, stop_request=stop_request, initialise=initialise)


def __getattr__(name: str) -> Any:
    """Import `load` and `Model` at their first use: importing JAX takes seconds, and mistakes show at once."""
    if name not in ("Model", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_jax.inference import trained_model

    return getattr(trained_model, name)
