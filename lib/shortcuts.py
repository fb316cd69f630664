"""What tells classes apart and has nothing to do with lensing, such as a unit; without torch."""

import numpy as np
from sklearn.metrics import roc_auc_score

from lib.images import forget_pages

IMAGES = 2000  # that are compared
BLOCK_PIXELS = 2**20  # that are read together
FEWEST = 20  # of a class and of the others, below which chance tells them apart
TOLD_APART = 0.9  # AUC of one figure; of simulated images that differ in substructure alone it is below 0.6


# The columns of `figures_of`, and what a difference may mean.
FIGURES = (
    ("brightest pixel", "another unit?"),
    ("darkest pixel", "another zero level?"),
    ("typical step between neighbours in the corners", "other noise?"),
    ("share of pixels that are zero", "rounded or masked images?"),
    ("share of pixels as bright as the brightest", "saturated images?"),
    ("row of the centre of light", "turned or shifted images?"),
    ("column of the centre of light", "turned or shifted images?"),
)


def figures_of(images):
    """The FIGURES (n, 7) of images (n, H, H)."""
    pixels = images.reshape(len(images), -1).astype(np.float64)
    peak, lowest, side = pixels.max(axis=1), pixels.min(axis=1), images.shape[1]
    edge = max(2, side // 8)
    corners = [images[:, rows, columns] for rows in (slice(edge), slice(-edge, None))
               for columns in (slice(edge), slice(-edge, None))]  # fmt: skip
    steps = np.abs(np.diff(np.stack(corners, axis=1).astype(np.float64), axis=-1))
    flux = pixels - lowest[:, None]
    total = np.maximum(flux.sum(axis=1), np.finfo(float).tiny)
    row, column = (index.ravel() for index in np.indices((side, side)))
    return np.stack([
        peak, lowest, np.median(steps, axis=(1, 2, 3)), (pixels == 0).mean(axis=1),
        (pixels == peak[:, None]).mean(axis=1), flux @ row / total, flux @ column / total,
    ], axis=1)  # fmt: skip


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
