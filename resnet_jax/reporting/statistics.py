"""Means over seeds, their spread, and whether two of them differ."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_and_spread(values: Sequence[float]) -> str:
    """Shares as per cent: "73.29 ± 0.41 %" with the standard deviation of a sample, or one value."""
    percent = 100 * np.array(values)
    spread = f" ± {percent.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{percent.mean():.2f}{spread} %"


def compare(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean of second - first with its 95 % interval, by Welch's t test; None where a side has a single value."""
    if min(len(first), len(second)) < 2:
        return None
    interval = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    return float(np.mean(second) - np.mean(first)), float(interval.low), float(interval.high)
