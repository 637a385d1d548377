"""Two fake CPU devices, strict ranks, one compilation cache, and what several tests share."""

import os

from cpu_devices import xla_flags

os.environ.setdefault("XLA_FLAGS", xla_flags(2))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # tiny programs too
os.environ.pop("MAKEFLAGS", None)  # the tests call make too: without the variables of the make that started them

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from helpers import made_once, make_tiny_config
from ml_collections import ConfigDict

from configs import final
from resnet_jax import models, optim, steps, training
from resnet_jax.disk import cache

jax.config.update("jax_numpy_rank_promotion", "raise")
if folder := cache.folder():
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla-tests"))
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))


# Tracing and compiling the step is most of a tiny run. Runs of equal configs share their programs, in all tests of a process;
# those in which a process ends and another one resumes are in test_end_to_end.py and fault_injection/.
for module, name in (
    (models, "from_config"),
    (optim, "make_schedule"),
    (optim, "make_optimizer"),
    (steps, "jit_train_step"),
    (steps, "jit_train_steps"),
    (steps, "jit_eval_step"),
):
    setattr(module, name, made_once(getattr(module, name)))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of decoded data for this session alone."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_config(cache_dir: str) -> ConfigDict:
    """A run of a few seconds on digits: 41 steps in two epochs, an evaluation after each."""
    return make_tiny_config(cache_dir)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    """The workdir of a complete run of `tiny_config`, to be copied."""
    directory = tmp_path_factory.mktemp("trained")
    training.train(make_tiny_config(cache_dir), directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, trained_once: Path) -> Path:
    """A copy of it for a file of tests, which may write into it; some have a `run` of their own."""
    return shutil.copytree(trained_once, tmp_path_factory.mktemp("run"), dirs_exist_ok=True)


@pytest.fixture
def final_config() -> ConfigDict:
    """The report's config, as it is on a CPU."""
    config = final.get_config()
    config.pipeline, config.model.dtype = "tf_data", "float32"
    return config


@pytest.fixture
def collect() -> Iterator[None]:
    """Let what Orbax leaves behind be collected inside the test that made it."""
    yield
    gc.collect()
