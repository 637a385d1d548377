"""The steps of a run, a call at a time: each pipeline joined to the compiled step that it feeds."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from resnet_jax import steps
from resnet_jax.data import augment_jax, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.train_state import TrainMetrics, TrainState

_STEPS_PER_CALL = 50  # on accelerators, so that dispatching a call, milliseconds, is little beside running it


class Feed(NamedTuple):
    """What takes the steps of a run.

    Attributes:
        steps_per_call: the most steps of a call.
        take: (state, step, count) -> (state, metrics). Dispatches the `count` steps after `step`, 1 or `steps_per_call`,
            where the calls follow one another; what it returns is not waited for. The state is donated; the metrics are
            those of `steps.train_step` for each step, stacked [count], or of the one step.
    """

    steps_per_call: int
    take: Callable[[TrainState, int, int], tuple[TrainState, TrainMetrics]]


def make_feed(
    config: ConfigDict, train: Split, mesh: Mesh, state: TrainState, first_step: int, total_steps: int
) -> Feed:
    """The feed of `config.pipeline` from `first_step` on; `state` has the shapes of the run's, its values are not read."""
    if config.pipeline == "device":
        return _device(config, train, mesh)
    return _tf_data(config, train, mesh, state, first_step, total_steps)


def _tf_data(
    config: ConfigDict, train: Split, mesh: Mesh, state: TrainState, first_step: int, total_steps: int
) -> Feed:
    here = jax.process_index(), jax.process_count()
    batches = pipelines.train_batches(train, config, first_step, total_steps, *here)
    sharded = NamedSharding(mesh, P("data"))
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *array.shape[1:]), array.dtype, sharding=sharded)
        for name, array in train._asdict().items()
    }
    with ThreadPoolExecutor(1) as executor:  # TensorFlow is imported while XLA compiles
        first_batch = executor.submit(next, batches)
        train_step = steps.jit_train_step(config, mesh).lower(state, batch).compile()
        batches = itertools.chain([first_batch.result()], batches)

    def take(state: TrainState, step: int, count: int) -> tuple[TrainState, TrainMetrics]:
        return train_step(state, steps.shard_batch(next(batches), mesh))

    return Feed(1, take)


def _device(config: ConfigDict, train: Split, mesh: Mesh) -> Feed:
    here = jax.process_index(), jax.process_count()
    data = steps.put(train._asdict(), mesh, P())
    train_steps = steps.jit_train_steps(config, mesh, partial(augment_jax.build_batch, config=config.augment))

    def take(state: TrainState, step: int, count: int) -> tuple[TrainState, TrainMetrics]:
        draws = pipelines.train_draws(train, config, step, count, *here)
        return train_steps(state, data, steps.put(draws, mesh, P(None, "data")))

    return Feed(config.steps_per_call or (1 if jax.default_backend() == "cpu" else _STEPS_PER_CALL), take)
