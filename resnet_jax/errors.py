"""The exception for user errors, and how the program ends."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class UserError(Exception):
    """An error that the user can fix; its message is one line that says how."""


class TrainingDiverged(UserError):
    """A training step was rejected: its loss or gradient is not finite, or the gradient is too large."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or a device ran out of memory."""
    # JAX raises a RuntimeError whose text begins with the status code.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def report(error: object) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def exit_immediately(exit_code: int) -> NoReturn:
    """End this process at once.

    The usual way out waits for threads and processes that a failure has left waiting themselves: those of a save for ten
    minutes, other hosts for this one.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # None, or a full disk: then there is nobody to tell
            stream.flush()
    os._exit(exit_code)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn what a person or the machine can fix into one line on stderr and exit code 2, and Ctrl-C into its own code."""
    try:
        yield
    except UserError as error:
        report(error)
        sys.exit(2)
    except OSError as error:  # a full disk under the standard output, say, or a name that is too long
        report(f"{error}: fix this and rerun the command")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        report(
            f"out of memory ({str(error)[:200]}): lower config.batch_size or config.eval_batch_size, or use a smaller model"
        )
        sys.exit(2)


def hide_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print what Python cannot raise, except what TensorStore says, dozens of times, when reading or writing has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
