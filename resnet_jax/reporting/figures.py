"""The report's figures, drawn from summaries of runs; runs that differ in their seed alone are drawn as one group."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

Summary = dict[str, Any]


class Group(NamedTuple):
    """Runs of one config with several seeds.

    Attributes:
        name: of the group.
        runs: their summaries, as `analysis.summarise` gives them.
    """

    name: str
    runs: Sequence[Summary]

    @property
    def config(self) -> dict[str, Any]:
        """The config, of the first seed."""
        config: dict[str, Any] = self.runs[0]["config"]
        return config

    def values(self, figure: str) -> list[float]:
        """A figure of every run's result."""
        return [run[figure] for run in self.runs]


COLOURS = ("#3b7dd8", "#e0702a", "#2f9e62", "#b25bc2", "#c9a227", "#d6455d", "#4bb3c4", "#8a8f98")
_LINES = {"train": ":", "validation": "-"}
_INK = {"light": "#1c2128", "dark": "#d7dde5"}
_SIZE = (5.2, 3.7)  # inches: letters of 10 points stay legible at the width of a phone
_MOST_CELLS = 20  # classes of a confusion matrix whose counts are written into it


def learning_rate(config: dict[str, Any], epoch: float) -> float:
    """The report's formulas (section 2d), written once more for comparison: the rate of the step that begins at an epoch."""
    rate, schedule = config["optim"]["learning_rate"], config["schedule"]
    if schedule["name"] == "step":
        return float(rate * schedule["decay_factor"] ** math.floor(epoch / schedule["decay_every_epochs"] + 1e-9))
    if epoch < schedule["warmup_epochs"]:
        return float(rate * epoch / schedule["warmup_epochs"])
    lowest = rate * schedule["min_ratio"]
    done = (epoch - schedule["warmup_epochs"]) / (config["num_epochs"] - schedule["warmup_epochs"])
    return float(lowest + (rate - lowest) / 2 * (1 + math.cos(math.pi * done)))


def rows(run: Summary, split: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values) of a figure in the rows of a split."""
    points = [(r["epoch"], r[figure]) for r in run["metrics"] if r["split"] == split and r.get(figure) is not None]
    epochs, values = zip(*points, strict=True) if points else ((), ())
    return np.array(epochs), np.array(values)


def _band(axes: Axes, group: Group, split: str, figure: str, colour: str, line: str, label: str | None = None) -> None:
    """The mean over seeds, and the range of them."""
    curves = [rows(run, split, figure) for run in group.runs]
    length = min(len(epochs) for epochs, _ in curves)
    if not length:
        return
    epochs = curves[0][0][:length]
    values = np.stack([values[:length] for _, values in curves])
    axes.plot(epochs, values.mean(axis=0), color=colour, ls=line, lw=1.5, label=label)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)


def new_axes(title: str, size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    """A figure with axes under a title; its size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def add_legend(figure: Figure, axes: Axes) -> None:
    """The labels in rows below the axes, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)


def _curves(groups: Sequence[Group], quantity: str) -> Figure:
    """A quantity over epochs, in training and validation, and on test at the end."""
    figure, axes = new_axes(f"{quantity.capitalize()}: dotted train, line validation, star test")
    for group, colour in zip(groups, _colours(groups), strict=True):
        for split, line in _LINES.items():
            _band(axes, group, split, quantity, colour, line)
        axes.plot([], [], color=colour, label=group.name)
        for run in group.runs:
            axes.plot(*rows(run, "test", quantity), "*", color=colour, ms=8)
    axes.set(xlabel="epoch", ylabel=quantity)
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def _colours(groups: Sequence[Group]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(groups))]


def draw_loss(groups: Sequence[Group]) -> Figure:
    """The report's figure 4."""
    return _curves(groups, "loss")


def draw_accuracy(groups: Sequence[Group]) -> Figure:
    """The report's figure 5."""
    return _curves(groups, "accuracy")


def draw_learning_rate(groups: Sequence[Group]) -> Figure:
    """The report's figure 3: what the runs logged, on the formula."""
    figure, axes = new_axes("Learning rate: line the formula, points the runs")
    for group, colour in zip(groups, _colours(groups), strict=True):
        epochs = np.linspace(0, group.config["num_epochs"], 1000)[:-1]
        axes.plot(epochs, [learning_rate(group.config, epoch) for epoch in epochs], color=colour, lw=1)
        logged, rates = rows(group.runs[0], "train", "learning_rate")
        axes.plot(logged, rates, ".", color=colour, ms=5, label=group.name)
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def draw_optimizers(pairs: Sequence[tuple[Group, Group]]) -> Figure:
    """The report's figures 1 and 2: test accuracy by SGD and by AdamW, all else alike, each seed a point."""
    figure, axes = new_axes("Test accuracy by optimizer, a point a seed")
    for i, pair in enumerate(pairs):
        for group, shift, colour in zip(pair, (-0.15, 0.15), COLOURS, strict=False):
            values = group.values("test_accuracy")
            axes.plot([i + shift] * len(values), values, "o", color=colour, alpha=0.7)
            axes.hlines(np.mean(values), i + shift - 0.1, i + shift + 0.1, color=colour, lw=2.5)
    axes.plot([], [], "o", color=COLOURS[0], label="SGD")
    axes.plot([], [], "o", color=COLOURS[1], label="AdamW")
    axes.set_xticks(range(len(pairs)), [f"{sgd.name}\n{adamw.name}" for sgd, adamw in pairs])
    axes.set(xlim=(-0.5, len(pairs) - 0.5), ylabel="test accuracy")
    axes.grid(alpha=0.25, axis="y")
    add_legend(figure, axes)
    return figure


def draw_grad_norm(groups: Sequence[Group]) -> Figure:
    """The gradient's global norm over time."""
    figure, axes = new_axes("Gradient's global norm")
    for group, colour in zip(groups, _colours(groups), strict=True):
        _band(axes, group, "train", "grad_norm", colour, "-", group.name)
    axes.set(xlabel="epoch", ylabel="norm", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def _by_stage(groups: Sequence[Group], title: str, figures: dict[str, str], **axes_settings: Any) -> Figure:
    """Figures of each stage's activations, means over seeds; each figure has a line of its own style."""
    figure, axes = new_axes(title)
    for group, colour in zip(groups, _colours(groups), strict=True):
        for (name, line), first in zip(figures.items(), (True, False), strict=False):
            stages = [s for s in group.runs[0]["analysis"]["stages"] if name in s]
            values = [
                np.mean(
                    [s[name] for run in group.runs for s in run["analysis"]["stages"] if s["name"] == stage["name"]]
                )
                for stage in stages
            ]
            label = group.name if first else None
            axes.plot([s["name"] for s in stages], values, line, color=colour, label=label, lw=1.5, ms=6)
    axes.set(**axes_settings)
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def draw_scale(groups: Sequence[Group]) -> Figure:
    """The scale of each stage's output."""
    return _by_stage(groups, "Scale of each stage's output", {"rms": "o-"}, ylabel="root mean square", ylim=(0, None))


def draw_relus(groups: Sequence[Group]) -> Figure:
    """The share of ReLU outputs that are 0, and of channels that always are."""
    title = "ReLU: line share of zeros, crosses of dead channels"
    return _by_stage(groups, title, {"zeros": "o-", "dead": "x:"}, ylabel="share", ylim=(-0.03, 1))


def draw_per_class(groups: Sequence[Group]) -> Figure:
    """Test accuracy of each class."""
    names = groups[0].runs[0]["analysis"]["class_names"]
    figure, axes = new_axes("Test accuracy by class", (5.2, max(3.7, 0.34 * len(names) + 1.2)))
    for group, colour in zip(groups, _colours(groups), strict=True):
        confusion = _confusion(group)
        axes.plot(np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1), names, "o", color=colour, label=group.name)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy")
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def _confusion(group: Group) -> np.ndarray:
    """Counts over all seeds: [num_classes, num_classes], row the label."""
    return np.sum([run["analysis"]["confusion"] for run in group.runs], axis=0)


def draw_confusion(group: Group) -> Figure:
    """The confusion matrix of a group, in shares of each label's images."""
    names = group.runs[0]["analysis"]["class_names"]
    confusion = _confusion(group)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure, axes = new_axes(f"Confusion, %: {group.name}", (5.2, 5.0))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _MOST_CELLS:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for (i, j), share in np.ndenumerate(shares):
            ink = "white" if share > 0.5 else "#1c2128"
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=7.5)
    axes.set(xlabel="prediction", ylabel="label")
    return figure


def draw_architecture(stages: Sequence[dict[str, Any]]) -> Figure:
    """The report's figure 6: the stages of a network, each with its output's shape and its parameters."""
    figure, axes = new_axes(
        f"{sum(stage['num_params'] for stage in stages):,} parameters", (5.2, 0.62 * len(stages) + 0.5)
    )
    most = max(stage["num_params"] for stage in stages)
    for i, stage in enumerate(stages):
        share = stage["num_params"] / most
        box = FancyBboxPatch((0, -i - 0.36), 10, 0.72, boxstyle="round,pad=0.02", fc="none", ec=COLOURS[7])
        axes.add_patch(box)
        axes.add_patch(
            FancyBboxPatch((0, -i - 0.36), 10 * share, 0.72, boxstyle="round,pad=0.02", fc=COLOURS[0], alpha=0.3)
        )
        blocks = {None: "", 0: ", no block: identity", 1: ", 1 block"}.get(
            stage["blocks"], f", {stage['blocks']} blocks"
        )
        shape = "x".join(map(str, stage["shape"]))
        axes.text(0.25, -i, stage["name"] + blocks, va="center", weight="bold")
        axes.text(6.9, -i, shape, va="center", ha="right")
        axes.text(9.75, -i, f"{stage['num_params']:,}", va="center", ha="right")
    axes.set(xlim=(-0.1, 10.1), ylim=(-len(stages) + 0.5, 0.5))
    axes.axis("off")
    return figure


def draw_reliability(curves: Mapping[str, dict[str, Any]]) -> Figure:
    """Accuracy by confidence, a curve for each of what `calibration.calibration_report` gives, by name; a calibrated network's is the diagonal."""
    figure, axes = new_axes("Reliability on the test split")
    axes.plot([0, 1], [0, 1], ":", color=COLOURS[7])
    for (name, found), colour in zip(curves.items(), COLOURS, strict=False):
        label = f"{name}, error {100 * found['expected_calibration_error']:.2f} %"
        axes.plot(
            [b["confidence"] for b in found["bins"]],
            [b["accuracy"] for b in found["bins"]],
            "o-",
            color=colour,
            label=label,
        )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def save(draw: Callable[[], Figure], path: Path, ink: str, background: str = "none") -> Path:
    """Draw a figure in the ink of "light" or "dark" pages into a file, of the kind its suffix names."""
    colour = _INK[ink]
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(names, colour)
    settings |= {
        "svg.fonttype": "none",
        "svg.hashsalt": path.stem,
        "font.family": "sans-serif",
        "text.parse_math": False,
        "axes.titlesize": 10,
    }
    with rc_context(settings):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw().savefig(path, dpi=160, facecolor=background, metadata=metadata)
    return path
