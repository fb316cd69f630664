"""lib/clusters.py: kinds of maps that are found without labels, in cases whose answer is known."""

import warnings

import numpy as np
import pytest

from lib import clusters
from lib.errors import UserError

SLOPES = (0.0, 1.0, 2.0)  # of the amplitude over the frequency: three kinds of noise


def noise(rng, kinds, size=16):
    """Maps (n, size, size) of noise whose spectrum is that of their kind, of varied strength.

    Steeper noise is stronger.
    """
    frequency = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(size, 1 / size)]))
    slopes = np.reshape(SLOPES, (-1, 1, 1))
    spectrum = 10.0 ** np.arange(len(SLOPES))[:, None, None] / np.maximum(frequency, 1) ** slopes
    white = np.fft.fft2(rng.standard_normal((len(kinds), size, size)))
    strength = rng.uniform(0.5, 2, (len(kinds), 1, 1))
    return strength * np.fft.ifft2(white * spectrum[kinds]).real


@pytest.fixture(scope="module")
def known():
    """(powers (1500, 3) of noise, its kinds)."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(len(SLOPES), size=1500)
    return clusters.octave_powers(noise(rng, kinds)), kinds


@pytest.mark.parametrize(("cycles", "octave"), [(1, 0), (2, 1), (3, 1), (4, 2), (9, 3), (16, 4), (32, 4)])
def test_a_wave_is_in_the_octave_of_its_cycles(cycles, octave):
    wave = np.cos(2 * np.pi * cycles * np.arange(64) / 64)
    for image in (np.tile(wave, (64, 1)), np.tile(wave[:, None], (1, 64))):
        powers = clusters.octave_powers(image[None].astype(np.float32))
        assert powers.shape == (1, 5)
        assert powers.argmax() == octave
        assert np.sort(powers)[0, -1] - np.sort(powers)[0, -2] > 10


def test_the_power_is_the_mean_of_the_octave():
    """One octave holds all of 4 pixels, where the mean of |FFT|² is the sum of squares (Parseval)."""
    maps = np.random.default_rng(0).standard_normal((3, 4, 4))
    expected = np.log((maps**2).sum(axis=(1, 2)))
    assert clusters.octave_powers(maps)[:, 0] == pytest.approx(expected)
    assert clusters.octave_powers(10 * maps)[:, 0] == pytest.approx(expected + 2 * np.log(10))


@pytest.mark.parametrize(("size", "octaves"), [(1, 1), (7, 1), (8, 2), (16, 3), (48, 4), (64, 5), (65, 5), (128, 6)])
def test_maps_of_any_size_have_their_octaves(size, octaves):
    powers = clusters.octave_powers(np.random.default_rng(0).standard_normal((2, size, size)))
    assert powers.shape == (2, octaves)
    assert np.isfinite(powers).all()


def test_kinds_of_noise_are_found_and_numbered_by_strength(known):
    powers, kinds = known
    found = clusters.fit(powers, 3, 0)
    assert found.images == 1500
    assert found.overlap < 0.01
    rng = np.random.default_rng(1)
    others = rng.integers(3, size=300)
    assert (clusters.assign(found, powers) == kinds).mean() > 0.99
    assigned = clusters.assign(found, clusters.octave_powers(noise(rng, others)))
    assert (assigned == others).mean() > 0.99


def test_a_kind_of_any_shape_is_found():
    """Two half rings that reach into each other; each takes several of the Gaussians."""
    rng = np.random.default_rng(1)
    kinds, angle = rng.integers(2, size=4000), rng.uniform(0, np.pi, 4000)
    points = 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points[kinds == 1] = [5, 1.5] - points[kinds == 1]
    points += 0.3 * rng.standard_normal((4000, 2))
    right = (clusters.assign(clusters.fit(points, 2, 0), points) == kinds).mean()
    assert max(right, 1 - right) > 0.99


def test_of_several_fits_the_one_with_the_least_overlap_is_kept_and_told(monkeypatch):
    points = np.random.default_rng(0).standard_normal((600, 2))  # no kinds: every fit differs
    several = clusters.fit(points, 2, 0)
    assert several.overlap > clusters.MOST_OVERLAP
    assert "overlap left" in clusters.doubt(several)
    monkeypatch.setattr(clusters, "FITS", 1)
    alone = [clusters.fit(points, 2, seed) for seed in range(4)]
    assert len({fit.overlap for fit in alone}) == 4
    assert several.overlap < alone[0].overlap  # the first of the several


def test_overlap_is_the_share_of_the_smaller_group_that_the_other_claims():
    shares = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1.0]])
    # Sizes 1.5, 1 and 2.5; products 0.25 of the first two, 0.25 of the last two.
    expected = [[0, 0.25, 0], [0.25, 0, 0.25], [0, 0.25, 0]]
    assert clusters.overlaps(shares) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("kinds", "images", "named"),
    [(1, 9000, "from 2 to 20, got 1"), (21, 9000, "from 2 to 20, got 21"), (4, 3, "only 3 images"),
     (10**20, 3, "from 2 to 20")],
)  # fmt: skip
def test_too_few_or_too_many_kinds_are_refused(kinds, images, named):
    with pytest.raises(UserError, match=f"^--clusters .*{named}"):
        clusters.fit(np.zeros((images, 5)), kinds, 0)


@pytest.mark.parametrize(("kinds", "images"), [(2, 2), (20, 100)])
def test_few_images_are_sorted_into_as_many_kinds_as_wished(kinds, images):
    powers = np.random.default_rng(0).standard_normal((images, 5))
    found = clusters.fit(powers, kinds, 0)
    assert found.count == kinds
    assert set(clusters.assign(found, powers)) == set(range(kinds))


@pytest.mark.parametrize("different", [1, 2])
def test_maps_that_are_all_alike_are_sorted_without_a_word(different):
    maps = np.zeros((40, 16, 16))
    maps[:, 0, 0] = np.arange(40) % different
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        powers = clusters.octave_powers(maps)
        found = clusters.assign(clusters.fit(powers, 3, 0), powers)
    assert set(found) <= {0, 1, 2}
    assert len({tuple(found[i::different]) for i in range(different)}) == different


def test_kinds_are_matched_so_that_most_images_agree():
    # Kind 2 holds most of class 0 and of class 1. Which of them takes it, all images decide.
    labels = np.repeat([0, 1, 2], [10, 10, 5])
    found = np.repeat([2, 0, 2, 1, 1, 2], [6, 4, 9, 1, 3, 2])
    table, class_of = clusters.match(found, labels, 3, 3)
    assert table.tolist() == [[4, 0, 6], [0, 1, 9], [0, 3, 2]]
    assert class_of.tolist() == [0, 2, 1]
    # Classes and kinds may differ in number.
    _, class_of = clusters.match(np.array([0, 0, 1, 2]), np.array([1, 1, 0, 0]), 3, 2)
    assert class_of[0] == 1
    assert sorted(class_of[1:].tolist()) == [-1, 0]
    table, class_of = clusters.match(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2]), 2, 3)
    assert table.shape == (3, 2)
    assert class_of.tolist() == [1, 2]
