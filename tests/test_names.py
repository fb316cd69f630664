"""Names of classes and runs are data: no name changes a figure, breaks a table or costs a result.

Names that mean something else, or that tables cannot hold, are no names of classes.
"""

import html
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSIFIER, PRETRAINED, assert_refused, read_csv, run_script, write_classes
from matplotlib import pyplot as plt
from test_predict_inputs import MEAN, write_model

import evaluate
from lib import datasets, onnxfile, plots, sheet, tables, weights
from lib.errors import UserError
from lib.residuals import aucs_of
from predict import Answer

NAMES = ("accuracy", "macro", "images", "calibration_error", "a|b 'c' \"d\"", "$x^{$", "frac$1", "2",
         "_under <b>", "Ünï 透鏡", "long " * 40 + "name")  # fmt: skip
REFUSED = ("All", "ALL", "none", "unfamiliar", "FILE", "prediction", "familiarity", "residual", "row", "label",
           "class", "score", "cluster", "run", "Low", "high", "log10_mass", "nan", "NA", "", " ", " a", "a ", "a,b",
           "a/b", "a\\b", "=1+1", "+a", "-a", "@a", "two\nlines", "return\r", "tab\t", "\x1b[31m", "a\0b", "a\u200bb",
           "\udce9", "B", "b")  # fmt: skip
NETWORK = ("--patch-size", 16, "--embed-dim", 16, "--depth", 1, "--num-heads", 2)
RUN = ("--epochs", 1, "--batch-size", 16, "--precision", "float32", "--quiet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set with such classes, an MAE of the first, and two classifiers in folders `run`."""
    out = tmp_path_factory.mktemp("names")
    data = ("--data", write_classes(out / "data", dict.fromkeys(NAMES, 110), brighter=True))
    run_script("pretrain.py", *data, *NETWORK, *RUN, "--classes", "macro", "--out", out / "mae",
               "--decoder-embed-dim", 16, "--decoder-num-heads", 2)  # fmt: skip
    for parent in ("a", "b"):
        run_script("finetune.py", *data, *NETWORK, *RUN, "--pretrained", "none", "--strategy",
                   "full", "--out", out / parent / "run $|")  # fmt: skip
    return out


def weights_of(place, *parents):
    return [place / parent / "run $|" / CLASSIFIER for parent in parents]


@pytest.fixture(scope="module")
def evaluation(place):
    out = place / "evaluation"
    process = run_script("evaluate.py", "--data", place / "data", "--resamples", 5, "--weights",
                         *weights_of(place, "a", "b"), "--out", out)  # fmt: skip
    assert "not shown" not in process.stderr
    return out


def test_a_class_does_not_replace_a_figure_of_its_name(evaluation, place):
    results = json.loads((evaluation / "metrics.json").read_text())["results"]
    assert list(results) == [str(path) for path in weights_of(place, "a", "b")]
    for result in results.values():
        assert set(result["auc"]) == set(NAMES)
        aucs = [figure["value"] for figure in result["auc"].values()]
        assert result["macro"]["value"] == pytest.approx(np.mean(aucs))
        assert result["accuracy"]["value"] != result["auc"]["accuracy"]["value"]
        assert 60 < result["images"] < 180
        assert isinstance(result["calibration_error"], float)


def test_tables_report_and_pictures_show_names_as_they_are(evaluation):
    lines = (evaluation / "comparison.md").read_text().strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) == len(NAMES) + 5, line
    assert "AUC a\\|b 'c' \"d\"" in lines[0]
    page = (evaluation / "report.html").read_text()
    assert "AUC _under &lt;b&gt;" in page
    assert "<b>" not in page.replace("Best macro AUC: <b>", "")
    assert html.escape("run $|") in page
    for name in ("roc.png", "confusion_matrix.png", "reliability.png", "mistakes.png"):
        assert (evaluation / name).stat().st_size > 5000


def test_scores_and_residual_figures_keep_the_names(place):
    out = place / "residuals"
    process = run_script("reconstruct.py", "--data", place / "data", "--weights",
                         place / "mae" / PRETRAINED, "--out", out, "--resamples", 5)  # fmt: skip
    assert "not shown" not in process.stderr
    rows = read_csv(out / "scores.csv")
    assert {row["class"] for row in rows} == set(NAMES)
    assert all(float(row["score"]) > 0 and None not in row for row in rows)
    auc = json.loads((out / "metrics.json").read_text())["auc"]
    assert set(auc) == {"all", "classes"}
    assert set(auc["classes"]) == set(NAMES) - {"macro"}
    assert (out / "scores.png").exists()
    assert (out / "maps.png").exists()


def test_a_class_called_all_is_the_one_that_the_option_means(tmp_path):
    """Without such a class, `--classes all` means every class."""
    counts = {}
    for first in ("all", "axion"):
        data = write_classes(tmp_path / first / "data", {first: 30, "cdm": 30, "no_sub": 30})
        run_script("pretrain.py", "--data", data, *NETWORK, *RUN, "--classes", "all", "--out", tmp_path / first / "mae",
                   "--decoder-embed-dim", 16, "--decoder-num-heads", 2)  # fmt: skip
        opened = weights.read(tmp_path / first / "mae" / PRETRAINED)
        counts[first] = len(opened.content["seen"])
        run_script("reconstruct.py", "--data", data, "--weights", opened.path, "--out", tmp_path / first / "maps",
                   "--resamples", 5)  # fmt: skip
        said = json.loads((tmp_path / first / "maps" / "metrics.json").read_text())
        assert ("auc" in said) == (first == "all"), "smooth lenses are compared with the others"
    assert counts["all"] <= 30 < counts["axion"]


def test_all_is_the_figure_of_all_whatever_the_classes_are_called():
    labels = np.repeat([0, 1, 2], 20)
    scores = np.where(labels == 0, 0.5, np.where(labels == 1, 1.0, 0.0))
    auc = aucs_of(scores, labels > 0, labels, ["smooth", "all", "other"], 5, 0)
    assert auc["all"]["value"] == 0.5
    assert auc["classes"]["all"]["value"] == 1.0


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_means_something_else_is_refused_wherever_classes_come_from(name, place, tmp_path):
    """In class folders, a packed data set, weights and exported files; "B" and "b" meet a class "b"."""
    names = [name, "b" if name == "B" else "B" if name == "b" else "other"]
    if name and "/" not in name and "\0" not in name:
        write_classes(tmp_path / "data", dict.fromkeys(names, 3))
        arguments = ("--data", tmp_path / "data", "--out", tmp_path / "run", f"--classes={name}")
        assert_refused("pretrain.py", arguments, tmp_path / "data", "rename")
        assert not (tmp_path / "run").exists()
    for kind, path in made_with(names, place, tmp_path).items():
        opened = {"packed": datasets.load, "weights": weights.read, "onnx": onnxfile.open_classifier}[kind]
        with pytest.raises(UserError, match=re.escape(str(path))):
            opened(path)


def made_with(names, place, folder):
    """{kind: path} of what holds class names, with other names."""
    packed = shutil.copytree(next((place / "data" / ".packed").iterdir()), folder / "packed")
    description = json.loads((packed / "dataset.json").read_text())
    (packed / "dataset.json").write_text(json.dumps(description | {"class_names": [*names, *NAMES[2:]]}))
    content = torch.load(weights_of(place, "a")[0], weights_only=True)
    torch.save(content | {"class_names": names}, folder / "w.pth")
    nodes = [MEAN, ("Reshape", ["mean", "one_axis"], ["one"]), ("MatMul", ["one", "weights"], ["probabilities"])]
    write_model(folder / "c.onnx", {"probabilities": ["n", 2]}, nodes, class_names=names)
    return {"packed": packed, "weights": folder / "w.pth", "onnx": folder / "c.onnx"}


def test_a_run_given_twice_is_refused(place, tmp_path):
    (file,) = weights_of(place, "a")
    link = tmp_path / "link.pth"
    link.symlink_to(file)
    for again in (file, link):
        arguments = ("--data", place / "data", "--weights", file, again, "--out", tmp_path / "out")
        assert_refused("evaluate.py", arguments, "--weights", "twice")
        assert not list(tmp_path.glob("out/*"))


def test_runs_have_different_names(tmp_path, monkeypatch):
    for folder in ("run", "x/run", "x/w.pth"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "w.pth").touch()
    monkeypatch.chdir(tmp_path / "run")
    paths = [tmp_path.__class__(p) for p in ("w.pth", "../x/run/w.pth", "../x/w.pth/w.pth")]
    assert len(set(evaluate.names_of_runs(paths))) == 3


def test_pictures_that_fail_cost_no_result(place, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no\nfont")

    pictures = "roc_curves", "confusion_matrices", "reliability", "mistakes"
    for broken in pictures:
        monkeypatch.setattr(plots, broken, fail)
    process = run_script("evaluate.py", "--data", place / "data", "--resamples", 2, "--weights",
                         *weights_of(place, "a"), "--out", tmp_path)  # fmt: skip
    assert process.stderr.splitlines()[-4:] == 4 * ["not shown (fail): no"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"metrics.json", "comparison.md", "report.html", "familiarity.png"}


def test_a_cell_of_markdown_is_plain_text():
    line = tables.markdown([["run"], ["a|b <i> `c` *d* [e](f) g\\|h"]]).splitlines()[2]
    assert line == "| a\\|b \\<i> \\`c\\` \\*d\\* \\[e](f) g\\\\\\|h |"


@pytest.mark.parametrize("name", ["$x^{$", "\\$", "_", "a$b$", "x" * 5000, "a\nb", "\udcff"])
def test_a_label_is_plain_text(name):
    label = plots.label_of(name)
    figure, axes = plt.subplots()
    axes.plot([0], label=label)
    (shown,) = axes.legend().get_texts()
    figure.canvas.draw()
    assert shown._preprocess_math(shown.get_text())[1] is False
    assert len(label) <= plots.LONGEST_LABEL + name.count("$") + 1
    assert "\n" not in label
    plt.close(figure)


def test_names_reach_the_sheet_as_they_are(drawn):
    answer = Answer("folder/a$b$.npy", np.zeros((1, 8, 8), np.float32), [0.9, 0.1], "c$m$", None, None)
    assert sheet.draw("s", [answer], ["c$m$", "other"], None, None) is None
    title = drawn["s"].axes[0].title
    assert title.get_text() == "a\\$b\\$.npy\nc\\$m\\$"  # what matplotlib draws as a$b$.npy
    assert title.get_color() == "black"


def test_every_residual_is_image_minus_prediction(drawn):
    image = np.ones((1, 1, 4, 4))
    plots.reconstructions("r", image, image, image - 0.25, ["a"])
    plots.residual_maps("m", image[0], image[0] * 0.25, 0.5, ["a"])
    answer = Answer("n", image[0], np.ones(1), "a", None, None, image[0, 0] * 0.25)
    plots.contact_sheet("s", [answer], ["a"], 0.5)
    panels = {path: [a for a in f.axes if a.images] for path, f in drawn.items()}
    assert np.all(panels["r"][3].images[0].get_array() == 0.25)
    assert np.all(panels["m"][1].images[0].get_array() == 0.5)
    for figure in drawn.values():
        labels = {axes.get_ylabel() for axes in figure.axes} | {a.get_xlabel() for a in figure.axes}
        assert plots.RESIDUAL in labels or any(label.startswith(plots.SIGMAS) for label in labels)
