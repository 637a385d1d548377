"""What a run prints while it trains: a live line on a terminal, plain lines in a log."""

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Progress:
    """Show how far a run is.

    On a terminal, the last line is live: it shows the last training row, cut to the fields that fit the window, and all
    else is printed above it. In a log, each row and each note is a plain line.

    Args:
        total_steps: of the run.
        total_epochs: of the run.
        batch_size: images a step.
        quiet: print nothing (every process but the first).
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        total_epochs: float,
        batch_size: int,
        quiet: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps, self._total_epochs, self._batch_size = total_steps, total_epochs, batch_size
        self._quiet, self._clock = quiet, clock
        self._live = sys.stdout is not None and sys.stdout.isatty()
        self._clock_start: tuple[int, float] | None = None  # step, seconds
        self._row: dict[str, Any] | None = None  # the last training row
        self._rate: float | None = None  # images/s, as last measured

    def restart_clock(self, step: int) -> None:
        """Measure the speed from here: after compilation, an evaluation or a save."""
        self._clock_start = step, self._clock()

    def images_per_second(self, step: int) -> float | None:
        """Return the speed since the clock was last read or restarted; None if no step was taken since."""
        rate = None
        if self._clock_start is not None and step > self._clock_start[0]:
            rate = (step - self._clock_start[0]) * self._batch_size / (self._clock() - self._clock_start[1])
        self.restart_clock(step)
        return rate

    def show(self, row: dict[str, Any]) -> None:
        """Show a training row of `metrics.jsonl`."""
        self._row, self._rate = row, row["images_per_second"] or self._rate
        length = 20 if _columns() > 100 else 5
        done = length * row["step"] // self._total_steps
        fields = [
            f"epoch {min(row['epoch'], self._total_epochs):.2f}/{self._total_epochs:g}",  # the last step can go past it
            f"[{'#' * done}{'.' * (length - done)}]" if self._live else "",
            f"loss {row['loss']:.4f}",
            f"accuracy {row['accuracy']:.2%}",
            *self._speed(row["step"]),
            f"lr {row['learning_rate']:.3g}",
            f"step {row['step']}/{self._total_steps}",
        ]
        self._print(self._fit(fields), live=True)

    def validated(self, row: dict[str, Any], is_best: bool) -> None:
        """Print the line of an epoch, from a validation row of `metrics.jsonl`; `is_best`: the best so far."""
        self._end_epoch(row["step"], row["epoch"], f"val {_metrics(row)} {'best' if is_best else '':4}")

    def epoch_ended(self, step: int, epoch: float) -> None:
        """Print the line of an epoch of a run without a validation split."""
        self._end_epoch(step, epoch, "")

    def note(self, text: str) -> None:
        """Print a text on a line of its own."""
        self._print(text)
        if self._live and self._row:
            self.show(self._row)

    def waiting(self, what: str, usual_seconds: float | None = None) -> None:
        """Say what the run waits for; on a terminal, until something else is shown."""
        self._print(self._fit([_wait_text(what, usual_seconds)]), live=True)

    def close(self) -> None:
        """Clear the live line, so that the next message starts on a line of its own."""
        if self._live:
            self._print("", live=True)

    def _end_epoch(self, step: int, epoch: float, validation: str) -> None:
        last = f"{self._total_epochs:g}"
        number = last if epoch >= self._total_epochs else str(int(epoch))  # 3.002 is the end of epoch 3
        train = f"train {_metrics(self._row)}" if self._row else ""
        self.note(self._fit([f"epoch {number:>{len(last)}}/{last}", validation, train, *self._speed(step)]))

    def _speed(self, step: int) -> list[str]:
        """Return the last speed measured and, at this speed, the time that the remaining steps take."""
        if self._rate is None:
            return []
        minutes, seconds = divmod(round((self._total_steps - step) * self._batch_size / self._rate), 60)
        hours = f"{minutes // 60}:" if minutes >= 60 else ""
        return [f"{self._rate:.0f} img/s", f"ETA {hours}{minutes % 60:02d}:{seconds:02d}"]

    def _fit(self, fields: list[str]) -> str:
        """Join the fields, on a terminal as many as fit its line; the most important come first."""
        fields = [field for field in fields if field]
        while self._live and len(fields) > 1 and len("  ".join(fields)) > _columns():
            fields.pop()
        return "  ".join(fields)[: _columns() if self._live else None].rstrip()

    def _print(self, text: str, live: bool = False) -> None:
        if self._live:
            text = f"\r\033[K{text}"  # clears the live line
        if not self._quiet:
            _print(text, end="" if live and self._live else "\n")


def waiting(what: str, usual_seconds: float | None = None, quiet: bool = False) -> None:
    """Print what the program waits for, such as "loading cifar10", before there is a `Progress`."""
    say(_wait_text(what, usual_seconds), quiet)


def say(text: str, quiet: bool = False) -> None:
    """Print a line before there is a `Progress`."""
    if not quiet:
        _print(text)


def _wait_text(what: str, usual_seconds: float | None) -> str:
    return what + ("" if usual_seconds is None else f" (usually {usual_seconds:g} s)") + " ..."


def _metrics(row: dict[str, Any]) -> str:
    return f"{row['loss']:.3f} {row['accuracy']:6.2%}"


def _columns() -> int:
    """Return how many characters fit a line of the window now, less the last one, after which some terminals wrap."""
    return max(1, shutil.get_terminal_size().columns - 1)


def _print(text: str, end: str = "\n") -> None:
    """Print, or say once that it fails: a full disk or a closed pipe does not end a run, which has a log of its own."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        sys.stdout = None  # print then does nothing
        with suppress(OSError):  # standard error may go to the same disk
            print(f"cannot write to standard output ({error.strerror}): training continues", file=sys.stderr)
