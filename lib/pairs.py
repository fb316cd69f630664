"""Pairs of a sharp image and a coarse one of the same lens."""

import torch.nn.functional as F


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
