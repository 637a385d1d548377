"""The one exception for what a user can mend."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says what to change."""


def report(error: object) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2, for the command-line tools."""
    try:
        yield
    except UserError as error:
        report(error)
        sys.exit(2)
