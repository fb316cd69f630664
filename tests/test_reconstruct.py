"""reconstruct.py and lib/residuals.py: scores, maps and kinds of what an MAE cannot explain."""

import json

import numpy as np
import pytest
import torch
from conftest import read_csv, run_script
from sklearn.metrics import roc_auc_score

from lib import clusters, datasets, plots, residuals, weights
from lib.images import read_image


def run_reconstruct(path, images, out, *more):
    """Run reconstruct.py with the weights at `path`; returns (stdout, stderr, rows of scores.csv)."""
    process = run_script("reconstruct.py", "--data", images, "--weights", path, "--out", out, "--resamples", 20, *more)
    return process.stdout, process.stderr, read_csv(out / "scores.csv")


def test_residuals_are_scored_mapped_and_compared_without_labels(pretrained, packed, tmp_path):
    said, _, rows = run_reconstruct(pretrained, packed, tmp_path)
    assert [int(row["row"]) for row in rows] == datasets.split(datasets.load(packed))["test"].tolist()
    assert all(float(row["score"]) > 0 for row in rows)
    assert list(rows[0]) == ["row", "class", "score"]
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert "clusters" not in result
    assert set(result["auc"]) == {"all", "classes"}
    assert set(result["auc"]["classes"]) == {"axion", "cdm"}
    has_substructure = np.array([row["class"] != "no_sub" for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    value = result["auc"]["all"]["value"]
    assert value == pytest.approx(roc_auc_score(has_substructure, scores), abs=1e-3)
    assert f"{value:.4f}" in said
    for name in ("maps.png", "scores.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_scores_of_a_folder_name_the_files(pretrained, folder, runs, tmp_path):
    """Each row's file holds the image that the row of the data set has."""
    cache = runs / "cache"
    rows = run_reconstruct(pretrained, folder, tmp_path, "--cache-dir", cache, "--clusters", 2)[2]
    assert list(rows[0]) == ["row", "class", "score", "cluster", "file"]
    dataset = datasets.load(folder, cache)
    for row in rows:
        assert row["file"].startswith(f"{folder}/{row['class']}/")
        assert np.array_equal(read_image(row["file"]), dataset.images[int(row["row"])])


@pytest.fixture
def fits(monkeypatch, rows_read):
    """Every call of `clusters.fit` from now on: (rows read until then, powers, clusters, seed)."""
    calls, fit = [], clusters.fit

    def remember(powers, count, seed):
        calls.append((sorted(rows_read), powers, count, seed))
        return fit(powers, count, seed)

    monkeypatch.setattr(clusters, "fit", remember)
    return calls


def powers_of(dataset, path, rows):
    """Powers of the maps of some rows, one image at a time."""
    maps_of, _ = residuals.residual_reader(weights.read(path), dataset, torch.device("cpu"), None, 2, 0)
    with torch.no_grad():
        return np.concatenate([clusters.octave_powers(maps_of([row])[:, 0].numpy()) for row in rows])


def test_images_are_sorted_into_kinds_that_validation_images_show(pretrained, packed, tmp_path, fits):
    said, warned, rows = run_reconstruct(pretrained, packed, tmp_path, "--clusters", 3)
    dataset = datasets.load(packed)
    parts = datasets.split(dataset)
    ((read, powers, count, _),) = fits
    assert read == parts["validation"].tolist()
    assert count == 3
    assert powers == pytest.approx(powers_of(dataset, pretrained, parts["validation"]), abs=1e-4)

    assert [int(row["row"]) for row in rows] == parts["test"].tolist()
    found = np.array([int(row["cluster"]) for row in rows])
    kinds = clusters.fit(powers, 3, 0)
    expected = clusters.assign(kinds, powers_of(dataset, pretrained, parts["test"]))
    assert (found == expected).mean() > 0.99  # but for rounding
    scores = np.array([float(row["score"]) for row in rows])
    smooth = np.array([row["class"] == "no_sub" for row in rows])
    assert scores[smooth].mean() < scores[~smooth].mean()

    result = json.loads((tmp_path / "metrics.json").read_text())
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
    (line,) = [line for line in said.splitlines() if "clusters" in line]
    assert f"3 clusters: accuracy {100 * right:.2f} (" in line
    (line,) = [line for line in warned.splitlines() if "the kinds may be wrong: " in line]
    assert f"{len(parts['validation'])} images" in line


def test_without_a_split_the_images_themselves_show_the_kinds(pretrained, unseen, tmp_path, fits):
    run_reconstruct(pretrained, unseen, tmp_path, "--split", "all", "--clusters", 2, "--seed", 7)
    ((read, powers, count, seed),) = fits
    assert read == list(range(60))
    assert len(powers) == 60
    assert (count, seed) == (2, 7)
    counts = json.loads((tmp_path / "metrics.json").read_text())["clusters"]["table"].values()
    assert np.sum(list(counts)) == 60
    assert {len(row) for row in counts} == {2}


@pytest.mark.parametrize(("classes", "told", "some"),
                         [("all", "axion, cdm, no_sub", "all"), ("spiral", "spiral", "none")])  # fmt: skip
def test_without_two_kinds_of_images_the_missing_auc_is_explained(classes, told, some, pretrained, packed, tmp_path):
    content = weights.read(pretrained).content
    path, out = tmp_path / "w.pth", tmp_path / "out"
    run, nothing = {**content["run"], "classes": [classes]}, np.array([1], dtype=np.uint64)
    weights.save(path, content["model"], content["config"], content["class_names"], run, nothing)
    said, *_ = run_reconstruct(path, packed, out)
    line = next(line for line in said.splitlines() if line.startswith("no AUC: "))
    assert f"was trained on {told}, and {some} of the images" in line
    assert set(json.loads((out / "metrics.json").read_text())) == {"made_from"}
    for name in ("scores.csv", "maps.png", "scores.png"):
        assert (out / name).exists()
    said, *_ = run_reconstruct(path, packed, out, "--clusters", 2)
    assert "no AUC: " in said
    assert "2 clusters: accuracy " in said
    result = json.loads((out / "metrics.json").read_text())
    assert "auc" not in result
    assert 0 < result["clusters"]["accuracy"]["value"] <= 1


def test_true_masses_are_marked_on_the_maps(pretrained, packed, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "residual_maps", lambda *arguments: drawn.append(arguments))
    run_reconstruct(pretrained, packed, tmp_path)
    _, images, residuals, _, titles, marks = drawn[0]
    assert images.shape == residuals.shape == (9, 64, 64)
    for title, circles in zip(titles, marks, strict=True):
        assert len(circles) == {"axion": 100, "cdm": 25, "no_sub": 0}[title.split(",")[0]]
    # A pixel is 0.101", and the ring of the subhalos 0.25" to 2" away from the centre (31.5, 31.5).
    cdm = np.concatenate([m for t, m in zip(titles, marks, strict=True) if t.startswith("cdm")])
    distance = 0.101 * np.hypot(cdm[:, 0] - 31.5, cdm[:, 1] - 31.5)
    assert 0.25 <= distance.min() < distance.max() <= 2.0
