"""Stacks of images as training data: each of their images is one of the data set, as in prediction."""

import json

import numpy as np
import pytest
from conftest import run_code, write_classes
from test_images import objects

from lib import datasets, listing, predictions
from lib.errors import UserError
from lib.images import Said, read_images

SIDE = 8


def stacked(root, save, seed=0, count=20):
    """Two class folders of one stack each, written by `save(path without suffix, images)`; (folder, images)."""
    images = np.random.default_rng(seed).random((2, count, SIDE, SIDE), dtype=np.float32)
    for name, own in zip("ab", images, strict=True):
        (root / name).mkdir(parents=True)
        save(root / name / "stack", own)
    return root, images.reshape(-1, SIDE, SIDE)


LAYOUTS = {"npy": lambda path, images: np.save(path.with_suffix(".npy"), images), "npy with a channel": lambda path,
           images: np.save(path.with_suffix(".npy"), images[:, None]), "npz": lambda path,
           images: np.savez_compressed(path.with_suffix(".npz"), images=images), "objects": lambda path,
           images: np.save(path.with_suffix(".npy"), objects(*images), allow_pickle=True)}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_of_a_stack_is_an_image_of_the_data_set(layout, tmp_path):
    root, images = stacked(tmp_path / "d", LAYOUTS[layout])
    dataset = datasets.load(root)
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [0] * 20 + [1] * 20
    assert len(set(dataset.originals.tolist())) == 40
    again = datasets.load(root)  # the packed copy
    for each in (dataset, again):
        files = datasets.files_of(root, each)
        assert files[17].parts[-2:] == ("a", f"stack.{layout[:3].replace('obj', 'npy')}[17]")


def test_the_split_of_a_stack_is_that_of_its_images_in_files_of_their_own(tmp_path):
    root, images = stacked(tmp_path / "stacks", LAYOUTS["npy"], count=60)
    for row, image in enumerate(images):
        (tmp_path / "files" / "ab"[row // 60]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "files" / "ab"[row // 60] / f"{row:03d}.npy", image)
    stacks, files = datasets.load(root), datasets.load(tmp_path / "files")
    assert stacks.fingerprint == files.fingerprint
    assert all(np.array_equal(datasets.split(stacks)[part], datasets.split(files)[part]) for part in listing.PARTS)


def test_stacks_and_files_of_one_image_and_its_mass_stand_side_by_side(tmp_path):
    root, images = stacked(tmp_path / "d", LAYOUTS["npy"])
    np.save(root / "a" / "alone.npy", objects(images[0] + 1, 1e-23), allow_pickle=True)  # sorted before stack.npy
    dataset = datasets.load(root)
    assert len(dataset.images) == 41
    assert np.array_equal(dataset.images[0], images[0] + 1) and np.array_equal(dataset.images[1:], images)
    assert dataset.masses[0] == 1e-23 and np.isnan(dataset.masses[1:]).all()
    names = [file.name for file in datasets.files_of(root, dataset)]
    assert names[:2] == ["alone.npy", "stack.npy[0]"] and names[-1] == "stack.npy[19]"


def test_images_of_a_table_keep_their_masses(tmp_path):
    root, images = stacked(tmp_path / "d", LAYOUTS["npy"])
    table = np.empty((2, 2), dtype=object)
    for row, mass in zip(range(2), (1e-23, 2e-23), strict=True):
        table[row, 0], table[row, 1] = images[row] + 1, mass
    np.save(root / "a" / "alone.npy", table, allow_pickle=True)  # sorted before stack.npy
    masses = datasets.load(root).masses
    assert masses[:2].tolist() == [1e-23, 2e-23] and np.isnan(masses[2:]).all()


def test_names_of_a_stacks_images_are_those_of_prediction(tmp_path):
    root, _ = stacked(tmp_path / "d", LAYOUTS["npy"])
    dataset = datasets.load(root)
    files = [root / name / "stack.npy" for name in "ab"]
    predicted = [name for name, _ in read_images(files, SIDE, Said([], [], [], []))]
    assert predicted == list(map(str, datasets.files_of(root, dataset)))
    rows = datasets.split(dataset)["test"]
    table = tmp_path / "p.csv"
    table.write_text("file,a,b\n" + "".join(f"{name},1,0\n" for name in predicted))
    assert predictions.read(table, rows, dataset, root).tolist() == [[1, 0]] * len(rows)


def test_folders_of_parts_may_hold_stacks(tmp_path):
    stacked(tmp_path / "d" / "train", LAYOUTS["npy"], count=50)
    _, test = stacked(tmp_path / "d" / "val", LAYOUTS["npy"], seed=1, count=10)
    dataset = datasets.load(tmp_path / "d")
    held_out = {dataset.images[row].tobytes() for row in datasets.split(dataset)["test"]}
    assert held_out == {image.tobytes() for image in test}


def with_nan(images):
    images[17, 2, 3] = np.nan
    return images


@pytest.mark.parametrize(("change", "named"), [
    (with_nan, r"b/stack\.npy\[17\]: NaN or infinite"),
    (lambda images: images[:, :7], r"b/stack\.npy: expected one square image or a stack .*\(20, 7, 8\)"),
    (lambda images: images[:, :7, :7], r"b/stack\.npy is 7 pixels wide and .*a/stack\.npy"),
    (lambda images: images[:0], r"b/stack\.npy: expected one square image or a stack .*\(0, 8, 8\)"),
    (lambda images: np.stack([images] * 3, axis=1),
     r"b/stack\.npy: expected one square image or a stack .*\(20, 3, 8, 8\)"),
])  # fmt: skip
def test_a_stack_that_cannot_be_used_is_named(change, named, tmp_path):
    root, images = stacked(tmp_path / "d", LAYOUTS["npy"])
    np.save(root / "b" / "stack.npy", change(images[20:]))
    with pytest.raises(UserError, match=named):
        datasets.load(root)


def test_copies_in_a_stack_are_named_by_their_place(tmp_path, capsys):
    root, images = stacked(tmp_path / "d", LAYOUTS["npy"])
    np.save(root / "a" / "turned.npy", images[5, ::-1])
    datasets.load(root)
    assert f"such as {root}/a/turned.npy of {root}/a/stack.npy[5]" in capsys.readouterr().err


def test_planes_that_may_be_bands_are_said_to_be_read_as_images(tmp_path, capsys):
    root = write_classes(tmp_path / "d", {"a": 5, "b": 5}, size=SIDE)
    assert datasets.load(root) and "bands" not in capsys.readouterr().err
    np.save(root / "a" / "rgb.npy", np.random.default_rng(9).random((3, SIDE, SIDE)))
    assert len(datasets.load(root).images) == 13
    assert f"such as {root}/a/rgb.npy: each plane is an image of its own" in capsys.readouterr().err


def test_stacks_of_pairs_need_as_many_coarse_images_as_sharp_ones(tmp_path):
    rng = np.random.default_rng(0)
    for name, side, count in (("HR", 16, 12), ("LR", 8, 12)):
        (tmp_path / "d" / name).mkdir(parents=True)
        np.save(tmp_path / "d" / name / "stack.npy", rng.random((count, side, side), dtype=np.float32))
    dataset = datasets.load(tmp_path / "d")
    assert np.array_equal(dataset.coarse, np.load(tmp_path / "d" / "LR" / "stack.npy"))
    np.save(tmp_path / "d" / "LR" / "stack.npy", dataset.coarse[:11])
    with pytest.raises(UserError, match=r"LR/stack\.npy has 11 images, its partner .*HR/stack\.npy 12"):
        datasets.load(tmp_path / "d")


def test_a_large_stack_is_packed_in_little_memory(tmp_path):
    """It is read block by block: the two files hold 200 MB."""
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        stack = np.lib.format.open_memmap(tmp_path / "d" / name / "stack.npy", "w+", np.float32, (6000, 64, 64))
        stack[:, 0, 0] = np.arange(6000) + (name == "b") / 2
        stack[:, 9, 9] = np.random.default_rng(0).random(6000)
    code = ("import sys, resource; from lib import datasets\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; datasets.load(sys.argv[1], progress=False)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")  # fmt: skip
    assert int(run_code(code, tmp_path / "d").stdout) < 120 * 1024


def test_counts_of_a_packed_copy_that_do_not_fit_are_refused(tmp_path):
    root, _ = stacked(tmp_path / "d", LAYOUTS["npy"])
    datasets.load(root)
    (description,) = root.glob(".packed/*/dataset.json")
    for wrong in ([20, 19], [20, "20"], [-1, 41], 3):
        description.write_text(json.dumps(json.loads(description.read_text()) | {"per_file": wrong}))
        with pytest.raises(UserError, match="rebuild the data set"):
            datasets.load(root)


def save_cube(path, images, **cards):
    fits = pytest.importorskip("astropy.io.fits")
    fits.PrimaryHDU(images, fits.Header(cards)).writeto(path)


def test_the_planes_of_a_fits_cube_are_images_of_the_data_set(tmp_path, capsys):
    root, images = stacked(tmp_path / "d", lambda path, images: save_cube(path.with_suffix(".fits"), images))
    dataset = datasets.load(root)
    assert np.array_equal(dataset.images, images)
    assert datasets.files_of(root, dataset)[17] == root / "a" / "stack.fits[17]"
    assert f"2 FITS cubes, such as {root}/a/stack.fits: each plane is an image" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "cards", "named"), [
    (3, {}, r"rgb\.fits: several planes, shape \(3, 8, 8\), which may be bands of one lens.*\.npy"),
    (2, {}, "several planes"), (5, {}, "several planes"),
    (9, {"CTYPE3": "FREQ"}, r"rgb\.fits: several planes.*FREQ.*\.npy"),
])  # fmt: skip
def test_a_fits_cube_that_may_hold_bands_of_one_lens_is_refused(count, cards, named, tmp_path):
    root = write_classes(tmp_path / "d", {"a": 5, "b": 5}, size=SIDE)
    save_cube(root / "a" / "rgb.fits", np.random.default_rng(9).random((count, SIDE, SIDE)), **cards)
    with pytest.raises(UserError, match=named):
        datasets.load(root)


def test_a_fits_cube_with_one_plane_is_one_image(tmp_path, capsys):
    root = write_classes(tmp_path / "d", {"a": 5, "b": 5}, size=SIDE)
    save_cube(root / "a" / "one.fits", np.random.default_rng(9).random((1, SIDE, SIDE)), CTYPE3="FREQ")
    assert len(datasets.load(root).images) == 11 and "cube" not in capsys.readouterr().err
