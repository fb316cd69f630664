"""The network: equal to the reference implementations, and what its parts promise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mae import (
    MAE,
    Classifier,
    IntensityTransform,
    ResidualClassifier,
    complementary_masks,
    patchify,
    scatter_patches,
    random_masking,
    residual_scores,
    set_attention_form,
    sincos_positions,
    gather_patches,
    unpatchify,
    brighter_half_right,
    default_map_pool,
)

REFERENCE = np.load(Path(__file__).parent / "reference" / "huggingface.npz")


def tiny_mae(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    return MAE(**(sizes | decoder | options))


def part_of_reference(prefix):
    return {
        k.removeprefix(prefix): torch.tensor(REFERENCE[k])
        for k in REFERENCE
        if k.startswith(prefix)
    }


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


def test_patches_travel_back_to_the_image():
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, 3), images)


def test_patch_embedding_equals_the_convolution_whose_weights_it_keeps():
    model = tiny_mae(in_chans=3)
    images = torch.randn(2, 3, 16, 16)
    convolved = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patch_embed(patchify(images, 4)), convolved, atol=1e-5)


def test_the_patches_with_the_smallest_noise_stay():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.2]])
    ids_keep, ids_removed = random_masking(noise, 2)
    assert ids_keep.tolist() == [[1, 3]]
    assert ids_removed.tolist() == [[2, 0]]


def test_masked_patches_alone_enter_the_loss():
    model = tiny_mae().eval()
    images, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    loss, pred, ids_removed = model(images, 0.75, noise)
    assert pred.shape == (2, 12, 16)
    assert torch.equal(ids_removed, noise.argsort(1)[:, 4:])
    assert torch.allclose(loss, (pred - gather_patches(patchify(images, 4), ids_removed)).square().mean())


@pytest.mark.parametrize(("ratio", "removed"), [(0.01, 1), (0.5, 8), (0.99, 15)])
def test_something_is_removed_and_something_stays(ratio, removed):
    _, pred, ids_removed = tiny_mae()(torch.randn(2, 1, 16, 16), ratio)
    assert pred.shape[1] == ids_removed.shape[1] == removed


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_what_the_last_block_leaves_out_changes_nothing(depth):
    model = tiny_mae(decoder_depth=depth).eval()
    images, ids = torch.randn(2, 1, 16, 16), torch.rand(2, 16).argsort(1)
    latent = model.encode(patchify(images, 4), ids[:, :4])
    pred = model.decode(latent, ids[:, :4], ids[:, 4:])
    # As in the reference: all tokens in their places, all the way.
    x = model.decoder_embed(latent)
    tokens = scatter_patches(model.mask_token.expand(2, 16, 8), ids[:, :4], x[:, 1:])
    x = torch.cat([x[:, :1], tokens], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    everything = model.decoder_pred(model.decoder_norm(x[:, 1:]))
    assert torch.allclose(pred, gather_patches(everything, ids[:, 4:]), atol=1e-5)


def test_predictions_do_not_see_removed_pixels():
    model = tiny_mae().eval()
    images, noise = torch.randn(1, 1, 16, 16), torch.rand(1, 16)
    _, pred, ids_removed = model(images, 0.75, noise)
    patches = patchify(images, 4)
    other = unpatchify(scatter_patches(patches, ids_removed, gather_patches(patches, ids_removed) + 5), 4)
    assert torch.equal(model(other, 0.75, noise)[1], pred)


def test_reconstruction_keeps_visible_pixels_and_hides_removed_ones():
    model = tiny_mae().eval()
    images, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    masked, reconstruction = model.reconstruct(images, 0.5, noise)
    visible = ~torch.isnan(masked)
    assert visible.float().mean() == 0.5
    assert torch.equal(reconstruction[visible], images[visible])
    assert not torch.equal(reconstruction[~visible], images[~visible])


@pytest.mark.parametrize("shape", [(1, 1, 16, 8), (1, 2, 16, 16), (1, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected images"):
        tiny_mae()(torch.zeros(shape))


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, float("nan")])
def test_impossible_mask_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        tiny_mae()(torch.zeros(1, 1, 16, 16), ratio)


def test_patch_size_must_divide_the_image():
    with pytest.raises(ValueError, match="does not divide"):
        tiny_mae(patch_size=5)


@pytest.mark.parametrize("kind", ["log", "asinh", "sqrt", "linear"])
def test_transform_does_not_depend_on_the_unit(kind):
    images = torch.rand(4, 1, 8, 8) + 0.1
    constants = {"offset": 0.05, "softening": 0.2}
    z = IntensityTransform(kind, **constants, mean=0.3, std=2.0)(images)
    for unit in (1e-3, 255.0):
        scaled = {name: unit * value for name, value in constants.items()}
        assert torch.allclose(
            IntensityTransform(kind, **scaled, mean=0.3, std=2.0)(unit * images), z, atol=1e-5
        )


@pytest.mark.parametrize("pool", ["mean", "cls", "both"])
def test_classifier_holds_its_transform_and_the_head_of_the_method(pool):
    model = Classifier(pool=pool, transform={"kind": "log", "softening": 0.5}).eval()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 3)
    kinds = [type(layer).__name__ for layer in model.fc]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert (model.fc[0].out_features, model.fc[3].p, model.fc[4].out_features) == (64, 0.4, 3)
    assert {"transform.offset", "transform.softening"} <= model.state_dict().keys()


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


def test_encoder_names_are_shared_by_both_models():
    encoder = {n for n in MAE().state_dict() if not n.startswith(("decoder", "mask_token"))}
    own = ("fc.", "transform.", "temperature")
    rest = {n for n in Classifier().state_dict() if not n.startswith(own)}
    assert encoder == rest


@pytest.mark.parametrize("patches", [16, 25, 64, 225])
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


def test_complementary_masks_hide_every_patch_equally_often():
    masks = complementary_masks(64, 0.75, rounds=2)
    assert len(masks) == 8
    for visible, hidden in masks:
        assert len(visible) == 16
        assert sorted(visible.tolist() + hidden.tolist()) == list(range(64))
    times_hidden = torch.cat([hidden for _, hidden in masks]).bincount(minlength=64)
    assert times_hidden.tolist() == [6] * 64
    one, other = (complementary_masks(64, 0.9, rounds=1, seed=seed)[0][0] for seed in (0, 1))
    assert one.tolist() != other.tolist()
    assert len(complementary_masks(4, 0.1, 1)) == 4  # something must be hidden, and predicted


def test_the_residual_of_a_patch_does_not_depend_on_what_stands_in_it():
    torch.manual_seed(0)
    model = MAE(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2).eval()
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
    torch.manual_seed(0)
    model = MAE(img_size=40, patch_size=8, embed_dim=32, depth=1, num_heads=2).eval()  # 25 patches
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


def test_the_score_sees_a_weak_pattern_under_strong_noise():
    torch.manual_seed(0)
    maps = torch.randn(40, 1, 128, 128)
    maps[20:, :, 40:60, 40:60] += 1.0  # adds 2 % to the mean square of all pixels
    scores = residual_scores(maps)
    assert scores[20:].min() > scores[:20].max()


def residual_classifier(**more):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return ResidualClassifier(sizes, {"kind": "linear"}, **more).eval()


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
    model = ResidualClassifier(sizes, {"kind": "linear"}, map_pool=default_map_pool(150)).eval()
    images = torch.randn(2, 1, 150, 150)
    residual = model.mae.residual(images, model.masks)
    maps = model.maps(images)
    assert maps.shape == (2, 1, model.map_side, model.map_side) == (2, 1, 75, 75)
    assert torch.allclose(maps[1, 0, 3, 74], residual[1, 0, 6:8, 148:150].mean(), atol=1e-6)
    assert model(images).shape == (2, 3)


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"mask_ratio": 1.0}, {"mask_ratio": 0.999}, {"mask_ratio": -1}]
)
def test_impossible_masks_of_a_classifier_of_residual_maps_are_refused(wrong):
    with pytest.raises(ValueError, match="mask ratio"):
        residual_classifier(**wrong)


def test_maps_too_small_for_the_stages_are_refused():
    with pytest.raises(ValueError, match="at least 16"):
        ResidualClassifier({"img_size": 8, "patch_size": 4}, {"kind": "linear"})
    with pytest.raises(ValueError, match="at least 16"):
        residual_classifier(map_pool=5)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_maps_that_cannot_be_averaged_so_are_refused(wrong):
    with pytest.raises(ValueError, match="cannot be averaged"):
        residual_classifier(map_pool=wrong)


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
