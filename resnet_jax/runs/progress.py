"""The line that tells a person how far a run is, and the clock behind its speed."""

import sys
import time
from typing import Any


class Progress:
    """A live bar on a terminal, a plain line a report in a log.

    Args:
        total_steps: of the run.
        total_epochs: of the run.
        batch_size: images a step.
        quiet: print nothing (every process but the first).
    """

    def __init__(self, total_steps: int, total_epochs: float, batch_size: int, quiet: bool = False) -> None:
        self._total_steps, self._total_epochs, self._batch_size = total_steps, total_epochs, batch_size
        self._quiet = quiet
        self._live = sys.stdout.isatty()
        self._since: tuple[int, float] | None = None

    def restart_clock(self, step: int) -> None:
        """Measure the speed from here: after compilation, an evaluation or a save."""
        self._since = step, time.perf_counter()

    def images_per_second(self, step: int) -> float | None:
        """The speed since the clock was last read or restarted; None where there is no step to measure."""
        rate = None
        if self._since is not None and step > self._since[0]:
            rate = (step - self._since[0]) * self._batch_size / (time.perf_counter() - self._since[1])
        self.restart_clock(step)
        return rate

    def show(self, row: dict[str, Any]) -> None:
        """Show a training row of `metrics.jsonl`."""
        if self._quiet:
            return
        step, rate = row["step"], row["images_per_second"]
        left = "" if rate is None else _clock((self._total_steps - step) * self._batch_size / rate)
        text = (
            f"epoch {row['epoch']:.2f}/{self._total_epochs:g}  step {step}/{self._total_steps}  loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy']:.2%}  lr {row['learning_rate']:.3g}"
            + ("" if rate is None else f"  {rate:.0f} images/s  ETA {left}")
        )
        if self._live:
            done = 20 * step // self._total_steps
            self._print(f"\r\033[K[{'#' * done}{'.' * (20 - done)}] {text}", end="")
        else:
            self._print(text)

    def note(self, text: str) -> None:
        """Print a line of its own."""
        if not self._quiet:
            self._print(("\r\033[K" if self._live else "") + text)

    def _print(self, text: str, end: str = "\n") -> None:
        """Print, or say once that it cannot be done: a run is worth more than what it says, which its log has too."""
        try:
            print(text, end=end, flush=True)
        except OSError as error:
            self._quiet = True
            sys.stdout = None  # print then does nothing
            print(f"the standard output cannot be written ({error.strerror}): training goes on", file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
