"""Configs as JSON, in the folder of a run, and how two of them differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import ALL_FIELDS, Field, check_name, flatten, replaced, validate
from resnet_jax.errors import UserError

# Fields that do not change the steps of a run.
RESUMABLE_FIELDS = frozenset(
    {
        *("data.data_dir", "data.cache_dir", "data.num_threads", "pipeline", "steps_per_call", "eval_batch_size"),
        *("log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes", "abort_grad_norm"),
        "search.refine_trials",
    }
)
# Fields that a resumed run may change; its data are compared by their fingerprint, wherever they are.
CHANGEABLE_FIELDS = RESUMABLE_FIELDS | {"data.name"}

# Fields added since the first version, each with the value that stands for its absence.
LATER_FIELDS: dict[str, Any] = {
    "augment.crop_fill": "black",
    "augment.cutmix_alpha": 0.0,
    "augment.cutout": 0,
    "augment.flip": "random",
    "augment.mixup_alpha": 0.0,
    "augment.policy": "",
    "augment.resized_crop_area": 0.0,
    "accumulation_steps": 1,
    "checkpoint_every_minutes": 0.0,
    "class_weights": "",
    "init_from": "",
    "model.activation": "relu",
    "model.downsample": "stride",
    "model.global_pool": "mean",
    "model.logit_scale": 1.0,
    "optim.backbone_rate": 1.0,
    "optim.ema_decay": 0.0,
    "schedule.restart_epochs": (),
}

# Fields removed since the first version, each with the value with which it did nothing.
REMOVED_FIELDS: dict[str, Any] = {"half_size_epochs": 0.0, "model.param_dtype": "float32"}

# Fields that a run computes when it begins, each with the value that asks for it: its stored config has the numbers, and a
# resumed run takes them.
COMPUTED_FIELDS: dict[str, Any] = {
    "data.mean": (),
    "data.std": (),
    "class_weights": "balanced",
    "model.dtype": "auto",
}


def to_json(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON; tuples become lists."""
    as_json: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return as_json


def from_json(values: Mapping[str, Any], extra_fields: Mapping[str, Field] = MappingProxyType({})) -> ConfigDict:
    """The config from which `to_json` made these values.

    Args:
        values: of the config.
        extra_fields: as `config.validate` takes them.

    Raises:
        UserError: if this version cannot run it.
    """
    fields = ALL_FIELDS | dict(extra_fields)
    nested: dict[str, Any] = {}
    for name, value in _as_of_now(values).items():
        if name in REMOVED_FIELDS:
            raise UserError(f"config.{name} is {value!r}, which this version cannot do: use the version that wrote it")
        check_name(name, fields)
        section, _, leaf = name.rpartition(".")
        holder = nested.setdefault(section, {}) if section else nested
        holder[leaf] = _tuples(value) if fields[name].type is tuple else value
    config = with_floats(ConfigDict(nested), fields)
    validate(config, extra_fields)
    return config


def with_floats(config: ConfigDict, fields: Mapping[str, Field]) -> ConfigDict:
    """A config with 50.0 for the 50 of a field that holds a float: a value of ml_collections keeps the type it began with."""
    values = {n: v for n, v in flatten(config).items() if n in fields and fields[n].type is float}
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({n: float(v) for n, v in values.items() if type(v) is int})
    return config


def with_computed(config: ConfigDict, stored: Mapping[str, Any]) -> ConfigDict:
    """A config with the numbers that the run of a stored one computed."""
    values, known = flatten(config), flatten(dict(stored))
    return replaced(
        config, {n: _tuples(known[n]) for n, asks in COMPUTED_FIELDS.items() if values[n] == asks and n in known}
    )


def _tuples(value: Any) -> Any:
    """Turn lists, and lists in them, into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def deciding(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change the result, flat, of a config as JSON: {"optim.eps": 1e-8}."""
    return {k: v for k, v in _as_of_now(stored).items() if k not in RESUMABLE_FIELDS}


def _as_of_now(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON, flat, with the fields of this version where an earlier one stored it."""
    values = json.loads(json.dumps(LATER_FIELDS)) | flatten(dict(stored))
    return {k: v for k, v in values.items() if k not in REMOVED_FIELDS or v != REMOVED_FIELDS[k]}


def without_paths(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config that can leave this machine: of its data and of `init_from` only the names, "folder:birds", and no folders."""
    kind, _, path = flat["data.name"].partition(":")
    names = {
        "init_from": Path(flat["init_from"]).name,
        **{n: "" for n in ("data.data_dir", "data.cache_dir") if n in flat},
    }
    return {
        **flat,
        **names,
        "data.name": f"{kind}:{Path(path).name}" if kind in ("folder", "npz") else flat["data.name"],
    }


def extended(config: ConfigDict, num_epochs: float) -> ConfigDict:
    """A config with more epochs, whose schedule begins anew where it ended."""
    restarts = (*config.schedule.restart_epochs, config.num_epochs)
    longer = replaced(config, {"num_epochs": float(num_epochs), "schedule.restart_epochs": restarts})
    validate(longer)
    return longer


def differences(config: ConfigDict, stored: Mapping[str, Any]) -> list[str]:
    """The differences between a config and a stored one that change the result on the same data, as "field: old -> new".

    There is none if the config extends the stored one, because their steps are the same as far as the stored one goes.
    """
    old, new = deciding(stored), deciding(to_json(config))
    restarts, end = new["schedule.restart_epochs"], old.get("num_epochs")
    if isinstance(restarts, list) and end in restarts:
        new |= {"num_epochs": end, "schedule.restart_epochs": restarts[: restarts.index(end)]}
    names = sorted((old | new).keys() - CHANGEABLE_FIELDS)
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]
