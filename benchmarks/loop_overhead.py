"""Measure what the host adds to a run on an accelerator, without one: `Run` with steps and evaluations that only wait.

    python -m benchmarks.loop_overhead --config configs/final.py --config.pipeline=device --config.model.dtype=float32 \
        --output results/loop-overhead-cpu.json

The results of a step are ready once an accelerator of the given speed would have computed them, while the host does its
work beside it: it draws the batches of training, builds those of evaluation, logs, and saves real states of the config's
network. Each evaluation finds a better network, which replaces the best checkpoint. The overhead is the time of the loop
beyond that of the steps, in per cent of it. It includes the evaluations.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from benchmarks import timing, tool
from resnet_jax import setup, steps, train_state, training
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.data import feed, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.runs import preemption, workdir


@dataclasses.dataclass
class _Later:
    """An array on an accelerator, which is ready at a time of `time.perf_counter`."""

    value: np.ndarray
    ready: float

    def block_until_ready(self) -> "_Later":
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.block_until_ready().value


def _make_step(images_per_second: float) -> feed.MakeStep:
    """Return what makes steps of that speed, in place of `feed.make_step`."""
    ones = dict.fromkeys(("loss", "accuracy", "grad_norm"), jnp.ones(()))
    means = jax.device_get(train_state.TrainMetrics.single_from_model_output(**ones))

    def make_step(config: ConfigDict, train: Split, mesh: Mesh, *_: Any) -> tuple[feed.StepFn, int]:
        free_at = 0.0  # when the accelerator has done what it was given

        def step_fn(state: train_state.TrainState, start: int, count: int) -> Any:
            nonlocal free_at
            feed.put(pipelines.train_draws(train, config, start, count), mesh, P(None, "data"))
            free_at = max(free_at, time.perf_counter()) + count * config.batch_size / images_per_second
            step = jax.device_put(np.int32(start + count), state.step.sharding)
            stacked = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *np.shape(leaf))), means)
            rejected: Any = _Later(np.zeros(count, bool), free_at)
            return state.replace(step=step), steps.StepMetrics(stacked, rejected)

        return step_fn, feed.STEPS_PER_CALL

    return make_step


def _make_eval_step(images_per_second: float, batches: int) -> Callable[[Any, steps.Batch], steps.EvalMetrics]:
    """Return an evaluation step of that speed, which finds one more image right in each evaluation of so many batches."""
    calls, free_at = 0, 0.0

    def eval_step(_: Any, batch: steps.Batch) -> steps.EvalMetrics:
        nonlocal calls, free_at
        count = int(np.asarray(batch["mask"]).sum())
        free_at = max(free_at, time.perf_counter()) + count / images_per_second
        right = min(calls // batches + 1, count)
        calls += 1
        loss: Any = _Later(np.float32(count - right), free_at)
        confusion: Any = np.array([[right, count - right], [0, 0]])
        logits: Any = np.zeros((len(batch["labels"]), 2), np.float32)
        return steps.EvalMetrics(loss, confusion, logits)

    return eval_step


def seconds_of_loop(start: setup.Setup, images_per_second: float, evaluated_per_second: float) -> float:
    """Return how long the loop of a run takes, its last checkpoint included."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        workdir.open_workdir(Path(scratch), start.config, start.meta) as folder,
    ):
        state, _ = folder.restore(start.state)
        run = training.Run(start, folder, preemption.StopRequest(), time.monotonic(), 0.0)
        batches = -(-len(start.validation.labels) // start.config.eval_batch_size)
        run.eval_step = _make_eval_step(evaluated_per_second, batches)
        began = time.perf_counter()
        training.take_steps(run, state, _make_step(images_per_second))
        folder.wait()
        return time.perf_counter() - began


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m benchmarks.loop_overhead", __doc__)
    command_line.add_config_arguments(parser)
    parser.add_argument(
        "--images-per-second", type=command_line.whole_number(1), default=40_000, help="of the steps (default: 40000)"
    )
    parser.add_argument(
        "--evaluated-per-second",
        type=command_line.whole_number(1),
        default=220_000,
        help="of evaluations (default: 220000)",
    )
    parser.add_argument("--repeats", type=command_line.whole_number(1), default=3, help="runs (default: 3)")
    tool.add_output_argument(parser)
    arguments, config = command_line.parse_config(parser, argv)
    tool.check_output(arguments.output)
    start = setup.setup(config, 1)
    config, plan = start.config, start.plan
    ideal = plan.total_steps * config.batch_size / arguments.images_per_second
    evaluations = sum(map(plan.evaluates_after, range(1, plan.total_steps + 1)))
    seconds = [
        seconds_of_loop(start, arguments.images_per_second, arguments.evaluated_per_second)
        for _ in range(arguments.repeats)
    ]
    case = {
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "devices": 1,
        "figures": {
            "steps alone": timing.summary([ideal], "s"),
            "evaluations alone": timing.summary(
                [evaluations * len(start.validation.labels) / arguments.evaluated_per_second], "s"
            ),
            "loop": timing.summary(seconds, "s"),
            "overhead": timing.summary([100 * (took / ideal - 1) for took in seconds], "%"),
        },
    }
    speeds = {name: getattr(arguments, name) for name in ("images_per_second", "evaluated_per_second")}
    tool.write_result(arguments.output, {"cases": [case], **speeds}, config)


if __name__ == "__main__":
    command_line.run(main)
