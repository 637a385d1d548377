"""The trainer as a user runs it: `launch.py` in a process of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest
from cpu_devices import xla_flags
from helpers import ROOT, assert_user_error, launch, read_until, rows, saved_by_signal, start

SMOKE = ("--config", "configs/final.py:smoke")
needs_cifar10 = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")),
    reason="set TFDS_DATA_DIR to a folder in which CIFAR-10 is prepared",
)


def test_train_again_and_evaluate(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--config", f"{ROOT}/configs/final.py:smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = tmp_path / "runs" / "final-smoke"  # the default workdir is named after the config
    result = json.loads((run / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2%}" in done.stdout
    workdir = ("--workdir", run)
    again = launch(*SMOKE, *workdir)
    assert (again.returncode, again.stderr) == (0, "")
    assert "is complete" in again.stdout
    evaluation = (*SMOKE, *workdir, "--mode", "eval")
    for devices in (1, 3):  # which do not divide the batches of the training
        evaluated = launch(*evaluation, XLA_FLAGS=xla_flags(devices))
        assert evaluated.returncode == 0, evaluated.stderr
        report = json.loads((run / "eval.json").read_text())
        assert report["test"]["accuracy"] == result["test_accuracy"]
        assert report["environment"]["devices"] == ["cpu"] * devices
    refused = launch(*SMOKE, "--workdir", tmp_path / "other", XLA_FLAGS=xla_flags(3))
    assert_user_error(refused, "batch_size 128 is not divisible by 3 devices")
    assert not (tmp_path / "other").exists()


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    command = (*SMOKE, "--config.num_epochs=100000.0", "--workdir", tmp_path)
    process = start(*command)
    read_until(process, "epoch")
    for signum in (signal.SIGTERM, signal.SIGINT):
        step = saved_by_signal(process, signum, tmp_path, seconds=30)
        process = start(*command)
        assert f"resuming {tmp_path} at step {step} of" in read_until(process, "epoch")
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.slow
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
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 7))
