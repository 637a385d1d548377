import functools
import json
import os
import sys

import pytest
from helpers import ROOT, launch, tool

from benchmarks import benchmark, measure, timing
from resnet_jax import setup
from resnet_jax.errors import UserError

# A network that compiles in a second.
SMOKE = [
    *("--config", f"{ROOT}/configs/final.py:smoke"),
    *("--config.model.channel_list=(8,8,8)", "--config.model.block_list=(1,0,0)"),
]


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


@pytest.fixture
def benchmark_here(monkeypatch):
    """Run the tool in this process, in the repository, and leave the environment as it was."""
    monkeypatch.chdir(ROOT)
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, os.environ.get(name, "false"))
    return functools.partial(tool, "benchmark", *SMOKE)


def check(output, printed):
    """The result of a benchmark, after its form has been checked."""
    result = json.loads(output.read_text())
    assert set(result) == {"cases", "config", "environment"}
    assert result["config"]["batch_size"] == 128
    assert result["environment"]["versions"]["jax"]
    for case in result["cases"]:
        assert case["num_params"] == 1506
        assert 1e5 < case["train_flops_per_image"] < 1e7
        assert "\n".join(benchmark.table(case)) in printed
        for figure in case["figures"].values():
            assert set(figure) == {"unit", "median", "min", "max", "repeats"}
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    return result


@pytest.fixture
def measured(benchmark_here, tmp_path, capsys):
    """Run a benchmark in this process, and return its result."""

    def measure(*arguments):
        benchmark_here("--seconds=0.1", f"--output={tmp_path}/result.json", *arguments)
        return check(tmp_path / "result.json", capsys.readouterr().out)

    return measure


def test_all_is_measured(measured):
    (case,) = measured("--repeats=1", "--config.pipeline=device")["cases"]
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
        "draws": "images/s",
        "end_to_end": "images/s",
        "end_to_end / train_step": "ratio",
        "pipeline / naive_pipeline": "ratio",
    }
    (end_to_end,), (step,) = (case["figures"][name]["repeats"] for name in ("end_to_end", "train_step"))
    assert case["figures"]["end_to_end / train_step"]["repeats"] == [end_to_end / step]
    assert 0.3 < case["figures"]["memory_host"]["median"] < 8.0
    assert (case["batch_size"], case["dtype"]) == (128, "float32")


def test_an_augmentation_that_the_naive_pipeline_lacks_is_not_compared():
    with pytest.raises(UserError, match=r"naive_pipeline cannot be compared, because it has no augment\.crop_fill"):
        benchmark.main(["--config", str(ROOT / "configs" / "best.py"), "--only=naive_pipeline"])


def test_operations_can_be_counted_where_jax_is_told_to_use_only_a_gpu(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(benchmark, "cases_of", lambda *_: [])
    benchmark.main(["--config", str(ROOT / "configs" / "quickstart.py")])
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"


def test_pytorch_sees_no_gpu_where_jax_computes_on_the_cpu(monkeypatch, tmp_path):
    program = "import json, os; input(); print(json.dumps(os.environ['CUDA_VISIBLE_DEVICES']), flush=True)"
    (tmp_path / "as_pytorch.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with measure.in_torch("as_pytorch", {}, sys.executable) as (_, visible):
        assert visible == ""


def test_the_steps_of_a_call_are_timed_together(tiny_config, monkeypatch):
    """On an accelerator, training takes up to 50 steps a call, and a single step is another program."""
    tiny_config.pipeline, tiny_config.steps_per_call = "device", 3
    start = setup.setup(tiny_config, 2)
    monkeypatch.setattr(timing, "throughput", lambda dispatch, wait, images, seconds: (wait(dispatch()), images))
    metrics, images = measure.train_step(start.config, start)(1.0)
    assert images == 3 * tiny_config.batch_size
    assert metrics.rejected.shape == (3,)
    losses = metrics.means.loss.total / metrics.means.loss.count
    assert losses[0] > losses[2]  # each step learns the same batch


def test_the_streaming_pipeline_is_measured_alone_and_in_the_loop(measured):
    (case,) = measured("--repeats=1", "--only=pipeline,end_to_end")["cases"]
    assert list(case["figures"]) == ["pipeline", "end_to_end"]


def test_each_batch_size_dtype_and_number_of_devices_is_a_case(measured):
    result = measured(
        *("--only=train_step", "--repeats=2"),
        *("--batch-sizes=32,64", "--dtypes=bfloat16", "--device-counts=1,2"),
    )
    found = [(case["batch_size"], case["dtype"], case["devices"]) for case in result["cases"]]
    assert found == [(b, "bfloat16", n) for b in (32, 64) for n in (1, 2)]
    for case in result["cases"]:
        assert [len(figure["repeats"]) for figure in case["figures"].values()] == [2, 2]


def test_a_number_of_devices_that_the_machine_has_not_is_made(tmp_path):
    output = tmp_path / "result.json"
    flags = ("--only=train_step", "--repeats=1", "--seconds=0.1", "--device-counts=4", f"--output={output}")
    done = launch(*SMOKE, *flags, program=("-m", "resnet_jax", "benchmark"))
    assert done.returncode == 0, done.stderr
    (case,) = check(output, done.stdout)["cases"]
    assert (case["batch_size"], case["devices"]) == (128, 4)


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
def test_a_mistake_is_one_line(benchmark_here, capfd, mistake):
    arguments, words = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        benchmark_here("--only=train_step", *arguments)
    assert stop.value.code == 2
    printed = capfd.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert "images/s" not in printed.out
