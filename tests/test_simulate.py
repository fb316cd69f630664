"""The simulator: equal to lenstronomy's images, and what its parts promise."""

from pathlib import Path

import numpy as np
import pytest
import torch

import simulate
from lib import datasets, lenses, raytracing, simulated

REFERENCE = np.load(Path(__file__).parent / "reference" / "lenstronomy.npz")
TOLERANCE = 1e-6  # of an image's maximum


def point_masses_of(masses):
    """Masses (..., 3) as M☉, x, y with their nominal Einstein radii in place of M☉."""
    return np.concatenate([lenses.einstein_radius(masses[..., :1]), masses[..., 1:]], axis=-1)


@pytest.mark.parametrize("class_name", lenses.CLASS_NAMES)
@pytest.mark.parametrize("model", lenses.INSTRUMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_images_equal_lenstronomys(model, class_name, dtype):
    name = f"{model}/{class_name}"
    point_masses = point_masses_of(REFERENCE[f"{name}/masses"])
    expected = REFERENCE[f"{name}/images"]
    images = lenses.render(REFERENCE[f"{name}/source"], point_masses, model, dtype)
    difference = np.abs(images.double().numpy() - expected).max((1, 2))
    assert (difference <= TOLERANCE * expected.max((1, 2))).all()


def test_half_the_dark_pixels_of_a_count_image_are_zero_and_a_peak_is_a_few_hundred():
    batches = lenses.simulate("Model_I", 20, seed=0, progress=False)
    images = np.concatenate([images for _, images, _ in batches])
    assert np.array_equal(images, np.round(images))
    assert images.min() == 0
    peaks = images.max((1, 2))
    assert 150 < peaks.min() < peaks.max() < 1200
    corner = images[:, :20, :20]
    assert 0.52 < (corner == 0).mean() < 0.55


def test_counts_have_the_generators_mean_variance_and_zeros():
    time = float(REFERENCE["Model_I/time"])
    fixed = lenses.INSTRUMENTS["Model_I"]

    class Clock:  # the generator's random numbers, but for the exposure time
        def __init__(self):
            self.rng = np.random.default_rng(0)
            self.standard_normal, self.poisson = self.rng.standard_normal, self.rng.poisson

        def uniform(self, low, high, shape):
            return np.full(shape, np.log10(time))

    for i, flux in enumerate(REFERENCE["Model_I/flux"]):
        images = torch.full((40, 64, 64), float(flux))
        counts = lenses.observe(images, fixed, False, Clock()).numpy()
        assert counts.mean() == pytest.approx(REFERENCE["Model_I/count_mean"][i], rel=0.02)
        assert counts.var() == pytest.approx(REFERENCE["Model_I/count_variance"][i], rel=0.03)
        assert (counts == 0).mean() == pytest.approx(REFERENCE["Model_I/count_zeros"][i], abs=0.01)
        if flux == 0.2:  # far from zero, where nothing is cut: both noises and the Poisson draw
            variance = 2 * time * flux + (time * fixed.background_rms) ** 2
            assert counts.mean() == pytest.approx(time * flux, rel=0.01)
            assert counts.var() == pytest.approx(variance, rel=0.03)


def test_zero_einstein_radii_change_nothing_and_a_mass_on_a_pixel_gives_finite_pixels():
    source = torch.tensor([[0.1, -0.2]])
    masses = torch.tensor([[[0.05, 0.7, 0.3]]])
    zeros = torch.tensor([[[0.0, 0.7, -0.3], [0.0, 0.0, 0.0]]])
    alone = lenses.render(source, masses)
    assert torch.equal(lenses.render(source, torch.cat([masses, zeros], 1)), alone)
    assert not torch.equal(lenses.render(source, zeros), alone)
    centre = raytracing.pixel_axis(lenses.INSTRUMENTS["Model_II"].camera)[40].item()
    masses = torch.tensor([[[0.1, centre, centre]]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        image = lenses.render(torch.zeros(1, 2), masses, dtype=dtype)
        assert torch.isfinite(image).all()


@pytest.mark.parametrize("model", ["Model_II", "Model_III"])
def test_noise_has_the_spread_of_sky_read_out_and_photons(model):
    images = torch.full((40, 64, 64), 5.0)
    noisy = lenses.observe(images, model, True, np.random.default_rng(0)).numpy() - 5.0
    expected = np.hypot(REFERENCE[f"{model}/background_rms"], REFERENCE[f"{model}/photon_rms_of_5"])
    assert noisy.std() == pytest.approx(float(expected), rel=0.01)
    assert abs(noisy.mean()) < 4 * expected / np.sqrt(noisy.size)


def test_parameters_fill_the_published_ranges():
    rng = np.random.default_rng(0)
    source, masses, _ = lenses.sample("cdm", 500, rng)
    radius = np.hypot(masses[..., 1], masses[..., 2])
    assert np.abs(source).max() <= 0.35
    assert radius.min() > 0.25
    assert radius.max() < 2.0
    mass = (masses[..., 0] / lenses.einstein_radius(1.0)) ** 2
    assert 1e6 <= mass.min() < 2e6
    assert 8e9 < mass.max() <= 1e10
    _, vortex, axion_mass = lenses.sample("axion", 500, rng)
    assert 1e-24 <= axion_mass.min() < axion_mass.max() <= 1e-22
    total = (vortex[..., 0] / lenses.einstein_radius(1.0)) ** 2
    assert total.sum(1) == pytest.approx(3e10)
    half_length = np.hypot(vortex[..., 1], vortex[..., 2]).max(1)
    assert half_length == pytest.approx(0.06 * 1e-22 / (2 * axion_mass))


def test_true_masses_are_those_of_the_images(packed):
    dataset = datasets.load(packed)
    rows = [3, 107, 199, 250]
    masses, _ = simulated.point_masses_of(dataset.origin, rows)
    assert [len(m) for m in masses] == [100, 25, 25, 0]
    for row, own in zip(rows, masses, strict=True):
        label, place = divmod(row, 100)
        sources, *_ = lenses.sample(lenses.CLASS_NAMES[label], 100, np.random.default_rng([3, label, 0]))
        image = 2 * lenses.render(sources[[place]], own[None], "Model_II")[0].numpy()  # two exposures
        assert np.abs(image - dataset.images[row]).max() < 1e-5 * image.max()
    for origin in ("folder lenses", "simulate.py Model_IX, 9 a class, seed 0, noise"):
        assert simulated.point_masses_of(origin, [0]) is None  # of images from elsewhere


def test_folder_layout_is_the_published_one(folder, packed):
    axion = np.load(folder / "axion" / "axion_sim_7.npy", allow_pickle=True)
    assert axion.dtype == object
    assert np.array_equal(axion[0], datasets.load(packed).images[7])
    assert 1e-24 <= axion[1] <= 1e-22
    assert np.load(next((folder / "no_sub").glob("*.npy"))).shape == (64, 64)


def test_folder_layout_of_model_i_holds_whole_numbers(tmp_path):
    simulate.main(["--model", "Model_I", "--per-class", "2", "--layout", "folder", "--out", str(tmp_path / "d")])
    image = np.load(tmp_path / "d" / "cdm" / "cdm_sim_0.npy")
    assert image.dtype == np.int64
    assert image.shape == (150, 150)
    axion = np.load(tmp_path / "d" / "axion" / "axion_sim_1.npy", allow_pickle=True)
    assert axion[0].dtype == np.int64
    packed = datasets.load(tmp_path / "d", tmp_path / "cache", progress=False)
    assert np.array_equal(packed.images[list(packed.labels).index(1)], image)
