"""The mass of the axion: intervals of estimates, their calibration, and figures of both."""

import math
import sys

import numpy as np

from lib.metrics import bootstrap, wilson

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
    the true mass in its interval. A group of fewer than FEWEST_IMAGES takes the width of all images. Fewer than
    nine images in all cannot promise that, which is said on stderr.

    outputs : (n, 2), estimates and the natural logarithms of their spreads.
    log_masses : (n,).
    edges : (groups - 1,) estimates that part the groups.
    """
    estimates, log_spreads = outputs.astype(np.float64).T
    scores = np.abs(estimates - log_masses) / np.exp(log_spreads)
    group = (estimates[:, None] > np.array(edges)).sum(axis=1)
    every, images = _conformal(scores), len(scores)
    if images / (images + 1) < COVERAGE:
        print(f"{images} validation images have a mass: an interval holds it in {100 * images / (images + 1):.0f} of "
              f"100 images, not in {100 * COVERAGE:.0f}", file=sys.stderr)  # fmt: skip
    own = [scores[group == i] for i in range(len(edges) + 1)]
    return np.array([_conformal(part) if len(part) >= FEWEST_IMAGES else every for part in own])


def _conformal(scores):
    """The score that a new one exceeds with a probability of at most 1 - COVERAGE."""
    rank = math.ceil((len(scores) + 1) * COVERAGE)
    return np.sort(scores)[min(rank, len(scores)) - 1]


def by_half_decade(log_masses):
    """{"-24 to -23.5": (n,) bool, ...}: which of the true masses are in it, for those that hold some."""
    lower = np.floor(2 * log_masses) / 2
    return {f"{low:g} to {low + 0.5:g}": lower == low for low in np.unique(lower)}


def figures(truth, estimates, low, high, resamples, seed):
    """What estimates and intervals, log10 of masses (n,), are worth, beside the true masses (n,).

    {"error": figure of the mean error in dex, "median_error", "coverage": figure of the share of intervals
    that hold the truth, "width": mean width in dex, "images": n, "half_decades": {name: the same without the
    median}}. A figure is {"value", "low", "high"}: a bootstrap's interval of the error, Wilson's of the share.
    """
    error = np.abs(estimates - truth)
    (interval,) = bootstrap(lambda counts: [np.average(error, weights=counts)], np.zeros(len(error)), resamples, seed)
    whole = _figures(error, (low <= truth) & (truth <= high), high - low)
    whole["error"] |= {"low": float(interval[0]), "high": float(interval[1])}
    groups = by_half_decade(truth).items()
    parts = {name: _figures(error[own], ((low <= truth) & (truth <= high))[own], (high - low)[own]) for name, own in groups}
    return {**whole, "median_error": float(np.median(error)), "half_decades": parts}


def _figures(error, held, width):
    low, high = wilson(held.sum(), len(held))
    return {"error": {"value": float(error.mean())}, "width": float(width.mean()), "images": len(held),
            "coverage": {"value": float(held.mean()), "low": low, "high": high}}  # fmt: skip
