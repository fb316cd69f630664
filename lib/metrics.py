"""Measures of a classifier's probabilities: accuracy, AUC, calibration, intervals, temperature."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

CALIBRATION_BINS = 15
TEMPERATURE_RANGE = (0.1, 10.0)


def accuracy(probabilities, labels):
    """Fraction of images whose most probable class is the true one."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def auc_by_class(probabilities, labels):
    """One-vs-rest area under the ROC curve of each class: (N, K), (N,) -> list of K."""
    return [float(roc_auc_score(labels == k, probabilities[:, k])) for k in range(probabilities.shape[1])]


def measures(probabilities, labels):
    """What is measured in one evaluation, an array: AUC of each class, macro AUC, accuracy."""
    aucs = auc_by_class(probabilities, labels)
    return np.array([*aucs, np.mean(aucs), accuracy(probabilities, labels)])


def measures_of_counts(probabilities, labels):
    """`measures` of images of which each is drawn several times: function from counts (N,)."""
    classes = range(probabilities.shape[1])
    aucs_of = [auc_of_counts(probabilities[:, k], labels == k) for k in classes]
    correct = probabilities.argmax(axis=1) == labels

    def measure(counts):
        aucs = [auc_of(counts) for auc_of in aucs_of]
        return np.array([*aucs, np.mean(aucs), np.average(correct, weights=counts)])

    return measure


def auc_of_counts(scores, positive):
    """The AUC of images of which each is drawn several times: function from counts (N,).

    It sorts once, where `roc_auc_score` sorts every time. Equal scores count one half.
    """
    order = np.argsort(scores, kind="stable")
    positive, scores = positive[order], scores[order]
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # of equal scores

    def auc(counts):
        counts = counts[order]
        drawn = np.add.reduceat(counts, starts)
        positives = np.add.reduceat(counts * positive, starts)
        negatives = drawn - positives
        below = np.cumsum(negatives) - negatives / 2
        return (positives * below).sum() / (positives.sum() * negatives.sum())

    return auc


def calibration(probabilities, labels):
    """How far confidence is from accuracy (Guo et al. 2017, equation 3).

    Returns (expected calibration error, [(mean confidence, accuracy, images) of each bin that has
    images]). Confidence is the largest probability; bins are equally wide.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    table = [
        (float(confidence[index == b].mean()), float(correct[index == b].mean()), int(n))
        for b, n in enumerate(np.bincount(index, minlength=CALIBRATION_BINS))
        if n
    ]
    error = sum(n * abs(accurate - confident) for confident, accurate, n in table) / len(labels)
    return error, table


def bootstrap(statistic, labels, resamples, seed):
    """95 % percentile intervals (n, 2) of `statistic`, resampling images within each class.

    `statistic` gives n numbers of how often each image is drawn: counts (N,) -> (n,).
    """
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    values = []
    for _ in tqdm(range(resamples), desc="bootstrap", leave=False, disable=None):
        rows = np.concatenate([rng.choice(members, len(members)) for members in by_class])
        values.append(statistic(np.bincount(rows, minlength=len(labels))))
    return np.quantile(values, [0.025, 0.975], axis=0).T


def mcnemar(only_one, only_other):
    """p-value of two classifiers being equally good, from the images that only one of them gets right.

    The exact binomial form of the test (McNemar 1947).
    """
    different = only_one + only_other
    return float(binomtest(only_one, different).pvalue) if different else 1.0


def with_bounds(value, interval):
    """A value with its interval (low, high), as results hold it: {"value", "low", "high"}."""
    low, high = interval
    return {"value": float(value), "low": float(low), "high": float(high)}


def share_of(right):
    """The `with_bounds` of a share of images, from (n,) bool, with Wilson's interval."""
    return with_bounds(right.mean(), wilson(right.sum(), len(right)))


def wilson(right, images):
    """95 % interval (low, high) of the share of images that are right (Wilson 1927).

    It has a width even if all are right, where a bootstrap draws right ones only.
    """
    interval = binomtest(int(right), int(images)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def about_intervals(aucs):
    """One line on AUCs {"value", "low", "high"} whose bootstrap interval has no width, or None."""
    if not any(auc["low"] == auc["high"] == 1 for auc in aucs):  # one resample has no width either
        return None
    return (
        "an AUC interval has no width: these images are ranked without an error, so every resample is, too. "
        "Errors too rare for so few images cannot be seen"
    )


def fit_temperature(logits, labels):
    """The number, 0.1 to 10, by which logits (n, K) are divided for the least cross-entropy.

    Cross-entropy is convex in the inverse of the temperature (Guo et al. 2017, section 4.2). Without a
    mistake it would have no least value: n images of a class that are all right do not make certain
    that the next one is. So the target of their class is (n + 1) / (n + 2), and the other classes
    share the rest (Platt 1999, "Probabilistic outputs for support vector machines", section 2.2).
    """
    logits = logits.astype(np.float64)
    classes, rows = logits.shape[1], np.arange(len(labels))
    images = np.bincount(labels, minlength=classes)[labels]
    targets = np.repeat(1 / (images + 2) / (classes - 1), classes).reshape(-1, classes)
    targets[rows, labels] = (images + 1) / (images + 2)

    def cross_entropy(inverse):
        return -(targets * log_softmax(inverse * logits, axis=1)).sum(axis=1).mean()

    low, high = (1 / temperature for temperature in reversed(TEMPERATURE_RANGE))
    result = minimize_scalar(cross_entropy, bounds=(low, high), options={"xatol": 1e-6})
    return 1 / result.x
