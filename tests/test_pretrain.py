"""Pre-training: what it learns from, what it leaves, and when."""

import os

import numpy as np
import pytest
import torch
from conftest import (CLASSIFIER, PICTURES, PRETRAINED, assert_refused, assert_user_error, finetune_on, history_of,
                      images_of, pretrain_on, pretraining, run_script, tensors_in, write_classes)  # fmt: skip

import mae
import pretrain
from lib import datasets, network, plots, residuals, weights


def test_pretraining_learns_and_sees_one_class_of_training_and_validation(packed, tmp_path, monkeypatch, rows_read):
    trained_on = set()
    pictures = pretrain.held_out_reconstructions

    def draw(*arguments):
        trained_on.update(rows_read)  # the pictures, which come last, show every class
        return pictures(*arguments)

    monkeypatch.setattr(pretrain, "held_out_reconstructions", draw)
    pretrain.main(pretraining(packed, tmp_path / "run", "--epochs", 20))
    dataset = datasets.load(packed)
    parts = datasets.split(dataset)
    allowed = np.concatenate([parts["train"], parts["validation"]])
    allowed = allowed[dataset.labels[allowed] == dataset.class_names.index("no_sub")]
    assert trained_on == set(allowed.tolist())
    assert not rows_read & set(parts["test"].tolist())
    losses = [line["validation_loss"] for line in history_of(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


def test_every_validation_hides_the_same_patches():
    one, again, other = (pretrain.validation_noise(5, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.argsort(1).unique(dim=0)) == 5  # and others of each image


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_the_weights_are_there_if_the_pictures_fail(script, packed, pretrained, tmp_path, monkeypatch):
    for name in PICTURES:
        monkeypatch.setattr(plots, name, lambda *_: 1 / 0)
    if script == "pretrain":
        process, file = pretrain_on(packed, tmp_path, "--epochs", 1), PRETRAINED
    else:
        process, file = finetune_on(packed, tmp_path, pretrained, "head", "--epochs", 1), CLASSIFIER
    assert process.stderr.count("not shown") == (2 if script == "pretrain" else 1)
    assert tensors_in(tmp_path / file)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_more_patches_than_weights_may_have_are_refused_before_training(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "MOST_PATCHES_A_SIDE", 4)  # images of 64 pixels
    pretrain_on(packed, tmp_path / "run", "--epochs", 1)  # patches of 16 pixels
    arguments = pretraining(packed, tmp_path / "x", "--patch-size", 8)
    assert_refused("pretrain.py", arguments, "--patch-size 8 cuts", "more than 4×4")


@pytest.mark.parametrize(("side", "remedy"), [(65, "choose one that does (5, 13), or crop"),
                                              (61, "no patch size does; crop the images")])  # fmt: skip
def test_a_side_that_the_patches_do_not_divide_is_refused_with_the_patch_sizes_that_do(side, remedy, tmp_path):
    data = write_classes(tmp_path / "data", {"no_sub": 10, "other": 10}, size=side)
    named = f"--patch-size {side // 4} does not divide the image size {side}: {remedy}"
    scratch = ["--pretrained", "none", "--strategy", "full"]
    for script, more in (("pretrain.py", []), ("finetune.py", scratch)):
        refused = run_script(script, "--data", data, "--out", tmp_path / "run", *more, check=False)
        assert_user_error(refused, named)
        assert "training images" not in refused.stdout  # the settings of a training that does not begin


def test_a_class_of_one_validation_image_does_not_cost_the_weights(tmp_path):
    root = write_classes(tmp_path / "d", {"no_sub": 60, "rare": 60})
    dataset = datasets.load(root, progress=False)
    rows = datasets.split(dataset)["validation"]
    files = sorted((root / "rare").iterdir())
    for row in rows[dataset.labels[rows] == 1][1:]:
        files[row - 60].unlink()
    pretrain_on(root, tmp_path / "run", "--epochs", 1)
    assert (tmp_path / "run" / PRETRAINED).exists()
    assert (tmp_path / "run" / "reconstructions.png").exists()


def test_pretraining_leaves_what_it_promises(runs):
    out = runs / "pretrain"
    assert sorted(os.listdir(out)) == [".lock", "config.json", "loss.png", "metrics.jsonl", "reconstructions.png",
                                       PRETRAINED]  # fmt: skip


def test_the_weights_say_how_much_the_mae_leaves_of_smooth_lenses(pretrained, folder, runs):
    """Every picture of maps has this unit, so that one bad image does not blank the others."""
    model, transform, content = weights.load_mae(pretrained)
    assert content["config"]["embed_dim"] == 32  # as the command said
    dataset = datasets.load(folder, runs / "cache")
    rows = pretrain.rows_to_learn_from(dataset, datasets.split(dataset)["validation"], content["run"]["classes"])
    masks = mae.complementary_masks(model.num_patches, content["run"]["mask_ratio"], rounds=2)
    with torch.no_grad():
        left = model.eval().residual(transform(images_of(dataset, rows)), masks)
    assert content["run"]["smooth_rms"] == pytest.approx(left.square().mean().sqrt().item(), rel=1e-4)
    assert residuals.smooth_rms_of({"run": {}}, np.ones((2, 4, 4)) * [[[1]], [[3]]]) == 2
