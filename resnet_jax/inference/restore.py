"""Restore a run from one of its checkpoints, with its data."""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.runs import checkpoints, workdir
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
    config = workdir.with_computed(directory, config)
    checkpoints.read_chosen(directory, which, lambda saved, step: None)  # a user error comes before the data are loaded
    start = setup(config)
    check_meta = partial(workdir.check_meta, directory, config, start.dataset.fingerprint)
    state, step = checkpoints.read_chosen(
        directory, which, lambda saved, step: saved.restore(step, start.state, check_meta)[0]
    )
    return start, state, step
