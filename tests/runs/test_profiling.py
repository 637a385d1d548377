import contextlib
import gzip
import io
import json
import re

import pytest
from helpers import ROOT, launch_here

from resnet_jax.runs.profiling import Cost, costs, table


def process(pid, name):
    return {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}


def thread(pid, tid, name):
    return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}


def run(pid, tid, name, start, duration, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": duration, "args": args}


HOST = [process(1, "/host:CPU"), thread(1, 7, "python"), run(1, 7, "PjitFunction(train_step)", 0.0, 9e6), {}]


def test_on_a_cpu_operations_are_those_that_name_one_of_xlas_each_without_what_runs_inside_it():
    trace = [
        *HOST,
        run(1, 8, "while.1", 0.0, 1000.0, hlo_op="while.1"),
        run(1, 8, "dot", 100.0, 200.0, hlo_op="dot"),
        run(1, 8, "call", 400.0, 500.0, hlo_op="call"),
        run(1, 8, "dot", 500.0, 300.0, hlo_op="dot"),
        run(1, 8, "add", 1000.0, 1000.0, hlo_op="add"),
        run(1, 9, "dot", 0.0, 2000.0, hlo_op="dot"),  # on another thread, so not inside any of these
    ]
    assert costs(trace) == [
        Cost("dot", 2.5, 0.625, 3),
        Cost("add", 1.0, 0.25, 1),
        Cost("while.1", 0.3, 0.075, 1),
        Cost("call", 0.2, 0.05, 1),
    ]


GPU = [process(2, "/device:GPU:0"), thread(2, 20, "Stream #20(Compute)"), thread(2, 21, "Stream #21(MemcpyH2D)")]
KERNELS = [
    run(2, 20, "sm90_xmma_fprop", 0.0, 3000.0, hlo_op="cudnn-conv.1"),
    run(2, 20, "loop_add_fusion", 3000.0, 500.0),  # of a CUDA graph, which names no operation
    run(2, 21, "MemcpyH2D", 0.0, 250.0),
]


def test_on_a_gpu_operations_are_the_kernels_of_its_streams():
    found = costs([*HOST, run(1, 8, "thunk", 0.0, 9e6, hlo_op="thunk"), *GPU, *KERNELS])
    assert [(cost.name, cost.milliseconds, cost.calls) for cost in found] == [
        ("sm90_xmma_fprop", 3.0, 1),
        ("loop_add_fusion", 0.5, 1),
        ("MemcpyH2D", 0.25, 1),
    ]


def test_where_there_is_a_timeline_of_xlas_operations_they_are_those():
    timeline = [thread(2, 30, "XLA Ops"), run(2, 30, "fusion.3", 0.0, 1000.0)]
    assert costs([*HOST, *GPU, *KERNELS, *timeline]) == [Cost("fusion.3", 1.0, 1.0, 1)]


def test_a_trace_without_operations_has_no_costs():
    assert costs(HOST) == []


def test_the_table_has_a_line_an_operation():
    assert table([Cost("dot", 2.5, 0.625, 3)]).splitlines()[1].split() == ["2.500", "62.5%", "3", "dot"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profiled") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        launch_here(f"--config={ROOT}/configs/final.py:smoke", "--workdir", directory, "--profile=3:4")
    return directory, stdout.getvalue()


def test_a_run_leaves_a_trace_of_the_steps_that_were_asked_for(profiled):
    directory, _ = profiled
    (path,) = directory.glob("profile/plugins/profile/*/*.trace.json.gz")  # where TensorBoard looks
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    assert {"displayTimeUnit", "traceEvents"} <= trace.keys()
    runs = {
        event["args"]["run_id"]
        for event in trace["traceEvents"]
        if event.get("args", {}).get("hlo_module") == "jit_train_step"
    }
    assert len(runs) == 4


def test_a_run_prints_the_ten_costliest_operations_of_its_trace(profiled):
    directory, stdout = profiled
    lines = stdout.splitlines()
    (heading,) = [i for i, line in enumerate(lines) if line.split() == ["ms", "share", "calls", "operation"]]
    rows = [line.split() for line in lines[heading + 1 : heading + 11]]
    assert all(re.fullmatch(r"[\d.]+ [\d.]+% \d+ \S+", " ".join(row)) for row in rows)
    times = [float(row[0]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0
    assert lines[heading + 11].startswith(f"steps 3 to 6 are traced in {directory}/profile/")


def test_calls_of_several_steps_are_traced_whole_and_named(tmp_path, capsys):
    flags = ["--profile=4:1", "--config.pipeline=device", "--config.steps_per_call=3"]
    launch_here(f"--config={ROOT}/configs/final.py:smoke", "--workdir", tmp_path / "run", *flags)
    (path,) = tmp_path.glob("run/profile/plugins/profile/*/*.trace.json.gz")
    assert f"steps 4 to 6 are traced in {path}" in capsys.readouterr().out


def test_a_run_that_stops_amid_its_trace_leaves_what_there_is_of_it(tmp_path, capsys):
    flags = ["--profile=1:8", "--max-seconds=0"]
    with pytest.raises(SystemExit) as stop:
        launch_here(f"--config={ROOT}/configs/final.py:smoke", "--workdir", tmp_path / "run", *flags)
    assert stop.value.code == 124
    (path,) = tmp_path.glob("run/profile/plugins/profile/*/*.trace.json.gz")
    assert f"steps 1 to 1 are traced in {path}" in capsys.readouterr().out
