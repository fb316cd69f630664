"""The data models by name, and what the origin of a simulated data set tells of its images."""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from lib import lenses, many_lenses, raytracing
from lib.pairs import COARSE

MANY_LENSES, PAIRS = "Many_Lenses", "Pairs"


class DataModel(NamedTuple):
    class_names: tuple
    camera: raytracing.Camera
    always_noisy: bool


MODELS = {
    **{name: DataModel(lenses.CLASS_NAMES, instrument.camera, instrument.counts)
       for name, instrument in lenses.INSTRUMENTS.items()},
    MANY_LENSES: DataModel(many_lenses.CLASS_NAMES, many_lenses.CAMERA, True),
    PAIRS: DataModel((many_lenses.PAIRS,), many_lenses.CAMERA, True),
}  # fmt: skip


def simulate(model, per_class, seed, noise=False, progress=True):
    """Yield (class name, images (b, H, W) float32, axion mass (b,) or None) of a data model in batches."""
    if model in lenses.INSTRUMENTS:
        return lenses.simulate(model, per_class, seed, noise, progress)
    return many_lenses.simulate(per_class, seed, MODELS[model].class_names, progress)


def origin_of(model, per_class, seed, noise):
    """What a packed data set says of where its images came from; `point_masses_of` reads it."""
    kind = "noise" if noise or MODELS[model].always_noisy else "noise-free"
    return f"simulate.py {model}, {per_class} a class, seed {seed}, {kind}"


def pixels_of(origin):
    """{"pixel_scale": arcsec, "unit": text, "zero_point"} of images whose `origin` names a data model, else {}.

    An image of magnitude `zero_point` has pixels with the sum one; counts have none. Coarse images have pixels of
    twice the size, and of them `unit` is known only if it is that of the sharp ones.
    """
    coarse, origin = origin.startswith(COARSE), origin.removeprefix(COARSE)
    match = re.fullmatch(r"simulate\.py (\w+), .* noise(-free)?", origin)  # pictures of them have another unit
    if not match or match[1] not in MODELS:
        return {}
    pixel_scale = MODELS[match[1]].camera.pixel_scale * (2 if coarse else 1)
    if match[1] not in lenses.INSTRUMENTS:
        return {"pixel_scale": pixel_scale, "unit": "photon counts, each image scaled to its minimum and maximum"}
    if coarse:
        return {"pixel_scale": pixel_scale}
    instrument = lenses.INSTRUMENTS[match[1]]
    if instrument.counts:
        return {"pixel_scale": pixel_scale, "unit": "counts"}
    copies = instrument.copies if match[2] else 1  # noise-free
    unit = f"{f'{copies} × ' if copies > 1 else ''}counts per second, zero point {instrument.zero_point}"
    zero_point = instrument.zero_point + 2.5 * math.log10(copies)
    return {"pixel_scale": pixel_scale, "unit": unit, "zero_point": zero_point}


def parsed(origin):
    """(model, images of a class, seed) of an origin; None for a data set that was not simulated here."""
    match = re.fullmatch(r"simulate\.py (\w+), (\d+) a class, seed (\d+), noise(-free)?", origin)
    return (match[1], int(match[2]), int(match[3])) if match and match[1] in MODELS else None


def point_masses_of(origin, rows):
    """True point masses behind rows of a data set: a list of (P, 3), Einstein radius, x, y, arcsec.

    They are drawn once more from the seed that `origin` names. Returns (list, `raytracing.Camera`), or
    None for a data set that was not simulated here.
    """
    if not parsed(origin):
        return None
    model, per_class, seed = parsed(origin)

    @functools.cache
    def masses_of(label, start):
        """Point masses (n, P, 3) of the batch of a class from place `start` on."""
        class_name, count = MODELS[model].class_names[label], min(lenses.BATCH, per_class - start)
        if model in lenses.INSTRUMENTS:
            return lenses.sample(class_name, count, lenses.batch_rng(seed, label, start))[1]
        rng = lenses.batch_rng(seed, many_lenses.label_of(class_name), start)
        return many_lenses.sample(class_name, count, rng).point_masses

    labels_and_places = [divmod(int(row), per_class) for row in rows]
    masses = [
        masses_of(label, place - place % lenses.BATCH)[place % lenses.BATCH]
        for label, place in labels_and_places
    ]
    return masses, MODELS[model].camera


def truth_of(origin, rows):
    """Noise-free images (n, H, W) float32 behind rows of Many_Lenses or Pairs, on the scale of the files.

    They are rendered once more from the seed that `origin` names, whole batches of `lenses.BATCH` images.
    None for a data set of another kind.
    """
    if not parsed(origin) or parsed(origin)[0] in lenses.INSTRUMENTS:
        return None
    model, per_class, seed = parsed(origin)
    pixels = MODELS[model].camera.pixels
    truth = np.empty((len(rows), pixels, pixels), np.float32)
    labels, places = np.divmod(np.asarray(rows), per_class)
    for label in np.unique(labels):
        starts = np.unique(places[labels == label] // lenses.BATCH * lenses.BATCH)
        class_name = MODELS[model].class_names[label]
        for first, _, images in many_lenses.observed(class_name, per_class, seed, starts.tolist()):
            wanted = np.flatnonzero((labels == label) & (first <= places) & (places < first + len(images)))
            truth[wanted] = images[places[wanted] - first]
    return truth


def marks_of(dataset, rows):
    """True point masses in pixels, a list of (P, 3): x, y and Einstein radius; None if unknown."""
    known = point_masses_of(dataset.origin, rows)
    if known is None:
        return None
    masses, camera = known
    centre = (camera.pixels - 1) / 2
    in_pixels = [m / camera.pixel_scale for m in masses]
    return [np.column_stack([m[:, 1:] + centre, m[:, 0]]) for m in in_pixels]
