"""Calibration error and temperature scaling.

Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.disk import files
from resnet_jax.errors import UserError

_BINS = 15  # as in the paper
_FOLDS = 5
_NAMES = {1: "plain", 2: "flip", 6: "moved"}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits [N, num_classes]. SciPy has this, and takes half a second to import for `load`."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean negative log-likelihood: logits [N, num_classes], labels int [N]."""
    from scipy import special  # here, because `load` reads temperatures without it

    log_probabilities = special.log_softmax(logits.astype(np.float64), axis=1)
    return -float(log_probabilities[np.arange(len(labels)), labels].mean())


def calibration_report(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compute the calibration of a network on a split, in 15 bins of confidence of equal width.

    Args:
        logits: float32 [N, num_classes].
        labels: int [N].

    Returns:
        {"expected_calibration_error": mean |accuracy - confidence| (the paper's equation 3), "bins": [{"low", "high",
        "count", "confidence": mean, "accuracy"}] of the bins that are not empty}.
    """
    probabilities = softmax(logits.astype(np.float64))
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)  # a bin includes its upper end
    bins = [
        {
            "low": i / _BINS,
            "high": (i + 1) / _BINS,
            "count": int((bin_of == i).sum()),
            "confidence": float(confidence[bin_of == i].mean()),
            "accuracy": float(correct[bin_of == i].mean()),
        }
        for i in np.unique(bin_of).tolist()
    ]
    error = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(labels)
    return {"expected_calibration_error": error, "bins": bins}


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature in 0.05..20 that minimises the negative log-likelihood (the paper's section 4.2)."""
    from scipy import optimize

    limits = np.log((0.05, 20.0))
    result = optimize.minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), labels), bounds=limits, method="bounded"
    )
    return float(np.exp(result.x))


def temperature_helps(logits: np.ndarray, labels: np.ndarray) -> bool:
    """Whether a temperature lowers the negative log-likelihood of images that it was not fitted on.

    The images are dealt into five folds. For each, a temperature is fitted on the other four.
    """
    fold = np.arange(len(labels)) % _FOLDS
    scaled = np.array(logits, np.float64)
    for i in range(min(_FOLDS, len(labels))):
        if (others := fold != i).any():
            scaled[fold == i] /= fit_temperature(logits[others], labels[others])
    return negative_log_likelihood(scaled, labels) < negative_log_likelihood(logits, labels)


def to_names(by_views: Mapping[int, float]) -> dict[str, float]:
    """Convert temperatures, keyed by the number of views, to JSON: {"plain", "flip", "moved"} or some of them."""
    return {_NAMES[views]: temperature for views, temperature in by_views.items()}


def from_names(named: Mapping[str, float]) -> dict[int, float]:
    """Convert JSON to temperatures, the inverse of `to_names`.

    Raises:
        ValueError: if it is something else, or one is not a number in 0.001..1000.
    """
    if not isinstance(named, dict) or not named.keys() <= set(_NAMES.values()):
        raise ValueError(f"temperatures are of {', '.join(_NAMES.values())}")
    by_views = {views: named[name] for views, name in _NAMES.items() if name in named}
    for temperature in by_views.values():
        if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
            raise ValueError(f"a temperature of {temperature} is not in 0.001..1000")
    return {views: float(temperature) for views, temperature in by_views.items()}


def temperatures(directory: Path, step: int) -> dict[int, float]:
    """Read the temperatures that `eval --fit-temperature` stored for a checkpoint, by the number of views.

    Raises:
        UserError: if the file is corrupt.
    """
    path = directory / "temperature.json"
    if not path.exists():
        return {}
    hint = "fit the temperature again, or remove the file"
    stored = files.read_json(path, ("checkpoint_step", "temperature"), hint)
    if stored["checkpoint_step"] != step:
        return {}
    try:
        return from_names(stored["temperature"])
    except ValueError as error:
        raise UserError(f"{path} cannot be used ({error}): {hint}") from error


def keep_temperature(directory: Path, step: int, views: int, temperature: float | None) -> None:
    """Store a temperature, or remove one, for None; replace those of other checkpoints, and a corrupt file."""
    by_views: dict[int, float] = {}
    with suppress(UserError):
        by_views = temperatures(directory, step)
    by_views.pop(views, None)
    if temperature is not None:
        by_views[views] = temperature
    if not by_views:
        (directory / "temperature.json").unlink(missing_ok=True)
        return
    files.write_json(directory / "temperature.json", {"checkpoint_step": step, "temperature": to_names(by_views)})
