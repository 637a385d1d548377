"""Each pipeline joined to the compiled training step that it feeds."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from resnet_jax import steps
from resnet_jax.data import augment_jax, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.steps import StepMetrics
from resnet_jax.train_state import TrainState

_STEPS_PER_CALL = 50  # on accelerators, so that dispatching a call, milliseconds, is little beside running it


StepFn = Callable[[TrainState, int, int], tuple[TrainState, StepMetrics]]


def make_step(
    config: ConfigDict, train: Split, mesh: Mesh, state: TrainState, first_step: int, total_steps: int
) -> tuple[StepFn, int]:
    """The function that takes the steps of a run, fed by `config.pipeline`, and the most steps of one call of it.

    The function takes the state, the steps done so far, and how many to take: 1 or that many; calls follow one another from
    `first_step` on. It dispatches the steps and does not wait for them. It consumes the state, and returns the next one with
    the metrics of each step, stacked [steps], or of the one step.

    Args:
        config: of the run.
        train: the training examples.
        mesh: the devices.
        state: has the shapes of the run's state; its values are not read.
        first_step: steps done so far.
        total_steps: of the run.
    """
    if config.pipeline == "device":
        return _device(config, train, mesh)
    return _tf_data(config, train, mesh, state, first_step, total_steps)


def _tf_data(
    config: ConfigDict, train: Split, mesh: Mesh, state: TrainState, first_step: int, total_steps: int
) -> tuple[StepFn, int]:
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

    def step_fn(state: TrainState, step: int, count: int) -> tuple[TrainState, StepMetrics]:
        return train_step(state, steps.shard_batch(next(batches), mesh))

    return step_fn, 1


def _device(config: ConfigDict, train: Split, mesh: Mesh) -> tuple[StepFn, int]:
    here = jax.process_index(), jax.process_count()
    data = steps.put(train._asdict(), mesh, P())
    train_steps = steps.jit_train_steps(config, mesh, partial(augment_jax.build_batch, config=config.augment))

    def step_fn(state: TrainState, step: int, count: int) -> tuple[TrainState, StepMetrics]:
        draws = pipelines.train_draws(train, config, step, count, *here)
        return train_steps(state, data, steps.put(draws, mesh, P(None, "data")))

    return step_fn, config.steps_per_call or (1 if jax.default_backend() == "cpu" else _STEPS_PER_CALL)


def batch_of_step(config: ConfigDict, train: Split, mesh: Mesh, step: int) -> tuple[steps.Batch, np.ndarray]:
    """The batch of the step after `step`, on the devices, and the positions of its examples in `train`, int32 [B]."""
    here = jax.process_index(), jax.process_count()
    draws = {name: own[0] for name, own in pipelines.train_draws(train, config, step, 1, *here).items()}
    data = {name: array[draws["indices"]] for name, array in train._asdict().items()}  # the rest may not fit
    draws["indices"] = np.arange(len(data["labels"]))
    batch = jax.jit(partial(augment_jax.build_batch, config=config.augment))(data, draws)
    (examples,) = pipelines.train_draws(train, config, step, 1)["indices"]
    return steps.shard_batch(jax.device_get(batch), mesh), examples
