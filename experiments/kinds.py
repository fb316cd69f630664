"""Kinds of out-of-distribution images, and what a classifier says of them.

Clean and disturbed images of one seed show the same lenses, freshly simulated with the instrument of
Model_II; others show no lens, or come from elsewhere. A kind has random numbers of its own, so it does
not depend on the others.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from lib import fits, lenses, raytracing
from lib.errors import UserError
from lib.guard import Guard
from lib.images import find_files, is_fits, read_arrays
from lib.loader import batch_reader, in_batches

EUCLID = lenses.INSTRUMENTS["Model_II"]
SIDE = EUCLID.pixels
OVERSAMPLING = 3  # points a pixel's side that a galaxy's brightness is computed at
CONSTANTS = np.geomspace(1e-4, 10, 50)  # brightness of constant frames

# What the familiarity of lib/familiarity.py was developed on, beside clean images.
DEVELOPMENT = (
    "units ×255", "min-max", "noise 0.1 %", "PSF +20 %", "shifted 1 px", "turned 90°", "mirrored",
    "second source", "blank, zero", "blank, constant", "Gaussian blob",
)  # fmt: skip
# Drawn by lot among all kinds before any image was made, and looked at once, with the design fixed.
# Afterwards, fewer components and fewer training images were taken, to be faster.
HELD_BACK = (
    "units /100", "noise 0.01 %", "noise 1 %", "Euclid noise", "PSF −20 %", "shifted 5 px",
    "old ring radius", "source radius ×1.5", "uniform noise", "galaxy without a lens",
    "cutouts as they are", "cutouts, simulated peak", "cutouts, min-max",
)  # fmt: skip


def make(kind, per_class, seed):
    """Images (n, 64, 64) float32 of a kind, and their labels (n,); None if no class is right.

    Blank frames, which have no random numbers, are fewer than the usual n = 3 · per_class.
    """
    rng = np.random.default_rng([seed, *kind.encode()])
    clean = simulated(EUCLID, per_class, seed)
    labels = np.repeat(np.arange(len(lenses.CLASS_NAMES)), per_class)
    if kind in WITHOUT_ANSWER:
        images, labels = WITHOUT_ANSWER[kind](len(clean), usual_peak(per_class, seed), rng), None
    elif kind in OTHERWISE_SIMULATED:
        images = simulated(OTHERWISE_SIMULATED[kind], per_class, seed)
    elif kind == "second source":
        images = clean + second_source(per_class, seed, rng)
    else:
        images = DISTURBED[kind](clean, rng)
    return np.array(images, dtype=np.float32), labels


def every(per_class, seed, cutouts=None):
    """Yield (kind, images, labels or None): clean images, then what is unlike them.

    `cutouts` are images (n, 64, 64) from elsewhere, see `read_cutouts`.
    """
    for kind in ("clean", *DEVELOPMENT, *HELD_BACK):
        if kind in KINDS:
            yield kind, *make(kind, per_class, seed)
    if cutouts is not None:
        for kind, images in scaled(cutouts, usual_peak(per_class, seed)).items():
            yield kind, images, None


@functools.lru_cache(maxsize=2)
def simulated(instrument, per_class, seed):
    """Lenses (3 · per_class, 64, 64), sorted by class; not to be changed."""
    parts = lenses.simulate(instrument, per_class, seed, progress=False)
    images = np.concatenate([images for _, images, _ in parts])
    images.flags.writeable = False
    return images


def usual_peak(per_class, seed):
    """Brightest pixel of a clean image, the median over images."""
    return float(np.median(simulated(EUCLID, per_class, seed).max(axis=(1, 2))))


# The same lenses: disturbed, by functions of clean images (n, H, W) and random numbers, or otherwise
# simulated


def min_max(images):
    """Images (n, H, W) from 0 to 1, each by itself; constant ones become 0."""
    low, high = (extreme(images, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    return (images - low) / np.maximum(high - low, np.finfo(np.float32).tiny)


def with_noise(percent):
    """White noise whose rms is `percent` of an image's peak."""
    def disturb(images, rng):
        rms = percent / 100 * images.max(axis=(1, 2), keepdims=True)
        return images + rms * rng.standard_normal(images.shape, dtype=np.float32)

    return disturb


def as_observed(images, rng):
    """With the noise of one observation by Euclid, in the units of the noise-free images."""
    exposure = torch.from_numpy(images / EUCLID.copies)
    return EUCLID.copies * lenses.observe(exposure, EUCLID, True, rng).numpy()


DISTURBED = {
    "clean": lambda images, rng: images,
    "units ×255": lambda images, rng: 255 * images,
    "units /100": lambda images, rng: images / 100,
    "min-max": lambda images, rng: min_max(images),
    "noise 0.01 %": with_noise(0.01),
    "noise 0.1 %": with_noise(0.1),
    "noise 1 %": with_noise(1),
    "Euclid noise": as_observed,
    "shifted 1 px": lambda images, rng: np.roll(images, 1, axis=2),
    "shifted 5 px": lambda images, rng: np.roll(images, 5, axis=2),
    "turned 90°": lambda images, rng: np.rot90(images, axes=(1, 2)),
    "mirrored": lambda images, rng: images[:, :, ::-1],
}
OTHERWISE_SIMULATED = {
    "PSF −20 %": EUCLID._replace(psf_fwhm=0.8 * EUCLID.psf_fwhm),
    "PSF +20 %": EUCLID._replace(psf_fwhm=1.2 * EUCLID.psf_fwhm),
    "old ring radius": EUCLID._replace(rescaled=False),  # without `deflection_factor`
    "source radius ×1.5": EUCLID._replace(source_radius=1.5 * EUCLID.source_radius),
}


def second_source(per_class, seed, rng):
    """What a second source, 0.3 to 1 times as bright and elsewhere, adds to the clean images."""
    parts = []
    for class_name in lenses.CLASS_NAMES:
        for _, (source, point_masses, _) in lenses.draw(class_name, per_class, seed):
            other = rng.uniform(-lenses.SOURCE_RANGE, lenses.SOURCE_RANGE, source.shape)
            brightness = EUCLID.copies * rng.uniform(0.3, 1, (len(source), 1, 1))
            parts.append(brightness * lenses.render(other, point_masses, EUCLID, torch.float32).numpy())
    return np.concatenate(parts)


# Without a right answer: functions of the number of images, the usual peak and random numbers


def blobs(count, peak, rng):
    """Elliptical Gaussians of 1 to 12 pixels near the centre."""
    y, x = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2

    def draw(low, high):
        return rng.uniform(low, high, (count, 1, 1))

    width, ratio, angle = draw(1, 12), draw(0.5, 1), draw(0, np.pi)
    x, y = x - draw(-4, 4), y - draw(-4, 4)
    u, v = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
    return draw(0.3, 1.3) * peak * np.exp(-0.5 * (ratio * u**2 + v**2 / ratio) / width**2)


def galaxies(count, peak, rng):
    """Galaxies that nothing lenses: an exponential disk and a Sérsic bulge, as Euclid sees them."""
    axis = ((np.arange(OVERSAMPLING * SIDE) + 0.5) / OVERSAMPLING - SIDE / 2) * EUCLID.pixel_scale
    y, x = np.meshgrid(axis, axis, indexing="ij")
    blur = raytracing.psf_matrix(EUCLID.camera).numpy()
    images = np.empty((count, SIDE, SIDE))
    for image in images:
        x0, y0 = rng.uniform(-lenses.SOURCE_RANGE, lenses.SOURCE_RANGE, 2)
        angle = rng.uniform(0, np.pi)
        disk = sersic(x - x0, y - y0, rng.uniform(0.3, 1.5), 1, rng.uniform(0.3, 1), angle)
        bulge = sersic(x - x0, y - y0, rng.uniform(0.1, 0.4), rng.uniform(2, 4),
                       rng.uniform(0.7, 1), angle)  # fmt: skip
        both = disk / disk.sum() + rng.uniform(0.1, 1) * bulge / bulge.sum()
        image[:] = blur @ both.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING).mean(axis=(1, 3)) @ blur.T
    images /= images.max(axis=(1, 2), keepdims=True)
    return images * peak * rng.uniform(0.3, 1.3, (count, 1, 1))


def sersic(x, y, radius, index, ratio, angle):
    """Brightness of an elliptical Sérsic profile, 1 at the effective `radius`."""
    u, v = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
    distance = np.sqrt(ratio * u**2 + v**2 / ratio).clip(raytracing.SMALLEST_RADIUS)
    return np.exp(-raytracing.sersic_b(index) * ((distance / radius) ** (1 / index) - 1))


WITHOUT_ANSWER = {
    "blank, zero": lambda count, peak, rng: np.zeros((1, SIDE, SIDE)),
    "blank, constant": lambda count, peak, rng: np.tile(CONSTANTS[:, None, None], (SIDE, SIDE)),
    "uniform noise": lambda count, peak, rng: rng.uniform(0, peak, (count, SIDE, SIDE)),
    "Gaussian blob": blobs,
    "galaxy without a lens": galaxies,
}
KINDS = (*DISTURBED, *OTHERWISE_SIMULATED, "second source", *WITHOUT_ANSWER)


# Cutouts from elsewhere


def read_cutouts(folder):
    """Images (n, 64, 64) of a folder's files: the centre of each image, and all of it resampled.

    An image is every plane of a .npy or .npz file, and every two-dimensional image of a FITS file,
    such as its noise map, of at least 64 pixels a side. Pixels that are not finite become 0.
    UserError if there is none.
    """
    files, _, errors = find_files([folder])
    if errors:
        raise UserError(errors[0][1])
    images = []
    for plane in (plane for file in files for plane in planes_of(file)):
        if min(plane.shape) < SIDE:  # a point spread function
            continue
        plane = np.nan_to_num(np.asarray(plane, np.float32), posinf=0, neginf=0)
        images.append(centre_of(plane, SIDE))
        if plane.shape != (SIDE, SIDE):
            square = torch.from_numpy(centre_of(plane, min(plane.shape)).copy())
            images.append(F.interpolate(square[None, None], size=SIDE, mode="area")[0, 0].numpy())
    if not images:
        raise UserError(f"{folder}: no image of at least {SIDE}×{SIDE} pixels in it")
    return np.stack(images)


def planes_of(file):
    """The two-dimensional images in a file."""
    if is_fits(file):
        return fits.all_images(file)
    arrays = [found.array for found in read_arrays(file) if found.array is not None and found.array.ndim >= 2]
    return [plane for array in arrays for plane in array.reshape(-1, *array.shape[-2:])]


def centre_of(plane, side):
    top, left = ((size - side) // 2 for size in plane.shape)
    return plane[top : top + side, left : left + side]


def scaled(cutouts, peak):
    """{kind: images} of cutouts (n, 64, 64) as they are, with the usual `peak`, and from 0 to 1."""
    brightest = cutouts.max(axis=(1, 2), keepdims=True)
    factor = np.divide(peak, brightest, out=np.ones_like(brightest), where=brightest > 0)
    return {"cutouts as they are": cutouts, "cutouts, simulated peak": cutouts * factor,
            "cutouts, min-max": min_max(cutouts)}  # fmt: skip


# What a classifier says


def answers_to(kinds, model, familiarity, device):
    """Yield (kind, measures) of a classifier and its familiarity; `kinds` yields what `every` does.

    AUC tells clean images, which come first, from those of a kind by a score that is low for others:
    the familiarity, the largest probability, or minus the energy.
    """
    model, familiarity = (part.to(device) for part in (model, familiarity))
    clean, guard = None, Guard(len(familiarity.strangeness_seen))
    for kind, images, truth in kinds:
        predicted, scores = scores_of(images, model, familiarity, device)
        answered = guard.answers(predicted, scores["familiarity"])
        row = {"held_back": kind in HELD_BACK, "answered %": 100 * float(answered.mean())}
        if truth is not None:
            right = predicted == truth
            if answered.any():
                row["right of answered %"] = 100 * float(right[answered].mean())
            row["accuracy %"] = 100 * float(right.mean())
        for name, score in scores.items() if clean else ():
            is_clean = np.repeat([True, False], [len(clean[name]), len(score)])
            auc = roc_auc_score(is_clean, np.concatenate([clean[name], score]))
            row[f"AUC {name}"] = float(auc)
        clean = clean or scores
        yield f"{kind} (held back)" if row["held_back"] else kind, row


def scores_of(images, model, familiarity, device):
    """Predicted classes (n,) of raw images (n, H, W), and three scores (n,), low for out-of-distribution ones."""
    read = batch_reader(images, device)

    def both(rows):
        batch = read(rows)
        logits = model(batch)
        return torch.cat([logits, familiarity(batch, logits.argmax(dim=1)).unsqueeze(1)], dim=1)

    together = in_batches(both, np.arange(len(images))).numpy()
    logits = together[:, :-1].astype(np.float64)
    others = np.sort(softmax(logits, axis=1), axis=1)[:, :-1].sum(axis=1)
    return logits.argmax(axis=1), {
        "familiarity": together[:, -1],  # float32, as predict.py compares it
        "softmax": -others,  # minus the probability of the other classes, which does not round to 1
        "energy": logsumexp(logits * model.temperature.item(), axis=1),  # without the fitted temperature
    }
