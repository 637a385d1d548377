"""Start a run from a trained network: `config.init_from`."""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from resnet_jax import models, train_state
from resnet_jax.data import feed
from resnet_jax.errors import UserError
from resnet_jax.inference import shipped, trained_model
from resnet_jax.runs import processes
from resnet_jax.runs.progress import say
from resnet_jax.setup import Setup
from resnet_jax.train_state import TrainState

_HEAD = "classifier"  # the rest of the network is its backbone
_SHAPES = ("block", "channel_list", "block_list")  # the fields of `config.model` that shape the weights


def initialise(config: ConfigDict, start: Setup) -> tuple[TrainState, dict[str, Any]]:
    """Return the state of step 0 with the weights of `config.init_from`, and where they come from.

    The parameters and the batch statistics of the backbone are taken. The classifier is taken if its class names are those of
    the run, in the same order; otherwise it is new, drawn from the seed. One line says so.

    Args:
        config: of the run.
        start: what the run starts from otherwise.

    Returns:
        The state, and `initial_weights` of `result.json`.

    Raises:
        UserError: if the weights cannot be loaded, or are those of another architecture.
    """
    name, own = config.init_from, start.state.variables
    if jax.process_count() > 1 and shipped.find(name).is_dir():  # Orbax would read it as a checkpoint of all of them
        raise UserError(
            f"config.init_from: several processes cannot load {name}: export it as a .safetensors, and give that"
        )
    try:
        model = trained_model.load(name)
        weights = model.variables
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    same_shapes = _shapes(weights) == _shapes(own)
    theirs = ", ".join(
        f"config.model.{field} {value!r}"
        for field in (*models.COMPUTATION_FIELDS, *(() if same_shapes else _SHAPES))
        if (value := model.config.model[field]) != config.model[field]
    )
    if theirs or not same_shapes:
        raise UserError(f"config.init_from: {name} is another network, with {theirs}: set that, or give other weights")
    same_classes = model.class_names == start.dataset.class_names
    origin = {
        "origin": name,
        "checkpoint_step": model.step,
        "sha256": train_state.digest(weights),
        _HEAD: "taken" if same_classes else "new",
    }
    processes.check_agreement("config.init_from", origin["sha256"])
    head = weights["params"] if same_classes else start.state.params
    taken = weights | {"params": weights["params"] | {_HEAD: head[_HEAD]}}
    arrays = jax.tree.map(lambda ours, new: np.asarray(new).astype(ours.dtype), own, taken)
    of = f"of {name}, step {model.step}"
    said = f"backbone and classifier {of}: it has the same class names"
    if not same_classes:
        said = f"backbone {of}; the classifier is new: its class names differ"
    say(said, quiet=jax.process_index() > 0)
    return start.state.with_variables(feed.put(arrays, start.mesh, PartitionSpec())), origin


def _shapes(variables: Any) -> Any:
    """Return the shapes of the arrays of a backbone."""
    params = {name: layer for name, layer in variables["params"].items() if name != _HEAD}
    return jax.tree.map(np.shape, {"params": params, "batch_stats": variables["batch_stats"]})
