"""Augmentation: what it changes, and what it must leave alone."""

import math

import numpy as np
import pytest
import torch

from lib import augment, lenses


@pytest.fixture
def images(lens_image):
    return torch.from_numpy(lens_image)[None, None].repeat(6, 1, 1, 1)


def test_turns_by_quarters_and_shifts_by_whole_pixels_are_exact(images):
    assert torch.equal(augment.augment(images, ()), images)
    still, nowhere = torch.zeros(6), torch.zeros(6, 2)
    assert torch.allclose(augment.move(images, still, nowhere), images, atol=1e-4)
    turned = augment.move(images, torch.full((6,), math.pi / 2), nowhere)
    assert torch.allclose(turned, images.rot90(-1, (2, 3)), atol=1e-3)
    shifted = augment.move(images, still, torch.tensor([[2.0, -3.0]]).repeat(6, 1))
    expected = images.roll((-3, 2), (2, 3))
    assert torch.allclose(shifted[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], atol=1e-3)


def test_half_a_turn_of_a_lens_is_a_lens_and_half_of_the_images_are_turned():
    source, masses, _ = lenses.sample("cdm", 1, np.random.default_rng(0))
    mirrored = masses * [1, -1, -1]
    both = np.concatenate([masses, mirrored])
    one, other = lenses.render(np.concatenate([source, -source]), both)
    assert torch.allclose(one.flip(0, 1), other, atol=1e-12 * float(one.max()))
    torch.manual_seed(0)
    images = augment.augment(one[None, None].repeat(200, 1, 1, 1), ("halfturn",))
    turned = (images[:, 0] == one.flip(0, 1)).all(2).all(1)
    kept = (images[:, 0] == one).all(2).all(1)
    assert (turned ^ kept).all()
    assert 70 < turned.sum() < 130


def test_flips_give_each_of_the_eight_orientations_alike():
    torch.manual_seed(0)
    one = torch.rand(8, 8)
    expected = [torch.rot90(face, turns) for face in (one, one.T) for turns in range(4)]
    images = augment.augment(one[None, None].repeat(800, 1, 1, 1), ("flips",))[:, 0]
    counts = [int((images == image).all(2).all(1).sum()) for image in expected]
    assert sum(counts) == 800
    assert 60 < min(counts) < max(counts) < 140


def test_noise_has_the_strength_of_its_range_in_any_unit(images):
    torch.manual_seed(0)
    dark = torch.zeros(200, 1, 64, 64)
    dark[:, :, 0, 0] = 1.0  # the peak
    sigma = augment.augment(dark, ("noise",))[:, 0, 32:].std(dim=(1, 2)).log10()
    low, high = augment.BACKGROUND_RANGE
    assert low - 0.05 < sigma.min() < low + 0.2
    assert high - 0.2 < sigma.max() < high + 0.05
    torch.manual_seed(1)
    once = augment.augment(images, augment.KINDS)
    torch.manual_seed(1)
    scaled = augment.augment(1000 * images, augment.KINDS)
    assert torch.allclose(scaled, 1000 * once, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(once[0], once[1])
    blank = torch.tensor([0.0, 1.0, -1.0])[:, None, None, None].expand(3, 1, 8, 8)
    assert torch.isfinite(augment.augment(blank, ("noise",))).all()


@pytest.mark.parametrize("kinds", [(kind,) for kind in augment.KINDS] + [augment.KINDS])
def test_part_of_a_batch_changes_as_it_does_in_the_whole_batch(kinds):
    images = torch.rand(6, 1, 16, 16) + 0.1
    torch.manual_seed(0)
    whole = augment.augment(images, kinds)
    after = torch.get_rng_state()
    for part in (slice(0, 3), slice(3, 6), slice(4, 5)):
        torch.manual_seed(0)
        assert torch.equal(augment.augment(images[part], kinds, 6, part), whole[part])
        assert torch.equal(torch.get_rng_state(), after)  # the next batch agrees too


def test_noise_of_known_strength_is_that_strong():
    images = torch.full((1, 1, 200, 200), 0.5)
    images[0, 0, 0, 0] = 2.0  # the peak
    normal = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    background, electrons = (torch.full((1, 1, 1, 1), value) for value in (1e-2, 1e3))
    noise = (augment.add_noise(images, background, electrons, normal) - images)[0, 0, 1:]
    # Shot noise: 1000 electrons at the peak are 250 here.
    expected = 2.0 * math.sqrt(1e-2**2 + 0.25 / 1e3)
    assert noise.std().item() == pytest.approx(expected, rel=0.02)
