"""Render lenses as the published generator does: lenstronomy 1.9.2 with DeepLenseSim's settings.

Nothing is taken from this project, so that a mistake of simulate.py cannot be repeated here:
parameters are drawn here, astropy computes Einstein radii from masses, and lenstronomy computes
everything else (SimAPI with redshifts, `z_source_convention` and its own cameras for Model_II and
Model_III, ImageModel without redshifts for Model_I). Source: mwt5345/DeepLenseSim, deeplense/lens.py
and, for the cosmology that it takes from pyHalo, dangilman/pyHalo.

Without --per-class it writes what the tests compare `simulate.py` with (lenstronomy.npz); with it,
a test set in the public folder layout. In an environment of its own, Python 3.11:

    pip install lenstronomy==1.9.2 numpy==1.26.4 scipy==1.11.4 astropy==5.3.4 \\
        setuptools==65.5.0 pyyaml configparser h5py
    python tests/reference/make_lenstronomy.py
    python tests/reference/make_lenstronomy.py --per-class 1000 --seed 78 --out lenstronomy-test
"""

import argparse
from pathlib import Path

import numpy as np
from astropy import constants, units
from astropy.cosmology import FlatLambdaCDM
from lenstronomy.Data.imaging_data import ImageData
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from lenstronomy.SimulationAPI.ObservationConfig.Euclid import Euclid
from lenstronomy.SimulationAPI.ObservationConfig.HST import HST
from lenstronomy.SimulationAPI.sim_api import SimAPI
from lenstronomy.Util import image_util, util

MODELS = ("Model_I", "Model_II", "Model_III")
CLASS_NAMES = ("axion", "cdm", "no_sub")
IMAGES = 3  # of each model and class that the tests compare
Z_LENS, Z_SOURCE = 0.5, 1.0
SOURCE = {"R_sersic": 0.25, "n_sersic": 1, "e1": -0.1, "e2": 0.1}
PYHALO_COSMOLOGY = FlatLambdaCDM(H0=69.7, Om0=0.2814, Ob0=0.0464)  # WMAP9, pyHalo's default
COUNTS_TIME, COUNTS_OF, COUNTS_DRAWS = 2000.0, (0.0, 0.01, 0.2), 400  # for the noise of Model_I


def einstein_radius(mass):
    """DeepLens.mass_to_radius, arcsec, of masses in M☉."""
    cosmology = FlatLambdaCDM(H0=70, Om0=0.3, Ob0=0.05)
    d_lens, d_source = (cosmology.luminosity_distance(z).to(units.m) for z in (Z_LENS, Z_SOURCE))
    distance = (d_source - d_lens) / (d_lens * d_source)
    squared = 4 * constants.G * (np.asarray(mass) * constants.M_sun) / constants.c**2 * distance
    return np.sqrt(squared).to(units.dimensionless_unscaled).value * 206265


def draw(class_name, rng):
    """Parameters of one image: source (2,), masses (P, 3) as M☉, x, y, axion mass in eV or None."""
    source = rng.uniform(-0.35, 0.35, 2)
    if class_name == "no_sub":
        return source, np.zeros((0, 3)), None
    if class_name == "cdm":
        slope = 0.1  # β + 1 of the mass function, β = -0.9
        low, high = 1e6**slope, 1e10**slope
        mass = (low + (high - low) * rng.uniform(0, 1, 25)) ** (1 / slope)
        radius, angle = rng.uniform(0.25, 2.0, 25), rng.uniform(0, 2 * np.pi, 25)
        return source, np.stack([mass, radius * np.sin(angle), radius * np.cos(angle)], 1), None
    axion_mass = 10 ** rng.uniform(-24, -22)
    length = 0.06 / (2 * axion_mass) * 1e-22
    along, angle = np.linspace(-length, length, 100), rng.uniform(0, 2 * np.pi)
    mass = np.full(100, 3e10 / 100)
    return source, np.stack([mass, along * np.cos(angle), along * np.sin(angle)], 1), axion_mass


def lens_of(masses):
    """Names and arguments of lenstronomy's lens models: the galaxy, the shear, point masses."""
    galaxy = {"theta_E": float(einstein_radius(1e12)), "e1": 0.1, "e2": 0, "center_x": 0,
              "center_y": 0}  # fmt: skip
    arguments = [galaxy, {"gamma1": 0.05, "gamma2": 0}]
    for radius, (_, x, y) in zip(einstein_radius(masses[:, 0]), masses, strict=True):
        arguments.append({"theta_E": radius, "center_x": x, "center_y": y})
    return ["SIE", "SHEAR"] + ["POINT_MASS"] * len(masses), arguments


def api_of(model, lens_models):
    """SimAPI of Model_II or Model_III as DeepLens.simple_sim_2 sets it up."""
    camera = {
        "Model_II": lambda: Euclid(band="VIS", psf_type="GAUSSIAN", coadd_years=6),
        "Model_III": lambda: HST(band="WFC3_F160W", psf_type="GAUSSIAN"),
    }[model]()
    settings = {
        "lens_model_list": lens_models,
        "lens_redshift_list": [Z_LENS] * len(lens_models),
        "source_light_model_list": ["SERSIC_ELLIPSE"],
        "source_redshift_list": [Z_SOURCE],
        "cosmo": PYHALO_COSMOLOGY,
        "z_source_convention": 2.5,
        "z_source": Z_SOURCE,
    }
    return SimAPI(numpix=64, kwargs_single_band=camera.kwargs_single_band(), kwargs_model=settings)


def render(source, masses, model):
    """One noise-free image (H, W), counts per second and pixel."""
    lens_models, kwargs_lens = lens_of(masses)
    place = {**SOURCE, "center_x": source[0], "center_y": source[1]}
    if model != "Model_I":
        api = api_of(model, lens_models)
        image_model = api.image_model_class({"point_source_supersampling_factor": 1})
        _, kwargs_source, _ = api.magnitude2amplitude(None, [{"magnitude": 20, **place}])
        return image_model.image(kwargs_lens, kwargs_source, None)
    pixels, scale = 150, 0.05
    _, _, ra, dec, _, _, matrix, _ = util.make_grid_with_coordtransform(
        numPix=pixels, deltapix=scale, center_ra=0, center_dec=0, subgrid_res=1, inverse=False
    )
    frame = ImageData(
        np.zeros((pixels, pixels)), ra_at_xy_0=ra, dec_at_xy_0=dec, transform_pix2angle=matrix
    )
    psf = PSF(psf_type="GAUSSIAN", fwhm=0.087, pixel_size=scale, truncation=3)
    image_model = ImageModel(
        frame, psf, lens_model_class=LensModel(lens_models),
        source_model_class=LightModel(["SERSIC_ELLIPSE"]),
        kwargs_numerics={"supersampling_factor": 1, "supersampling_convolution": False},
    )  # fmt: skip
    return image_model.image(kwargs_lens, [{"amp": 20, **place}])


def counts(image, time):
    """Model_I's counts of a noise-free image, as DeepLens.simple_sim draws them."""
    photons = image_util.add_poisson(image, exp_time=time)
    background = image_util.add_background(image, sigma_bkd=1e-2)
    return np.random.poisson((time * (image + photons + background)).clip(min=0))


def write_reference(path, seed):
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # lenstronomy's noise draws from there
    arrays = {"einstein_radius_of_1e12": einstein_radius(1e12)}
    for model in MODELS:
        for class_name in CLASS_NAMES:
            drawn = [draw(class_name, rng) for _ in range(IMAGES)]
            name = f"{model}/{class_name}"
            arrays[f"{name}/source"] = np.stack([source for source, _, _ in drawn])
            arrays[f"{name}/masses"] = np.stack([masses for _, masses, _ in drawn])
            images = np.stack([render(s, m, model) for s, m, _ in drawn])
            arrays[f"{name}/images"] = images.astype(np.float32)
        if model != "Model_I":
            api = api_of(model, ["SIE"])
            arrays[f"{model}/background_rms"] = api.background_noise
            arrays[f"{model}/photon_rms_of_5"] = api.flux_noise(5.0)
    flat = np.repeat(COUNTS_OF, COUNTS_DRAWS)[:, None].repeat(COUNTS_DRAWS, 1)
    drawn = counts(flat, COUNTS_TIME).reshape(len(COUNTS_OF), -1)
    arrays |= {
        "Model_I/time": COUNTS_TIME,
        "Model_I/flux": COUNTS_OF,
        "Model_I/count_mean": drawn.mean(1),
        "Model_I/count_variance": drawn.var(1),
        "Model_I/count_zeros": (drawn == 0).mean(1),
    }
    np.savez_compressed(path, **arrays)
    print(f"{len(MODELS) * len(CLASS_NAMES) * IMAGES} images and the noise of 3 models in {path}")


def write_test_set(out, model, per_class, seed):
    """The public folder layout, as DeepLenseSim's scripts save it; --out must not exist."""
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    np.random.seed(seed)
    for class_name in CLASS_NAMES:
        (out / class_name).mkdir()
        for i in range(per_class):
            source, masses, axion_mass = draw(class_name, rng)
            image = render(source, masses, model)
            if model == "Model_I":
                image = counts(image, 10 ** rng.uniform(3, 3.5))
            else:
                image = image + image
            if axion_mass is not None:
                content = np.empty(2, dtype=object)
                content[:] = image, axion_mass
                image = content
            np.save(out / class_name / f"{class_name}_sim_{i}.npy", image, allow_pickle=True)
    print(f"{len(CLASS_NAMES) * per_class} images in {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, help="write a test set of so many a class")
    parser.add_argument("--model", choices=MODELS, default="Model_II")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("lenstronomy.npz"))
    args = parser.parse_args()
    if args.per_class is None:
        write_reference(args.out, args.seed)
    else:
        write_test_set(args.out, args.model, args.per_class, args.seed)


if __name__ == "__main__":
    main()
