"""Data that other projects read wrongly without a word."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_NETWORK, assert_user_error, run_script

from lib import data, lenses
from lib.augment import augment
from lib.errors import UserError
from lib.files import atomic_write
import simulate


def make(root, **counts):
    """Class folders of different random images."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            np.save(root / name / f"{i:03d}.npy", rng.random((16, 16)))
    return root


def test_packing_deletes_nothing_in_the_cache(tmp_path):
    cache = tmp_path / "cache"
    simulate.write_packed(
        cache / "mine", lenses.simulate("Model_II", 2, 0, progress=False), 2, "Model_II", "mine"
    )
    one, two = (data.load(make(tmp_path / n, a=20, b=20 + i), cache) for i, n in enumerate("xy"))
    assert (cache / "mine" / "dataset.json").exists()
    assert len(list(cache.iterdir())) == 3
    assert len(one.images) == 40 and len(two.images) == 41


def test_other_pixels_with_the_same_names_sizes_and_times_are_packed_again(tmp_path):
    first = make(tmp_path / "v1" / "lenses", a=12, b=12)
    second = tmp_path / "v2" / "lenses"
    shutil.copytree(first, second)
    for i, path in enumerate(sorted(second.rglob("*.npy"))):
        np.save(path, np.random.default_rng(i + 99).random((16, 16)))
    for path in (*first.rglob("*.npy"), *second.rglob("*.npy")):
        os.utime(path, (1e9, 1e9))
    one, two = (data.load(f, tmp_path / "cache", progress=False) for f in (first, second))
    assert one.fingerprint != two.fingerprint
    # In place, with the modification time restored, as rsync -t does.
    path = next(first.rglob("*.npy"))
    np.save(path, np.zeros((16, 16)))
    os.utime(path, (1e9, 1e9))
    assert data.load(first, tmp_path / "cache", progress=False).fingerprint != one.fingerprint


def test_images_far_outside_the_rest_are_named(tmp_path, capsys):
    root = make(tmp_path / "d", a=50, b=50)
    for name, value in (("a/007.npy", -99.0), ("b/003.npy", 1e9)):
        image = np.load(root / name)
        image[0, 0] = value
        np.save(root / name, image)
    data.load(root, progress=False)
    said = capsys.readouterr().err
    assert "2 images are far outside the rest" in said
    assert "a/007.npy with pixels from -99" in said


@pytest.mark.parametrize("model", ["Model_I", "Model_II", "Model_III"])
@pytest.mark.parametrize("noise", [False, True])
def test_no_image_of_the_benchmark_is_far_outside_the_rest(model, noise):
    parts = lenses.simulate(model, 100, 0, noise, progress=False)
    images = np.concatenate([images for _, images, _ in parts]).reshape(300, -1)
    assert not len(data.far_outside(np.stack([images.min(1), images.max(1)], axis=1)))


def test_what_systems_leave_behind_is_no_image_and_no_class(tmp_path, capsys):
    root = make(tmp_path / "d", a=40, b=40)
    (root / "a" / "._000.npy").write_bytes(b"\0\5\26\7")
    (root / "__MACOSX").mkdir()
    (root / "a" / ".ipynb_checkpoints").mkdir()
    (root / "a" / ".ipynb_checkpoints" / "x.npy").write_bytes(b"")
    dataset = data.load(root, progress=False)
    assert dataset.class_names == ("a", "b")
    assert len(dataset.images) == 80
    assert "not read" not in capsys.readouterr().err


def test_what_is_not_read_is_counted_and_named(tmp_path, capsys):
    root = make(tmp_path / "d", a=40, b=40)
    (root / "a" / "000.npy").rename(root / "a" / "000.NPY")
    (root / "a" / "notes.txt").write_text("no image")
    assert len(data.load(root, progress=False).images) == 80
    assert "1 other files were not read: a/notes.txt" in capsys.readouterr().err


def test_images_in_sub_folders_of_a_class_are_refused(tmp_path):
    root = make(tmp_path / "d", a=12, b=12)
    make(root / "b", part2=4)
    with pytest.raises(UserError, match="sub-folder part2"):
        data.load(root, progress=False)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation")])
def test_folders_of_a_split_are_not_taken_for_classes(names, tmp_path):
    with pytest.raises(UserError, match="no classes"):
        data.load(make(tmp_path / "d", **dict.fromkeys(names, 9)), progress=False)


def test_a_symlinked_class_folder_is_read(tmp_path):
    make(tmp_path / "far", b=40)
    root = make(tmp_path / "d", a=40)
    (root / "b").symlink_to(tmp_path / "far" / "b")
    assert len(data.load(root, progress=False).images) == 80


def test_a_superset_of_the_training_images_is_refused_with_the_overlap(packed, tmp_path):
    run_script("finetune.py", "--data", packed, "--pretrained", "none", "--strategy", "full",
               "--epochs", 1, "--out", tmp_path / "run", *TINY_NETWORK)  # fmt: skip
    weights = tmp_path / "run" / "vit-mae-classifier-wt.pth"
    dataset = data.load(packed)
    parts = data.split(dataset)
    more = tmp_path / "more"
    more.mkdir()
    writer = data.PackedWriter(more, (301, 64, 64), dataset.class_names, "one more")
    writer.append(np.ones((1, 64, 64)), 0)
    for image, label in zip(dataset.images, dataset.labels.tolist(), strict=True):
        writer.append(image[None], label)
    writer.close()
    seen = len(parts["train"]) + len(parts["validation"])
    common = ("--data", more, "--weights", weights, "--resamples", 5)
    refused = run_script("evaluate.py", *common, "--out", tmp_path / "e", "--split", "all",
                         check=False)  # fmt: skip
    assert_user_error(refused, f"trained on {seen} of these 301 images")
    run_script("evaluate.py", *common, "--out", tmp_path / "e")


def test_an_mae_is_not_scored_on_its_own_images(packed, tmp_path):
    run_script("pretrain.py", "--data", packed, "--epochs", 1, "--out", tmp_path / "run",
               *TINY_NETWORK, *TINY_DECODER)  # fmt: skip
    dataset = data.load(packed)
    rows = np.concatenate([data.split(dataset)[part] for part in ("train", "validation")])
    seen = (dataset.labels[rows] == dataset.class_names.index("no_sub")).sum()
    refused = run_script(
        "reconstruct.py", "--data", packed, "--weights", tmp_path / "run" / "vit-mae-wt.pth",
        "--split", "all", "--out", tmp_path / "r", check=False,
    )  # fmt: skip
    assert_user_error(refused, f"trained on {seen} of these 300 images")


def test_a_classifier_has_seen_what_its_mae_has_seen(packed, tmp_path):
    run_script("pretrain.py", "--data", packed, "--epochs", 1, "--out", tmp_path / "mae",
               *TINY_NETWORK, *TINY_DECODER)  # fmt: skip
    run_script("finetune.py", "--data", packed, "--pretrained", tmp_path / "mae" / "vit-mae-wt.pth",
               "--strategy", "head", "--labels", 0.1, "--epochs", 1, "--out",
               tmp_path / "head")  # fmt: skip
    mae, head = (
        set(torch.load(tmp_path / path, weights_only=True)["seen"].tolist())
        for path in ("mae/vit-mae-wt.pth", "head/vit-mae-classifier-wt.pth")
    )
    assert mae < head
    assert len(mae) > 50


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match="GB left"):
        data.load(make(tmp_path / "d", a=20, b=20), tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(UserError, match="No space left"), atomic_write(tmp_path / "x") as temporary:
        temporary.write_bytes(b"part")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.glob(".x*"))


def test_a_rare_class_does_not_cost_the_weights(tmp_path):
    root = make(tmp_path / "d", no_sub=60, rare=60)
    dataset = data.load(root, progress=False)
    parts = data.split(dataset)
    rare = [r for r in parts["validation"] if dataset.labels[r] == 1]
    files = sorted((root / "rare").iterdir())
    for row in rare[1:]:  # one validation image is left
        files[row - 60].unlink()
    run_script("pretrain.py", "--data", root, "--epochs", 1, "--out", tmp_path / "run",
               *TINY_NETWORK, *TINY_DECODER)  # fmt: skip
    assert (tmp_path / "run" / "vit-mae-wt.pth").exists()
    assert (tmp_path / "run" / "reconstructions.png").exists()


def test_a_blank_image_gets_finite_noise():
    images = torch.zeros(3, 1, 8, 8)
    images[1] += 1
    images[2] -= 1
    assert torch.isfinite(augment(images, ("noise",))).all()


def test_a_class_of_a_few_images_has_one_in_every_part(tmp_path):
    for count in (3, 5, 12):
        dataset = data.load(make(tmp_path / str(count), a=count, b=40), progress=False)
        parts = data.split(dataset)
        assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(count + 40))
        for rows in parts.values():
            assert set(dataset.labels[rows]) == {0, 1}
    with pytest.raises(UserError, match="class a has fewer than 3"):
        data.split(data.load(make(tmp_path / "two", a=2, b=40), progress=False))


def test_copies_in_a_small_class_stay_on_one_side(tmp_path):
    root = make(tmp_path / "d", a=4, b=40)
    for i in range(4):
        shutil.copy(root / "a" / f"00{i}.npy", root / "a" / f"copy{i}.npy")
    dataset = data.load(root, progress=False)
    sides = [set(dataset.hashes[rows]) for rows in data.split(dataset).values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_an_image_that_moved_from_training_to_test_is_found_out(tmp_path):
    root = make(tmp_path / "d", a=40, b=40)
    run_script("finetune.py", "--data", root, "--pretrained", "none", "--strategy", "full",
               "--epochs", 1, "--out", tmp_path / "run", "--patch-size", 4,
               *TINY_NETWORK[2:])  # fmt: skip
    dataset = data.load(root, progress=False)
    train = set(data.split(dataset)["train"].tolist())
    for row, path in enumerate(sorted((root / "a").iterdir())):
        if row not in train or row > 15:  # some training images are all that is left
            path.unlink()
    refused = run_script(
        "evaluate.py", "--data", root, "--out", tmp_path / "e", "--resamples", 5, "--weights",
        tmp_path / "run" / "vit-mae-classifier-wt.pth", check=False,
    )  # fmt: skip
    assert_user_error(refused, "trained on 1 of these")


def test_copies_with_another_label_are_named(tmp_path, capsys):
    root = make(tmp_path / "d", a=40, b=40)
    shutil.copy(root / "a" / "007.npy", root / "b" / "zzz.npy")
    data.load(root, progress=False)
    assert "2 images stand in more than one class, such as" in capsys.readouterr().err
