"""When a run must stop before its end: a signal, or a limit on its time."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

# SLURM sends USR1 ahead of a time limit, if asked to; a terminal that is lost, HUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_LIMIT = 124  # exit code, that of timeout(1)


class TrainingInterrupted(Exception):
    """The run was asked to stop; its state is saved.

    Attributes:
        exit_code: 128 + the signal's number, or `TIME_LIMIT`.
    """

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason(exit_code: int) -> str:
    """What stopped a run, for a person."""
    return "its time limit" if exit_code == TIME_LIMIT else signal.Signals(exit_code - 128).name


class StopRequest:
    """Whether the run was asked to stop: signals are noted instead of obeyed, and the clock is read.

    Args:
        deadline: `time.monotonic()` at which to stop; None for never. It holds once `start_clock` is called.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._deadline = math.inf if deadline is None else deadline
        self._clock_runs = False
        self._signum: int | None = None

    def start_clock(self) -> None:
        """Let the deadline hold: after the first step, so that every session of a run brings it on."""
        self._clock_runs = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Note the first signal that arrives in this block; a second one acts at once."""
        previous = {s: signal.getsignal(s) for s in SIGNALS}
        if previous[signal.SIGHUP] is signal.SIG_IGN:  # by nohup
            del previous[signal.SIGHUP]

        def note(signum: int, _: FrameType | None) -> None:
            self._signum = signum
            for s in previous:
                signal.signal(s, signal.SIG_DFL)

        for s in previous:
            signal.signal(s, note)
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    @contextmanager
    def exit_within(self, seconds: float, end: Callable[[int], object]) -> Iterator[None]:
        """See to it that a signal is heeded in this block, though its thread be inside XLA for minutes.

        Args:
            seconds: how long the block has, after a signal, to end by itself.
            end: called then, in another thread, with the exit code; to end the process.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        done = threading.Event()

        def watch() -> None:
            while signum := os.read(reader, 1):
                if signum[0] in SIGNALS and not done.wait(seconds):
                    end(128 + signum[0])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        previous = signal.set_wakeup_fd(writer)  # which the C handler writes to at once; Python's waits for its thread
        try:
            yield
        finally:
            done.set()
            signal.set_wakeup_fd(previous)
            os.close(writer)
            watcher.join()
            os.close(reader)

    def exit_code(self, agree: bool = True) -> int | None:
        """The exit code to stop with now, None to go on.

        A signal reaches the processes of a run at different steps, so several processes agree before they stop.

        Args:
            agree: whether all processes are asking now; where only this one may be, it goes on.
        """
        code = 0
        if self._signum is not None:
            code = 128 + self._signum
        elif self._clock_runs and time.monotonic() >= self._deadline:
            code = TIME_LIMIT
        if jax.process_count() > 1:
            if not agree:
                return None
            code = int(multihost_utils.process_allgather(np.int32(code)).max())
        return code or None
