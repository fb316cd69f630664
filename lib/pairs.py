"""Pairs of a sharp image and a coarse one of the same lens."""

import numpy as np
import torch
import torch.nn.functional as F

from lib.errors import UserError
from lib.listing import FACTORS
from lib.loader import batch_reader, in_batches, some_of

COARSE = "coarse images of "  # what the origin of coarse images begins with
COMPARED_PAIRS = 200  # whose coarse image is compared with the reduction of the sharp one
ROUNDING = 1e-3  # of the range of pixels: what a coarse image may differ by if it is the reduction


def reduced(images, factor=2):
    """The coarse images (..., H/factor, W/factor) of sharp ones (..., H, W), a floating-point tensor.

    Bicubic, a = -0.75, half-pixel centres and no smoothing before, as in the files of Specific Test VI.B.
    Raises ValueError if `factor` does not divide the sides.
    """
    *batch, height, width = images.shape
    if height % factor or width % factor:
        raise ValueError(f"images of {height}×{width} pixels cannot be reduced {factor} times")
    size = (height // factor, width // factor)
    flat = images.reshape(-1, 1, height, width)
    return F.interpolate(flat, size=size, mode="bicubic", antialias=False).reshape(*batch, *size)


def interpolated(images, factor, mode):
    """Coarse images (n, 1, H, W), `factor` times as wide; `mode` is "bilinear" or "bicubic"."""
    return F.interpolate(images, scale_factor=factor, mode=mode, align_corners=False)


def coarse_of(dataset):
    """The `Dataset` with the coarse images (N, H, H) in memory in the place of the sharp ones.

    They are those of the files, or else the sharp images reduced by two. Hashes and fingerprint are those of the
    sharp images, so both have one split; the origin is another, since it tells the size of pixels.

    Raises UserError if the sharp images have an odd number of pixels.
    """
    origin = COARSE + dataset.origin
    if dataset.coarse is not None:
        return dataset._replace(images=dataset.coarse, origin=origin)
    if dataset.img_size % 2:
        raise UserError(f"{dataset.origin}: images of {dataset.img_size} pixels cannot be reduced by two")
    read = batch_reader(dataset.images, torch.device("cpu"), once=True)
    images = in_batches(lambda rows: reduced(read(rows)), np.arange(len(dataset.labels)))
    return dataset._replace(images=images[:, 0].numpy(), origin=origin)


def factor_of(dataset, coarse):
    """How many times as wide the images of `dataset` are as those of `coarse_of` it; UserError if not of FACTORS."""
    factor, rest = divmod(dataset.img_size, coarse.img_size)
    if rest or factor not in FACTORS:
        raise UserError(f"{dataset.origin}: sharp images must be 2, 3 or 4 times as wide as coarse ones, and they have "
                        f"{dataset.img_size} and {coarse.img_size} pixels")  # fmt: skip
    return factor


def are_reductions(dataset, coarse, rows):
    """Whether the coarse images of some `rows` are those that `reduced` makes of the sharp ones."""
    if dataset.coarse is None:
        return True
    rows = some_of(rows, COMPARED_PAIRS, dataset.images)
    sharp, seen = torch.from_numpy(dataset.images[rows]), torch.from_numpy(coarse.images[rows])
    difference = (reduced(sharp, factor_of(dataset, coarse)) - seen).square().mean().sqrt()
    return bool(difference <= ROUNDING * (sharp.max() - sharp.min()))
