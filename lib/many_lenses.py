"""Another lens in every image: DeepLense's Common Test, and the pairs of Specific Test VI.B.

A singular isothermal sphere of 10¹² M☉ and an external shear bend the light of an elliptical Sérsic
source. Redshifts, shear, place and shape of the source differ from image to image, so a smooth lens has
seven free parameters. The classes differ in their additional deflectors:

    no      nothing
    sphere  25 point masses between 10⁶ and 10¹⁰ M☉
    vort    a vortex: a mass spread evenly along a straight line

No code of the published files is known. Their constants were measured in real images: what they are not
certain about is marked "guess". Images are photon counts, each scaled to its own minimum and maximum.
"""

import numpy as np
import torch
from tqdm import tqdm

from lib import lenses, raytracing
from lib.pairs import reduced

CLASS_NAMES = ("no", "sphere", "vort")  # sorted, as folders are
PAIRS = "HR"  # the class of the images of pairs: those of `no`, with random numbers of their own
CAMERA = raytracing.Camera(pixels=150, pixel_scale=0.05, psf_sigma=0.087, psf_radius=5)
EXPOSURE, SKY = 100.0, 0.1  # s, counts per second and pixel

Z_LENS_RANGE, Z_SOURCE_RANGE = (0.4, 0.6), (0.8, 1.2)  # guess: their Einstein radii are the measured ones
SHEAR_RANGE, AXIS_RATIO_RANGE = (0.0, 0.3), (0.4, 1.0)
OFFSET_RANGE = (0.0, 0.5)  # arcsec, from the lens to the source
SOURCE_RADIUS, SERSIC_INDEX = 0.5, 1.5  # arcsec
SPHERE_MASSES, SPHERE_RADIUS_RANGE = 25, (0.0, 2.0)  # guess: always 25, and down to radius 0
VORTEX_CENTRE, VORTEX_LENGTH_RANGE = 0.5, (1.0, 4.0)  # arcsec: σ of x and of y, and the whole length
VORTEX_MASS_RANGE = (0.03, 0.055)  # of the lens
PIECE = 200  # images that are in memory together


def sample(class_name, count, rng):
    """Draw the `raytracing.Scene` of `count` images of a class."""
    z_lens, z_source = rng.uniform(*Z_LENS_RANGE, count), rng.uniform(*Z_SOURCE_RANGE, count)
    theta_e = raytracing.einstein_radius(lenses.LENS_MASS, z_lens, z_source)
    shear, ratio = rng.uniform(*SHEAR_RANGE, count), rng.uniform(*AXIS_RATIO_RANGE, count)
    # Quirk: both angles were drawn in radian and used in degrees, so that all are nearly horizontal.
    # They are negative since the generator's y axis points up, and rows are counted downwards.
    shear_angle, source_angle = np.deg2rad(rng.uniform(-2 * np.pi, 0, (2, count)))
    offset, direction = rng.uniform(*OFFSET_RANGE, count), rng.uniform(0, 2 * np.pi, count)
    return scene_of(
        theta_e, shear * np.cos(2 * shear_angle), shear * np.sin(2 * shear_angle),
        offset * np.cos(direction), offset * np.sin(direction), ratio, source_angle,
        point_masses(class_name, theta_e, rng),
    )  # fmt: skip


def scene_of(theta_e, gamma1, gamma2, x, y, ratio, angle, masses=None):
    """The `Scene` of lenses like these, of the seven parameters (B,) in which smooth ones differ.

    theta_e, x, y in arcsec; axis `ratio` and `angle` (radian) of the source; `masses` (B, P, 3).
    """
    c = (1 - ratio) / (1 + ratio)
    masses = np.zeros((len(x), 0, 3)) if masses is None else masses
    return raytracing.Scene(
        x, y, masses, theta_e, 0.0, 0.0, gamma1, gamma2, SOURCE_RADIUS, SERSIC_INDEX,
        c * np.cos(2 * angle), c * np.sin(2 * angle), amplitude=1.0,
    )  # fmt: skip


def point_masses(class_name, theta_e, rng):
    """Einstein radius, x and y (count, P, 3) of what a class adds to lenses of Einstein radius (count,)."""
    count = len(theta_e)
    if class_name in ("no", PAIRS):
        return np.zeros((count, 0, 3))
    if class_name == "sphere":
        shape = (count, SPHERE_MASSES)
        low, high = (mass**0.1 for mass in lenses.CDM_MASS_RANGE)  # p(m) ∝ m^-0.9
        mass = rng.uniform(low, high, shape) ** 10 / lenses.LENS_MASS
        radius, angle = rng.uniform(*SPHERE_RADIUS_RANGE, shape), rng.uniform(0, 2 * np.pi, shape)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
    elif class_name == "vort":
        mass = rng.uniform(*VORTEX_MASS_RANGE, (count, 1)) / lenses.VORTEX_POINTS
        length, angle = rng.uniform(*VORTEX_LENGTH_RANGE, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
        along = length / 2 * np.linspace(-1, 1, lenses.VORTEX_POINTS)
        centre = rng.normal(0, VORTEX_CENTRE, (2, count, 1))
        x, y = centre[0] + along * np.cos(angle), centre[1] + along * np.sin(angle)
    else:
        raise ValueError(f"class must be one of {CLASS_NAMES}, got {class_name!r}")
    radius = theta_e[:, None] * np.sqrt(mass)
    return np.stack([np.broadcast_to(radius, x.shape), x, y], axis=-1)


def observe(images, rng):
    """What the files hold of noise-free `images` (B, H, W), and what they would hold without noise.

    k ~ Poisson(EXPOSURE · (image + SKY)), and the file is (k - min k)/(max k - min k). The second answer
    is the mean of k on the same scale. Both answers are (B, H, W) float32.
    """
    expected = EXPOSURE * (np.asarray(images, np.float64) + SKY)
    counts = rng.poisson(expected)
    low, high = (extreme(counts, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    return tuple(((k - low) / np.maximum(high - low, 1)).astype(np.float32) for k in (counts, expected))


def label_of(class_name):
    """What a class adds to the seed of its random numbers."""
    return (*CLASS_NAMES, PAIRS).index(class_name)


def observed(class_name, count, seed, starts=None):
    """Yield (place of the first, images, the same without noise), PIECE images (b, H, W) at a time.

    The same arguments give the same images. `starts` are the batches that are wanted, by default all.
    """
    for start in range(0, count, lenses.BATCH) if starts is None else starts:
        rng = lenses.batch_rng(seed, label_of(class_name), start)
        size = min(lenses.BATCH, count - start)
        scene = sample(class_name, size, rng)
        for first in range(0, size, PIECE):
            piece = raytracing.part_of(scene, slice(first, first + PIECE))
            yield start + first, *observe(raytracing.render(piece, CAMERA, torch.float32).numpy(), rng)


def simulate(per_class, seed, class_names=CLASS_NAMES, progress=True):
    """Yield (class name, images (b, H, W) float32, None), as `lenses.simulate` does."""
    with tqdm(total=len(class_names) * per_class, unit="img", disable=None if progress else True) as bar:
        for class_name in class_names:
            bar.set_description(f"simulate {class_name}")
            for _, images, _ in observed(class_name, per_class, seed):
                yield class_name, images, None
                bar.update(len(images))


def simulate_pairs(count, seed):
    """Yield (HR (b, 150, 150), LR (b, 75, 75), truth (b, 150, 150)), float32, PIECE pairs at a time.

    HR has photon noise, LR is its bicubic reduction, and truth is the noise-free image on the scale of HR.
    """
    for _, sharp, truth in observed(PAIRS, count, seed):
        yield sharp, reduced(torch.from_numpy(sharp)).numpy(), truth
