"""Traits of images and maps that have nothing to do with lensing, and what they tell; numpy alone."""

import json
import math

import numpy as np

LEAST_RMS = 1e-6  # of float32
OUTLYING = 30  # see `pixel_range`
EXTREMES = (0.01, 0.5, 0.99)  # quantiles of the training images that are kept

# The columns of `traits_of`, and what a difference may mean.
TRAITS = (
    ("brightest pixel", "another unit?"),
    ("darkest pixel", "another zero level?"),
    ("typical step between neighbours in the corners", "other noise?"),
    ("share of pixels that are zero", "rounded or masked images?"),
    ("share of pixels as bright as the brightest", "saturated images?"),
    ("row of the centre of light", "turned or shifted images?"),
    ("column of the centre of light", "turned or shifted images?"),
)


def traits_of(images):
    """The TRAITS (n, 7) of images (n, H, H)."""
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


def far_outside(extremes):
    """Rows of `extremes` (n, 2), minimum and maximum of each image, beyond `pixel_range`."""
    low, high, _ = pixel_range(extremes)
    return np.flatnonzero((extremes[:, 0] < low) | (extremes[:, 1] > high))


def pixel_range(extremes):
    """[low, high, faintest] of images that are not far outside those with these `extremes` (n, 2).

    Pixels lie between low and high. The distance allowed beyond the median image is its range of
    pixels and OUTLYING times the spread between the quartiles. The brightest pixel of an image is
    at least `faintest`, a tenth of that of the faintest image above the zero level of the darkest images.
    """
    low, high = np.median(extremes, axis=0)
    lower, upper = np.quantile(extremes, [0.25, 0.75], axis=0)
    allowed = high - low + OUTLYING * (upper - lower)
    zero = np.quantile(extremes[:, 0], 0.01)  # of some classes it may be above all pixels of others
    faintest = zero + (extremes[:, 1].min() - zero) / 10
    return [float(low - allowed[0]), float(high + allowed[1]), float(faintest)]


def typical_rms(maps):
    """The median rms of residual maps (n, H, W): their unit where no file says what smooth lenses leave."""
    return max(float(np.median(np.sqrt(np.square(maps).mean(axis=(1, 2))))), LEAST_RMS)


def reference_of(images):
    """{trait: its EXTREMES} of training images (n, H, W)."""
    values = np.quantile(traits_of(images), EXTREMES, axis=0).T.tolist()
    return dict(zip((name for name, _ in TRAITS), values, strict=True))


def reference_in(metadata):
    """The `reference_of` in the metadata of an exported file, (7, 3); None if none there can be used."""
    try:
        stored = json.loads(metadata["figures"])
        reference = np.array([stored[name] for name, _ in TRAITS], dtype=np.float64)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    sound = reference.shape == (len(TRAITS), len(EXTREMES)) and np.isfinite(reference).all()
    return reference if sound else None


def advice(traits, reference, unit_known=False, by_chance=False):
    """What is measurably unlike the training images in most of some images, [text]; see `traits_of`.

    Without `unit_known`, it says which --scale would make them as bright. `by_chance`: so few images may be the
    strangest of ordinary ones, which often are off-centre.
    """
    peak, darkest, step, zeros, saturated, row, column = np.median(traits, axis=0)
    low, usual, high = reference.T
    light = max(usual[0] - usual[1], np.finfo(float).tiny)  # of a training image
    unlike = []
    factor = (peak - darkest) / light
    if factor <= 0:
        return ["all pixels are equal"]
    if not 0.8 * (low[0] - usual[1]) <= peak - darkest <= 1.25 * (high[0] - usual[1]):
        remedy = "" if unit_known else f" (--scale {1 / factor:.3g}, if that is the unit)"
        unlike.append(f"the brightest pixel is {factor:.3g} times that of the training images{remedy}")
    if abs(darkest / factor - usual[1]) > 0.01 * light:
        unlike.append(f"the darkest pixel is {darkest:.3g}, {usual[1]:.3g} in the training images: another "
                      "zero level, or noise")  # fmt: skip
    if step / factor > max(2 * high[2], 1e-4 * light):
        unlike.append(f"the corners are noisy: neighbours differ by {step / factor / light:.1%} of the peak, "
                      f"{usual[2] / light:.1%} in the training images")  # fmt: skip
    if zeros > high[3] + 0.01:
        unlike.append(f"{zeros:.0%} of the pixels are exactly zero: rounded or masked?")
    if saturated > high[4] + 0.002:
        unlike.append(f"{saturated:.1%} of the pixels are as bright as the brightest: saturated?")
    shift = column - usual[6], row - usual[5]
    # The median of n images scatters less than one image: sqrt(pi / 2 n) of it, for normal centres.
    share = 1 if by_chance else min(1, math.sqrt(math.pi / 2 / len(traits)))
    low, high = usual + share * (low - usual), usual + share * (high - usual)
    if not (low[5] <= row <= high[5] and low[6] <= column <= high[6]):
        unlike.append(f"the light is off-centre by ({shift[0]:+.1f}, {shift[1]:+.1f}) pixels")
    return unlike
