"""A trained network looked at: its stages, the activations in them, its confusions and most confident mistakes.

`summarise` puts it together with what the run left into one JSON object, from which `report.py` draws; it needs no data
and no checkpoint any more, so summaries of runs can be kept in `results/`.
"""

import base64
import io
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
from PIL import Image

from resnet_jax import config as config_lib
from resnet_jax import evaluate, models, steps
from resnet_jax.data import datasets, pipelines
from resnet_jax.errors import UserError
from resnet_jax.runs import files, metrics_log
from resnet_jax.train_state import TrainState

_MISTAKES = 16
RESULT_KEYS = ("config", "dataset", "environment", "num_params", "test_accuracy", "test_loss", "seconds", "steps")
SUMMARY_KEYS = (*RESULT_KEYS, "metrics", "analysis")


def summarise(directory: Path) -> dict[str, Any]:
    """All that a report needs of a run: `result.json`, with the rows of `metrics.jsonl` and the analysis of its network.

    Raises:
        UserError: where the run is not complete, or its data or checkpoint are not to be had.
    """
    if not (directory / "result.json").exists():
        raise UserError(f"{directory} holds no complete run: give one that has a result.json, or go on with it first")
    result = files.read_json(directory / "result.json", RESULT_KEYS)
    config = config_lib.from_json(result["config"])
    setup, state, _ = evaluate.restored(config, directory, "best")
    return result | {
        "metrics": metrics_log.metrics_rows(directory),
        "analysis": analyse(config, state, setup.dataset),
    }


def analyse(config: ConfigDict, state: TrainState, dataset: datasets.Dataset) -> dict[str, Any]:
    """Look at a network with the test split.

    Returns:
        {"stages": one a stage, as `_stages` gives it,
        "class_names": of the data,
        "confusion": [num_classes][num_classes] counts, row the label,
        "mistakes": the most confident ones first, {"index" in the split, "label", "prediction", "probability", "png"}}.
    """
    split = dataset.test
    look = jax.jit(partial(_look, config=config))
    logits, relus = [], []
    for batch in pipelines.eval_batches(split, min(config.eval_batch_size, len(split.labels))):
        of_batch, of_relus = jax.device_get(look(state, batch))
        logits.append(of_batch[batch["mask"]])
        relus.append(of_relus)
    probabilities = np.asarray(jax.nn.softmax(np.concatenate(logits)), np.float64)
    predictions = probabilities.argmax(axis=1)
    names = dataset.class_names
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (split.labels, predictions), 1)
    shape = split.images.shape[1:]
    return {
        "stages": _stages(config, state, shape, len(names), _merged(relus)),
        "class_names": list(names),
        "confusion": confusion.tolist(),
        "mistakes": _mistakes(split, predictions, probabilities.max(axis=1)),
    }


def _ends_in_relu(module: nn.Module, method: str) -> bool:
    """Whether what a module gives is, or goes into, a ReLU: the stem's batch norm, a block, and its inner batch norms."""
    if method != "__call__":
        return False
    if isinstance(module, models.BottleneckBlock | models.BasicBlock):
        return True
    inner = ("norm1", "norm2") if isinstance(module.parent, models.BottleneckBlock) else ("norm1",)
    return module.name in ("stem_norm", *inner)


def _relus(network: Any, variables: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, and the output of every ReLU [B, H, W, C] by "stage1_block2/norm1", in eval mode."""
    logits, captured = network(
        variables, images, train=False, capture_intermediates=_ends_in_relu, mutable=["intermediates"]
    )
    flat = traverse_util.flatten_dict(captured["intermediates"])
    return logits, {"/".join(path[:-1]): jax.nn.relu(value[0]) for path, value in flat.items()}


def _look(
    state: TrainState, batch: steps.Batch, *, config: ConfigDict
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Logits of a batch, and of each ReLU, over the examples that `mask` keeps, figures that add up over batches."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, relus = _relus(state.apply_fn, variables, steps.normalize(batch["images"], config.data))
    kept = batch["mask"].astype(jnp.float32)[:, None, None, None]

    def figures(value: jax.Array) -> dict[str, jax.Array]:
        value = value.astype(jnp.float32) * kept
        return {
            "squares": jnp.sum(value**2),
            "positive": jnp.sum(value > 0, axis=(0, 1, 2)),  # of each channel
            "count": jnp.sum(kept) * value[0].size,
        }

    return logits, {name: figures(value) for name, value in relus.items()}


def _merged(batches: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The sums over batches."""
    return {
        name: {figure: sum(np.asarray(batch[name][figure], np.float64) for batch in batches) for figure in figures}
        for name, figures in batches[0].items()
    }


def _stages(
    config: ConfigDict, state: TrainState, shape: tuple[int, ...], num_classes: int, relus: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The stages in order, stem and classifier among them.

    Returns:
        {"name", "blocks", "shape": [H, W, C] of the output, or [C], "num_params", and of those with ReLUs "rms": root of
        the mean square of the last one's output, "zeros": share of all their outputs that are 0, "dead": share of their
        channels that are 0 everywhere on every image}.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    _, outputs = jax.eval_shape(partial(_relus, state.apply_fn), variables, image)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    stages = []
    out_shape = [*shape]
    for name, blocks in [
        ("stem", None),
        *((f"stage{i}", blocks) for i, blocks in enumerate(config.model.block_list, start=1)),
        ("classifier", None),
    ]:
        mine = [output for output in outputs if output.startswith(f"{name}_")]
        stage = {
            "name": name,
            "blocks": blocks,
            "num_params": sum(size for module, size in sizes.items() if re.match(rf"{name}(_|$)", module)),
        }
        if mine:
            last = max(mine, key=lambda output: (_block(output), "/" not in output))
            out_shape = list(outputs[last].shape[1:])
            found = [relus[output] for output in mine]
            alive = np.concatenate([figures["positive"] for figures in found])
            stage |= {
                "rms": float(np.sqrt(relus[last]["squares"] / relus[last]["count"])),
                "zeros": float(1 - alive.sum() / sum(figures["count"] for figures in found)),
                "dead": float(np.mean(alive == 0)),
            }
        stages.append(stage | {"shape": [num_classes] if name == "classifier" else out_shape})
    return stages


def _block(output: str) -> int:
    """The number of the block that an output is of; 0 for the stem."""
    found = re.search(r"block(\d+)", output)
    return int(found[1]) if found else 0


def _mistakes(split: datasets.Split, predictions: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(predictions != split.labels)
    return [
        {
            "index": int(i),
            "label": int(split.labels[i]),
            "prediction": int(predictions[i]),
            "probability": float(probabilities[i]),
            "png": _png(split.images[i]),
        }
        for i in wrong[np.argsort(-probabilities[wrong], kind="stable")][:_MISTAKES]
    ]


def _png(image: np.ndarray) -> str:
    """A uint8 [H, W, 3] image as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
