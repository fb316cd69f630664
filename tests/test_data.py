"""From folder to packed array to split: nothing changes, nothing leaks, mistakes are named."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import HUNG, ROOT, assert_user_error, bound_by_permissions, run_python, run_script, write_classes

from lib import datasets, listing
from lib.errors import UserError
from lib.images import read_image


def test_a_folder_is_packed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "d", {"a": 3, "b": 3})
    before = datasets.load(root)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "pack", None)  # packing again would fail
        assert datasets.load(root).fingerprint == before.fingerprint
    np.save(root / "a" / "001.npy", np.zeros((16, 16)))
    after = datasets.load(root)
    assert after.fingerprint != before.fingerprint
    assert not after.images[1].any()
    assert len(list((root / ".packed").iterdir())) == 2  # nothing is deleted


def test_two_processes_packing_at_once_give_one_good_cache(tmp_path):
    root = write_classes(tmp_path / "d", {"a": 300, "b": 300})
    code = "import sys; from lib import datasets, listing; datasets.load(sys.argv[1])"
    command = [sys.executable, "-c", code, root]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=HUNG)
        assert process.returncode == 0, error
    assert [f.name for f in (root / ".packed").iterdir() if f.suffix == ".tmp"] == []
    assert len(datasets.load(root).labels) == 600


@pytest.mark.parametrize("inside", [".", "a", "a/deep", "new/deep"])
def test_a_cache_inside_the_data_is_refused(inside, tmp_path):
    """The next command would take it for a class or for images."""
    root = write_classes(tmp_path / "d", {"a": 3, "b": 3})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--cache-dir .* part of the data: choose another"):
        datasets.load(root, root / inside)
    assert sorted(tmp_path.rglob("*")) == before


def test_split_is_complete_and_has_its_shares_of_every_class(tmp_path):
    dataset = datasets.load(write_classes(tmp_path / "d", {"a": 1000, "b": 1000}, size=4))
    parts = datasets.split(dataset)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(2000))
    for part, count in (("train", 800), ("validation", 100), ("test", 100)):
        deviation = np.sqrt(count * (1 - count / 1000))
        assert np.abs(np.bincount(dataset.labels[parts[part]]) - count).max() < 4 * deviation


def contents(dataset, part):
    return {dataset.images[row].tobytes() for row in datasets.split(dataset)[part]}


def test_an_image_stays_in_its_part_whatever_else_is_there(tmp_path):
    root = write_classes(tmp_path / "d", {"a": 60, "b": 60})
    before = datasets.load(root)
    for i, path in enumerate(sorted(root.glob("a/*.npy"))):
        path.rename(path.with_name(f"{(7 * i) % 60:03d}-renamed.npy"))  # another order
    extra = write_classes(tmp_path / "more", {"a": 40, "c": 60}, seed=1)
    shutil.copytree(extra, root, dirs_exist_ok=True)
    after = datasets.load(root)
    for part in listing.PARTS:
        assert contents(before, part) == contents(after, part) & contents(before, part)
        others = set().union(*(contents(after, p) for p in listing.PARTS if p != part))
        assert not contents(before, part) & others


def spoil(root, how):
    """Damage the folder data set; returns what the error must name."""
    path = root / "b" / "001.npy"
    if how == "no class folders":
        shutil.rmtree(root / "a")
        shutil.rmtree(root / "b")
        return root
    if how == "empty class folder":
        for file in (root / "b").iterdir():
            file.unlink()
        return root / "b"
    np.save(path, np.zeros((9, 9)) if how == "mixed sizes" else np.full((16, 16), np.nan))
    return path


@pytest.mark.parametrize("how", ["no class folders", "empty class folder", "NaN", "mixed sizes"])
def test_bad_folders_are_named_and_leave_no_cache(how, tmp_path):
    """What else is wrong with a file, test_images.py tries."""
    root = write_classes(tmp_path / "d", {"a": 4, "b": 4})
    named = spoil(root, how)
    with pytest.raises(UserError) as error:
        datasets.load(root, tmp_path / "cache")
    assert str(named) in str(error.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("name", "place"),
    [("labels", 137), ("labels", 0), ("labels", -1), ("images", (137, 5, 5)), ("hashes", (0, 137)),
     ("hashes", (1, 137)), ("masses", 37), ("class names", None)],
)  # fmt: skip
def test_a_packed_data_set_that_was_edited_is_refused(name, place, packed, tmp_path):
    """One number changes; size and times do not."""
    copy = shutil.copytree(packed, tmp_path / "copy")
    path = copy / ("dataset.json" if place is None else f"{name}.npy")
    times = path.stat()
    if place is None:
        path.write_text(path.read_text().replace('"cdm"', '"wdm"'))
    else:
        values = np.load(path)
        values[place] = (values[place] + 1) % 3
        np.save(path, values)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=f"{path.name}: changed after packing; rebuild"):
        datasets.load(copy)


def test_data_py_counts_the_images_of_each_part(packed):
    said = run_script("data.py", "--data", packed).stdout
    dataset = datasets.load(packed)
    for label, name in enumerate(dataset.class_names):
        counts = (f"{(dataset.labels[rows] == label).sum()} {part}" for part, rows in datasets.split(dataset).items())
        assert f"  {name}: {', '.join(counts)}\n" in said


def test_the_fraction_of_labels_is_the_same_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    rows = datasets.fraction_of_each_class(labels, np.arange(160), 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 2]
    other = datasets.fraction_of_each_class(labels, np.arange(160), 0.1, seed=1)
    assert not np.array_equal(rows, other)


def test_a_read_only_data_folder_works_with_the_cache_elsewhere(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns(".packed"))
    bound = bound_by_permissions()
    before = {path.name for path in root.iterdir()}
    for path in (root, *root.iterdir()):
        path.chmod(0o500)
    try:
        refused = run_python("data.py", "--data", root, check=False, before=bound)
        assert_user_error(refused, root, "--cache-dir")
        cache = ("--cache-dir", tmp_path / "cache")
        run_python("data.py", "--data", root, *cache, before=bound)
    finally:
        for path in (root, *root.iterdir()):
            path.chmod(0o700)
    assert {path.name for path in root.iterdir()} == before


def write_parts(root, **counts):
    """Folders of parts with the classes a and b; {part: {content of its images}}."""
    contents = {}
    for seed, (part, count) in enumerate(counts.items()):
        write_classes(root / part, {"a": count, "b": count}, size=8, seed=seed)
        contents[part] = {np.load(path).astype(np.float32).tobytes() for path in (root / part).rglob("*.npy")}
    return contents


@pytest.mark.parametrize("name", ["val", "test", "Validation"])
def test_folders_of_train_and_one_other_part_keep_their_images(name, tmp_path):
    """The others are tested, as in published figures; a ninth of train chooses and calibrates."""
    given = write_parts(tmp_path / "d", **{"train": 200, name: 30})
    dataset = datasets.load(tmp_path / "d")
    assert dataset.class_names == ("a", "b")
    assert contents(dataset, "test") == given[name]
    train, validation = contents(dataset, "train"), contents(dataset, "validation")
    assert train | validation == given["train"] and not train & validation
    assert 25 < len(validation) < 65
    files = datasets.files_of(tmp_path / "d", dataset)
    for row in (0, 220, 459):
        assert np.array_equal(read_image(files[row]), dataset.images[row])


def test_three_folders_of_parts_are_the_parts(tmp_path):
    given = write_parts(tmp_path / "d", train=20, valid=5, test=6)
    dataset = datasets.load(tmp_path / "d")
    assert [contents(dataset, part) for part in datasets.PARTS] == list(given.values())


def test_a_copy_of_a_training_image_is_not_tested(tmp_path, capsys):
    write_parts(tmp_path / "d", train=30, val=10)
    turned = np.load(tmp_path / "d" / "train" / "a" / "003.npy").astype(np.float32)[::-1]
    np.save(tmp_path / "d" / "val" / "a" / "copy.npy", turned)
    dataset = datasets.load(tmp_path / "d")
    assert turned.tobytes() not in contents(dataset, "test")
    assert "1 images are copies" in capsys.readouterr().err


def test_a_small_class_takes_no_test_image_to_train(tmp_path):
    given = write_parts(tmp_path / "d", train=2, val=5)
    dataset = datasets.load(tmp_path / "d")
    assert contents(dataset, "test") == given["val"]
    assert len(contents(dataset, "validation")) == len(contents(dataset, "train")) == 2


@pytest.mark.parametrize("parts", [("train",), ("val", "test"), ("train", "training"), ("train", "val", "dev")])
def test_other_folders_of_parts_are_refused(parts, tmp_path):
    write_parts(tmp_path / "d", **dict.fromkeys(parts, 3))
    with pytest.raises(UserError, match="give train and val or test"):
        datasets.load(tmp_path / "d")
