import argparse
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, assert_user_error, tool

from reproduction import claims, reproduce
from resnet_jax.cli import command_line
from resnet_jax.errors import UserError
from resnet_jax.reporting import report


def flags_of(folder, epochs=1):
    """The flags of a tiny config, whose runs and results are in a folder."""
    (folder / "results").mkdir(exist_ok=True)
    flags = ["--config=configs/final.py:smoke", "--data=digits", f"--epochs={epochs}", "--seconds=0.05", "--no-torch"]
    return [*flags, f"--runs={folder / 'runs'}", f"--results={folder / 'results'}"]


def read_results(folder):
    return {path.name: json.loads(path.read_text()) for path in (folder / "results").iterdir()}


def results_of(folder, *arguments, epochs=1):
    """Run `reproduction.reproduce` on a tiny config, and return the results that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "reproduction.reproduce", *arguments, *flags_of(folder, epochs)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return read_results(folder)


@pytest.fixture
def results_here(tmp_path, monkeypatch):
    """Run it, and the benchmarks that it runs, in this process."""

    def run(*command):
        assert command[:3] == ("-m", "resnet_jax", "benchmark")
        tool(*command[2:])

    def results(*arguments):
        reproduce.main([*arguments, *flags_of(tmp_path)])
        return read_results(tmp_path)

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "check_machine", lambda _: "cpu")
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE"):  # the benchmark changes them
        monkeypatch.setenv(name, os.environ.get(name, "false"))
    return results


def test_each_seed_is_a_run_with_its_speed_and_its_share_of_the_peak(tmp_path):
    ((name, result),) = results_of(tmp_path, "final", "--seeds", "3", "--peak-tflops=2").items()
    assert name == "final-cpu-seed3.json"
    assert (result["seed"], result["steps"]) == (3, 11)
    assert (result["config"]["pipeline"], result["config"]["model"]["dtype"]) == ("device", "float32")
    assert report.read_run(tmp_path / "results" / name) == (name.removesuffix(".json"), result)
    assert 0 < result["seconds_after_startup"] < result["seconds"]
    flops = result["images_per_second"] * result["train_flops_per_image"]
    assert result["share_of_peak"] == pytest.approx(flops / 2e12)


def test_batch_sizes_join_those_that_were_measured_before(tmp_path, results_here):
    path = tmp_path / "results" / "step-cpu.json"
    first = results_here("step", "--batch-sizes", "32")[path.name]
    before = first | {"cases": [{"batch_size": 64, "old": 1}, {"batch_size": 32, "old": 1}]}
    path.write_text(json.dumps(before))
    joined = results_here("step", "--batch-sizes", "32")[path.name]
    assert [case["batch_size"] for case in joined["cases"]] == [32, 64]
    assert ["old" in case for case in joined["cases"]] == [False, True]
    path.write_text(json.dumps(before | {"config": {}}))
    anew = results_here("step", "--batch-sizes", "32")[path.name]
    assert [case["batch_size"] for case in anew["cases"]] == [32]


MISTAKES = {
    "no GPU, and no CPU asked for": (
        {"JAX_PLATFORMS": ""},
        [],
        ["needs a GPU, but JAX finds none", "JAX_PLATFORMS=cpu"],
    ),
    "a part that is none": ({}, ["stepp"], ["unknown PART 'stepp'", "resnet18"]),
    "a field that has a flag": ({}, ["--config.seed=7"], ["--config.seed=7 does not change all parts: give --seeds"]),
    "a field, and the results of the configs": (
        {"JAX_PLATFORMS": "cpu"},
        ["--config.label_smoothing=0.1", "--runs=/tmp/x", f"--results={ROOT / 'results'}"],
        ["makes other results than those of the configs", "--results"],
    ),
    "a folder that cannot be made": ({"JAX_PLATFORMS": "cpu"}, ["--results=README.md/x"], ["--results README.md/x"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_measured(mistake):
    environment, flags, words = MISTAKES[mistake]
    command = [sys.executable, "-m", "reproduction.reproduce", "--data=digits", *flags, "step"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert_user_error(done, *words)


def test_what_is_measured_on_a_cpu_is_refused_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "check_machine", lambda _: "gpu")
    with pytest.raises(UserError, match="narrow is measured on a CPU: set JAX_PLATFORMS=cpu"):
        reproduce.main(["narrow", *flags_of(tmp_path)])


def test_a_comparison_without_pytorch_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "check_machine", lambda _: "gpu")
    monkeypatch.setattr(reproduce, "has_torch", lambda: False)
    monkeypatch.setattr(reproduce, "run", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=r"step compares with PyTorch, which .* lacks: .* or give --no-torch"):
        reproduce.main([*(flag for flag in flags_of(tmp_path) if flag != "--no-torch")])


PARTS = {  # by name of the results: is it SGD, AutoAugment, all images for training, float32, one seed
    "final": (False, False, False, False, False),
    "final-f32": (False, False, False, True, True),
    "sgd": (True, False, False, False, False),
    "final-autoaugment": (False, True, True, False, True),
    "best": (False, False, True, False, False),
    "speedrun": (False, False, True, False, False),
}


def test_the_parts_of_a_gpu_train_what_they_say(monkeypatch):
    trained = {}
    parser = command_line.ArgumentParser("launch.py", None)
    command_line.add_config_arguments(parser)

    def train_with_speed(arguments, name, flags, one_seed=False, views=1):
        assert views == (6 if name in ("best", "speedrun") else 1)
        _, config = command_line.parse_config(parser, flags)
        trained[name] = (config, one_seed)

    monkeypatch.setattr(reproduce, "train_with_speed", train_with_speed)
    monkeypatch.chdir(ROOT)
    for part in (
        reproduce.final,
        reproduce.final_f32,
        reproduce.sgd,
        reproduce.autoaugment,
        reproduce.best,
        reproduce.speedrun,
    ):
        part(
            argparse.Namespace(
                config="configs/final.py", data="digits", dtype="bfloat16", overrides=["--config.label_smoothing=0.5"]
            )
        )
    assert set(trained) == set(PARTS)
    for name, (config, one_seed) in trained.items():
        assert PARTS[name] == (
            config.optim.name == "sgd",
            config.augment.policy == "cifar10",
            config.data.validation_ratio == 0,
            config.model.dtype == "float32",
            one_seed,
        )
        assert (config.data.name, config.pipeline, config.label_smoothing) == ("digits", "device", 0.5)


@pytest.mark.slow
def test_the_cpus_protocol_is_four_runs_a_seed_that_the_report_takes(tmp_path):
    results = results_of(tmp_path, "narrow", "--seeds", "0", epochs=2)
    variants = ("adamw", "adamw_plain", "sgd", "sgd_plain")
    assert sorted(results) == [f"cpu-narrow-{variant}-seed0.json" for variant in variants]
    for variant, (name, result) in zip(variants, sorted(results.items()), strict=True):
        config = result["config"]
        assert (config["num_epochs"], config["data"]["name"]) == (2, "digits")
        assert config["optim"]["name"] == variant.removesuffix("_plain")
        assert (config["augment"]["crop_padding"] == 0) == variant.endswith("plain")
        assert report.read_run(tmp_path / "results" / name)[1] == result


@pytest.mark.slow
def test_the_ladders_runs_join_one_file_by_change_and_seed(tmp_path):
    short = ("ladder", "--changes", "nothing", "no_crop", "--seeds")
    first = results_of(tmp_path, *short, "0", epochs=30)["ladder-cpu.json"]["changes"]
    both = results_of(tmp_path, *short, "1", epochs=30)["ladder-cpu.json"]["changes"]
    assert {change: [*of["runs"]] for change, of in both.items()} == {
        "nothing": ["0", "1"],
        "no_crop": ["0", "1"],
    }
    assert both["no_crop"]["fields"] == {"augment.crop_padding": 0}
    for change, of in both.items():
        assert of["runs"]["0"] == first[change]["runs"]["0"]
        for run in of["runs"].values():
            assert 0.2 < run["validation_accuracy"] < 1
            assert run["images_per_second"] > 0


@pytest.mark.slow
def test_the_ladder_does_not_mix_runs_of_two_recipes(tmp_path):
    short = ("ladder", "--changes", "nothing", "--seeds")
    before = results_of(tmp_path, *short, "0", "1", epochs=30)["ladder-cpu.json"]
    before["protocol"]["config"]["batch_size"] += 1  # as if `speedrun.py` had changed since
    (tmp_path / "results" / "ladder-cpu.json").write_text(json.dumps(before), "utf-8")
    after = results_of(tmp_path, *short, "0", epochs=30)["ladder-cpu.json"]
    assert [*after["changes"]["nothing"]["runs"]] == ["0"]


@pytest.mark.slow
def test_resnet18_is_compared_in_parameters_operations_and_seconds(tmp_path):
    channels = ("--channels", "8", "16", "16", "16")
    result = results_of(tmp_path, "resnet18", *channels, "--rounds=2")["resnet18-cpu.json"]
    ours, theirs, less = result["final"], result["resnet18"], result["final_has_less_by"]
    assert ours["num_params"] == 5266
    assert theirs["num_params"] > 20_000
    for name in ("num_params", "train_flops_per_image"):
        assert less[name] == 1 - ours[name] / theirs[name]
    by_round = "seconds_per_epoch_by_round"
    assert less[by_round] == [1 - our / their for our, their in zip(ours[by_round], theirs[by_round], strict=True)]
    assert less["seconds_per_epoch"] == sum(less[by_round]) / 2
    for name in ("final", "resnet18"):
        (case,) = result["benchmarks"][name]["cases"]
        seconds = case["dataset"]["splits"]["train"] / case["figures"]["end_to_end"]["median"]
        assert result[name][by_round][1] == seconds
        assert result[name]["seconds_per_epoch"] == pytest.approx(sum(result[name][by_round]) / 2)
    assert claims.table([], result)[-1].basis.endswith("2 rounds")


@pytest.mark.slow
def test_a_speedrun_says_its_accuracy_over_six_views_and_how_long_everything_took(tmp_path):
    result = results_of(tmp_path, "speedrun", "--seeds", "0", epochs=30)["speedrun-cpu-seed0.json"]
    (evaluation,) = (tmp_path / "runs").glob("*/eval-6-views.json")
    assert result["test_accuracy_over_views"] == json.loads(evaluation.read_text())["test"]["accuracy"]
    assert result["test_accuracy_over_views"] > 0.5
    assert result["evaluation_seconds"] > 0
    assert result["total_seconds"] == result["seconds"] - result["startup_seconds"] + result["evaluation_seconds"]
