import inspect
import json
import math
import re
import statistics
from functools import partial

import pytest
from helpers import ROOT
from ml_collections import ConfigDict

from configs import best, final, finetune, found_cpu, ladder, narrow, quickstart, resnet50, search, sgd, speedrun
from resnet_jax import config as config_lib
from resnet_jax.config import ALL_FIELDS, FIELDS, OPTIMIZER_FIELDS, SCHEDULE_FIELDS
from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config
from resnet_jax.runs.stored_config import CHANGEABLE_FIELDS, LATER_FIELDS, REMOVED_FIELDS
from resnet_jax.search.fields import SEARCH_FIELDS

NARROW = ("adamw", "adamw_plain", "sgd", "sgd_plain")
SHIPPED = {
    "final": final.get_config,
    "final:full": lambda: final.get_config("full"),
    "final:smoke": lambda: final.get_config("smoke"),
    "sgd": sgd.get_config,
    "best": best.get_config,
    "best:tune": lambda: best.get_config("tune"),
    "speedrun": speedrun.get_config,
    "speedrun:tune": lambda: speedrun.get_config("tune"),
    "finetune": finetune.get_config,
    "finetune:scratch": lambda: finetune.get_config("scratch"),
    "quickstart": quickstart.get_config,
    "found_cpu": found_cpu.get_config,
    "resnet50": resnet50.get_config,
    "search": search.get_config,
    "search:cpu": lambda: search.get_config("cpu"),
    "search:smoke": lambda: search.get_config("smoke"),
    **{f"ladder:{change}": partial(ladder.get_config, change) for change in ladder.CHANGES},
    **{f"narrow:{variant}": partial(narrow.get_config, variant) for variant in NARROW},
}

# By field: accepted at the edge of its range, and refused just beyond it.
RANGES = {
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "init_from": (["", "runs/final"], []),
    "accumulation_steps": ([1, 2], [0, -1]),
    "class_weights": (["", "balanced", "1e-6,1,1e6"], ["balance", "1,,2", "0,1", "-1,1", "nan,1", "1e7,1"]),
    "batch_size": ([1], [0, -1]),
    "num_epochs": ([5.1, 300], [0.0, -1.0]),
    "label_smoothing": ([0, 0.99], [-0.01, 1.0]),
    "eval_batch_size": ([1], [0, -1]),
    "eval_every_epochs": ([1], [0, -1]),
    "checkpoint_every_steps": ([0], [-1]),
    "checkpoint_every_minutes": ([0.0, 0.1], [-1.0, math.inf]),
    "log_every_steps": ([1], [0, -1]),
    "abort_grad_norm": ([0.0, 1e4], [-1.0, math.inf]),
    "pipeline": (["auto", "tf_data", "device"], ["tfdata"]),
    "steps_per_call": ([0, 10_000], [-1, 10_001]),
    "data.name": (["digits", "npz:a file"], ["", " "]),
    "data.data_dir": (["", "a"], []),
    "data.cache_dir": (["", "a"], []),
    "data.image_size": ([0], [-1]),
    "data.num_threads": ([0, 1024], [-1]),
    "data.validation_ratio": ([0.0, 0.99], [-0.01, 1.0]),
    "data.split_seed": ([0, 2**32 - 1], [-1, 2**32]),
    "data.mean": ([(0, 0.5, 1), ()], [(-0.1, 0.5, 0.5), (0.5, 0.5, 127.5), (0.5, 0.5)]),
    "data.std": ([(0.1, 1, 2), ()], [(0.0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)]),
    "augment.flip_probability": ([0, 1], [-0.01, 1.01]),
    "augment.flip": (["random", "alternating"], ["always"]),
    "augment.crop_padding": ([0], [-1]),
    "augment.crop_fill": (["black", "reflect"], ["white"]),
    "augment.resized_crop_area": ([0.0], [-0.1, 1.0]),
    "augment.mixup_alpha": ([0, 0.01, 100], [-0.1, 0.009, 100.1]),
    "augment.cutmix_alpha": ([0, 0.01, 100], [-0.1, 0.009, 100.1]),
    "augment.cutout": ([0, 1024], [-1, 1025]),
    "augment.brightness": ([0.0, 0.99], [-0.01, 1.0]),
    "augment.contrast": ([0.0, 0.99], [-0.01, 1.0]),
    "augment.saturation": ([0.0, 0.99], [-0.01, 1.0]),
    "augment.rotation_degrees": ([0, 180.0], [-0.01, 180.1]),
    "augment.policy": (
        ["", "cifar10", "trivial", "rand-m9-n2", "rand-m0-n1", "rand-m30-n4"],
        ["imagenet", "rand", "rand-m31-n2", "rand-m9-n5", "rand-m9-n0", "rand-m9-n2x"],
    ),
    "model.block": (["basic", "bottleneck"], ["Basic"]),
    "model.stem": (["cifar", "imagenet"], [""]),
    "model.downsample": (["stride", "pool", "pool_first"], ["max"]),
    "model.global_pool": (["mean", "max"], ["sum"]),
    "model.logit_scale": ([0.125, 2], [0.0, -1]),
    "model.channel_list": ([(1, 1, 1, 1)], [(1, 1, 1, 0)]),
    "model.block_list": ([(1, 0, 0, 0)], [(1, 0, 0, -1)]),
    "model.batch_norm_momentum": ([0.0, 0.99], [-0.01, 1.0]),
    "model.batch_norm_epsilon": ([1e-12], [0.0, -1e-5]),
    "model.dtype": (["auto", "float32", "bfloat16"], ["float16"]),
    "model.max_params": ([0], [-1]),
    "optim.name": ([], ["adam"]),  # another name needs other fields
    "optim.learning_rate": ([1e-6], [0.0, -0.01]),
    "optim.weight_decay": ([0], [-0.01]),
    "model.activation": (["relu", "gelu"], ["tanh"]),
    "optim.decay_mask": (["all", "kernels"], ["none"]),
    "optim.max_grad_norm": ([0], [-0.01]),
    "optim.backbone_rate": ([0, 2.0], [-0.01]),
    "optim.ema_decay": ([0, 0.999], [-0.01, 1.0]),
    "optim.adam_ratio": ([0.1, 2], [0.0, -1]),
    "optim.b1": ([0.0, 0.99], [-0.01, 1.0]),
    "optim.b2": ([0.0, 0.9999], [-0.01, 1.0]),
    "optim.eps": ([1e-12], [0.0, -1e-8]),
    "optim.momentum": ([0.0, 0.99], [-0.01, 1.0]),
    "optim.dampening": ([0.0, 0.99], [-0.01, 1.0]),
    "schedule.name": ([], ["cosine"]),
    "schedule.restart_epochs": ([(), (6, 20.5)], []),
    "schedule.warmup_epochs": ([0, 49.9], [-0.01]),
    "schedule.min_ratio": ([0, 0.99], [-0.01, 1.0]),
    "schedule.decay_every_epochs": ([0.5], [0.0, -1.0]),
    "schedule.decay_factor": ([0.01, 1], [0.0, 1.01]),
    "search.objective": ([], ["loss"]),
    "search.max_gflops": ([0], [-0.1]),
    "search.channel_lists": ([((1, 2),)], [((0, 2),), (1, 2), ((),)]),
    "search.block_lists": ([((0, 2),)], [((-1, 2),), (1, 2)]),
    "search.reduction_factor": ([2], [1]),
    "search.refine_trials": ([1], [0]),
    "search.width_range": ([1.0], [0.9]),
    "search.width_step": ([1], [0]),
    "search.block_range": ([0], [-1]),
    "search.learning_rate": ([(0.1, 0.1)], [(0.2, 0.1), (0.0, 0.1), (0.1,)]),
    "search.weight_decay": ([(0.1, 0.2)], [(0.2, 0.1), (0.0, 0.1), (0.1, 0.2, 0.3)]),
    "search.warmup_share": ([(0, 0.99)], [(0.2, 0.1), (-0.1, 0.1), (0.5, 1.0)]),
    "search.confirm_top": ([1], [0]),
    "search.confirm_seeds": ([2], [1]),
}
EVERY_FIELD = ALL_FIELDS | SEARCH_FIELDS
WRONG_TYPE = {
    int: [None, True, "1", 1.5, 2.0, (1,)],
    float: [None, True, "0.5", (0.5,), math.nan, math.inf, -math.inf],
    str: [None, True, 3, ("basic",)],
    tuple: [None, True, 3, "1,2", [1, 1, 1], (), ("1", "1", "1"), (True, True, True), (math.nan, math.nan, math.nan)],
}


def with_muon():
    config = final.get_config()
    config.optim.name, config.optim.momentum, config.optim.adam_ratio = "muon", 0.95, 1.0
    return config


def with_value(name, value):
    """A shipped config that has this field, with another value in it."""
    shipped = final.get_config(), sgd.get_config(), search.get_config(), with_muon()
    config = next(c for c in shipped if name in config_lib.flatten(c))
    put(config, name, value)
    return config


def put(config, name, value):
    *sections, leaf = name.split(".")
    holder = config[sections[0]] if sections else config
    with config.ignore_type():
        if leaf in holder:
            del holder[leaf]  # for a ConfigDict casts a new value to the type of the old one
        holder[leaf] = value


def extra_fields(config):
    return SEARCH_FIELDS if "search" in config else {}


def validate(config):
    config_lib.validate(config, extra_fields(config))


def refusal(config):
    with pytest.raises(UserError) as refused:
        validate(config)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_valid_and_has_the_fields_of_the_reference_and_no_other(name):
    config = SHIPPED[name]()
    validate(config)
    extra = OPTIMIZER_FIELDS[config.optim.name] | SCHEDULE_FIELDS[config.schedule.name]
    extra |= extra_fields(config)
    assert set(config_lib.flatten(config)) == set(FIELDS | extra)


def test_the_report_takes_no_other_variant():
    with pytest.raises(ValueError, match=":full or :smoke, not :fast"):
        final.get_config("fast")


def test_the_narrow_config_takes_no_other_variant_and_plain_ones_do_not_augment():
    with pytest.raises(ValueError, match=":sgd_plain, not :fast"):
        narrow.get_config("fast")
    for variant in NARROW:
        config = narrow.get_config(variant)
        strengths = [strength for strength in config.augment.values() if not isinstance(strength, str)]
        assert any(strengths) == (not variant.endswith("_plain"))
        assert config.augment.policy == ""
        assert config.optim.name == variant.removesuffix("_plain")


def test_the_table_of_ranges_knows_every_field():
    assert set(RANGES) == set(EVERY_FIELD)


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_a_value_of_the_wrong_type_is_refused_naming_field_value_and_remedy(name):
    field = EVERY_FIELD[name]
    for value in WRONG_TYPE[field.type]:
        if value == () and () in RANGES[name][0]:
            continue
        assert refusal(with_value(name, value)) == f"config.{name} is {value!r}: it must be {field.words}"


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_a_range_ends_where_it_says(name):
    inside, outside = RANGES[name]
    for value in inside:
        validate(with_value(name, value))
    for value in outside:
        assert refusal(with_value(name, value)) == f"config.{name} is {value!r}: it must be {EVERY_FIELD[name].words}"


def test_a_resized_crop_takes_the_place_of_the_padded_one():
    config = resnet50.get_config()
    config.augment.resized_crop_area = 0.99
    validate(config)
    config.augment.crop_padding = 1
    assert "resized_crop_area is 0.99 and config.augment.crop_padding 1: set one of them to 0" in refusal(config)


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_every_field_is_read_by_the_code(name):
    sources = [path.read_text() for path in (ROOT / "resnet_jax").rglob("*.py") if path.name != "config.py"]
    *sections, leaf = name.split(".")
    attribute = re.compile(rf"\b(config|{'|'.join(sections) or 'config'})\.{leaf}\b")
    assert any(attribute.search(source) for source in sources)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batchsize", "did you mean config.batch_size?"),
        ("model.channels_list", "did you mean config.model.channel_list?"),
        ("optim.lerning_rate", "did you mean config.optim.learning_rate?"),
        ("optim.lr", "did you mean config.optim.learning_rate?"),
        ("bs", "did you mean config.batch_size?"),
        ("zzz", "there are config.seed"),
        ("optim.momentum", "not a field that this config uses"),  # adamw's config
        ("schedule.decay_factor", "not a field that this config uses"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(name, hint):
    config = final.get_config()
    put(config, name, 0.9)
    message = refusal(config)
    assert message.startswith(f"config.{name} is not a field that this config uses: ")
    assert hint in message


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_a_missing_field_is_named(name):
    config = with_value(name, None)
    *section, leaf = name.split(".")
    del (config[section[0]] if section else config)[leaf]
    assert refusal(config).startswith(f"config.{name} is missing")


def test_a_field_missing_for_the_optimizer_or_schedule_says_which_one_wants_it():
    config = final.get_config()
    config.optim.name = "sgd"
    assert "config.optim.momentum is missing, which config.optim.name 'sgd' needs" in refusal(config)
    config = final.get_config()
    config.schedule.name = "step"
    assert "config.schedule.decay_every_epochs is missing, which config.schedule.name 'step' needs" in refusal(config)


def test_stages_need_a_width_and_a_depth_each():
    message = refusal(with_value("model.block_list", (3, 5, 3)))
    assert "config.model.channel_list has 4 entries" in message
    assert "config.model.block_list 3" in message


@pytest.mark.parametrize("warmup", [50.0, 51])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup):
    message = refusal(with_value("schedule.warmup_epochs", warmup))
    assert f"config.schedule.warmup_epochs is {warmup} and config.num_epochs 50.0" in message


def test_flatten_joins_the_names_of_sections():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": (3, 4)}}}
    assert config_lib.flatten(nested) == {"a": 1, "b.c": 2, "b.d.e": (3, 4)}
    assert config_lib.flatten(ConfigDict(nested)) == config_lib.flatten(nested)
    for twice in ({"b": {"c": 2}, "b.c": 3}, {"b.c": 3, "b": {"c": 2}}):
        with pytest.raises(UserError, match=r"config\.b\.c stands twice: leave one out"):
            config_lib.flatten(twice)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_stored_as_json_differs_in_nothing_when_read_back(name):
    config = SHIPPED[name]()
    stored = json.loads(json.dumps(stored_config.to_json(config)))
    assert stored["model"]["block_list"] == list(config.model.block_list)
    assert stored_config.differences(config, stored) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_read_from_json_is_the_one_that_was_written(name):
    config = SHIPPED[name]()
    read = stored_config.from_json(json.loads(json.dumps(stored_config.to_json(config))), extra_fields(config))
    assert repr(read.to_dict()) == repr(config.to_dict())  # tuples are tuples again


def test_a_config_of_another_version_is_refused_when_read_from_json():
    stored = stored_config.to_json(final.get_config())
    stored["augment"]["erase"] = 8
    with pytest.raises(UserError, match=r"config\.augment\.erase is not a field"):
        stored_config.from_json(stored)
    with pytest.raises(UserError, match=r"config\.optim is not a field"):
        stored_config.from_json({"optim": 5, "optim.eps": 1e-8})


@pytest.mark.parametrize("name", LATER_FIELDS)
def test_a_config_older_than_a_field_is_one_that_does_what_was_done_before(name):
    config = with_value(name, LATER_FIELDS[name])
    stored = stored_config.to_json(config)
    section, _, leaf = name.rpartition(".")
    del (stored[section] if section else stored)[leaf]
    assert stored_config.differences(config, stored) == []
    assert repr(stored_config.from_json(stored).to_dict()) == repr(config.to_dict())
    change = f"{name}: {json.loads(json.dumps(LATER_FIELDS[name]))!r} -> 'new'"
    assert stored_config.differences(with_value(name, "new"), stored) == [change] * (name not in CHANGEABLE_FIELDS)


@pytest.mark.parametrize("name", REMOVED_FIELDS)
def test_a_field_that_was_removed_is_read_where_it_did_nothing(name):
    config = final.get_config()
    stored = stored_config.to_json(config)
    section, _, leaf = name.rpartition(".")
    holder = stored[section] if section else stored
    holder[leaf] = REMOVED_FIELDS[name]
    assert stored_config.differences(config, stored) == []
    assert repr(stored_config.from_json(stored).to_dict()) == repr(config.to_dict())
    holder[leaf] = 5.0
    assert stored_config.differences(config, stored) == [f"{name}: 5.0 -> None"]
    with pytest.raises(
        UserError, match=rf"config\.{name} is 5\.0, which this version cannot do: use the version that wrote"
    ):
        stored_config.from_json(stored)


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_a_changed_field_is_a_difference_unless_it_is_neutral(name):
    config = with_value(name, "something else")
    stored = stored_config.to_json(with_value(name, "as it was"))
    expected = [] if name in CHANGEABLE_FIELDS else [f"{name}: 'as it was' -> 'something else'"]
    assert stored_config.differences(config, stored) == expected


def test_differences_name_old_and_new_and_fields_that_only_one_has():
    stored = stored_config.to_json(final.get_config())
    del stored["augment"]["brightness"]
    stored["augment"]["erase"] = 8
    config = final.get_config()
    config.seed = 7
    config.model.block_list = (3, 5, 2, 0)
    assert stored_config.differences(config, stored) == [
        "augment.brightness: None -> 0.2",
        "augment.erase: 8 -> None",
        "model.block_list: [3, 5, 3, 0] -> [3, 5, 2, 0]",
        "seed: 0 -> 7",
    ]


def test_fields_that_leave_the_result_are_known_fields():
    assert set(FIELDS | SEARCH_FIELDS) >= CHANGEABLE_FIELDS


def test_checking_a_config_imports_neither_jax_nor_tensorflow():
    assert not re.search(r"^\s*(import|from) (jax|flax|tensorflow)", inspect.getsource(config_lib), re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "figure", "files"),
    [
        (final, "test_accuracy", "final-h200-seed*"),
        (sgd, "test_accuracy", "sgd-h200-seed*"),
        *((narrow, "test_accuracy", f"cpu-narrow-{v}-seed*") for v in NARROW),
        (best, "test_accuracy_over_views", "best-cpu-seed*"),
        (speedrun, "test_accuracy_over_views", "speedrun-cpu-seed*"),
    ],
)
def test_a_docstring_states_the_accuracy_of_the_results(module, figure, files):
    accuracies = [100 * json.loads(path.read_text())[figure] for path in ROOT.glob(f"results/{files}.json")]
    mean = f"{statistics.mean(accuracies):.2f}"
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    assert f"{mean}{spread} %" in module.__doc__
    assert f"({len(accuracies)} seed" in module.__doc__
