import io
import os
import pty
import sys
import termios

import pyte
import pytest

from resnet_jax.runs import progress

ROW = {"step": 50, "epoch": 1.25, "loss": 0.5, "accuracy": 0.75, "learning_rate": 0.01, "images_per_second": 320.0}
VALIDATION = {"step": 80, "epoch": 2.002, "split": "validation", "loss": 0.6, "accuracy": 0.7}
LINES = 8  # of the terminal


class Terminal:
    """A terminal emulator behind a pseudo-terminal, which becomes the standard output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        self.master, slave = pty.openpty()
        self.stdout = os.fdopen(slave, "w", encoding="utf-8")
        self.screen = pyte.Screen(columns, LINES)
        self.stream = pyte.ByteStream(self.screen)
        self.resize(columns)
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(sys, "stdout", self.stdout)
        monkeypatch.setattr(sys, "__stdout__", self.stdout)  # shutil asks this one for the size

    def resize(self, columns: int) -> None:
        termios.tcsetwinsize(self.master, (LINES, columns))
        self.screen.resize(columns=columns)

    def rows(self) -> list[str]:
        """Return the rows of the screen down to the last one with text."""
        self.stdout.write("\0")  # marks the end of what was written; emulators ignore it
        self.stdout.flush()
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(self.master, 4096)
        self.stream.feed(written)
        rows = [row.rstrip() for row in self.screen.display]
        return rows[: max((i + 1 for i, row in enumerate(rows) if row), default=0)]

    def close(self) -> None:
        self.stdout.close()
        os.close(self.master)


@pytest.fixture
def open_terminal(monkeypatch):
    terminals = []

    def create(columns):
        terminals.append(Terminal(monkeypatch, columns))
        return terminals[-1]

    yield create
    monkeypatch.undo()
    for terminal in terminals:
        terminal.close()


LIVE_LINES = {
    10: "epoch 1.2",
    40: "epoch 1.25/5  [#....]  loss 0.5000",
    80: "epoch 1.25/5  [#....]  loss 0.5000  accuracy 75.00%  320 img/s  ETA 00:15",
    200: "epoch 1.25/5  [#####...............]  loss 0.5000  accuracy 75.00%  320 img/s  ETA 00:15  lr 0.01  step 50/200",
}


@pytest.mark.parametrize("columns", LIVE_LINES)
def test_the_live_line_is_one_line_of_the_terminal(open_terminal, columns):
    terminal = open_terminal(columns)
    shown = progress.Progress(200, 5.0, 32)
    shown.show(ROW)
    assert terminal.rows() == [LIVE_LINES[columns]]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_an_update_leaves_nothing_of_the_line_before(open_terminal, columns):
    terminal = open_terminal(columns)
    shown = progress.Progress(200_000, 300.0, 32)
    shown.show(ROW | {"step": 190_000, "epoch": 285.0, "loss": 123456.0, "accuracy": 1.0, "images_per_second": 12345.0})
    assert len(terminal.rows()) == 1
    progress.Progress(200, 5.0, 32).show(ROW)
    assert terminal.rows() == [LIVE_LINES[columns]]


def test_the_live_line_follows_the_size_of_the_window(open_terminal):
    terminal = open_terminal(200)
    shown = progress.Progress(200, 5.0, 32)
    for columns in (200, 80, 40, 200):
        terminal.resize(columns)
        shown.show(ROW)
        assert terminal.rows() == [LIVE_LINES[columns]]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_notes_scroll_above_the_live_line(open_terminal, columns):
    terminal = open_terminal(columns)
    shown = progress.Progress(200, 5.0, 32)
    shown.note("before the first row")
    assert terminal.rows() == ["before the first row"]
    shown.show(ROW)
    assert terminal.rows() == ["before the first row", LIVE_LINES[columns]]
    for i in range(20):
        shown.note(f"note {i}")
        shown.show(ROW)
    assert terminal.rows() == [f"note {i}" for i in range(21 - LINES, 20)] + [LIVE_LINES[columns]]


EPOCH_LINES = {
    40: "epoch 2/5  val 0.600 70.00% best",
    80: "epoch 2/5  val 0.600 70.00% best  train 0.500 75.00%  320 img/s  ETA 00:12",
    200: "epoch 2/5  val 0.600 70.00% best  train 0.500 75.00%  320 img/s  ETA 00:12",
}


@pytest.mark.parametrize("columns", EPOCH_LINES)
def test_each_validation_leaves_one_line(open_terminal, columns):
    terminal = open_terminal(columns)
    shown = progress.Progress(200, 5.0, 32)
    shown.show(ROW)
    shown.waiting("evaluating the validation split")
    shown.validated(VALIDATION, is_best=True)
    shown.waiting("evaluating the validation split")
    shown.validated(VALIDATION | {"step": 120, "epoch": 3.0, "accuracy": 0.05}, is_best=False)
    first, second, live = terminal.rows()
    assert first == EPOCH_LINES[columns]
    assert second.startswith("epoch 3/5  val 0.600  5.00%")
    assert "best" not in second
    assert live == LIVE_LINES[columns]


def test_the_fields_of_two_validations_stand_in_columns(capsys):
    shown = progress.Progress(2000, 50.0, 32)
    shown.show(ROW)
    shown.validated(VALIDATION, is_best=False)
    shown.validated(VALIDATION | {"epoch": 10.0, "accuracy": 0.099}, is_best=True)
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.index("train") == second.index("train")


def test_long_figures_fit_80_columns(open_terminal):
    terminal = open_terminal(80)
    shown = progress.Progress(20_000, 50.0, 512)
    shown.show(ROW | {"step": 5000, "epoch": 12.5, "images_per_second": 12345.0})
    shown.validated(VALIDATION | {"step": 5000, "epoch": 12.0}, is_best=True)
    assert terminal.rows() == [
        "epoch 12/50  val 0.600 70.00% best  train 0.500 75.00%  12345 img/s  ETA 10:22",
        "epoch 12.50/50  [#....]  loss 0.5000  accuracy 75.00%  12345 img/s  ETA 10:22",
    ]


def test_an_epoch_without_a_validation_leaves_a_line_too(open_terminal):
    terminal = open_terminal(80)
    shown = progress.Progress(200, 5.0, 32)
    shown.show(ROW)
    shown.epoch_ended(80, 2.002)
    assert terminal.rows() == ["epoch 2/5  train 0.500 75.00%  320 img/s  ETA 00:12", LIVE_LINES[80]]


def test_a_validation_before_the_first_training_row_is_shown_alone(open_terminal):
    terminal = open_terminal(80)
    progress.Progress(200, 5.0, 32).validated(VALIDATION, is_best=True)
    assert terminal.rows() == ["epoch 2/5  val 0.600 70.00% best"]


@pytest.mark.parametrize(
    ("epoch", "num_epochs", "in_a_row", "of_a_line"),
    [
        (50.0009, 50.0, "epoch 50.00/50", "epoch 50/50"),
        (50.3, 50.0, "epoch 50.00/50", "epoch 50/50"),
        (2.6, 2.5, "epoch 2.50/2.5", "epoch 2.5/2.5"),
        (2.04, 2.5, "epoch 2.04/2.5", "epoch   2/2.5"),
    ],
)
def test_the_epoch_never_passes_the_number_of_epochs(capsys, epoch, num_epochs, in_a_row, of_a_line):
    shown = progress.Progress(200, num_epochs, 32)
    shown.show(ROW | {"epoch": epoch})
    shown.epoch_ended(200, epoch)
    row, line = capsys.readouterr().out.splitlines()
    assert row.startswith(f"{in_a_row}  ")
    assert line.startswith(f"{of_a_line}  ")


def test_a_wait_is_shown_until_something_else_is(open_terminal):
    terminal = open_terminal(80)
    progress.waiting("loading digits")
    shown = progress.Progress(200, 5.0, 32)
    shown.waiting("compiling the train step", usual_seconds=20)
    assert terminal.rows() == ["loading digits ...", "compiling the train step (usually 20 s) ..."]
    shown.show(ROW)
    assert terminal.rows() == ["loading digits ...", LIVE_LINES[80]]


def test_a_wait_fits_the_terminal(open_terminal):
    terminal = open_terminal(40)
    progress.Progress(200, 5.0, 32).waiting("compiling the train step", usual_seconds=20)
    assert terminal.rows() == ["compiling the train step (usually 20 s)"]


def test_the_message_after_the_run_starts_on_a_line_of_its_own(open_terminal):
    terminal = open_terminal(80)
    shown = progress.Progress(200, 5.0, 32)
    shown.note("resuming")
    shown.show(ROW)
    terminal.stdout.write("^C")  # what a terminal shows of Ctrl-C
    shown.close()
    shown.close()
    print("stopped by SIGINT")
    assert terminal.rows() == ["resuming", "stopped by SIGINT"]


def test_a_log_has_plain_lines(capsys):
    shown = progress.Progress(total_steps=200, total_epochs=5.0, batch_size=32)
    shown.waiting("compiling the train step", usual_seconds=20)
    shown.show(ROW)
    shown.validated(VALIDATION, is_best=True)
    shown.note("saved")
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "compiling the train step (usually 20 s) ...",
        "epoch 1.25/5  loss 0.5000  accuracy 75.00%  320 img/s  ETA 00:15  lr 0.01  step 50/200",
        "epoch 2/5  val 0.600 70.00% best  train 0.500 75.00%  320 img/s  ETA 00:12",
        "saved",
    ]


def test_a_time_of_hours_is_shown_in_hours(capsys):
    progress.Progress(50 + 36_610, 5.0, 320).show(ROW)
    assert "  ETA 10:10:10  " in capsys.readouterr().out


def test_the_speed_leaves_out_what_came_before_the_clock_was_restarted():
    now = 100.0
    shown = progress.Progress(200, 5.0, 32, clock=lambda: now)
    assert shown.images_per_second(1) is None
    now += 2.0
    assert shown.images_per_second(21) == 20 * 32 / 2.0
    now += 100.0
    shown.restart_clock(30)
    now += 4.0
    assert shown.images_per_second(40) == 10 * 32 / 4.0


def test_a_row_without_a_speed_shows_the_last_one_measured(capsys):
    shown = progress.Progress(200, 5.0, 32)
    shown.show(ROW | {"images_per_second": None})
    assert "img/s" not in capsys.readouterr().out
    shown.show(ROW)
    shown.show(ROW | {"step": 60, "images_per_second": None})
    assert "  320 img/s  ETA 00:14  " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("on_terminal", [False, True])
def test_other_processes_are_quiet(capsys, monkeypatch, on_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_terminal)
    shown = progress.Progress(200, 5.0, 32, quiet=True)
    shown.waiting("compiling the train step")
    shown.show(ROW)
    shown.validated(VALIDATION, is_best=True)
    shown.epoch_ended(80, 2.0)
    shown.note("saved")
    shown.close()
    progress.waiting("loading digits", quiet=True)
    assert capsys.readouterr() == ("", "")


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_run_goes_on_without_its_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", FullDisk())
    shown = progress.Progress(100, 1.0, 8)
    shown.note("first")
    shown.note("second")
    print("by others")
    progress.Progress(100, 1.0, 8).show(ROW)
    assert capsys.readouterr().err == "cannot write to standard output (No space left on device): training continues\n"


def test_a_run_goes_on_without_its_standard_output_and_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", FullDisk())
    monkeypatch.setattr("sys.stderr", FullDisk())
    progress.Progress(100, 1.0, 8).note("first")
    assert sys.stdout is None
