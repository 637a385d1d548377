"""The command line of the tools that take a run: argparse's, with a mistake on one line as everywhere."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from resnet_jax.errors import exit_immediately, exit_on_user_error, hide_closed_loops, report


class ArgumentParser(argparse.ArgumentParser):
    """A parser of whole flags.

    Args:
        program: "python -m" this.
        description: the module's docstring, shown as it is.
    """

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print a mistake and exit with code 2."""
        report(f"{message}: {self.prog} --help says what there is")
        sys.exit(2)


def run_tool(main: Callable[[], None]) -> NoReturn:
    """Run a tool as a program, which ends at once, without what libraries say on their way out."""
    sys.unraisablehook = hide_closed_loops
    try:
        with exit_on_user_error():
            main()
            sys.stdout.flush()
    except SystemExit as stop:
        exit_immediately(stop.code if isinstance(stop.code, int) else 0)
    exit_immediately(0)
