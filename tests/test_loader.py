"""Batches on their way to the network, their order and memory, and the transform's constants."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import datasets, intensity, lenses, loader, npy

CPU = torch.device("cpu")


def test_results_come_in_the_order_of_the_rows_whatever_the_batch(monkeypatch):
    rows = np.array([5, 3, 9, 9, 0, 7, 1])
    for batch_size in (1, 3, 7, 100):
        monkeypatch.setattr(loader, "EVALUATION_BATCH", batch_size)
        results = loader.in_batches(lambda batch: torch.from_numpy(2 * batch), rows)
        assert results.dtype == torch.float32
        assert results.tolist() == [10, 6, 18, 18, 0, 14, 2]


def test_fixed_random_numbers_are_the_same_each_time_and_leave_the_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        with loader.fixed_random_numbers():
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(3), expected)


def test_rows_in_blocks_are_all_there_and_read_together():
    rows = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.8)
    order = loader.shuffled(rows, np.random.default_rng(1), in_blocks=True)
    assert np.array_equal(np.sort(order), rows)
    assert np.array_equal(order, loader.shuffled(rows, np.random.default_rng(1), in_blocks=True))
    together = loader.READ_BLOCK * loader.BLOCKS_TOGETHER
    position = np.searchsorted(rows, order)
    first = position[:together] // loader.READ_BLOCK
    assert len(np.unique(first)) == loader.BLOCKS_TOGETHER
    # Mixed: neighbours in the order come from different blocks, and classes from all over.
    assert (np.diff(first) == 0).mean() < 0.05
    assert abs(position[:together].mean() - len(rows) / 2) < len(rows) / 10


# Memory


def test_rows_from_everywhere_do_not_keep_a_whole_file_mapped_unless_it_is_small(monkeypatch):
    # Where a kernel maps 2 MB for each row, 64 rows a batch are a gigabyte after eight batches.
    def returned_after(images):
        batches, returned = 0, []
        monkeypatch.setattr(loader, "forget_pages", lambda _: returned.append(batches))
        read = loader.batch_reader(images, CPU)
        for start in range(0, 2000, 64):
            batches += 1
            read(np.arange(start, min(start + 64, 2000)))
        return returned

    returned = returned_after(np.broadcast_to(np.float32(0), (10**8, 2, 2)))
    assert returned[0] <= 8
    assert np.diff(returned).max() <= 8
    assert returned_after(np.zeros((2000, 2, 2), np.float32)) == []


def test_a_data_set_kept_on_the_device_gives_the_same_batches(packed):
    images = datasets.load(packed).images
    rows = np.array([250, 3, 299, 3])
    batch = loader.StoredImages(images, CPU)(rows)
    assert torch.equal(batch, loader.batch_reader(images, CPU)(rows))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_looking_at_images_from_everywhere_leaves_no_pages_behind(tmp_path):
    """Mapped pages of a file count as the process's memory until they are returned."""

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) * 1024

    stored = np.random.default_rng(0).random((4000, 1, 1)).astype(np.float32)
    np.save(tmp_path / "images.npy", np.broadcast_to(stored, (4000, 64, 64)))
    mapped = npy.read_npy(tmp_path / "images.npy")
    before = resident()
    intensity.fit_transform(mapped, np.arange(4000), "log")
    assert resident() - before < 16e6  # of 66 MB


# Constants of the transform


def test_transform_constants_come_from_the_training_rows_alone(packed):
    dataset = datasets.load(packed)
    rows = datasets.split(dataset)["train"]
    images = np.array(dataset.images)
    before = intensity.fit_transform(images, rows, "log")
    others = np.setdiff1d(np.arange(len(images)), rows)
    images[others] = 1e6
    assert intensity.fit_transform(images, rows, "log") == before
    images[rows] *= 2
    assert intensity.fit_transform(images, rows, "log") != before


def test_fewer_large_images_are_looked_at():
    rows = np.arange(5000)
    for side, count in ((200, 2000), (1000, 80), (4096, 50)):
        chosen = loader.some_of(rows, 2000, np.broadcast_to(0.0, (5000, side, side)))
        assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == 4999
    assert np.array_equal(loader.some_of(rows[:7], 2000, np.empty((5000, 1, 1))), rows[:7])


def test_constants_of_large_images_come_from_few(rows_read, monkeypatch):
    monkeypatch.setattr(loader, "SAMPLED_PIXELS", 60 * 16**2)
    monkeypatch.setattr(intensity, "batch_reader", loader.batch_reader)  # the spy
    images = np.random.default_rng(0).random((500, 16, 16), dtype=np.float32)
    intensity.fit_transform(images, np.arange(500), "log")
    assert len(rows_read) == 60


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_transform_constants_withstand_hot_pixels_and_bad_images(kind, packed):
    dataset = datasets.load(packed)
    rows = datasets.split(dataset)["train"]
    images = np.array(dataset.images)
    before = intensity.fit_transform(images, rows, kind)
    assert before.pop("kind") == kind
    images[rows[::50], :6] = -99.0  # a sentinel border
    images[rows[100], 3, 3] = 1e9
    images[rows, 5, 5] = 1e4  # a hot pixel of the camera
    after = intensity.fit_transform(images, rows, kind)
    assert after.pop("kind") == kind
    assert after == pytest.approx(before, rel=0.05, abs=0.01 * before["softening"])


def test_the_noise_of_simulated_images_is_measured():
    noisy, clean = (
        np.concatenate([part for _, part, _ in lenses.simulate("Model_II", 5, 0, noise, progress=False)])
        for noise in (True, False)
    )
    background, _ = lenses.noise_of(lenses.INSTRUMENTS["Model_II"], 0.0)
    assert intensity.noise_level(noisy) == pytest.approx(background, rel=0.2)  # photons add to it
    assert intensity.noise_level(clean) < 0.01 * background
