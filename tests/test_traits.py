"""What is said of images that are unlike the training images: what is measurable, and nothing else."""

import json

import numpy as np
import pytest

from lib import lenses, traits

IMAGES = np.concatenate([images for _, images, _ in lenses.simulate("Model_II", 60, 0, progress=False)])
OTHERS = np.concatenate([images for _, images, _ in lenses.simulate("Model_II", 20, 1, progress=False)])
REFERENCE = np.array(list(traits.reference_of(IMAGES).values()))
NOISE = np.random.default_rng(0).normal(size=OTHERS.shape)


@pytest.mark.parametrize(("changed", "said"), [(OTHERS, None),
                                               (255 * OTHERS, "times that of the training images (--scale 0.003"),
                                               (OTHERS / 255, "--scale 25"), (OTHERS + 1, "the darkest pixel is 1,"),
                                               (OTHERS + 0.05 * NOISE, "the corners are noisy"),
                                               (255 * (OTHERS + 0.05 * NOISE), "the corners are noisy"),
                                               (np.roll(OTHERS, 6, axis=2), "off-centre by (+"),
                                               (np.minimum(OTHERS, 2), "saturated"),
                                               (np.where(OTHERS < 0.1, 0, OTHERS), "exactly zero"),
                                               (np.zeros_like(OTHERS), "all pixels are equal")])  # fmt: skip
def test_what_is_measurable_is_named_and_nothing_is_said_of_ordinary_images(changed, said):
    found = traits.advice(traits.traits_of(changed.astype(np.float32)), REFERENCE)
    assert any(said in text for text in found) if said else found == []


@pytest.mark.parametrize("shift", [(3, -3), (0, 2)])
def test_a_shift_of_many_images_is_named_though_one_image_may_be_so(shift):
    shifted = traits.traits_of(np.roll(OTHERS, shift, axis=(1, 2)))
    assert any(text.startswith("the light is off-centre by (") for text in traits.advice(shifted, REFERENCE))
    (row, column), usual = np.median(shifted[:, 5:], axis=0), REFERENCE[5:, 1]
    assert np.all((REFERENCE[5:, 0] < (row, column)) & ((row, column) < REFERENCE[5:, 2]))
    assert np.abs(np.array([row, column]) - usual - shift).max() < 1.2  # what is named is the shift


def test_a_shift_of_as_few_images_as_chance_makes_strange_is_none():
    """The strangest ordinary images are off-centre: they are chosen for it."""
    shifted = traits.traits_of(np.roll(OTHERS, (3, -3), axis=(1, 2)))
    assert traits.advice(shifted, REFERENCE, by_chance=True) == []
    assert traits.advice(traits.traits_of(255 * OTHERS), REFERENCE, by_chance=True)


def test_figures_of_a_file_are_used_only_if_they_are_sound():
    stored = traits.reference_of(IMAGES)
    assert np.array_equal(traits.reference_in({"figures": json.dumps(stored)}), REFERENCE)
    for bad in ("null", "[]", "{", "1", json.dumps({name: "x" for name in stored}),
                json.dumps({name: [1, 2] for name in stored}),
                json.dumps({name: [1, 2, float("nan")] for name in stored}), "[" * 10_000):  # fmt: skip
        assert traits.reference_in({"figures": bad}) is None
    assert traits.reference_in({}) is None
