"""The trainer as a user runs it: `launch.py` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, launch

SMOKE = ("--config", "configs/final.py:smoke")
needs_cifar10 = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")),
    reason="set TFDS_DATA_DIR to a folder in which CIFAR-10 is prepared",
)


def rows(directory, split="train"):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


def start(*arguments, **environment):
    """Start `launch.py` without waiting for its end."""
    return subprocess.Popen(
        [sys.executable, "launch.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process, beginning):
    """What a process prints up to the first line with this beginning."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            break
    return "".join(seen)


def test_train_again_and_evaluate(tmp_path):
    workdir = ("--workdir", tmp_path / "run")
    done = launch(*SMOKE, *workdir)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2%}" in done.stdout
    again = launch(*SMOKE, *workdir)
    assert (again.returncode, again.stderr) == (0, "")
    assert "is complete" in again.stdout
    evaluation = (*SMOKE, *workdir, "--mode", "eval")
    evaluated = launch(*evaluation, XLA_FLAGS="--xla_force_host_platform_device_count=1")
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert report["test"]["accuracy"] == result["test_accuracy"]
    assert report["environment"]["devices"] == ["cpu"]
    refused = launch(*evaluation, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert_user_error(refused, "batch_size 128 does not divide over 3 devices")


def test_the_default_workdir_is_named_after_the_config(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--config", str(ROOT / "configs" / "final.py") + ":smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "final-smoke" / "result.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, signum):
    command = (*SMOKE, "--config.num_epochs=100000.0", "--workdir", tmp_path)
    process = start(*command)
    read_until(process, "epoch")
    sent = time.monotonic()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert process.returncode == 128 + signum
    (message,) = stderr.splitlines()
    step = int(message.split(" at step ")[1].split(" ")[0])
    assert f"stopped by {signum.name} at step {step}" in message
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    process = start(*command)
    seen = read_until(process, "epoch")
    process.kill()
    process.communicate(timeout=60)
    assert f"resuming {tmp_path} at step {step} of" in seen


def test_the_loss_does_not_depend_on_the_number_of_devices(tmp_path):
    """SGD, for Adam's first updates are signs of gradients, which rounding flips; 11 steps, relative to the first loss."""
    losses = {}
    for devices in (1, 2, 8):
        done = launch(
            *("--config", "configs/sgd.py", "--config.data.name=digits", "--config.num_epochs=1.0"),
            *("--config.model.channel_list=(8,16)", "--config.model.block_list=(1,1)", "--config.log_every_steps=1"),
            *("--workdir", tmp_path / str(devices)),
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        )
        assert done.returncode == 0, done.stderr
        losses[devices] = [row["loss"] for row in rows(tmp_path / str(devices))]
    assert len(losses[1]) == 11
    for devices in (2, 8):
        np.testing.assert_allclose(losses[devices], losses[1], rtol=1e-5)


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    """Mid-step, mid-save or mid-evaluation, as chance has it; `make soak` kills more often."""
    seed = int(os.environ.get("RESNET_JAX_SOAK_SEED", time.time_ns() % 2**32))
    rng = np.random.default_rng(seed)
    more = ("--config.num_epochs=30.0", "--config.checkpoint_every_steps=7", "--config.eval_every_epochs=2")
    whole = launch(*SMOKE, *more, "--workdir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for _ in range(int(os.environ.get("RESNET_JAX_SOAK_KILLS", 3))):
        process = start(*SMOKE, *more, "--workdir", tmp_path / "killed")
        read_until(process, "first step")
        time.sleep(rng.uniform(0.0, 2.0))
        process.kill()
        process.communicate(timeout=60)
    killed = launch(*SMOKE, *more, "--workdir", tmp_path / "killed")
    assert killed.returncode == 0, (seed, killed.stderr)
    digests = {
        json.loads((tmp_path / name / "result.json").read_text())["state_digest"] for name in ("whole", "killed")
    }
    assert len(digests) == 1, seed
    for split in ("train", "validation", "test"):
        pair = (
            [row | {"images_per_second": None} for row in rows(tmp_path / name, split)] for name in ("whole", "killed")
        )
        assert next(pair) == next(pair), (seed, split)


def start_two_processes(*arguments):
    """As SLURM starts them on one host."""
    job = str(os.getpid() % 4096 + 20_000)  # JAX derives the coordinator's port from it
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "XLA_FLAGS": ""}
    return [
        start("--distributed", *arguments, **slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]


def test_two_processes_train_stop_together_and_go_on_as_one_process_does(tmp_path):
    more = ("--config.num_epochs=5.0", "--config.log_every_steps=3")
    alone = launch(*SMOKE, *more, "--workdir", tmp_path / "alone", XLA_FLAGS="")
    assert alone.returncode == 0, alone.stderr
    processes = start_two_processes(*SMOKE, *more, "--workdir", tmp_path / "both")
    read_until(processes[0], "epoch")
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert not (tmp_path / "both" / "result.json").exists()
    processes = start_two_processes(*SMOKE, *more, "--workdir", tmp_path / "both")
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming" in outputs[0][0]
    assert "epoch" not in outputs[1][0]  # the first process speaks for all
    for split in ("train", "validation", "test"):
        one, two = ([row["loss"] for row in rows(tmp_path / name, split)] for name in ("alone", "both"))
        np.testing.assert_allclose(two, one, rtol=1e-3)


def test_a_host_that_is_in_no_cluster_is_told_so():
    assert_user_error(launch(*SMOKE, "--distributed"), "--distributed", "srun")


@needs_cifar10
def test_the_reports_recipe_runs_on_cifar10(tmp_path):
    done = launch(
        *("--config", "configs/final.py", "--config.batch_size=16", "--config.num_epochs=0.002"),
        *("--config.schedule.warmup_epochs=0.001", "--config.model.channel_list=(8,16,16,16)"),
        *("--config.model.block_list=(1,1,1,0)", "--config.log_every_steps=1", "--workdir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["dataset"]["splits"] == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 7))
