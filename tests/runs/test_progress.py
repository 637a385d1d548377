import io
import re

import pytest

from resnet_jax.runs import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


ROW = {"step": 50, "epoch": 1.25, "loss": 0.5, "accuracy": 0.75, "learning_rate": 0.01, "images_per_second": 320.0}


def test_a_line_in_a_log_says_where_the_run_is_and_when_it_ends(capsys):
    progress.Progress(total_steps=200, total_epochs=5.0, batch_size=32).show(ROW)
    assert capsys.readouterr().out == (
        "epoch 1.25/5  step 50/200  loss 0.5000  accuracy 75.00%  lr 0.01  320 images/s  ETA 0:00:15\n"
    )


def test_a_terminal_gets_one_line_rewritten(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    bar = progress.Progress(200, 5.0, 32)
    bar.show(ROW)
    bar.note("saved")
    out = capsys.readouterr().out
    assert re.match(r"\r\x1b\[K\[#####\.{15}\] epoch", out)
    assert out.endswith("\r\x1b[Ksaved\n")
    assert out.count("\n") == 1


def test_the_speed_leaves_out_what_came_before_the_clock_was_restarted(clock):
    bar = progress.Progress(200, 5.0, 32)
    assert bar.images_per_second(1) is None
    clock[0] += 2.0
    assert bar.images_per_second(21) == 20 * 32 / 2.0
    clock[0] += 100.0
    bar.restart_clock(30)
    clock[0] += 4.0
    assert bar.images_per_second(40) == 10 * 32 / 4.0


def test_a_row_without_a_speed_is_shown_without_one(capsys):
    progress.Progress(200, 5.0, 32).show(ROW | {"images_per_second": None})
    assert capsys.readouterr().out.endswith("lr 0.01\n")


def test_other_processes_are_quiet(capsys):
    bar = progress.Progress(200, 5.0, 32, quiet=True)
    bar.show(ROW)
    bar.note("saved")
    assert capsys.readouterr().out == ""


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_run_goes_on_without_its_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", FullDisk())
    shown = progress.Progress(100, 1.0, 8)
    shown.note("first")
    shown.note("second")
    print("by others")
    assert capsys.readouterr().err.count("the standard output cannot be written (No space left on device)") == 1
