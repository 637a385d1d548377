"""A page about runs: their curves, networks, confusion matrices and mistakes.

    python -m resnet_jax report RUN [RUN ...] --output DIR

RUN is the workdir of a complete run, or its summary. `python -m resnet_jax report RUN --summary FILE` writes the summary of a
workdir, so that the page can be rebuilt without data and checkpoints. Runs that differ only in their seed form a group.
DIR/index.html is self-contained; DIR/figures holds each figure as PNG and SVG.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.reporting import figures, pages, statistics
from resnet_jax.reporting.figures import Group, Summary
from resnet_jax.reporting.pages import Picture
from resnet_jax.runs import stored_config

# Fields that all optimizers have, and that are no part of one.
_OPTIM_FIELDS = {"optim.backbone_rate", "optim.decay_mask", "optim.max_grad_norm", "optim.ema_decay"}
_SUMMARY_KEYS = (
    *("config", "dataset", "environment", "num_params", "test_accuracy", "test_loss", "seconds", "steps"),
    *("metrics", "analysis"),
)
_ROWS = {  # the metrics in each row, by split
    "train": ("loss", "accuracy", "learning_rate", "grad_norm"),
    "validation": ("loss", "accuracy"),
    "test": ("loss", "accuracy"),
}


def read_run(path: Path) -> tuple[str, Summary]:
    """The name and summary of a run. A workdir is analysed; a file is read.

    Raises:
        UserError: if the run is not complete, or the file is not a summary.
    """
    if path.is_dir():
        from resnet_jax.reporting import analysis  # only here, because JAX takes seconds to import

        with redirect_stdout(StringIO()):  # what restoring a run prints
            return path.absolute().name, analysis.summarise(path)
    summary = files.read_json(path, _SUMMARY_KEYS, "give the workdir of a complete run, or its summary")
    try:
        stored_config.from_json(summary["config"])
        _check(summary)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the summary of a run ({error!r}): write it again with --summary") from error
    return path.stem, summary


def _check(summary: Summary) -> None:
    """Read every value that is drawn, so that a wrong file is detected before anything is written."""
    analysis, classes = summary["analysis"], len(summary["analysis"]["class_names"])
    if np.array(analysis["confusion"], np.int64).shape != (classes, classes):
        raise ValueError("the size of the confusion matrix is not the number of classes")
    for row in summary["metrics"]:
        for name in ("epoch", "step", *_ROWS[row["split"]]):
            _ = float(row[name])
    if not analysis["stages"]:
        raise ValueError("the network has no stages")
    for stage in analysis["stages"]:
        _ = stage["name"], stage["blocks"], int(stage["num_params"]), list(stage["shape"])
        _ = [float(stage[name]) for name in ("rms", "zeros", "dead") if stage.get(name) is not None]
    for mistake in analysis["mistakes"]:
        _ = analysis["class_names"][mistake["label"]], analysis["class_names"][mistake["prediction"]]
        _ = mistake["index"], float(mistake["probability"]), base64.b64decode(mistake["png"], validate=True)
    _ = (
        float(summary["test_accuracy"]),
        float(summary["test_loss"]),
        float(summary["seconds"]),
        int(summary["num_params"]),
        summary["dataset"]["fingerprint"],
        pages.machine(summary["environment"]),
    )


def grouped(runs: Sequence[tuple[str, Summary]]) -> list[Group]:
    """The runs grouped by config and kind of device, in the order in which they first appear, each group's runs by seed.

    Raises:
        UserError: if two runs of a group have the same seed.
    """
    by_config: dict[str, dict[int, tuple[str, Summary]]] = {}
    for name, run in runs:
        seed = run["config"]["seed"]
        by_seed = by_config.setdefault(json.dumps(_but_for_seed(run), sort_keys=True), {})
        if seed in by_seed:
            raise UserError(
                f"{name} and {by_seed[seed][0]} have the same config and seed, on the same kind of device: give only one of them"
            )
        by_seed[seed] = name, run
    groups = []
    for place, by_seed in enumerate(by_config.values()):
        name = re.sub(r"[-_.]?seed[-_]?\d+$", "", min(by_seed.items())[1][0]) or "run"
        groups.append(Group(name, [run for _, (_, run) in sorted(by_seed.items())], place))
    names = [group.name for group in groups]
    return [
        group if names.count(group.name) == 1 else group._replace(name=f"{group.name} ({i + 1})")
        for i, group in enumerate(groups)
    ]


def _but_for_seed(run: Summary) -> dict[str, Any]:
    """All that decides what a run computes but its seed: config, data and kind of device."""
    fields = stored_config.deciding(run["config"])
    del fields["seed"], fields["data.name"]  # the fingerprint identifies the data
    return fields | {"fingerprint": run["dataset"]["fingerprint"], "backend": run["environment"]["backend"]}


def optimizer_pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Pairs of groups (SGD, AdamW) that differ only in schedule and the optimizer's own fields."""

    def rest(group: Group) -> dict[str, Any]:
        fields = _but_for_seed(group.runs[0])
        return {k: v for k, v in fields.items() if k in _OPTIM_FIELDS or k.split(".")[0] not in ("optim", "schedule")}

    by_name = {name: [g for g in groups if g.config["optim"]["name"] == name] for name in ("sgd", "adamw")}
    return [(sgd, adamw) for sgd in by_name["sgd"] for adamw in by_name["adamw"] if rest(sgd) == rest(adamw)]


def pictures(groups: Sequence[Group]) -> list[Picture]:
    """The figures that can be drawn for these groups."""
    drawn = [
        Picture("accuracy", "Accuracy by epoch: mean and range over seeds.", partial(figures.draw_accuracy, groups)),
        Picture("loss", "Loss by epoch: mean and range over seeds.", partial(figures.draw_loss, groups)),
        Picture("learning_rate", _schedule_caption(groups), partial(figures.draw_learning_rate, groups)),
        Picture(
            "grad_norm",
            "Global norm of the gradient by epoch: mean and range over seeds.",
            partial(figures.draw_grad_norm, groups),
        ),
        Picture("scale", "Activations on the test images, by stage.", partial(figures.draw_scale, groups)),
        Picture("zeros", "A dead channel is 0 on every test image.", partial(figures.draw_zeros, groups)),
        *_by_data(groups),
    ]
    if pairs := optimizer_pairs(groups):
        caption = "SGD against AdamW with everything else equal; the bar is the mean."
        drawn.insert(0, Picture("optimizers", caption, partial(figures.draw_optimizers, pairs)))
    architectures: dict[str, tuple[list[str], Any]] = {}
    for group in groups:
        stages = group.runs[0]["analysis"]["stages"]
        shown = json.dumps([[s["name"], s["blocks"], s["shape"], s["num_params"]] for s in stages])
        architectures.setdefault(shown, ([], stages))[0].append(group.name)
    for i, (names, stages) in enumerate(architectures.values(), start=1):
        caption = f"Network by stage, with output shape and number of parameters: {', '.join(names)}."
        drawn.append(Picture(f"architecture{i}", caption, partial(figures.draw_architecture, stages)))
    for i, group in enumerate(groups, start=1):
        caption = "Per cent of the test images of each true class, over all seeds."
        drawn.append(Picture(f"confusion{i}", caption, partial(figures.draw_confusion, group)))
    return drawn


def _by_data(groups: Sequence[Group]) -> list[Picture]:
    """One figure of accuracy by class for each set of classes."""
    by_classes: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        by_classes.setdefault(tuple(group.runs[0]["analysis"]["class_names"]), []).append(group)
    return [
        Picture(f"per_class{i}", "Test accuracy by class, over all seeds.", partial(figures.draw_per_class, same))
        for i, same in enumerate(by_classes.values(), start=1)
    ]


def _schedule_caption(groups: Sequence[Group]) -> str:
    """The largest difference between the logged learning rates and the schedule."""
    largest = 0.0
    for group in groups:
        config = group.config
        for run in group.runs:
            for row in run["metrics"]:
                if row["split"] == "train":
                    epoch = row["epoch"] * (row["step"] - 1) / row["step"]  # at which the row's last step began
                    expected = figures.learning_rate(config, epoch)
                    largest = max(largest, abs(row["learning_rate"] - expected) / config["optim"]["learning_rate"])
    shown = np.format_float_positional(100 * largest, precision=1, fractional=False, trim="-")
    return f"Learning rate by epoch. Logged values and schedule differ by at most {shown} % of the peak."


def build(
    runs: Sequence[tuple[str, Summary]],
    directory: Path,
    claims: Callable[[Sequence[Group]], Sequence[Any]] = lambda groups: (),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the page and its figures into a new or empty folder, or replace an earlier page. It writes all or nothing.

    Args:
        runs: (name, summary) of each run.
        directory: the folder to write.
        claims: claims to compare with what the groups measured: rows of `claim`, `measured`, `basis`, `verdict`.
        notes: name of a picture, without its number -> sentence to add to its caption.
    """
    groups = grouped(runs)
    with pages.writing(directory) as folder:
        (folder / "index.html").write_text(_page(groups, claims(groups), notes, folder / "figures"), "utf-8")


def _page(groups: Sequence[Group], claims: Sequence[Any], notes: Mapping[str, str], folder: Path) -> str:
    """The page. Its figures are drawn into `folder`."""
    shown = []
    for picture in pictures(groups):
        note = notes.get(picture.name.rstrip("0123456789"), "")
        shown.append(picture._replace(caption=f"{picture.caption} {note}".strip()))
    return pages.render(
        "report.html",
        shown,
        [run["environment"] for group in groups for run in group.runs],
        folder,
        groups=groups,
        spread=statistics.mean_and_spread,
        mean=np.mean,
        claims=claims,
    )


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m resnet_jax report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=command_line.local_path, metavar="RUN", help="workdir of a complete run, or its summary"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=command_line.local_path, metavar="DIR", help="folder to write the page to")
    target.add_argument(
        "--summary", type=command_line.local_path, metavar="FILE", help="write the one RUN's summary instead"
    )
    arguments = parser.parse_args(argv)
    if arguments.summary:
        if len(arguments.runs) > 1:
            raise UserError("--summary takes one RUN")
        pages.check_summary(arguments.summary, _SUMMARY_KEYS, "run")
        files.write_json(arguments.summary, read_run(arguments.runs[0])[1])
        print(arguments.summary)
        return
    pages.check_output(arguments.output)
    build([read_run(path) for path in arguments.runs], arguments.output)
    print(arguments.output / "index.html")
