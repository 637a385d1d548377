import dataclasses
import json

import pytest

from resnet_jax.errors import UserError
from resnet_jax.runs.result import RunResult

RESULT = RunResult(
    test_accuracy=0.9,
    test_loss=0.5,
    validation_accuracy=None,
    num_params=10,
    checkpoint_step=7,
    steps=8,
    seconds=1.5,
    config={"seed": 3},
    dataset={"name": "digits"},
    environment={"devices": ["cpu"]},
    seed=3,
    state_digest="0" * 64,
    startup_seconds=0.5,
    peak_memory_bytes={"host": 1, "device": None},
)


def test_it_is_read_as_it_was_written(tmp_path):
    RESULT.write(tmp_path)
    assert RunResult.read(tmp_path) == RESULT
    assert json.loads((tmp_path / "result.json").read_text()) == dataclasses.asdict(RESULT)


def test_a_result_of_an_earlier_version_is_read(tmp_path):
    values = dataclasses.asdict(RESULT)
    for later in ("peak_memory_bytes", "startup_seconds", "initial_weights"):
        del values[later]
    (tmp_path / "result.json").write_text(json.dumps(values | {"no_longer_written": 1}))
    read = RunResult.read(tmp_path)
    assert (read.test_accuracy, read.startup_seconds, read.peak_memory_bytes) == (0.9, None, {})


@pytest.mark.parametrize("name", ["test_accuracy", "steps", "config"])
def test_a_result_that_lacks_a_field_is_refused_by_name(tmp_path, name):
    values = dataclasses.asdict(RESULT)
    del values[name]
    (tmp_path / "result.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"result.json cannot be used \(it lacks {name}\): choose another --workdir"):
        RunResult.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("test_accuracy", "0.9"), ("steps", 1.5), ("seconds", None), ("config", []), ("num_params", True), ("seed", "x")],
)
def test_a_field_of_the_wrong_type_is_refused_by_name_and_value(tmp_path, name, value):
    (tmp_path / "result.json").write_text(json.dumps(dataclasses.asdict(RESULT) | {name: value}))
    with pytest.raises(UserError, match=rf"{name} is .*: choose another"):
        RunResult.read(tmp_path)


def test_the_summary_names_the_accuracies_that_there_are():
    assert RESULT.summary() == "test accuracy 90.00%, checkpoint of step 7 of 8, 2 s"
    untested = dataclasses.replace(RESULT, test_accuracy=None, validation_accuracy=0.5)
    assert untested.summary().startswith("validation accuracy 50.00%, checkpoint")
