"""The physics of the simulator: the three classes of the DeepLense benchmark.

A galaxy (singular isothermal ellipsoid, 10¹² M☉, z = 0.5) and an external shear bend the light of
an elliptical Sérsic source (z = 1). The classes differ in their additional deflectors:

    no_sub  nothing
    cdm     25 point masses between 10⁶ and 10¹⁰ M☉ around the ring
    axion   a vortex: 3·10¹⁰ M☉ spread evenly along a short line through the centre

The lens is fixed, so a `no_sub` image has two free parameters: the source's position. Angles are
in arcsec; x runs along columns and y along rows, both zero at the image's centre.

The published images come from mwt5345/DeepLenseSim with lenstronomy 1.9.2. Their behaviour
is reproduced, oddities included, and marked "quirk" with its source.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lib import raytracing

CLASS_NAMES = ("axion", "cdm", "no_sub")  # sorted, as folders are

Z_LENS, Z_SOURCE = 0.5, 1.0

# Quirk of Model_II and Model_III: DeepLenseSim hands SimAPI deflections that are meant for a source
# at z = 1, and says that they are meant for one at 2.5 (z_source_convention). lenstronomy rescales
# them to z = 1 in the cosmology that pyHalo hands over (WMAP9), and so makes them a third smaller.
Z_SOURCE_CONVENTION, OMEGA_MATTER_OF_PYHALO = 2.5, 0.2814

LENS_MASS = 1e12  # M☉
LENS_ELLIPTICITY = (0.1, 0.0)
SHEAR = (0.05, 0.0)
SOURCE_RADIUS, SERSIC_INDEX, SOURCE_ELLIPTICITY = 0.25, 1.0, (-0.1, 0.1)
SOURCE_RANGE = 0.35  # arcsec, half the side of the square that source centres fill
PSF_TRUNCATION = 4  # σ; quirk: lenstronomy 1.9.2 cuts here whatever truncation it is given

CDM_SUBHALOS, CDM_MASS_RANGE, CDM_RADIUS_RANGE = 25, (1e6, 1e10), (0.25, 2.0)
VORTEX_MASS, VORTEX_POINTS = 3e10, 100
AXION_LOG_MASS_RANGE = (-24.0, -22.0)  # log10 of eV
VORTEX_LENGTH, VORTEX_REFERENCE_MASS = 0.06, 1e-22  # arcsec (de Broglie wavelength) at eV

BATCH = 1000  # images per random stream


class Instrument(NamedTuple):
    """What a data model sees with; the source has an `amplitude` (per arcsec²) or a `magnitude`."""

    pixels: int
    pixel_scale: float  # arcsec
    psf_fwhm: float  # arcsec
    amplitude: float | None = None
    magnitude: float | None = None
    zero_point: float | None = None  # magnitude of one electron per second
    exposures: int = 1
    exposure_time: float | None = None  # s; None: 10^U(3, 3.5), and images are counts
    sky_magnitude: float | None = None  # per arcsec²
    read_noise: float = 0.0  # e-
    background_rms: float = 0.0  # per second, in images of counts
    rescaled: bool = True  # whether deflections are multiplied by `deflection_factor()`
    copies: int = 1  # how often the published images add the noise-free model to itself
    source_radius: float = SOURCE_RADIUS  # arcsec

    @property
    def counts(self):
        """Whether images are whole numbers of photons, with noise always."""
        return self.exposure_time is None

    @property
    def camera(self):
        sigma = self.psf_fwhm / (2 * math.sqrt(2 * math.log(2)))
        radius = int(PSF_TRUNCATION * (sigma / self.pixel_scale) + 0.5)
        return raytracing.Camera(self.pixels, self.pixel_scale, sigma, radius)


INSTRUMENTS = {
    # Brightness, noise and ray-tracing are DeepLenseSim's own (`simple_sim`).
    "Model_I": Instrument(
        150, 0.05, 0.087, amplitude=20.0, background_rms=1e-2, rescaled=False
    ),
    # Euclid VIS as lenstronomy 1.9.2 has it. Quirk: its zero point, 24.0, is 1.7 magnitudes
    # brighter than that of later versions, so images are 4.9 times fainter than theirs.
    "Model_II": Instrument(
        64, 0.101, 0.16, magnitude=20.0, zero_point=24.0,
        exposures=4, exposure_time=565.0, sky_magnitude=22.35, read_noise=4.2, copies=2,
    ),
    # HST WFC3 F160W as lenstronomy 1.9.2 has it.
    "Model_III": Instrument(
        64, 0.08, 0.08, magnitude=20.0, zero_point=25.96,
        exposures=1, exposure_time=5400.0, sky_magnitude=22.3, read_noise=4.0, copies=2,
    ),
}  # fmt: skip


def instrument_of(model):
    """The `Instrument` of a data model's name, or the one that is given; else ValueError."""
    if isinstance(model, Instrument):
        return model
    if model not in INSTRUMENTS:
        raise ValueError(f"model must be one of {tuple(INSTRUMENTS)}, got {model!r}")
    return INSTRUMENTS[model]


def einstein_radius(mass):
    """Nominal Einstein radius in arcsec of a point mass in M☉ (a number or an array)."""
    return raytracing.einstein_radius(mass, Z_LENS, Z_SOURCE)


def deflection_factor():
    """What Model_II and Model_III multiply every deflection by, 0.6343; see Z_SOURCE_CONVENTION.

    The ratio of D_ls/D_s for a source at Z_SOURCE and at Z_SOURCE_CONVENTION, angular-diameter
    distances; the Hubble constant cancels.
    """

    def efficiency(z):  # D_ls/D_s, which in a flat universe is a ratio of comoving distances
        lens, source = (raytracing.comoving_distance(d, OMEGA_MATTER_OF_PYHALO) for d in (Z_LENS, z))
        return (source - lens) / source

    return efficiency(Z_SOURCE) / efficiency(Z_SOURCE_CONVENTION)


def amplitude_of(instrument):
    """Counts/s/pixel at the source's effective radius."""
    n = SERSIC_INDEX
    b_n = raytracing.sersic_b(n)
    amplitude = instrument.amplitude
    if amplitude is None:
        flux = 10 ** (-0.4 * (instrument.magnitude - instrument.zero_point))
        profile = 2 * math.pi * n * math.exp(b_n) * b_n ** (-2 * n) * math.gamma(2 * n)
        amplitude = flux / (instrument.source_radius**2 * profile)
    return amplitude * instrument.pixel_scale**2


def render(source, point_masses, model="Model_II", dtype=torch.float64):
    """Noise-free images of one exposure: the one lens, shear and source shape of the benchmark.

    Parameters
    ----------
    source : (B, 2) centres of the source, arcsec.
    point_masses : (B, P, 3) nominal Einstein radius (see `einstein_radius`), x, y in arcsec. P may
        be 0, and rows of zero Einstein radius change nothing. What the data model does to all
        deflections happens in here.
    model : key of INSTRUMENTS, or an `Instrument`.
    dtype : precision of the computation and of the result, which is where `source` is.

    Returns (B, H, W), counts per second and pixel.
    Raises ValueError for an unknown model or arguments of another shape.
    """
    instrument = instrument_of(model)
    source, point_masses = torch.as_tensor(source), torch.as_tensor(point_masses)
    b = source.shape[0]
    if source.shape != (b, 2) or point_masses.dim() != 3 or point_masses.shape[::2] != (b, 3):
        raise ValueError(
            "expected source (B, 2) and point_masses (B, P, 3), "
            f"got {tuple(source.shape)} and {tuple(point_masses.shape)}"
        )
    scene = raytracing.Scene(
        *source.T, point_masses, float(einstein_radius(LENS_MASS)), *LENS_ELLIPTICITY, *SHEAR,
        instrument.source_radius, SERSIC_INDEX, *SOURCE_ELLIPTICITY, amplitude_of(instrument),
        deflection_factor() if instrument.rescaled else 1.0,
    )  # fmt: skip
    return raytracing.render(scene, instrument.camera, dtype)


def sample(class_name, count, rng):
    """Draw the parameters of `count` images of a class.

    Returns (source (count, 2), point_masses (count, P, 3), axion_mass (count,) in eV or None).
    """
    source = rng.uniform(-SOURCE_RANGE, SOURCE_RANGE, (count, 2))
    if class_name == "no_sub":
        return source, np.zeros((count, 0, 3)), None
    if class_name == "cdm":
        shape = (count, CDM_SUBHALOS)
        low, high = (mass**0.1 for mass in CDM_MASS_RANGE)
        mass = rng.uniform(low, high, shape) ** 10
        radius, angle = rng.uniform(*CDM_RADIUS_RANGE, shape), rng.uniform(0, 2 * np.pi, shape)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        return source, np.stack([einstein_radius(mass), x, y], axis=-1), None
    if class_name == "axion":
        axion_mass = 10 ** rng.uniform(*AXION_LOG_MASS_RANGE, count)
        half_length = VORTEX_LENGTH * VORTEX_REFERENCE_MASS / (2 * axion_mass)
        angle = rng.uniform(0, 2 * np.pi, count)
        along = half_length[:, None] * np.linspace(-1, 1, VORTEX_POINTS)  # (count, P)
        x, y = along * np.cos(angle)[:, None], along * np.sin(angle)[:, None]
        radius = np.full_like(x, einstein_radius(VORTEX_MASS / VORTEX_POINTS))
        return source, np.stack([radius, x, y], axis=-1), axion_mass
    raise ValueError(f"class must be one of {CLASS_NAMES}, got {class_name!r}")


def observe(images, model, noise, rng):
    """What the files hold, of noise-free `images` (B, H, W) float32, which are changed in place.

    Model_I: integer counts with DeepLenseSim's noise, whatever `noise` says. Model_II and
    Model_III: the noise-free model twice or, with `noise`, one observation in electrons per second
    with the Gaussian noise of lenstronomy's SimAPI.
    """
    instrument = instrument_of(model)
    if instrument.counts:
        return count_photons(images, instrument, rng)
    if not noise:
        # Quirk: DeepLenseSim's simple_sim_2 adds the model where it meant to add the noise.
        return images.mul_(instrument.copies)
    pixels = images.numpy()
    background, shot_variance = noise_of(instrument, pixels)
    sigma = np.sqrt(background**2 + shot_variance).astype(np.float32)
    pixels += sigma * rng.standard_normal(pixels.shape, dtype=np.float32)
    return images


def noise_of(instrument, flux):
    """Noise of SimAPI: rms of the background, and variance of the photon noise of `flux`.

    Electrons per second and pixel. The camera's gain plays no part, as lenstronomy counts electrons
    unless it is told otherwise (`data_count_unit`).
    """
    total_time = instrument.exposures * instrument.exposure_time  # s
    sky = 10 ** (-0.4 * (instrument.sky_magnitude - instrument.zero_point))
    electrons = total_time * sky * instrument.pixel_scale**2
    electrons += instrument.exposures * instrument.read_noise**2
    return math.sqrt(electrons) / total_time, np.maximum(flux, 0) / total_time


def count_photons(images, instrument, rng):
    """Counts of Model_I, whole numbers: Poisson(max(0, T·(m + s·√(|m|/T) + rms·s′))), in place.

    m is the image, s and s′ are standard normal a pixel and T = 10^U(3, 3.5) s an image. Quirks of
    DeepLenseSim's `simple_sim`: photon noise enters twice, first as a normal number and then in the
    Poisson draw, and as negative values are cut, half of the dark pixels are exactly 0.
    """
    time = 10 ** rng.uniform(3, 3.5, (len(images), 1, 1))
    pixels = images.numpy()
    expected = pixels + np.sqrt(np.abs(pixels) / time) * rng.standard_normal(pixels.shape)
    expected += instrument.background_rms * rng.standard_normal(pixels.shape)
    pixels[:] = rng.poisson((time * expected).clip(min=0))
    return images


def batch_rng(seed, label, start):
    """The random numbers of the images of a class from place `start` on."""
    return np.random.default_rng([seed, label, start])


def draw(class_name, per_class, seed):
    """Yield (rng, parameters as `sample` gives them) of a class, BATCH images at a time.

    The same arguments give the same images; class and batch have random streams of their own, and
    the noise comes from the same stream after the parameters.
    """
    label = CLASS_NAMES.index(class_name)
    for start in range(0, per_class, BATCH):
        rng = batch_rng(seed, label, start)
        yield rng, sample(class_name, min(BATCH, per_class - start), rng)


def simulate(model, per_class, seed, noise=False, progress=True):
    """Yield (class name, images (b, H, W) float32, axion mass (b,) or None) in batches."""
    with tqdm(
        total=len(CLASS_NAMES) * per_class, unit="img", disable=None if progress else True
    ) as bar:
        for class_name in CLASS_NAMES:
            bar.set_description(f"simulate {class_name}")
            for rng, (source, point_masses, axion_mass) in draw(class_name, per_class, seed):
                images = render(source, point_masses, model, torch.float32)
                yield class_name, observe(images, model, noise, rng).numpy(), axion_mass
                bar.update(len(images))
