"""reconstruct.py and lib/residuals.py: scores, maps and kinds of what an MAE cannot explain."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_NETWORK, run_script
from sklearn.metrics import roc_auc_score

import pretrain
import reconstruct
import simulate
from experiments import study
from lib import clusters, data, lenses, plots, residuals, weights


def test_residuals_are_scored_mapped_and_compared_without_labels(runs, folder, tmp_path):
    process = run_script(
        "reconstruct.py", "--data", folder, "--cache-dir", runs / "cache", "--weights",
        runs / "pretrain" / "vit-mae-wt.pth", "--out", tmp_path / "out", "--resamples", 20,
    )  # fmt: skip
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    dataset = data.load(folder, runs / "cache")
    test_rows = data.split(dataset)["test"]
    assert [int(row["row"]) for row in rows] == test_rows.tolist()
    assert all(float(row["score"]) > 0 for row in rows)
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(rows[0]) == ["row", "class", "score"]
    assert "clusters" not in result
    assert set(result["auc"]) == {"all", "classes"}
    assert set(result["auc"]["classes"]) == {"axion", "cdm"}
    has_substructure = np.array([row["class"] != "no_sub" for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    expected = roc_auc_score(has_substructure, scores)
    assert result["auc"]["all"]["value"] == pytest.approx(expected, abs=1e-3)
    assert f"{result['auc']['all']['value']:.4f}" in process.stdout
    for name in ("maps.png", "scores.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Packed images of other seeds than any MAE here has seen."""
    out = tmp_path_factory.mktemp("fresh") / "packed"
    batches = lenses.simulate("Model_II", 20, seed=5, progress=False)
    simulate.write_packed(out, batches, 20, "Model_II", "fresh")
    return out


@pytest.fixture
def fits(monkeypatch):
    """Every call of `clusters.fit` from now on: (rows read until then, powers, clusters, seed)."""
    calls, read, reader, fit = [], set(), residuals.batch_reader, clusters.fit

    def spying(images, device):
        function = reader(images, device)

        def remember(rows):
            read.update(np.asarray(rows).tolist())
            return function(rows)

        return remember

    def remember(powers, count, seed):
        calls.append((sorted(read), powers, count, seed))
        return fit(powers, count, seed)

    monkeypatch.setattr(residuals, "batch_reader", spying)
    monkeypatch.setattr(clusters, "fit", remember)
    return calls


def powers_of(dataset, path, rows):
    """Powers of the maps of some rows, one image at a time."""
    _, maps_of, _ = residuals.residual_reader(path, dataset, torch.device("cpu"), None, 2, 0)
    with torch.no_grad():
        return np.concatenate(
            [clusters.octave_powers(maps_of([row])[:, 0].numpy()) for row in rows]
        )


def test_images_are_sorted_into_kinds_that_validation_images_show(runs, folder, tmp_path, fits):
    path, out = runs / "pretrain" / "vit-mae-wt.pth", tmp_path / "out"
    process = run_script(
        "reconstruct.py", "--data", folder, "--cache-dir", runs / "cache", "--weights", path,
        "--out", out, "--resamples", 20, "--clusters", 3,
    )  # fmt: skip
    dataset = data.load(folder, runs / "cache")
    parts = data.split(dataset)
    ((read, powers, count, _),) = fits
    assert read == parts["validation"].tolist()
    assert count == 3
    assert powers == pytest.approx(powers_of(dataset, path, parts["validation"]), abs=1e-4)

    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == parts["test"].tolist()
    found = np.array([int(row["cluster"]) for row in rows])
    kinds = clusters.fit(powers, 3, 0)
    expected = clusters.assign(kinds, powers_of(dataset, path, parts["test"]))
    assert (found == expected).mean() > 0.99  # but for rounding
    scores = np.array([float(row["score"]) for row in rows])
    smooth = np.array([row["class"] == "no_sub" for row in rows])
    assert scores[smooth].mean() < scores[~smooth].mean()

    result = json.loads((out / "metrics.json").read_text())
    assert set(result["auc"]) == {"all", "classes"}
    measured = result["clusters"]
    assert list(measured["table"]) == list(dataset.class_names)
    for name, counts in measured["table"].items():
        own = [k for row, k in zip(rows, found, strict=True) if row["class"] == name]
        assert counts == np.bincount(own, minlength=3).tolist()
    _, class_of = clusters.match(found, dataset.labels[parts["test"]], 3, 3)
    right = (class_of[found] == dataset.labels[parts["test"]]).mean()
    accuracy = measured["accuracy"]
    assert accuracy["value"] == pytest.approx(right)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert measured["fitted_on"] == len(parts["validation"])
    assert measured["overlap"] == pytest.approx(kinds.overlap, abs=1e-3)
    said = [line for line in process.stdout.splitlines() if "clusters" in line]
    assert len(said) == 1
    assert f"3 clusters: accuracy {100 * right:.2f} (" in said[0]
    warned = [line for line in process.stderr.splitlines() if "the kinds may be wrong: " in line]
    assert len(warned) == 1
    assert f"{len(parts['validation'])} images" in warned[0]


def test_without_a_split_the_images_themselves_show_the_kinds(runs, fresh, tmp_path, fits):
    path, out = runs / "pretrain" / "vit-mae-wt.pth", tmp_path / "out"
    run_script("reconstruct.py", "--data", fresh, "--weights", path, "--out", out, "--split", "all",
               "--resamples", 5, "--clusters", 2, "--seed", 7)  # fmt: skip
    ((read, powers, count, seed),) = fits
    assert read == list(range(60))
    assert len(powers) == 60
    assert (count, seed) == (2, 7)
    counts = json.loads((out / "metrics.json").read_text())["clusters"]["table"].values()
    assert np.sum(list(counts)) == 60
    assert {len(row) for row in counts} == {2}


def test_scores_are_the_same_with_kinds_and_without(runs, packed):
    dataset = data.load(packed)
    _, maps_of, _ = residuals.residual_reader(
        runs / "pretrain" / "vit-mae-wt.pth", dataset, torch.device("cpu"), None, 2, 0
    )
    rows = np.arange(0, 300, 60)
    scores, _ = residuals.scores_and_powers(maps_of, rows)
    assert np.array_equal(scores, residuals.scores_of(maps_of, rows))


def test_the_study_finds_kinds_in_training_images_alone(runs, folder, fresh, fits, monkeypatch):
    path, dataset = runs / "pretrain" / "vit-mae-wt.pth", data.load(folder, runs / "cache")
    own, unseen = study.Images(folder, dataset), study.Images(fresh, data.load(fresh), "all", "fresh")
    lab = SimpleNamespace(own=own, device=torch.device("cpu"))
    monkeypatch.setattr(study, "CLUSTERED_IMAGES", 100)
    found = []
    for images in (own, unseen):
        result = study.cluster_accuracy(lab, path, images)
        assert set(result) == {"clusters accuracy %"}
        assert 100 / 3 <= result["clusters accuracy %"] <= 100
        found.append(fits.pop())
    read, powers, count, seed = found[0]
    assert len(read) == 100
    assert set(read) <= set(data.split(dataset)["train"].tolist())
    assert (count, seed) == (3, 0)
    assert powers == pytest.approx(powers_of(dataset, path, read), abs=1e-4)
    # Another simulator's images are sorted into the kinds of the study's training images.
    assert np.array_equal(found[1][1], powers)


@pytest.mark.parametrize(("trained_on", "some"), [("all", "all"), ("spiral", "none")])
def test_without_two_kinds_of_images_the_missing_auc_is_explained(
    trained_on, some, runs, packed, tmp_path
):
    path = tmp_path / "mae" / "vit-mae-wt.pth"
    if trained_on == "all":
        pretrain.main([
            "--data", str(packed), "--out", str(path.parent), "--classes", "all", "--epochs", "1",
            *TINY_NETWORK, *TINY_DECODER,
        ])  # fmt: skip
        trained_on = "axion, cdm, no_sub"
    else:  # an MAE of a class that the data does not have
        _, _, content = weights.load_mae(runs / "pretrain" / "vit-mae-wt.pth")
        run = {**content["run"], "classes": [trained_on]}
        weights.save(path, content["model"], content["config"], content["class_names"], run,
                     np.array([1], dtype=np.uint64))  # fmt: skip
    out = tmp_path / "out"
    process = run_script("reconstruct.py", "--data", packed, "--weights", path, "--out", out)
    said = next(line for line in process.stdout.splitlines() if line.startswith("no AUC: "))
    assert f"was trained on {trained_on}, and {some} of the images" in said
    assert set(json.loads((out / "metrics.json").read_text())) == {"made_from"}
    for name in ("scores.csv", "maps.png", "scores.png"):
        assert (out / name).exists()
    process = run_script("reconstruct.py", "--data", packed, "--weights", path, "--out", out,
                         "--clusters", 2, "--resamples", 5)  # fmt: skip
    assert "no AUC: " in process.stdout
    assert "2 clusters: accuracy " in process.stdout
    result = json.loads((out / "metrics.json").read_text())
    assert "auc" not in result
    assert 0 < result["clusters"]["accuracy"]["value"] <= 1


def test_true_masses_are_marked_on_the_maps(runs, packed, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "residual_maps", lambda *arguments: drawn.append(arguments))
    reconstruct.main([
        "--data", str(packed), "--out", str(tmp_path / "out"), "--resamples", "20",
        "--weights", str(runs / "pretrain" / "vit-mae-wt.pth"),
    ])  # fmt: skip
    _, images, residuals, titles, marks = drawn[0]
    assert images.shape == residuals.shape == (9, 64, 64)
    for title, circles in zip(titles, marks, strict=True):
        assert len(circles) == {"axion": 100, "cdm": 25, "no_sub": 0}[title.split(",")[0]]
    # A pixel is 0.101", and the ring of the subhalos 0.25" to 2" away from the centre (31.5, 31.5).
    cdm = np.concatenate([m for t, m in zip(titles, marks, strict=True) if t.startswith("cdm")])
    distance = 0.101 * np.hypot(cdm[:, 0] - 31.5, cdm[:, 1] - 31.5)
    assert 0.25 <= distance.min() < distance.max() <= 2.0
