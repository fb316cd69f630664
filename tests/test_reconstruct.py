"""reconstruct.py and lib/residuals.py: scores and maps of what an MAE cannot explain."""

import csv
import json

import numpy as np
import pytest
from conftest import TINY_DECODER, TINY_NETWORK, run_script
from sklearn.metrics import roc_auc_score

import pretrain
import reconstruct
from lib import data, plots, weights


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
    assert set(result["auc"]) == {"all", "classes"}
    assert set(result["auc"]["classes"]) == {"axion", "cdm"}
    has_substructure = np.array([row["class"] != "no_sub" for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    expected = roc_auc_score(has_substructure, scores)
    assert result["auc"]["all"]["value"] == pytest.approx(expected, abs=1e-3)
    assert f"{result['auc']['all']['value']:.4f}" in process.stdout
    for name in ("maps.png", "scores.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000


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
    assert not (out / "metrics.json").exists()
    for name in ("scores.csv", "maps.png", "scores.png"):
        assert (out / name).exists()


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
