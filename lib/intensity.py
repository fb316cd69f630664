"""Constants of the intensity transform, from training images."""

import math

import numpy as np
import torch

from lib.augment import augment
from lib.loader import batch_reader, fixed_random_numbers, in_batches, some_of
from lib.npy import forget_pages
from mae import IntensityTransform

TRANSFORM_IMAGES = 2000  # training images that the constants are computed from, at most
OUTLYING_PIXELS = 0.001  # of an image, at either end, that its statistics leave out
SOFTENING = 0.01  # of the mean intensity: where the logarithm becomes linear, unless noise does


def fit_transform(images, rows, kind, augmentations=()):
    """Constants of `mae.IntensityTransform` from training images (rows of `images`), as a dict.

    They scale with the unit of the data. The offset is the 0.1 % quantile of an image; the softening is
    a fixed fraction of the mean above it, or the noise if that is larger; mean and std are those of
    the transformed pixels. Each is computed image by image, without the image's 0.1 % faintest and
    brightest pixels, and the median over images is taken: hot pixels and a few bad images change
    nothing. `augmentations` are those of the training.
    """
    chosen = some_of(rows, TRANSFORM_IMAGES, images)
    # Scattered rows map many pages; read a few rows at a time.
    pixels = in_batches(batch_reader(images, torch.device("cpu")), chosen).double()
    forget_pages(images)
    with fixed_random_numbers():
        pixels = augment(pixels, augmentations).flatten(1).numpy()
    lowest, highest = np.quantile(pixels, [OUTLYING_PIXELS, 1 - OUTLYING_PIXELS], axis=1)
    clipped = pixels.clip(lowest[:, None], highest[:, None])
    smallest = np.finfo(np.float32).tiny
    offset = np.median(lowest)
    above = np.median((clipped - offset).clip(0).mean(axis=1))
    noise = noise_level(pixels.reshape(-1, *images.shape[1:]))
    softening = above if kind in ("sqrt", "linear") else max(SOFTENING * above, noise)
    softening = max(softening, smallest)
    z = IntensityTransform(kind, offset, softening).double()(torch.from_numpy(clipped)).numpy()
    mean = np.median(z.mean(axis=1))
    std = np.median(((z - mean) ** 2).mean(axis=1)) ** 0.5
    constants = {"offset": offset, "softening": softening, "mean": mean, "std": std or 1.0}
    return {"kind": kind, **{name: float(value) for name, value in constants.items()}}


def noise_level(images):
    """Standard deviation of the background noise of images (n, H, W); the median over images.

    It comes from second differences, which are small in smooth images, and from their 10 %
    quantile, which sources hardly change; the factor is that of Gaussian noise.
    """
    inner = images[:, 1:-1, 1:-1]
    vertical = images[:, :-2, 1:-1] + images[:, 2:, 1:-1]
    horizontal = images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    difference = np.abs(inner - (vertical + horizontal) / 4).reshape(len(images), -1)
    if difference.shape[1] == 0:
        return 0.0
    quantile = np.median(np.quantile(difference, 0.1, axis=1))
    return float(quantile / (0.12566 * math.sqrt(1.25)))
