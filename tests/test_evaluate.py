"""evaluate.py and lib/report.py: figures of the test part alone, in the data's class order."""

import contextlib
import html
import io
import json

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from conftest import CLASSIFIER, TINY_NETWORK, run_script, write_classes

import evaluate
import finetune
from lib import class_evaluation, datasets, plots, report, tables, weights
from lib.files import sha256_of

LEVELS = ("dark", "grey", "bright")  # each 1 above the one before
SHIFTED = ["grey", "bright", "dark"]  # a turn of the names, which is not its own inverse


@pytest.fixture(scope="module")
def evaluation(runs, folder):
    out = runs / "evaluation"
    files = [runs / n / CLASSIFIER for n in ("head", "full", "scratch")]
    process = run_script("evaluate.py", "--data", folder, "--cache-dir", runs / "cache", "--weights", *files, "--out",
                         out, "--resamples", 50)  # fmt: skip
    return out, process.stdout


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Data whose classes differ in brightness, and a classifier that tells them apart."""
    root = tmp_path_factory.mktemp("levels")
    data = write_classes(root / "data", dict.fromkeys(LEVELS, 60), brighter=True)
    finetune.main(["--data", str(data), "--pretrained", "none", "--strategy", "full", "--out",
                   str(root / "sorted"), "--epochs", "12", "--batch-size", "16", *TINY_NETWORK])  # fmt: skip
    return root


def test_published_figures_stand_beside_images_of_their_own_data_model_alone():
    def rows(origin, side=64, class_names=("axion", "cdm", "no_sub")):
        images = np.zeros((1, side, side), np.float32)
        return class_evaluation.published_rows(
            datasets.Dataset(images, np.zeros(1, int), None, None, class_names, "", origin)
        )

    assert rows("folder dataset") == rows("simulate.py Model_II, 9 a class, seed 0, noise-free") != []
    assert rows("simulate.py Model_III, 9 a class, seed 0, noise-free") == []
    assert rows("simulate.py Model_II, 9 a class, seed 0, noise") == []
    assert rows("8-bit pictures of simulate.py Model_III, 9 a class, seed 0, noise-free") == []
    assert rows("folder dataset", side=150) == []
    assert rows("folder dataset", class_names=("no_sub", "spiral")) == []
    other_lenses = rows("folder dataset", 150, ("no", "sphere", "vort"))
    assert ["rsalehin/DeepLense-GSoC-2026, EqDenseNet-C8", "", "", "", "0.9973", "97.35"] in other_lenses
    assert rows("simulate.py Many_Lenses, 9 a class, seed 0", 150, ("no", "sphere", "vort")) == other_lenses
    assert rows("8-bit pictures of simulate.py Many_Lenses, 9 a class", 150, ("no", "sphere", "vort")) == []
    assert rows("folder dataset", 64, ("no", "sphere", "vort")) == []


def test_evaluation_is_of_the_test_part_alone(evaluation, runs, folder):
    out, printed = evaluation
    content = json.loads((out / "metrics.json").read_text())
    dataset = datasets.load(folder, runs / "cache")
    rows = datasets.split(dataset)["test"]
    model, _ = weights.load_classifier(runs / "full" / CLASSIFIER)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(dataset.images[rows])[:, None])
    probabilities, labels = logits.softmax(1).numpy(), dataset.labels[rows]
    result = content["results"]["full"]
    assert result["images"] == len(rows)
    for k, name in enumerate(dataset.class_names):
        own, others = probabilities[labels == k, k], probabilities[labels != k, k]
        in_order = (own[:, None] > others).mean() + 0.5 * (own[:, None] == others).mean()
        figure = result["auc"][name]
        assert figure["value"] == pytest.approx(in_order, abs=0.005)
        assert figure["low"] <= figure["value"] <= figure["high"]
    right = int((probabilities.argmax(1) == labels).sum())
    assert result["accuracy"]["value"] == pytest.approx(right / len(rows), abs=1e-9)
    assert result["accuracy"]["low"] < right / len(rows) < result["accuracy"]["high"]
    assert np.sum(content["confusion"]["full"]) == len(rows)
    for name in ("roc.png", "confusion_matrix.png", "reliability.png", "mistakes.png"):
        assert (out / name).stat().st_size > 5000
    assert (out / "comparison.md").read_text().strip() in printed
    assert "iampratyusht/Deeplense-task, head | 0.92 | 0.92 | 0.99" in printed


def test_classes_in_another_order_give_the_same_figures(levels):
    """A model's outputs may be in any order; every table has the order of the data."""
    path = levels / "sorted" / CLASSIFIER
    _, content = weights.load_classifier(path)
    order = [content["class_names"].index(name) for name in SHIFTED]
    state = dict(content["model"])
    for name in ("fc.4.weight", "fc.4.bias"):
        state[name] = state[name][order]
    (levels / "shifted").mkdir()
    shifted = levels / "shifted" / CLASSIFIER
    weights.save(shifted, state, content["config"], SHIFTED, content["run"], np.array([1], dtype=np.uint64))

    out = levels / "evaluation"
    process = run_script("evaluate.py", "--data", levels / "data", "--weights", path, shifted,
                         "--out", out, "--resamples", 20)  # fmt: skip
    whole = json.loads((out / "metrics.json").read_text())
    assert whole["class_names"] == sorted(LEVELS)
    assert "| run | AUC bright | AUC dark | AUC grey | macro AUC | accuracy % |" in process.stdout
    dataset = datasets.load(levels / "data")
    counts = np.bincount(dataset.labels[datasets.split(dataset)["test"]])
    for name in ("sorted", "shifted"):
        result = whole["results"][name]
        assert list(result["auc"]) == sorted(LEVELS)
        for class_name in LEVELS:
            assert result["auc"][class_name]["value"] > 0.95, (name, class_name)
        assert result["accuracy"]["value"] > 0.9
        # Nearly all images are on the diagonal, which lies in the order of the data.
        matrix = np.array(whole["confusion"][name])
        assert matrix.sum(axis=1).tolist() == counts.tolist()
        assert np.trace(matrix) > 0.9 * counts.sum()
    assert whole["confusion"]["shifted"] == whole["confusion"]["sorted"]
    assert whole["results"]["shifted"]["calibration_error"] == pytest.approx(
        whole["results"]["sorted"]["calibration_error"], abs=1e-4
    )


def test_figures_are_written_before_they_are_printed(levels, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with contextlib.redirect_stdout(Closed()):
        evaluate.main(["--data", str(levels / "data"), "--out", str(tmp_path / "out"), "--resamples", "5", "--weights",
                       str(levels / "sorted" / CLASSIFIER)])  # fmt: skip
    assert "results" in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "macro AUC" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_report_is_one_file_that_loads_nothing(evaluation, runs):
    out, _ = evaluation
    page = (out / "report.html").read_text()
    figures = json.loads((out / "metrics.json").read_text())["results"]
    for name, result in figures.items():
        assert f"<td>{name}</td>" in page
        assert f"{result['macro']['value']:.4f}" in page
    # ROC, confusion, reliability, mistakes; loss and reconstructions; curves of each run.
    assert page.count("data:image/png;base64,") == 4 + 2 + len(figures)
    config = json.loads((runs / "full" / "config.json").read_text())
    assert html.escape(config["command"]) in page
    for outside in ("http:", "https:", 'src="/', "<script", "<link"):
        assert outside not in page
    assert 'name="viewport"' in page


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_phone_shows_every_number_of_the_reports_table(tmp_path):
    rows = [["run", *(f"AUC class {i}" for i in range(4)), "accuracy %"],
            ["a run with a long name", *["0.9969 (0.9925–0.9996)"] * 5],
            ["of others", "", "0.92", "", "", "99"]]  # fmt: skip
    table = tables.as_html(rows, ["", "best", "published"])
    (tmp_path / "page.html").write_text(
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{report.STYLE}</style>{table}'
    )
    with browser(tmp_path / "profile") as page:
        page.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
        page.go((tmp_path / "page.html").as_uri())
        page.until("document.querySelector('td')")
        cells = page.evaluate(
            "[...document.querySelectorAll('td')].filter((cell) => cell.textContent).map((cell) => {"
            "const { left, right, height } = cell.getBoundingClientRect();"
            "return [cell.textContent, getComputedStyle(cell, '::before').content, left, right, height]; })"
        )
        empty = page.evaluate(
            "[...document.querySelectorAll('td')].filter((cell) => !cell.textContent).map((cell) =>"
            "!cell.getBoundingClientRect().height)"
        )
    assert [cell[0] for cell in cells] == [cell for row in rows[1:] for cell in row if cell]
    assert all(0 <= left < right <= 400 and height for *_, left, right, height in cells)
    assert empty == [True] * 3  # they say nothing
    assert [cell[1] for cell in cells if cell[0] == "99"] == ['"accuracy %"']  # what the number is


def leave_run(folder, start=None, **changed):
    """A folder with weights that started from those in the folder `start`, and their config.json."""
    folder.mkdir()
    source = start / "w.pth" if start else "none"
    run = {"data_fingerprint": "one", "seed": 0, "pretrained_sha256": start and sha256_of(source)}
    content = {"model": {}, "config": {"depth": 2}, "class_names": [], "run": run}
    if start:
        content["config"]["num_classes"] = 3
    torch.save(content | {"seen": torch.zeros(0, dtype=torch.int64)}, folder / "w.pth")
    config = {"command": f"python {folder.name}", "options": {"pretrained": str(source), "seed": 0},
              "data": {"fingerprint": "one"}, "model": content["config"]} | changed  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "curves.png").write_bytes(b"a picture")
    return weights.read(folder / "w.pth")


def test_the_report_finds_the_pretraining_behind_a_continued_classifier(tmp_path):
    pretrain = leave_run(tmp_path / "pretrain")
    leave_run(tmp_path / "head", tmp_path / "pretrain")
    norms = leave_run(tmp_path / "norms", tmp_path / "head")
    assert report.pretraining_behind(norms)[0].path == pretrain.path
    assert report.pretraining_behind(pretrain) == (None, "")
    whole = torch.load(pretrain.path, weights_only=True)
    for content, said in ((whole | {"class_names": ["another training"]}, "replaced"),
                          ("others", f"{pretrain.path}, from which it started, cannot be read")):  # fmt: skip
        torch.save(content, pretrain.path)
        source, sentence = report.pretraining_behind(norms)
        assert source is None and said in sentence


@pytest.mark.parametrize(
    "changed", [{"data": {"fingerprint": "other"}}, {"model": {"depth": 3}}, {"options": {"seed": 1}},
                {"transform": {"kind": "log"}}, {}],
)  # fmt: skip
def test_the_report_shows_only_what_belongs_to_the_weights(changed, tmp_path):
    """Weights were copied beside the config.json and the curves of others."""
    shown = "".join(report.described(leave_run(tmp_path / "run", **changed), {"curves": "Loss"}))
    assert ("base64" in shown) is ("python run" in shown) is (not changed)
    assert ("No config.json of these weights" in shown) is bool(changed)


def test_a_picture_that_fails_leaves_none_of_an_earlier_call(tmp_path, capsys):
    """The report of one classifier showed the curves of another."""
    def fails(*_):
        raise RuntimeError("no LaTeX here")

    (tmp_path / "roc.png").write_bytes(b"of an earlier classifier")
    plots.attempt(fails, tmp_path / "roc.png", {})
    assert not (tmp_path / "roc.png").exists()
    assert "no LaTeX here" in capsys.readouterr().err
    assert report.picture(tmp_path / "roc.png", "ROC") == ""


def test_a_class_that_is_refused_too_often_is_named():
    """The 1 % held on average: a rare class was refused, and no figure showed it."""
    labels = np.repeat([0, 1, 2], [2000, 10, 2000])
    familiarity = np.full(4010, 0.5, np.float32)
    familiarity[:25], familiarity[2000:2002], familiarity[2010:2070] = 0.001, 0.001, 0.001
    args = evaluate.parse_args(["--data", "d", "--weights", "w", "--out", "o", "--resamples", "2"])
    guard = class_evaluation.Guard(4000)
    prediction = class_evaluation.Prediction(labels, labels, np.eye(3)[labels], familiarity, guard)
    result = class_evaluation.results_of(prediction, ["a", "b", "c"], args)
    assert result["unfamiliar_by_class"] == {"a": 0.0125, "b": 0.2, "c": 0.03}
    assert result["refused_too_often"] == ["b", "c"]  # 25 of 2,000 is chance, 2 of 10 and 60 are none
    said = class_evaluation.about_results({"run": result}, {"run"})
    assert "(1.25% of a, 20.00% of b, 3.00% of c)" in said[0]
    assert [line.split(" are ")[0] for line in said[1:3]] == ["run: of b 20.00%", "run: of c 3.00%"]


def test_weights_of_different_data_are_told_apart(levels, tmp_path):
    path = levels / "sorted" / CLASSIFIER
    content = torch.load(path, weights_only=True)
    for name, fingerprint in (("same", content["run"]["data_fingerprint"]), ("other", "x")):
        torch.save(content | {"run": content["run"] | {"data_fingerprint": fingerprint}}, tmp_path / f"{name}.pth")
        process = run_script("evaluate.py", "--data", levels / "data", "--weights", path, tmp_path / f"{name}.pth",
                             "--out", tmp_path / "out", "--resamples", 5)  # fmt: skip
        assert ("trained on different data" in process.stderr) == (name == "other")
