"""The mass of the axion: from files to estimates with intervals that hold it."""

import json

import numpy as np
import pytest
import torch

from conftest import (CLASSIFIER, MASS, PRETRAINED, assert_refused, assert_same_tensors, assert_user_error, finetune_on,
                      images_of, read_csv, run_script, sigterm_at, tensors_in, write_classes, write_packed)  # fmt: skip
from lib import datasets, lenses, listing, masses, weights
from mae import MassEstimator, MassNetwork

TRANSFORM = {"kind": "log", "offset": 0.0, "softening": 0.1, "mean": 0.0, "std": 1.0}


@pytest.fixture
def mass_run(runs):
    """The folder of a training of the mass on the images of `runs`."""
    return runs / "mass"


def test_the_masses_of_object_arrays_are_packed_and_those_of_other_files_unknown(folder, runs):
    dataset = datasets.load(folder, runs / "cache")
    for name, paths in listing.list_classes(folder)[0].items():
        own = dataset.masses[dataset.labels == dataset.class_names.index(name)]
        if name == "axion":
            assert np.array_equal(own, [np.load(path, allow_pickle=True)[1] for path in paths])
        else:
            assert np.isnan(own).all()


@pytest.mark.parametrize("number", [1, 0, -1e-23, np.nan, np.inf])
def test_a_number_that_is_no_mass_is_not_taken_for_one(number, tmp_path):
    root = write_classes(tmp_path / "data", {"a": 3, "b": 3})
    for path in (root / "a").iterdir():
        np.save(path, np.array([np.load(path), number], dtype=object), allow_pickle=True)
    assert datasets.load(root).masses is None
    assert_refused("finetune.py", ["--data", root, "--task", "mass", "--strategy", "residual", "--pretrained", "none",
                                   "--out", tmp_path / "out"], "data", "mass")  # fmt: skip


@pytest.mark.parametrize("images", [0, 5])
def test_too_few_validation_images_with_a_mass_are_named(images, folder, runs, tmp_path):
    """Of none there is no interval, and of five no interval holds 90 %."""
    dataset = datasets.load(folder, runs / "cache")
    parts = datasets.split(dataset)
    masses_left = np.array(dataset.masses)
    masses_left[[row for row in parts["validation"] if np.isfinite(dataset.masses[row])][images:]] = np.nan
    data = write_packed(tmp_path / "data", dataset.images, dataset.labels, dataset.class_names, masses_left)
    out = tmp_path / "out"
    process = finetune_on(data, out, "none", "residual", "--task", "mass", check=False)
    if images:
        assert "5 validation images have a mass: an interval holds it in 83 of 100 images, not in 90" in process.stderr
    else:
        assert_user_error(process, "no validation image")


@pytest.mark.parametrize("images", [50, 1000])
def test_intervals_hold_the_stated_share_of_new_images_in_each_group(images):
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        truth = rng.uniform(-24, -22, 2 * images)
        # Errors grow five times from one end to the other, and the spreads say nothing of it.
        estimates = truth + rng.laplace(0, 0.01 * (1 + 2 * (truth + 24)))
        outputs = np.stack([estimates, np.full_like(truth, np.log(0.02))], axis=1)
        edges = masses.half_decades(truth)
        widths = masses.fit_widths(outputs[:images], truth[:images], edges)
        group = np.digitize(estimates[images:], edges)
        inside = np.abs(estimates - truth)[images:] <= widths[group] * 0.02
        held.append([inside[group == i].mean() for i in range(4)] if images > 100 else [inside.mean()])
    assert len(widths) == 4
    assert np.all(np.abs(np.mean(held, axis=0) - masses.COVERAGE) < 0.012)


def test_half_decades_part_the_masses():
    assert masses.half_decades([-23.99, -22.01]) == [-23.5, -23.0, -22.5]
    parts = masses.by_half_decade(np.array([-23.9, -23.5, -22.1]))
    assert {name: own.tolist().index(True) for name, own in parts.items()} == {
        "-24 to -23.5": 0, "-23.5 to -23": 1, "-22.5 to -22": 2}  # fmt: skip


def test_an_interval_is_as_wide_as_its_group_of_estimates_says():
    model = MassEstimator(TRANSFORM, -23.0, [-23.0], img_size=16).eval()
    model.widths.copy_(torch.tensor([2.0, 5.0]))
    with torch.no_grad():
        model.network.fc[-1].weight.normal_()
        images = torch.rand(64, 1, 16, 16)
        model.centre -= model(images)[0].median().item() + 23  # half of the estimates are on either side
        estimate, low, high = model(images)
        spread = model.estimates(images)[:, 1].exp()
    wide = estimate > -23
    assert 0 < wide.sum() < 64
    assert torch.allclose((high - low) / 2, torch.where(wide, 5.0, 2.0) * spread, atol=1e-4)
    assert torch.allclose((high + low) / 2, estimate, atol=1e-5)


def test_a_turned_image_has_the_same_mass_and_a_batch_changes_nothing(mass_run, folder, runs):
    model = weights.network_of(weights.read(mass_run / MASS), "mass")
    images = images_of(datasets.load(folder, runs / "cache"), np.arange(5))
    with torch.no_grad():
        answers, turned = torch.stack(model(images)), torch.stack(model(images.flip(2, 3)))
        alone = torch.stack([torch.stack(model(image[None]))[:, 0] for image in images], dim=1)
    assert torch.allclose(answers, turned, atol=1e-4)
    assert torch.allclose(answers, alone, atol=1e-4)


def test_images_with_an_odd_number_of_pixels_are_refused():
    with pytest.raises(ValueError, match="even"):
        MassNetwork(1, 15)


def test_a_network_learns_the_mass_of_vortices_from_their_images(tmp_path):
    """From 480 images alone; a constant has an error of 0.5 dex."""
    _, images, found = next(lenses.simulate("Model_II", 600, seed=0, progress=False))  # axion is the first class
    data, out = write_packed(tmp_path / "data", images, 0, ["axion"], found), tmp_path / "out"
    finetune_on(data, out, "none", "residual", "--task", "mass", "--epochs", 10)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation_error"] < 0.25


def test_a_stopped_training_resumes_to_the_same_weights(mass_run, folder, runs, tmp_path):
    arguments = (folder, tmp_path, runs / "pretrain" / PRETRAINED, "residual", "--task", "mass",
                 "--cache-dir", runs / "cache", "--batch-size", 64)  # fmt: skip
    with sigterm_at(1):
        assert finetune_on(*arguments, check=False).returncode == 143
    finetune_on(*arguments, "--resume")
    assert_same_tensors(tensors_in(tmp_path / MASS), tensors_in(mass_run / MASS))


def test_test_images_and_images_without_a_mass_are_never_read(folder, runs, tmp_path, rows_read):
    finetune_on(folder, tmp_path, runs / "pretrain" / PRETRAINED, "residual", "--task", "mass",
                "--cache-dir", runs / "cache")  # fmt: skip
    dataset = datasets.load(folder, runs / "cache")
    parts = datasets.split(dataset)
    seen = np.concatenate([parts["train"], parts["validation"]])
    assert rows_read == set(seen[np.isfinite(dataset.masses[seen])].tolist())


def test_an_evaluation_has_the_errors_and_how_many_intervals_hold(mass_run, folder, runs, tmp_path):
    run_script("evaluate.py", "--data", folder, "--cache-dir", runs / "cache", "--weights", mass_run / MASS,
               "--out", tmp_path, "--resamples", 20)  # fmt: skip
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"].values()
    dataset = datasets.load(folder, runs / "cache")
    rows = datasets.split(dataset)["test"]
    rows = rows[np.isfinite(dataset.masses[rows])]
    with torch.no_grad():
        model = weights.network_of(weights.read(mass_run / MASS), "mass")
        estimate, low, high = (answer.double().numpy() for answer in model(images_of(dataset, rows)))
    truth = np.log10(dataset.masses[rows])
    assert result["images"] == len(rows)
    assert result["error"]["value"] == pytest.approx(np.abs(estimate - truth).mean(), abs=1e-5)
    assert result["coverage"]["value"] == pytest.approx(((low <= truth) & (truth <= high)).mean())
    assert (tmp_path / "masses.png").exists()


def test_predictions_have_a_mass_where_an_axion_is_predicted(mass_run, folder, runs, tmp_path):
    run_script("predict.py", "--model", runs / "classifier.onnx", "--mass", runs / "mass.onnx",
               "--least-familiarity", 0, "--out", tmp_path / "p.csv", folder)  # fmt: skip
    dataset, model = datasets.load(folder, runs / "cache"), weights.network_of(weights.read(mass_run / MASS), "mass")
    files = [str(path) for path in datasets.files_of(folder, dataset)]
    kinds = set()
    for row in read_csv(tmp_path / "p.csv"):
        found = np.array([float(row[name]) for name in ("log10_mass", "low", "high")])
        kinds.add(row["prediction"] == "axion")
        if row["prediction"] == "axion":
            with torch.no_grad():
                right = torch.cat(model(images_of(dataset, [files.index(row["file"])])))
            assert np.abs(found - right.numpy()).max() < 1e-3
        else:
            assert np.isnan(found).all()
    assert len(kinds) == 2, "the classifier predicts one kind only"


def test_what_makes_no_sense_for_the_mass_is_refused(mass_run, folder, runs, tmp_path):
    cache = ("--cache-dir", runs / "cache")

    def finetuning(strategy, pretrained):
        return ["--data", folder, *cache, "--task", "mass", "--strategy", strategy, "--pretrained", pretrained,
                "--out", tmp_path / "out"]  # fmt: skip

    assert_refused("finetune.py", finetuning("full", "none"), "--task mass", "--strategy full")
    classifier = runs / "residual" / CLASSIFIER
    assert_refused("finetune.py", finetuning("residual", classifier), classifier, "MAE")
    assert_refused("finetune.py", finetuning("residual", mass_run / MASS), MASS, "MAE")
    both = ["--data", folder, *cache, "--out", tmp_path / "e", "--weights", mass_run / MASS, classifier]
    assert_refused("evaluate.py", both, "--weights")
    assert_refused("export.py", ["--what", "mass", "--weights", classifier, "--out", tmp_path / "x.onnx"], classifier)
    assert_refused("predict.py", ["--model", runs / "classifier.onnx", "--mass", runs / "reconstruction.onnx",
                                  "--out", tmp_path / "p.csv", folder], "--mass", "reconstruction.onnx")  # fmt: skip
