import json
import subprocess
import sys

import pytest
from helpers import ROOT, assert_user_error

from benchmarks import benchmark, timing

SMOKE = ["--config", "configs/final.py:smoke"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes as it is told: its time, in a list."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_a_step_is_dispatched_while_the_one_before_it_runs_and_all_are_waited_for(clock):
    calls = []

    def dispatch():
        calls.append(f"dispatch {len(calls)}")
        return calls[-1]

    def wait(dispatched):
        calls.append(f"wait for {dispatched}")
        clock[0] += 2.0

    rate = timing.throughput(dispatch, wait, images=10, seconds=3.0)
    assert calls[:3] == ["dispatch 0", "dispatch 1", "wait for dispatch 0"]
    assert calls[3:] == ["dispatch 3", "wait for dispatch 1", "wait for dispatch 3"]
    assert rate == 3 * 10 / 6.0
    assert timing.throughput(dispatch, wait, images=10, seconds=0.0) == 5.0


def test_repeats_are_interleaved_after_a_warm_up_that_does_not_count():
    calls = []

    def contender(name):
        def measure(seconds):
            calls.append(name)
            assert seconds == 2.0
            return float(len(calls))

        return measure

    rates = timing.interleave({"a": contender("a"), "b": contender("b")}, repeats=2, seconds=2.0)
    assert calls == ["a", "b"] * 3
    assert rates == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "resnet_jax", "benchmark", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def measured(output, *arguments):
    """The result of a benchmark, after its form has been checked."""
    done = run(*SMOKE, "--seconds=0.1", "--output", output, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result) == {"cases", "config", "environment"}
    assert result["config"]["batch_size"] == 128
    assert result["environment"]["versions"]["jax"]
    for case in result["cases"]:
        assert case["num_params"] == 5266
        assert 1e5 < case["train_flops_per_image"] < 1e7
        assert "\n".join(benchmark.table(case)) in done.stdout
        for figure in case["figures"].values():
            assert set(figure) == {"unit", "median", "min", "max", "repeats"}
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    return result


def test_all_is_measured(tmp_path):
    (case,) = measured(tmp_path / "result.json", "--repeats=1", "--config.pipeline=device")["cases"]
    units = {name: figure["unit"] for name, figure in case["figures"].items() if name != "memory_device"}
    assert units == {
        "startup_cold": "s",
        "startup_warm": "s",
        "memory_host": "GB",
        "save": "s",
        "train_step": "images/s",
        "train_step_flops": "GFLOP/s",
        "eval_step": "images/s",
        "pipeline": "images/s",
        "naive_pipeline": "images/s",
        "end_to_end": "images/s",
        "end_to_end / train_step": "ratio",
        "pipeline / naive_pipeline": "ratio",
    }
    (end_to_end,), (step,) = (case["figures"][name]["repeats"] for name in ("end_to_end", "train_step"))
    assert case["figures"]["end_to_end / train_step"]["repeats"] == [end_to_end / step]
    assert 0.3 < case["figures"]["memory_host"]["median"] < 8.0
    assert (case["batch_size"], case["dtype"]) == (128, "float32")


def test_the_streaming_pipeline_is_measured_alone_and_in_the_loop(tmp_path):
    (case,) = measured(tmp_path / "result.json", "--repeats=1", "--only=pipeline,end_to_end")["cases"]
    assert list(case["figures"]) == ["pipeline", "end_to_end"]


def test_each_batch_size_dtype_and_number_of_devices_is_a_case(tmp_path):
    result = measured(
        tmp_path / "result.json",
        *("--only=train_step", "--repeats=2"),
        *("--batch-sizes=32,64", "--dtypes=bfloat16", "--device-counts=1,4"),
    )
    found = [(case["batch_size"], case["dtype"], case["devices"]) for case in result["cases"]]
    assert found == [(b, "bfloat16", n) for b in (32, 64) for n in (1, 4)]
    for case in result["cases"]:
        assert [len(figure["repeats"]) for figure in case["figures"].values()] == [2, 2]


MISTAKES = {
    "no such measurement": (["--only=train"], ["--only", "train_step,eval_step"]),
    "nothing to measure": (["--only="], ["--only"]),
    "a batch size that is no number": (["--batch-sizes=128,many"], ["--batch-sizes", "whole numbers >= 1"]),
    "no devices": (["--device-counts=0"], ["--device-counts", "whole numbers >= 1"]),
    "no repeats": (["--repeats=0"], ["--repeats"]),
    "an unknown dtype": (["--dtypes=float16"], ["config.model.dtype is 'float16'", "'float32', 'bfloat16'"]),
    "a time without end": (["--seconds=inf"], ["--seconds", "number of seconds"]),
    "a time that is no number": (["--seconds=nan"], ["--seconds", "number of seconds"]),
    "a batch that devices cannot share, of the last case": (
        ["--batch-sizes=64,63", "--device-counts=1,2"],
        ["batch_size 63", "62 or 64"],
    ),
    "more devices than images": (["--batch-sizes=8", "--device-counts=100000"], ["batch_size 8", "100000 devices"]),
    "a folder that is not there": (["--output=nowhere/x.json"], ["--output", "nowhere"]),
    "a folder that takes no files": (["--output=/proc/x.json"], ["--output /proc/x.json"]),
    "no output": (["--output="], ["--output"]),
    "PyTorch on two devices": (["--against-torch", "--device-counts=2"], ["--device-counts=1"]),
    "a Python that is not there": (
        ["--against-torch", "--device-counts=1", "--torch-python=nowhere/python"],
        ["--torch-python nowhere/python"],
    ),
    "a Python without PyTorch": (
        ["--against-torch", "--device-counts=1", "--torch-python=false"],
        ["false: it ended", "as --torch-python=PYTHON"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake):
    arguments, words = MISTAKES[mistake]
    done = run(*SMOKE, "--only=train_step", *arguments)
    assert_user_error(done, *words)
    assert "images/s" not in done.stdout
