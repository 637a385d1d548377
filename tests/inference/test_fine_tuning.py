import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from helpers import ROOT, launch_here, mistake_of_tool, rows, tool
from test_training import at_step

from configs import sgd
from resnet_jax import config as config_lib
from resnet_jax import load, train, train_state
from resnet_jax.data import datasets
from resnet_jax.disk import files
from resnet_jax.errors import TrainingDiverged, UserError
from resnet_jax.inference import fine_tuning
from resnet_jax.inference.restore import restore_run
from resnet_jax.reporting import evaluation, model_card
from resnet_jax.runs import preemption, stored_config, workdir
from resnet_jax.setup import setup


@pytest.fixture
def tuned(tiny_config, run):
    """The config of a run that starts from the weights of `run`: three epochs of 21 steps."""
    return config_lib.replaced(tiny_config, {"init_from": str(run), "seed": 1, "num_epochs": 3.0})


@pytest.fixture
def other_classes(tmp_path, tiny_config):
    """The name of a data set with the images of digits, as many classes, and other names for them."""
    digits = datasets.load(tiny_config.data)
    path = tmp_path / "letters.npz"
    np.savez(
        path,
        **{
            f"{part}_{key}": array
            for part in ("train", "test")
            for key, array in getattr(digits, part)._asdict().items()
        },
        class_names=list("abcdefghij"),
    )
    return f"npz:{path}"


def first_step(config, directory):
    """The variables of step 0 of a run, which is stopped at its first step."""
    with pytest.raises(preemption.TrainingInterrupted):
        train(config, directory, max_seconds=0.001)
    return variables(config, directory, "0")


def variables(config, directory, which):
    _, state, _ = restore_run(config, directory, which)
    return jax.device_get({"params": state.params, "batch_stats": state.batch_stats})


def equal(some, others):
    return train_state.digest(some) == train_state.digest(others)


def without_classifier(variables):
    return {"batch_stats": variables["batch_stats"], "params": {**variables["params"], "classifier": None}}


def result(directory):
    return json.loads((directory / "result.json").read_text())


def test_a_first_step_that_is_rejected_names_the_checkpoint_that_it_started_from(tmp_path, tuned):
    tuned.abort_grad_norm = 1e-9
    with pytest.raises(TrainingDiverged, match="the state before it is checkpoint 0: lower"):
        train(tuned, tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "failed_step.json").read_text())["checkpoint_step"] == 0


def test_with_the_same_classes_the_whole_network_is_taken(tmp_path, run, tuned, capsys):
    taken = first_step(tuned, tmp_path / "tuned")
    assert equal(taken, load(run).variables)
    assert (
        f"backbone and classifier of {run}, step {load(run).step}: it has the same class names\n"
        in capsys.readouterr().out
    )


def test_with_other_classes_as_many_the_classifier_is_drawn_from_the_seed(tmp_path, run, tuned, other_classes, capsys):
    tuned.data.name = other_classes
    taken = first_step(tuned, tmp_path / "tuned")
    assert equal(without_classifier(taken), without_classifier(load(run).variables))
    assert equal(taken["params"]["classifier"], setup(tuned).state.params["classifier"])
    line = f"backbone of {run}, step {load(run).step}; the classifier is new: its class names differ\n"
    assert line in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned" / "initial_weights.json").read_text())["classifier"] == "new"


def test_an_export_gives_the_same_start_as_its_run(tmp_path, run, tuned):
    export = tmp_path / "network.safetensors"
    tool("export", run, "--format=safetensors", f"--output={export}")
    of_run = first_step(tuned, tmp_path / "of_run")
    tuned.init_from = str(export)
    assert equal(first_step(tuned, tmp_path / "of_export"), of_run)
    origins = [json.loads((tmp_path / name / "initial_weights.json").read_text()) for name in ("of_run", "of_export")]
    assert [origin.pop("origin") for origin in origins] == [str(run), str(export)]
    assert origins[0] == origins[1]
    assert origins[0]["sha256"] == train_state.digest(load(run).variables)


@pytest.mark.parametrize("pipeline", ["tf_data", "device"])
def test_a_resumed_run_is_the_uninterrupted_one_and_never_reads_its_origin_again(
    tmp_path, run, tuned, monkeypatch, pipeline
):
    """The origin is deleted while the run is stopped; the card and the result still name it."""
    tuned.pipeline, tuned.init_from = pipeline, str(shutil.copytree(run, tmp_path / "origin"))
    whole = train(tuned, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(preemption.TrainingInterrupted):
            train(tuned, tmp_path / "parts")
    shutil.rmtree(tmp_path / "origin")
    parts = train(tuned, tmp_path / "parts")
    assert parts.state_digest == whole.state_digest
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert parts.initial_weights == whole.initial_weights
    assert parts.initial_weights == {
        "origin": tuned.init_from,
        "checkpoint_step": load(run).step,
        "sha256": train_state.digest(load(run).variables),
        "classifier": "taken",
    }
    evaluation.run(tuned, tmp_path / "parts", "best")
    card = model_card.card(tmp_path / "parts")
    assert (
        f"starting from the weights of origin, step {load(run).step} (SHA-256 `{parts.initial_weights['sha256']}`)"
        in card
    )
    assert '| `init_from` | `"origin"` |' in card
    assert str(tmp_path) not in card


def test_a_run_that_died_before_its_first_checkpoint_starts_from_the_weights(tmp_path, run, tuned):
    (tmp_path / "checkpoints" / "0.orbax-checkpoint-tmp-1").mkdir(parents=True)
    files.write_json(tmp_path / "config.json", stored_config.to_json(tuned))
    files.write_json(tmp_path / workdir.INITIAL_WEIGHTS, {})
    assert equal(first_step(tuned, tmp_path), load(run).variables)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_rate_of_0_trains_the_classifier_alone(tmp_path, run, tuned, sgd_optim, optimizer):
    """Bitwise: no weight decay, and no new batch statistics."""
    if optimizer == "sgd":
        tuned.optim = sgd_optim
    tuned.optim.backbone_rate, tuned.num_epochs = 0.0, 1.0
    assert tuned.optim.weight_decay > 0
    train(tuned, tmp_path / "tuned")
    after = variables(tuned, tmp_path / "tuned", "latest")
    assert equal(without_classifier(after), without_classifier(load(run).variables))
    assert not equal(after, load(run).variables)


@pytest.fixture
def sgd_optim():
    return sgd.get_config().optim


def test_with_a_rate_above_0_all_is_trained_and_batch_norm_follows_the_new_images(tmp_path, run, tuned):
    tuned.optim.backbone_rate, tuned.num_epochs = 0.1, 1.0
    train(tuned, tmp_path / "tuned")
    after, before = variables(tuned, tmp_path / "tuned", "latest"), jax.device_get(load(run).variables)
    unchanged = jax.tree.map(np.array_equal, after, before)
    assert not any(jax.tree.leaves(unchanged))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model.channel_list": (8, 24)}, ["is another network, with config.model.channel_list (8, 16): set that"]),
        ({"model.block": "bottleneck"}, ["is another network, with config.model.block 'basic': set that"]),
        ({"model.activation": "gelu"}, ["is another network, with config.model.activation 'relu': set that"]),
        ({"model.global_pool": "max"}, ["is another network, with config.model.global_pool 'mean': set that"]),
        ({"model.logit_scale": 0.5}, ["is another network, with config.model.logit_scale 1.0: set that"]),
        ({"init_from": "runs/absent"}, ["config.init_from: runs/absent holds no run"]),
        ({"init_from": "absent.safetensors"}, ["config.init_from: absent.safetensors cannot be used"]),
    ],
    ids=["channels", "block", "activation", "pool", "scale", "no run", "no file"],
)
def test_weights_that_cannot_be_taken_are_one_line_and_nothing_is_written(tmp_path, tuned, fields, words):
    with pytest.raises(UserError) as refused:
        train(config_lib.replaced(tuned, fields), tmp_path / "tuned")
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "tuned").exists()


def test_several_processes_start_from_a_file_only(tuned, monkeypatch):
    start = setup(tuned)
    monkeypatch.setattr(fine_tuning.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"config.init_from: several processes cannot load .*: export it"):
        fine_tuning.initialise(tuned, start)


def test_from_the_command_line_and_another_origin_is_another_run(tmp_path, run, capsys):
    smoke = (f"--config={ROOT}/configs/final.py:smoke", f"--workdir={tmp_path}/tuned")
    fields = ("--config.model.block_list=(1,1)", "--config.model.channel_list=(8,16)")
    launch_here(*smoke, *fields, f"--config.init_from={run}")
    assert result(tmp_path / "tuned")["initial_weights"]["origin"] == str(run)
    line = mistake_of_tool(capsys, *smoke, *fields, "--config.init_from=runs/other", program=launch_here)
    assert "init_from" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["weights", "load", "weights.npz", "--config=final:smoke"],
        ["search", "--config=search:smoke", "--study=s"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_tool_that_would_not_read_it_refuses_it(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    np.savez("weights.npz", a=np.zeros(1))
    line = mistake_of_tool(capsys, *arguments, "--workdir=run", "--config.init_from=runs/final")
    assert "config.init_from" in line
    assert "leave it out" in line
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]
