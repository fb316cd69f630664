"""The study: every experiment runs, nothing is trained twice, results say what they are."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_NETWORK

import pretrain
import simulate
import study
import train

TINY = {
    "SCRATCH_EPOCHS": 2, "LABEL_SHARES": (0.2, 1.0), "ROBUSTNESS_PER_CLASS": 8,
    "MISTAKES_PER_CLASS": 40, "STRENGTH_BINS": 2, "OTHER_EPOCHS": (1, 1, 1),
    "OTHER_MODELS": (("Model_III", 20, True, 8),),
}  # fmt: skip


@pytest.fixture
def tiny_study(packed, tmp_path, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(study, name, value)
    network = " ".join(TINY_NETWORK)

    def main(*arguments):
        study.main([str(a) for a in (
            "--data", packed, "--out", tmp_path / "runs", "--results", tmp_path / "results",
            "--precision", "float32", "--pretraining",
            f"--epochs 1 {network} {' '.join(TINY_DECODER)}", "--finetuning",
            f"--epochs 1 {network}", *arguments)])  # fmt: skip
        return tmp_path / "results"

    return main


def test_every_experiment_leaves_its_rows_its_picture_and_its_table(tiny_study, packed):
    results = tiny_study("--seeds", 0, "--unseen", packed)
    tables = (results / "tables.md").read_text()
    for name in study.EXPERIMENTS:
        kept = json.loads((results / f"{name}.json").read_text())
        assert kept["rows"], name
        assert (results / f"{name}.png").stat().st_size > 5000
        assert f"## {name}" in tables
        assert f"--only {name} --seeds 0" in kept["command"]
        for row in kept["rows"]:
            for key, value in row.items():
                if "AUC" in key:
                    assert 0 <= value <= 1, (name, key)
                if "%" in key:
                    assert 0 <= value <= 100, (name, key)
            assert row["run"] in tables


def test_runs_that_are_there_are_not_repeated(tiny_study, tmp_path, monkeypatch):
    results = tiny_study("--seeds", 0, 1, "--only", "without_labels")
    first = json.loads((results / "without_labels.json").read_text())["rows"]
    assert len(first) == 2
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", None)  # training again would fail
        tiny_study("--seeds", 0, 1, "--only", "without_labels")
    assert json.loads((results / "without_labels.json").read_text())["rows"] == first
    weights = tmp_path / "runs" / "base" / "seed0" / "pretrain" / "vit-mae-wt.pth"
    before = weights.read_bytes()
    tiny_study("--seeds", 0, "--only", "without_labels", "--pretraining",
               f"--epochs 2 {' '.join(TINY_NETWORK)}")  # fmt: skip
    assert weights.read_bytes() != before


def test_tables_have_mean_and_deviation_over_seeds():
    rows = [{"run": "a", "seed": s, "PSF 20 %: AUC": v, "accuracy %": 90.0 + s, "kind": "x"}
            for s, v in ((0, 0.98), (1, 0.99), (2, 1.0))]  # fmt: skip
    assert study.table(rows).splitlines() == [
        "| run | PSF 20 %: AUC | accuracy % |",
        "| --- | --- | --- |",
        "| a | 0.99000 ± 0.01000 | 91.00 ± 1.00 |",
    ]


def test_pretraining_on_all_classes_takes_as_many_steps_as_on_one(packed, tmp_path, monkeypatch):
    trained_for = []
    monkeypatch.setattr(pretrain, "FEWEST_STEPS", 12)  # one step an epoch: 80 smooth lenses
    monkeypatch.setattr(study, "chain", lambda lab, *_, pretraining=(), **__: (
        trained_for.append(pretraining[pretraining.index("--epochs") + 1] if pretraining else None),
        {"macro AUC": 1.0})[1])  # fmt: skip
    study.main(["--data", str(packed), "--out", str(tmp_path / "s"), "--results",
                str(tmp_path / "r"), "--seeds", "0", "--only", "pretraining_images",
                "--precision", "float32"])  # fmt: skip
    assert trained_for == [None, 4]  # of a usual 12, on three times as many images


def test_strengths_belong_to_the_images(monkeypatch):
    monkeypatch.setattr(study, "MISTAKES_PER_CLASS", 6)
    strengths = study.substructure_strengths()
    images = {n: i for n, i, _ in simulate.simulate("Model_II", 6, study.FRESH_SEED + 1)}
    ((_, (source, masses, axion_mass)),) = simulate.draw("axion", 6, study.FRESH_SEED + 1)
    assert np.array_equal(strengths["axion"][1], np.log10(axion_mass))
    again = 2 * simulate.render(source, masses, dtype=torch.float32)
    assert np.allclose(again, images["axion"], rtol=1e-4)
    assert np.isfinite(strengths["cdm"][1]).all()
    assert (strengths["cdm"][1] < 11.5).all()
