"""Data that other projects read wrongly without a word."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from conftest import CLASSIFIER, assert_refused, run_script, write_classes, write_packed

import pretrain
import simulate
from lib import compatibility, datasets, lenses, packing, traits
from lib.errors import UserError


def load(root, *more):
    return datasets.load(root, *more, progress=False)


def test_packing_deletes_nothing_in_the_cache(tmp_path):
    cache = tmp_path / "cache"
    batches = lenses.simulate("Model_II", 2, 0, progress=False)
    simulate.write_packed(cache / "mine", batches, 2, "Model_II", "mine")
    one, two = (load(write_classes(tmp_path / n, {"a": 20, "b": 20 + i}), cache) for i, n in enumerate("xy"))
    assert (cache / "mine" / "dataset.json").exists()
    assert len(list(cache.iterdir())) == 3
    assert len(one.images) == 40 and len(two.images) == 41


def test_other_pixels_with_the_same_names_sizes_and_times_are_packed_again(tmp_path):
    first = write_classes(tmp_path / "v1" / "lenses", {"a": 12, "b": 12})
    second = tmp_path / "v2" / "lenses"
    shutil.copytree(first, second)
    for i, path in enumerate(sorted(second.rglob("*.npy"))):
        np.save(path, np.random.default_rng(i + 99).random((16, 16)))
    for path in (*first.rglob("*.npy"), *second.rglob("*.npy")):
        os.utime(path, (1e9, 1e9))
    one, two = (load(root, tmp_path / "cache") for root in (first, second))
    assert one.fingerprint != two.fingerprint
    # In place, with the modification time restored, as rsync -t does.
    path = next(first.rglob("*.npy"))
    np.save(path, np.zeros((16, 16)))
    os.utime(path, (1e9, 1e9))
    assert load(first, tmp_path / "cache").fingerprint != one.fingerprint


def test_images_far_outside_the_rest_are_named(tmp_path, capsys):
    root = write_classes(tmp_path, {"a": 50, "b": 50})
    for name, value in (("a/007.npy", -99.0), ("b/003.npy", 1e9)):
        image = np.load(root / name)
        image[0, 0] = value
        np.save(root / name, image)
    load(root)
    said = capsys.readouterr().err
    assert "2 images are far outside the rest" in said
    assert "a/007.npy with pixels from -99" in said


@pytest.mark.parametrize("model", ["Model_I", "Model_II", "Model_III"])
@pytest.mark.parametrize("noise", [False, True])
def test_no_image_of_the_benchmark_is_far_outside_the_rest(model, noise):
    parts = lenses.simulate(model, 100, 0, noise, progress=False)
    images = np.concatenate([images for _, images, _ in parts]).reshape(300, -1)
    assert not len(traits.far_outside(np.stack([images.min(1), images.max(1)], axis=1)))


def test_what_systems_leave_behind_is_no_image_and_what_else_is_not_read_is_named(tmp_path, capsys):
    root = write_classes(tmp_path / "d", {"a": 40, "b": 40})
    (root / "a" / "._000.npy").write_bytes(b"\0\5\26\7")
    (root / "__MACOSX").mkdir()
    (root / "a" / ".ipynb_checkpoints").mkdir()
    (root / "a" / ".ipynb_checkpoints" / "x.npy").write_bytes(b"")
    (root / "a" / "000.npy").rename(root / "a" / "000.NPY")
    (root / "a" / "notes.txt").write_text("no image")
    dataset = load(root)
    assert dataset.class_names == ("a", "b")
    assert len(dataset.images) == 80
    assert "1 other files were not read: a/notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize("bright", [59, 61])
def test_a_class_above_another_does_not_put_it_out_of_range(bright):
    """With a majority of bright images the zero level was above every pixel of the faint ones."""
    levels = np.repeat([0.0, 1.0], [120 - bright, bright])
    extremes = np.stack([levels + 1e-4, levels + 0.9995], axis=1)
    low, high, faintest = traits.pixel_range(extremes)
    assert low < extremes[:, 0].min() and extremes[:, 1].max() < high and faintest < extremes[:, 1].min()


def test_a_class_called_all_is_one_class_of_a_classifier(tmp_path):
    """The unit was compared of its images alone."""
    dataset = datasets.load(write_classes(tmp_path / "data", {"all": 12, "other": 40}))
    rows = np.arange(52)
    pixel_range = [*traits.pixel_range(datasets.extremes_of(dataset, rows))]
    run = {"class_names": ["all", "other"], "pixel_range": pixel_range}
    compatibility.check_unit(dataset, rows, run)
    factor = np.where(dataset.labels == 1, 1e4, 1).astype(np.float32)
    with pytest.raises(UserError, match="another unit"):
        compatibility.check_unit(dataset._replace(images=dataset.images * factor[:, None, None]), rows, run)


def test_images_in_sub_folders_of_a_class_are_refused(tmp_path):
    root = write_classes(tmp_path / "d", {"a": 12, "b": 12, "b/part2": 4})
    with pytest.raises(UserError, match="sub-folder part2"):
        load(root)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation")])
def test_folders_of_a_split_are_not_taken_for_classes(names, tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        load(write_classes(tmp_path, dict.fromkeys(names, 9)))


def test_a_symlinked_class_folder_is_read(tmp_path):
    far, root = write_classes(tmp_path / "far", {"b": 40}), write_classes(tmp_path / "d", {"a": 40})
    (root / "b").symlink_to(far / "b")
    assert load(root).class_names == ("a", "b")


def test_a_superset_of_the_training_images_is_refused_with_the_overlap(packed, runs, pretrained, tmp_path):
    dataset = datasets.load(packed)
    one_more = np.concatenate([np.ones((1, 64, 64), np.float32), dataset.images])
    more = write_packed(tmp_path / "more", one_more, [0, *dataset.labels], dataset.class_names)
    classifier, parts = runs / "head" / CLASSIFIER, datasets.split(dataset)
    rows = np.concatenate([parts["train"], parts["validation"]])
    smooth = (dataset.labels[rows] == dataset.class_names.index("no_sub")).sum()
    for script, path, seen in (("evaluate.py", classifier, len(rows)), ("reconstruct.py", pretrained, smooth)):
        common = ("--data", more, "--weights", path, "--resamples", 5, "--out", tmp_path / script)
        assert_refused(script, (*common, "--split", "all"), f"trained on {seen} of these 301 images")
        run_script(script, *common)


def test_an_image_that_moved_from_training_to_test_is_found_out(packed, runs, tmp_path):
    content = torch.load(runs / "full" / CLASSIFIER, weights_only=True)
    dataset = datasets.load(packed)
    moved = dataset.hashes[datasets.split(dataset)["test"][5:6]].view(np.int64)
    content["seen"] = torch.from_numpy(np.append(content["seen"].numpy(), moved))
    torch.save(content, tmp_path / "w.pth")
    arguments = ("--data", packed, "--out", tmp_path / "e", "--weights", tmp_path / "w.pth")
    assert_refused("evaluate.py", arguments, "trained on 1 of these")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match="GB left"):
        load(write_classes(tmp_path / "d", {"a": 20, "b": 20}), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_class_of_a_few_images_has_one_in_every_part(tmp_path):
    for count in (3, 5, 12):
        dataset = load(write_classes(tmp_path / str(count), {"a": count, "b": 40}))
        parts = datasets.split(dataset)
        assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(count + 40))
        for rows in parts.values():
            assert set(dataset.labels[rows]) == {0, 1}
    with pytest.raises(UserError, match="class a has fewer than 3"):
        datasets.split(load(write_classes(tmp_path / "two", {"a": 2, "b": 40})))


def test_copies_stay_on_one_side_in_a_small_class_and_are_named_with_another_label(tmp_path, capsys):
    root = write_classes(tmp_path, {"a": 4, "b": 40})
    for i in range(4):
        shutil.copy(root / "a" / f"00{i}.npy", root / "a" / f"copy{i}.npy")
    dataset = load(root)
    one, two, three = (set(dataset.originals[rows]) for rows in datasets.split(dataset).values())
    assert not one & two and not one & three and not two & three
    assert "more than one class" not in capsys.readouterr().err
    shutil.copy(root / "a" / "001.npy", root / "b" / "zzz.npy")
    load(root)
    assert "3 images stand in more than one class, such as" in capsys.readouterr().err


NAMES = [unicodedata.normalize(form, "sphère") for form in ("NFC", "NFD")]


@pytest.mark.parametrize("name", NAMES)
def test_a_class_name_is_the_same_however_its_accents_are_written(name, tmp_path):
    """Linux has one code point for è, macOS has two."""
    dataset = load(write_classes(tmp_path, {name: 20, "sphinx": 20}))
    assert dataset.class_names == ("sphinx", NAMES[0])
    asked = pretrain.parse_args(["--data", "d", "--out", "o", "--classes", *NAMES]).classes
    assert asked == NAMES[:1] * 2
    assert set(dataset.labels[datasets.rows_of_classes(dataset, np.arange(40), asked)]) == {1}
    assert load(write_packed(tmp_path / "packed", np.ones((1, 4, 4)), 0, [name])).class_names == (NAMES[0],)


def test_two_folders_of_one_class_name_are_refused(tmp_path):
    root = write_classes(tmp_path, dict.fromkeys(NAMES, 20))
    if len(list(root.iterdir())) == 2:  # some file systems know one form only
        with pytest.raises(UserError, match=f"two folders {NAMES[0]}"):
            load(root)
