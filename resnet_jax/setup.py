"""What training and evaluation both start from: the data, the mesh and the state of step 0."""

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import host, train_state
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.runs import processes, workdir


class Setup(NamedTuple):
    """A run's data, devices and initial state.

    Attributes:
        dataset: all of it.
        train: the part of `dataset.train` that is trained on.
        validation: the rest of it, possibly empty.
        mesh: the devices, on the axis "data".
        state: of step 0.
        steps_per_epoch: len(train) / batch_size, not rounded.
        total_steps: ceil(num_epochs * len(train) / batch_size).
    """

    dataset: datasets.Dataset
    train: datasets.Split
    validation: datasets.Split
    mesh: Mesh
    state: train_state.TrainState
    steps_per_epoch: float
    total_steps: int


def setup(config: ConfigDict, num_devices: int | None = None) -> Setup:
    """Load the data and build the state, checking what can be wrong before the first step.

    Args:
        config: of the run.
        num_devices: how many devices to use; all of them if not given.

    Raises:
        UserError: where the data or the devices are not to be had, the batch does not divide over the devices, or the
            model has more parameters than `config.model.max_params`.
    """
    jax.config.update(
        "jax_compilation_cache_dir",
        os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(host.cache_dir() / "xla"),
    )
    mesh = train_state.make_mesh(num_devices)
    config_lib.check_batch_size(config.batch_size, mesh.size)
    alike = {
        name: value
        for name, value in config_lib.flatten(config).items()
        if name not in ("data.data_dir", "data.cache_dir")
    }
    processes.check_agreement("config", json.dumps(alike))
    dataset = datasets.load(config.data)
    processes.check_agreement("data", dataset.fingerprint)
    train, validation = datasets.validation_split(dataset, config.data)
    steps_per_epoch = len(train.labels) / config.batch_size
    total_steps = math.ceil(config.num_epochs * steps_per_epoch)
    if total_steps >= 2**31:
        raise UserError(f"config.num_epochs {config.num_epochs} takes {total_steps} steps: 2**31 - 1 is the most")
    create = partial(
        train_state.create, config, len(dataset.class_names), train.images.shape[1:], steps_per_epoch, mesh
    )
    traced = jax.jit(create).trace()
    params = traced.out_info.params  # the shapes alone: a model over its budget is never built
    if jax.process_index() == 0:
        print(parameter_overview.get_parameter_overview(params, include_stats=False), flush=True)
    check_budget(train_state.num_params(params), config.model.max_params)
    state = traced.lower().compile()()  # one program, which the compilation cache keeps, instead of one an array
    return Setup(dataset, train, validation, mesh, state, steps_per_epoch, total_steps)


def check_budget(num_params: int, max_params: int) -> None:
    """Refuse a model over its budget; 0 is no budget."""
    budget = f" of {max_params:,} allowed (config.model.max_params)" if max_params else ""
    if max_params and num_params > max_params:
        raise UserError(
            f"the model has {num_params:,} parameters{budget}: make config.model.channel_list or block_list smaller, or "
            "raise the budget (0 for none)"
        )
    if jax.process_index() == 0:
        print(f"{num_params:,} trainable parameters{budget}", flush=True)


def make_meta(config: ConfigDict, dataset: datasets.Dataset, seconds: float) -> dict[str, Any]:
    """What a checkpoint holds beside the state: what it belongs to, what it takes to use it, and the seconds spent on it."""
    return {
        "config": config_lib.to_json(config),
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.train.images.shape[1:]),
        "seconds": seconds,
    }


def check_meta(directory: Path, config: ConfigDict, dataset: datasets.Dataset, meta: dict[str, Any]) -> None:
    """Refuse a checkpoint of another config, or of data other than these.

    Raises:
        UserError: naming the fields, or both fingerprints.
    """
    workdir.refuse_differences(f"{directory}/checkpoints", config, meta["config"])
    if meta["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"{dataset.name} has changed since the run began (fingerprint {meta['fingerprint'][:12]} then, "
            f"{dataset.fingerprint[:12]} now): give the run's own data, or choose another --workdir"
        )
