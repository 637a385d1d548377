"""Figures of runs, drawn from their summaries. Runs that differ only in their seed form one group.

A group has the same colour and marker in every figure. Where groups can coincide, their markers alternate or stand side by side,
so that none hides another. Shares are shown in per cent.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter

Summary = dict[str, Any]

COLOURS = ("#3b7dd8", "#e0702a", "#2f9e62", "#b25bc2", "#a8841a", "#d6455d", "#2a93a6")  # legible on white and on black
NEUTRAL = "#8a8f98"  # of what belongs to no group
_MARKERS = "os^DvPX>"  # 8, so that 56 groups differ in colour or marker
_FEWEST = 10  # images at a point of a reliability diagram
_DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_LINES = {"train": ":", "validation": "-"}
_INK = {"light": "#1c2128", "dark": "#d7dde5"}
_SIZE = (4.6, 3.5)  # inches: text of 10 points stays legible at the width of a phone
_LONG_LABEL = 24  # characters; longer labels get a row of the legend each
_MAX_CELLS = 20  # classes of a confusion matrix with a number in each cell
_DEEPEST = 0.6  # opacity of a confusion matrix's darkest cell, on which text of either ink is legible


class Group(NamedTuple):
    """Runs of one config with several seeds.

    Attributes:
        name: the group's name.
        runs: their summaries, as `analysis.summarise` returns them.
        place: position among the groups of the page, which decides its colour and marker.
    """

    name: str
    runs: Sequence[Summary]
    place: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The config of the first seed."""
        config: dict[str, Any] = self.runs[0]["config"]
        return config

    @property
    def colour(self) -> str:
        """The group's colour in every figure."""
        return COLOURS[self.place % len(COLOURS)]

    @property
    def marker(self) -> str:
        """The group's marker in every figure."""
        return _MARKERS[self.place % len(_MARKERS)]

    def values(self, name: str) -> list[float]:
        """One value of every run's result, such as `test_accuracy`."""
        return [run[name] for run in self.runs]


def learning_rate(config: dict[str, Any], epoch: float) -> float:
    """The learning rate of the step that begins at `epoch`, by the formula of the config's schedule.

    It is written independently of `optim.make_schedule`, to check what the runs logged.
    """
    rate, schedule = config["optim"]["learning_rate"], config["schedule"]
    restarts = schedule.get("restart_epochs", ())
    start = max((e for e in restarts if e <= epoch), default=0)
    epoch, end = epoch - start, min(e for e in (*restarts, config["num_epochs"]) if e > start) - start
    if schedule["name"] == "step":
        return float(rate * schedule["decay_factor"] ** math.floor(epoch / schedule["decay_every_epochs"] + 1e-9))
    warmup = 0.0 if start else schedule["warmup_epochs"]
    if epoch < warmup:
        return float(rate * epoch / warmup)
    lowest = rate * schedule["min_ratio"]
    done = (epoch - warmup) / (end - warmup)
    decay = 1 - done if schedule["name"] == "warmup_linear" else (1 + math.cos(math.pi * done)) / 2
    return float(lowest + (rate - lowest) * decay)


def rows(run: Summary, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values) of one metric of a split."""
    points = [(r["epoch"], r[name]) for r in run["metrics"] if r["split"] == split and r.get(name) is not None]
    epochs, values = zip(*points, strict=True) if points else ((), ())
    return np.array(epochs), np.array(values)


def _mean_line(
    axes: Axes, group: Group, split: str, name: str, line: str, every: tuple[int, int] | None, label: str | None = None
) -> None:
    """Plot the mean over seeds with a band from the lowest to the highest; markers at `every` (first, step)."""
    curves = [dict(zip(*rows(run, split, name), strict=True)) for run in group.runs]
    epochs = sorted(set.intersection(*map(set, curves)))  # the runs of a group may log at different steps
    if not epochs:
        return
    values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
    marker = group.marker if every else None
    mean = values.mean(axis=0)
    axes.plot(epochs, mean, color=group.colour, ls=line, lw=1.5, marker=marker, ms=5, markevery=every, label=label)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=group.colour, alpha=0.2, lw=0)


def _side_by_side(groups: Sequence[Group]) -> Iterator[tuple[Group, float]]:
    """The groups, each with an offset in -0.3..0.3 at which it hides no other."""
    step = min(0.12, 0.6 / len(groups))
    for i, group in enumerate(groups):
        yield group, step * (i - (len(groups) - 1) / 2)


def new_axes(title: str, size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    """A figure of a size in inches, with axes under a title."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.25)
    return figure, axes


def show_percent(axis: Axis, label: str) -> None:
    """Label an axis of shares in 0..1 in per cent: 0.5 is shown as "50 %"."""
    axis.set_label_text(label)
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def add_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if any(len(label) > _LONG_LABEL for label in labels) else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _curves(groups: Sequence[Group], name: str) -> tuple[Figure, Axes]:
    """A value over epochs in training and validation, and in the test at the end."""
    figure, axes = new_axes(f"{name.capitalize()}: train dotted, validation solid, test star")
    for i, group in enumerate(groups):
        for split, line in _LINES.items():
            _mean_line(axes, group, split, name, line, (i, len(groups)) if split == "validation" else None)
        axes.plot([], [], color=group.colour, marker=group.marker, ms=5, label=group.name)
        for run in group.runs:
            axes.plot(*rows(run, "test", name), "*", color=group.colour, mfc="none", ms=8)
    axes.set(xlabel="epoch", ylabel=name)
    add_legend(figure, axes)
    return figure, axes


def draw_loss(groups: Sequence[Group]) -> Figure:
    """Loss over epochs."""
    return _curves(groups, "loss")[0]


def draw_accuracy(groups: Sequence[Group]) -> Figure:
    """Accuracy over epochs."""
    figure, axes = _curves(groups, "accuracy")
    show_percent(axes.yaxis, "accuracy")
    return figure


def draw_learning_rate(groups: Sequence[Group]) -> Figure:
    """The learning rates that the runs logged, on the schedule of their config."""
    figure, axes = new_axes("Learning rate: schedule as line, logged as points")
    for i, group in enumerate(groups):
        epochs = np.linspace(0, group.config["num_epochs"], 1000)[:-1]
        scheduled = [learning_rate(group.config, epoch) for epoch in epochs]
        axes.plot(epochs, scheduled, color=group.colour, lw=1.5, ls=_DASHES[i % len(_DASHES)])
        logged, rates = rows(group.runs[0], "train", "learning_rate")
        every = (i, len(groups)) if len(logged) > len(groups) else None
        axes.plot(logged, rates, group.marker, color=group.colour, ms=4, markevery=every, label=group.name)
    axes.set(xlabel="epoch", ylabel="learning rate")
    add_legend(figure, axes)
    return figure


def draw_optimizers(pairs: Sequence[tuple[Group, Group]]) -> Figure:
    """Test accuracy with SGD and with AdamW for each pair (SGD, AdamW), one point per seed and a bar at the mean."""
    figure, axes = new_axes("Test accuracy by optimizer, one point per seed")
    ticks = np.array([i + shift for i in range(len(pairs)) for shift in (-0.2, 0.2)])
    labelled = set()
    for x, group in zip(ticks, (group for pair in pairs for group in pair), strict=True):
        values = group.values("test_accuracy")
        label = None if group.name in labelled else group.name
        labelled.add(group.name)
        beside = x + 0.03 * (np.arange(len(values)) - (len(values) - 1) / 2)
        axes.plot(beside, values, group.marker, color=group.colour, alpha=0.7, label=label)
        axes.hlines(np.mean(values), x - 0.12, x + 0.12, color=group.colour, lw=2.5)
    axes.set_xticks(ticks, ["SGD", "AdamW"] * len(pairs), rotation=90 if len(pairs) > 4 else 0)
    axes.set(xlim=(-0.5, len(pairs) - 0.5))
    show_percent(axes.yaxis, "test accuracy")
    add_legend(figure, axes)
    return figure


def draw_grad_norm(groups: Sequence[Group]) -> Figure:
    """The global norm of the gradient over epochs."""
    figure, axes = new_axes("Global norm of the gradient")
    most = max(len(rows(group.runs[0], "train", "grad_norm")[0]) for group in groups)
    step = max(len(groups), most // 8)
    for i, group in enumerate(groups):
        _mean_line(axes, group, "train", "grad_norm", "-", (i * step // len(groups), step), group.name)
    axes.set(xlabel="epoch", ylabel="norm", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    add_legend(figure, axes)
    return figure


def _by_stage(groups: Sequence[Group], title: str, lines: dict[str, str], **settings: Any) -> tuple[Figure, Axes]:
    """Values of each stage's activations, means over seeds.

    Args:
        groups: the groups.
        title: of the figure.
        lines: name of a value -> style of its line; "none" for crosses without a line.
        settings: of the axes.
    """
    figure, axes = new_axes(title)
    names = list(dict.fromkeys(s["name"] for g in groups for s in g.runs[0]["analysis"]["stages"] if "rms" in s))
    for group, offset in _side_by_side(groups):
        for name, line in lines.items():
            by_stage: dict[str, list[float]] = {}
            for run in group.runs:
                for stage in run["analysis"]["stages"]:
                    if name in stage:
                        by_stage.setdefault(stage["name"], []).append(stage[name])
            places = [names.index(stage) + offset for stage in by_stage]
            values = [np.mean(values) for values in by_stage.values()]
            marker, label = ("x", None) if line == "none" else (group.marker, group.name)
            axes.plot(places, values, ls=line, color=group.colour, lw=1.2, marker=marker, ms=6, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set(**settings)
    add_legend(figure, axes)
    return figure, axes


def draw_scale(groups: Sequence[Group]) -> Figure:
    """The root mean square of each stage's output."""
    settings = {"ylabel": "root mean square", "ylim": (0, None)}
    return _by_stage(groups, "Scale of each stage's output", {"rms": "-"}, **settings)[0]


def draw_zeros(groups: Sequence[Group]) -> Figure:
    """The share of outputs of activations that are 0, and of channels that are 0 on every image."""
    title = "Activations: zero outputs as lines, dead channels as crosses"
    figure, axes = _by_stage(groups, title, {"zeros": "-", "dead": "none"}, ylim=(-0.03, 1))
    show_percent(axes.yaxis, "share")
    return figure


def draw_per_class(groups: Sequence[Group]) -> Figure:
    """Test accuracy of each class."""
    names = groups[0].runs[0]["analysis"]["class_names"]
    figure, axes = new_axes("Test accuracy by class", (_SIZE[0], max(_SIZE[1], 0.34 * len(names) + 1.2)))
    for group, offset in _side_by_side(groups):
        confusion = _confusion(group)
        accuracies = _shares(confusion).diagonal()  # nan is not drawn
        axes.plot(
            accuracies,
            np.arange(len(names)) + offset,
            group.marker,
            color=group.colour,
            ms=5,
            label=group.name,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    show_percent(axes.xaxis, "test accuracy")
    add_legend(figure, axes)
    return figure


def _confusion(group: Group) -> np.ndarray:
    """Counts over all seeds: [num_classes, num_classes], row the label."""
    return np.sum([run["analysis"]["confusion"] for run in group.runs], axis=0)


def _shares(confusion: np.ndarray) -> np.ndarray:
    """Each row of counts divided by its sum; nan for a class without images."""
    totals = confusion.sum(axis=1, keepdims=True)
    return np.divide(confusion, totals, out=np.full(confusion.shape, np.nan), where=totals > 0)


def draw_confusion(group: Group) -> Figure:
    """The confusion matrix of a group, in per cent of each label's images, in the group's colour."""
    names = group.runs[0]["analysis"]["class_names"]
    confusion = _confusion(group)
    shares = _shares(confusion)
    figure, axes = new_axes(f"Confusion, %: {group.name}", (_SIZE[0], _SIZE[0]))
    shades = [to_rgba(group.colour, 0), to_rgba(group.colour, _DEEPEST)]
    axes.imshow(shares, cmap=LinearSegmentedColormap.from_list(group.name, shades), vmin=0, vmax=1)
    axes.grid(visible=False)
    if len(names) <= _MAX_CELLS:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for (i, j), share in np.ndenumerate(shares):
            axes.text(j, i, "-" if np.isnan(share) else f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def draw_architecture(stages: Sequence[dict[str, Any]]) -> Figure:
    """The stages of a network, each with the shape of its output and its number of parameters."""
    figure, axes = new_axes(
        f"{sum(stage['num_params'] for stage in stages):,} parameters", (_SIZE[0], 0.55 * len(stages) + 0.5)
    )
    most = max(stage["num_params"] for stage in stages)
    for i, stage in enumerate(stages):
        for width, style in (
            (10, {"fc": "none", "ec": NEUTRAL}),
            (10 * stage["num_params"] / most, {"fc": NEUTRAL, "ec": "none", "alpha": 0.4}),
        ):
            axes.add_patch(FancyBboxPatch((0, -i - 0.36), width, 0.72, boxstyle="round,pad=0.02", **style))
        counted = {None: "", 0: ", no block", 1: ", 1 block"}.get(stage["blocks"], f", {stage['blocks']} blocks")
        axes.text(0.25, -i, stage["name"] + counted, va="center", weight="bold")
        axes.text(7.2, -i, " x ".join(map(str, stage["shape"])), va="center", ha="right")
        axes.text(9.75, -i, f"{stage['num_params']:,}", va="center", ha="right")
    axes.set(xlim=(-0.1, 10.1), ylim=(-len(stages) + 0.5, 0.5))
    axes.axis("off")
    return figure


def merged_bins(bins: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """The bins of a reliability diagram as (count, confidence, accuracy); those of fewer than 10 images join the next.

    The last joins the one before. An accuracy of fewer images says nothing, and draws the eye.

    Args:
        bins: of `calibration.calibration_report`, by confidence.
    """
    merged: list[tuple[int, float, float]] = []
    for i, b in enumerate(bins):
        new = b["count"], b["confidence"], b["accuracy"]
        if merged and (merged[-1][0] < _FEWEST or (new[0] < _FEWEST and i == len(bins) - 1)):
            before = merged.pop()
            count = before[0] + new[0]
            means = [(before[0] * old + new[0] * value) / count for old, value in zip(before[1:], new[1:], strict=True)]
            new = count, means[0], means[1]
        merged.append(new)
    return merged


def draw_reliability(curves: Mapping[str, dict[str, Any]]) -> Figure:
    """Accuracy by confidence, with the number of images at each point. A calibrated network follows the diagonal.

    Args:
        curves: name -> what `calibration.calibration_report` returns.
    """
    figure, axes = new_axes("Reliability on the test split")
    axes.plot([0, 1], [0, 1], ":", color=NEUTRAL)
    for i, (name, report) in enumerate(curves.items()):
        label = f"{name}: calibration error {100 * report['expected_calibration_error']:.2f} %"
        counts, confidences, accuracies = zip(*merged_bins(report["bins"]), strict=True)
        axes.plot(confidences, accuracies, f"{_MARKERS[i]}-", color=COLOURS[i], ms=5, label=label)
        for count, x, y in zip(counts, confidences, accuracies, strict=True):
            place: dict[str, Any] = {"xytext": (0, 5 if i % 2 else -10), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{count:,}", (x, y), color=COLOURS[i], fontsize=6, **place)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    show_percent(axes.xaxis, "confidence")
    show_percent(axes.yaxis, "accuracy")
    add_legend(figure, axes)
    return figure


def save(
    draw: Callable[[], Figure],
    path: Path,
    ink: str,
    background: str = "none",
    metadata: Mapping[str, str | None] | None = None,
) -> Path:
    """Draw a figure into a file.

    Args:
        draw: draws the figure.
        path: of the file; its suffix names the format.
        ink: "light" or "dark", the page that the text is to be legible on.
        background: colour behind the figure.
        metadata: texts that a PNG carries.
    """
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(names, _INK[ink])
    settings |= {
        "axes.facecolor": "none",  # the page's own background shows through
        "svg.fonttype": "none",
        "svg.hashsalt": path.stem,
        "font.family": "sans-serif",
        "text.parse_math": False,
        "axes.titlesize": 10,
    }
    with rc_context(settings):
        metadata = {"Date": None} if path.suffix == ".svg" else metadata
        draw().savefig(path, dpi=180, facecolor=background, metadata=metadata)
    return path
