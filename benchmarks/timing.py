"""Timing: the throughput of a step, alternating measurements, and summaries of repeats.

It needs only the standard library, so that the same code times PyTorch in a Python without JAX.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Contender = Callable[[float], float]  # measures for at least this many seconds and returns images/s
Dispatched = TypeVar("Dispatched")


def throughput(
    dispatch: Callable[[], Dispatched], wait: Callable[[Dispatched], object], images: int, seconds: float
) -> float:
    """Return the images/s of a step that is dispatched while the previous one runs, as in the training loop.

    Args:
        dispatch: starts a step and returns what `wait` takes.
        wait: returns once that step is done.
        images: number of images of a step.
        seconds: minimum time; at least one step is taken.
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
    """Measure contenders alternately, A B A B, after one measurement of each that compiles and does not count."""
    for contender in contenders.values():
        contender(seconds)
    rounds = [{name: contender(seconds) for name, contender in contenders.items()} for _ in range(repeats)]
    return {name: [rates[name] for rates in rounds] for name in contenders}


def summary(repeats: list[float], unit: str) -> dict[str, Any]:
    """Summarise repeats as in results/*.json: the unit, the median, the minimum, the maximum and all values."""
    return {
        "unit": unit,
        "median": statistics.median(repeats),
        "min": min(repeats),
        "max": max(repeats),
        "repeats": repeats,
    }
