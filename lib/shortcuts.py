"""What tells classes apart and has nothing to do with lensing, such as a unit; without torch."""

import numpy as np
from sklearn.metrics import roc_auc_score

from lib.images import forget_pages
from lib.traits import FIGURES, figures_of

IMAGES = 2000  # that are compared
BLOCK_PIXELS = 2**20  # that are read together
FEWEST = 20  # of a class and of the others, below which chance tells them apart
TOLD_APART = 0.9  # AUC of one figure; of simulated images that differ in substructure alone it is below 0.6


def differences(dataset):
    """Lines, one for each figure that tells a class from the others; compares IMAGES images at most."""
    counts = np.bincount(dataset.labels, minlength=len(dataset.class_names))
    most = IMAGES // len(counts)
    rows = [np.flatnonzero(dataset.labels == k)[:: -(-n // most)] for k, n in enumerate(counts) if n]
    rows = np.sort(np.concatenate(rows))
    labels = dataset.labels[rows]
    large = [k for k in range(len(counts)) if FEWEST <= (labels == k).sum() <= len(labels) - FEWEST]
    if not large:
        return []
    together = max(1, BLOCK_PIXELS // dataset.img_size**2)
    parts = [figures_of(dataset.images[rows[i : i + together]]) for i in range(0, len(rows), together)]
    forget_pages(dataset.images)
    lines = []
    for (name, meaning), values in zip(FIGURES, np.concatenate(parts).T, strict=True):
        aucs = np.array([roc_auc_score(labels == k, values) for k in large])
        # The class whose figure is the larger one, if there is one, else the one with the smaller.
        place = aucs.argmax() if aucs.max() >= TOLD_APART else aucs.argmin()
        auc = max(aucs[place], 1 - aucs[place])
        if auc < TOLD_APART:
            continue
        of_class = labels == large[place]
        own, others = np.median(values[of_class]), np.median(values[~of_class])
        times = f" ({own / others:.3g} times)" if own * others > 0 else ""
        lines.append(
            f"the {name} is {own:.3g} in the median image of class {dataset.class_names[large[place]]} and "
            f"{others:.3g} in that of the others{times}: {meaning} It alone tells them apart, AUC {auc:.3f}"
        )
    return lines
