"""Evaluation: every image of a split once, and `--mode eval`, which restores a checkpoint and reports on it."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax import calibration, datasets, input_pipeline, setup, steps, train_state, workdir
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.errors import UserError


def evaluate(
    eval_step: Any,
    state: train_state.TrainState,
    split: datasets.Split,
    batch_size: int,
    mesh: Mesh,
    before_batch: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Evaluate a state on all of a split.

    Args:
        eval_step: from `steps.jit_eval_step`.
        state: reads `params` and `batch_stats`.
        split: the examples.
        batch_size: of the global batch; no larger than the split, and rounded up to a multiple of the number of devices.
        mesh: of `eval_step`.
        before_batch: called before each batch, when the one before is done; what it raises ends the evaluation.

    Returns:
        {"loss": float, "accuracy": float in 0..1, "confusion": int64 [num_classes, num_classes], row the label, "logits":
        float32 [N, num_classes]}.
    """
    batch_size = -(-min(batch_size, len(split.labels)) // mesh.size) * mesh.size
    batches = input_pipeline.eval_batches(split, batch_size, jax.process_index(), jax.process_count())
    results: list[tuple[steps.EvalMetrics, jax.Array]] = []
    for batch in batches:
        on_devices = steps.shard_batch(batch, mesh)
        jax.block_until_ready(results[-1:])
        before_batch()
        results.append(eval_step(state, on_devices))
    metrics, logits = zip(*jax.device_get(results), strict=True)
    confusion = np.sum([m.confusion.counts for m in metrics], axis=0, dtype=np.int64)
    seen = int(confusion.sum())
    if seen != len(split.labels):
        raise RuntimeError(f"evaluated {seen} images of {len(split.labels)}")
    return {
        "loss": float(np.sum([m.loss.total for m in metrics], dtype=np.float64)) / seen,
        "accuracy": int(np.trace(confusion)) / seen,
        "confusion": confusion,
        "logits": np.concatenate(logits)[:seen],
    }


def restored(config: ConfigDict, directory: Path, which: str) -> tuple[setup.Setup, train_state.TrainState, int]:
    """What a run starts from, the state of one of its checkpoints, and that checkpoint's step.

    Args:
        config: of the run.
        directory: the run's workdir.
        which: "best", "latest" or a step.

    Raises:
        UserError: where there is no such run, checkpoint, or data, or the config is another.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} holds no run: train first, or give the --workdir of a run")
    workdir.check(directory, config)
    with _reading(directory) as checkpoints:
        checkpoints.choose(which)  # in vain, if so, before the data are loaded
    run_setup = setup.setup(config)
    is_of_this_run = partial(workdir.check_meta, directory, config, run_setup.dataset)
    with _reading(directory) as checkpoints:  # anew, for a run under way replaces its checkpoints
        step = checkpoints.choose(which)
        state, _ = checkpoints.restore(step, run_setup.state, is_of_this_run)
    return run_setup, state, step


def run(
    config: ConfigDict, directory: Path, which: str, flip: bool = False, fit_temperature: bool = False
) -> dict[str, Any]:
    """Restore a checkpoint, evaluate it on validation and test, print the report, write `eval.json` and `reliability.png`.

    Args and errors are those of `restored`, and:
        flip: average the logits of each image and its mirror.
        fit_temperature: on the validation split, and keep it in `temperature.json` for `inference.load`.

    Returns:
        What `eval.json` holds.
    """
    if fit_temperature and not config.data.validation_ratio:
        raise UserError(
            "--fit-temperature needs a validation split, and config.data.validation_ratio is 0: leave it out"
        )
    run_setup, state, step = restored(config, directory, which)
    eval_step = steps.jit_eval_step(config, run_setup.mesh, flip)
    report: dict[str, Any] = {
        "checkpoint": which,
        "checkpoint_step": step,
        "flip": flip,
        "dataset": workdir.describe(run_setup.dataset, run_setup.train, run_setup.validation),
        "environment": workdir.environment(),
    }
    names = run_setup.dataset.class_names
    temperature = None
    for name, split in (("validation", run_setup.validation), ("test", run_setup.dataset.test)):
        if len(split.labels):
            result = evaluate(eval_step, state, split, config.eval_batch_size, run_setup.mesh)
            if name == "validation" and fit_temperature:
                temperature = calibration.fit_temperature(result["logits"], split.labels)
            report[name] = _describe(result, split.labels, names, temperature)
    if jax.process_index() == 0:
        print(_as_text(report, names))
        workdir.write_json(directory / "eval.json", report)
        test = report["test"]
        curves = {"as it is": test["calibration"]}
        if temperature is not None:
            curves[f"at temperature {temperature:.3g}"] = test["calibrated"]["calibration"]
            calibration.keep_temperature(directory, step, flip, temperature)
        from resnet_jax import figures  # only here, for Matplotlib takes a second that training would wait for

        figures.save(partial(figures.draw_reliability, curves), directory / "reliability.png", "light", "white")
        print(f"written to {directory / 'eval.json'}")
    return report


def _describe(
    result: dict[str, Any], labels: np.ndarray, names: tuple[str, ...], temperature: float | None
) -> dict[str, Any]:
    """What the report says of a split: what `evaluate` found, by class, and how well its probabilities are meant."""
    per_class = np.diag(result["confusion"]) / np.maximum(result["confusion"].sum(axis=1), 1)
    described = {
        "loss": result["loss"],
        "accuracy": result["accuracy"],
        "accuracy_per_class": dict(zip(names, per_class.tolist(), strict=True)),
        "confusion": result["confusion"].tolist(),
        "calibration": calibration.describe(result["logits"], labels),
    }
    if temperature is not None:
        logits = result["logits"] / temperature
        described["calibrated"] = {
            "temperature": temperature,
            "loss": calibration.negative_log_likelihood(logits, labels),
            "calibration": calibration.describe(logits, labels),
        }
    return described


def _reading(directory: Path) -> "closing[Checkpoints]":
    accuracies = workdir.validation_accuracies(directory)
    return closing(Checkpoints(directory / "checkpoints", accuracies, read_only=True))


def _as_text(report: dict[str, Any], names: tuple[str, ...]) -> str:
    """The report for a person: a line a split, then the test split class by class."""
    mirrored = ", each image and its mirror averaged" * report["flip"]
    lines = [f"checkpoint {report['checkpoint']}, step {report['checkpoint_step']}{mirrored}"]
    for split in ("validation", "test"):
        if split in report:
            of_split = report[split]
            error = of_split["calibration"]["expected_calibration_error"]
            lines.append(
                f"{split:<10}  loss {of_split['loss']:.4f}  accuracy {of_split['accuracy']:.2%}  calibration error {error:.2%}"
            )
            if at := of_split.get("calibrated"):
                error = at["calibration"]["expected_calibration_error"]
                lines.append(
                    f"{'':<10}  at temperature {at['temperature']:.3f}: loss {at['loss']:.4f}  calibration error {error:.2%}"
                )
    width = max(map(len, names))
    cell = max(len(str(n)) for row in report["test"]["confusion"] for n in row) + 1
    matrix = len(names) <= 20
    confusion = "confusion (row: label, column: prediction, in the same order)" if matrix else ""
    lines.append(f"\n{'test':<{width}}  accuracy  {confusion}")
    for name, row in zip(names, report["test"]["confusion"], strict=True):
        accuracy = report["test"]["accuracy_per_class"][name]
        lines.append(f"{name:<{width}}  {accuracy:>8.2%}  " + "".join(f"{n:>{cell}}" for n in row if matrix))
    return "\n".join(lines)
