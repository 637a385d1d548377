import json

import numpy as np
import pytest
from scipy import special

from resnet_jax.errors import UserError
from resnet_jax.inference import calibration
from resnet_jax.reporting import figures


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, np.float32))


def sampled(temperature, count=20_000):
    """Logits that are `temperature` times too sharp, and labels that follow the right ones."""
    rng = np.random.default_rng(0)
    right = rng.normal(size=(count, 4)).astype(np.float32) * 2
    labels = (special.softmax(right, axis=1).cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return right * temperature, np.minimum(labels, 3)


def test_the_expected_calibration_error_by_hand():
    logits = logits_of([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.35, 0.65]])
    found = calibration.calibration_report(logits, np.array([0, 0, 0, 1, 1]))
    assert found["expected_calibration_error"] == pytest.approx((4 * abs(0.75 - 0.9) + abs(1 - 0.65)) / 5, abs=1e-6)
    assert [(b["count"], b["accuracy"]) for b in found["bins"]] == [(1, 1.0), (4, 0.75)]
    for b, confidence in zip(found["bins"], (0.65, 0.9), strict=True):
        assert b["low"] < confidence <= b["high"]
        assert b["confidence"] == pytest.approx(confidence)


def test_certainty_and_chance_are_in_the_last_and_in_some_bin():
    found = calibration.calibration_report(np.array([[99.0, -99.0], [-99.0, 99.0]], np.float32), np.array([0, 0]))
    assert found["bins"] == [{"low": 14 / 15, "high": 1.0, "count": 2, "confidence": 1.0, "accuracy": 0.5}]
    assert (
        sum(b["count"] for b in calibration.calibration_report(np.zeros((7, 3), np.float32), np.zeros(7, int))["bins"])
        == 7
    )


def test_the_softmax_is_scipys_to_the_bit():
    for dtype in (np.float32, np.float64):
        logits = (np.random.default_rng(0).normal(size=(100, 10)) * 30).astype(dtype)
        np.testing.assert_array_equal(calibration.softmax(logits), special.softmax(logits, axis=1))


def test_the_likelihood():
    logits = logits_of([[0.9, 0.1], [0.35, 0.65]])
    expected = -(np.log(0.9) + np.log(0.35)) / 2
    assert calibration.negative_log_likelihood(logits, np.array([0, 0])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found_and_calibrates(temperature):
    logits, labels = sampled(temperature)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.03)  # of 20,000 samples
    after = calibration.calibration_report(logits / found, labels)["expected_calibration_error"]
    assert after < 0.012
    if temperature != 1:
        assert calibration.calibration_report(logits, labels)["expected_calibration_error"] > 4 * after


def test_a_reliability_plot_has_a_curve_for_each():
    found = calibration.calibration_report(*sampled(2.0))
    figure = figures.draw_reliability({"one": found, "other": found})
    (axes,) = figure.axes
    assert len(axes.lines) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"{name}: calibration error {100 * found['expected_calibration_error']:.2f} %" for name in ("one", "other")
    ]


def test_a_reliability_plot_shows_counts_and_joins_nearly_empty_bins():
    counts = [3, 4, 200, 2, 50, 1]
    bins = [{"count": n, "confidence": 0.1 + 0.15 * i, "accuracy": 0.2 * (i % 3)} for i, n in enumerate(counts)]
    merged = figures.merged_bins(bins)
    assert [count for count, *_ in merged] == [207, 53]
    for key, index in (("confidence", 1), ("accuracy", 2)):
        total = sum(b["count"] * b[key] for b in bins)
        assert sum(point[0] * point[index] for point in merged) == pytest.approx(total)
    (axes,) = figures.draw_reliability({"one": {"expected_calibration_error": 0.0, "bins": bins}}).axes
    assert [text.get_text() for text in axes.texts] == ["207", "53"]
    assert figures.merged_bins(bins[:1]) == [(3, 0.1, 0.0)]


@pytest.mark.parametrize("temperature", [0, -1, 1e-300, float("nan"), float("inf"), True, "warm", None, [1]])
def test_a_temperature_out_of_range_is_refused_and_can_be_fitted_again(tmp_path, temperature):
    path = tmp_path / "temperature.json"
    path.write_text(json.dumps({"checkpoint_step": 7, "temperature": {"plain": temperature}}))
    with pytest.raises(UserError, match=r"temperature\.json cannot be used \(.*: fit the temperature again, or remove"):
        calibration.temperatures(tmp_path, 7)
    calibration.keep_temperature(tmp_path, 7, 2, 1.5)
    assert calibration.temperatures(tmp_path, 7) == {2: 1.5}
    calibration.keep_temperature(tmp_path, 7, 1, 0.5)
    calibration.keep_temperature(tmp_path, 7, 6, 1.1)
    assert calibration.temperatures(tmp_path, 7) == {1: 0.5, 2: 1.5, 6: 1.1}
    for views in (2, 6):
        calibration.keep_temperature(tmp_path, 7, views, None)
    assert calibration.temperatures(tmp_path, 7) == {1: 0.5}
    calibration.keep_temperature(tmp_path, 7, 1, None)
    assert not path.exists()


@pytest.mark.parametrize(
    ("temperature", "count", "helps"), [(3.0, 200, True), (0.3, 200, True), (1.0, 40, False), (3.0, 1, False)]
)
def test_a_temperature_helps_only_where_it_helps_on_other_images(temperature, count, helps):
    assert calibration.temperature_helps(*sampled(temperature, count)) is helps
