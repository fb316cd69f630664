"""The mass of the axion: intervals of estimates, their calibration, and how good both are."""

import math

import numpy as np

from lib.errors import warn
from lib.metrics import bootstrap, share_of, with_bounds

COVERAGE = 0.9  # share of the intervals that hold the true mass
FEWEST_IMAGES = 100  # validation images that give a group of estimates a width of its own


def half_decades(log_masses):
    """The multiples of one half between the smallest and the largest of log10 masses, a list."""
    first, last = math.floor(2 * min(log_masses)) + 1, math.ceil(2 * max(log_masses)) - 1
    return [number / 2 for number in range(first, last + 1)]


def fit_widths(outputs, log_masses, edges):
    """How many spreads an interval reaches to either side: (groups,), one for each group of estimates.

    Split conformal prediction (Lei et al. 2018, "Distribution-free predictive inference for regression",
    section 5.2), in each group by itself (Vovk 2012, "Conditional validity of inductive conformal
    predictors"): of new images like the n validation images of a group at least a share of COVERAGE has
    the true mass in its interval. A group of fewer than FEWEST_IMAGES takes the width of all images. With fewer
    than nine images nothing promises that; a line on stderr says so.

    outputs : (n, 2), estimates and the natural logarithms of their spreads.
    log_masses : (n,).
    edges : (groups - 1,) estimates that part the groups.
    """
    estimates, log_spreads = outputs.astype(np.float64).T
    scores = np.abs(estimates - log_masses) / np.exp(log_spreads)
    group = (estimates[:, None] > np.array(edges)).sum(axis=1)
    every, images = _conformal(scores), len(scores)
    if images / (images + 1) < COVERAGE:
        warn(f"{images} validation images have a mass: an interval holds it in {100 * images / (images + 1):.0f} of "
             f"100 images, not in {100 * COVERAGE:.0f}")  # fmt: skip
    parts = [scores[group == i] for i in range(len(edges) + 1)]
    return np.array([_conformal(part) if len(part) >= FEWEST_IMAGES else every for part in parts])


def _conformal(scores):
    """The score that a new one exceeds with a probability of at most 1 - COVERAGE."""
    rank = math.ceil((len(scores) + 1) * COVERAGE)
    return np.sort(scores)[min(rank, len(scores)) - 1]


def by_half_decade(log_masses):
    """{"-24 to -23.5": (n,) bool, ...}: which of the true masses are in it, for those that hold some."""
    lower = np.floor(2 * log_masses) / 2
    return {f"{low:g} to {low + 0.5:g}": lower == low for low in np.unique(lower)}


def results_of(truth, estimates, low, high, resamples, seed):
    """What estimates and intervals, log10 of masses (n,), are worth, beside the true masses (n,).

    {"error": `with_bounds` of the mean error in dex, "median_error", "coverage": `share_of` the intervals that
    hold the truth, "width": mean width in dex, "images": n, "half_decades": {name: the same without the
    median and the interval of the error, which is a bootstrap's}}.
    """
    error = np.abs(estimates - truth)
    (interval,) = bootstrap(lambda counts: [np.average(error, weights=counts)], np.zeros(len(error)), resamples, seed)

    def results_in(part):
        return {"error": {"value": float(error[part].mean())}, "width": float((high - low)[part].mean()),
                "images": int(part.sum()), "coverage": share_of(((low <= truth) & (truth <= high))[part])}  # fmt: skip

    whole = results_in(np.ones(len(truth), bool)) | {"error": with_bounds(error.mean(), interval)}
    parts = {name: results_in(part) for name, part in by_half_decade(truth).items()}
    return {**whole, "median_error": float(np.median(error)), "half_decades": parts}
