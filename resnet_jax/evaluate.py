"""Evaluation: every image of a split counts once; and a checkpoint restored to be evaluated."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax import setup, steps, train_state
from resnet_jax.data import datasets, pipelines
from resnet_jax.errors import UserError
from resnet_jax.runs import workdir
from resnet_jax.runs.checkpoints import Checkpoints


def evaluate(
    eval_step: Any,
    state: train_state.TrainState,
    split: datasets.Split,
    batch_size: int,
    mesh: Mesh,
    before_batch: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Evaluate a state on all of a split.

    Args:
        eval_step: from `steps.jit_eval_step`.
        state: reads `params` and `batch_stats`.
        split: the examples.
        batch_size: of the global batch; no larger than the split, and rounded up to a multiple of the number of devices.
        mesh: of `eval_step`.
        before_batch: called before each batch, when the one before is done; what it raises ends the evaluation.

    Returns:
        {"loss": float, "accuracy": float in 0..1, "confusion": int64 [num_classes, num_classes], row the label, "logits":
        float32 [N, num_classes]}.
    """
    batch_size = -(-min(batch_size, len(split.labels)) // mesh.size) * mesh.size
    batches = pipelines.eval_batches(split, batch_size, jax.process_index(), jax.process_count())
    results: list[tuple[steps.EvalMetrics, jax.Array]] = []
    for batch in batches:
        on_devices = steps.shard_batch(batch, mesh)
        jax.block_until_ready(results[-1:])
        before_batch()
        results.append(eval_step(state, on_devices))
    metrics, logits = zip(*jax.device_get(results), strict=True)
    confusion = np.sum([m.confusion.counts for m in metrics], axis=0, dtype=np.int64)
    seen = int(confusion.sum())
    if seen != len(split.labels):
        raise RuntimeError(f"evaluated {seen} images of {len(split.labels)}")
    return {
        "loss": float(np.sum([m.loss.total for m in metrics], dtype=np.float64)) / seen,
        "accuracy": int(np.trace(confusion)) / seen,
        "confusion": confusion,
        "logits": np.concatenate(logits)[:seen],
    }


def restored(config: ConfigDict, directory: Path, which: str) -> tuple[setup.Setup, train_state.TrainState, int]:
    """What a run starts from, the state of one of its checkpoints, and that checkpoint's step.

    Args:
        config: of the run.
        directory: the run's workdir.
        which: "best", "latest" or a step.

    Raises:
        UserError: where there is no such run, checkpoint, or data, or the config is another.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} holds no run: train first, or give the --workdir of a run")
    workdir.check(directory, config)
    with _reading(directory) as checkpoints:
        checkpoints.choose(which)  # in vain, if so, before the data are loaded
    run_setup = setup.setup(config)
    is_of_this_run = partial(setup.check_meta, directory, config, run_setup.dataset)
    with _reading(directory) as checkpoints:  # anew, for a run under way replaces its checkpoints
        step = checkpoints.choose(which)
        state, _ = checkpoints.restore(step, run_setup.state, is_of_this_run)
    return run_setup, state, step


def _reading(directory: Path) -> "closing[Checkpoints]":
    accuracies = workdir.validation_accuracies(directory)
    return closing(Checkpoints(directory / "checkpoints", accuracies, read_only=True))
