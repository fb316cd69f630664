"""Kinds of residual maps, found without labels; without torch.

A map is described by its power in octaves of spatial frequency. A mixture of many Gaussians follows
the images of a data set, whatever shape a kind has. Then the Gaussians that overlap most are merged
until as many groups are left as there are kinds: a soft version of Hennig's directly estimated
misclassification probabilities (2010). The overlap that is left says how far the kinds are apart.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from lib.errors import UserError
from lib.metrics import share_of

GAUSSIANS = 20
IMAGES_A_GAUSSIAN = 200  # with fewer, some Gaussians hold a few images each, and are left as kinds
LEAST_VARIANCE = 1e-4  # added to the variances of a Gaussian
ITERATIONS = 300  # of one fit, at most
FITS = 5  # from other starts; the one with the least overlap is kept
FEWEST_IMAGES, MOST_OVERLAP = 5000, 0.015  # beyond which the kinds may be wrong


class Kinds(NamedTuple):
    """Kinds of maps, numbered from the weakest residuals to the strongest.

    mixture : the fitted mixture of Gaussians.
    groups : (Gaussians, kinds) of 0 and 1, which Gaussian belongs to which kind.
    overlap : the largest overlap of two kinds, 0 to 1, see `overlaps`.
    images : number of images that were fitted.
    """

    mixture: GaussianMixture
    groups: np.ndarray
    overlap: float
    images: int

    @property
    def count(self):
        return self.groups.shape[1]


def octave_powers(maps):
    """Logarithm of the mean power of maps (n, H, H) in each octave of spatial frequency, (n, octaves).

    The octaves are 0 to 2 cycles an image, 2 to 4, 4 to 8 and so on; the last one starts at a quarter
    of the size or below and holds all higher frequencies. 64 pixels have five. A blank map has finite
    powers.
    """
    size = maps.shape[-1]
    power = np.abs(np.fft.fft2(maps.astype(np.float64))) ** 2
    cycles = np.fft.fftfreq(size, 1 / size)
    starts = 2 ** np.arange(1, max(size // 4, 1).bit_length())
    octave = np.digitize(np.hypot(cycles[:, None], cycles), starts)
    means = [power[:, octave == i].mean(axis=1) for i in range(len(starts) + 1)]
    return np.log(np.maximum(np.stack(means, axis=1), np.finfo(np.float32).tiny))


def gaussians_for(clusters, images):
    """Number of Gaussians with which `clusters` kinds are looked for in a number of images.

    Raises UserError, naming the flag, if so many kinds cannot be found in so many images.
    """
    if not 2 <= clusters <= GAUSSIANS:
        raise UserError(f"--clusters must be from 2 to {GAUSSIANS}, got {clusters}")
    if clusters > images:
        raise UserError(f"--clusters {clusters}: there are only {images} images to find them in")
    return min(GAUSSIANS, max(clusters, images // IMAGES_A_GAUSSIAN))


def fit(powers, clusters, seed):
    """Find kinds in powers (n, octaves) of maps; the same `Kinds` for the same seed.

    Raises UserError as `gaussians_for` does.
    """
    powers = powers.astype(np.float64)
    gaussians = gaussians_for(clusters, len(powers))
    fits = []
    for state in np.random.default_rng(seed).integers(2**32, size=FITS).tolist():
        mixture = GaussianMixture(
            gaussians, reg_covar=LEAST_VARIANCE, max_iter=ITERATIONS, random_state=state
        )
        with warnings.catch_warnings():  # the overlap says how good a fit is
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(powers)
        shares = mixture.predict_proba(powers)
        groups = merged(shares, clusters)
        fits.append((overlaps(shares @ groups).max(), mixture, groups))
    overlap, mixture, groups = min(fits, key=lambda each: each[0])
    strength = (mixture.weights_ * mixture.means_.mean(axis=1)) @ groups / (mixture.weights_ @ groups)
    return Kinds(mixture, groups[:, np.argsort(strength)], float(overlap), len(powers))


def overlaps(shares):
    """How much groups overlap, (k, k) with a diagonal of 0, from shares (n, k) of images in groups.

    It is the share of a group's images that the other group claims, on average; of the two groups the
    smaller one counts.
    """
    sizes = np.maximum(shares.sum(axis=0), np.finfo(np.float64).tiny)
    overlap = shares.T @ shares / np.minimum.outer(sizes, sizes)
    np.fill_diagonal(overlap, 0)
    return overlap


def merged(shares, clusters):
    """Groups of Gaussians, (Gaussians, clusters) of 0 and 1: the two that overlap most become one.

    `shares` (n, Gaussians) says how much of an image is of which Gaussian.
    """
    groups = np.eye(shares.shape[1])
    while groups.shape[1] > clusters:
        overlap = overlaps(shares @ groups)
        one, other = np.unravel_index(overlap.argmax(), overlap.shape)
        groups[:, one] += groups[:, other]
        groups = np.delete(groups, other, axis=1)
    return groups


def assign(kinds, powers):
    """The kind, from 0, of each map: (n, octaves) -> (n,) int."""
    return (kinds.mixture.predict_proba(powers.astype(np.float64)) @ kinds.groups).argmax(axis=1)


def doubt(kinds):
    """Why the kinds may be wrong, as one line, or None."""
    reasons = []
    if kinds.images < FEWEST_IMAGES:
        reasons.append(f"found in {kinds.images:,} images, and {FEWEST_IMAGES:,} are needed")
    if kinds.overlap > MOST_OVERLAP:
        reasons.append(f"overlap left {kinds.overlap:.3f}, and {MOST_OVERLAP} is the limit")
    return f"the kinds may be wrong: {'; '.join(reasons)}" if reasons else None


# Scoring, which alone uses labels


def match(kind_of, labels, clusters, classes):
    """Give every kind the class that makes most images agree, no class twice.

    `kind_of` (n,) are kinds from 0 to `clusters` - 1, `labels` (n,) classes from 0 to `classes` - 1.
    Returns (table (classes, clusters) of counts, the class of each kind (clusters,), -1 for a kind
    that is left over).
    """
    table = np.zeros((classes, clusters), dtype=int)
    np.add.at(table, (labels, kind_of), 1)
    class_of = np.full(clusters, -1)
    matched, kinds = linear_sum_assignment(table, maximize=True)
    class_of[kinds] = matched
    return table, class_of


def agreement(kinds, kind_of, labels, class_names):
    """How well kinds agree with classes: {"accuracy", "overlap", "fitted_on", "table"}.

    The accuracy is `metrics.share_of` the images under the same match. The table is {class: its images in
    each kind}.
    """
    table, class_of = match(kind_of, labels, kinds.count, len(class_names))
    return {"accuracy": share_of(class_of[kind_of] == labels), "overlap": kinds.overlap, "fitted_on": kinds.images,
            "table": dict(zip(class_names, table.tolist(), strict=True))}  # fmt: skip
