import errno
import json
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import environment, processes, workdir
from resnet_jax.runs.metrics_log import MetricsLog

META = {"fingerprint": "0" * 64}


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def row(step, split="train"):
    return {"step": step, "epoch": step / 10, "split": split, "loss": 1.0 / step}


def test_rows_are_appended_and_those_after_the_resumed_step_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(row(step))
    log.write(row(30, "validation"))
    log.close()
    log = MetricsLog(tmp_path, 20)
    log.write(row(30))
    log.close()
    assert rows(tmp_path) == [row(10), row(20), row(30)]


def test_a_torn_last_line_and_the_test_row_of_a_run_that_did_not_end_are_dropped(tmp_path):
    whole = "".join(json.dumps(r) + "\n" for r in (row(10), row(10, "test")))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 20, "ep')
    log = MetricsLog(tmp_path, 20)
    log.write(row(20))
    log.close()
    assert rows(tmp_path) == [row(10), row(20)]


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_process_waits_until_a_shared_folder_shows_what_the_first_one_wrote(tmp_path, monkeypatch, seconds):
    """On NFS, a host may remember for a minute that a folder is not there."""
    monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", lambda token: np.int32(7))
    monkeypatch.setattr(processes, "_SHOWN_WITHIN_SECONDS", 60 * (seconds > 0))

    def write():
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / ".lock").write_text("7")

    first = threading.Timer(seconds, write)
    if seconds:
        first.start()
        workdir._check_shared(tmp_path / "new", None)
        first.join()
    else:
        with pytest.raises(UserError, match="is not shared with the first process"):
            workdir._check_shared(tmp_path / "new", None)


def test_figures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    log.write(row(10) | {"grad_norm": 2.0, "images_per_second": None})
    log.write(row(10, "validation"))
    log.close()
    log = MetricsLog(tmp_path, 10)  # another session, of the same second
    log.write(row(20))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/grad_norm", "train/loss", "validation/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
    ]
    assert [event.step for event in events.Scalars("train/grad_norm")] == [10]


def test_no_figure_is_lost_when_a_process_is_killed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    log.write(row(10))  # and never closed
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")[0].step == 10
    log.close()


def test_only_the_first_process_writes_metrics_and_json(tmp_path, tiny_config):
    folder = workdir.Workdir(tmp_path, tiny_config, META, lock=None)
    folder.log(row(10))
    folder.log(row(20, "validation") | {"accuracy": 0.5})
    folder.write_json("failed_step.json", {})
    folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]  # which all processes write
    assert {step: validation.accuracy for step, validation in folder.validations.items()} == {20: 0.5}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half of it \ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_takes_one_config_and_names_the_fields_of_another(tmp_path, tiny_config):
    workdir.check(tmp_path, tiny_config)
    assert list(tmp_path.iterdir()) == []
    with workdir.open_workdir(tmp_path, tiny_config, META):
        pass
    tiny_config.log_every_steps, tiny_config.data.data_dir = 3, "elsewhere"
    workdir.check(tmp_path, tiny_config)
    tiny_config.optim.learning_rate, tiny_config.model.block_list = 0.5, (2, 2)
    assert workdir.check(tmp_path, tiny_config) == tiny_config  # nothing was saved
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model.block_list: \[1, 1\] -> \[2, 2\]; optim.learning_rate: 0.01 -> 0.5"):
        workdir.check(tmp_path, tiny_config)


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, tiny_config, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a writable folder"):
        workdir.check(tmp_path / path, tiny_config)


def test_a_folder_takes_one_process_at_a_time_and_any_after_it(tmp_path, tiny_config):
    script = (
        "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with workdir.open_workdir(tmp_path, tiny_config, META):
        pass
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is training in it"):
            workdir.open_workdir(tmp_path, tiny_config, META).__enter__()
        other.kill()
    with workdir.open_workdir(tmp_path, tiny_config, META):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, tiny_config, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"--workdir {tmp_path} cannot be locked \(No locks available\): choose"):
        workdir.open_workdir(tmp_path, tiny_config, META).__enter__()


def test_the_disk_must_have_room_for_what_the_checkpoints_do_not_take_yet(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 70, 30_000_000))
    with pytest.raises(UserError, match=r"has 30\.0 MB free, and the run's checkpoints take 40\.0 MB more"):
        workdir.open_workdir(tmp_path, tiny_config, META, 40_000_000).__enter__()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "data").write_bytes(bytes(11_000_000))
    with workdir.open_workdir(tmp_path, tiny_config, META, 40_000_000):
        pass


@pytest.mark.parametrize("left", ["result.json", "checkpoints/5"])
def test_a_folder_that_lost_its_config_is_refused(tmp_path, tiny_config, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{left} exists without the config.json"):
        workdir.check(tmp_path, tiny_config)


@pytest.mark.parametrize("content", ["[]", "null", "{}", "{", '"x"'])
def test_a_json_file_of_another_form_is_one_line(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result.json cannot be used"):
        files.read_json(tmp_path / "result.json", ("test_accuracy",))


def test_an_unreadable_config_is_one_line(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        workdir.check(tmp_path, tiny_config)


def test_the_environment_names_code_versions_and_devices():
    found = environment.collect()
    assert found["versions"]["jax"] == jax.__version__
    assert {"flax", "optax", "orbax-checkpoint", "resnet_jax"} <= set(found["versions"])
    assert found["devices"] == ["cpu", "cpu"]
    assert found["git"] is None or len(found["git"]["commit"]) == 40
    json.dumps(found)


@pytest.mark.parametrize("config", [{}, {"num_epochs": [1]}, {"num_epochs": "1"}])
def test_a_result_whose_config_has_no_number_of_epochs_is_refused(tmp_path, trained_once, tiny_config, config):
    result = json.loads((trained_once / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | {"config": config}))
    with pytest.raises(UserError, match=r"result\.json cannot be used \(config\.num_epochs is .*\): choose another"):
        workdir.is_complete(tmp_path, tiny_config)


@pytest.mark.parametrize("another_run", [False, True])
def test_a_checkpoint_made_in_place_of_a_deleted_folder_is_removed_unless_another_run_is_there(
    tmp_path, tiny_config, another_run
):
    directory = tmp_path / "run"
    meta = META | {"config": {}, "class_names": ["a", "b"], "image_shape": [8, 8, 3]}
    with workdir.open_workdir(directory, tiny_config, meta) as folder:
        directory.rename(tmp_path / "elsewhere")
        folder._saved_step = 20
        (directory / "checkpoints" / "20").mkdir(parents=True)
        if another_run:
            (directory / ".lock").touch()
    assert directory.exists() == another_run
    assert (directory / "checkpoints" / "20").exists() == another_run
