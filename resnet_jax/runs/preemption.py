"""Stopping a run before its end: by a signal or a time limit."""

import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.runs.exits import exit_immediately

# SLURM sends USR1 before its time limit, if asked to; a lost terminal sends HUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_LIMIT = 124  # exit code, that of timeout(1)
_SAVE = 1  # less than any exit code
_SAME_SIGNAL_SECONDS = 1.0  # a lost terminal sends HUP twice, and timeout(1) may send TERM twice
_RARELY = 16  # calls: an agreement among hosts takes as long as a small batch of evaluation


class TrainingInterrupted(Exception):
    """The run was asked to stop; its state is saved.

    Attributes:
        exit_code: 128 + the signal's number, or `TIME_LIMIT`.
    """

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def stopped_by(exit_code: int) -> str:
    """What stopped a run, in words."""
    return "its time limit" if exit_code == TIME_LIMIT else signal.Signals(exit_code - 128).name


class StopRequest:
    """Whether the run was asked to stop, by a signal or by its time limit.

    Args:
        max_seconds: stop so long after `started`, but not before `start_clock` is called; None for never.
        started: a `time.monotonic()`; now if None.
        ends_process: whether signals may end the process where its main thread is busy. False in a process of the
            caller's, such as a notebook: there, a second Ctrl-C, a second later, raises `KeyboardInterrupt`.
    """

    def __init__(
        self, max_seconds: float | None = None, started: float | None = None, ends_process: bool = True
    ) -> None:
        started = time.monotonic() if started is None else started
        self._deadline = math.inf if max_seconds is None else started + max_seconds
        self._ends_process = ends_process
        self._clock_runs = False
        self._captured = False
        self._signum: int | None = None
        self._noted = 0.0
        self._on_signal: Callable[[int], None] | None = None
        self._posted: jax.Array | None = None
        self._rare_calls = 0

    def start_clock(self) -> None:
        """Make the deadline effective: after the first step, so that every session makes progress."""
        self._clock_runs = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Note the first signal that arrives in this block; a second one, a second later, acts as `ends_process` says.

        Python runs a handler only when the main thread leaves XLA, which may compile for minutes. The C handler writes each
        signal to a pipe at once, and another thread reads it there.

        Only the main thread can handle signals. In another thread, or inside another such block, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread() or self._captured:
            yield
            return
        previous = {s: signal.getsignal(s) for s in SIGNALS}
        if previous[signal.SIGHUP] is signal.SIG_IGN:  # by nohup
            del previous[signal.SIGHUP]
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous_writer = signal.set_wakeup_fd(writer)
        watcher = threading.Thread(target=self._watch, args=(reader, previous_writer), daemon=True)
        watcher.start()
        for s in previous:
            signal.signal(s, self._note)
        self._captured = True
        try:
            yield
        finally:
            self._captured = False
            for s, handler in previous.items():
                signal.signal(s, handler)
            signal.set_wakeup_fd(previous_writer)
            os.close(writer)
            watcher.join()
            os.close(reader)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self._signum is None:
            self._signum, self._noted = signum, time.monotonic()
        elif signum == signal.SIGINT and not self._ends_process and not _same_signal_as(self._noted):
            raise KeyboardInterrupt

    def _watch(self, reader: int, others: int) -> None:
        """Act on the signals that the pipe names, until its other end is closed; `others` is the pipe for other signals, or -1."""
        stopping_since = None
        while byte := os.read(reader, 1):
            if byte[0] not in SIGNALS:
                if others >= 0:
                    os.write(others, byte)
            elif stopping_since is None:
                stopping_since = time.monotonic()
                if self._on_signal and self._ends_process:
                    threading.Thread(target=self._on_signal, args=(128 + byte[0],), daemon=True).start()
                threading.Thread(target=self._say_stopping, daemon=True).start()  # a stopped terminal would block this
            elif self._ends_process and not _same_signal_as(stopping_since):
                os._exit(128 + byte[0])  # without a flush, which would wait for a main thread that is writing

    def _say_stopping(self) -> None:
        """Tell a person at a terminal what a signal does."""
        second = "a second signal exits at once" if self._ends_process else "a second Ctrl-C raises KeyboardInterrupt"
        with suppress(AttributeError, OSError, ValueError):  # no standard output, or a closed one
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), f"\nstopping after this step; {second}\n".encode())

    @contextmanager
    def exit_within(self, seconds: float, end: Callable[[int], object]) -> Iterator[None]:
        """End the process soon after a captured signal (`ends_process`), even if the main thread is in XLA for minutes.

        Args:
            seconds: how long the block has, after a signal, to end by itself.
            end: called after that in another thread, with the exit code, to end the process.
        """
        done = threading.Event()

        def end_if_not_done(exit_code: int) -> None:
            if not done.wait(seconds):
                end(exit_code)

        self._on_signal = end_if_not_done
        try:
            yield
        finally:
            self._on_signal = None
            done.set()

    def exit_before_first_step(self, seconds: float) -> AbstractContextManager[None]:
        """Like `exit_within`, before the first step: nothing needs saving, and data can take hours to decode."""

        def end(exit_code: int) -> None:
            print(f"stopped by {stopped_by(exit_code)} before the first step", file=sys.stderr)
            exit_immediately(exit_code)

        return self.exit_within(seconds, end)

    def exit_code(self) -> int | None:
        """The exit code to stop with now; None to continue."""
        if self._signum is not None:
            return 128 + self._signum
        return TIME_LIMIT if self._clock_runs and time.monotonic() >= self._deadline else None

    def agreed(self, mesh: Mesh, save_due: bool = False, rarely: bool = False) -> tuple[int | None, bool]:
        """What to do now, the same in all processes of a run: the exit code to stop with, or None; whether to save.

        A signal reaches the processes at different steps, so each posts its own code to the devices and acts on the
        largest code of the call before, which is ready by then: nothing waits. All processes must make these calls at
        the same places.

        Args:
            mesh: the devices of the run.
            save_due: whether this process asks for a save; a stop asks for one too.
            rarely: several processes agree at one in 16 of these calls only; for an evaluation, which a signal ends in each
                process by itself (`exit_within`).
        """
        own = self.exit_code() or (_SAVE if save_due else 0)
        if jax.process_count() == 1:
            code = own
        else:
            self._rare_calls += rarely
            if rarely and self._rare_calls % _RARELY:
                return None, False
            code = 0 if self._posted is None else int(self._posted)
            posts = 0 if own == code == _SAVE else own  # what is due is saved now
            self._posted = _largest(mesh)(_on_devices(posts, mesh))
        return (code if code > _SAVE else None), code > 0


def _same_signal_as(noted: float) -> bool:
    """Whether a signal now is the one of that `time.monotonic()`, sent twice."""
    return time.monotonic() - noted <= _SAME_SIGNAL_SECONDS


@functools.cache
def _largest(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def _on_devices(code: int, mesh: Mesh) -> jax.Array:
    """Return int32 [devices] with `code` on the devices of this process."""
    codes = np.full(len(mesh.local_devices), code, np.int32)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), codes)
