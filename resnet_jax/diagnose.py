"""Diagnostics for a rejected step, from which it can be examined and repeated."""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax import steps
from resnet_jax.data import augment_jax, pipelines, sampling
from resnet_jax.setup import Setup
from resnet_jax.train_state import TrainState


def diagnose_step(config: ConfigDict, start: Setup, state: TrainState) -> dict[str, Any]:
    """The content of `failed_step.json`: the examples, loss, gradient and layer norms of the step after a state.

    The state and the config determine all of it, so a run resumed from this state comes to the same step.

    Args:
        config: of the run.
        start: of the run.
        state: before the step.

    Returns: {"step", "epoch", "checkpoint_step", "loss", "grad_norm", "examples": positions in
        the source's training split, in the batch's order, "labels", "layers": {name: {"param_norm", "grad_norm",
        "non_finite_grads"}}}. A number that is not finite is text, because JSON has none.
    """
    step = int(state.step)
    here = jax.process_index(), jax.process_count()
    draws = {name: own[0] for name, own in pipelines.train_draws(start.train, config, step, 1, *here).items()}
    data = {name: array[draws["indices"]] for name, array in start.train._asdict().items()}  # the rest may not fit
    draws["indices"] = np.arange(len(data["labels"]))
    batch = jax.jit(partial(augment_jax.build_batch, config=config.augment))(data, draws)
    loss_and_gradient = jax.jit(partial(steps.loss_and_gradient, config=config))
    (loss, _), grads = loss_and_gradient(state, steps.shard_batch(jax.device_get(batch), start.mesh))

    (chosen,) = pipelines.train_draws(start.train, config, step, 1)["indices"]
    labels = start.dataset.train.labels
    train, _ = sampling.stratified_split(labels, config.data.validation_ratio, config.data.split_seed)
    layers = {}
    for (path, param), grad in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(grads), strict=True
    ):
        layers["/".join(key.key for key in path)] = {
            "param_norm": _number(np.linalg.norm(np.asarray(param, np.float64))),
            "grad_norm": _number(np.linalg.norm(np.asarray(grad, np.float64))),
            "non_finite_grads": int(np.sum(~np.isfinite(np.asarray(grad, np.float64)))),
        }
    return {
        "step": step + 1,
        "epoch": (step + 1) / start.steps_per_epoch,
        "checkpoint_step": step,
        "loss": _number(loss),
        "grad_norm": _number(optax.tree.norm(grads)),
        "examples": train[chosen].tolist(),
        "labels": labels[train[chosen]].tolist(),
        "layers": layers,
    }


def _number(value: Any) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
