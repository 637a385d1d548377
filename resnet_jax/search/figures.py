"""The figures of a search."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from resnet_jax import config as config_lib
from resnet_jax.reporting.figures import COLOURS, NEUTRAL, add_legend, new_axes, show_percent
from resnet_jax.runs import stored_config
from resnet_jax.search import STAGES, space, summary
from resnet_jax.search.cost import Cost
from resnet_jax.search.fields import SEARCH_FIELDS
from resnet_jax.search.summary import Summary

_COLOUR_OF = dict(zip(STAGES, COLOURS, strict=False))  # a stage has the same colour in every figure
_MARKER_OF = dict(zip(STAGES, "os^", strict=True))
_LABELS = {"num_params": "parameters", "seconds_per_epoch": "seconds per epoch"}


def draw_history(search: Summary) -> Figure:
    """Draw the validation accuracy of the trials, in the order in which they started, and the best so far."""
    figure, axes = new_axes("Validation accuracy, trial by trial")
    first, best, so_far = 0, -np.inf, []
    for stage, rows in search["trials"].items():
        ended = [(first + row["number"], row["accuracy"]) for row in rows if row["accuracy"] is not None]
        unfinished = [
            (first + r["number"], r["validations"][-1])
            for r in rows
            if r["state"] not in ("complete", "running") and r["validations"]
        ]
        axes.plot(*_columns(ended), _MARKER_OF[stage], color=_COLOUR_OF[stage], label=stage)
        axes.plot(*_columns(unfinished), "x", color=_COLOUR_OF[stage], alpha=0.6)
        for trial, accuracy in ended if stage != "confirm" else []:
            best = max(best, accuracy)
            so_far.append((trial, best))
        first += max((row["number"] for row in rows), default=-1) + 1
    axes.step(*_columns(so_far), where="post", color=NEUTRAL, lw=1, label="best so far")
    axes.plot([], [], "x", color=NEUTRAL, label="ended early (last value)")
    axes.set(xlabel="trial")
    show_percent(axes.yaxis, "validation accuracy")
    add_legend(figure, axes)
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[Sequence[float], Sequence[float]]:
    return ([x for x, _ in points], [y for _, y in points])


def draw_importances(search: Summary, stage: str) -> Figure:
    """Draw the share of the accuracy's variance that each parameter of a stage explains."""
    shares = sorted(search["importances"][stage].items(), key=lambda item: item[1])
    figure, axes = new_axes(f"Importance for the accuracy: {stage}", (4.6, max(2.2, 0.3 * len(shares) + 1)))
    axes.barh([name.replace("_", " ") for name, _ in shares], [share for _, share in shares], color=_COLOUR_OF[stage])
    axes.set(xlim=(0, 1))
    show_percent(axes.xaxis, "share of the variance")
    return figure


def draw_pareto(search: Summary) -> Figure:
    """Draw the accuracy of complete trials against their cost, and the Pareto front of those within the budget."""
    cost = summary.costs_against(search)
    figure, axes = new_axes(f"Accuracy against {_LABELS[cost]}")
    config = stored_config.from_json(search["config"], SEARCH_FIELDS)
    points: list[tuple[float, float]] = []
    over: list[tuple[float, float]] = []
    for stage, rows in search["trials"].items():
        of_stage: list[tuple[float, float]] = []
        for row in (row for row in rows if row["accuracy"] is not None):
            over_budget = space.why_infeasible(config, Cost(row["num_params"], row["gflops"]))
            (over if over_budget else of_stage).append((row[cost], row["accuracy"]))
        axes.plot(*_columns(of_stage), _MARKER_OF[stage], color=_COLOUR_OF[stage], label=stage, alpha=0.7)
        points += of_stage
    if over:
        axes.plot(*_columns(over), _MARKER_OF["confirm"], color=_COLOUR_OF["confirm"], mfc="none", label="over budget")
    front = [points[i] for i in summary.pareto(points)]
    axes.step(*_columns(front), where="post", color=NEUTRAL, lw=1.5, label="Pareto front")
    axes.set(xlabel=_LABELS[cost])
    show_percent(axes.yaxis, "validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250,000 parameters as "250k"
    add_legend(figure, axes)
    return figure


def columns(search: Summary) -> dict[str, list[float]]:
    """Return what differs between complete trials of grid and refine: name -> one value per trial, accuracy last."""
    config = config_lib.flatten(search["config"])
    rows = [r for stage in ("grid", "refine") for r in search["trials"].get(stage, []) if r["accuracy"] is not None]
    values: dict[str, list[float]] = {}
    for row in rows:
        fields = config | row["fields"]
        blocks, downsample = fields["model.block_list"], fields.get("model.downsample", "stride")
        for i, width in enumerate(fields["model.channel_list"]):
            values.setdefault(f"channels {i + 1}", []).append(width * space.has_width(i, blocks[i], downsample))
        for i, depth in enumerate(blocks):
            values.setdefault(f"blocks {i + 1}", []).append(depth)
        for field, label in space.RECIPE.items():
            if field in fields:
                values.setdefault(label, []).append(fields[field])
        for key, label in (("num_params", "parameters"), ("accuracy", "accuracy")):
            values.setdefault(label, []).append(row[key])
    return {name: column for name, column in values.items() if len(set(column)) > 1}


def draw_parallel(values: dict[str, list[float]]) -> Figure:
    """Draw parallel coordinates: one line per trial over the values of `columns`; the best trial is thick."""
    figure, axes = new_axes("", (10.8, 3.6))
    axes.grid(visible=False)
    heights = []
    for i, (name, column) in enumerate(values.items()):
        scaled = np.log(column) if name in ("lr", "wd") and min(column) > 0 else np.array(column, float)
        heights.append((scaled - scaled.min()) / np.ptp(scaled))
        axes.axvline(i, color=NEUTRAL, lw=0.8, alpha=0.5)
        for value, y, place in ((min(column), -0.04, "top"), (max(column), 1.04, "bottom")):
            shown = (
                f"{100 * value:.2f} %" if name == "accuracy" else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
            )
            axes.text(i, y, shown, ha="center", va=place, fontsize=9)
    lines, order = np.array(heights), np.argsort(values["accuracy"])
    for rank, trial in enumerate(order, start=1):
        best = rank == len(order)
        strength = 0.2 + 0.8 * (rank / len(order)) ** 2
        axes.plot(
            lines[:, trial], color=rcParams["text.color"] if best else NEUTRAL, alpha=strength, lw=3 if best else 1.6
        )
    axes.set_xticks(range(len(values)), list(values))
    axes.set(yticks=[], ylim=(-0.2, 1.2), xlim=(-0.4, len(values) - 0.6))
    axes.tick_params(axis="x", length=0)
    axes.spines[:].set_visible(False)
    return figure
