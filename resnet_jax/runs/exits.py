"""How the program ends: with one line for a user error, at once if need be."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from resnet_jax.errors import UserError, is_out_of_memory, one_line

_LONGEST = 2000  # characters; lists of fields that differ stay whole


def report(error: object) -> None:
    """Print an error as one line on stderr, of which the middle is left out if it is long: a value that a person gave may be."""
    line = one_line(error)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
    print(f"error: {line}", file=sys.stderr)


def exit_immediately(exit_code: int) -> NoReturn:
    """End this process at once.

    A normal exit waits for threads and processes that wait themselves after a failure: a save for ten minutes, other hosts
    for this one.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # None, or a full disk
            stream.flush()
    os._exit(exit_code)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn errors that a user can fix into one line on stderr and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except UserError as error:
        report(error)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("resnet_jax"):
            raise
        again = "resnet_jax[tfds]" if (error.name or "").startswith("tensorflow") else "resnet_jax again"
        report(f"{error.name} is not installed: run source .venv/bin/activate, or install {again}")
        sys.exit(2)
    except BrokenPipeError:  # the reader of the standard output has enough
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # such as a full disk under the standard output, or a name that is too long
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
    """Print unraisable exceptions, except one that TensorStore raises dozens of times after a failed read or write."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
