"""The figures of a search."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from resnet_jax import config as config_lib
from resnet_jax.reporting.figures import COLOURS, add_legend, new_axes
from resnet_jax.search import STAGES, space, summary
from resnet_jax.search.summary import Summary

_COLOUR_OF = dict(zip(STAGES, COLOURS, strict=False))
_LABELS = {"num_params": "parameters", "seconds_per_epoch": "seconds an epoch"}


def draw_history(found: Summary) -> Figure:
    """Validation accuracy of the trials in the order in which they began, and the best so far."""
    figure, axes = new_axes("Validation accuracy, trial by trial")
    first, best, so_far = 0, -np.inf, []
    for stage, rows in found["trials"].items():
        ended = [(first + row["number"], row["accuracy"]) for row in rows if row["accuracy"] is not None]
        left = [
            (first + r["number"], r["validations"][-1]) for r in rows if r["state"] != "complete" and r["validations"]
        ]
        axes.plot(*_columns(ended), "o", color=_COLOUR_OF[stage], label=stage)
        axes.plot(*_columns(left), "x", color=_COLOUR_OF[stage], alpha=0.6)
        for trial, accuracy in ended if stage != "confirm" else []:
            best = max(best, accuracy)
            so_far.append((trial, best))
        first += max((row["number"] for row in rows), default=-1) + 1
    axes.step(*_columns(so_far), where="post", color=COLOURS[7], lw=1, label="best so far")
    axes.plot([], [], "x", color=COLOURS[7], label="ended early, at its last")
    axes.set(xlabel="trial", ylabel="validation accuracy")
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[Sequence[float], Sequence[float]]:
    return ([x for x, _ in points], [y for _, y in points])


def draw_importances(found: Summary, stage: str) -> Figure:
    """The share of the variance of accuracy that each parameter of a stage explains."""
    shares = sorted(found["importances"][stage].items(), key=lambda item: item[1])
    figure, axes = new_axes(f"What accuracy depends on: {stage}", (5.2, max(2.2, 0.3 * len(shares) + 1)))
    axes.barh([name.replace("_", " ") for name, _ in shares], [share for _, share in shares], color=_COLOUR_OF[stage])
    axes.set(xlabel="share of the variance", xlim=(0, 1))
    axes.grid(alpha=0.25, axis="x")
    return figure


def draw_pareto(found: Summary) -> Figure:
    """Accuracy of the complete trials against what they cost, and the front that none is better than on both."""
    cost = summary.costs_against(found)
    figure, axes = new_axes(f"Accuracy against {_LABELS[cost]}")
    points: list[tuple[float, float]] = []
    for stage, rows in found["trials"].items():
        of_stage = [(row[cost], row["accuracy"]) for row in rows if row["accuracy"] is not None]
        axes.plot(*_columns(of_stage), "o", color=_COLOUR_OF[stage], label=stage, alpha=0.7)
        points += of_stage
    front = [points[i] for i in summary.pareto(points)]
    axes.step(*_columns(front), where="post", color=COLOURS[7], lw=1.5, label="Pareto front")
    axes.set(xlabel=_LABELS[cost], ylabel="validation accuracy")
    axes.xaxis.set_major_formatter("{x:,.4g}" if cost == "seconds_per_epoch" else "{x:,.0f}")
    axes.tick_params(axis="x", rotation=30)
    axes.grid(alpha=0.25)
    add_legend(figure, axes)
    return figure


def columns(found: Summary) -> dict[str, list[float]]:
    """What differs among the complete trials of grid and refinement, a value a trial, accuracy last."""
    config = config_lib.flatten(found["config"])
    rows = [r for stage in ("grid", "refine") for r in found["trials"].get(stage, []) if r["accuracy"] is not None]
    values: dict[str, list[float]] = {}
    for row in rows:
        fields = config | row["fields"]
        blocks = fields["model.block_list"]
        for i, width in enumerate(fields["model.channel_list"]):
            values.setdefault(f"channels {i + 1}", []).append(width if i == 0 or blocks[i] else 0)
        for i, depth in enumerate(blocks):
            values.setdefault(f"blocks {i + 1}", []).append(depth)
        for field, label in space.RECIPE.items():
            if field in fields:
                values.setdefault(label, []).append(fields[field])
        for key, label in (("num_params", "parameters"), ("accuracy", "accuracy")):
            values.setdefault(label, []).append(row[key])
    return {name: column for name, column in values.items() if len(set(column)) > 1}


def draw_parallel(values: dict[str, list[float]]) -> Figure:
    """Each trial a line over what differs among them, as `columns` gives it."""
    figure, axes = new_axes("The stronger a line, the more accurate; the best in orange", (10.8, 3.9))
    heights = []
    for i, (name, column) in enumerate(values.items()):
        scaled = np.log(column) if name in ("lr", "wd") else np.array(column, float)
        heights.append((scaled - scaled.min()) / np.ptp(scaled))
        axes.axvline(i, color=COLOURS[7], lw=0.8, alpha=0.5)
        for value, y, place in ((min(column), -0.04, "top"), (max(column), 1.04, "bottom")):
            axes.text(i, y, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", ha="center", va=place, fontsize=8)
    lines, order = np.array(heights), np.argsort(values["accuracy"])
    for rank, trial in enumerate(order, start=1):
        share = rank / len(order)
        axes.plot(lines[:, trial], color=COLOURS[0] if share < 1 else COLOURS[1], alpha=0.15 + 0.85 * share**2, lw=1.6)
    axes.set_xticks(range(len(values)), list(values))
    axes.set(yticks=[], ylim=(-0.2, 1.2), xlim=(-0.4, len(values) - 0.6))
    axes.tick_params(axis="x", length=0)
    axes.spines[:].set_visible(False)
    return figure
