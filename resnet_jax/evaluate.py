"""Evaluation: every image of a split counts exactly once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax import steps
from resnet_jax.data import feed, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.train_state import TrainState


class Evaluation(NamedTuple):
    """The metrics of a network on a split of N images.

    Attributes:
        loss: the mean cross-entropy.
        accuracy: 0..1.
        confusion: int64 [num_classes, num_classes], the number of images by label (row) and prediction (column).
        logits: float32 [N, num_classes].
    """

    loss: float
    accuracy: float
    confusion: np.ndarray
    logits: np.ndarray

    @property
    def standard_error(self) -> float:
        """That of the accuracy, with two right and two wrong images more (Agresti and Coull, 1998), so that it is never 0."""
        count = len(self.logits) + 4
        share = (np.trace(self.confusion) + 2) / count
        return float(np.sqrt(share * (1 - share) / count))


def evaluate(
    eval_step: Any,
    state: TrainState,
    split: Split,
    batch_size: int,
    mesh: Mesh,
    before_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Evaluate a state on all of a split.

    Args:
        eval_step: from `steps.jit_eval_step`.
        state: only its `variables` are read.
        split: the examples.
        batch_size: size of the global batch; at most the size of the split, rounded up to a multiple of the devices.
        mesh: the mesh of `eval_step`.
        before_batch: called before each batch, once the previous one is done; an exception ends the evaluation.
    """
    batch_size = -(-min(batch_size, len(split.labels)) // mesh.size) * mesh.size
    results: list[steps.EvalMetrics] = []
    for batch in pipelines.eval_batches(split, batch_size, jax.process_index(), jax.process_count()):
        on_devices = feed.shard_batch(batch, mesh)
        jax.block_until_ready(results[-1:])
        before_batch()
        results.append(eval_step(state, on_devices))
    losses, confusions, logits = zip(*jax.device_get(results), strict=True)
    confusion = np.stack(confusions).astype(np.int64).sum(axis=0)
    count = int(confusion.sum())
    if count != len(split.labels):
        raise RuntimeError(f"evaluated {count} of {len(split.labels)} images")
    loss = float(np.sum(losses, dtype=np.float64)) / count
    return Evaluation(loss, int(np.trace(confusion)) / count, confusion, np.concatenate(logits)[:count])
