"""Image files from strangers: nothing in them runs, and what is good in them is read exactly."""

import gzip
import os
import pickle
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import readers
from lib.errors import UserError
from lib.readers import read_npy


def npy(content, descr="|O", shape=(2,), fortran_order=False):
    """Bytes of a .npy file with this header and content."""
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


MARKER = "executed"
TOUCH = f"open({MARKER!r}, 'w')"
IMAGE = np.ones((4, 4))

HOSTILE_CALLS = {
    "os.system": Calls(os.system, f"touch {MARKER}"),
    "os.mkdir": Calls(os.mkdir, MARKER),
    "eval": Calls(eval, TOUCH),
    "exec": Calls(exec, TOUCH),
    "open": Calls(open, MARKER, "w"),
    "getattr": Calls(getattr, "text", "upper"),
    "subprocess": Calls(subprocess.run, ["touch", MARKER]),
    "numpy.load": Calls(np.load, MARKER),
    "numpy.save": Calls(np.save, MARKER, IMAGE),
    "numpy.fromfile": Calls(np.fromfile, MARKER),
    "numpy.memmap": Calls(np.memmap, MARKER, "u1", "w+", 0, (4,)),
    "numpy.zeros": Calls(np.zeros, 10**12),
    "path": Path(MARKER),
    "torch": Calls(torch.zeros, 3),
    "tensor": torch.zeros(2),
}
HOSTILE_PICKLES = {
    **{name: pickle.dumps(call) for name, call in HOSTILE_CALLS.items()},
    **{
        f"{name} inside": pickle.dumps(np.array([IMAGE, call], dtype=object), protocol=4)
        for name, call in HOSTILE_CALLS.items()
    },
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
    "no stop": b"\x80\x04N",
    "empty": b"",
    "text": b"hello",
    "number": pickle.dumps(3),
    "state of a function": b"\x80\x04cnumpy\ndtype\n}b.",
    "state of ndarray": b"\x80\x04cnumpy\nndarray\n(K\x01K\x02tb.",
    "call of ndarray": b"\x80\x04cnumpy\nndarray\n(K\x01tR.",
    "array without dtype": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)NN]tb.",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused_by_name_and_not_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.npy"
    path.write_bytes(npy(HOSTILE_PICKLES[name]))
    with pytest.raises(UserError) as error:
        read_npy(path)
    assert "hostile.npy" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / MARKER).exists()


def test_the_hostile_pickles_do_execute_where_nothing_stops_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE_PICKLES["os.system"])
    assert (tmp_path / MARKER).exists()


BROKEN = {
    "empty": b"",
    "text": b"no array at all",
    "magic alone": b"\x93NUMPY\x01\x00",
    "negative shape": npy(b"\0" * 8, "<f8", (-1,)),
    "gigantic shape": npy(b"\0" * 8, "<f8", (10**9, 10**9)),
    "too many dimensions": npy(b"\0" * 8, "<f8", (1,) * 40),
    "shape of floats": npy(b"\0" * 8, "<f8", (1.0,)),
    "truncated": npy(b"\0" * 7, "<f8", (1,)),
    "too long": npy(b"\0" * 9, "<f8", (1,)),
    "structured": npy(b"\0" * 8, [("a", "<f8")], (1,)),
    "complex": npy(b"\0" * 16, "<c16", (1,)),
    "text type": npy(b"\0" * 8, "<U2", (1,)),
    "date": npy(b"\0" * 8, "<M8[s]", (1,)),
    "header is code": b"\x93NUMPY\x01\x00\x12\x00__import__('os')\n\n",
    "header is deep": b"\x93NUMPY\x01\x00" + struct.pack("<H", 4000) + b"(" * 4000,
    "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
    "version 3": b"\x93NUMPY\x03\x00" + struct.pack("<I", 2) + b"{}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_name(name, tmp_path):
    path = tmp_path / "broken.npy"
    path.write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=r"broken\.npy"):
        read_npy(path)


@pytest.mark.parametrize("protocol", [3, 4])
def test_good_object_arrays_are_read_bit_for_bit(protocol, tmp_path, lens_image):
    content = np.array([lens_image.astype(np.float64), np.float64(3e-23)], dtype=object)
    path = tmp_path / "axion.npy"
    path.write_bytes(npy(pickle.dumps(content, protocol=protocol)))
    assert np.array_equal(read_npy(path), lens_image.astype(np.float64))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8", "u1", "<i4", ">u2", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_every_kind_and_order_are_read(dtype, order, tmp_path):
    array = np.asarray(np.arange(12).reshape(3, 4) % 5, dtype=dtype, order=order)
    np.save(tmp_path / "numbers.npy", array)
    assert np.array_equal(read_npy(tmp_path / "numbers.npy"), array)
    np.save(tmp_path / "object.npy", np.array([array, 1.5], dtype=object), allow_pickle=True)
    assert np.array_equal(read_npy(tmp_path / "object.npy"), array)


def test_truncation_at_any_place_is_refused(tmp_path, lens_image):
    np.save(tmp_path / "good.npy", np.array([lens_image, 1e-23], dtype=object), allow_pickle=True)
    content = (tmp_path / "good.npy").read_bytes()
    for length in range(0, len(content), 64):
        (tmp_path / "cut.npy").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.npy"):
            read_npy(tmp_path / "cut.npy")


def test_npz_files_hold_no_more_than_they_say(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    stored = {"a": rng.random((3, 4)), "b": rng.random((2, 3)).astype(">f4")}
    np.savez_compressed(tmp_path / "good.npz", **stored)
    for name, array in readers.read_npz(tmp_path / "good.npz"):
        assert np.array_equal(array, stored[name])
    np.savez_compressed(tmp_path / "bomb.npz", zeros=np.zeros(200_000))
    monkeypatch.setattr(readers, "MAX_NPZ_BYTES", 10_000)
    with pytest.raises(UserError, match=r"bomb\.npz.*too large"):
        readers.read_npz(tmp_path / "bomb.npz")
    np.savez(tmp_path / "hostile.npz", evil=np.array([os.system, "true"], dtype=object))
    with pytest.raises(UserError, match=r"hostile\.npz"):
        readers.read_npz(tmp_path / "hostile.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"text\.npz: not a usable"):
        readers.read_npz(tmp_path / "text.npz")
    with pytest.raises(UserError, match=r"missing\.npz"):
        readers.read_npz(tmp_path / "missing.npz")


def test_a_compressed_fits_file_holds_no_more_than_a_cutout(tmp_path, monkeypatch):
    fits = pytest.importorskip("astropy.io.fits")
    path = tmp_path / "bomb.fits.gz"
    fits.PrimaryHDU(np.zeros((100, 100))).writeto(path)
    assert readers.read_fits(path).shape == (100, 100)
    monkeypatch.setattr(readers, "MAX_FITS_BYTES", 10_000)
    with pytest.raises(UserError, match=r"bomb\.fits\.gz.*too large"):
        readers.read_fits(path)
    path.write_bytes(gzip.compress(b"no FITS"))
    with pytest.raises(UserError, match=r"bomb\.fits\.gz: not a usable FITS image"):
        readers.read_fits(path)


def test_a_large_array_is_mapped_and_can_be_read_after_its_memory_was_returned(
    tmp_path, monkeypatch
):
    array = np.arange(4096.0).reshape(64, 64)
    np.save(tmp_path / "large.npy", array)
    monkeypatch.setattr(readers, "MAP_ABOVE_BYTES", 1000)
    mapped = read_npy(tmp_path / "large.npy")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, array)
    readers.forget_pages(mapped)
    assert np.array_equal(mapped, array)
    readers.forget_pages(array)  # not mapped: nothing to return
