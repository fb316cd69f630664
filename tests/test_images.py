"""Images from files: what is good is read exactly, for training and prediction; nothing in a file runs."""

import bz2
import gzip
import io
import itertools
import os
import pickle
import re
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Calls, bound_by_permissions, run_python

from lib import datasets, images
from lib import fits as fits_reader
from lib import npy as npy_reader
from lib.errors import UserError
from lib.images import How, Said, find_files, read_image, read_images, read_stack
from lib.npy import read_npy

SIDE = 8
IMAGES = np.random.default_rng(0).random((3, SIDE, SIDE)).astype(np.float32)
IMAGE = IMAGES[0]


def predicted(*paths, **how):
    """({name: image} that prediction gets of these paths, errors, others)."""
    said = Said([], [], [], [])
    return dict(read_images(paths, SIDE, said, How(**how))), said.errors, said.others


def relative(names, folder):
    return sorted(os.path.relpath(name, folder) for name in names)


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


def npy(content, descr="|O", shape=(2,), fortran_order=False):
    """Bytes of a .npy file with this header and content."""
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def assert_refused(path, match=None, seconds=2):
    """The file is refused in one line that names it, for training and for prediction, soon."""
    start = time.process_time()
    with pytest.raises(UserError, match=match) as error:
        read_image(path)
    _, errors, _ = predicted(path)
    assert time.process_time() - start < seconds
    for text in (str(error.value), *(reason for _, reason in errors)):
        assert path.name in text
        assert "\n" not in text
    assert len(errors) == 1


# Images and stacks

ROWS = [[image, float(i)] for i, image in enumerate(IMAGES)]
STACKS = {"images": objects(*IMAGES), "channel images": objects(*IMAGES[:, None]),
          "copies of one image": objects(*[IMAGE] * 3), "rows": table(ROWS, 2),
          "rows, column-major": np.asfortranarray(table(ROWS, 2)),
          "nested rows": objects(*(objects(*row) for row in ROWS)), "rows as lists": objects(*ROWS),
          "rows as tuples": objects(*map(tuple, ROWS)), "rows of images alone": table([[image] for image in IMAGES], 1),
          "big-endian": objects(*IMAGES.astype(">f4")),
          "column-major images": objects(*(np.asfortranarray(image) for image in IMAGES)), "plain": IMAGES,
          "plain, channel first": IMAGES[:, None], "plain, channel last": IMAGES[..., None],
          "plain, column-major": np.asfortranarray(IMAGES)}  # fmt: skip
ONE_IMAGE = {"image alone": objects(IMAGE), "image and number": objects(IMAGE, 1e-23),
             "image and numbers": objects(IMAGE, 3, np.float32(2), np.array([1.0]), True), "one, plain": IMAGE,
             "one, channel first": IMAGES[:1], "one, channel last": IMAGE[..., None]}  # fmt: skip


@pytest.mark.parametrize("name", [*STACKS, *ONE_IMAGE])
def test_every_image_of_a_file_is_read_alike_for_training_and_prediction(name, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, (STACKS | ONE_IMAGE)[name], allow_pickle=True)
    read, errors, _ = predicted(path)
    expected = IMAGES[:1] if name in ONE_IMAGE else IMAGES[[0, 0, 0]] if "copies" in name else IMAGES
    assert name in ONE_IMAGE or list(read) == [f"{path}[{i}]" for i in range(3)]
    assert errors == []
    assert np.array_equal(np.stack(list(read.values())), expected)
    assert np.array_equal(read_stack(path)[0], expected)


def test_numbers_of_every_kind_and_order_are_read_bit_for_bit(tmp_path):
    path = tmp_path / "x.npy"
    for dtype, order in itertools.product(("<f2", "<f4", "<f8", ">f4", ">f8", "u1", "<i4", ">u2", "?"), "CF"):
        array = np.asarray(np.arange(12).reshape(3, 4) % 5, dtype=dtype, order=order)
        np.save(path, array)
        assert np.array_equal(read_npy(path), array), dtype
        for protocol in (3, 4):
            path.write_bytes(npy(pickle.dumps(objects(array, np.float64(3e-23)), protocol=protocol)))
            assert np.array_equal(read_npy(path), array), dtype


UNFIT = {"not finite": np.where(IMAGE > 0.9, np.nan, IMAGE), "infinite": np.where(IMAGE > 0.9, np.inf, IMAGE),
         "beyond float32": IMAGE * np.float64(1e300), "no images": IMAGES[:0],
         "four axes": np.zeros((2, 3, SIDE, SIDE)), "one axis": np.zeros(SIDE), "a number": np.array(1.0),
         "not square": IMAGE[:, :5]}  # fmt: skip


def test_an_image_of_another_size_is_refused_or_its_centre_is_cropped(tmp_path):
    large = np.pad(IMAGE, ((3, 3), (5, 5)))
    np.save(tmp_path / "large.npy", large)
    np.save(tmp_path / "small.npy", IMAGE[:4, :4])
    read, errors, _ = predicted(tmp_path / "large.npy", tmp_path / "small.npy")
    assert read == {}
    assert "14×18 pixels where the network takes 8×8; --crop" in errors[0][1]
    assert "expected an image of 8×8 pixels or a stack of them, got shape (4, 4)" in errors[1][1]
    (read,) = predicted(tmp_path / "large.npy", crop=True)[0].values()
    assert np.array_equal(read, IMAGE)


def test_a_large_array_is_mapped_and_can_be_read_after_its_memory_was_returned(tmp_path, monkeypatch):
    array = np.arange(4096.0).reshape(64, 64)
    np.save(tmp_path / "large.npy", array)
    monkeypatch.setattr(npy_reader, "MAP_ABOVE_BYTES", 1000)
    mapped = read_npy(tmp_path / "large.npy")
    assert isinstance(mapped, np.memmap)
    npy_reader.forget_pages(mapped)
    assert np.array_equal(mapped, array)


# Object arrays: pickles

MIXED = {"images of two shapes": objects(IMAGE, IMAGES[1][:4]),
         "rows of two shapes": objects([IMAGE, 1.0], [IMAGES[1][:4], 2.0]),
         "image, image, number": objects(IMAGE, IMAGES[1], 1.0), "image and text": objects(IMAGE, "axion"),
         "image and None": objects(IMAGE, None), "image and numbers of another": objects(IMAGE, np.arange(3.0)),
         "number and image": objects(1.0, IMAGE), "rows of two images": table([[IMAGE, IMAGES[1]]] * 2, 2),
         "row and image": objects([IMAGE, 1.0], IMAGES[1]), "three axes": table(ROWS, 2).reshape(3, 2, 1),
         "empty rows": objects([], []), "numbers": objects(1.0, 2.0)}  # fmt: skip


MARKER = "executed"
HOSTILE_CALLS = {"os.system": Calls(os.system, f"touch {MARKER}"), "eval": Calls(eval, f"open({MARKER!r}, 'w')"),
                 "getattr": Calls(getattr, "text", "upper"),
                 "numpy.memmap": Calls(np.memmap, MARKER, "u1", "w+", 0, (4,)), "numpy.zeros": Calls(np.zeros, 10**12),
                 "path": Path(MARKER), "tensor": torch.zeros(2)}  # fmt: skip
# Hand-made: opcodes of the array [image], whose parts are then replaced.
NDARRAY = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
DTYPE = b"cnumpy\ndtype\n(X\x02\0\0\0%s\x89\x88tR"


def number(n):
    return b"J" + struct.pack("<i", n)


def array_of(shape, dtype, content):
    """Opcodes of an array; its parts are opcodes, too."""
    return NDARRAY[2:] + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


NUMBERS = array_of(number(2) * 2 + b"\x86", DTYPE % b"f8", b"C\x20" + b"\0" * 32)
DOUBLING = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))  # 2**60 lists
LONG_ROW = NUMBERS + b"K\x01" * 20_000
HAND_MADE = {
    "protocol 0 call": b"cos\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR.",
    "instance opcode": b"(S'touch " + MARKER.encode() + b"'\nios\nsystem\n.",
    "huge array": pickle.dumps(Calls(np.ndarray, (10**12,)), protocol=4),
    "memo bomb": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".",
    "persistent id": b"\x80\x04Pevil\n.",
    "extension": b"\x80\x04\x82\x01.",
    "nested lists": b"\x80\x04" + b"]" * 9000 + b"a" * 8999 + b".",
    "nested calls": b"\x80\x04cnumpy\ndtype\nq\x00" + b"h\x00" * 20_000 + b"N" + b"\x85R" * 20_000 + b".",
    "many opcodes": b"\x80\x04" + b"N" * 100_001 + b".",
    "no stop": b"\x80\x04N",
    "empty": b"",
    "text": b"hello",
    "number": pickle.dumps(3),
    "list": pickle.dumps([1, 2]),
    "state of a function": b"\x80\x04cnumpy\ndtype\n}b.",
    "state of ndarray": b"\x80\x04cnumpy\nndarray\n(K\x01K\x02tb.",
    "call of ndarray": b"\x80\x04cnumpy\nndarray\n(K\x01tR.",
    "array without state": NDARRAY + b".",
    "array without dtype": NDARRAY + b"(K\x01)NN]tb.",
    "two states": b"\x80\x04" + NUMBERS + b"(K\x01K\x01\x85" + DTYPE % b"O8" + b"\x89](" + NUMBERS + b"etb.",
    "array in itself": NDARRAY + b"q\x00(K\x01K\x01\x85" + DTYPE % b"O8" + b"\x89]h\x00atb.",
    **{f"{name}, whole": b"\x80\x04" + content + b"." for name, content in {
        "numbers at the top": NUMBERS,
        "list shorter than the shape": array_of(number(10**6) + b"\x85", DTYPE % b"O8", b"]"),
        "huge shape": array_of(number(2**31 - 1) * 3 + b"\x87", DTYPE % b"O8", b"]"),
        "shape of nothing": array_of(number(10**9) + b"K\x00\x86", DTYPE % b"O8", b"]"),
        "pointers": array_of(b"K\x02\x85", DTYPE % b"O8", b"C\x10" + b"A" * 16),
        "shape that is doubled lists": (
            NDARRAY[2:] + b"((" + DOUBLING + b"th<\x85" + DTYPE % b"f8" + b"\x89C\x00tb"),
    }.items()},
    **{f"{name}, inside": b"\x80\x04" + array_of(b"K\x01\x85", DTYPE % b"O8", b"](" + content + b"e") + b"."
       for name, content in {
        "negative shape": array_of(number(-2) * 2 + b"\x86", DTYPE % b"f8", b"C\x20" + b"\0" * 32),
        "more bytes than the shape": array_of(b"K\x01K\x01\x86", DTYPE % b"f8", b"C\x10" + b"\0" * 16),
        "structured": array_of(b"K\x02K\x02\x86", DTYPE % b"V8", b"C\x20" + b"\0" * 32),
        "objects from bytes": array_of(b"K\x02K\x02\x86", DTYPE % b"O8", b"C\x20" + b"A" * 32),
        "objects without flags": array_of(
            b"K\x02\x85", DTYPE % b"O8" + b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
            b"C\x10" + b"A" * 16),
        "odd state of a dtype": array_of(b"K\x02\x85", DTYPE % b"f8" + b"K\x05b", b"C\x10" + b"A" * 16),
        "object scalar": NUMBERS + b"cnumpy.core.multiarray\nscalar\n(" + DTYPE % b"O8" + b"C\x08AAAAAAAAtR",
        "long scalar": NUMBERS + b"cnumpy.core.multiarray\nscalar\n(" + DTYPE % b"f8" + b"C\x09AAAAAAAAAtR",
    }.items()},
    "one row many times": (
        b"\x80\x04" + array_of(number(20_001) + b"\x85", DTYPE % b"O8",
                               b"](](" + LONG_ROW + b"eq\x00" + b"h\x00" * 20_000 + b"e") + b"."
    ),
    "one tuple many times": (
        b"\x80\x04" + array_of(number(20_001) + b"\x85", DTYPE % b"O8",
                               b"]((" + LONG_ROW + b"tq\x00" + b"h\x00" * 20_000 + b"e") + b"."
    ),
}  # fmt: skip
HOSTILE = {**HAND_MADE, **{f"call of {name}": pickle.dumps(call) for name, call in HOSTILE_CALLS.items()},
           **{f"{name} inside": pickle.dumps(objects(IMAGE, call), protocol=4)
              for name, call in HOSTILE_CALLS.items()}}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_not_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.npy"
    path.write_bytes(npy(HOSTILE[name]))
    assert_refused(path)
    assert not (tmp_path / MARKER).exists()


def test_the_hostile_pickles_would_be_executed_and_the_hand_made_ones_read(tmp_path, monkeypatch):
    """Without what makes them hostile."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["call of os.system"])
    assert (tmp_path / MARKER).exists()
    one = array_of(b"K\x02\x85", DTYPE % b"O8", b"](" + NUMBERS + b"K\x01e")
    (tmp_path / "good.npy").write_bytes(npy(b"\x80\x04" + one + b"."))
    assert np.array_equal(read_npy(tmp_path / "good.npy"), np.zeros((2, 2)))


def test_a_small_pickle_cannot_ask_for_much_memory(tmp_path):
    many = objects(*[np.zeros((1000, 1000))] * 5000)  # 8 MB in the file, 40 GB as a stack
    np.save(tmp_path / "bomb.npy", many, allow_pickle=True)
    assert_refused(tmp_path / "bomb.npy", "too many images")


def test_a_stack_of_a_thousand_pickled_images_is_read(tmp_path):
    many = np.random.default_rng(1).random((1000, 8, 8))
    np.save(tmp_path / "many.npy", objects(*many), allow_pickle=True)
    assert np.array_equal(read_npy(tmp_path / "many.npy"), many)


# Headers of .npy, and .npz

BROKEN = {"empty": b"", "no array": b"no array at all\0", "magic alone": b"\x93NUMPY\x01\x00",
          "negative shape": npy(b"\0" * 8, "<f8", (-1,)), "gigantic shape": npy(b"\0" * 8, "<f8", (10**9, 10**9)),
          "too many dimensions": npy(b"\0" * 8, "<f8", (1,) * 40), "shape of floats": npy(b"\0" * 8, "<f8", (1.0,)),
          "truncated": npy(b"\0" * 7, "<f8", (1,)), "too long": npy(b"\0" * 9, "<f8", (1,)),
          "structured": npy(b"\0" * 8, [("a", "<f8")], (1,)), "complex": npy(b"\0" * 16, "<c16", (1,)),
          "text type": npy(b"\0" * 8, "<U2", (1,)), "date": npy(b"\0" * 8, "<M8[s]", (1,)),
          "header is code": b"\x93NUMPY\x01\x00\x12\x00__import__('os')\n\n",
          "header is deep": b"\x93NUMPY\x01\x00" + struct.pack("<H", 4000) + b"(" * 4000,
          "header is a list": b"\x93NUMPY\x01\x00\x26\x00['descr', 'fortran_order', 'shape']    \n",
          "header has an escape": npy(b"\0" * 8, "<f8", (1,)).replace(b"<f8", b"\\d8"),
          "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
          "version 3": b"\x93NUMPY\x03\x00" + struct.pack("<I", 2) + b"{}"}  # fmt: skip


@pytest.mark.parametrize("name", [*UNFIT, *MIXED, *BROKEN])
@pytest.mark.filterwarnings("error")
def test_what_is_not_one_image_of_finite_pixels_is_refused_by_name(name, tmp_path):
    if name in BROKEN:
        (tmp_path / "broken.npy").write_bytes(BROKEN[name])
    else:
        np.save(tmp_path / "broken.npy", (UNFIT | MIXED)[name], allow_pickle=True)
    assert_refused(tmp_path / "broken.npy", None if name in UNFIT else "not a usable .npy image")


def test_arrays_of_a_npz_file_that_are_no_images_are_told_apart(tmp_path):
    path = tmp_path / "set.npz"
    others = {"labels": np.arange(3), "names": np.array(["a", "b", "c"]), "scale": 0.1,
              "classes": np.array(["a", None], dtype=object), "dates": np.zeros(3, "M8[s]"),
              "records": np.zeros(2, [("x", "<f4"), ("y", "<i4")])}  # fmt: skip
    np.savez_compressed(path, image=IMAGE, **others)
    read, errors, unread = predicted(path)
    assert list(read) == [f"{path}:image"]
    assert unread == [f"{path}:{name}" for name in others]
    assert errors == []
    assert np.array_equal(read_image(path), IMAGE)
    np.savez(path, images=IMAGES, more=IMAGE)
    assert list(predicted(path)[0]) == [*(f"{path}:images[{i}]" for i in range(3)), f"{path}:more"]
    with pytest.raises(UserError, match=r"set\.npz.*one square image or one stack, got 2 arrays"):
        read_image(path)
    np.savez(path, **others)
    assert_refused(path, "there is no image in it")


def test_a_damaged_hostile_or_huge_npz_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    for bad in (objects(os.system, "true"), objects(IMAGE, "text"), objects(IMAGE, print)):
        np.savez(path, image=IMAGE, bad=bad)
        assert_refused(path, "not a usable .npz file")
    path.write_bytes(b"no zip\0")
    assert_refused(path, "not a usable .npz file")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*x\.npz: No such file"):
        read_image(path)
    np.savez_compressed(path, zeros=np.zeros((400, 400)))
    monkeypatch.setattr(npy_reader, "MAX_NPZ_BYTES", 10_000)
    assert_refused(path, "too large")


# FITS


def test_without_astropy_a_fits_file_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.fits").write_bytes(b"SIMPLE")
    monkeypatch.setitem(sys.modules, "astropy.io", None)
    assert_refused(tmp_path / "x.fits", "pip install astropy")


@pytest.fixture
def fits():
    return pytest.importorskip("astropy.io.fits")


def fits_bytes(*units):
    from astropy.io import fits

    file = io.BytesIO()
    fits.HDUList(list(units)).writeto(file)
    return file.getvalue()


def read_fits(path, content):
    """The image that training reads of a FITS file of this content, if prediction reads it, too."""
    path.write_bytes(content)
    (read,) = predicted(path)[0].values() or [None]
    image = read_image(path)
    assert np.array_equal(image, read)
    return image


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 8, 8), (8, 8, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_axes_of_length_one_do_not_count(shape, packed, fits, tmp_path):
    image = IMAGE.reshape(shape)
    units = [fits.PrimaryHDU(), fits.CompImageHDU(image)] if packed else [fits.PrimaryHDU(image)]
    read = read_fits(tmp_path / "one.fits", fits_bytes(*units))
    assert np.allclose(read, IMAGE, atol=0.05)  # fpack quantises floats


def test_every_suffix_in_any_case_is_read_and_compression_is_known_by_the_content(fits, tmp_path):
    plain = fits_bytes(fits.PrimaryHDU(IMAGE))
    contents = [plain, gzip.compress(plain), bz2.compress(plain)]
    names = [kind + packed for kind in (".fits", ".fit", ".fts") for packed in ("", ".gz", ".bz2", ".fz")]
    for i, (name, content) in enumerate(itertools.product((*names, ".FITS", ".Fit.GZ"), contents)):
        (tmp_path / f"{i}{name}").write_bytes(content)
    np.save(tmp_path / "a.npy", IMAGE)
    np.savez(tmp_path / "a.npz", IMAGE)
    (tmp_path / "a.npy").rename(tmp_path / "a.NPY")
    (tmp_path / "a.npz").rename(tmp_path / "a.Npz")
    files, others, errors = find_files([tmp_path])
    read, more_errors, _ = predicted(*files)
    assert len(read) == len(files) == 14 * 3 + 2
    assert others == errors == more_errors == []
    assert all(np.array_equal(image, IMAGE) for image in read.values())


def sky_and(fits, *others):
    """Bytes of a file with a table, `others`, {name: pixels}, and then the image that is meant."""
    column = fits.Column("x", "E", array=np.zeros(3))
    units = [fits.PrimaryHDU(), fits.BinTableHDU.from_columns([column])]
    units += [fits.ImageHDU(pixels, name=name) for name, pixels in others]
    return fits_bytes(*units, fits.ImageHDU(IMAGE[None], name="VIS_BGSUB"))


@pytest.mark.parametrize("name", ["WHT", "VIS_RMS", "err", "DES_G_PSF", "mask2", "FIT_MODEL", "IVAR"])
def test_maps_of_weights_errors_masks_and_psfs_are_not_taken_for_the_sky(name, fits, tmp_path):
    """A weight map that stood before the science image was classified in its place."""
    path = tmp_path / "x.fits"
    assert np.array_equal(read_fits(path, sky_and(fits, (name, 2 * IMAGE))), IMAGE)
    assert list(predicted(path)[0]) == [f"{path}[VIS_BGSUB]"]


@pytest.mark.parametrize("pixels", [np.ones((8, 8), np.float32), np.eye(8, dtype=np.int32),
                                    np.full((8, 8), 1 / 64, np.float32) + np.eye(8) / 1e3])  # fmt: skip
def test_images_without_a_name_are_known_by_their_content(pixels, fits, tmp_path):
    """Constants, flags and a PSF whose sum is one."""
    assert np.array_equal(read_fits(tmp_path / "x.fits", sky_and(fits, ("", pixels))), IMAGE)


def test_training_on_fits_and_npz_files_is_training_on_the_same_npy_files(fits, tmp_path):
    for name, pixels in {"a": IMAGES, "b": IMAGES + 1}.items():
        for kind in ("npy", "fits", "npz"):
            (tmp_path / kind / name).mkdir(parents=True)
        for i, image in enumerate(pixels):
            np.save(tmp_path / "npy" / name / f"{i}.npy", image)
            np.savez(tmp_path / "npz" / name / f"{i}.npz", image=image, label=np.array(name))
            suffix = (".fits", ".FIT", ".fts.gz")[i]
            fits.PrimaryHDU(image).writeto(tmp_path / "fits" / name / f"{i}{suffix}")
    npy, *others = (datasets.load(tmp_path / kind, progress=False) for kind in ("npy", "fits", "npz"))
    for other in others:
        assert np.array_equal(npy.images, other.images)
        assert np.array_equal(npy.hashes, other.hashes)
        assert npy.fingerprint == other.fingerprint


def test_of_several_images_none_is_taken_until_the_user_names_it(fits, tmp_path):
    """Of a file with eight bands the first was classified, which may show nothing but noise."""
    path = tmp_path / "x.fits"
    path.write_bytes(sky_and(fits, ("DES_G_BGSUB", 2 * IMAGE), ("DES_G_RMS", 3 * IMAGE)))
    assert_refused(path, r"several images.*--hdu.*they are: 2 DES_G_BGSUB \(8, 8\), 4 VIS_BGSUB \(8, 8\)$")
    for hdu in ("VIS_BGSUB", "vis_bgsub", "4"):
        ((name, image),) = predicted(path, hdu=hdu)[0].items()
        assert np.array_equal(image, IMAGE) and name == f"{path}[VIS_BGSUB]"
    for hdu in ("VIS", "1", "9", "", "-1"):
        assert "no image with --hdu" in predicted(path, hdu=hdu)[1][0][1]
    path.write_bytes(fits_bytes(fits.PrimaryHDU(IMAGE), fits.ImageHDU(IMAGE, name="SCI"), fits.ImageHDU(-IMAGE)))
    assert list(predicted(path)[0]) == [f"{path}[SCI]"]
    path.write_bytes(fits_bytes(fits.PrimaryHDU(), fits.ImageHDU(IMAGE, name="WHT")))
    assert_refused(path, "only maps of weights")


def test_the_planes_of_a_cube_are_what_the_user_says(fits, tmp_path):
    path = tmp_path / "cube.fits"
    path.write_bytes(fits_bytes(fits.PrimaryHDU(IMAGES)))
    np.save(tmp_path / "planes.npy", IMAGES)
    np.save(tmp_path / "last.npy", np.moveaxis(IMAGES, 0, -1))
    assert "--planes" in predicted(path)[1][0][1]
    assert "--planes" in predicted(tmp_path / "last.npy")[1][0][1]
    said = Said([], [], [], [])
    assert len(list(read_images([tmp_path / "planes.npy"], SIDE, said))) == 3
    assert "bands of one lens" in next(said.about_notes())
    assert len(predicted(path, planes="lenses")[0]) == 3
    for file in (path, tmp_path / "planes.npy", tmp_path / "last.npy"):
        assert np.array_equal(predicted(file, planes=1)[0][str(file)], IMAGES[1])
        assert np.allclose(predicted(file, planes="bands")[0][str(file)], IMAGES.mean(axis=0))
        assert "no band 3" in predicted(file, planes=3)[1][0][1]
    np.save(tmp_path / "one.npy", IMAGE)
    assert "no band 2" in predicted(tmp_path / "one.npy", planes=2)[1][0][1]
    assert len(predicted(tmp_path / "one.npy", planes=0)[0]) == 1


def test_pixels_that_fpack_has_rounded_are_named(fits, tmp_path):
    said = Said([], [], [], [])
    for name, options in {"rounded": {}, "exact": {"compression_type": "GZIP_2", "quantize_level": 0}}.items():
        unit = fits.CompImageHDU(np.random.default_rng(0).normal(size=(64, 64)), **options)
        (tmp_path / f"{name}.fits").write_bytes(fits_bytes(fits.PrimaryHDU(), unit))
        assert len(list(read_images([tmp_path / f"{name}.fits"], 64, said))) == 1
    (line,) = said.about_notes()
    assert "rounded.fits, compressed by fpack" in line and "exact.fits" not in line


def test_the_part_around_a_pixel_is_taken(fits, tmp_path):
    large = np.random.default_rng(1).random((20, 30)).astype(np.float32)
    large[12, 9] = 5
    np.save(tmp_path / "x.npy", large)
    for centre in ((9, 12), "brightest"):
        (image,) = predicted(tmp_path / "x.npy", centre=centre)[0].values()
        assert np.array_equal(image, large[8:16, 5:13])
    for centre in ((3, 12), (9, 17), (27, 12), (300, 12)):
        assert "not all in the image" in predicted(tmp_path / "x.npy", centre=centre)[1][0][1]


def test_resampling_keeps_light_and_place():
    image = np.random.default_rng(0).random((16, 12))
    blocks = image.reshape(8, 2, 6, 2).sum(axis=(1, 3))
    assert np.allclose(images.resampled(image, 0.5), blocks)
    assert images.resampled(image, 1) is image
    y, x = np.mgrid[:90, :90] - 44.5
    star = np.exp(-((x - 8.91) ** 2 + y**2) / 40)
    smaller = images.resampled(star, 0.495)
    columns = np.arange(smaller.shape[1]) - (smaller.shape[1] - 1) / 2
    assert smaller.sum() == pytest.approx(star.sum(), rel=1e-6)
    assert smaller.sum(axis=0) @ columns / smaller.sum() == pytest.approx(0.495 * 8.91, abs=5e-3)
    with pytest.raises(ValueError, match="too little detail"):
        images.resampled(image, 1.2)


def test_a_pixel_that_is_not_finite_spoils_only_those_that_it_falls_into():
    image = np.random.default_rng(0).random((16, 12))
    whole = images.resampled(image, 0.5)
    image[1, 0], image[15, 11] = np.nan, np.inf
    found = images.resampled(image, 0.5)
    assert np.argwhere(~np.isfinite(found)).tolist() == [[0, 0], [7, 5]]
    assert np.array_equal(found[1:7], whole[1:7])
    for size in (0.7, 0.8, 1.1):  # where shares are 1e-14 in the place of 0
        for column in range(64):
            is_bad = np.arange(64) == column
            spoiled = images.resampled(np.where(is_bad, np.nan, np.ones((64, 64))), size)
            assert np.array_equal(np.isnan(spoiled), images.resampled(np.broadcast_to(is_bad, (64, 64)), size) > 1e-6)


def test_the_pixel_scale_of_a_header_is_used_if_the_user_asks_for_it(fits, tmp_path):
    fine = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    headers = {"cd": {"CD1_1": -0.05 / 3600, "CD2_2": 0.05 / 3600, "CD1_2": 0.0, "CD2_1": 0.0},
               "cdelt": {"CDELT1": -0.05 / 3600, "CDELT2": 0.05 / 3600}, "none": {}}  # fmt: skip
    for name, cards in headers.items():
        header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", **cards} if cards else {})
        fits.PrimaryHDU(fine, header).writeto(tmp_path / f"{name}.fits")
        assert fits_reader.read_fits(tmp_path / f"{name}.fits").pixel_scale == (pytest.approx(0.05) if cards else None)
    blocks = fine.reshape(8, 2, 8, 2).sum(axis=(1, 3))
    for name in headers:
        path = tmp_path / f"{name}.fits"
        (given,) = predicted(path, pixel_scale=0.05, wanted_scale=0.1)[0].values()
        assert np.allclose(given, blocks, rtol=1e-6)
        found, errors, _ = predicted(path, pixel_scale="wcs", wanted_scale=0.1)
        assert "no WCS" in errors[0][1] if name == "none" else np.allclose(found[str(path)], blocks, rtol=1e-6)
    said = Said([], [], [], [])
    list(read_images([tmp_path / "cd.fits"], SIDE, said, How(crop=True, wanted_scale=0.1)))
    assert "--pixel-scale wcs" in next(said.about_notes())


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.fits", "x.png", "x.txt"])
def test_a_text_or_a_file_of_another_kind_is_named_as_what_it_is(name, tmp_path):
    texts = ("x", "file,label\na.npy,cdm\n", "Längen und Breiten der Linsen", "\n")
    others = ((b"\x89PNG\r\n", "a PNG picture"), (b"\x89HDF\r\n", "an HDF5 file")) if name == "x.npy" else ()
    for content, kind in (*((text.encode(), "a text file: give") for text in texts), *others):
        (tmp_path / name).write_bytes(content + bytes(100 * (content in dict(others))))
        assert_refused(tmp_path / name, f"is {kind}")


@pytest.mark.parametrize("packed", [False, True])
def test_scaled_and_blank_pixels_are_numbers_and_nan(packed, fits, tmp_path):
    stored = np.arange(64, dtype=np.int16).reshape(8, 8)
    unit = fits.CompImageHDU(stored) if packed else fits.ImageHDU(stored)
    unit.header.update(BLANK=5)
    content = fits_bytes(fits.PrimaryHDU(), unit)
    # BSCALE and BZERO are added as cards: astropy would scale the pixels when it writes them.
    end = content.index(b"END" + b" " * 77, content.index(b"BLANK   ="))
    scaling = {"BSCALE": 0.5, "BZERO": 10.0}
    cards = "".join(f"{name:8}= {value:20}".ljust(80) for name, value in scaling.items()).encode()
    (tmp_path / "x.fits").write_bytes(content[:end] + cards + b"END".ljust(80) + content[end + 240 :])
    (image,) = fits_reader.all_images(tmp_path / "x.fits")
    expected = 10 + 0.5 * stored.astype(float)
    expected[0, 5] = np.nan
    assert np.allclose(image, expected, equal_nan=True)
    assert_refused(tmp_path / "x.fits", "NaN")


@pytest.mark.parametrize("blank", [0, 3, -1])
@pytest.mark.parametrize("kind", ["i2", "u2", "u1", "packed i2", "packed u2"])
def test_pixels_that_the_header_calls_missing_are_missing(kind, blank, fits, tmp_path):
    """With BLANK = 0, or unsigned numbers, missing pixels were read as zeros or 32768."""
    stored = np.arange(64).reshape(8, 8) % 7
    is_unsigned = kind.endswith("u2")
    pixels = (stored + 32768 * is_unsigned).astype(kind[-2:])
    unit = fits.CompImageHDU(pixels) if "packed" in kind else fits.PrimaryHDU(pixels)
    unit.header["BLANK"] = blank
    (tmp_path / "x.fits").write_bytes(fits_bytes(*([fits.PrimaryHDU()] if "packed" in kind else []), unit))
    expected = np.where(stored == blank, np.nan, pixels)
    (image,) = fits_reader.all_images(tmp_path / "x.fits")
    assert np.array_equal(image, expected, equal_nan=True)
    assert np.array_equal(fits_reader.read_fits(tmp_path / "x.fits").array, expected, equal_nan=True)
    if blank >= 0:
        assert_refused(tmp_path / "x.fits", "NaN")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_decompressed_size_is_limited(compress, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(fits_reader, "MAX_BYTES", 10_000)
    (tmp_path / "large.fits").write_bytes(compress(fits_bytes(fits.PrimaryHDU(np.zeros((64, 64))))))
    assert_refused(tmp_path / "large.fits", "too large for a cutout")


def unusable_fits(fits):
    """{name: (content, what is said of it)}"""
    empty, image = fits.PrimaryHDU(), fits.ImageHDU(IMAGE, name="MODEL")  # modelling codes write it after the bands
    table = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.zeros(3))], name="CAT")
    packed, stored = fits_bytes(empty, fits.CompImageHDU(IMAGE)), np.arange(64, dtype=np.int16).reshape(8, 8)
    found = {"table": (fits_bytes(empty, table), "no image in it.*0 PRIMARY no image, 1 CAT no image"),
             "text": (gzip.compress(b"no FITS"), "not a usable FITS image"),
             "cube": (fits_bytes(fits.PrimaryHDU(IMAGES), image), r"several planes, shape \(3, 8, 8\)"),
             "packed cube": (fits_bytes(empty, fits.CompImageHDU(IMAGES), image), r"several planes, shape \(3, 8, 8\)"),
             "truncated": (fits_bytes(empty, fits.ImageHDU(IMAGE))[: 2 * 2880 + 10], "not a usable FITS image"),
             "packed, truncated": (packed[: 2 * 2880 + 10], "not a usable FITS image")}  # fmt: skip
    for card in ("ZNAXIS1", "ZNAXIS2", "ZTILE1", "ZTILE2", "PCOUNT"):
        at = packed.index(card.ljust(8).encode() + b"=")
        found[card] = packed[:at] + f"{card:8}= {10**9:20}".encode() + packed[at + 30 :], "too large for a cutout"
    for method in ("HCOMPRESS_1", "PLIO_1"):  # whose decoders crash on damaged files
        found[method] = fits_bytes(empty, fits.CompImageHDU(stored, compression_type=method)), f"{method}.*funpack"
    return found


def test_unusable_fits_files_are_refused_by_name(fits, tmp_path):
    for name, (content, said) in unusable_fits(fits).items():
        (tmp_path / f"{name}.fits").write_bytes(content)
        assert_refused(tmp_path / f"{name}.fits", said)


def test_numbers_of_packed_images_are_exact(fits, tmp_path):
    stored = np.arange(64, dtype=np.int16).reshape(8, 8)
    for method in ("RICE_1", "GZIP_1", "GZIP_2"):
        content = fits_bytes(fits.PrimaryHDU(), fits.CompImageHDU(stored, compression_type=method))
        assert np.array_equal(read_fits(tmp_path / "x.fits.fz", content), stored)


def test_tiles_that_hold_more_than_their_image_are_refused(fits, tmp_path):
    """Astropy inflated 60 MB from 64 kB, in an image that announces 16 kB."""
    image = fits.CompImageHDU(np.zeros((64, 64), np.float32), compression_type="GZIP_1", quantize_level=0)
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(tmp_path / "sound.fits")
    with fits.open(tmp_path / "sound.fits", disable_image_compression=True) as units:
        bomb = np.frombuffer(gzip.compress(bytes(10**6)), np.uint8)
        tiles = np.empty(64, object)
        tiles[:] = [bomb] * 64
        column = fits.Column("COMPRESSED_DATA", format="PB()", array=tiles)
        header = units[1].header.copy()
        table = fits.BinTableHDU.from_columns([column])
        header["PCOUNT"] = table.header["PCOUNT"]
        for key in [k for k in header if k.startswith("Z")]:
            table.header[key] = header[key]
        fits.HDUList([fits.PrimaryHDU(), table]).writeto(tmp_path / "bomb.fits")
    said = Said([], [], [], [])
    assert len(list(read_images([tmp_path / "sound.fits"], 64, said))) == 1
    errors = said.errors
    assert not errors and not list(read_images([tmp_path / "bomb.fits"], 64, said))
    assert "more than the image" in errors[0][1]


@pytest.mark.parametrize("method", ["", "RICE_1", "GZIP_1"])
def test_damaged_files_are_refused_or_read_and_crash_nothing(method, fits, tmp_path):
    rng = np.random.default_rng(0)
    unit = fits.CompImageHDU(IMAGE, compression_type=method) if method else fits.ImageHDU(IMAGE)
    original = fits_bytes(fits.PrimaryHDU(), unit)
    digits = [i for i in range(2880, len(original)) if original[i : i + 1].isdigit()]
    refused = 0
    for _ in range(300):
        content = bytearray(original)
        for i in rng.choice(digits, 3):
            content[i] = ord("0") + rng.integers(10)
        content[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / "damaged.fits").write_bytes(content)
        try:
            fits_reader.read_fits(tmp_path / "damaged.fits")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


# Finding files


def test_hidden_files_and_folders_do_not_count(tmp_path):
    for name in ("a.npy", ".b.npy", ".packed/images.npy", "__MACOSX/a.npy", ".git/x.txt", "._a.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == ([tmp_path / "a.npy"], [], [])
    packed = tmp_path / ".packed"  # asked for by name
    assert find_files([packed]) == ([packed / "images.npy"], [], [])


def test_links_to_folders_are_followed_once(tmp_path):
    root, far = tmp_path / "images", tmp_path / "far" / "deep"
    far.mkdir(parents=True)
    (root / "real").mkdir(parents=True)
    (far / "far.npy").touch()
    (root / "real" / "near.npy").touch()
    (root / "1_link").symlink_to(tmp_path / "far")
    (root / "2_same").symlink_to(tmp_path / "far")
    (root / "0_inside").symlink_to(root / "real")
    (root / "real" / "loop").symlink_to(root)
    (far / "back").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "link.npy").symlink_to(far / "far.npy")
    files, others, errors = find_files([root])
    assert relative(files, root) == ["1_link/deep/far.npy", "link.npy", "real/near.npy"]
    assert relative(others, root) == ["self"]
    assert errors == []


def test_the_same_path_twice_counts_once(tmp_path):
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path)
    a, b, link = tmp_path / "a.npy", tmp_path / "b.npy", tmp_path / "link"
    files, _, _ = find_files([a, a, link / "a.npy", b, link / ".." / tmp_path.name / "b.npy", tmp_path])
    assert files == [a, b]


def test_a_packed_data_set_is_its_images(tmp_path):
    names = ("dataset.json", "hashes.npy", "images.npy", "labels.npy")
    for name in names:
        (tmp_path / name).touch()
    files, others, _ = find_files([tmp_path])
    assert relative(files, tmp_path) == ["images.npy"]
    assert len(others) == 3


def test_a_folder_that_cannot_be_listed_is_an_error_and_a_missing_path_is_refused(tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "x.npy").touch()
    (tmp_path / "a.npy").touch()
    (tmp_path / "locked").chmod(0)
    code = (
        "import pathlib, sys; from lib.images import find_files\n"
        "files, others, errors = find_files([pathlib.Path(sys.argv[1])])\n"
        "print([file.name for file in files], others, errors)"
    )
    process = run_python("-c", code, tmp_path, before=bound_by_permissions())
    (tmp_path / "locked").chmod(0o700)
    assert process.stdout.startswith("['a.npy'] []")
    assert re.search(r"cannot list folder \S*locked: Permission denied", process.stdout)
    with pytest.raises(UserError, match="no file or folder .*gone"):
        find_files([tmp_path / "gone"])
