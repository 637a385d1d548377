"""Diagnostics for a rejected step, from which it can be examined and repeated."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax import steps
from resnet_jax.train_state import TrainState


def diagnose_step(config: ConfigDict, state: TrainState, batch: steps.Batch) -> dict[str, Any]:
    """Loss, gradient and layer norms of the step that takes `batch` from `state`.

    Args:
        config: of the run.
        state: before the step.
        batch: of the step, on the devices of the state.

    Returns:
        {"loss", "grad_norm", "layers": {name: {"param_norm", "grad_norm", "non_finite_grads"}}}. A number that is not finite
        is text, because JSON has none.
    """
    loss_and_gradient = jax.jit(partial(steps.loss_and_gradient, config=config))
    (loss, _), grads = loss_and_gradient(state, batch)
    layers = {}
    for (path, param), grad in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(grads), strict=True
    ):
        layers["/".join(key.key for key in path)] = {
            "param_norm": _number(np.linalg.norm(np.asarray(param, np.float64))),
            "grad_norm": _number(np.linalg.norm(np.asarray(grad, np.float64))),
            "non_finite_grads": int(np.sum(~np.isfinite(np.asarray(grad, np.float64)))),
        }
    return {"loss": _number(loss), "grad_norm": _number(optax.tree.norm(grads)), "layers": layers}


def as_line(diagnosis: Mapping[str, Any], limit: float, path: Path) -> str:
    """What to say of a rejected step.

    Args:
        diagnosis: of the step, as in `failed_step.json`.
        limit: `config.abort_grad_norm`.
        path: of `failed_step.json`.
    """
    step, checkpoint = diagnosis["step"], diagnosis["checkpoint_step"]
    return (
        f"step {step} has loss {diagnosis['loss']} and gradient norm {diagnosis['grad_norm']}"
        + (f" (config.abort_grad_norm allows {limit:g})" if limit else "")
        + f", see {path}; "
        + (
            "there is no checkpoint before it"
            if checkpoint is None
            else f"the state before it is checkpoint {checkpoint}"
        )
        + ": lower config.optim.learning_rate, set config.optim.max_grad_norm, or look at the images"
    )


def _number(value: Any) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
