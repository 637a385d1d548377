"""The measurements of `benchmarks.benchmark`, one function each, for one config on one mesh.

Those in `benchmark.THROUGHPUTS` measure images/s and can be interleaved. The others measure seconds or bytes of single events.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from benchmarks import timing
from resnet_jax import config as config_lib
from resnet_jax import models, steps, train_state, training
from resnet_jax.data import augment_jax, feed, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import preemption, stored_config, workdir
from resnet_jax.runs.checkpoints import Checkpoints
from resnet_jax.runs.hooks import Hook
from resnet_jax.runs.plan import Call
from resnet_jax.setup import Setup

ROOT = Path(__file__).parent.parent


def flops_per_image(config: ConfigDict, train: Split, state: train_state.TrainState, num_classes: int) -> float:
    """Return the floating-point operations of a train step per image, as XLA counts them before compilation.

    It counts XLA's convolutions, for one CPU: other backends do not count, and so the number is the same on every machine.

    Args:
        config: of the run.
        train: the training images, of which only the shape matters.
        state: of the run, or its shapes.
        num_classes: of the data.
    """
    batch = pipelines.batch_shapes(train, config)
    state = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), state)
    model = models.from_config(config.model, num_classes)
    cpu = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("data",))
    step = steps.jit_train_step(config, cpu).lower(state.replace(apply_fn=model.apply), batch)
    return float(step.cost_analysis()["flops"]) / config.batch_size


def train_step(config: ConfigDict, start: Setup) -> timing.Contender:
    """Measure the train step alone, on one batch in the devices' memory: as many steps a call as in training."""
    batch, _ = feed.batch_of_step(config, start.train, start.mesh, 0)
    state, count = jax.tree.map(jnp.copy, start.state), start.plan.steps_per_call(feed.most_steps_per_call(config))
    arguments: tuple[steps.Batch, ...]
    if config.pipeline == "device":
        repeated = jax.tree.map(lambda array: jnp.broadcast_to(array, (count, *array.shape)), jax.device_get(batch))
        draws = feed.put(repeated | {"indices": repeated["labels"]}, start.mesh, P(None, "data"))
        step = steps.jit_train_steps(config, start.mesh, lambda _, drawn: {name: drawn[name] for name in batch})
        arguments = {}, draws
    else:
        step, arguments = steps.jit_train_step(config, start.mesh), (batch,)

    def dispatch() -> train_state.TrainMetrics:
        nonlocal state
        state, metrics = step(state, *arguments)
        return metrics

    return partial(timing.throughput, dispatch, jax.block_until_ready, count * config.batch_size)


def eval_step(config: ConfigDict, start: Setup) -> timing.Contender:
    """Measure the eval step alone, on one batch in the devices' memory."""
    batch_size = -(-config.eval_batch_size // start.mesh.size) * start.mesh.size
    batch = feed.shard_batch(next(pipelines.eval_batches(start.dataset.test, batch_size)), start.mesh)
    dispatch = partial(steps.jit_eval_step(config, start.mesh), start.state, batch)
    return partial(timing.throughput, dispatch, jax.block_until_ready, batch_size)


def pipeline(config: ConfigDict, start: Setup) -> timing.Contender:
    """Measure the training batches alone: from tf.data, or drawn on the host and built on the devices, one per call."""
    if config.pipeline == "tf_data":
        stream = pipelines.train_batches(start.train, config, 0, 10**9)
        return partial(timing.throughput, partial(next, stream), lambda batch: None, config.batch_size)
    data = feed.put(start.train._asdict(), start.mesh, P())
    build = jax.jit(partial(augment_jax.build_batch, config=config.augment))
    step_numbers = itertools.count()

    def dispatch() -> steps.Batch:
        draws = pipelines.train_draws(start.train, config, next(step_numbers), 1)
        return build(data, feed.put({name: drawn[0] for name, drawn in draws.items()}, start.mesh, P("data")))

    return partial(timing.throughput, dispatch, jax.block_until_ready, config.batch_size)


def naive_pipeline(config: ConfigDict, start: Setup) -> timing.Contender:
    """Measure the same augmentation as a tutorial writes it, on the host."""
    from benchmarks import naive_pipeline  # it needs TensorFlow

    stream = naive_pipeline.batches(start.train, config.batch_size, config.augment)
    return partial(timing.throughput, partial(next, stream), lambda batch: None, config.batch_size)


def draws(config: ConfigDict, start: Setup) -> timing.Contender:
    """Measure what the host draws for batches: their examples, and the parameters of the augmentation."""
    step_numbers = itertools.count()

    def dispatch() -> dict[str, np.ndarray]:
        return pipelines.train_draws(start.train, config, next(step_numbers), 1)

    return partial(timing.throughput, dispatch, lambda drawn: None, config.batch_size)


class _Measured(Exception):
    """Ends a run once it has been measured for long enough.

    Attributes:
        steps_per_second: speed of the run.
    """

    def __init__(self, steps_per_second: float) -> None:
        self.steps_per_second = steps_per_second


class _Measure(Hook):
    """Times a run from the end of its first call, and ends it with `_Measured` after at least `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._first: tuple[int, float] | None = None
        self.newest: Any = None  # the metrics of the newest call

    def after_dispatch(self, call: Call, metrics: Any) -> str:
        """Keep the metrics, which are ready when the call has ended."""
        self.newest = metrics
        return ""

    def after_call(self, call: Call) -> None:
        """Read the clock."""
        now = time.perf_counter()
        if self._first is None:
            self._first = call.end, now
        elif now - self._first[1] >= self._seconds:
            raise _Measured((call.end - self._first[0]) / (now - self._first[1]))


def end_to_end(config: ConfigDict, start: Setup) -> timing.Contender:
    """Measure the training loop, without evaluations and saves."""
    endless = 2**31 - 1
    config = config_lib.replaced(config, {"checkpoint_every_minutes": 0.0})
    plan = dataclasses.replace(start.plan, total_steps=endless, eval_every_epochs=endless, checkpoint_every_steps=0)
    start = start._replace(config=config, plan=plan)

    def measure(seconds: float) -> float:
        state, hook = jax.tree.map(jnp.copy, start.state), _Measure(seconds)
        with (
            tempfile.TemporaryDirectory() as scratch,
            workdir.open_workdir(Path(scratch), config, start.meta) as folder,
        ):
            state, _ = folder.restore(state)
            run = training.Run(start, folder, preemption.StopRequest(), time.monotonic(), 0.0, [hook])
            try:
                training.take_steps(run, state)
            except _Measured as measured:
                jax.block_until_ready(hook.newest)  # otherwise the running call would slow down the next measurement
                return measured.steps_per_second * config.batch_size
        raise AssertionError("the loop ended by itself")

    return measure


def save_seconds(config: ConfigDict, start: Setup, repeats: int) -> list[float]:
    """Measure how long a save blocks the loop, after the previous one was written; the first does not count."""
    seconds = []
    with tempfile.TemporaryDirectory() as scratch, closing(Checkpoints(Path(scratch), {})) as checkpoints:
        for step in range(repeats + 1):
            state = start.state.replace(step=jnp.full_like(start.state.step, step))
            began = time.perf_counter()
            checkpoints.save(state, {"config": stored_config.to_json(config)})
            seconds.append(time.perf_counter() - began)
            checkpoints.wait()
    return seconds[1:]


def _launch(config: ConfigDict, directory: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """Start `launch.py` on a config, with its workdir and stderr in a folder."""
    config_file = directory / "config.json"
    files.write_json(config_file, stored_config.to_json(config))
    with (directory / "stderr").open("w", encoding="utf-8") as stderr:
        return subprocess.Popen(
            [sys.executable, ROOT / "launch.py", "--config", config_file, "--workdir", directory / "run", *flags],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def _end(process: subprocess.Popen[str], directory: Path) -> None:
    """Wait for `launch.py`, and stop the benchmark if it failed."""
    process.communicate()
    if process.returncode not in (0, preemption.TIME_LIMIT):
        raise UserError(f"launch.py failed: {(directory / 'stderr').read_text('utf-8')[-300:]}")


def startup_seconds(config: ConfigDict, repeats: int) -> dict[str, list[float]]:
    """Measure the seconds until `launch.py` dispatches its first step, with a cold and a warm compilation cache."""
    by_cache: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for repeats_so_far in by_cache.values():
                with tempfile.TemporaryDirectory() as scratch:
                    began = time.perf_counter()
                    process = _launch(config, Path(scratch), "--max-seconds=0", JAX_COMPILATION_CACHE_DIR=cache)
                    for line in process.stdout or ():
                        if line.startswith("first step dispatched"):
                            repeats_so_far.append(time.perf_counter() - began)
                    _end(process, Path(scratch))
    return by_cache


def peak_memory_bytes(config: ConfigDict, start: Setup) -> dict[str, int | None]:
    """Measure the peak memory of `launch.py` in a run of three steps, with all its evaluations and saves."""
    fields: dict[str, Any] = {"num_epochs": 2.5 / start.plan.steps_per_epoch}
    if "warmup_epochs" in config.schedule:
        fields["schedule.warmup_epochs"] = 0.0  # it must end before the run does
    with tempfile.TemporaryDirectory() as scratch:
        _end(_launch(config_lib.replaced(config, fields), Path(scratch)), Path(scratch))
        result: dict[str, dict[str, int | None]] = files.read_json(Path(scratch) / "run" / "result.json")
        return result["peak_memory_bytes"]


def torch_step(
    config: ConfigDict, num_classes: int, image_shape: tuple[int, ...], python: str, mode: str = "train"
) -> AbstractContextManager[tuple[timing.Contender, dict[str, Any]]]:
    """Yield a step of the same network in PyTorch, which runs `benchmarks/torch_step.py`, and its description.

    Args:
        config: the config of a run.
        num_classes: number of classes of its data.
        image_shape: (H, W, 3).
        python: a Python that has PyTorch.
        mode: "train", or "predict" for only the logits.

    Raises:
        UserError: if that Python has no PyTorch.
    """
    spec = {
        "config": stored_config.to_json(config),
        "num_classes": num_classes,
        "image_shape": image_shape,
        "mode": mode,
    }
    return in_torch("benchmarks.torch_step", spec, python)


@contextmanager
def in_torch(module: str, spec: dict[str, Any], python: str) -> Iterator[tuple[timing.Contender, dict[str, Any]]]:
    """Yield a contender that runs in another Python, on a CPU if JAX does, and its description.

    Args:
        module: reads `spec` as a line of JSON and answers with a line, its description. Each further line is a number of
            seconds to measure for, and the answer to it the images/s.
        spec: what it is told.
        python: a Python that has PyTorch.

    Raises:
        UserError: if that Python has no PyTorch.
    """
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""} if jax.default_backend() == "cpu" else {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            [os.path.abspath(python), "-m", module],
            cwd=ROOT,
            env=os.environ | no_gpu,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as worker,
    ):

        def ask(line: str) -> str:
            assert worker.stdin
            assert worker.stdout
            with suppress(BrokenPipeError):
                print(line, file=worker.stdin, flush=True)
            if answer := worker.stdout.readline():
                return answer
            with suppress(BrokenPipeError):
                worker.stdin.close()  # otherwise closing it later would fail
            stderr.seek(0)
            reason = (stderr.read().splitlines() or ["it ended"])[-1]
            raise UserError(
                f"PyTorch in {python}: {reason}: give the Python of an environment with PyTorch as --torch-python=PYTHON"
            )

        description = json.loads(ask(json.dumps(spec)))
        yield (lambda seconds: float(ask(str(seconds)))), description
