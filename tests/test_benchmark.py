import json
import subprocess
import sys

import pytest
from conftest import ROOT, assert_user_error

from resnet_jax import benchmark


def test_repeats_are_interleaved_after_a_warm_up_and_last_long_enough(monkeypatch):
    now, calls = [0.0], []

    def unit(name, seconds, images):
        def work():
            calls.append(name)
            now[0] += seconds
            return images

        return work

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    rates = benchmark.time_repeats({"a": unit("a", 1.0, 10), "b": unit("b", 5.0, 10)}, repeats=2, min_seconds=2.0)
    assert calls == ["a", "b", "a", "a", "b", "a", "a", "b"]
    assert rates == {"a": [10.0, 10.0], "b": [2.0, 2.0]}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "resnet_jax.benchmark", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_table_and_the_file_hold_the_same_figures(tmp_path):
    output = tmp_path / "result.json"
    done = run("--config", "configs/final.py:smoke", "--repeats=3", "--seconds=0.1", "--output", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result["images_per_second"]) == {"train_step", "tf_data_pipeline"}
    for name, rate in result["images_per_second"].items():
        assert len(rate["repeats"]) == 3
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(name)]
        assert f"{rate['median']:.1f}" in line
    assert result["config"]["batch_size"] == 128
    assert result["environment"]["versions"]["jax"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repeats=0", "--config", "configs/final.py:smoke"],
        ["--config", "configs/final.py:smoke", "--output", "nowhere/x.json"],
    ],
)
def test_a_mistake_is_one_line(arguments):
    assert_user_error(run(*arguments))
