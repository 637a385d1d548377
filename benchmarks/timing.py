"""Stopwatches: the throughput of a step, contenders side by side, and what their repeats come to.

The standard library alone, so that the yardstick in `benchmarks/` is timed by the same code, in a Python without JAX.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Contender = Callable[[float], float]  # measures for at least so many seconds, and returns images/s
Dispatched = TypeVar("Dispatched")


def throughput(
    dispatch: Callable[[], Dispatched], wait: Callable[[Dispatched], object], images: int, seconds: float
) -> float:
    """Images/s of a step that is dispatched while the one before it runs, as the training loop does.

    Args:
        dispatch: starts a step and returns what `wait` takes.
        wait: returns once that step is done.
        images: of a step.
        seconds: how long to go on at least; one step in any case.
    """
    start = time.perf_counter()
    pending, steps = dispatch(), 1
    while time.perf_counter() - start < seconds:
        ahead = dispatch()
        wait(pending)
        pending, steps = ahead, steps + 1
    wait(pending)
    return steps * images / (time.perf_counter() - start)


def interleave(contenders: Mapping[str, Contender], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Measure contenders side by side, A B A B, each after a measurement that does not count: it compiles and warms up."""
    for contender in contenders.values():
        contender(seconds)
    rounds = [{name: contender(seconds) for name, contender in contenders.items()} for _ in range(repeats)]
    return {name: [found[name] for found in rounds] for name in contenders}


def summary(repeats: list[float], unit: str) -> dict[str, Any]:
    """A figure as results hold it: its unit, the median of the repeats, the least, the greatest, and all of them."""
    return {
        "unit": unit,
        "median": statistics.median(repeats),
        "min": min(repeats),
        "max": max(repeats),
        "repeats": repeats,
    }
