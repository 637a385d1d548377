"""Analysis of a trained network: its stages and their activations, its confusion matrix and most confident mistakes.

`summarise` combines the analysis with the files of the run into one JSON object. `report.py` draws from that alone, without the
data and the checkpoint, so summaries of runs can be kept in `results/`.
"""

import base64
import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from resnet_jax import models, steps
from resnet_jax.data import datasets, images, pipelines
from resnet_jax.errors import UserError
from resnet_jax.inference.restore import restore_run
from resnet_jax.kernels import layers
from resnet_jax.runs import metrics_log, stored_config
from resnet_jax.runs.result import RunResult
from resnet_jax.train_state import TrainState

_MISTAKES = 16
_ZERO = 1e-6  # GELU approaches 0 without reaching it


def summarise(directory: Path) -> dict[str, Any]:
    """The summary of a run: `result.json`, the rows of `metrics.jsonl` and the analysis of its network.

    Raises:
        UserError: if the run is not complete, or its data or checkpoint cannot be loaded.
    """
    result = RunResult.read(directory, "give another run")
    if result.test_accuracy is None:
        raise UserError(
            f"{directory} is a trial of a search, which was not tested: train its config as a run of its own"
        )
    config = stored_config.from_json(result.config)
    setup, state, _ = restore_run(config, directory, "best")
    return dataclasses.asdict(result) | {
        "metrics": metrics_log.metrics_rows(directory),
        "analysis": analyse(config, state, setup.dataset),
    }


def analyse(config: ConfigDict, state: TrainState, dataset: datasets.Dataset) -> dict[str, Any]:
    """Analyse a network on the test split.

    Returns:
        {"stages": one entry per stage, as `_stages` returns them,
        "class_names": the names of the classes,
        "confusion": [num_classes][num_classes] counts, row the label,
        "mistakes": up to 16, the most confident first: {"index" in the split, "label", "prediction", "probability", "png"}}.
    """
    split = dataset.test
    activation_sums = jax.jit(partial(_activation_sums, config=config))
    logits, activations = [], []
    for batch in pipelines.eval_batches(split, min(config.eval_batch_size, len(split.labels))):
        batch_logits, batch_activations = jax.device_get(activation_sums(state, batch))
        logits.append(batch_logits[batch["mask"]])
        activations.append(batch_activations)
    probabilities = np.asarray(jax.nn.softmax(np.concatenate(logits)), np.float64)
    predictions = probabilities.argmax(axis=1)
    names = dataset.class_names
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (split.labels, predictions), 1)
    shape = split.images.shape[1:]
    return {
        "stages": _stages(config, state, shape, len(names), _merged(activations)),
        "class_names": list(names),
        "confusion": confusion.tolist(),
        "mistakes": _mistakes(split, predictions, probabilities.max(axis=1)),
    }


def _ends_in_activation(module: nn.Module, method: str) -> bool:
    """Whether a module's output is, or feeds, an activation: a block, its inner batch norms, and that of the stem or of a max-pool."""
    if method != "__call__":
        return False
    if isinstance(module, models.BottleneckBlock | models.BasicBlock):
        return True
    inner = ("norm1", "norm2") if isinstance(module.parent, models.BottleneckBlock) else ("norm1",)
    return module.name in ("stem_norm", *inner) or bool(re.fullmatch(r"stage\d+_norm", module.name or ""))


def _activations(
    network: Any, activation: str, variables: Mapping[str, Any], images: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, and what every activation gives [B, H, W, C], by a name such as "stage1_block2/norm1", in eval mode."""
    logits, captured = network(
        variables, images, train=False, capture_intermediates=_ends_in_activation, mutable=["intermediates"]
    )

    def activated(module: str, output: Any) -> jax.Array:
        """A block's output, or the activation of a batch norm's."""
        return models.ACTIVATIONS[activation](layers.value(output)) if "norm" in module else output

    flat = traverse_util.flatten_dict(captured["intermediates"])
    return logits, {"/".join(path[:-1]): activated(path[-2], value[0]) for path, value in flat.items()}


def _activation_sums(
    state: TrainState, batch: steps.Batch, *, config: ConfigDict
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Logits of a batch, and sums over the examples that `mask` keeps, for each activation."""
    variables = state.variables
    images = steps.normalize(batch["images"], config.data)
    logits, activations = _activations(state.apply_fn, config.model.activation, variables, images)
    mask = batch["mask"].astype(jnp.float32)[:, None, None, None]

    def sums(value: jax.Array) -> dict[str, jax.Array]:
        value = value.astype(jnp.float32) * mask
        return {
            "squares": jnp.sum(value**2),
            "nonzero": jnp.sum(jnp.abs(value) > _ZERO, axis=(0, 1, 2)),  # of each channel
            "count": jnp.sum(mask) * value[0].size,
        }

    return logits, {name: sums(value) for name, value in activations.items()}


def _merged(batches: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The sums over all batches."""
    return {
        name: {key: sum(np.asarray(batch[name][key], np.float64) for batch in batches) for key in sums}
        for name, sums in batches[0].items()
    }


def _stages(
    config: ConfigDict,
    state: TrainState,
    shape: tuple[int, ...],
    num_classes: int,
    activations: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The stages in order, including stem and classifier.

    Returns:
        {"name", "blocks", "shape": [H, W, C] of the output, or [C], "num_params"} per stage. A stage with activations also has
        "rms": the root mean square of its last activation's output, "zeros": the share of all outputs of activations that are
        within `_ZERO` of 0, and "dead": the share of channels that are so everywhere on every image.
    """
    variables = state.variables
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    _, outputs = jax.eval_shape(partial(_activations, state.apply_fn, config.model.activation), variables, image)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    stages = []
    out_shape = [*shape]
    for name, blocks in [
        ("stem", None),
        *((f"stage{i}", blocks) for i, blocks in enumerate(config.model.block_list, start=1)),
        ("classifier", None),
    ]:
        in_stage = [output for output in outputs if output.startswith(f"{name}_")]
        stage = {
            "name": name,
            "blocks": blocks,
            "num_params": sum(size for module, size in sizes.items() if re.match(rf"{name}(_|$)", module)),
        }
        if in_stage:
            last = max(in_stage, key=lambda output: (_block(output), "/" not in output))
            out_shape = list(outputs[last].shape[1:])
            # here a max-pool follows, and no block
            if last == f"{name}_norm" and name != "stem" and config.model.downsample == "pool":
                out_shape = [out_shape[0] // 2, out_shape[1] // 2, out_shape[2]]
            sums = [activations[output] for output in in_stage]
            nonzero = np.concatenate([of_activation["nonzero"] for of_activation in sums])
            stage |= {
                "rms": float(np.sqrt(activations[last]["squares"] / activations[last]["count"])),
                "zeros": float(1 - nonzero.sum() / sum(of_activation["count"] for of_activation in sums)),
                "dead": float(np.mean(nonzero == 0)),
            }
        stages.append(stage | {"shape": [num_classes] if name == "classifier" else out_shape})
    return stages


def _block(output: str) -> int:
    """The number of the block that an output belongs to; 0 for the stem."""
    match = re.search(r"block(\d+)", output)
    return int(match[1]) if match else 0


def _mistakes(split: datasets.Split, predictions: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(predictions != split.labels)
    return [
        {
            "index": int(i),
            "label": int(split.labels[i]),
            "prediction": int(predictions[i]),
            "probability": float(probabilities[i]),
            "png": base64.b64encode(images.png(split.images[i])).decode(),
        }
        for i in wrong[np.argsort(-probabilities[wrong], kind="stable")][:_MISTAKES]
    ]
