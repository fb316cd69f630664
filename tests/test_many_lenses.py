"""Many_Lenses and Pairs: what their populations, noise and files promise. See also test_real_lenses.py."""


import numpy as np
import pytest
import torch
from conftest import assert_refused, run_script
from scipy import stats

from lib import datasets, lenses, many_lenses, raytracing, simulated
from lib.pairs import reduced

SMALL = raytracing.Camera(40, 0.2, 0.2, 4)


def scenes(count, seed=0, class_name="vort"):
    return many_lenses.sample(class_name, count, np.random.default_rng(seed))


def rendered(scene, camera=SMALL):
    return raytracing.render(scene._replace(x=torch.as_tensor(scene.x)), camera)


def test_images_together_equal_images_alone():
    """Lens, shear, source and factor may all differ from image to image."""
    count = raytracing.CHUNK + 2
    rng = np.random.default_rng(1)
    various = {name: rng.uniform(0.1, 0.4, count) for name in ("e1", "e2", "factor", "amplitude", "radius")}
    various["index"] = rng.uniform(0.5, 4, count)
    scene = scenes(count)._replace(**various)
    together = rendered(scene, SMALL)
    for i in (0, count - 1):
        alone = rendered(raytracing.part_of(scene, [i]), SMALL)
        assert torch.allclose(together[[i]], alone, rtol=1e-12, atol=0)
        for name in various:
            other = scene._replace(**{name: various[name][::-1].copy()})
            assert not torch.allclose(rendered(other, SMALL)[i], rendered(scene, SMALL)[i])


def test_the_lens_of_model_iii_is_one_set_of_arguments():
    source, masses, _ = lenses.sample("cdm", 3, np.random.default_rng(0))
    expected = lenses.render(source, masses, "Model_III")
    instrument = lenses.INSTRUMENTS["Model_III"]
    each = [np.full(3, value) for value in (lenses.einstein_radius(1e12), *lenses.LENS_ELLIPTICITY, *lenses.SHEAR,
                                            lenses.SOURCE_RADIUS, lenses.SERSIC_INDEX, *lenses.SOURCE_ELLIPTICITY,
                                            lenses.amplitude_of(instrument), lenses.deflection_factor())]  # fmt: skip
    scene = raytracing.Scene(torch.tensor(source[:, 0]), source[:, 1], masses, *each)
    assert torch.allclose(raytracing.render(scene, instrument.camera), expected, rtol=1e-10, atol=1e-15)


def test_a_sphere_deflects_by_its_einstein_radius_and_a_source_behind_it_is_a_ring():
    camera = raytracing.Camera(201, 0.02, 0.02, 4)
    scene = many_lenses.scene_of(*np.array([[1.0], [0.0], [0.0], [0.0], [0.0], [1.0], [0.0]]))
    image = rendered(scene, camera)[0]
    axis = raytracing.pixel_axis(camera)
    radius = torch.hypot(axis[:, None], axis)
    assert radius.flatten()[image.argmax()] == pytest.approx(1.0, abs=0.02)
    # β = θ - θ_E in every direction, so that the brightness is the source's at that distance.
    outside = (radius > 1.3) & (radius < 1.9)
    expected = torch.exp(-raytracing.sersic_b(1.5) * (((radius - 1) / 0.5) ** (1 / 1.5) - 1))
    assert torch.allclose(image[outside], expected[outside], rtol=5e-3)


def test_parameters_fill_the_measured_ranges():
    rng = np.random.default_rng(0)
    scene = many_lenses.sample("no", 4000, rng)
    assert 0.83 < scene.theta_e.min() < 0.9
    assert 1.6 < scene.theta_e.max() < 1.7
    assert scene.theta_e.mean() == pytest.approx(1.27, abs=0.02)
    lowest = -np.deg2rad(2 * np.pi)
    for values, low, high in ((np.hypot(scene.gamma1, scene.gamma2), 0, 0.3), (np.hypot(scene.x, scene.y), 0, 0.5),
                              (np.arctan2(scene.y, scene.x), -np.pi, np.pi),
                              (np.arctan2(scene.gamma2, scene.gamma1) / 2, lowest, 0),
                              (np.arctan2(scene.source_e2, scene.source_e1) / 2, lowest, 0)):  # fmt: skip
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 0.01
    c = np.hypot(scene.source_e1, scene.source_e2)
    assert stats.kstest((1 - c) / (1 + c), "uniform", (0.4, 0.6)).pvalue > 0.01


def test_masses_of_sphere_and_vort_have_the_measured_laws():
    scene = scenes(500, class_name="sphere")
    mass = 1e12 * (scene.point_masses[..., 0] / scene.theta_e[:, None]) ** 2
    assert mass.shape == (500, 25)
    share = (mass.ravel() ** 0.1 - 1e6**0.1) / (1e10**0.1 - 1e6**0.1)  # the integral of m^-0.9
    assert stats.kstest(share, "uniform").pvalue > 0.01
    assert stats.kstest(np.hypot(*scene.point_masses[..., 1:].reshape(-1, 2).T), "uniform", (0, 2)).pvalue > 0.01
    scene = scenes(500, class_name="vort")
    share = (scene.point_masses[..., 0] ** 2).sum(1) / scene.theta_e**2
    assert stats.kstest(share, "uniform", (0.03, 0.025)).pvalue > 0.01
    ends = scene.point_masses[:, [0, -1], 1:]
    assert stats.kstest(np.hypot(*(ends[:, 1] - ends[:, 0]).T), "uniform", (1, 3)).pvalue > 0.01
    assert stats.kstest(ends.mean(1).ravel() / 0.5, "norm").pvalue > 0.01
    steps = np.diff(scene.point_masses[..., 1:], axis=1)
    assert np.allclose(steps, steps[:, :1])  # straight and even


def test_noise_has_the_variance_of_photons_with_their_sky():
    """HR = (k - min k)/(max k - min k), k ~ Poisson(100 · (image + 0.1)), and truth is the mean of k on that scale."""
    image = rendered(scenes(1, class_name="no"), many_lenses.CAMERA).numpy()
    rng = np.random.default_rng(3)
    expected = 100 * (image[0] + 0.1)
    summed, count = 0, 200
    for _ in range(count):
        (noisy,), (truth,) = many_lenses.observe(image, rng)
        assert noisy.min() == 0
        assert noisy.max() == 1
        scale = (truth.max() - truth.min()) / np.ptp(expected)
        pull = (noisy - truth) / (scale * np.sqrt(expected))
        summed = summed + pull**2
        k = (noisy / scale).astype(np.float64)
        assert np.abs(k - np.round(k)).max() < 0.05  # whole numbers of photons
    variance = summed / count
    for dark, bright in ((0, 11), (11, 20), (20, 100), (100, 1e9)):
        chosen = variance[(dark <= expected) & (expected < bright)]
        assert chosen.mean() == pytest.approx(1, abs=5 * np.sqrt(2 / (count * chosen.size)) + 0.002)


def test_the_same_seed_gives_the_same_images_and_another_seed_class_or_model_others():
    def images(model, seed):
        return [images.tobytes() for _, images, _ in simulated.simulate(model, 2, seed, progress=False)]

    cases = [(model, seed) for model in ("Model_II", "Many_Lenses", "Pairs") for seed in (5, 6)]
    every = sum((images(*case) for case in cases), [])
    assert every == sum((images(*case) for case in cases), [])
    assert len(set(every)) == len(every) == 2 * (3 + 3 + 1)


def test_many_lenses_are_written_as_they_are_published(tmp_path, monkeypatch):
    monkeypatch.setattr(many_lenses, "PIECE", 3)  # pieces straddle train and val
    common = ["--model", "Many_Lenses", "--per-class", 8, "--seed", 4, "--update", "--out"]
    for _ in range(2):
        run_script("simulate.py", *common, tmp_path / "folder", "--layout", "folder")
        run_script("simulate.py", *common, tmp_path / "packed")
    names = sorted(str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*.npy"))
    assert names == sorted(f"{part}/{name}/{i + 1}.npy" for part, n in (("train", 8), ("val", 2))
                           for name in ("no", "sphere", "vort") for i in range(n))  # fmt: skip
    image = np.load(tmp_path / "folder" / "train" / "vort" / "8.npy")
    assert image.shape == (1, 150, 150)
    assert image.dtype == np.float32
    packed = datasets.load(tmp_path / "packed")
    folder = datasets.load(tmp_path / "folder", tmp_path / "cache", progress=False)
    assert packed.class_names == folder.class_names == ("no", "sphere", "vort")
    assert np.array_equal(packed.images[2 * 10 + 7], image[0])
    parts = {part: {image.tobytes() for image in packed.images[rows]} for part, rows in datasets.split(packed).items()}
    for part, rows in datasets.split(folder).items():
        assert parts[part] == {image.tobytes() for image in folder.images[rows]}
    val = {np.load(tmp_path / "folder" / name)[0].tobytes() for name in names if name.startswith("val")}
    assert parts["test"] == val
    with_classes = run_script("simulate.py", *common, tmp_path / "plain", "--layout", "folder", "--val-per-class", 0)
    assert "24 images of Many_Lenses" in with_classes.stdout
    assert (tmp_path / "plain" / "no" / "8.npy").exists()
    assert_refused("simulate.py", (*common, tmp_path / "x", "--val-per-class", -1), "--val-per-class")


def test_pairs_are_written_as_they_are_published(tmp_path):
    common = ["--model", "Pairs", "--per-class", 5, "--seed", 4, "--update", "--out"]
    for _ in range(2):
        run_script("simulate.py", *common, tmp_path / "folder", "--layout", "folder")
        run_script("simulate.py", *common, tmp_path / "packed")
    names = sorted(str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*.npy"))
    assert names == sorted(f"{side}/sample{i}.npy" for side in ("HR", "LR") for i in range(1, 6))
    dataset = datasets.load(tmp_path / "packed")
    assert dataset.class_names == ("HR",)
    ((sharp, coarse, truth),) = many_lenses.simulate_pairs(5, 4)
    for i in range(5):
        high, low = (np.load(tmp_path / "folder" / side / f"sample{i + 1}.npy") for side in ("HR", "LR"))
        assert high.shape == (1, 150, 150)
        assert low.shape == (1, 75, 75)
        assert np.array_equal(high[0], dataset.images[i])
        assert np.array_equal(reduced(torch.from_numpy(high)).numpy(), low)
        assert np.array_equal(high[0], sharp[i])
        assert np.array_equal(low[0], coarse[i])
    assert np.array_equal(simulated.truth_of(dataset.origin, [4, 1]), truth[[4, 1]])
    refused = (*common, tmp_path / "x", "--layout", "folder", "--val-per-class", 1)
    assert_refused("simulate.py", refused, "--val-per-class")


def test_reducing_is_the_bicubic_interpolation_between_pixels():
    """Half-pixel centres, a = -0.75: at ratio 2 the four taps of the cubic kernel at distances 1.5, 0.5, 0.5, 1.5."""
    rng = np.random.default_rng(0)
    sharp = rng.random((2, 3, 12, 12))
    far, near = -0.09375, 0.59375
    taps = np.array([far, near, near, far])
    coarse = reduced(torch.from_numpy(sharp)).numpy()
    assert coarse.shape == (2, 3, 6, 6)
    inside = np.einsum("...ij,i,j->...", sharp[..., 3:7, 5:9], taps, taps)
    assert np.allclose(coarse[..., 2, 3], inside)
    assert reduced(torch.from_numpy(sharp), 4).shape == (2, 3, 3, 3)
    with pytest.raises(ValueError, match="12×12 pixels cannot be reduced 5 times"):
        reduced(torch.from_numpy(sharp), 5)


def test_true_masses_and_truth_are_those_of_the_images():
    """Also across batches; truth leaves photon noise alone, and there is none of other data sets."""
    count = lenses.BATCH + 3
    origin = simulated.origin_of("Many_Lenses", count, 2, False)
    rows = [count + lenses.BATCH + 1, 2 * count + lenses.BATCH + 2, lenses.BATCH]
    masses, camera = simulated.point_masses_of(origin, rows)
    assert [len(own) for own in masses] == [25, 100, 0]
    assert camera.pixels == 150
    truth = simulated.truth_of(origin, rows)
    for row, clean in zip(rows, truth, strict=True):
        name = many_lenses.CLASS_NAMES[row // count]
        ((first, images, _),) = many_lenses.observed(name, count, 2, [lenses.BATCH])
        pull = (images[row % count - first] - clean) / images[row % count - first].max()
        assert pull.std() < 0.02
        assert abs(pull.mean()) < 1e-3
    assert simulated.truth_of("folder lenses", [0]) is None
    assert simulated.truth_of(simulated.origin_of("Model_II", 3, 2, False), [0]) is None
    assert simulated.pixels_of(origin)["pixel_scale"] == 0.05
