"""Make clean images look like a telescope's: noise, an object off the centre, any orientation."""

import math

import torch
import torch.nn.functional as F

KINDS = ("halfturn", "flips", "noise", "shift", "rotate")
SYMMETRIES = ("halfturn", "flips")  # map an image to another of its class; not applied in validation
BACKGROUND_RANGE = (-4.0, -2.0)  # log10 of the background's rms over the image's peak
PEAK_ELECTRONS_RANGE = (3.0, 5.0)  # log10 of the electrons in the brightest pixel
LARGEST_SHIFT = 1.5  # pixels


def disturbances(kinds):
    """Those of `kinds` that change what validation images look like."""
    return [kind for kind in kinds if kind not in SYMMETRIES]


def augment(images, kinds, batch_size=None, part=slice(None)):
    """Augment raw images (b, C, H, W) at random; `kinds` is a subset of KINDS.

    The images may be the `part`, a slice, of a batch of `batch_size`. Random numbers are drawn for
    the whole batch, from the global generator of the images' device, so the result does not depend
    on how many processes share the batch. Sizes are relative to the image, so the unit of the data does not
    matter. Noise comes last, as it does in a camera.
    """
    n, device = batch_size or len(images), images.device
    if "halfturn" in kinds:
        turned = (torch.rand(n, 1, 1, 1, device=device) < 0.5)[part]
        images = torch.where(turned, images.flip(2, 3), images)
    if "flips" in kinds:  # of the image and its transpose: all eight orientations of a square
        transposed, rows, columns = (
            (torch.rand(n, 1, 1, 1, device=device) < 0.5)[part] for _ in range(3)
        )
        images = torch.where(transposed, images.mT, images)
        images = torch.where(rows, images.flip(2), images)
        images = torch.where(columns, images.flip(3), images)
    if "shift" in kinds or "rotate" in kinds:
        angle, shift = torch.zeros(n, device=device), torch.zeros(n, 2, device=device)
        if "rotate" in kinds:
            angle = torch.rand(n, device=device) * 2 * math.pi
        if "shift" in kinds:
            shift = torch.rand(n, 2, device=device) * 2 - 1
        images = move(images, angle[part], LARGEST_SHIFT * shift[part])
    if "noise" in kinds:
        background, electrons = (
            (10 ** (low + (high - low) * torch.rand(n, 1, 1, 1, device=device)))[part].to(images)
            for low, high in (BACKGROUND_RANGE, PEAK_ELECTRONS_RANGE)
        )
        normal = torch.randn(n, *images.shape[1:], device=device)[part].to(images)
        images = add_noise(images, background, electrons, normal)
    return images


def move(images, angle, shift):
    """Turn images by `angle` (B,) about their centres, then shift them by `shift` (B, 2).

    Angles are in radian from x (columns) to y (rows), shifts (x, y) in pixels. Resampled once,
    bicubically; outside the image the edge continues.
    """
    cos, sin = angle.cos(), angle.sin()
    dx, dy = (shift * 2 / images.shape[-1]).unbind(1)  # in units of half the image
    theta = torch.stack(
        [torch.stack([cos, sin, -cos * dx - sin * dy], dim=1),
         torch.stack([-sin, cos, sin * dx - cos * dy], dim=1)], dim=1,
    ).to(images)  # fmt: skip
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def add_noise(images, background, electrons, normal):
    """Images (B, C, H, W) with background and shot noise, both Gaussian.

    `background` (B, 1, 1, 1) is the background's rms over the image's peak, `electrons`
    (B, 1, 1, 1) the electrons in the brightest pixel, `normal` standard normal numbers a pixel.
    """
    smallest = torch.finfo(images.dtype).tiny  # a blank image gets no noise
    peak = images.amax(dim=(1, 2, 3), keepdim=True).clamp_min(smallest)
    shot_variance = (images / peak).clamp_min(0) / electrons
    sigma = peak * (background.square() + shot_variance).sqrt()
    return images + sigma * normal
