import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_user_error

from resnet_jax import claims, report


def reproduce(folder, *arguments):
    """Run `benchmarks.reproduce` on a tiny config, and return the results that it wrote."""
    results = folder / "results"
    results.mkdir(exist_ok=True)
    flags = ["--config=configs/final.py:smoke", "--data=digits", "--epochs=1", "--seconds=0.05", "--no-torch"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.reproduce",
            *arguments,
            *flags,
            f"--runs={folder / 'runs'}",
            f"--results={results}",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: json.loads(path.read_text()) for path in results.iterdir()}


def test_each_seed_is_a_run_with_its_speed_and_its_share_of_the_peak(tmp_path):
    ((name, result),) = reproduce(tmp_path, "final", "--seeds", "3", "--peak-tflops=2").items()
    assert name == "final-cpu-seed3.json"
    assert (result["seed"], result["steps"]) == (3, 11)
    assert (result["config"]["pipeline"], result["config"]["model"]["dtype"]) == ("device", "float32")
    assert report.read_run(tmp_path / "results" / name) == (name.removesuffix(".json"), result)
    assert 0 < result["seconds_after_startup"] < result["seconds"]
    flops = result["images_per_second"] * result["train_flops_per_image"]
    assert result["share_of_peak"] == pytest.approx(flops / 2e12)


def test_batch_sizes_join_those_that_were_measured_before(tmp_path):
    first = reproduce(tmp_path, "step", "--batch-sizes", "32")["step-cpu.json"]
    before = first | {"cases": [{"batch_size": 64, "old": 1}, {"batch_size": 32, "old": 1}]}
    (tmp_path / "results" / "step-cpu.json").write_text(json.dumps(before))
    joined = reproduce(tmp_path, "step", "--batch-sizes", "32")["step-cpu.json"]
    assert [case["batch_size"] for case in joined["cases"]] == [32, 64]
    assert ["old" in case for case in joined["cases"]] == [False, True]
    (tmp_path / "results" / "step-cpu.json").write_text(json.dumps(before | {"config": {}}))
    anew = reproduce(tmp_path, "step", "--batch-sizes", "32")["step-cpu.json"]
    assert [case["batch_size"] for case in anew["cases"]] == [32]


MISTAKES = {
    "no GPU, and no CPU asked for": ({"JAX_PLATFORMS": ""}, [], ["no GPU", "JAX_PLATFORMS=cpu"]),
    "a part that is none": ({}, ["stepp"], ["no part 'stepp'", "resnet18"]),
    "a folder that cannot be made": ({"JAX_PLATFORMS": "cpu"}, ["--results=README.md/x"], ["--results README.md/x"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_measured(mistake):
    environment, flags, words = MISTAKES[mistake]
    command = [sys.executable, "-m", "benchmarks.reproduce", "--data=digits", *flags, "step"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert_user_error(done, *words)


@pytest.mark.slow
def test_resnet18_is_compared_in_parameters_operations_and_seconds(tmp_path):
    channels = ("--channels", "8", "16", "16", "16")
    result = reproduce(tmp_path, "resnet18", *channels, "--rounds=2")["resnet18-cpu.json"]
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
