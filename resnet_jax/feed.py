"""The steps of a run, a call at a time: each pipeline joined to the compiled step that it feeds."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from resnet_jax import input_pipeline, steps
from resnet_jax.setup import Setup
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


def make_feed(config: ConfigDict, start: Setup, first_step: int) -> Feed:
    """The feed of `config.pipeline`, from a step on."""
    return (_device if config.pipeline == "device" else _tf_data)(config, start, first_step)


def _tf_data(config: ConfigDict, start: Setup, first_step: int) -> Feed:
    here = jax.process_index(), jax.process_count()
    batches = input_pipeline.train_batches(start.train, config, first_step, start.total_steps, *here)
    sharded = NamedSharding(start.mesh, P("data"))
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *array.shape[1:]), array.dtype, sharding=sharded)
        for name, array in start.train._asdict().items()
    }
    with ThreadPoolExecutor(1) as executor:  # TensorFlow is imported while XLA compiles
        first_batch = executor.submit(next, batches)
        train_step = steps.jit_train_step(config, start.mesh).lower(start.state, batch).compile()
        batches = itertools.chain([first_batch.result()], batches)

    def take(state: TrainState, step: int, count: int) -> tuple[TrainState, TrainMetrics]:
        return train_step(state, steps.shard_batch(next(batches), start.mesh))

    return Feed(1, take)


def _device(config: ConfigDict, start: Setup, first_step: int) -> Feed:
    here = jax.process_index(), jax.process_count()
    data = steps.put(start.train._asdict(), start.mesh, P())
    train_steps = steps.jit_train_steps(config, start.mesh)

    def take(state: TrainState, step: int, count: int) -> tuple[TrainState, TrainMetrics]:
        draws = input_pipeline.train_draws(start.train, config, step, count, *here)
        return train_steps(state, data, steps.put(draws, start.mesh, P(None, "data")))

    return Feed(config.steps_per_call or (1 if jax.default_backend() == "cpu" else _STEPS_PER_CALL), take)
