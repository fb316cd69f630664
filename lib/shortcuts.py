"""What tells classes apart and has nothing to do with lensing, such as a unit; without torch."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.npy import forget_pages
from lib.traits import TRAITS, traits_of

IMAGES = 2000  # that are compared
BLOCK_PIXELS = 2**20  # that are read together
FEWEST = 20  # of a class and of the others, below which chance tells them apart
# AUC of one trait, and of a linear classifier on all of them. Of simulated images that differ in substructure
# alone (300 a class, each instrument) they are at most 0.59 and 0.62.
TOLD_APART = 0.9
FOLDS = 5


def differences(dataset):
    """Lines, one for each trait that tells a class from the others; compares IMAGES images at most.

    If no trait does, there is a line for each class that a linear classifier on all traits tells apart.
    """
    counts = np.bincount(dataset.labels, minlength=len(dataset.class_names))
    most = IMAGES // len(counts)
    rows = [np.flatnonzero(dataset.labels == k)[:: -(-n // most)] for k, n in enumerate(counts) if n]
    rows = np.sort(np.concatenate(rows))
    labels = dataset.labels[rows]
    large = [k for k in range(len(counts)) if FEWEST <= (labels == k).sum() <= len(labels) - FEWEST]
    if not large:
        return []
    together = max(1, BLOCK_PIXELS // dataset.img_size**2)
    parts = [traits_of(dataset.images[rows[i : i + together]]) for i in range(0, len(rows), together)]
    forget_pages(dataset.images)
    traits, lines = np.concatenate(parts), []
    for (name, meaning), values in zip(TRAITS, traits.T, strict=True):
        aucs = np.array([roc_auc_score(labels == k, values) for k in large])
        # The class whose trait is the larger one, if there is one, else the one with the smaller.
        place = aucs.argmax() if aucs.max() >= TOLD_APART else aucs.argmin()
        auc = max(aucs[place], 1 - aucs[place])
        if auc < TOLD_APART:
            continue
        of_class = labels == large[place]
        here, others = np.median(values[of_class]), np.median(values[~of_class])
        times = f" ({here / others:.3g} times)" if here * others > 0 else ""
        lines.append(
            f"the {name} is {here:.3g} in the median image of class {dataset.class_names[large[place]]} and "
            f"{others:.3g} in that of the others{times}: {meaning} It alone tells them apart, AUC {auc:.3f}"
        )
    return lines or [
        f"a linear classifier tells class {dataset.class_names[k]} from the others by nothing but the "
        f"{', '.join(name for name, _ in TRAITS)}: another unit, noise or selection? AUC {auc:.3f}"
        for k in large if (auc := linear_auc(traits, labels == k)) >= TOLD_APART
    ]  # fmt: skip


def linear_auc(traits, of_class):
    """Cross-validated AUC of a linear classifier on traits (n, k) for a class, (n,) bool."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    scores = cross_val_predict(classifier, traits, of_class, cv=FOLDS, method="decision_function")
    return roc_auc_score(of_class, scores)
