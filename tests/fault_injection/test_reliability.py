"""Violence, in processes of their own: kills, full disks, lost hosts, other devices, a long life (`make test-slow`)."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import die
import numpy as np
import postgresql
import pytest
from cpu_devices import xla_flags
from helpers import ROOT, SEARCH, assert_user_error, launch, read_until, rows, saved_by_signal, start

from resnet_jax.search import studies

pytestmark = pytest.mark.slow

SMOKE = ("--config", "configs/final.py:smoke")
LONG = (*SMOKE, "--config.num_epochs=2000.0", "--config.checkpoint_every_steps=10")
OPTIMIZERS = {
    "adamw": SMOKE,
    "sgd": (
        *("--config", "configs/sgd.py", "--config.data.name=digits", "--config.log_every_steps=5"),
        *("--config.model.channel_list=(8,16)", "--config.model.block_list=(1,1)"),
    ),
}
RUNS = OPTIMIZERS | {"device": (*SMOKE, "--config.pipeline=device", "--config.steps_per_call=3")}


def result(directory):
    return json.loads((directory / "result.json").read_text())


def assert_same_end(one, other, note=None):
    """The same state and the same rows."""
    assert result(one)["state_digest"] == result(other)["state_digest"], note
    assert rows(one) == rows(other), note


def steps_saved(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


# 1. Exact resume


@pytest.mark.parametrize("run", RUNS)
def test_a_run_killed_at_chosen_moments_ends_as_one_that_was_not(tmp_path, run):
    """Ten times an optimizer, and the device pipeline; RESNET_JAX_SOAK_KILLS asks for more (`make soak`)."""
    seed = int(os.environ.get("RESNET_JAX_SOAK_SEED", time.time_ns() % 2**32))
    rng = np.random.default_rng(seed)
    kills = int(os.environ.get("RESNET_JAX_SOAK_KILLS", 10))
    more = ("--config.checkpoint_every_steps=7", "--config.eval_every_epochs=2", f"--config.num_epochs={3.0 * kills}")
    command = (*RUNS[run], *more)
    whole = launch(*command, "--workdir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    offset = list(RUNS).index(run) * 3  # so that all together meet every moment more than once
    for kill in range(kills):
        moment = die.MOMENTS[(kill + offset) % len(die.MOMENTS)]
        n = int(rng.integers(1, {"saving": 40, "stepping": 20, "evaluating": 2, "any time": 40}.get(moment, 3)))
        process = start(
            moment,
            n,
            *command,
            "--workdir",
            tmp_path / "killed",
            program=(str(ROOT / "tests" / "fault_injection" / "die.py"),),
        )
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (seed, kill, moment, n, stderr)
    killed = launch(*command, "--workdir", tmp_path / "killed")
    assert killed.returncode == 0, (seed, killed.stderr)
    assert_same_end(tmp_path / "killed", tmp_path / "whole", seed)
    assert not (tmp_path / "killed" / "damaged").exists()  # a kill costs no checkpoint
    assert not list((tmp_path / "killed").glob(".incomplete-*"))


# 2. Preemption


@pytest.mark.parametrize(
    ("signum", "more"),
    [
        *((signum, ()) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
        (signal.SIGTERM, ("--config.pipeline=device", "--config.steps_per_call=3")),
    ],
)
def test_a_signal_ends_a_run_within_ten_seconds_saved(tmp_path, signum, more):
    process = start(*LONG, *more, "--workdir", tmp_path)
    read_until(process, "epoch")
    step = saved_by_signal(process, signum, tmp_path, seconds=10)
    assert steps_saved(tmp_path)[-1] == step


def test_a_signal_in_a_long_evaluation_or_its_compilation_ends_a_run_within_ten_seconds(tmp_path):
    """One step of a deep model, then its evaluation, compiled for the first time: all is saved, so nothing is waited for."""
    process = start(
        *(
            *SMOKE,
            "--config.model.channel_list=(8,32)",
            "--config.model.block_list=(9,9)",
            "--config.model.max_params=0",
        ),
        *("--config.batch_size=2", "--config.num_epochs=0.001", "--config.schedule.warmup_epochs=0.0005"),
        *("--workdir", tmp_path),
        XLA_FLAGS="",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    read_until(process, "epoch")
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert time.monotonic() - sent < 10
    assert process.returncode == 143
    assert stderr == f"stopped by SIGTERM at step 1 of 1, saved in {tmp_path}: rerun the command to resume\n"
    assert steps_saved(tmp_path) == [1]


# 4. Writes


def under_way(directory, *arguments, prefix=()):
    """A run that has saved twice."""
    process = start(*LONG, *arguments, "--workdir", directory, prefix=prefix)
    read_until(process, "epoch    1/2000")  # the end of the first epoch's evaluation
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(steps_saved(directory)) < 2:
        time.sleep(0.01)
    return process


def assert_stops_with_a_line(process, *words):
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 2, stdout + stderr
    (line,) = stderr.splitlines()
    for word in words:
        assert word in line


def assert_goes_on(directory):
    """The run resumes from its newest checkpoint."""
    newest = steps_saved(directory)[-1]
    process = start(*LONG, "--workdir", directory)
    seen = read_until(process, "epoch")
    process.kill()
    process.communicate(timeout=600)
    assert f"resuming {directory} at step {newest} of" in seen
    assert not (directory / "damaged").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where this user may mount one."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mounted)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_disk_that_fills_up_stops_the_run_and_what_was_good_stays(small_disk):
    process = under_way(small_disk / "run")
    with contextlib.suppress(OSError), (small_disk / "fill").open("wb", buffering=0) as fill:
        while True:
            fill.write(bytes(4096))
    assert_stops_with_a_line(process, str(small_disk / "run"), "cannot be written", "No space left on device")
    (small_disk / "fill").unlink()
    assert_goes_on(small_disk / "run")


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(small_disk):
    done = launch(*SMOKE, "--config.model.channel_list=(64,128)", "--workdir", small_disk / "run")
    assert_user_error(done, "its disk has 4.2 MB free", "make room")
    assert [path.name for path in (small_disk / "run").iterdir()] == [".lock"]


def test_a_limit_on_the_size_of_files_stops_the_run_in_one_line(tmp_path):
    """A failed write that needs no rights: the kernel refuses to let a file grow beyond 4 kB."""
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); os.execv(sys.argv[1], sys.argv[1:])"
    process = start(
        *(*LONG, "--workdir", tmp_path),
        prefix=(sys.executable, "-c", limited),
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    assert_stops_with_a_line(
        process, "a checkpoint cannot be written", "File too large", "fix this and rerun the command"
    )


@pytest.fixture
def unprivileged():
    """What makes root heed permissions, or nothing for another user."""
    if os.geteuid():
        return ()
    prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("runs as root, and has no setpriv to heed permissions")
    return prefix


def test_a_folder_that_becomes_read_only_stops_the_run_and_what_was_good_stays(tmp_path, unprivileged):
    process = under_way(tmp_path / "run", prefix=unprivileged)
    (tmp_path / "run" / "checkpoints").chmod(0o555)
    try:
        assert_stops_with_a_line(process, "a checkpoint cannot be written", "Permission denied", "resumes from step")
    finally:
        (tmp_path / "run" / "checkpoints").chmod(0o755)
    assert_goes_on(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, unprivileged):
    tmp_path.chmod(0o555)
    command = [*unprivileged, sys.executable, str(ROOT / "launch.py"), *SMOKE, "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    tmp_path.chmod(0o755)
    assert_user_error(done, f"--workdir {tmp_path / 'run'}", "not a writable folder")


@pytest.mark.parametrize("then", ["deleted", "replaced"])
def test_a_folder_that_is_deleted_or_replaced_under_way_stops_the_run(tmp_path, then):
    run, other = tmp_path / "run", tmp_path / "other"
    if then == "replaced":  # by a run that is complete, for the save under way may still end in its folder
        assert launch(*SMOKE, "--config.seed=1", "--workdir", other).returncode == 0
    process = under_way(run)
    run.rename(tmp_path / "elsewhere")
    if then == "replaced":
        of_other = [other / name for name in ("config.json", "metrics.jsonl", "result.json")]
        before = [path.read_bytes() for path in of_other]
        other.rename(run)
        assert_stops_with_a_line(process, f"{run} was deleted or replaced during the run")
        assert [(run / path.name).read_bytes() for path in of_other] == before
    else:
        assert_stops_with_a_line(process, f"{run}", "deleted or replaced during the run")
        again = launch(*SMOKE, "--workdir", run)  # whatever the last save left there
        assert again.returncode == 0, again.stderr


def test_two_runs_in_one_folder_and_a_lock_that_outlives_no_kill(tmp_path):
    first = under_way(tmp_path / "run")
    assert_user_error(launch(*LONG, "--workdir", tmp_path / "run"), "another process is training in it")
    first.kill()
    first.communicate(timeout=600)
    assert_goes_on(tmp_path / "run")


# 6. Many devices


def test_runs_on_1_2_4_and_8_devices_agree():
    """tests/fault_injection/devices.py says in what, and why not in more."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fault_injection" / "devices.py")],
        env=os.environ | {"XLA_FLAGS": xla_flags(8)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    limits = {"losses": 1e-4, "batch_stats after one step": 1e-6, "batch_stats": 1e-3}  # ten steps amplify rounding
    for devices in ("2", "4", "8"):
        for optimizer in ("adamw", "sgd"):
            for name, limit in limits.items():
                assert differences[devices][f"float32 {optimizer} {name}"] < limit, differences
            assert differences[devices][f"float64 {optimizer} params"] < 1e-12, differences


def test_a_checkpoint_of_any_number_of_devices_restores_on_any_other(tmp_path):
    """Each session resumes from what other devices wrote; the digest stored with it says that it came back bit for bit."""
    command = (*SMOKE, "--config.num_epochs=3.0", "--workdir", tmp_path, "--max-seconds=0")
    saved = 0
    for devices in (8, 4, 2, 1, 8):
        done = launch(*command, XLA_FLAGS=xla_flags(devices))
        assert done.returncode == 124, done.stderr
        assert (f"resuming {tmp_path} at step {saved} of" in done.stdout) == (saved > 0)
        (saved,) = steps_saved(tmp_path)[-1:]
    figures = set()
    for devices in (1, 2, 4, 8):
        done = launch(
            *(*SMOKE, "--config.num_epochs=3.0", "--workdir", tmp_path, "--mode=eval", "--checkpoint=latest"),
            XLA_FLAGS=xla_flags(devices),
        )
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "eval.json").read_text())
        assert (report["checkpoint_step"], len(report["environment"]["devices"])) == (saved, devices)
        figures.add((report["test"]["accuracy"], round(report["test"]["loss"], 5)))
    assert len(figures) == 1


# 7. Many hosts


def cluster(count):
    """The environment of each of so many processes, as SLURM starts them on one host."""
    job = (os.getpid() * 61 + next(_jobs)) % 4096 + 20_480  # JAX derives the coordinator's port from it
    shared = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count), "XLA_FLAGS": ""}
    return [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(count)]


_jobs = itertools.count()


def start_processes(count, *arguments):
    return [start("--distributed", *arguments, **environment) for environment in cluster(count)]


def ends(processes, timeout=900):
    """The exit codes, standard outputs and standard errors."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


@pytest.mark.parametrize(("count", "pipeline"), [(2, "tf_data"), (4, "tf_data"), (2, "device")])
def test_processes_train_stop_together_and_go_on_as_one_process_does(tmp_path, count, pipeline):
    """SGD, for Adam's first updates are signs of gradients, which rounding flips; 33 steps amplify rounding as it is."""
    command = (*OPTIMIZERS["sgd"], "--config.num_epochs=3.0", "--config.log_every_steps=3")
    alone = launch(*command, "--workdir", tmp_path / "alone", XLA_FLAGS="")
    assert alone.returncode == 0, alone.stderr
    command = (*command, f"--config.pipeline={pipeline}", "--workdir", tmp_path / "all")
    processes = start_processes(count, *command)
    read_until(processes[0], "epoch")
    processes[-1].send_signal(signal.SIGTERM)
    codes, _, stderr = ends(processes)
    assert codes == [143] * count, stderr
    assert not (tmp_path / "all" / "result.json").exists()
    codes, stdout, stderr = ends(start_processes(count, *command))
    assert codes == [0] * count, stderr
    assert "resuming" in stdout[0]
    assert all("epoch" not in output for output in stdout[1:])  # the first process speaks, and writes, for all
    for split in ("train", "validation", "test"):
        one, other = ([row["loss"] for row in rows(tmp_path / name, split)] for name in ("alone", "all"))
        print(split, "largest relative difference", max(abs(np.array(other) / one - 1)))
        np.testing.assert_allclose(other, one, rtol=1e-3)
    assert result(tmp_path / "all")["environment"]["processes"] == count


def test_processes_resume_from_one_checkpoint_also_if_one_of_them_cannot_read_the_latest(tmp_path):
    command = (*LONG, "--max-seconds=0", "--workdir", tmp_path)
    for step in (1, 2):
        assert launch(*command).returncode == 124
        assert steps_saved(tmp_path)[-1] == step
    blind = (str(ROOT / "tests" / "fault_injection" / "blind.py"), "2")
    processes = [start("--distributed", *command, program=blind, **environment) for environment in cluster(2)]
    codes, stdout, stderr = ends(processes, timeout=300)
    assert codes == [124, 124], stderr
    assert f"resuming {tmp_path} at step 1 of" in stdout[0]
    assert "checkpoints/2 cannot be read by another process; moved to" in stderr[0]
    assert steps_saved(tmp_path) == [1, 3]  # two processes take a step more until they agree
    assert [path.name.partition("-")[0] for path in (tmp_path / "damaged").iterdir()] == ["2"]


def test_processes_stop_together_however_rarely_they_log(tmp_path):
    processes = start_processes(2, *LONG, "--config.log_every_steps=1000000", "--workdir", tmp_path)
    read_until(processes[0], "first step")
    processes[1].send_signal(signal.SIGTERM)
    codes, _, stderr = ends(processes)
    assert codes == [143, 143], stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_others_end_and_another_number_goes_on(tmp_path, victim):
    """Process 0 hosts the coordinator, whose end JAX itself answers with an abort that says so."""
    command = (*LONG, "--config.batch_size=120", "--workdir", tmp_path)
    processes = start_processes(3, *command)
    read_until(processes[0], "epoch    2/2000")  # an evaluation's end
    processes[victim].kill()
    killed = time.monotonic()
    survivors = [process for rank, process in enumerate(processes) if rank != victim]
    codes, _, stderr = ends(survivors, timeout=600)
    assert time.monotonic() - killed < 60
    for code, said in zip(codes, stderr, strict=True):
        assert code in (1, -signal.SIGABRT) if victim == 0 else code == 1, said
        assert "lost another" in said or "another task died" in said, said
    processes[victim].communicate(timeout=600)
    saved = steps_saved(tmp_path)[-1]
    for count in (2, 1):
        command = (*LONG, "--config.batch_size=120", "--workdir", tmp_path, "--max-seconds=0")
        codes, stdout, stderr = ends(start_processes(count, *command))
        assert codes == [124] * count, stderr
        assert f"resuming {tmp_path} at step {saved} of" in stdout[0]
        saved = steps_saved(tmp_path)[-1]
        assert saved > 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.seed=1"], "differ in their config"),
        (["--config.log_every_steps=7"], "differ in their config"),
        (["--config.data.name=npz:data.npz"], "differ in their data"),
        (["--workdir=elsewhere"], "is not shared with the first process"),
    ],
)
def test_processes_that_differ_are_told_so_before_the_first_step(tmp_path, monkeypatch, arguments, words):
    """The npz of two folders has one name, and is not the same: a data set that was copied to one host alone."""
    same = [f"--config={ROOT}/configs/final.py:smoke", "--distributed", "--workdir=run"]
    both = arguments if "npz" in arguments[0] else []
    processes = []
    for rank, (more, environment) in enumerate(zip((both, arguments), cluster(2), strict=True)):
        here = tmp_path / (str(rank) if both else "")
        here.mkdir(exist_ok=True)
        images, labels = np.full((16, 8, 8, 3), rank, np.uint8), np.arange(16) % 2
        np.savez(
            here / "data.npz", train_images=images, train_labels=labels, test_images=images + 9, test_labels=labels
        )
        monkeypatch.chdir(here)
        processes.append(start(*same, *more, **environment))
    codes, stdout, stderr = ends(processes, timeout=600)
    assert words in stderr[1], stderr
    assert codes[1] == 2
    assert codes[0] != 0
    assert "first step" not in stdout[0]


def test_when_one_process_fails_the_others_do_not_wait_for_it(tmp_path):
    """The first finds the folder taken, and says so; the other ends too."""
    with under_way(tmp_path) as holder:
        began = time.monotonic()
        processes = start_processes(2, *LONG, "--workdir", tmp_path)
        codes, _, stderr = ends(processes, timeout=600)
        assert time.monotonic() - began < 100  # 30 without a sign of life, and the start of both
        assert codes[0] == 2
        assert "another process is training in it" in stderr[0]
        assert codes[1] in (1, -signal.SIGABRT)
        assert "lost another" in stderr[1] or "another task died" in stderr[1], stderr[1]
        holder.kill()


# 9. Long life


def test_20000_steps_leak_neither_memory_nor_handles_nor_threads(tmp_path):
    steps = 20_000
    examples = 1294
    process = start(
        *SMOKE,
        *("--config.batch_size=8", f"--config.num_epochs={steps * 8 / examples}", "--config.eval_every_epochs=5"),
        *("--config.log_every_steps=100", "--config.model.channel_list=(4,4)", "--config.checkpoint_every_steps=500"),
        *("--workdir", tmp_path),
        XLA_FLAGS="",
    )
    usage = {}
    for line in process.stdout:
        if found := re.match(r"epoch .*  step (\d+)/", line):
            usage[int(found[1])] = resources(process.pid)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert usage[steps]["resident_kb"] < 1.05 * usage[2000]["resident_kb"], usage
    # A save under way holds some for a while, a leak holds them for good: the least in 2,000 steps tells.
    for kind in ("handles", "threads"):
        early, late = (min(usage[step][kind] for step in range(end - 1900, end + 1, 100)) for end in (4000, steps))
        assert late <= early + 2, usage
    print({step: usage[step] for step in (2000, steps)})
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(100, steps + 1, 100))
    assert len(rows(tmp_path, "validation")) == len({row["step"] for row in rows(tmp_path, "validation")}) == 25
    assert result(tmp_path)["steps"] == steps


def resources(pid):
    """Resident memory, open file handles and threads of a process, as Linux tells."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "resident_kb": int(re.search(r"VmRSS:\s+(\d+)", status)[1]),
        "handles": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
    }


# Searches

GRID = ("--config=configs/search.py:smoke", "--study=s", "--stage=grid", "--config.num_epochs=20.0", "--workers=1")
GRID = (*GRID, "--config.model.max_params=0", "--config.search.objective=accuracy_params")  # so that none is pruned


def trials(storage):
    """The state_digest of each candidate of a grid that has ended."""
    with studies.opened(storage, create=False) as opened:
        (study,) = studies.existing(opened, "s").values()
        assert all(trial.state.is_finished() for trial in study.trials)
        return {json.dumps(trial.user_attrs["fields"]): trial.user_attrs["state_digest"] for trial in study.trials}


@pytest.mark.parametrize("storage", ["journal", "postgresql"])
def test_a_worker_of_a_search_is_killed_and_the_other_ends_its_trial_exactly(tmp_path, storage):
    undisturbed = launch(*GRID, "--workdir", tmp_path / "undisturbed", program=SEARCH)
    assert undisturbed.returncode == 0, undisturbed.stderr
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(postgresql.server()) if storage == "postgresql" else str(tmp_path / "a.journal")
        flags = (*GRID, "--workdir", tmp_path / "killed", "--storage", where)
        killed, other = (stack.enter_context(start(*flags, program=SEARCH)) for _ in range(2))
        stack.callback(other.kill)  # if an assertion fails
        line = ""
        while " at step" not in line:
            line = killed.stdout.readline()
            assert line, killed.stderr.read()
        number = re.search(r"grid (\d+): ", line)[1]
        trial = tmp_path / "killed" / f"grid-{int(number):04d}"
        while not steps_saved(trial):  # a checkpoint is written while the run continues, and may come after that line
            assert killed.poll() is None, killed.stderr.read()
            time.sleep(0.05)
        killed.kill()
        printed, stderr = other.communicate(timeout=240)
        assert other.returncode == 0, stderr
        assert f"grid {number}: resumed, because its worker ended" in printed
        assert "resuming" in (trial / "log.txt").read_text()
        found = trials(where)
    assert len(found) == 4
    assert found == trials(str(tmp_path / "undisturbed" / "study.journal"))


def test_a_signal_ends_all_workers_of_a_search_saved_and_the_same_command_goes_on(tmp_path):
    flags = (*GRID, "--workdir", tmp_path, "--workers=2")
    process = start(*flags, program=SEARCH)
    while " at step" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert time.monotonic() - sent < 15
    assert process.returncode == 128 + signal.SIGINT
    assert stderr
    assert all(line.startswith("stopped by SIGINT") for line in stderr.splitlines()), stderr
    again = launch(*flags, program=SEARCH)
    assert again.returncode == 0, again.stderr
    assert "resumed, because its worker ended" in again.stdout
    assert len(trials(str(tmp_path / "study.journal"))) == 4


def test_the_workers_of_a_search_that_is_killed_end_and_the_same_command_goes_on(tmp_path):
    flags = (*GRID, "--workdir", tmp_path, "--workers=2")
    process = start(*flags, program=SEARCH)
    while " at step" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.kill()
    process.communicate(timeout=600)  # returns when the workers, which hold the other end of its pipe, have ended
    assert process.returncode == -signal.SIGKILL
    with studies.opened(str(tmp_path / "study.journal"), create=False) as opened:
        (study,) = studies.existing(opened, "s").values()
        assert not all(trial.state.is_finished() for trial in study.trials)  # so they did not go on
    again = launch(*flags, program=SEARCH)
    assert again.returncode == 0, again.stderr
    assert len(trials(str(tmp_path / "study.journal"))) == 4
