"""Make clean images look like a telescope's: noise, an object off the centre, any orientation."""

import math

import torch
import torch.nn.functional as F

KINDS = ("halfturn", "noise", "shift", "rotate")
SYMMETRIES = ("halfturn",)  # give another image of the same class; validation does without
BACKGROUND_RANGE = (-4.0, -2.0)  # log10 of the background's rms over the image's peak
PEAK_ELECTRONS_RANGE = (3.0, 5.0)  # log10 of the electrons in the brightest pixel
LARGEST_SHIFT = 1.5  # pixels


def augment(images, kinds):
    """Raw images (B, C, H, W) as `kinds`, some of KINDS, change them at random.

    Draws from torch's global random numbers. The sizes are relative to the image, so the unit of
    the data changes nothing. Noise comes last, as it does in a camera.
    """
    if "halfturn" in kinds:
        turned = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
        images = torch.where(turned, images.flip(2, 3), images)
    if "shift" in kinds or "rotate" in kinds:
        b = len(images)
        angle = torch.rand(b) * 2 * math.pi if "rotate" in kinds else torch.zeros(b)
        shift = torch.rand(b, 2) * 2 - 1 if "shift" in kinds else torch.zeros(b, 2)
        images = move(images, angle, LARGEST_SHIFT * shift)
    if "noise" in kinds:
        images = add_noise(images)
    return images


def move(images, angle, shift):
    """Images turned by `angle` (B,) about their centre and then shifted by `shift` (B, 2).

    Angles are in radian from x (columns) to y (rows), shifts (x, y) in pixels. Resampled once,
    bicubically; what comes from outside continues the edge.
    """
    cos, sin = angle.cos(), angle.sin()
    dx, dy = (shift * 2 / images.shape[-1]).unbind(1)  # in units of half the image
    theta = torch.stack(
        [torch.stack([cos, sin, -cos * dx - sin * dy], dim=1),
         torch.stack([-sin, cos, sin * dx - cos * dy], dim=1)], dim=1,
    ).to(images)  # fmt: skip
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def add_noise(images):
    """Images with background and shot noise, both Gaussian, of a random strength for each image."""

    def powers(low, high):
        shape = (len(images), 1, 1, 1)
        return (10 ** (low + (high - low) * torch.rand(shape))).to(images)

    peak = images.amax(dim=(1, 2, 3), keepdim=True)
    background = powers(*BACKGROUND_RANGE)
    shot_variance = (images / peak).clamp_min(0) / powers(*PEAK_ELECTRONS_RANGE)
    sigma = peak * (background.square() + shot_variance).sqrt()
    return images + sigma * torch.randn(images.shape).to(images)
