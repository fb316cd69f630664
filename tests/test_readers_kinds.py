"""Every form of .npy and .npz file is read as what it is, or refused by name."""

import pickle
import struct

import numpy as np
import pytest

from lib import data
from lib.errors import UserError
from lib.readers import read_npy, read_npz

IMAGES = np.random.default_rng(0).random((3, 8, 8))


def objects(*elements):
    """A one-dimensional object array of these elements."""
    array = np.empty(len(elements), dtype=object)
    for i, element in enumerate(elements):
        array[i] = element
    return array


def table(rows, columns):
    """An object array of two axes: (rows, columns)."""
    array = np.empty((len(rows), columns), dtype=object)
    for i, row in enumerate(rows):
        for j, element in enumerate(row):
            array[i, j] = element
    return array


ROWS = [[image, float(i)] for i, image in enumerate(IMAGES)]
STACKS = {
    "images": objects(*IMAGES),
    "channel images": objects(*IMAGES[:, None]),
    "copies of one image": objects(*[IMAGES[0]] * 3),
    "rows": table(ROWS, 2),
    "rows, column-major": np.asfortranarray(table(ROWS, 2)),
    "nested rows": objects(*(objects(*row) for row in ROWS)),
    "rows as lists": objects(*ROWS),
    "rows as tuples": objects(*map(tuple, ROWS)),
    "rows of images alone": table([[image] for image in IMAGES], 1),
    "big-endian": objects(*IMAGES.astype(">f4")),
    "column-major images": objects(*(np.asfortranarray(image) for image in IMAGES)),
}


@pytest.mark.parametrize("name", STACKS)
def test_an_object_array_of_images_gives_all_of_them(name, tmp_path):
    np.save(tmp_path / "stack.npy", STACKS[name], allow_pickle=True)
    expected = IMAGES[[0, 0, 0]] if "copies" in name else IMAGES
    stack = read_npy(tmp_path / "stack.npy")
    assert stack.shape == ((3, 1, 8, 8) if "channel" in name else (3, 8, 8))
    assert np.allclose(stack.reshape(3, 8, 8), expected, atol=1e-7)


@pytest.mark.parametrize("name", STACKS)
def test_training_refuses_a_file_of_several_images(name, tmp_path):
    np.save(tmp_path / "stack.npy", STACKS[name], allow_pickle=True)
    with pytest.raises(UserError, match=r"stack\.npy.*one square image"):
        data.read_image(tmp_path / "stack.npy")


ONE_IMAGE = {
    "image alone": objects(IMAGES[0]),
    "image and number": objects(IMAGES[0], 1e-23),
    "image and numbers": objects(IMAGES[0], 3, np.float32(2), np.array([1.0]), True),
}


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_an_object_array_of_one_image_gives_it(name, tmp_path):
    np.save(tmp_path / "one.npy", ONE_IMAGE[name], allow_pickle=True)
    assert np.array_equal(read_npy(tmp_path / "one.npy"), IMAGES[0])
    assert data.read_image(tmp_path / "one.npy").shape == (8, 8)


MIXED = {
    "images of two shapes": objects(IMAGES[0], IMAGES[1][:4]),
    "rows of two shapes": objects([IMAGES[0], 1.0], [IMAGES[1][:4], 2.0]),
    "image, image, number": objects(IMAGES[0], IMAGES[1], 1.0),
    "image and text": objects(IMAGES[0], "axion"),
    "image and None": objects(IMAGES[0], None),
    "image and numbers of another": objects(IMAGES[0], np.arange(3.0)),
    "number and image": objects(1.0, IMAGES[0]),
    "rows of two images": table([[IMAGES[0], IMAGES[1]]] * 2, 2),
    "row and image": objects([IMAGES[0], 1.0], IMAGES[1]),
    "three axes": table(ROWS, 2).reshape(3, 2, 1),
    "empty rows": objects([], []),
    "numbers": objects(1.0, 2.0),
}


@pytest.mark.parametrize("name", MIXED)
def test_an_object_array_of_other_content_is_refused(name, tmp_path):
    np.save(tmp_path / "mixed.npy", MIXED[name], allow_pickle=True)
    with pytest.raises(UserError, match=r"mixed\.npy: not a usable") as error:
        read_npy(tmp_path / "mixed.npy")
    assert "\n" not in str(error.value)


def test_a_small_pickle_cannot_ask_for_much_memory(tmp_path):
    many = objects(*[np.zeros((1000, 1000))] * 5000)  # 8 MB in the file, 40 GB as a stack
    np.save(tmp_path / "bomb.npy", many, allow_pickle=True)
    with pytest.raises(UserError, match=r"bomb\.npy.*too many images"):
        read_npy(tmp_path / "bomb.npy")
    state = pickle.dumps(np.empty((10**9, 0), dtype=object), protocol=4)
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + state
    (tmp_path / "empty.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.npy"):
        read_npy(tmp_path / "empty.npy")


def test_a_stack_of_a_thousand_pickled_images_is_read(tmp_path):
    images = np.random.default_rng(1).random((1000, 8, 8))
    np.save(tmp_path / "many.npy", objects(*images), allow_pickle=True)
    assert np.array_equal(read_npy(tmp_path / "many.npy"), images)


def test_arrays_of_a_npz_file_that_are_no_images_are_told_apart(tmp_path):
    np.savez(
        tmp_path / "set.npz", images=IMAGES, labels=np.arange(3), names=np.array(["a", "b", "c"]),
        scale=0.1, classes=np.array(["a", None], dtype=object), dates=np.zeros(3, "M8[s]"),
        records=np.zeros(2, [("x", "<f4"), ("y", "<i4")]),
    )  # fmt: skip
    arrays = dict(read_npz(tmp_path / "set.npz"))
    assert np.array_equal(arrays.pop("images"), IMAGES)
    assert arrays == dict.fromkeys(["labels", "names", "scale", "classes", "dates", "records"])


def test_a_npz_file_with_a_damaged_or_hostile_array_is_refused(tmp_path):
    np.savez(tmp_path / "mixed.npz", image=IMAGES[0], other=objects(IMAGES[0], "text"))
    with pytest.raises(UserError, match=r"mixed\.npz"):
        read_npz(tmp_path / "mixed.npz")
