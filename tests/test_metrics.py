"""The figures of an evaluation, in cases whose answer is known."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from lib import metrics


def test_auc_and_intervals_are_right_for_a_known_case():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    score = rng.normal(labels * 1.0)
    probabilities = np.stack([1 - score, score], axis=1)
    # Two unit normals one apart: AUC = Φ(1/√2).
    expected = 0.5 * (1 + math.erf(0.5))
    measure = metrics.measures_of_counts(probabilities, labels)
    low, high = metrics.bootstrap(measure, labels, 200, 0)[1]
    assert low < expected < high
    assert 0.03 < high - low < 0.09
    perfect = np.eye(3)[np.repeat([0, 1, 2], 5)]
    assert metrics.measures(perfect, np.repeat([0, 1, 2], 5)).tolist() == [1.0] * 5


def test_each_class_has_its_own_auc_and_accuracy_counts_the_largest_probability():
    labels = np.array([0, 0, 1, 1, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.3, 0.6, 0.1], [0.1, 0.4, 0.5], [0.1, 0.1, 0.8]])
    # Class 0: of the six pairs (own, other) five are in order; class 1: five; class 2: all four.
    assert metrics.auc_by_class(probabilities, labels) == pytest.approx([5 / 6, 5 / 6, 1.0])
    assert metrics.accuracy(probabilities, labels) == pytest.approx(3 / 5)
    expected = [5 / 6, 5 / 6, 1.0, (5 / 6 + 5 / 6 + 1) / 3, 3 / 5]
    assert metrics.measures(probabilities, labels) == pytest.approx(expected)


def test_a_bootstrap_draws_within_each_class():
    labels = np.repeat([0, 1], [30, 3])

    def by_class(counts):
        return np.bincount(labels, weights=counts)

    intervals = metrics.bootstrap(by_class, labels, 20, 0)
    assert intervals.tolist() == [[30, 30], [3, 3]]

    def mean_row(counts):
        return [np.average(np.arange(33), weights=counts)]

    mean = metrics.bootstrap(mean_row, labels, 20, 0)
    again = metrics.bootstrap(mean_row, labels, 20, 0)
    assert mean[0, 0] < mean[0, 1]
    assert np.array_equal(mean, again)


def test_all_right_is_an_interval_with_a_width():
    """100 % of three images had the interval 100 % to 100 %."""
    assert metrics.wilson(3, 3) == pytest.approx((1 / (1 + 1.959964**2 / 3), 1.0))
    low, high = metrics.wilson(8, 10)  # Wilson 1927, by hand
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert metrics.about_intervals([{"low": 0.9, "high": 1.0}]) is None
    assert metrics.about_intervals([{"low": 0.9, "high": 0.9}]) is None  # of one resample
    assert "no width" in metrics.about_intervals([{"low": 0.9, "high": 1.0}, {"low": 1.0, "high": 1.0}])


def test_figures_of_counts_are_those_of_repeated_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    probabilities = softmax(np.eye(3)[labels] + rng.normal(size=(200, 3)), axis=1).round(2)  # ties
    measure = metrics.measures_of_counts(probabilities, labels)
    for counts in (np.ones(200, int), rng.integers(0, 4, 200)):
        repeated = metrics.measures(np.repeat(probabilities, counts, axis=0), np.repeat(labels, counts))
        assert measure(counts) == pytest.approx(repeated, abs=1e-12)


def test_calibration_error_is_that_of_a_known_case():
    confident = np.array([[0.9, 0.1]] * 10)
    labels = np.array([0] * 6 + [1] * 4)
    error, table = metrics.calibration(confident, labels)
    assert error == pytest.approx(0.3)
    assert [(round(c, 6), a, n) for c, a, n in table] == [(0.9, 0.6, 10)]


def test_the_temperature_stays_in_its_range():
    low, high = metrics.TEMPERATURE_RANGE
    right, labels = np.tile(np.eye(3, dtype=np.float32), (100, 1)), np.tile(np.arange(3), 100)
    assert metrics.fit_temperature(0.1 * right, labels) == pytest.approx(low, rel=0.01)
    assert metrics.fit_temperature(100 * right, labels[::-1]) == pytest.approx(high, rel=0.01)


@pytest.mark.parametrize("images", [4, 20, 1000])
def test_no_mistake_among_few_images_is_no_certainty(images):
    """The temperature ran to its limit, and every probability became 1.000000."""
    rng = np.random.default_rng(0)
    labels = np.arange(2 * images) % 2
    margin = (2 * labels - 1) * (5 + rng.random(2 * images))
    logits = np.stack([-margin, margin], axis=1)
    confidence = softmax(logits / metrics.fit_temperature(logits, labels), axis=1).max(axis=1)
    assert confidence.mean() == pytest.approx((images + 1) / (images + 2), abs=0.01)


def test_the_fitted_temperature_is_that_of_a_case_solved_by_hand():
    """Two classes, logits ±3, 80 % right: the targets are 0.9 and 0.25 of class 0, on average 0.77."""
    logits = np.tile(np.float32([3, -3]), (10, 1))
    labels = np.array([0] * 8 + [1] * 2)
    expected = 6 / math.log(0.77 / 0.23)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-4)
