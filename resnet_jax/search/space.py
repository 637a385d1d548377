"""The search space: the candidates of each stage, as the fields in which they differ from the config."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from ml_collections import ConfigDict
from optuna.distributions import FloatDistribution, IntDistribution

from resnet_jax import config as config_lib
from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config
from resnet_jax.search import cost

Fields = dict[str, Any]  # {"model.block_list": (3, 5, 3, 0)}
RECIPE = {"optim.learning_rate": "lr", "optim.weight_decay": "wd", "schedule.warmup_epochs": "warm-up"}


def as_text(values: Sequence[int]) -> str:
    """Convert (64, 128) to "64,128", because a database does not store tuples as choices."""
    return ",".join(map(str, values))


def _from_text(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def grid(config: ConfigDict) -> dict[str, list[Any]]:
    """Return the choices of the grid: each list of channels with each list of blocks."""
    return {
        "channels": [as_text(values) for values in config.search.channel_lists],
        "blocks": [as_text(values) for values in config.search.block_lists],
    }


def check(config: ConfigDict) -> None:
    """Check that all lists of the grid have as many stages as the config's own network.

    Raises:
        UserError: if a list has another length.
    """
    stages = len(config.model.channel_list)
    for field in ("channel_lists", "block_lists"):
        for values in config.search[field]:
            if len(values) != stages:
                raise UserError(
                    f"config.search.{field} has {values} with {len(values)} stages, but config.model.channel_list has {stages}: "
                    "give all the same number"
                )


def grid_points(config: ConfigDict) -> list[dict[str, str]]:
    """List all points of the grid."""
    choices = grid(config)
    return [dict(zip(choices, point, strict=True)) for point in itertools.product(*choices.values())]


def from_grid(params: Mapping[str, str]) -> Fields:
    """Return the candidate at a point of the grid."""
    return {
        "model.channel_list": _from_text(params["channels"]),
        "model.block_list": _from_text(params["blocks"]),
    }


def _log_uniform(limits: tuple[float, float]) -> FloatDistribution:
    return FloatDistribution(limits[0], limits[1], log=True)


def has_width(stage: int, blocks: int, downsample: str) -> bool:
    """Whether a stage's width matters: the stem has that of stage 0, and the others' blocks and max-pools have their own."""
    return stage == 0 or blocks > 0 or downsample != "stride"


def _around(config: ConfigDict, around: Fields) -> dict[str, IntDistribution | FloatDistribution]:
    """Return the ranges of refinement: the width and depth of each stage, and the recipe.

    A stage without blocks stays without, and a stage with blocks keeps at least one.
    """
    search, step = config.search, config.search.width_step
    ranges: dict[str, IntDistribution | FloatDistribution] = {}
    for i, (width, depth) in enumerate(
        zip(around["model.channel_list"], around["model.block_list"], strict=True), start=1
    ):
        if has_width(i - 1, depth, config.model.downsample):
            smallest, largest, multiple = 1, math.inf, step
            if i == 1 and config.model.stem == "whitened":
                widths = config_lib.WHITENED_WIDTHS
                smallest, largest, multiple = widths[0], widths[-1], math.lcm(step, widths.step)
            fewer = min(width - width / search.width_range, width - smallest) // multiple
            more = (min(width * search.width_range, largest) - width) // multiple
            low, high = int(width - fewer * multiple), int(width + more * multiple)
            ranges[f"channels_{i}"] = IntDistribution(low, high, step=multiple)
        if depth:
            ranges[f"blocks_{i}"] = IntDistribution(max(1, depth - search.block_range), depth + search.block_range)
    ranges["learning_rate"] = _log_uniform(search.learning_rate)
    ranges["weight_decay"] = _log_uniform(search.weight_decay)
    if "warmup_epochs" in config.schedule:
        ranges["warmup_share"] = FloatDistribution(*search.warmup_share)
    return ranges


def centre(config: ConfigDict, around: Fields) -> dict[str, Any]:
    """Return the first point of refinement: the best network so far, with its recipe clipped to the ranges."""
    fields = config_lib.flatten(config) | around
    known: dict[str, Any] = {f"channels_{i}": c for i, c in enumerate(fields["model.channel_list"], start=1)}
    known |= {f"blocks_{i}": b for i, b in enumerate(fields["model.block_list"], start=1)}
    known |= {name: fields[f"optim.{name}"] for name in ("learning_rate", "weight_decay")}
    known["warmup_share"] = fields.get("schedule.warmup_epochs", 0.0) / config.num_epochs
    ranges = _around(config, around)
    return {name: min(max(known[name], ranges[name].low), ranges[name].high) for name in ranges}


def refined(trial: optuna.Trial, config: ConfigDict, around: Fields) -> Fields:
    """Propose a candidate near another one."""
    params: dict[str, Any] = {}
    for name, interval in _around(config, around).items():
        if isinstance(interval, IntDistribution):
            params[name] = trial.suggest_int(name, interval.low, interval.high, step=interval.step)
        else:
            params[name] = trial.suggest_float(name, interval.low, interval.high, log=interval.log)
    fields = {
        field: tuple(params.get(f"{name}_{i}", value) for i, value in enumerate(around[field], start=1))
        for name, field in (("channels", "model.channel_list"), ("blocks", "model.block_list"))
    }
    fields |= {f"optim.{name}": params[name] for name in ("learning_rate", "weight_decay")}
    if "warmup_share" in params:
        fields["schedule.warmup_epochs"] = params["warmup_share"] * config.num_epochs
    return fields


def own(config: ConfigDict) -> Fields:
    """Return the config's own network as a candidate."""
    return {name: config_lib.flatten(config)[name] for name in ("model.channel_list", "model.block_list")}


def from_json(fields: Mapping[str, Any]) -> Fields:
    """Convert a candidate from JSON: lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def name(fields: Mapping[str, Any]) -> str:
    """Describe a candidate: "[3, 5, 3, 0] x [64, 128, 256, 512], lr 0.0051"."""
    text = f"{list(fields['model.block_list'])} x {list(fields['model.channel_list'])}"
    text += "".join(f", {label} {fields[field]:.2g}" for field, label in RECIPE.items() if field in fields)
    return text + (f", seed {fields['seed']}" if "seed" in fields else "")


def training_config(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """Return the config of a candidate's run, without the fields of the search.

    Raises:
        UserError: if a field is unknown or out of its range.
    """
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        del plain.search
        plain.model.max_params = 0  # the search checks the budget
    candidate = config_lib.replaced(plain, fields)
    config_lib.validate(candidate)
    return candidate


def why_infeasible(config: ConfigDict, of: cost.Cost) -> str:
    """Return why a candidate is over the budget, or "" if it is not."""
    max_params, max_gflops = config.model.max_params, config.search.max_gflops
    if max_params and of.num_params > max_params:
        return f"{of.num_params:,} parameters of {max_params:,} allowed"
    if max_gflops and of.gflops > max_gflops:
        return f"{of.gflops:.3f} GFLOP per image of {max_gflops:g} allowed"
    return ""


def distinct(config: ConfigDict, candidates: Sequence[Fields]) -> list[Fields]:
    """Remove candidates whose run would be the same as that of an earlier one."""
    by_run: dict[str, Fields] = {}
    for fields in candidates:
        run = stored_config.deciding(stored_config.to_json(training_config(config, fields)))
        stages = enumerate(zip(run["model.channel_list"], run["model.block_list"], strict=True))
        run["model.channel_list"] = [
            width * has_width(i, blocks, run["model.downsample"]) for i, (width, blocks) in stages
        ]
        by_run.setdefault(json.dumps(run, sort_keys=True), fields)
    return [*by_run.values()]
