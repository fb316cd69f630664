"""Damaged files of every kind that is read: a UserError or a value, in bounded time and memory."""

import contextlib
import json
import os
import signal
import tracemalloc

import numpy as np
import pytest

from lib import files, images, npy, onnxfile, weights
from lib.errors import UserError

FUZZED_FILES = int(os.environ.get("FUZZED_FILES", "2000"))
MAX_BYTES, MAX_SECONDS = 200 * 2**20, 2.0


@contextlib.contextmanager
def bounded():
    """Fail if the block computes for longer than MAX_SECONDS or allocates more than MAX_BYTES."""

    def too_long(*_):
        pytest.fail(f"computed for more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)  # processor time: load does not matter
    tracemalloc.reset_peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert tracemalloc.get_traced_memory()[1] < MAX_BYTES


def damage(good, rng):
    """A copy of `good` with some bytes changed, a piece cut out, or noise instead."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.bytes(int(rng.integers(1, 400)))
    damaged = bytearray(good)
    for position in rng.integers(0, min(len(good), 2000), rng.integers(1, 6)):
        damaged[position] = rng.integers(256)
    if kind == 1:
        start = int(rng.integers(len(good)))
        del damaged[start : start + int(rng.integers(1, 64))]
    return bytes(damaged)


def fuzz(read, path, originals, count):
    """Read `count` damaged copies; returns how many were refused and how many bytes were read."""
    rng = np.random.default_rng(0)
    refused = total = 0
    tracemalloc.start()
    try:
        for i in range(count):
            content = damage(originals[i % len(originals)], rng)
            path.write_bytes(content)
            total += len(content)
            try:
                with bounded():
                    read(path)
            except UserError as error:
                refused += 1
                assert str(path) in str(error)
                assert "\n" not in str(error)
    finally:
        tracemalloc.stop()
    print(f"{count} {path.suffix} files, {total} bytes, {refused} refused")
    return refused


def test_damaged_npy(tmp_path):
    image = np.random.default_rng(0).random((8, 8))
    np.save(tmp_path / "plain.npy", image)
    np.save(tmp_path / "object.npy", np.array([image, 1e-23], dtype=object), allow_pickle=True)
    originals = [(tmp_path / name).read_bytes() for name in ("plain.npy", "object.npy")]
    refused = fuzz(npy.read_npy, tmp_path / "damaged.npy", originals, FUZZED_FILES)
    assert FUZZED_FILES / 4 < refused < FUZZED_FILES


def test_damaged_json(tmp_path):
    original = json.dumps({"format": 1, "class_names": ["a", "b"], "deep": [[{}]]}).encode()
    assert fuzz(files.read_json, tmp_path / "damaged.json", [original], FUZZED_FILES) > 0


def test_damaged_weights(tmp_path, runs):
    original = (runs / "pretrain" / "vit-mae-wt.pth").read_bytes()
    assert fuzz(weights.load_mae, tmp_path / "damaged.pth", [original], FUZZED_FILES // 10) > 0


def test_damaged_onnx(tmp_path, runs):
    original = (runs / "classifier.onnx").read_bytes()
    path = tmp_path / "damaged.onnx"
    assert fuzz(onnxfile.open_classifier, path, [original], FUZZED_FILES // 10) > 0


def test_damaged_npz(tmp_path):
    image = np.random.default_rng(0).random((8, 8))
    np.savez_compressed(tmp_path / "good.npz", image=image, more=image)
    original = (tmp_path / "good.npz").read_bytes()
    assert fuzz(images.read_arrays, tmp_path / "damaged.npz", [original], FUZZED_FILES) > 0
