"""Familiarity: a calibrated p-value that strange images do not have."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSIFIER, PRETRAINED, assert_refused, finetune_on, pretrain_on, run_script
from torch import nn

import export
from lib import datasets, familiarity, guard, lenses, onnxfile, weights

LOG = {"kind": "log", "offset": 0.0, "softening": 1e-3, "mean": 1.3, "std": 2.2}


def dataset_of(images):
    images = np.asarray(images, dtype=np.float32)
    n = len(images)
    hashes = np.arange(n).astype(np.uint64)
    return datasets.Dataset(images, np.zeros(n, np.int64), hashes, hashes, ("a",), "", "made here")


def fitted_images():
    """3,000 simulated lenses, the same at every call."""
    parts = lenses.simulate("Model_II", 1000, seed=5, progress=False)
    return np.random.default_rng(0).permutation(np.concatenate([part for _, part, _ in parts]))


@pytest.fixture(scope="module")
def fitted():
    """(Familiarity, its arguments, lenses that it has not seen) of 2,400 simulated lenses."""
    images = fitted_images()
    rows = np.arange(3000)
    model, config = familiarity.fit(dataset_of(images), rows[:1800], rows[1800:2400], LOG)
    return model.eval(), config, torch.from_numpy(images[2400:, None])


def values_of(model, images):
    """Familiarity (n,) of images (n, 1, H, W) that all are predicted as the first class."""
    with torch.no_grad():
        return model.eval()(images, torch.zeros(len(images), dtype=torch.int64))


def familiarity_of(fitted, images):
    return values_of(fitted[0], images).numpy()


def test_of_unseen_lenses_the_share_below_a_threshold_is_that_threshold(fitted):
    values = familiarity_of(fitted, fitted[2])
    assert values.min() >= 1 / 601
    assert values.max() <= 1
    for threshold in (0.02, 0.1, 0.5):  # four binomial errors, of test and calibration
        error = 4 * (threshold * (1 - threshold) * 2 / 600) ** 0.5
        assert abs((values < threshold).mean() - threshold) < error


STRANGE = {"another unit": lambda x: 255 * x,
           "noise": lambda x: x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
           "turned": lambda x: x.rot90(1, (2, 3)), "mirrored": lambda x: x.flip(3), "shifted": lambda x: x.roll(5, 3),
           "blank": torch.zeros_like, "constant": torch.ones_like,
           "another point spread function": lambda x: nn.functional.avg_pool2d(x, 3, 1, 1),
           "hot pixel": lambda x: x.index_fill(2, torch.tensor([3]), 50.0)}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_images_are_unfamiliar(kind, fitted):
    values = familiarity_of(fitted, STRANGE[kind](fitted[2][:200]))
    assert (values < 0.01).mean() > 0.97


def test_half_a_turn_changes_no_familiarity(fitted):
    images = fitted[2][:100]
    assert torch.equal(values_of(fitted[0], images), values_of(fitted[0], images.flip(2, 3)))


def test_lenses_are_familiar_in_all_orientations_that_a_training_saw(fitted):
    """A classifier that had learned all eight orientations refused mirrored lenses."""
    images = fitted[2]
    seen = dataset_of(fitted_images()[:2400])
    rows = np.arange(2400)
    model, _ = familiarity.fit(seen, rows[:1800], rows[1800:], LOG, ("flips",))
    for name in ("mirrored", "turned"):
        assert (values_of(model, STRANGE[name](images[:300])) < 0.02).float().mean() < 0.06
    for name in ("noise", "shifted"):
        assert (values_of(model, STRANGE[name](images[:100])) < 0.01).float().mean() > 0.95


def test_it_does_not_depend_on_the_unit_of_its_training_images():
    parts = lenses.simulate("Model_II", 100, seed=5, progress=False)
    images = np.concatenate([part for _, part, _ in parts])
    rows, values = np.random.default_rng(0).permutation(300), []
    for unit in (1.0, 2.0**-40):
        transform = {**LOG, "softening": 1e-3 * unit}
        scaled = dataset_of(images * np.float32(unit))
        model, _ = familiarity.fit(scaled, rows[:150], rows[150:250], transform)
        values.append(values_of(model, torch.from_numpy(scaled.images[rows[250:], None])).numpy())
    assert np.abs(values[0] - values[1]).max() <= 0.03


@pytest.mark.parametrize("side", [8, 16, 50])
@pytest.mark.parametrize("images", [100, 250])
def test_few_and_small_images_are_fitted_too(images, side):
    rng = np.random.default_rng(0)
    everything = dataset_of(rng.random((images + 100, side, side)))
    rows = np.arange(images + 100)
    model, config = familiarity.fit(everything, rows[:images], rows[images:], LOG)
    values = values_of(model, torch.from_numpy(everything.images[:, None]))
    assert config["calibration"] == 100
    assert len(model.strangeness_seen.unique()) > 90
    with torch.no_grad():
        assert torch.isfinite(model.strangeness(torch.from_numpy(everything.images[:, None]))).all()
    assert (values >= 1 / 101).all()
    assert familiarity.fit(everything, rows[:images], rows[images + 1 :], LOG) is None
    assert familiarity.fit(everything, rows[:99], rows[images:], LOG) is None


def test_statistics_that_hardly_change_do_no_harm():
    """Integer counts, as of a faint camera: most pixels are zero."""
    parts = lenses.simulate("Model_II", 400, seed=6, progress=False)
    images = np.random.default_rng(0).permutation(np.concatenate([part for _, part, _ in parts]))
    counts, rows = np.round(5 * images), np.arange(1200)
    model, _ = familiarity.fit(dataset_of(counts), rows[:600], rows[600:900], LOG)
    values = values_of(model, torch.from_numpy(np.float32(counts[900:, None])))
    assert abs((values < 0.1).float().mean() - 0.1) < 4 * (0.09 * 2 / 300) ** 0.5


def ranked(strangeness, predicted, seen):
    """Familiarity (n,) where validation images of each class had the strangeness `seen`, a list a class."""
    count = sum(map(len, seen))
    model = familiarity.Familiarity(LOG, 8, 1.0, 2, 1, count)
    model.strangeness_seen.copy_(torch.cat([torch.as_tensor(s, dtype=torch.float32) for s in seen]))
    model.class_seen.copy_(torch.arange(len(seen)).repeat_interleave(torch.tensor([len(s) for s in seen])))
    return model.rank(torch.as_tensor(strangeness, dtype=torch.float32), torch.as_tensor(predicted))


def test_the_share_that_is_refused_holds_in_every_class():
    """Of a class that is stranger than the others, half of the ordinary images were refused."""
    generator = torch.Generator().manual_seed(0)
    usual, strange = torch.rand(2, 10_000, generator=generator)
    seen = [usual[:2400], 10 + strange[:400]]
    for predicted, new in ((0, usual[2400:]), (1, 10 + strange[400:])):
        refused = ranked(new, torch.full((len(new),), predicted), seen) < 0.01
        assert 0.004 < refused.float().mean() < 0.02
    assert (ranked(10 + strange, torch.zeros(10_000, dtype=torch.int64), seen) < 0.01).all()


def test_a_class_of_few_validation_images_refuses_only_what_is_stranger_than_all_of_them():
    few = [5.0, 6.0, 7.0]
    seen = [torch.linspace(0, 1, 497), few, []]
    assert ranked([6.5], [1], seen).item() == 0.5
    assert ranked([7.0], [1], seen).item() == 0.5
    assert ranked([7.1], [1], seen).item() == pytest.approx(1 / 501)
    assert ranked([0.5], [1], seen).item() == 1
    # No validation image was predicted so: all classes together judge.
    assert ranked([0.999], [2], seen).item() == pytest.approx(5 / 501)
    assert ranked([torch.nan, torch.nan], [1, 2], seen) == pytest.approx([1 / 501] * 2)


# In weights and exported files


@pytest.fixture
def guarded(fitted, runs):
    """The content of a classifier's weights file with the familiarity of `fitted`."""
    content = torch.load(runs / "head" / CLASSIFIER, weights_only=True)
    model, config, _ = fitted
    content["familiarity"] = {"model": weights.plain(model.state_dict()), "config": dict(config)}
    return content


def of_another_size():
    """{"model", "config"} of a familiarity for images of 16 pixels."""
    images = np.random.default_rng(0).random((300, 16, 16))
    model, config = familiarity.fit(dataset_of(images), np.arange(200), np.arange(200, 300), LOG)
    return {"model": weights.plain(model.state_dict()), "config": config}


def test_a_classifier_knows_all_its_training_images_whatever_labels_it_had(packed, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(familiarity, "FEWEST_IMAGES", 10)
    finetune_on(packed, tmp_path / "few", pretrained, "head", "--labels", 0.2)
    dataset = datasets.load(packed)
    parts = datasets.split(dataset)
    opened = weights.read(tmp_path / "few" / CLASSIFIER)
    known = np.concatenate([parts["train"], parts["validation"]])
    assert set(dataset.hashes[known]) <= set(opened.content["seen"])
    kept = weights.familiarity_in(opened)
    again, config = familiarity.fit(dataset, parts["train"], parts["validation"], opened.content["config"]["transform"])
    assert config == opened.content["familiarity"]["config"]
    assert torch.equal(kept.components, again.components)
    assert torch.equal(kept.strangeness_seen, again.strangeness_seen)


def test_classifiers_take_the_familiarity_of_their_pretraining(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(familiarity, "FEWEST_IMAGES", 10)
    pretrain_on(packed, tmp_path / "pre", "--epochs", 1)
    before = weights.read(tmp_path / "pre" / PRETRAINED)
    run_script("simulate.py", "--per-class", 60, "--seed", 8, "--out", tmp_path / "other")
    fitted_again = []
    monkeypatch.setattr(familiarity, "fit", lambda *_: fitted_again.append(True))

    def classifier(name, start, *more, data=packed):
        finetune_on(data, tmp_path / name, start, "layernorm", "--epochs", 1, *more)
        return weights.read(tmp_path / name / CLASSIFIER)

    first = classifier("first", before.path, "--labels", 0.5)
    second = classifier("second", first.path)
    for after in (first, second):
        (one, config), (other, same_config) = (each.content["familiarity"].values() for each in (before, after))
        assert config == same_config
        assert all(torch.equal(one[name], other[name]) for name in one.keys() - {"class_seen"})
    assert not fitted_again
    classifier("noisy", before.path, "--augment", "noise")
    classifier("turned", before.path, "--augment", "flips")
    classifier("elsewhere", before.path, data=tmp_path / "other")
    assert len(fitted_again) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept["config"].update(components=10**9),
        lambda kept: kept["config"].update(components=-1),
        lambda kept: kept["config"].update(leading="x"),
        lambda kept: kept["config"].update(unit=float("nan")),
        lambda kept: kept["config"].update(img_size=10**6),
        lambda kept: kept["model"].pop("mean"),
        lambda kept: kept["model"].update(mean=torch.zeros(3)),
        lambda kept: kept["model"]["mean"].fill_(torch.nan),
        lambda kept: kept.pop("config"),
        lambda kept: kept["model"].pop("class_seen"),  # an older version
        lambda kept: kept.update(of_another_size()),
    ],
)
def test_a_broken_familiarity_is_refused_by_name(damage, guarded, packed, tmp_path):
    damage(guarded["familiarity"])
    path = tmp_path / "w.pth"
    torch.save(guarded, path)
    arguments = ("--data", packed, "--weights", path, "--out", tmp_path / "out")
    assert_refused("evaluate.py", arguments, "w.pth")


def test_an_evaluation_counts_the_images_that_a_prediction_refuses(guarded, packed, tmp_path):
    """A familiarity in another number format is read."""
    usual = guarded["familiarity"]

    strange = {"strangeness_seen": torch.full_like(usual["model"]["strangeness_seen"], -1.0)}
    half = {name: tensor.bfloat16() for name, tensor in usual["model"].items()}
    other_unit = usual["config"] | {"unit": 3 * usual["config"]["unit"]}
    for name, changed in {"one": {}, "two": {}, "strange": {"model": usual["model"] | strange}, "half": {"model": half},
                          "unit": {"config": other_unit}}.items():  # fmt: skip
        torch.save(guarded | {"familiarity": usual | changed}, tmp_path / f"{name}.pth")
    torch.save({key: value for key, value in guarded.items() if key != "familiarity"}, tmp_path / "none.pth")

    def evaluated(*names):
        files = [tmp_path / f"{name}.pth" for name in names]
        process = run_script("evaluate.py", "--data", packed, "--out", tmp_path / "out",
                             "--resamples", 5, "--weights", *files)  # fmt: skip
        return process.stdout, json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]

    said, results = evaluated("one", "two", "strange", "half", "unit", "none")
    shares = {Path(name).stem: result.get("unfamiliar") for name, result in results.items()}
    assert shares["one"] == shares["two"] < 0.2
    assert shares["unit"] == shares["strange"] == 1.0
    assert 0 <= shares["half"] <= 1 and shares["none"] is None
    for line in ("strange.pth: 100.00% of the images are unfamiliar (100.00% of axion, 100.00% of cdm",
                 "strange.pth: of cdm 100.00% are refused as unfamiliar, more than the 1% of ordinary",
                 "none.pth: its weights hold no familiarity"):  # fmt: skip
        assert line in said
    assert "one.pth: of cdm" not in said
    assert "of cdm 100.00% are refused as unfamiliar" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "familiarity.png").exists()
    evaluated("none")
    assert not (tmp_path / "out" / "familiarity.png").exists()


def test_an_exported_familiarity_is_that_of_pytorch_in_every_precision(fitted, guarded, packed, tmp_path):
    # Each half of the validation images is of a class of its own.
    guarded["familiarity"]["model"]["class_seen"][::2] = 1
    model = copy.deepcopy(fitted[0])
    model.class_seen.copy_(guarded["familiarity"]["model"]["class_seen"])
    torch.save(guarded, tmp_path / "w.pth")
    exported = tmp_path / "float32.onnx"
    run_script("export.py", "--data", packed, "--weights", tmp_path / "w.pth", "--out", exported)
    images = np.concatenate([fitted[2][:100], 10 * fitted[2][:5], np.zeros((1, 1, 64, 64))])
    images = np.float32(images)
    images[-1, 0, 3, 3] = np.nan
    for precision in ("float32", "float16", "int8"):
        path = tmp_path / f"{precision}.onnx"
        if path != exported:
            shutil.copy(exported, path)
            export.reduce_precision(path, precision, images[:100], {})
        probabilities, values = export.run_session(path, images)
        with torch.no_grad():
            expected = model(torch.from_numpy(images), torch.from_numpy(probabilities.argmax(axis=1)))
        assert np.abs(values - expected.numpy()).max() < 0.03
        assert values[-6:] == pytest.approx(1 / 601, rel=1e-3)
    session, *_ = onnxfile.open_classifier(exported)
    assert guard.Guard.of(session, 0.01).can_refuse
    assert not guard.Guard.of(session, 1 / 601).can_refuse
