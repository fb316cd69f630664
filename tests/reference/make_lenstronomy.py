"""Render lenses with lenstronomy, to compare with and to test on; needs lenstronomy==1.14.2.

Without --per-class it writes the few images that the tests compare `simulate.render` with
(lenstronomy.npz); with it, a test set in the public folder layout that no training has seen.
lenstronomy computes everything but the random draw of the parameters: deflections, light profile,
magnitudes, point spread function and, through astropy, the distances.

    pip install lenstronomy==1.14.2 astropy
    python tests/reference/make_lenstronomy.py
    python tests/reference/make_lenstronomy.py --per-class 1000 --seed 78 --out lenstronomy-test
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from astropy import constants, units
from astropy.cosmology import FlatLambdaCDM
from lenstronomy.Data.imaging_data import ImageData
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from lenstronomy.SimulationAPI.sim_api import SimAPI

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import simulate

SOURCE = {"R_sersic": 0.25, "n_sersic": 1, "e1": -0.1, "e2": 0.1}


def main_einstein_radius():
    cosmology = FlatLambdaCDM(H0=70, Om0=0.3)
    d_lens, d_source = cosmology.luminosity_distance(0.5), cosmology.luminosity_distance(1.0)
    squared = 4 * constants.G * 1e12 * units.Msun / constants.c**2
    squared *= (d_source - d_lens) / (d_lens * d_source)
    return float(np.sqrt(squared.to(units.dimensionless_unscaled).value)) * 206264.80624709636


def camera(model):
    """Settings of lenstronomy's SimAPI, or None for Model_I (brightness by amplitude)."""
    return {
        "Model_I": None,
        "Model_II": {"pixel_scale": 0.101, "seeing": 0.16, "magnitude_zero_point": 25.72},
        "Model_III": {"pixel_scale": 0.08, "seeing": 0.08, "magnitude_zero_point": 25.96},
    }[model]


def render(source, point_masses, model):
    """One noise-free image (H, W); arguments of one image as in `simulate.render`."""
    point_masses = [row for row in np.asarray(point_masses).tolist() if row[0] > 0]
    lens_model = LensModel(["SIE", "SHEAR"] + ["POINT_MASS"] * len(point_masses))
    kwargs_lens = [
        {"theta_E": main_einstein_radius(), "e1": 0.1, "e2": 0.0, "center_x": 0, "center_y": 0},
        {"gamma1": 0.05, "gamma2": 0.0},
    ]
    kwargs_lens += [{"theta_E": t, "center_x": x, "center_y": y} for t, x, y in point_masses]
    place = {"center_x": float(source[0]), "center_y": float(source[1])}
    settings = camera(model)
    if settings is None:
        pixels, scale, fwhm, truncation = 150, 0.05, 0.087, 3
        kwargs_source = [{"amp": 20.0, **SOURCE, **place}]
    else:
        pixels, scale, fwhm, truncation = 64, settings["pixel_scale"], settings["seeing"], 5
        api = SimAPI(
            pixels,
            {**settings, "exposure_time": 1, "sky_brightness": 22, "read_noise": 0,
             "num_exposures": 1, "psf_type": "GAUSSIAN"},
            {"source_light_model_list": ["SERSIC_ELLIPSE"]},
        )  # fmt: skip
        magnitude = [{"magnitude": 20.0, **SOURCE, **place}]
        _, kwargs_source, _ = api.magnitude2amplitude(kwargs_source_mag=magnitude)
    corner = -(pixels - 1) / 2 * scale
    frame = ImageData(
        np.zeros((pixels, pixels)), ra_at_xy_0=corner, dec_at_xy_0=corner,
        transform_pix2angle=np.eye(2) * scale,
    )  # fmt: skip
    psf = PSF("GAUSSIAN", fwhm=fwhm, pixel_size=scale, truncation=truncation)
    image_model = ImageModel(frame, psf, lens_model, LightModel(["SERSIC_ELLIPSE"]))
    return image_model.image(kwargs_lens, kwargs_source)


def write_reference(path, seed):
    arrays = {}
    for model in simulate.INSTRUMENTS:
        for label, class_name in enumerate(simulate.CLASS_NAMES):
            rng = np.random.default_rng([seed, label])
            source, point_masses, _ = simulate.sample(class_name, 2, rng)
            images = [render(s, p, model) for s, p in zip(source, point_masses, strict=True)]
            name = f"{model}/{class_name}"
            arrays[f"{name}/source"], arrays[f"{name}/point_masses"] = source, point_masses
            arrays[f"{name}/images"] = np.stack(images).astype(np.float64)
    np.savez_compressed(path, **arrays)
    print(f"{len(arrays) // 3} sets of images in {path}")


def batches(per_class, seed, model):
    copies = simulate.INSTRUMENTS[model].copies
    for label, class_name in enumerate(simulate.CLASS_NAMES):
        rng = np.random.default_rng([seed, label])
        source, point_masses, axion_mass = simulate.sample(class_name, per_class, rng)
        for i in range(per_class):
            image = copies * render(source[i], point_masses[i], model)
            mass = None if axion_mass is None else axion_mass[i : i + 1]
            yield class_name, image[None], mass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, help="write a test set of so many a class")
    parser.add_argument("--model", choices=simulate.INSTRUMENTS, default="Model_II")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("lenstronomy.npz"))
    args = parser.parse_args()
    if args.per_class is None:
        write_reference(args.out, args.seed)
    else:
        simulate.write_folder(args.out, batches(args.per_class, args.seed, args.model))
        print(f"{len(simulate.CLASS_NAMES) * args.per_class} images in {args.out}")


if __name__ == "__main__":
    main()
