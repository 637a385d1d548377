"""Evaluate a checkpoint of a run and report on it: the tool `eval`."""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import steps
from resnet_jax.data import datasets
from resnet_jax.disk import files
from resnet_jax.errors import UserError, one_line
from resnet_jax.evaluate import Evaluation, evaluate
from resnet_jax.inference import calibration, trained_model
from resnet_jax.inference.restore import restore_run
from resnet_jax.reporting import figures
from resnet_jax.runs import environment, workdir
from resnet_jax.runs.progress import waiting


def run(
    config: ConfigDict, directory: Path, which: str, views: int = 1, fit_temperature: bool = False
) -> dict[str, Any]:
    """Restore a checkpoint, evaluate it on validation and test, print the report, write `eval.json` and `reliability.png`.

    With two or six views these are `eval-2-views.json`, `reliability-2-views.png` and so on.

    Args and errors are those of `restore_run`, and:
        views: how many views of each image to average: `steps.average_over_views`.
        fit_temperature: on the validation split; keep it in `temperature.json` for `load` if it helps on held-out images.

    Returns:
        What `eval.json` holds.
    """
    _warn_of_mirrors(config, views)
    workdir.check_writable(directory)
    run_setup, state, step = restore_run(config, directory, which)
    config = run_setup.config
    if fit_temperature and not len(run_setup.validation.labels):
        raise UserError("--fit-temperature needs a validation split, and the run has none: leave it out")
    eval_step = steps.jit_eval_step(config, run_setup.mesh, views)
    report: dict[str, Any] = {
        "checkpoint": which,
        "checkpoint_step": step,
        "views": views,
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
                temperature = _fitted_temperature(result.logits, split.labels)
            report[name] = _describe(result, split.labels, names, temperature)
    if jax.process_index() == 0:
        print(_as_text(report, names))
        kind = _kind(views)
        files.write_json(directory / f"eval{kind}.json", report)
        test = report["test"]
        curves = {"uncalibrated": test["calibration"]}
        if temperature is not None:
            curves[f"at temperature {temperature:.3g}"] = test["calibrated"]["calibration"]
        if fit_temperature:
            calibration.keep_temperature(directory, step, views, temperature)
        figures.save(partial(figures.draw_reliability, curves), directory / f"reliability{kind}.png", "light", "white")
        print(f"written to {directory / f'eval{kind}.json'}")
    return report


def _fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature of a validation split; None, and say so, if it would not help on other images."""
    temperature = calibration.fit_temperature(logits, labels)
    if calibration.temperature_helps(logits, labels):
        return temperature
    if jax.process_index() == 0:
        print(f"the temperature {temperature:.3g} does not lower the loss of held-out images: it is not kept")
    return None


def _warn_of_mirrors(config: ConfigDict, views: int) -> None:
    if views > 1 and not config.augment.flip_probability and jax.process_index() == 0:
        print(
            f"warning: --views={views} mirrors images, but the run was trained without mirrored ones", file=sys.stderr
        )


def _kind(views: int) -> str:
    """Return what the names of an evaluation's files end in."""
    return f"-{views}-views" if views > 1 else ""


def run_on(config: ConfigDict, directory: Path, which: str, data: str, views: int = 1) -> dict[str, Any]:
    """Evaluate a checkpoint of a run on another labelled set, print the report, and write it to a file of its own.

    Args:
        config: the run's config.
        directory: the run's workdir, whose other files stay as they are.
        which: "best", "latest" or a step.
        data: names the set, as `config.data.name` does; its images are scaled to the size of the run's.
        views: how many views of each image to average: `steps.average_over_views`.

    Returns:
        What the file holds: as `eval.json`, with that set as "test".

    Raises:
        UserError: if the run or the data cannot be read, or the data have other classes or an image size that does not fit.
    """
    _warn_of_mirrors(config, views)
    workdir.check_writable(directory)
    model = trained_model.load(directory, which)
    kind, _, path = data.partition(":")
    height, width, _ = model.image_shape
    size = 0 if height != width or kind == "npz" else height
    waiting(f"loading {data}")
    settings = config_lib.replaced(config, {"data.name": data, "data.image_size": size}).data
    split, names, fingerprint, part = datasets.load_labelled(settings)
    for what, extra in (("lacks", set(model.class_names) - set(names)), ("adds", set(names) - set(model.class_names))):
        if extra:
            raise UserError(f"--data {data} has other classes than the run: it {what} {', '.join(sorted(extra)[:5])}")
    if split.images.shape[1:] != model.image_shape:
        raise UserError(
            f"--data {data} has images of {split.images.shape[1:]}, and the run {model.image_shape}: scale them to that size"
        )
    labels = np.array([model.class_names.index(name) for name in names], np.int32)[split.labels]
    waiting(f"evaluating {len(labels):,} images of {data} ({'all' if part == 'train' else f'its {part} images'})")
    parts = range(0, len(labels), trained_model.LARGEST_BATCH)  # images on disk may not fit in memory
    logits = np.concatenate([model.logits(split.images[i : i + trained_model.LARGEST_BATCH], views) for i in parts])
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    loss = calibration.negative_log_likelihood(logits, labels)
    result = Evaluation(loss, int(np.trace(confusion)) / len(labels), confusion, logits)
    report = {
        "checkpoint": which,
        "checkpoint_step": model.step,
        "views": views,
        "dataset": {"name": data, "fingerprint": fingerprint, "splits": {"test": len(labels)}},
        "environment": environment.collect(),
        "test": _describe(result, labels, model.class_names, None),
    }
    print(_as_text(report, model.class_names))
    label = Path(os.path.realpath(path)).name.removesuffix(".npz") if kind in ("npz", "folder") else data
    file = directory / f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{fingerprint[:8]}{_kind(views)}.json"
    files.write_json(file, report)
    print(f"written to {file}")
    return report


def _describe(
    result: Evaluation, labels: np.ndarray, names: tuple[str, ...], temperature: float | None
) -> dict[str, Any]:
    """Return the report of a split: the result of `evaluate`, the accuracy by class, and the calibration.

    The accuracy of a class without images is None.
    Balanced accuracy is the mean of the accuracies by class, and macro-F1 the mean of 2 TP / (2 TP + FP + FN), over the
    classes that have images.
    """
    correct, labelled, predicted = np.diag(result.confusion), result.confusion.sum(axis=1), result.confusion.sum(axis=0)
    seen = labelled > 0
    per_class = [int(hits) / int(count) if count else None for hits, count in zip(correct, labelled, strict=True)]
    described = {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "balanced_accuracy": float((correct[seen] / labelled[seen]).mean()),
        "macro_f1": float((2 * correct / np.maximum(labelled + predicted, 1))[seen].mean()),
        "accuracy_per_class": dict(zip(names, per_class, strict=True)),
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
    averaged = {1: "", 2: ", each image and its mirror averaged", 6: ", six views of each image averaged"}[
        report["views"]
    ]
    lines = [f"checkpoint {report['checkpoint']}, step {report['checkpoint_step']}{averaged}"]
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
    width = max(len(one_line(name)) for name in names)
    cell = max(len(str(n)) for row in report["test"]["confusion"] for n in row) + 1
    matrix = len(names) <= 20
    confusion = "confusion (row: label, column: prediction, in the same order)" if matrix else ""
    lines.append(f"\n{'test':<{width}}  accuracy  {confusion}")
    for name, row in zip(names, report["test"]["confusion"], strict=True):
        accuracy = report["test"]["accuracy_per_class"][name]
        shown = "-" if accuracy is None else f"{accuracy:.2%}"
        lines.append(f"{one_line(name):<{width}}  {shown:>8}  " + "".join(f"{n:>{cell}}" for n in row if matrix))
    return "\n".join(lines)
