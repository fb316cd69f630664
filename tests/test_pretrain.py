"""Pre-training: what it learns from, what it leaves, and when."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import assert_user_error, history_of, pretraining, run_script, tensors_in

import mae
import pretrain
from lib import data, network, plots
from lib.errors import UserError


def test_pretraining_learns_and_sees_one_class_of_training_and_validation(
    packed, tmp_path, monkeypatch, rows_read
):
    trained_on = set()
    pictures = pretrain.held_out_reconstructions

    def draw(*arguments):
        trained_on.update(rows_read)  # the pictures, which come last, show every class
        return pictures(*arguments)

    monkeypatch.setattr(pretrain, "held_out_reconstructions", draw)
    pretrain.main(pretraining(packed, tmp_path / "run", "--epochs", 20))
    dataset = data.load(packed)
    parts = data.split(dataset)
    allowed = np.concatenate([parts["train"], parts["validation"]])
    allowed = allowed[dataset.labels[allowed] == dataset.class_names.index("no_sub")]
    assert trained_on == set(allowed.tolist())
    assert not rows_read & set(parts["test"].tolist())
    losses = [line["validation_loss"] for line in history_of(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("classes", "learned"), [(["all"], {0, 1, 2}), (["cdm"], {1}), (["cdm", "axion"], {0, 1})]
)
def test_the_classes_to_learn_from_are_chosen_by_name(classes, learned, packed):
    dataset = data.load(packed)  # axion, cdm, no_sub
    rows = data.split(dataset)["train"]
    chosen = pretrain.rows_to_learn_from(dataset, rows, classes)
    assert set(chosen) == {row for row in rows if dataset.labels[row] in learned}


def test_few_images_are_passed_over_more_often_unless_epochs_are_given(packed, tmp_path):
    arguments = pretraining(packed, tmp_path)
    defaults = pretrain.DEFAULTS
    assert defaults.recipe(pretrain.parse_args(arguments), 80).epochs == 3
    arguments[arguments.index("--epochs") : arguments.index("--epochs") + 2] = []
    args = pretrain.parse_args(arguments)
    assert defaults.recipe(args, 80).epochs == defaults.fewest_steps / 10  # 10 batches of 8
    assert defaults.recipe(args, 10**6).epochs == defaults.epochs


def test_every_validation_hides_the_same_patches():
    one, again, other = (pretrain.validation_noise(5, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.argsort(1).unique(dim=0)) == 5  # and others of each image


def test_the_weights_are_there_if_the_pictures_fail(packed, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no font")

    out = tmp_path / "run"
    for name in ("loss_curves", "reconstructions"):
        with monkeypatch.context() as patch:
            patch.setattr(plots, name, fails)
            pretrain.main(pretraining(packed, out, "--epochs", 1))
        assert "not shown" in capsys.readouterr().err
        assert tensors_in(out / "vit-mae-wt.pth")
        assert not (out / "checkpoint.pth").exists()
        (out / "vit-mae-wt.pth").unlink()


def test_more_patches_than_weights_may_have_are_refused_before_training(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "MOST_PATCHES_A_SIDE", 32)  # images of 64 pixels
    run_script("pretrain.py", *pretraining(packed, tmp_path, "--patch-size", 2, "--epochs", 1))
    with pytest.raises(UserError, match=r"--patch-size 1 cuts.*more than 32×32"):
        pretrain.main([str(a) for a in pretraining(packed, tmp_path / "x", "--patch-size", 1)])


def test_an_augmentation_that_does_not_exist_is_named(packed, tmp_path):
    refused = run_script(
        "pretrain.py", *pretraining(packed, tmp_path / "run", "--augment", "noise,blur"),
        check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "'blur' is not one of halfturn, flips, noise, shift, rotate" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_read_stops_the_run(packed, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint.pth").write_bytes(b"half a checkpoint")
    refused = run_script("pretrain.py", *pretraining(packed, out, "--resume"), check=False)
    assert_user_error(refused, out / "checkpoint.pth", "--overwrite")
    (out / "checkpoint.pth").unlink()
    run_script("pretrain.py", *pretraining(packed, out, "--resume", "--epochs", 1))
    assert (out / "vit-mae-wt.pth").exists()


def test_pretraining_leaves_what_it_promises(runs):
    out = runs / "pretrain"
    assert sorted(os.listdir(out)) == [
        ".lock", "config.json", "loss.png", "metrics.jsonl", "reconstructions.png",
        "vit-mae-wt.pth",
    ]  # fmt: skip
    content = torch.load(out / "vit-mae-wt.pth", weights_only=True)
    arguments = {k: v for k, v in content["config"].items() if k != "transform"}
    mae.MAE(**arguments).load_state_dict(content["model"])
    mae.IntensityTransform(**content["config"]["transform"])
    assert content["config"]["embed_dim"] == 32
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert json.loads((out / "config.json").read_text())["options"]["mask_ratio"] == 0.75
