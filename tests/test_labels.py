"""A table labels.csv in place of class folders: the same data set, and one line for whatever is wrong in it."""

import os

import numpy as np
import pytest
from conftest import assert_refused, run_script, write_classes

from lib import datasets, listing


def flat(root, seed=0):
    """A folder of images 00.npy, ..., and its table: they are of the classes a and b in turn."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(12):
        np.save(root / "images" / f"{i:02d}.npy", rng.random((8, 8)))
    lines = ["file,label", *(f"images/{i:02d}.npy,{'ab'[i % 2]}" for i in range(12))]
    (root / "labels.csv").write_text("\n".join(lines))
    return root


def test_a_table_gives_the_data_set_of_class_folders(tmp_path):
    folders = write_classes(tmp_path / "folders", {"b": 6, "a": 6}, size=8)
    root = tmp_path / "d"
    root.mkdir()
    lines = ["label,file"]  # in any order
    for path in sorted(folders.rglob("*.npy"), reverse=True):
        name = f"{path.parent.name}{path.name}"
        os.link(path, root / name)
        lines.append(f"{path.parent.name},./{name}")
    (root / "labels.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    (root / "Zeichnung.npy").touch()
    said = run_script("data.py", "--data", root)
    assert "1 other files were not read: Zeichnung.npy" in said.stderr
    ours, theirs = datasets.load(root), datasets.load(folders)
    assert ours.class_names == ("a", "b") and ours.fingerprint == theirs.fingerprint
    assert [file.name for file in datasets.files_of(root, ours)[:2]] == ["a000.npy", "a001.npy"]


def test_another_label_makes_another_data_set(tmp_path):
    root = flat(tmp_path / "d")
    before = datasets.load(root)
    table = root / "labels.csv"
    table.write_text(table.read_text().replace("00.npy,a", "00.npy,b"))
    assert datasets.load(root).labels.sum() == before.labels.sum() + 1


def test_tables_in_folders_of_parts_keep_the_parts(tmp_path):
    for seed, part in enumerate(("train", "val")):
        flat(tmp_path / "d" / part, seed)
    dataset = datasets.load(tmp_path / "d")
    assert len(dataset.images) == 24
    files = datasets.files_of(tmp_path / "d", dataset)
    assert {files[row].parts[-3] for row in datasets.split(dataset)["test"]} == {"val"}


@pytest.mark.parametrize(("lines", "named"), [
    (["file,label", "images/00.npy,a", "images/99.npy,a"], "line 3: there is no file"),
    (["file,label", "images,a"], "line 2: there is no file"),
    (["file,label", f"{'x' * 5000}.npy,a"], "line 2: there is no file"),
    (["file,label", "../d/images/00.npy,a"], "line 2: ../d/images/00.npy is outside"),
    (["file,label", "/etc/hostname,a"], "line 2: /etc/hostname is outside"),
    (["file,label", "images/00.npy,a", "./images/00.npy,b"], "line 3: ./images/00.npy is there twice"),
    (["file,label", "labels.csv,a"], "line 2: labels.csv is no .npy, .npz, FITS or PNG file"),
    (["file,label", "images/00.npy,"], "must not be empty"),
    (["file,label", "images/00.npy,none"], "called 'none'"),
    (["file,label", "images/00.npy,A", "images/01.npy,a"], "upper and lower case"),
    (["file,label", "images/00.npy, a"], "begin or end with a space"),
    (["file,label", "images/00.npy,a,1"], "line 2: expected a file and its label, got 3 cells"),
    (["file,label", "images/00.npy"], "line 2: expected a file and its label, got 1 cells"),
    (["name,class", "images/00.npy,a"], "has the columns name, class: expected file,label"),
    (["file,label,score"], "has the columns file, label, score: expected file,label"),
    (["file,label"], "lists no files"),
    ([""], "has the columns (none)"),
    (["file,label", '"images/00.npy,a'], "must be a table in UTF-8"),
    (["file,label", "a\0b.npy,a"], ""),
    (["file,label", "\udcff.npy,a"], "must be a table in UTF-8"),
])  # fmt: skip
def test_whatever_is_wrong_is_one_line_that_names_it(lines, named, tmp_path):
    root = flat(tmp_path / "d")
    (root / "labels.csv").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert_refused("data.py", ["--data", root], root / "labels.csv", named)


def test_a_huge_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MAX_LABELS_BYTES", 10)
    assert_refused("data.py", ["--data", flat(tmp_path / "d")], "is it a table of files and labels?")
