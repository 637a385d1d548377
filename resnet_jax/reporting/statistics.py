"""Mean and spread over seeds, and the difference between two groups of seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_and_spread(values: Sequence[float]) -> str:
    """Shares as text in per cent: "73.29 ± 0.41 %" with the sample's standard deviation, or "73.29 %" for one value."""
    percent = 100 * np.array(values)
    spread = f" ± {percent.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{percent.mean():.2f}{spread} %"


def compare(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean, low, high) of second - first, with its 95 % interval by Welch's t test.

    Returns:
        None where a side has fewer than two values, or where neither side's values differ.
    """
    if min(len(first), len(second)) < 2 or max(np.ptp(first), np.ptp(second)) < 1e-9:
        return None
    interval = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    return float(np.mean(second) - np.mean(first)), float(interval.low), float(interval.high)
