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
    for devices in (1, 3):
        evaluated = launch(
            *SMOKE, *workdir, "--mode", "eval", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
            **{"timeout": 300},
        )  # fmt: skip
        if devices == 3:
            assert_user_error(evaluated, "batch_size 128 does not divide over 3 devices")
        else:
            assert evaluated.returncode == 0, evaluated.stderr
            report = json.loads((tmp_path / "run" / "eval.json").read_text())
            assert report["test"]["accuracy"] == result["test_accuracy"]
            assert report["environment"]["devices"] == ["cpu"]


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
    command = [sys.executable, "launch.py", *SMOKE, "--config.num_epochs=100000.0", "--workdir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    sent = time.monotonic()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert process.returncode == 128 + signum
    (message,) = stderr.splitlines()
    step = int(message.split(" at step ")[1].split(" ")[0])
    assert f"stopped by {signum.name} at step {step}" in message
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("epoch"):
            break
    process.kill()
    process.communicate(timeout=60)
    assert f"resuming {tmp_path} at step {step} of" in "".join(seen)


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
