"""The fields of a config, with their types and ranges, which are checked before anything is built.

A config is an `ml_collections.ConfigDict` that a file in `configs/` returns. `FIELDS` is the reference of its fields;
`OPTIMIZER_FIELDS` and `SCHEDULE_FIELDS` are the fields of each optimizer and schedule that the config can name.
This module imports neither JAX nor TensorFlow, so a mistake in a config shows within a second.
"""

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from resnet_jax.errors import UserError


class Field(NamedTuple):
    """A field's type, the values it accepts, and their description."""

    type: type
    accepts: Callable[[Any], bool]
    words: str


def integer(low: int, high: int = 2**31 - 1) -> Field:
    """Return a field for a whole number in a range."""
    return Field(int, lambda v: low <= v <= high, f"a whole number from {low} to {high}")


def is_finite(value: float) -> bool:
    """Whether a number is neither infinite nor nan."""
    return abs(value) <= sys.float_info.max  # correct for nan, and for integers too large for a float


def number(words: str, accepts: Callable[[float], bool]) -> Field:
    """Return a field for a finite number that `accepts` allows and `words` describes."""
    return Field(float, lambda v: is_finite(v) and accepts(v), words)


def choice(*names: str) -> Field:
    """Return a field for one of several names."""
    return Field(str, lambda v: v in names, "one of " + ", ".join(map(repr, names)))


def integers(low: int) -> Field:
    """Return a field for a tuple of whole numbers, each at least `low`."""
    return Field(
        tuple,
        lambda v: len(v) > 0 and all(type(x) is int and low <= x <= 2**16 for x in v),
        f"a tuple of one or more whole numbers from {low} to {2**16}",
    )


def _channels(words: str, accepts: Callable[[float], bool]) -> Field:
    return Field(
        tuple,
        lambda v: len(v) in (0, 3) and all(type(x) in (int, float) and is_finite(x) and accepts(x) for x in v),
        f"a tuple of three numbers {words}, or () for those of the training images",
    )


def class_weights(text: str) -> tuple[float, ...]:
    """Read `config.class_weights`: "1,2.5" -> (1.0, 2.5), one number per class; "" -> ()."""
    return tuple(float(number) for number in text.split(",")) if text else ()


def _are_class_weights(text: str) -> bool:
    try:
        numbers = class_weights("" if text == "balanced" else text)
    except ValueError:
        return False
    return all(1e-6 <= x <= 1e6 for x in numbers)


def rand_augment(policy: str) -> tuple[int, int]:
    """Read RandAugment's magnitude and number of operations: "rand-m9-n2" -> (9, 2).

    Raises:
        ValueError: if the text is not of that form.
    """
    if not (match := re.fullmatch(r"rand-m(\d{1,2})-n([1-4])", policy, re.ASCII)) or int(match[1]) > 30:
        raise ValueError(policy)
    return int(match[1]), int(match[2])


def _is_policy(text: str) -> bool:
    try:
        return text in ("", "cifar10", "trivial") or bool(rand_augment(text))
    except ValueError:
        return False


_POSITIVE = number("a number > 0", lambda v: v > 0)
NOT_NEGATIVE = number("a number >= 0", lambda v: v >= 0)
_FRACTION = number("a number >= 0 and < 1", lambda v: 0 <= v < 1)
_ALPHA = number("0 or a number from 0.01 to 100", lambda v: v == 0 or 0.01 <= v <= 100)
_FACTOR = number("a number > 0 and <= 1", lambda v: 0 < v <= 1)
_TEXT = Field(str, lambda v: True, "text")

VIEWS = (1, 2, 6)  # how many views of an image `steps.average_over_views` can average
FIELDS: dict[str, Field] = {
    "seed": integer(0, 2**32 - 1),
    "init_from": _TEXT,
    "batch_size": integer(1, 2**20),
    "num_epochs": _POSITIVE,
    "accumulation_steps": integer(1, 2**20),
    "label_smoothing": _FRACTION,
    "class_weights": Field(
        str, _are_class_weights, "numbers from 1e-6 to 1e6 between commas, one per class, or 'balanced', or ''"
    ),
    "eval_batch_size": integer(1, 2**20),
    "eval_every_epochs": integer(1),
    "checkpoint_every_steps": integer(0),
    "checkpoint_every_minutes": NOT_NEGATIVE,
    "log_every_steps": integer(1),
    "abort_grad_norm": NOT_NEGATIVE,
    "pipeline": choice("auto", "tf_data", "device"),
    "steps_per_call": integer(0, 10_000),
    "data.name": Field(str, lambda v: bool(v.strip()), "the name of a data set"),
    **dict.fromkeys(("data.data_dir", "data.cache_dir"), _TEXT),
    "data.image_size": integer(0, 4096),
    "data.num_threads": integer(0, 1024),
    "data.validation_ratio": _FRACTION,
    "data.split_seed": integer(0, 2**32 - 1),
    "data.mean": _channels("from 0 to 1", lambda v: 0 <= v <= 1),
    "data.std": _channels("from 1e-6", lambda v: v >= 1e-6),
    "augment.flip_probability": number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "augment.flip": choice("random", "alternating"),
    "augment.resized_crop_area": _FRACTION,
    "augment.crop_padding": integer(0, 1024),
    "augment.crop_fill": choice("black", "reflect"),
    **dict.fromkeys(("augment.brightness", "augment.contrast", "augment.saturation"), _FRACTION),
    "augment.rotation_degrees": number("a number from 0 to 180", lambda v: 0 <= v <= 180),
    "augment.policy": Field(
        str, _is_policy, "'', 'cifar10', 'trivial' or 'rand-m9-n2': RandAugment of magnitude 0 to 30, 1 to 4 operations"
    ),
    "augment.cutout": integer(0, 1024),
    **dict.fromkeys(("augment.mixup_alpha", "augment.cutmix_alpha"), _ALPHA),
    "model.block": choice("basic", "bottleneck"),
    "model.stem": choice("cifar", "imagenet", "whitened"),
    "model.channel_list": integers(1),
    "model.block_list": integers(0),
    "model.downsample": choice("stride", "pool", "pool_first"),
    "model.activation": choice("relu", "gelu"),
    "model.global_pool": choice("mean", "max"),
    "model.logit_scale": _POSITIVE,
    "model.batch_norm_momentum": _FRACTION,
    "model.batch_norm_epsilon": _POSITIVE,
    "model.dtype": choice("auto", "float32", "bfloat16"),
    "model.max_params": integer(0),
    "optim.name": choice("adamw", "sgd", "nesterov", "muon", "muon_normalized"),
    "optim.learning_rate": _POSITIVE,
    "optim.backbone_rate": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.decay_mask": choice("all", "kernels"),
    "optim.max_grad_norm": NOT_NEGATIVE,
    "optim.ema_decay": _FRACTION,
    "schedule.name": choice("warmup_cosine", "warmup_linear", "step"),
    "schedule.restart_epochs": Field(
        tuple, lambda v: all(type(x) in (int, float) and is_finite(x) for x in v), "a tuple of finite numbers"
    ),
}
_ADAM: dict[str, Field] = {"optim.b1": _FRACTION, "optim.b2": _FRACTION, "optim.eps": _POSITIVE}
OPTIMIZER_FIELDS: dict[str, dict[str, Field]] = {
    "adamw": _ADAM,
    "sgd": {"optim.momentum": _FRACTION, "optim.dampening": _FRACTION},
    "nesterov": {"optim.momentum": _FRACTION},
    **dict.fromkeys(("muon", "muon_normalized"), {"optim.momentum": _FRACTION, "optim.adam_ratio": _POSITIVE} | _ADAM),
}
_WARMUP: dict[str, Field] = {"schedule.warmup_epochs": NOT_NEGATIVE, "schedule.min_ratio": _FRACTION}
SCHEDULE_FIELDS: dict[str, dict[str, Field]] = {
    "warmup_cosine": _WARMUP,
    "warmup_linear": _WARMUP,
    "step": {"schedule.decay_every_epochs": _POSITIVE, "schedule.decay_factor": _FACTOR},
}

WHITENED_WIDTHS = range(2, 55, 2)  # the first of `model.channel_list`: filters and their negatives, of 3x3x3 values

ALL_FIELDS = FIELDS | {
    k: v for extra in (OPTIMIZER_FIELDS, SCHEDULE_FIELDS) for f in extra.values() for k, v in f.items()
}


def flatten(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config: `{"optim": {"eps": 1e-8}}` -> `{"optim.eps": 1e-8}`.

    Raises:
        UserError: if a field stands twice, nested and as `"optim.eps"`.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, (ConfigDict, dict)) and len(value)
        fields = flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        if twice := flat.keys() & fields.keys():
            raise UserError(f"config.{min(twice)} stands twice: leave one out")
        flat |= fields
    return flat


def validate(config: ConfigDict, extra_fields: Mapping[str, Field] = MappingProxyType({})) -> None:
    """Check that every field of a config is known, present, of its type and in its range.

    Args:
        config: the config.
        extra_fields: additional fields of a tool's configs.

    Raises:
        UserError: if a field is wrong; the message names it, its value, and the accepted values.
    """
    values = flatten(config)
    fields = always = FIELDS | dict(extra_fields)
    for chooser, extra in (("optim.name", OPTIMIZER_FIELDS), ("schedule.name", SCHEDULE_FIELDS)):
        if chooser in values:
            _check(chooser, values[chooser], FIELDS[chooser])
            fields = fields | extra[values[chooser]]
    for name in fields:
        if name not in values:
            chooser = f"{name.split('.')[0]}.name"
            because = "" if name in always else f", which config.{chooser} {values[chooser]!r} needs"
            raise UserError(f"config.{name} is missing{because}: add it in a config file, as those in configs/ do")
    for name, value in values.items():
        check_name(name, fields)
        _check(name, value, fields[name])
    _check_together(config)


def check_name(name: str, fields: Mapping[str, Field] = ALL_FIELDS) -> None:
    """Refuse a name that is not a field, and suggest the most similar field."""
    if name not in fields:
        section = [field for field in fields if field.rpartition(".")[0] == name.rpartition(".")[0]]
        near = [f for f in fields if "".join(w[0] for w in f.split(".")[-1].split("_")) == name.split(".")[-1]]  # lr
        near = near or difflib.get_close_matches(name, fields, 1)
        if name.startswith("search.") and not any(field.startswith("search.") for field in fields):
            raise UserError(f"config.{name} is only for searches: use this config with python -m resnet_jax search")
        hint = f"did you mean config.{near[0]}?" if near else f"there are config.{', config.'.join(section or fields)}"
        raise UserError(f"config.{name} is not a field that this config uses: {hint}")


def _check(name: str, value: object, field: Field) -> None:
    accepted = (int, float) if field.type is float else field.type
    if isinstance(value, bool) or not isinstance(value, accepted) or not field.accepts(value):
        raise UserError(f"config.{name} is {value!r}: it must be {field.words}")


def _check_together(config: ConfigDict) -> None:
    channels, blocks = config.model.channel_list, config.model.block_list
    if len(channels) != len(blocks):
        raise UserError(
            f"config.model.channel_list has {len(channels)} entries and config.model.block_list {len(blocks)}: give both one entry per stage"
        )
    if config.augment.resized_crop_area > 0 and config.augment.crop_padding > 0:
        raise UserError(
            f"config.augment.resized_crop_area is {config.augment.resized_crop_area} and config.augment.crop_padding "
            f"{config.augment.crop_padding}: set one of them to 0, because both crop the image"
        )
    if config.model.stem == "whitened" and channels[0] not in WHITENED_WIDTHS:
        raise UserError(
            f"config.model.channel_list begins with {channels[0]}: the whitened stem needs an even number from 2 to 54"
        )
    times = (config.schedule.get("warmup_epochs", 0.0), *config.schedule.restart_epochs, config.num_epochs)
    if not all(earlier < later for earlier, later in itertools.pairwise(times)):
        raise UserError(
            f"config.schedule.warmup_epochs is {times[0]} and config.num_epochs {times[-1]}: the warm-up must end before the run does, and config.schedule.restart_epochs {times[1:-1]} must increase in between"
        )


def check_batch_size(config: ConfigDict, devices: int) -> None:
    """Refuse a batch size that does not give each device the same share of each part, and suggest the nearest that do."""
    size, parts = config.batch_size, config.accumulation_steps
    if size % (shares := devices * parts):
        below = size // shares * shares
        nearest = " or ".join(str(size) for size in (below, below + shares) if size)
        of = f" times {parts} parts (config.accumulation_steps)" if parts > 1 else ""
        raise UserError(f"config.batch_size {size} is not divisible by {devices} devices{of}: set it to {nearest}")


def replaced(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with new values for some fields, such as {"model.dtype": "bfloat16"}."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(fields)
    return copy
