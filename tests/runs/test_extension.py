import json
import os
import shutil
import signal

import numpy as np
import pytest
from helpers import launch_here, mistake_of_tool, rows
from test_training import at_step

from resnet_jax import config as config_lib
from resnet_jax import training
from resnet_jax.data import datasets
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.reporting import evaluation
from resnet_jax.runs import stored_config


@pytest.fixture
def extend(tmp_path, tiny_config):
    """Call the command line to extend the run of a folder, of two epochs at first."""
    files.write_json(tmp_path / "tiny.json", stored_config.to_json(tiny_config))

    def call(directory, epochs=None, *more, program=launch_here):
        flags = [] if epochs is None else [f"--extend-to={epochs}"]
        return program(f"--config={tmp_path}/tiny.json", f"--workdir={directory}", *flags, *more)

    return call


def planned(config, num_epochs, *restarts):
    """The config of a run that was planned so from the start."""
    return config_lib.replaced(config, {"num_epochs": num_epochs, "schedule.restart_epochs": restarts})


def result(directory, name="result.json"):
    return json.loads((directory / name).read_text())


def test_an_extended_run_is_the_one_that_was_planned_so_even_if_it_stops_on_the_way(
    tmp_path, trained_once, tiny_config, extend, monkeypatch
):
    directory = shutil.copytree(trained_once, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, 50, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            extend(directory, 3)
        assert stop.value.code == 128 + signal.SIGTERM
    assert not (directory / "result.json").exists()
    extend(directory, 3)
    config = planned(tiny_config, 3.0, 2.0)
    whole = training.train(config, tmp_path / "whole")
    assert result(directory)["state_digest"] == whole.state_digest
    assert result(directory)["config"] == stored_config.to_json(config)
    assert result(directory, "result-2-epochs.json") == result(trained_once)
    assert [row for row in rows(directory) if row["step"] > 41] == [
        row for row in rows(tmp_path / "whole") if row["step"] > 41
    ]
    report = evaluation.run(config, directory, "best")
    assert report["test"]["accuracy"] == result(directory)["test_accuracy"]


def test_a_run_can_be_extended_again_and_a_complete_extension_is_not_run_again(
    tmp_path, trained_once, extend, capsys, monkeypatch
):
    directory = shutil.copytree(trained_once, tmp_path / "run")
    extend(directory, 2.5)
    extend(directory, 3)
    restarts = stored_config.from_json(result(directory)["config"]).schedule.restart_epochs
    assert restarts == (2.0, 2.5)
    assert result(directory, "result-2.5-epochs.json")["config"]["num_epochs"] == 2.5
    capsys.readouterr()
    monkeypatch.setattr(training, "setup", None)
    extend(directory, 3)
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epochs", "more", "words"),
    [
        (1, [], ["--extend-to 1", "has 2 epochs already: give more"]),
        ("nan", [], ["config.num_epochs is nan"]),
        (3, ["--config.seed=5"], ["(seed: 0 -> 5)"]),
        (3, ["--config.num_epochs=4"], ["num_epochs: 2.0 -> 4.0"]),
        (5, ["--config.num_epochs=3", "--config.schedule.restart_epochs=(2.0,)"], ["num_epochs: 3.0 -> 2.0"]),
        (3, ["--mode=eval"], ["--extend-to need --mode train"]),
        (None, ["--config.num_epochs=3"], ["num_epochs: 2.0 -> 3.0", "--extend-to"]),
    ],
    ids=[
        "fewer",
        "nan",
        "another run",
        "epochs that it never had",
        "an extension that is not trained",
        "eval",
        "without the flag",
    ],
)
def test_an_extension_that_cannot_be_is_one_line_and_changes_nothing(run, extend, capsys, epochs, more, words):
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    arguments = [] if epochs is None else [f"--extend-to={epochs}"]
    line = extend(
        run, None, *arguments, *more, program=lambda *flags: mistake_of_tool(capsys, *flags, program=launch_here)
    )
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before


def test_an_extension_on_other_data_keeps_the_result(trained_once, extend, tiny_config, tmp_path, capsys):
    run = shutil.copytree(trained_once, tmp_path / "run")
    digits = datasets.load(tiny_config.data)
    np.savez(tmp_path / "other.npz", train_images=digits.test.images, train_labels=digits.test.labels)
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    line = extend(
        run,
        3,
        f"--config.data.name=npz:{tmp_path}/other.npz",
        program=lambda *flags: mistake_of_tool(capsys, *flags, program=launch_here),
    )
    assert "has changed since the run began" in line
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before


def test_a_run_that_is_not_there_cannot_be_extended(tmp_path, extend, capsys):
    line = extend(tmp_path / "none", 3, program=lambda *flags: mistake_of_tool(capsys, *flags, program=launch_here))
    assert "holds no run" in line
    assert not (tmp_path / "none").exists()


def test_the_command_without_the_flag_is_refused_once_the_run_is_extended(tmp_path, trained_once, tiny_config):
    directory = shutil.copytree(trained_once, tmp_path / "run")
    files.write_json(directory / "config.json", stored_config.to_json(planned(tiny_config, 3.0, 2.0)))
    with pytest.raises(UserError, match=r"num_epochs: 3.0 -> 2.0.*, or --extend-to for more epochs"):
        training.train(tiny_config, directory)
