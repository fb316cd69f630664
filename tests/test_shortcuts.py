"""Classes that something trivial tells apart are named, and simulated classes are not."""

import numpy as np
import pytest
from conftest import run_script, write_classes

from lib import datasets, lenses, shortcuts

CHANGES = {
    "brightest pixel": lambda x: 255 * x,
    "darkest pixel": lambda x: x + x.max() / 50,
    "typical step between neighbours in the corners": lambda x: x + np.random.default_rng(0).normal(
        0, x.max() / 100, x.shape),
    "share of pixels that are zero": lambda x: np.round(x / x.max() * 100) * x.max() / 100,
    "share of pixels as bright as the brightest": lambda x: np.minimum(x, x.max() / 9),
    "column of the centre of light": lambda x: np.roll(x, 12, axis=2),
}  # fmt: skip


def simulated(model):
    parts = list(lenses.simulate(model, 150, 2, progress=False))
    return datasets.Dataset(np.concatenate([x for _, x, _ in parts]), np.repeat([0, 1, 2], 150), None, None,
                            ("a", "b", "c"), "", "")  # fmt: skip


@pytest.mark.parametrize("model", ["Model_I", "Model_II", "Model_III"])
def test_classes_that_differ_in_substructure_alone_are_not_named(model):
    assert shortcuts.differences(simulated(model)) == []


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("label", [0, 2])
def test_what_tells_a_class_apart_is_named(what, label):
    dataset = simulated("Model_II")
    changed = dataset.labels == label
    dataset.images[changed] = CHANGES[what](dataset.images[changed])
    named = [line for line in shortcuts.differences(dataset) if line.startswith(f"the {what} is")]
    assert len(named) == 1
    assert f"class {dataset.class_names[label]} " in named[0]
    if what == "brightest pixel":
        assert " times): another unit?" in named[0]


def test_what_several_figures_tell_together_is_named_with_its_auc():
    """Units and zero levels vary from image to image; in one class the level is lower than its unit lets expect."""
    dataset = simulated("Model_II")
    dataset.images[:] *= np.exp(np.random.default_rng(0).normal(0, 0.5, len(dataset.labels)))[:, None, None]
    peaks = dataset.images.max(axis=(1, 2))
    levels = 0.3 * np.where(dataset.labels == 1, peaks, peaks + 0.6 * np.median(peaks))
    dataset.images[:] += levels[:, None, None]
    (line,) = shortcuts.differences(dataset)
    assert "class b" in line
    assert "linear classifier" in line
    assert float(line.rsplit(" ", 1)[1]) > shortcuts.TOLD_APART


def test_packing_and_data_py_name_classes_in_other_units(tmp_path):
    root = write_classes(tmp_path / "d", {"new": 40, "old": 40})
    for path in (root / "new").iterdir():
        np.save(path, 255 * np.load(path))
    process = run_script("data.py", "--data", root)
    assert process.stderr.count("the brightest pixel is") == 1
    assert "of class new" in process.stderr
    (packed,) = (root / ".packed").iterdir()
    assert run_script("data.py", "--data", packed).stdout.count("the brightest pixel is") == 1


def test_few_images_are_not_compared(tmp_path):
    assert shortcuts.differences(datasets.load(write_classes(tmp_path / "d", {"a": 3, "b": 12}), progress=False)) == []
