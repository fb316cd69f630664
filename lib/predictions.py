"""Predictions of a test part as a CSV: ours are written, those of others are read and compared."""

import csv
from pathlib import Path

import numpy as np

from lib.datasets import files_of
from lib.errors import UserError
from lib.files import write_csv
from lib.metrics import mcnemar

NOT_ONE = 1e-3  # how far the sum of an image's probabilities may be from one, since tables round


def write(path, predictions, dataset, folder):
    """A line for each run and image: its row, its file (in data of a folder), class, probabilities, prediction.

    predictions : {run: `class_evaluation.Prediction`}.
    """
    names, files = dataset.class_names, files_of(Path(folder), dataset)
    lines = [["run", "row", *(["file"] if files else []), "class", *names, "prediction"]]
    for run, p in predictions.items():
        for row, label, each in zip(p.rows, p.labels, p.probabilities, strict=True):
            file = [str(files[row])] if files else []
            lines.append([run, str(row), *file, names[label], *(f"{x:.6f}" for x in each), names[each.argmax()]])
    write_csv(path, lines)


def read(path, rows, dataset, folder):
    """Probabilities (n, classes) that a CSV gives for `rows`, with the columns file or row and the class names.

    Other lines of the CSV do not count. Raises UserError, naming the file, if columns or images are missing, an
    image is there twice, or numbers are no probabilities.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read --predictions {path}: {error}") from None
    columns, names = (table[0].keys() if table else ()), dataset.class_names
    missing = [name for name in names if name not in columns]
    files = files_of(Path(folder), dataset)
    key = "row" if "row" in columns or not files else "file"
    if missing or key not in columns:
        wanted = ", ".join(["row or file" if files else "row", *names])
        raise UserError(f"--predictions {path} needs the columns {wanted}")
    name_of = str if key == "row" else shortest_name(files)
    wanted = [name_of(row if key == "row" else files[row]) for row in rows]
    line_of = {}
    for line in table:
        name = name_of(line[key] or "")  # a line may end early
        if line_of.setdefault(name, line) is not line:
            raise UserError(f"--predictions {path} has {line[key]} twice: give one model's predictions")
    absent = [name for name in wanted if name not in line_of]
    if absent:
        raise UserError(
            f"--predictions {path} lacks {len(absent)} of the {len(rows)} test images, such as {absent[0]}"
        )
    try:
        probabilities = np.array([[float(line_of[name][c]) for c in names] for name in wanted])
    except (TypeError, ValueError):
        raise UserError(f"--predictions {path} has cells that are no probabilities") from None
    sums = probabilities.sum(axis=1)
    if not (np.isfinite(probabilities).all() and probabilities.min() >= 0 and np.abs(sums - 1).max() <= NOT_ONE):
        raise UserError(f"--predictions {path}: the probabilities of an image must be positive, with the sum one")
    return probabilities


def shortest_name(files):
    """Function from a path to as many of its last parts as tell all `files` of a data set apart.

    A table may come from another folder. Names alone would mix up the files of two classes.
    """
    for parts in range(1, 4):  # the file, its class, its part
        if len({file.parts[-parts:] for file in files}) == len(files):
            break
    return lambda path: "/".join(Path(path).parts[-parts:])


def compared(ours, theirs, labels, names):
    """A line on which of two classifiers is better on the same images: McNemar's exact test.

    ours, theirs : probabilities (n, classes). names : of the two.
    """
    right = [p.argmax(axis=1) == labels for p in (ours, theirs)]
    only_ours, only_theirs = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return (
        f"{names[0]} alone is right on {only_ours} images, {names[1]} alone on {only_theirs}: McNemar's exact "
        f"test, p = {mcnemar(only_ours, only_theirs):.3g}"
    )
