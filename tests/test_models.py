"""The networks of models/: what they answer, that they are what their card says, and the notebook that shows them."""

import hashlib
import json
import re

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT, read_csv, run_script

from lib import lenses, plots, weights
from lib.images import read_image

MODELS = ROOT / "models"
CLASSES = ("axion", "cdm", "no_sub")


def test_checksums_are_those_of_the_files():
    lines = (MODELS / "SHA256SUMS").read_text().split("\n")[:-1]
    named = {name: digest for digest, name in (line.split() for line in lines)}
    assert set(named) == {path.name for kind in ("*.onnx", "*.pth") for path in MODELS.glob(kind)}
    for name, digest in named.items():
        assert hashlib.sha256((MODELS / name).read_bytes()).hexdigest() == digest


def test_the_examples_are_classified_rightly_without_an_option(tmp_path):
    run_script("predict.py", "--out", tmp_path / "p.csv", MODELS / "examples")
    rows = read_csv(tmp_path / "p.csv")
    assert len(rows) == 12
    for row in rows:
        folder = row["file"].split("/")[-2] if "with_noise" not in row["file"] else "unfamiliar"
        assert row["prediction"] == folder
        assert float(row["residual"]) > 0
    smooth = [float(row["residual"]) for row in rows if row["prediction"] == "no_sub"]
    others = [float(row["residual"]) for row in rows if row["prediction"] in ("axion", "cdm")]
    assert max(smooth) < min(others)


def test_freshly_simulated_images_are_classified_as_the_card_says(tmp_path):
    """Of 900 images of a seed that no training saw at most 9 are wrong, refused ones apart: the card says fewer."""
    for name, images, _ in lenses.simulate("Model_II", 300, seed=77, progress=False):
        np.save(tmp_path / f"{name}.npy", images)
    run_script("predict.py", "--out", tmp_path / "p.csv", *(tmp_path / f"{name}.npy" for name in CLASSES))
    rows = read_csv(tmp_path / "p.csv")
    answered = [row for row in rows if row["prediction"] != "unfamiliar"]
    assert len(answered) >= 0.97 * len(rows)
    assert sum(not row["file"].split("/")[-1].startswith(row["prediction"]) for row in answered) <= 9


def test_maps_of_the_examples_lie_within_the_scale_of_their_colours():
    """At most 1 % of the pixels of a typical lens with substructure are saturated."""
    session = onnxruntime.InferenceSession(MODELS / "reconstruction.onnx")
    sigma = json.loads(session.get_modelmeta().custom_metadata_map["smooth_rms"])
    for kind in ("axion", "cdm"):
        images = np.stack([read_image(path) for path in sorted((MODELS / "examples" / kind).glob("*.npy"))])
        maps, _ = session.run(None, {"images": images[:, None]})
        assert np.median((np.abs(maps / sigma) > plots.MOST_SIGMAS).mean(axis=(1, 2, 3))) <= 0.01


def test_weights_are_of_one_training_and_say_where_they_come_from():
    mae, classifier = (weights.read(MODELS / f"vit-mae-{name}wt.pth") for name in ("", "classifier-"))
    assert classifier.content["run"]["pretrained_sha256"] == mae.sha256
    assert classifier.content["run"]["strategy"] == "residual"
    card = (MODELS / "README.md").read_text()
    for opened in (mae, classifier):
        run = opened.content["run"]
        assert run["pixel_scale"] == 0.101
        assert re.search(rf"commit `{run['made']['commit'][:7]}", card)


def test_the_notebook_runs(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "examples" / "explore.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102
    assert names["embedding"].shape == (12, 128)
    assert names["probabilities"].shape == (12, 3)
    assert [p.argmax().item() for p in names["probabilities"][:9]] == [0] * 3 + [1] * 3 + [2] * 3
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("pinned", (ROOT / "requirements-predict.txt").read_text().splitlines()[1:])
def test_the_small_environment_has_the_versions_of_the_large_one(pinned):
    assert pinned in (ROOT / "requirements.txt").read_text().splitlines()
