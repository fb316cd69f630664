"""Which images are copies of one image: turned, mirrored, in another unit or rounded; without torch."""

import hashlib

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

GRID = 8  # blocks along the side of an image
CELL = 0.05  # wide, in each number of a signature; rounding to 8 bit changes one of a lens by 0.003 at most
NEAR, FAR = 0.006, 0.04  # rounding to 8 bit changes the signatures of a lens by less; those of noise
NEIGHBOURS = 6  # of an image, itself among them, of which the near ones are compared pixel by pixel
CHUNK = 2**17  # pixels that stay in the processor's cache


def orientations(images):
    """The eight orientations of square images (..., H, H), a list of views."""
    mirrored = [images[..., ::up, ::right] for up in (1, -1) for right in (1, -1)]
    return mirrored + [view.swapaxes(-1, -2) for view in mirrored]


def signatures_of(images):
    """Signatures (b, 12) of images (b, H, H) that orientation, offset and scale do not change.

    The squared distance from the mean is averaged in 8 × 8 blocks and standardised. It shows bright
    pixels, which rounding changes least. The signatures are mean and root mean square of the blocks
    that the eight orientations exchange; those at the border are left out.
    """
    size = images.shape[1]
    edges, pixels = np.linspace(0, size, GRID + 1), np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    averaging = overlap.clip(0) * GRID / size
    rows, columns = (index + 1 for index in np.triu_indices(GRID // 2 - 1))
    signatures = np.empty((len(images), 2 * len(rows)))
    step = max(1, CHUNK // size**2)
    for start in range(0, len(images), step):
        squares = images[start : start + step].astype(np.float64)
        peak = np.abs(squares).max(axis=(1, 2), keepdims=True)
        squares -= squares.mean(axis=(1, 2), keepdims=True)
        squares *= squares
        blocks = averaging @ squares @ averaging.T
        mean = blocks.mean(axis=(1, 2), keepdims=True)
        spread = blocks.std(axis=(1, 2), keepdims=True)
        even = spread <= 1e-9 * mean + 1e-20 * peak**2  # what is left then is rounding of the mean
        blocks = np.where(even, 0, (blocks - mean) / np.where(even, 1, spread))
        turned = np.stack(orientations(blocks))[:, :, rows, columns]
        signatures[start : start + step] = np.hstack([turned.mean(axis=0), np.sqrt((turned**2).mean(axis=0))])
    return signatures


def hashes_of(images, signatures):
    """The hash (b,) uint64 of each image (b, H, H) float32 with its `signatures_of`.

    The upper half is that of the cell of its signatures, which its turned, rescaled and rounded copies
    have with few exceptions, and a few other images, too. The lower half is that of its pixels in
    the first of its orientations.
    """
    cells = np.rint(signatures / CELL).astype("<i8")
    halves = [_digest(cell) + _digest(_first_orientation(image)) for cell, image in zip(cells, images, strict=True)]
    return np.frombuffer(b"".join(halves), ">u8").astype(np.uint64)


def _digest(content):
    return hashlib.sha256(content).digest()[:4]


def _first_orientation(image):
    """The bytes of the orientation whose bytes come first; -0.0 counts as 0.0."""
    turned = orientations(image + np.float32(0))
    beginnings = [view[0].tobytes() for view in turned]  # one of them is enough for most images
    first = min(beginnings)
    return min(view.tobytes() for view, beginning in zip(turned, beginnings, strict=True) if beginning == first)


def originals_of(images, hashes, signatures):
    """What all copies of an image have in common (n,) uint64: the lowest of their hashes."""
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    near = signatures[first]
    distance, nearest = cKDTree(near).query(near, NEIGHBOURS, p=np.inf, distance_upper_bound=FAR)
    limit = np.maximum(NEAR, distance[:, -1:] / 6)  # the second: much nearer than the others
    one, other = np.nonzero((nearest < len(first)) & (distance < limit))
    other = nearest[one, other]
    one, other = np.unique(np.sort(np.stack([one, other])[:, one != other], axis=0), axis=1)
    same = np.array([is_copy(images[first[i]], images[first[j]]) for i, j in zip(one, other, strict=True)], bool)
    links = coo_array((same[same], (one[same], other[same])), shape=(len(first),) * 2)
    group = connected_components(links, directed=False)[1][which]
    lowest = np.full(len(first), np.iinfo(np.uint64).max)
    np.minimum.at(lowest, group, hashes)
    return lowest[group]


def is_copy(image, other):
    """Whether two images are one, turned, rescaled or rounded: one order of pixels fits both.

    Rescaling and rounding map equal pixels to equal ones and never exchange two.
    """
    image, turned = image.ravel(), np.stack(orientations(other)).reshape(8, -1)
    other = turned[(turned @ (image - image.mean())).argmax()]
    return _in_one_order(image[::8], other[::8]) and _in_one_order(image, other)  # few pixels often tell


def _in_one_order(image, other):
    order = image.argsort()
    image, other = image[order], other[order]
    starts = np.flatnonzero(np.r_[True, image[1:] > image[:-1]])  # of equal pixels
    highest, lowest = np.maximum.reduceat(other, starts), np.minimum.reduceat(other, starts)
    return bool((highest[:-1] <= lowest[1:]).all())
