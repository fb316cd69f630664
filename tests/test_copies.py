"""Copies of an image, turned, in other units and rounded: one part, counted once, named; and nothing else."""

import shutil

import numpy as np
import pytest
from conftest import CLASSIFIER, assert_refused, run_script, write_classes, write_packed

from lib import compatibility, copies, datasets, lenses


def eight_bit(images):
    low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
    return np.round(255 * (images - low) / (high - low))


CHANGES = {"other zeros": lambda x: np.where(x == 0, -0.0, x), "another unit": lambda x: 255 * x,
           "another zero": lambda x: x + x.max() / 3, "both": lambda x: 7 + 0.3 * x / x.max(),
           "float16": lambda x: (x / x.max()).astype(np.float16),
           "float16 with an offset": lambda x: (1 + x / x.max()).astype(np.float16), "8 bit": eight_bit,
           "8 bit, one scale": lambda x: np.round(255 * x / x.max()),
           "8 bit, cut off": lambda x: np.floor(255 * x / x.max()), "a quarter turn": lambda x: np.rot90(x, 1, (1, 2)),
           "three quarter turns": lambda x: np.rot90(x, 3, (1, 2)), "mirrored": lambda x: x[:, :, ::-1],
           "transposed": lambda x: x.swapaxes(1, 2),
           "turned, 8 bit, 0 to 1": lambda x: eight_bit(np.rot90(x, 1, (1, 2))) / 255,
           "standardised": lambda x: (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)}  # fmt: skip
PARTS = (0.8, 0.9)


def simulated(model="Model_II", count=150):
    return np.concatenate([x for _, x, _ in lenses.simulate(model, count, 3, progress=False)])


def numbers(kind):
    rng = np.random.default_rng(1)
    if kind == "counts":
        return np.round(np.abs(rng.normal(0, 1, (300, 16, 16)))).astype(np.float32)
    return rng.random((300, kind, kind), dtype=np.float32)


FAMILIES = {"lenses": simulated, "small": lambda: numbers(8), "noise": lambda: numbers(16),
            "large noise": lambda: numbers(64), "counts": lambda: numbers("counts")}  # fmt: skip


def described(images):
    images = np.ascontiguousarray(images, dtype=np.float32)
    figures = copies.signatures_of(images)
    return images, copies.hashes_of(images, figures), figures


@pytest.mark.parametrize("family", FAMILIES)
def test_every_copy_is_found_and_no_other_image_is_called_one(family):
    images = FAMILIES[family]()
    before = described(images)
    assert len(np.unique(copies.originals_of(*before))) == len(images)
    for name, change in CHANGES.items():
        both = [np.concatenate(pair) for pair in zip(before, described(change(images)), strict=True)]
        originals = copies.originals_of(*both).reshape(2, -1)
        found = (originals[0] == originals[1]).mean()
        assert found == 1 or found > 0.99 and "cut off" in name, name
        assert len(np.unique(originals[0])) == len(images), name


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_is_in_the_part_of_its_image_also_without_it(name):
    images = simulated()
    parts = [np.digitize(described(x)[1] / 2.0**64, PARTS) for x in (images, CHANGES[name](images))]
    rounded = "8 bit" in name or "float16" in name
    assert (parts[0] == parts[1]).mean() >= (0.9 if rounded else 1)


@pytest.mark.parametrize("model", ["Model_I", "Model_II", "Model_III"])
def test_lenses_of_one_family_are_no_copies_and_have_their_shares(model):
    images, hashes, figures = described(simulated(model, 300 if model == "Model_I" else 2000))
    originals = copies.originals_of(images, hashes, figures)
    assert len(np.unique(originals)) == len(images)
    for part in np.digitize(originals / 2.0**64, PARTS).reshape(3, -1):
        shares = np.bincount(part) / len(part)
        assert np.abs(shares - (0.8, 0.1, 0.1)).max() < (0.06 if model == "Model_I" else 0.03)


def test_images_without_any_structure_have_figures():
    flat = np.repeat(np.linspace(0.1, 9, 3000, dtype=np.float32), 64).reshape(-1, 8, 8)
    flat[::2, ::2, ::2] *= -1
    images, hashes, figures = described(flat)
    assert np.isfinite(figures).all()
    copies.originals_of(images, hashes, figures)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A class that was filled up with copies."""
    root = write_classes(tmp_path_factory.mktemp("copied"), {"a": 60, "b": 60})
    for path in sorted((root / "b").iterdir()):
        for k in range(1, 4):
            np.save(path.with_name(f"{path.stem}-{k}.npy"), 255 * np.rot90(np.load(path), k))
        shutil.copy(path, path.with_name(f"{path.stem}-again.npy"))
    return root


def test_copies_are_named_when_a_folder_is_packed_and_counted_by_data_py(copied, tmp_path):
    cache = ("--cache-dir", tmp_path / "cache")
    process = run_script("data.py", "--data", copied, *cache)
    assert "240 images are copies of others" in process.stderr
    assert f"such as {copied}/b/000-2.npy of {copied}/b/000-1.npy" in process.stderr
    for said in (process.stdout, run_script("data.py", "--data", copied, *cache).stdout):
        of_a, of_b = said.splitlines()[1:]
        assert "different" not in of_a
        assert "240 are copies, 60 images are different" in of_b


def test_copies_are_tested_once(copied, tmp_path, capsys):
    dataset = datasets.load(copied, tmp_path / "cache", progress=False)
    rows, untrained = datasets.split(dataset)["test"], {"seen": [], "run": {"split": datasets.SPLIT}}
    once = compatibility.rows_to_evaluate(dataset, untrained, whole=False)
    assert len(once) == len(np.unique(dataset.originals[rows])) < len(rows)
    assert f"{len(rows) - len(once)} of {len(rows)} images are copies" in capsys.readouterr().err
    assert len(compatibility.rows_to_evaluate(dataset, untrained, whole=True)) == 120


def test_images_that_are_copies_of_training_images_are_refused(packed, runs, tmp_path):
    """They are known by the training image beside them, or exactly, also turned, without it."""
    dataset = datasets.load(packed)
    turned = np.rot90(np.array(dataset.images), 1, (1, 2))
    more = write_packed(tmp_path / "more", turned, dataset.labels, dataset.class_names)
    trained = sum(len(rows) for part, rows in datasets.split(dataset).items() if part != "test")
    arguments = ("--data", more, "--weights", runs / "head" / CLASSIFIER, "--out", tmp_path / "e")
    assert_refused("evaluate.py", (*arguments, "--split", "all"), f"trained on {trained} of these 300 images")
