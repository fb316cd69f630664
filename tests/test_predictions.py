"""Predictions of the test part as a table: ours, and somebody else's beside them."""

import csv

import pytest
from conftest import CLASSIFIER, assert_user_error, read_csv, run_script, write_classes

from lib import datasets, predictions
from lib.errors import UserError
from lib.metrics import mcnemar


@pytest.fixture(scope="module")
def evaluated(runs, folder, tmp_path_factory):
    """Function from options to (process, rows of predictions.csv) of an evaluation of `full`."""
    arguments = ("evaluate.py", "--data", folder, "--cache-dir", runs / "cache", "--resamples", 20,
                 "--weights", runs / "full" / CLASSIFIER)  # fmt: skip

    def evaluate(*options, check=True):
        out = tmp_path_factory.mktemp("evaluation")
        process = run_script(*arguments, "--out", out, *options, check=check)
        path = out / "predictions.csv"
        return process, read_csv(path) if path.exists() else None

    return evaluate


@pytest.fixture(scope="module")
def ours(evaluated):
    return evaluated("--save-predictions")[1]


def write(path, rows, columns):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return path


def test_every_test_image_is_there_with_its_file_class_and_probabilities(ours, folder):
    assert {row["run"] for row in ours} == {"full"}
    for row in ours:
        assert row["file"].startswith(str(folder / row["class"]))
        probabilities = {name: float(row[name]) for name in ("axion", "cdm", "no_sub")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert probabilities[row["prediction"]] == max(probabilities.values())


@pytest.mark.parametrize("key", ["row", "file"])
def test_somebody_elses_predictions_stand_in_the_table_and_are_compared(key, evaluated, ours, tmp_path):
    columns = (key, "axion", "cdm", "no_sub")
    same = write(tmp_path / "same.csv", [{"row": "-1", "file": "x"}, *reversed(ours)], columns)
    lines = evaluated("--predictions", same)[0].stdout.splitlines()
    table = {line.split("|")[1].strip(): line.split("|")[2:] for line in lines if line.startswith("|")}
    assert table["same"][:5] == table["full"][:5]
    assert not any(line.startswith("same: its weights") for line in lines)  # it has none
    assert any("full alone is right on 0 images, same alone on 0" in line and "p = 1" in line for line in lines)
    perfect = [{key: row[key], **dict.fromkeys(columns[1:], 0), row["class"]: 1} for row in ours]
    wrong = sum(row["class"] != row["prediction"] for row in ours)
    lines = evaluated("--predictions", write(tmp_path / "best.csv", perfect, columns))[0].stdout.splitlines()
    assert any(f"full alone is right on 0 images, best alone on {wrong}" in line for line in lines)


@pytest.mark.parametrize(("change", "named"), [
    (lambda rows: rows[1:], "lacks 1 of the"), (lambda rows: [*rows, rows[0]], "twice"),
    (lambda rows: [{**rows[0], "cdm": "2"}, *rows[1:]], "sum one"),
    (lambda rows: [{**rows[0], "cdm": "x"}, *rows[1:]], "no probabilities"),
    (lambda rows: [{**rows[0], "cdm": "nan"}, *rows[1:]], "sum one"), (lambda rows: [], "needs the columns"),
])  # fmt: skip
def test_predictions_that_do_not_fit_are_refused(change, named, evaluated, ours, tmp_path):
    path = write(tmp_path / "theirs.csv", change(ours), ("row", "axion", "cdm", "no_sub"))
    assert_user_error(evaluated("--predictions", path, check=False)[0], "theirs.csv", named)


def test_files_of_one_name_in_two_classes_are_not_mixed_up(tmp_path):
    """Predictions of the files of one class were taken for those of the other."""
    write_classes(tmp_path / "d", {"a": 40, "b": 40}, size=8)
    dataset = datasets.load(tmp_path / "d")
    files = datasets.files_of(tmp_path / "d", dataset)
    rows = datasets.split(dataset)["test"]
    lines = [{"file": file, "a": 1, "b": 0} for file in files]
    theirs = write(tmp_path / "p.csv", [line for line in lines if line["file"].parent.name == "a"], ("file", "a", "b"))
    with pytest.raises(UserError, match="lacks"):
        predictions.read(theirs, rows, dataset, tmp_path / "d")
    write(theirs, lines, ("file", "a", "b"))
    theirs.write_text("\ufeff" + theirs.read_text())  # as spreadsheets save it
    assert predictions.read(theirs, rows, dataset, tmp_path / "d").tolist() == [[1, 0]] * len(rows)
    write(theirs, lines[:9], ("a", "b", "file"))
    theirs.write_text(theirs.read_text() + "1")  # a line that ends before its file
    with pytest.raises(UserError, match="lacks"):
        predictions.read(theirs, rows, dataset, tmp_path / "d")


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(3, 10) == pytest.approx(2 * sum([1, 13, 78, 286]) / 2**13)
