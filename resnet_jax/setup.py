"""Set up training and evaluation: load the data, make the mesh and the state of step 0."""

import json
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import train_state
from resnet_jax.data import datasets, feed, pipelines, whitening
from resnet_jax.disk import cache
from resnet_jax.runs import model_size, processes, stored_config
from resnet_jax.runs.plan import Plan
from resnet_jax.runs.progress import say, waiting


class Setup(NamedTuple):
    """A run's data, devices and initial state.

    Attributes:
        config: the run's config, with computed values filled in.
        dataset: the whole data set.
        train: the part of `dataset.train` for training.
        validation: the rest of `dataset.train`, possibly empty.
        mesh: the devices, on the axis "data".
        state: the state of step 0.
        plan: what is done after which step.
        meta: stored with every checkpoint: {"config", "fingerprint", "class_names", "image_shape"}.
    """

    config: ConfigDict
    dataset: datasets.Dataset
    train: datasets.Split
    validation: datasets.Split
    mesh: Mesh
    state: train_state.TrainState
    plan: Plan
    meta: dict[str, Any]


def setup(config: ConfigDict, num_devices: int | None = None) -> Setup:
    """Load the data, check the config against data and devices, and build the initial state.

    Args:
        config: the run's config.
        num_devices: how many devices to use; all of them if None.

    Raises:
        UserError: if the data or the devices are missing, or the model has more parameters than `config.model.max_params`.
    """
    cache.keep_programs()
    mesh = train_state.make_mesh(num_devices)
    own_paths = ("data.data_dir", "data.cache_dir")  # each process may have its own
    shared = {name: value for name, value in config_lib.flatten(config).items() if name not in own_paths}
    processes.check_agreement("config", json.dumps(shared))
    first = jax.process_index() == 0
    waiting(f"loading {config.data.name}", quiet=not first)
    with processes.in_turn():
        dataset = datasets.load(config.data, in_memory=not pipelines.can_read_from_disk(config))
    processes.check_agreement("data", dataset.fingerprint)
    train, validation = datasets.validation_split(dataset, config.data)
    say(datasets.summary(dataset, train, validation, config.data), quiet=not first)
    on_devices = config.pipeline == "auto" and processes.all_agree(pipelines.prefers_devices(train, mesh))
    config = pipelines.without_auto(datasets.computed(config, train, len(dataset.class_names)), mesh, on_devices)
    plan = Plan.from_config(config, len(train.labels))
    image_shape = train.images.shape[1:]
    model_size.check_images(config.model, *image_shape[:2])
    create = partial(train_state.create, config, len(dataset.class_names), image_shape, plan.steps_per_epoch, mesh)
    traced = jax.jit(create).trace()  # shapes only: a model over its budget is never built
    model_size.check(train_state.num_params(traced.out_info.params), config.model.max_params)
    waiting("initialising the network", quiet=not first)
    state = traced.lower().compile()()  # one program in the compilation cache, instead of one per array
    if config.model.stem == "whitened":
        kernel = whitening.filters(train.images, config.data, config.model.channel_list[0])
        state = state.with_stem(feed.put(processes.from_first(kernel), mesh, PartitionSpec()))
    meta = {
        "config": stored_config.to_json(config),
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "image_shape": list(image_shape),
    }
    return Setup(config, dataset, train, validation, mesh, state, plan, meta)
