"""experiments/kinds.py: each kind is what it says, and the figures are right."""

import numpy as np
import pytest
import torch
from torch import nn

from experiments import kinds
from lib import lenses
from lib.errors import UserError

PER_CLASS, SEED = 4, 7


def make(kind, seed=SEED):
    return kinds.make(kind, PER_CLASS, seed)[0]


@pytest.fixture(scope="module")
def clean():
    return make("clean")


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_has_finite_images_of_its_seed(kind):
    images, labels = kinds.make(kind, PER_CLASS, SEED)
    assert images.dtype == np.float32
    assert images.shape[1:] == (64, 64)
    assert np.isfinite(images).all()
    assert images.flags.writeable
    if kind in kinds.WITHOUT_ANSWER:
        assert labels is None
    else:
        assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    if not kind.startswith("blank"):
        assert len(images) == 12
        assert not np.array_equal(images, make(kind, SEED + 1))
    before = images.copy()
    images += 1  # what was given belongs to the caller
    make("Euclid noise")  # what was made before does not matter
    kinds.simulated.cache_clear()
    assert np.array_equal(make(kind), before)


def test_units_noise_and_moves(clean):
    batches = lenses.simulate("Model_II", PER_CLASS, SEED, progress=False)
    assert np.array_equal(clean, np.concatenate([images for _, images, _ in batches]))
    assert np.allclose(make("units ×255"), 255 * clean)
    assert np.allclose(make("units /100"), clean / 100)
    low, high = (clean.min((1, 2), keepdims=True), clean.max((1, 2), keepdims=True))
    assert np.allclose(make("min-max"), (clean - low) / (high - low), atol=1e-6)
    for percent in (0.01, 0.1, 1):
        noise = (make(f"noise {percent:g} %") - clean) / high
        assert noise.std(axis=(1, 2)) == pytest.approx(percent / 100, rel=0.05)
    for pixels in (1, 5):
        assert np.array_equal(make(f"shifted {pixels} px")[:, :, pixels:], clean[:, :, :-pixels])
    assert np.array_equal(make("mirrored")[:, :, ::-1], clean)
    assert np.array_equal(make("turned 90°")[:, ::-1].transpose(0, 2, 1), clean)


def test_the_psf_changes_how_sharp_images_are(clean):
    def sharpness(images):
        return np.abs(np.diff(images, axis=2)).max()

    wider, narrower = make("PSF +20 %"), make("PSF −20 %")
    assert sharpness(wider) < sharpness(clean) < sharpness(narrower)
    for images in (wider, narrower):
        assert images.sum((1, 2)) == pytest.approx(clean.sum((1, 2)), rel=1e-3)


def test_a_second_source_adds_its_light(clean):
    added = make("second source") - clean
    assert added.min() > -1e-6
    share = added.sum((1, 2)) / clean.sum((1, 2))
    assert ((share > 0.2) & (share < 1.4)).all()
    usual = np.corrcoef(clean[8:].reshape(4, -1))[np.triu_indices(4, 1)].mean()
    own = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(added[8:], clean[8:], strict=True)]
    assert np.mean(own) < usual + 0.2  # elsewhere, as another lens's source would be


def test_frames_without_a_lens(clean):
    assert make("blank, zero").tolist() == np.zeros((1, 64, 64)).tolist()
    constant = make("blank, constant")
    assert (constant == constant[:, :1, :1]).all()
    assert (np.diff(constant[:, 0, 0]) > 0).all()
    usual = np.median(clean.max((1, 2)))
    noise = make("uniform noise")
    assert 0 <= noise.min() < 0.01 * usual
    assert 0.99 * usual < noise.max() <= usual
    for kind in ("Gaussian blob", "galaxy without a lens"):
        images = make(kind)
        y, x = np.unravel_index(images.reshape(len(images), -1).argmax(axis=1), (64, 64))
        assert (np.hypot(y - 31.5, x - 31.5) < 8).all()  # one object near the centre, no ring
        assert ((0.25 * usual < images.max((1, 2))) & (images.max((1, 2)) < 1.35 * usual)).all()
        assert images.min() >= 0


# Cutouts


def write_fits(path, *planes):
    fits = pytest.importorskip("astropy.io.fits")
    units = [fits.PrimaryHDU(), *(fits.ImageHDU(plane) for plane in planes)]
    fits.HDUList(units).writeto(path)


def test_cutouts_are_cropped_and_resampled(tmp_path):
    rng = np.random.default_rng(0)
    bands, wide, psf = rng.random((3, 64, 64)), rng.random((132, 128)), rng.random((21, 21))
    wide[3, 3] = np.nan
    np.save(tmp_path / "bands.npy", bands)
    write_fits(tmp_path / "wide.fits", wide, psf)
    (tmp_path / "README.md").write_text("not an image")
    before = sorted(tmp_path.iterdir())
    images = kinds.read_cutouts(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert images.shape == (5, 64, 64)
    assert np.allclose(images[:3], bands)
    assert np.allclose(images[3], wide[34:98, 32:96])
    small = np.nan_to_num(wide)[2:130].reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.allclose(images[4], small, atol=1e-6)


def test_cutouts_are_scaled_in_three_ways():
    rng = np.random.default_rng(0)
    cutouts = rng.normal(10, 1, (4, 64, 64)).astype(np.float32)
    cutouts[3] = -1  # constant, and nowhere bright
    as_they_are, peak, min_max = kinds.scaled(cutouts, 4.0).values()
    assert np.array_equal(as_they_are, cutouts)
    assert peak[:3].max((1, 2)) == pytest.approx(4)
    assert np.allclose(peak[0] / peak[0, 0, 0], cutouts[0] / cutouts[0, 0, 0])
    assert np.array_equal(peak[3], cutouts[3])
    assert (min_max[:3].max((1, 2)) == 1).all()
    assert (min_max.min((1, 2)) == 0).all()
    assert (min_max[3] == 0).all()


def test_a_folder_without_cutouts_is_named(tmp_path):
    for content in ((), (32, 32)):
        if content:
            np.save(tmp_path / "small.npy", np.zeros(content))
        with pytest.raises(UserError, match=tmp_path.name):
            kinds.read_cutouts(tmp_path)
    (tmp_path / "broken.fits").write_bytes(b"SIMPLE  = nothing")
    with pytest.raises(UserError, match=r"broken\.fits"):
        kinds.read_cutouts(tmp_path)
    with pytest.raises(UserError, match="gone"):
        kinds.read_cutouts(tmp_path / "gone")


# What a classifier says


class Told(nn.Module):
    """A network whose output for an image is in the image's first pixels."""

    def __init__(self, start, count):
        super().__init__()
        self.part = slice(start, start + count)
        self.register_buffer("temperature", torch.tensor(2.0))
        self.register_buffer("strangeness_seen", torch.zeros(600))

    def forward(self, images, predicted=None):
        return images[:, 0, 0, self.part].squeeze(1 if self.part.stop > 3 else ())


def telling(logits, familiarity):
    """Images (n, 4, 4) for which `Told` gives these."""
    images = np.zeros((len(logits), 4, 4), np.float32)
    images[:, 0, :3], images[:, 0, 3] = logits, familiarity
    return images


CLASSIFIER = Told(0, 3), Told(3, 1), torch.device("cpu")


def test_every_kind_has_its_figures():
    sure, unsure, torn = [9, 0, 0], [1, 0, 0], [0, 0.5, 0.4]
    images = [("clean", telling([sure] * 3 + [unsure], [0.9, 0.5, 0.01, 0.009]), np.zeros(4)),
              ("noise 1 %", telling([unsure, torn, sure, torn], [0.2, 0.2, 0.2, 0.0]), np.zeros(4)),
              ("min-max", telling([torn] * 2, [0, 0]), np.zeros(2)),
              ("uniform noise", telling([torn, sure], [0.0, 0.9]), None)]  # fmt: skip
    rows = dict(kinds.answers_to(images, *CLASSIFIER))
    assert list(rows) == ["clean", "noise 1 % (held back)", "min-max", "uniform noise (held back)"]
    clean, noise, min_max, uniform = rows.values()
    assert clean == {"held_back": False, "answered %": 75, "right of answered %": 100, "accuracy %": 100}
    # Clean: three that are sure, one that is not; a pair of equals counts a half, of 16 pairs.
    assert noise == pytest.approx({"held_back": True, "answered %": 75, "right of answered %": 200 / 3,
                                   "accuracy %": 50, "AUC familiarity": (4 + 3 * 2) / 16,
                                   "AUC softmax": (3 * 3.5 + 2.5) / 16,
                                   "AUC energy": (3 * 3.5 + 2.5) / 16})  # fmt: skip
    assert min_max == {"held_back": False, "answered %": 0, "accuracy %": 0, "AUC familiarity": 1, "AUC softmax": 1,
                       "AUC energy": 1}  # fmt: skip
    assert uniform.keys() == min_max.keys() - {"accuracy %"}
    assert uniform["answered %"] == 50
