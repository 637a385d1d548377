"""Evaluate a checkpoint of a run and report on it: `--mode eval`."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import steps
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.evaluate import Evaluation, evaluate
from resnet_jax.inference import calibration
from resnet_jax.inference.restore import restore_run
from resnet_jax.reporting import figures
from resnet_jax.runs import environment, files
from resnet_jax.runs.progress import waiting


def run(
    config: ConfigDict, directory: Path, which: str, flip: bool = False, fit_temperature: bool = False
) -> dict[str, Any]:
    """Restore a checkpoint, evaluate it on validation and test, print the report, write `eval.json` and `reliability.png`.

    Args and errors are those of `restore_run`, and:
        flip: average the logits of each image and its mirror.
        fit_temperature: on the validation split, and keep it in `temperature.json` for `inference.load`.

    Returns:
        What `eval.json` holds.
    """
    if fit_temperature and not config.data.validation_ratio:
        raise UserError(
            "--fit-temperature needs a validation split, and config.data.validation_ratio is 0: leave it out"
        )
    run_setup, state, step = restore_run(config, directory, which)
    eval_step = steps.jit_eval_step(config, run_setup.mesh, flip)
    report: dict[str, Any] = {
        "checkpoint": which,
        "checkpoint_step": step,
        "flip": flip,
        "dataset": datasets.describe(run_setup.dataset, run_setup.train, run_setup.validation),
        "environment": environment.collect(),
    }
    names = run_setup.dataset.class_names
    temperature = None
    for name, split in (("validation", run_setup.validation), ("test", run_setup.dataset.test)):
        if len(split.labels):
            waiting(f"evaluating the {name} split", quiet=jax.process_index() > 0)
            result = evaluate(eval_step, state, split, config.eval_batch_size, run_setup.mesh)
            if name == "validation" and fit_temperature:
                temperature = calibration.fit_temperature(result.logits, split.labels)
            report[name] = _describe(result, split.labels, names, temperature)
    if jax.process_index() == 0:
        print(_as_text(report, names))
        files.write_json(directory / "eval.json", report)
        test = report["test"]
        curves = {"uncalibrated": test["calibration"]}
        if temperature is not None:
            curves[f"at temperature {temperature:.3g}"] = test["calibrated"]["calibration"]
            calibration.keep_temperature(directory, step, flip, temperature)
        figures.save(partial(figures.draw_reliability, curves), directory / "reliability.png", "light", "white")
        print(f"written to {directory / 'eval.json'}")
    return report


def _describe(
    result: Evaluation, labels: np.ndarray, names: tuple[str, ...], temperature: float | None
) -> dict[str, Any]:
    """Return the report of a split: the result of `evaluate`, the accuracy by class, and the calibration.

    Balanced accuracy is the mean of the accuracies by class, and macro-F1 the mean of 2 TP / (2 TP + FP + FN), over the
    classes that have images.
    """
    correct, labelled, predicted = np.diag(result.confusion), result.confusion.sum(axis=1), result.confusion.sum(axis=0)
    per_class = correct / np.maximum(labelled, 1)
    seen = labelled > 0
    described = {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "balanced_accuracy": float(per_class[seen].mean()),
        "macro_f1": float((2 * correct / np.maximum(labelled + predicted, 1))[seen].mean()),
        "accuracy_per_class": dict(zip(names, per_class.tolist(), strict=True)),
        "confusion": result.confusion.tolist(),
        "calibration": calibration.calibration_report(result.logits, labels),
    }
    if temperature is not None:
        logits = result.logits / temperature
        described["calibrated"] = {
            "temperature": temperature,
            "loss": calibration.negative_log_likelihood(logits, labels),
            "calibration": calibration.calibration_report(logits, labels),
        }
    return described


def _as_text(report: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the report as text: one line per split, then the test split by class."""
    mirrored = ", each image and its mirror averaged" * report["flip"]
    lines = [f"checkpoint {report['checkpoint']}, step {report['checkpoint_step']}{mirrored}"]
    for split in ("validation", "test"):
        if split in report:
            of_split = report[split]
            error = of_split["calibration"]["expected_calibration_error"]
            lines.append(
                f"{split:<10}  loss {of_split['loss']:.4f}  accuracy {of_split['accuracy']:.2%}  "
                f"balanced {of_split['balanced_accuracy']:.2%}  macro-F1 {of_split['macro_f1']:.2%}  "
                f"calibration error {error:.2%}"
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
