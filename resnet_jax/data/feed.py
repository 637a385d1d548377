"""Build the function that takes training steps: a pipeline and the compiled step that it feeds."""

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

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

STEPS_PER_CALL = 50  # on accelerators, so that running a call takes far longer than the milliseconds of its dispatch


StepFn = Callable[[TrainState, int, int], tuple[TrainState, StepMetrics]]
MakeStep = Callable[[ConfigDict, Split, Mesh, TrainState, int, int], tuple[StepFn, int]]


def make_step(
    config: ConfigDict, train: Split, mesh: Mesh, state: TrainState, first_step: int, total_steps: int
) -> tuple[StepFn, int]:
    """Return the function that takes the steps of a run, fed by `config.pipeline`, and the most steps of one call.

    The function's arguments are the state, the number of steps done, and how many steps to take, at most that many. Calls
    continue from `first_step` without gaps. It dispatches the steps and does not wait for them. It consumes the state,
    and returns the next state and the metrics of each step: stacked [steps], or those of the one step.

    Args:
        config: the run's config.
        train: the training examples.
        mesh: the devices.
        state: a state with the shapes of the run's state; its values are not read.
        first_step: number of steps done.
        total_steps: number of steps of the run.
    """
    if config.pipeline == "device":
        return _device(config, train, mesh)
    return _tf_data(config, train, mesh, state, first_step, total_steps)


def _tf_data(
    config: ConfigDict, train: Split, mesh: Mesh, state: TrainState, first_step: int, total_steps: int
) -> tuple[StepFn, int]:
    here = jax.process_index(), jax.process_count()
    batches = pipelines.train_batches(train, config, first_step, total_steps, *here)
    batch = pipelines.batch_shapes(train, config, NamedSharding(mesh, P("data")))
    with ThreadPoolExecutor(1) as executor:  # TensorFlow is imported while XLA compiles
        first_batch = executor.submit(next, batches)
        train_step = steps.jit_train_step(config, mesh).lower(state, batch).compile()
        batches = itertools.chain([first_batch.result()], batches)

    def step_fn(state: TrainState, step: int, count: int) -> tuple[TrainState, StepMetrics]:
        return train_step(state, shard_batch(next(batches), mesh))

    return step_fn, most_steps_per_call(config)


def _device(config: ConfigDict, train: Split, mesh: Mesh) -> tuple[StepFn, int]:
    here = jax.process_index(), jax.process_count()
    data = put(train._asdict(), mesh, P())
    train_steps = steps.jit_train_steps(config, mesh, partial(augment_jax.build_batch, config=config.augment))

    def step_fn(state: TrainState, step: int, count: int) -> tuple[TrainState, StepMetrics]:
        draws = pipelines.train_draws(train, config, step, count, *here)
        return train_steps(state, data, put(draws, mesh, P(None, "data")))

    return step_fn, most_steps_per_call(config)


def most_steps_per_call(config: ConfigDict) -> int:
    """Return the most steps of one call, for `config.pipeline`."""
    if config.pipeline == "tf_data":
        return 1
    return config.steps_per_call or (1 if jax.default_backend() == "cpu" else STEPS_PER_CALL)


def batch_of_step(config: ConfigDict, train: Split, mesh: Mesh, step: int) -> tuple[steps.Batch, np.ndarray]:
    """Return the batch of the step after `step`, on the devices, and its examples' positions in `train`, int32 [B]."""
    here = jax.process_index(), jax.process_count()
    draws = {name: own[0] for name, own in pipelines.train_draws(train, config, step, 1, *here).items()}
    data = {name: array[draws["indices"]] for name, array in train._asdict().items()}  # not all may fit
    draws["indices"] = np.arange(len(data["labels"]))
    batch = jax.jit(partial(augment_jax.build_batch, config=config.augment))(data, draws)
    (examples,) = pipelines.train_draws(train, config, step, 1)["indices"]
    return shard_batch(jax.device_get(batch), mesh), examples


def put(arrays: Any, mesh: Mesh, spec: P) -> Any:
    """Turn a tree of each process's arrays, or slices of arrays, into a tree of global arrays on the devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), arrays)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> steps.Batch:
    """Put each process's slice of a batch on its devices."""
    return put(batch, mesh, P("data"))
