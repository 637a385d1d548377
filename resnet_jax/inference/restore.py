"""Restore a run from one of its checkpoints, with its data."""

from contextlib import closing
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.runs import workdir
from resnet_jax.runs.checkpoints import Checkpoints
from resnet_jax.runs.metrics_log import validations
from resnet_jax.setup import Setup, setup
from resnet_jax.train_state import TrainState


def restore_run(config: ConfigDict, directory: Path, which: str) -> tuple[Setup, TrainState, int]:
    """Return the setup of a run, the state of one of its checkpoints, and that checkpoint's step.

    Args:
        config: the run's config.
        directory: the run's workdir.
        which: "best", "latest" or a step.

    Raises:
        UserError: if the folder holds no such run or checkpoint, the data are missing, or the config differs.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} holds no run: train first, or give the --workdir of a run")
    config = workdir.check(directory, config)
    with _checkpoints(directory) as checkpoints:
        checkpoints.choose(which)  # reports a user error before the data are loaded
    start = setup(config)
    check_meta = partial(workdir.check_meta, directory, config, start.dataset.fingerprint)
    with _checkpoints(directory) as checkpoints:  # again, because a running run replaces its checkpoints
        step = checkpoints.choose(which)
        state, _ = checkpoints.restore(step, start.state, check_meta)
    return start, state, step


def _checkpoints(directory: Path) -> "closing[Checkpoints]":
    return closing(Checkpoints(directory / "checkpoints", validations(directory), read_only=True))
