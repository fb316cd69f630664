"""The simulator against real images of the benchmark, which are not ours to redistribute.

REAL_IMAGES names the folder where they lie; without it these tests are skipped.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSIFIER, replacing, write_classes

import simulate
from experiments import real_images
from lib import datasets, lenses
from lib.errors import UserError

FOLDER = os.environ.get("REAL_IMAGES")
PICTURES, MODEL_III = (Path(FOLDER or "", f) for f in ("testVI_pictures.npz", "model3_no_sub.npy"))
needs_real_images = pytest.mark.skipif(not FOLDER, reason="REAL_IMAGES names no folder")


def without_factor(model):
    """The data model as it was taken to be before real images were at hand."""
    return lenses.INSTRUMENTS[model]._replace(rescaled=False)


@needs_real_images
def test_a_real_model_iii_image_is_rendered():
    (image,), _ = real_images.load_images(MODEL_III)
    source, residual = real_images.fit_smooth_lens(image, "Model_III")
    assert source == pytest.approx([-0.06170, 0.08447], abs=1e-5)
    assert np.abs(residual).max() <= 1e-8
    _, residual = real_images.fit_smooth_lens(image, without_factor("Model_III"))
    assert np.abs(residual).max() > 0.1


@needs_real_images
def test_every_real_smooth_lens_of_the_benchmark_is_rendered():
    images, columns = real_images.load_images(PICTURES)
    smooth = images[columns["labels"] == "no_sub"]
    assert len(smooth) == 41
    for image in smooth:
        _, residual = real_images.fit_smooth_lens(image)
        assert np.sqrt(np.mean(residual**2)) <= 0.001
    for image in smooth[::10]:
        _, residual = real_images.fit_smooth_lens(image, without_factor("Model_II"))
        assert np.sqrt(np.mean(residual**2)) > 0.05


@needs_real_images
def test_no_real_lens_with_point_masses_fits_the_smooth_lens():
    images, columns = real_images.load_images(PICTURES)
    chosen = (columns["labels"] == "cdm") & real_images.is_exact(images)
    for image in images[chosen][:10]:
        _, residual = real_images.fit_smooth_lens(image)
        assert np.abs(residual).max() > 0.01


@needs_real_images
def test_most_real_pictures_hold_the_middles_of_8_bit_steps():
    images, _ = real_images.load_images(PICTURES)
    assert real_images.is_exact(images).sum() == 78


def test_a_fit_finds_the_source_of_a_simulated_lens():
    true = np.array([[0.213, -0.307]])
    image = lenses.render(true, np.zeros((1, 0, 3)))[0].numpy()
    source, residual = real_images.fit_smooth_lens(1000 * image)
    assert source == pytest.approx(true[0], abs=1e-6)
    assert np.abs(residual).max() < 1e-6


def test_files_that_hold_no_images_are_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pictures=np.zeros((2, 8, 8)))
    with pytest.raises(UserError, match="x.npz.*images"):
        real_images.main(["fit", "--images", str(path)])
    image = np.ones((1, 64, 64))
    for content in ({"images": np.full((1, 64, 64), np.nan)}, {"images": 0 * image}, {"images": image[:0]},
                    {"images": image[:, :32, :32]}, {"images": np.full((1, 64, 64), "x")},
                    {"images": image, "labels": np.array([1])}, {"images": image, "labels": np.array("cdm")},
                    {"images": image, "labels": np.array(["cdm"])}):  # fmt: skip
        np.savez(path, **content)
        with pytest.raises(UserError, match="x.npz"):
            real_images.main(["fit", "--images", str(path)])
    whole = path.read_bytes()
    for damaged in (b"no archive", whole[:100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="x.npz"):
            real_images.main(["fit", "--images", str(path)])


def test_unknown_pixels_at_the_border_become_their_neighbours(tmp_path):
    image = np.arange(1.0, 26.0).reshape(5, 5)
    broken = np.pad(image[1:4, 1:4], 1, constant_values=-99.0)
    np.savez(tmp_path / "some.npz", images=np.stack([image, broken]), edge_unknown=[0, 1])
    (whole, filled), _ = real_images.load_images(tmp_path / "some.npz")
    assert np.allclose(whole, image / 25)
    assert np.allclose(filled * 19, image[np.ix_([1, 1, 2, 3, 3], [1, 1, 2, 3, 3])])
    np.savez(tmp_path / "some.npz", images=np.stack([image, broken]), edge_unknown=np.array([0, 1], np.uint8))
    assert np.array_equal(real_images.load_images(tmp_path / "some.npz")[0][1], filled)
    for wrong in ([0], [0, 3], [0, -1], [0.0, 1.0]):
        np.savez(tmp_path / "wrong.npz", images=np.stack([image, broken]), edge_unknown=wrong)
        with pytest.raises(UserError, match="edge_unknown"):
            real_images.load_images(tmp_path / "wrong.npz")


def test_noisy_images_become_pictures_too_and_the_same_ones_once(tmp_path, packed, capsys):
    simulate.main(["--per-class", "4", "--noise", "--out", str(tmp_path / "d")])
    out = tmp_path / "p"
    for more in ([], ["--any"], ["--any", "--seed", "1"]):
        command = ["pictures", "--data", str(tmp_path / "d"), "--out", str(out), "--update", *more]
        real_images.main(command)
        dataset = datasets.load(out)
        assert dataset.images.min() == 0
        assert dataset.images.max() == 1
        capsys.readouterr()
        real_images.main(command)
        assert "already up to date" in capsys.readouterr().out
        assert datasets.load(out).fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match="holds other images"):
        real_images.main(replacing(command, ["--out", str(packed)]))
    assert len(datasets.load(packed).labels) == 300


def test_pairs_and_data_that_is_too_small_to_be_split_as_pictures(tmp_path):
    (tmp_path / "pairs").mkdir()
    pair = np.random.default_rng(0).random((12, 16, 16), dtype=np.float32)
    for name, images in (("a", pair), ("b", pair[:, ::2, ::2])):
        (tmp_path / "pairs" / name).mkdir()
        for i, image in enumerate(images):
            np.save(tmp_path / "pairs" / name / f"{i}.npy", image)
    with pytest.raises(UserError, match="holds pairs"):
        real_images.main(["pictures", "--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "p")])
    few = write_classes(tmp_path / "few", {"one": 2, "two": 2})
    real_images.main(["pictures", "--data", str(few), "--out", str(tmp_path / "p")])
    assert len(datasets.load(tmp_path / "p").labels) == 4


def test_a_data_set_of_pictures_is_written_and_real_ones_are_asked_about(packed, runs, tmp_path, capsys):
    out = tmp_path / "pictures"
    real_images.main(["pictures", "--data", str(packed), "--out", str(out), "--any"])
    pictures = datasets.load(out)
    source = datasets.load(packed)
    assert pictures.class_names == source.class_names
    assert np.array_equal(pictures.masses, source.masses, equal_nan=True)
    for part, rows in datasets.split(source).items():
        assert np.array_equal(datasets.split(pictures)[part], rows)
    assert pictures.images.max() == 1
    assert pictures.images.min() == 0
    exact = real_images.is_exact(np.array(pictures.images, np.float64))
    assert 60 < exact.sum() < 140  # a third
    file = tmp_path / "real.npz"
    labels = np.array(pictures.class_names)[pictures.labels[::30]]
    np.savez(file, images=pictures.images[::30], labels=labels)
    weights = runs / "full" / CLASSIFIER
    answers = tmp_path / "answers.csv"
    real_images.main(["classify", "--images", str(file), "--weights", str(weights), "--out", str(answers)])
    lines = answers.read_text().splitlines()
    assert lines[0] == "image,exact,labels,axion,cdm,no_sub,prediction"
    assert len(lines) == 11
    assert "right" in capsys.readouterr().out
