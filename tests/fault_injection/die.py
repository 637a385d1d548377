"""Run `launch.py` and kill it, as `kill -9` does, at a moment that chance alone would rarely find.

python tests/fault_injection/die.py MOMENT N [flags of launch.py]     # at the N-th of these moments
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

# Moment -> what Python's audit events of the file system, "event path [second path]", look like just before it.
FILE_EVENTS = {
    "saving": r"\.orbax-checkpoint-tmp",
    "before a checkpoint has its name": r"os\.rename \S*/checkpoints/\d+\.orbax-checkpoint-tmp \S*/checkpoints/\d+$",
    "writing a row": r"open \S*/metrics\.jsonl",
    "replacing a JSON file": r"os\.rename .*\.json$",
}
MOMENTS = (*FILE_EVENTS, "after a checkpoint has its name", "stepping", "evaluating", "any time")


def countdown(n: int) -> Callable[[], None]:
    """A function that ends this process at its n-th call."""
    left = iter(range(n - 1, -1, -1))

    def pass_by() -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return pass_by


def at_file_event(pattern: str, pass_by: Callable[[], None], then: bool = False) -> None:
    """Call `pass_by` at events that look like a pattern; with `then`, at the next event of the run's folder after each."""
    due = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal due
        if event == "open" or event.startswith(("os.", "shutil.")):
            line = " ".join(
                [event, *(os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike)))]
            )
            if due and re.search("/checkpoints|/metrics.jsonl", line):
                pass_by()
            matches = re.search(pattern, line) is not None
            due = then and matches
            if matches and not then:
                pass_by()

    sys.addaudithook(hook)


def at_call(module: Any, factory: str, pass_by: Callable[[], None], attribute: str = "") -> None:
    """Call `pass_by` as what a factory of a module makes, or a function among its attributes, has been called."""
    make = getattr(module, factory)

    def made(*arguments: Any) -> Any:
        product = make(*arguments)
        function = product[0] if isinstance(product, tuple) else product

        def call(*arguments: Any) -> Any:
            results = function(*arguments)
            pass_by()
            return results

        return (call, *product[1:]) if isinstance(product, tuple) else call

    setattr(module, factory, made)


def main() -> None:
    """Arrange the end, and begin."""
    moment, n = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    import launch
    from resnet_jax import steps
    from resnet_jax.cli import command_line
    from resnet_jax.data import feed

    pass_by = countdown(n)
    if moment in FILE_EVENTS:
        at_file_event(FILE_EVENTS[moment], pass_by)
    elif moment == "after a checkpoint has its name":
        at_file_event(FILE_EVENTS["before a checkpoint has its name"], pass_by, then=True)
    elif moment == "any time":
        threading.Timer(4 + n / 10, countdown(1)).start()  # seconds; the first step comes after about six
    elif moment == "stepping":
        at_call(feed, "make_step", pass_by)
    else:
        at_call(steps, "jit_eval_step", pass_by)
    command_line.run(launch.main)


if __name__ == "__main__":
    main()
