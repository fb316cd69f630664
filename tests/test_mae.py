"""The network: equal to the reference implementations, and what its parts promise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mae import (MAE, Classifier, IntensityTransform, ResidualClassifier, brighter_half_right, complementary_masks,
                 default_map_pool, gather_patches, patchify, residual_scores, set_attention_form,
                 sincos_positions)  # fmt: skip

REFERENCE = np.load(Path(__file__).parent / "reference" / "huggingface.npz")


def tiny_mae(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    return MAE(**(sizes | decoder | options))


def residual_classifier(sizes=None, **more):
    torch.manual_seed(0)
    sizes = sizes or {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return ResidualClassifier(sizes, {"kind": "linear"}, **more).eval()


def part_of_reference(prefix):
    names = [name for name in REFERENCE if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.tensor(REFERENCE[name]) for name in names}


@pytest.mark.parametrize("form", ["fused", "plain"])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_equals_hugging_face_for_the_same_weights_and_noise(norm_pix_loss, form):
    sizes = {name: int(value) for name, value in part_of_reference("config/").items()}
    model = MAE(**sizes, norm_pix_loss=norm_pix_loss).eval()
    model.load_state_dict(part_of_reference("model/"))
    set_attention_form(model, form)
    images, noise = torch.tensor(REFERENCE["images"]), torch.tensor(REFERENCE["noise"])
    loss, pred, ids_removed = model(images, float(REFERENCE["mask_ratio"]), noise)
    expected = part_of_reference(f"norm_pix_loss_{norm_pix_loss}/")
    assert abs(loss.item() - expected["loss"].item()) < 1e-5
    assert (pred - gather_patches(expected["pred"], ids_removed)).abs().max() < 1e-4
    mask = torch.zeros_like(noise).scatter(1, ids_removed, 1.0)
    assert torch.equal(mask, expected["mask"])


def test_positions_are_those_of_the_reference():
    expected = torch.tensor(REFERENCE["model/pos_embed"])
    assert (sincos_positions(32, 6) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("ratio", "removed"), [(0.01, 1), (0.5, 8), (0.99, 15)])
def test_something_is_removed_and_something_stays(ratio, removed):
    _, pred, ids_removed = tiny_mae()(torch.randn(2, 1, 16, 16), ratio)
    assert pred.shape[1] == ids_removed.shape[1] == removed


def test_reconstruction_keeps_visible_pixels_and_hides_removed_ones():
    model = tiny_mae().eval()
    images, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    masked, reconstruction = model.reconstruct(images, 0.5, noise)
    visible = ~torch.isnan(masked)
    assert visible.float().mean() == 0.5
    assert torch.equal(reconstruction[visible], images[visible])
    assert not torch.equal(reconstruction[~visible], images[~visible])


def test_predictions_of_normalised_pixels_become_pixels_again():
    model = tiny_mae(norm_pix_loss=True).eval()
    images, noise = 3 + 5 * torch.randn(2, 1, 16, 16), torch.rand(1, 16).expand(2, 16)
    _, pred, ids_removed = model(images, 0.5, noise)
    _, reconstruction = model.reconstruct(images, 0.5, noise)
    own, got = (gather_patches(patchify(x, 4), ids_removed) for x in (images, reconstruction))
    assert torch.allclose(got, pred * own.std(2, keepdim=True) + own.mean(2, keepdim=True), atol=1e-4)
    visible, hidden = noise[0].argsort()[:8], ids_removed[0]
    residual = model.residual(images, [(visible, hidden), (hidden, visible)])
    assert torch.allclose(gather_patches(patchify(residual, 4), ids_removed), own - got, atol=1e-4)


def test_images_and_mask_ratios_that_make_no_sense_are_refused():
    for shape in ((1, 1, 16, 8), (1, 2, 16, 16), (1, 16, 16)):
        with pytest.raises(ValueError, match="expected images"):
            tiny_mae()(torch.zeros(shape))
    for ratio in (-0.1, 0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="mask_ratio"):
            tiny_mae()(torch.zeros(1, 1, 16, 16), ratio)
    with pytest.raises(ValueError, match="does not divide"):
        tiny_mae(patch_size=5)


@pytest.mark.parametrize("kind", ["log", "asinh", "sqrt", "linear"])
def test_transform_does_not_depend_on_the_unit(kind):
    images = torch.rand(4, 1, 8, 8) + 0.1
    constants = {"offset": 0.05, "softening": 0.2}
    z = IntensityTransform(kind, **constants, mean=0.3, std=2.0)(images)
    for unit in (1e-3, 255.0):
        scaled = {name: unit * value for name, value in constants.items()}
        assert torch.allclose(IntensityTransform(kind, **scaled, mean=0.3, std=2.0)(unit * images), z, atol=1e-5)


def test_a_classifier_sees_every_image_with_its_brighter_half_on_the_right():
    images = torch.rand(8, 1, 64, 64)
    images[:4, ..., :20] += 0.1
    images[4:, ..., -20:] += 0.1
    turned = images.flip(2, 3)
    assert torch.equal(brighter_half_right(images), torch.cat([turned[:4], images[4:]]))
    assert torch.equal(brighter_half_right(images), brighter_half_right(turned))
    even = torch.ones(1, 1, 5, 5)
    assert torch.equal(brighter_half_right(even), even)
    model = Classifier(embed_dim=32, depth=1, num_heads=2).eval()
    assert torch.equal(model(images), model(turned))
    assert not torch.allclose(model(images), model(images.flip(2)))


@pytest.mark.parametrize("patches", [4, 16, 25, 64, 225])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99])
def test_complementary_masks_hide_the_share_that_is_asked_for(patches, ratio):
    """Ratios from 0.1 to 0.4 hid half of the patches."""
    masks = complementary_masks(patches, ratio, rounds=2)
    asked = min(max(1, patches - int(patches * (1 - ratio))), patches - 1)
    for visible, hidden in masks:
        assert torch.equal(torch.cat([visible, hidden]).sort().values, torch.arange(patches))
        assert abs(len(hidden) - asked) <= max(1, 0.1 * min(asked, patches - asked))
    times = torch.bincount(torch.cat([hidden for _, hidden in masks]), minlength=patches)
    assert times.min() >= 1
    assert times.max() - times.min() <= 2
    if (patches, ratio) == (64, 0.75):  # by default: four masks a round, each patch is hidden in three
        assert [len(visible) for visible, _ in masks] == [16] * 8
        assert set(times.tolist()) == {6}
    if patches * ratio > 2:
        one, other = (complementary_masks(patches, ratio, 1, seed)[0][0].tolist() for seed in (0, 1))
        assert one != other


def test_the_residual_of_a_patch_does_not_depend_on_what_stands_in_it():
    model = tiny_mae(img_size=32, patch_size=8, embed_dim=32).eval()
    images = torch.randn(2, 1, 32, 32)
    masks = complementary_masks(model.num_patches, 0.75, rounds=2)
    residual = model.residual(images, masks)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1.0  # one patch
    other = model.residual(changed, masks)
    patch = (slice(None), slice(None), slice(8, 16), slice(16, 24))
    assert torch.allclose(other[patch], residual[patch] + 1.0, atol=1e-5)
    elsewhere = (other - residual).abs()
    elsewhere[patch] = 0
    assert elsewhere.max() > 1e-6  # the other patches are predicted from it


def test_how_many_masks_go_together_changes_no_residual(monkeypatch):
    model = tiny_mae(img_size=40, patch_size=8, embed_dim=32).eval()  # 25 patches
    images, masks = torch.randn(3, 1, 40, 40), complementary_masks(25, 0.75, rounds=3)
    assert len({len(visible) for visible, _ in masks}) == 2  # masks of two sizes
    together = model.residual(images, masks)
    monkeypatch.setattr("mae.MASKS_TOGETHER", 1)
    assert torch.allclose(together, model.residual(images, masks), atol=1e-5)


@pytest.mark.parametrize("side", [64, 150, 16, 5])
def test_the_score_of_a_map_is_the_mean_square_of_its_averages(side):
    maps = torch.randn(2, 1, side, side)
    width = max(1, side // 8)
    cells = maps.unfold(2, width, width).unfold(3, width, width).mean(dim=(4, 5))
    assert torch.allclose(residual_scores(maps), cells.square().mean(dim=(1, 2, 3)), atol=1e-6)


def test_a_classifier_of_residual_maps_sees_the_maps_and_both_their_turns():
    model = residual_classifier()
    images = torch.randn(3, 1, 32, 32)
    residual = model.mae.residual(images, complementary_masks(16, 0.75, rounds=1))
    assert torch.equal(model.maps(images), residual)
    turned = (model.network(residual) + model.network(residual.rot90(2, (2, 3)))) / 2
    model.temperature.fill_(2.0)
    assert torch.allclose(model(images), turned / 2, atol=1e-5)
    assert not any(p.requires_grad for p in model.mae.parameters())


def test_maps_of_large_images_are_averaged_over_squares():
    sizes = {"img_size": 150, "patch_size": 10, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = residual_classifier(sizes, map_pool=default_map_pool(150))
    images = torch.randn(2, 1, 150, 150)
    residual = model.mae.residual(images, model.masks)
    maps = model.maps(images)
    assert maps.shape == (2, *model.map_shape) == (2, 1, 75, 75)
    assert torch.allclose(maps[1, 0, 3, 74], residual[1, 0, 6:8, 148:150].mean(), atol=1e-6)
    assert model(images).shape == (2, 3)


def test_a_classifier_can_see_the_image_beside_its_map():
    model = residual_classifier(map_pool=2, with_image=True)
    images = torch.randn(3, 1, 32, 32)
    maps = model.maps(images)
    assert torch.allclose(maps[:, 1], images[:, 0].view(3, 16, 2, 16, 2).mean((2, 4)), atol=1e-6)
    without = residual_classifier(map_pool=2)
    without.mae.load_state_dict(model.mae.state_dict())
    assert torch.equal(maps[:, :1], without.maps(images))
    other = torch.cat([maps[:, :1], maps[:1, 1:].expand(3, -1, -1, -1)], dim=1)
    assert not torch.allclose(model.logits(maps), model.logits(other), atol=1e-5)


def test_logits_of_eight_orientations_do_not_depend_on_the_orientation():
    model, maps = residual_classifier(orientations=8), torch.randn(3, 1, 32, 32)
    expected = model.logits(maps)
    for view in (maps.flip(2), maps.flip(3), maps.mT, maps.rot90(1, (2, 3)), maps.rot90(3, (2, 3))):
        assert torch.allclose(model.logits(view), expected, atol=1e-5)
    two = residual_classifier()
    assert not torch.allclose(two.logits(maps.mT), two.logits(maps), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [*((wrong, "mask ratio")
       for wrong in ({"mask_ratio": 1.0}, {"mask_ratio": 0.999}, {"mask_ratio": -1})),
     ({"sizes": {"img_size": 8, "patch_size": 4}}, "at least 16"), ({"map_pool": 5}, "at least 16"),
     *(({"map_pool": wrong}, "cannot be averaged") for wrong in (0, -1, 1.5, "2")), ({"orientations": 4}, "2 or 8")],
)  # fmt: skip
def test_impossible_residual_maps_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        residual_classifier(**wrong)


def test_stats_pooling_is_mean_spread_and_extremes_of_the_patch_tokens():
    model = Classifier(embed_dim=32, depth=1, num_heads=2, pool="stats").eval()
    images = torch.rand(3, 1, 64, 64)
    tokens = model.encode(patchify(brighter_half_right(model.transform(images)), 8))[:, 1:]
    features = model.features(images)
    assert features.shape == (3, 128)
    assert torch.allclose(features[:, :32], tokens.mean(1), atol=1e-5)
    assert torch.allclose(features[:, 32:64], tokens.std(1, correction=0), atol=1e-3)
    assert torch.allclose(features[:, 64:96], tokens.amin(1), atol=1e-5)
    assert torch.allclose(features[:, 96:], tokens.amax(1), atol=1e-5)
