"""Many_Lenses and Pairs against real images, which are not ours to redistribute.

REAL_IMAGES names the folder where they lie; without it tests that need them are skipped. HEAVY=1 takes all images.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, run_script

from experiments import smooth_fits
from lib import many_lenses
from lib.pairs import reduced

FOLDER, HEAVY = os.environ.get("REAL_IMAGES"), bool(os.environ.get("HEAVY"))
PAIRS, COMMON_TEST = (Path(FOLDER or "", f) for f in ("testVIB_pairs.npz", "common_test.npz"))
needs_real_images = pytest.mark.skipif(not FOLDER, reason="REAL_IMAGES names no folder")
STEEPEST = np.rad2deg(np.deg2rad(2 * np.pi))  # degrees: 2π, of the generator's angles
ERROR = 0.8  # degrees, of a fitted angle


@pytest.fixture(scope="module")
def fits():
    """{class name: (real pictures, their fits, fits of simulated ones)} of the Common Test."""
    found = {}
    for class_name, pictures in smooth_fits.read(COMMON_TEST).items():
        chosen = pictures if HEAVY else pictures[::3]
        others = smooth_fits.simulated(class_name, 60 if HEAVY else 10, 1, chosen)
        found[class_name] = chosen, smooth_fits.fits_of(chosen), smooth_fits.fits_of(others)
    return found


@needs_real_images
def test_real_pairs_have_the_noise_of_simulated_ones_and_their_angles():
    """Pictures of 256 levels: what decoding did to the noise of others is not known."""
    exact = [picture for picture in smooth_fits.read(PAIRS)["no"] if picture.exact]
    assert len(exact) == 13
    exact = exact if HEAVY else exact[::2][:6]
    real = smooth_fits.fits_of(exact)
    others = smooth_fits.fits_of(smooth_fits.simulated("no", 60 if HEAVY else 12, 1, exact))
    assert all(0.9 < fit.chi2 < 1.1 for fit in real)
    figures = smooth_fits.compared(real, others)
    assert all(p > 0.01 for *_, p in figures.values())
    for _, gamma1, gamma2 in (fit.parameters[:3] for fit in real):
        if np.hypot(gamma1, gamma2) > 0.05:
            assert -STEEPEST - ERROR < np.rad2deg(np.arctan2(gamma2, gamma1) / 2) < ERROR


@needs_real_images
def test_the_coarse_image_of_a_real_pair_is_the_bicubic_reduction_of_the_sharp_one():
    with np.load(PAIRS) as archive:
        exact = archive["exact"]
        sharp, coarse = (torch.from_numpy(archive[name][exact]) for name in ("HR", "LR"))
    assert (reduced(sharp) - coarse).abs().max() < 1e-5


@needs_real_images
@pytest.mark.parametrize("class_name", many_lenses.CLASS_NAMES)
def test_a_smooth_lens_leaves_as_much_of_real_images_as_of_simulated_ones(class_name, fits):
    _, real, others = fits[class_name]
    assert smooth_fits.compared(real, others)["rms"][2] > 0.01


@needs_real_images
def test_real_images_of_the_common_test_have_the_noise_of_simulated_ones(fits):
    """The decoding of solved pictures took away some noise and added some: only the sum has a bound.

    With its error counted as noise there must be less than that, and without more.
    """
    for class_name, (pictures, real, _) in fits.items():
        for picture, found in zip(pictures, real, strict=True):
            if picture.exact:
                assert 0.9 < found.corner < 1.1
                assert class_name != "no" or 0.9 < found.chi2 < 1.1
        solved = [(picture, found) for picture, found in zip(pictures, real, strict=True) if not picture.exact]
        assert 0.92 < np.mean([found.corner for _, found in solved]) < 1
        without = [smooth_fits.fit(picture.image, 0, picture.edge).corner for picture, _ in solved]
        assert 1 < np.mean(without) < 1.08


UNDISTURBED = smooth_fits.Picture(None, False, 0.0, 1)


def test_a_fit_finds_a_simulated_lens_and_substructure_is_left():
    """χ² of a smooth lens is 1 within its error, √(2/22,500); wrong noise or a wrong scale would change it."""
    for class_name, low, high in (("no", 0.96, 1.04), ("vort", 1.05, 10)):
        (fit,) = smooth_fits.fits_of(smooth_fits.simulated(class_name, 1, 8, [UNDISTURBED]))
        assert low < fit.chi2 < high
        scene = many_lenses.sample(class_name, 1, np.random.default_rng([8, many_lenses.label_of(class_name), 0]))
        if class_name == "no":
            true = np.concatenate([scene.theta_e, scene.gamma1, scene.gamma2, scene.x, scene.y])
            assert fit.parameters[:5] == pytest.approx(true, abs=0.02)


def test_files_that_hold_no_such_images_are_named(tmp_path):
    path, image = tmp_path / "x.npz", np.zeros((1, 150, 150))
    more = {"exact": np.ones(1, bool), "edge_unknown": np.zeros(1, int), "error": np.ones(1)}
    for content in ({"images": image}, {"images": image[:, :9, :9], **more},
                    {"images": image, **more, "labels": np.array(["x"])}):  # fmt: skip
        np.savez(path, **content)
        assert_refused("experiments/smooth_fits.py", ("--images", path), path)


def test_the_command_prints_three_figures_of_each_class_and_way_of_decoding(tmp_path):
    like = [UNDISTURBED._replace(exact=True), UNDISTURBED]
    images = [picture.image for picture in smooth_fits.simulated("no", 4, 8, like)]
    np.savez(tmp_path / "x.npz", HR=np.array(images), exact=[True, False] * 2, hr_error=np.full(4, 1e-3),
             edge_unknown=np.zeros(4, int))  # fmt: skip
    said = run_script("experiments/smooth_fits.py", "--images", tmp_path / "x.npz", "--per-class", 2).stdout
    pictures = [line.split(":")[0] for line in said.splitlines()]
    assert pictures == ["no, 2 exact pictures"] * 3 + ["no, 2 solved pictures"] * 3


def test_what_a_smooth_lens_leaves_finds_substructure(capsys):
    smooth_fits.main(["--find", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].strip(",") for line in lines] == ["sphere", "vort", "all", "no", "sphere", "vort"]
    aucs = [float(re.search(r"AUC ([\d.]+)", line)[1]) for line in lines]
    assert min(aucs[:3] + aucs[4:]) > 0.7 and aucs[3] < 0.8


def test_the_significance_of_what_is_left_is_its_distance_in_units_of_the_photon_noise():
    """Bright pixels have more noise: the sum over pixels of (image - smooth lens)²/variance, both without noise."""
    (significance,) = smooth_fits.significances("vort", 1, 8)
    ((_, _, truth),) = many_lenses.observed("vort", 1, 8)
    best = smooth_fits.render(smooth_fits.fit(truth[0].astype(np.float64)).parameters)[0]
    design = np.stack([best.ravel(), np.ones(best.size)], axis=1)
    weight = 1 / (best + many_lenses.SKY).ravel()  # up to the scale of the image
    scale, zero = np.linalg.solve(design.T @ (weight[:, None] * design), design.T @ (weight * truth.ravel()))
    left = truth.ravel() - design @ (scale, zero)
    counts_per_unit = many_lenses.EXPOSURE / scale
    variance = many_lenses.EXPOSURE * (best.ravel() + many_lenses.SKY)
    assert significance == pytest.approx(np.sqrt((counts_per_unit**2 * left**2 / variance).sum()), rel=1e-3)


def test_an_observer_who_is_told_what_to_look_for_is_as_good_as_draws_say():
    significance = np.array([0.0, 0.5, 2.0, 4.0])
    rng = np.random.default_rng(0)
    spread = rng.choice(significance, (2, 200_000))
    with_it, without = spread * rng.standard_normal(spread.shape) + np.array([[1], [-1]]) * spread**2 / 2
    higher, equal = (with_it > without).mean(), (with_it == without).mean()
    assert smooth_fits.auc_when_told(significance) == pytest.approx(higher + equal / 2, abs=0.004)
    assert smooth_fits.auc_when_told(np.zeros(3)) == 0.5
