"""MAEs from elsewhere: heads are told or asked for, never guessed; what their files may hold."""

import argparse
import json

import pytest
import torch
from conftest import assert_user_error, run_script

import finetune
import pretrain
from lib import convert, weights
from lib.errors import UserError
from mae import MAE

SIZES = {"embed_dim": 96, "depth": 1, "decoder_embed_dim": 32, "decoder_num_heads": 2}


def state(**sizes):
    torch.manual_seed(0)
    return MAE(**{**SIZES, "num_heads": 12, **sizes}).state_dict()


def encoder_alone(whole):
    return {n: t for n, t in whole.items() if "decoder" not in n and n != "mask_token"}


def heads(path, num_heads=None):
    return weights.read(path, num_heads, foreign=True).content["config"]["num_heads"]


def test_the_number_of_heads_is_not_guessed(packed, tmp_path):
    torch.save({"model": state()}, tmp_path / "mae.pth")
    process = run_script("finetune.py", "--data", packed, "--strategy", "full", "--pretrained",
                         tmp_path / "mae.pth", "--out", tmp_path / "run", check=False)  # fmt: skip
    assert_user_error(process, "mae.pth", "give --num-heads")
    assert heads(tmp_path / "mae.pth", 6) == 6


def test_hugging_face_tells_the_heads_in_its_config(tmp_path):
    whole = state()
    config = {**SIZES, "num_heads": 12, "img_size": 64, "patch_size": 8, "in_chans": 1,
              "decoder_depth": 1, "mlp_ratio": 4.0, "norm_pix_loss": False}  # fmt: skip
    theirs, described = convert.to_hugging_face(whole, config)
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert heads(tmp_path / "pytorch_model.bin") == 12
    with pytest.raises(UserError, match="--num-heads 4 is given, but it has 12"):
        heads(tmp_path / "pytorch_model.bin", 4)
    for other in ({"hidden_size": 128}, {"num_attention_heads": "12"}):
        (tmp_path / "config.json").write_text(json.dumps({**described, **other}))
        with pytest.raises(UserError, match="give --num-heads"):
            heads(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("model", "width", "expected"),
    [
        ("mae_vit_base_patch16", 768, 12),
        ("mae_vit_large_patch16", 1024, 16),
        ("mae_vit_huge_patch14", 1280, 16),
        ("vit_base_patch16", 768, 12),
        ("mae_vit_base_patch16", 96, None),
        ("another", 768, None),
        (None, 768, None),
    ],
)
def test_facebookresearch_tells_the_heads_in_its_options(model, width, expected):
    assert convert.heads_told(width, model, {}) == expected


def test_a_checkpoint_may_hold_the_options_of_its_training(tmp_path):
    options = argparse.Namespace(lr=1.5e-4, model="mae_vit_base_patch16", resume="")
    torch.save({"model": state(embed_dim=768), "epoch": 1, "args": options}, tmp_path / "mae.pth")
    assert heads(tmp_path / "mae.pth") == 12


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_options_hold_nothing_that_runs(tmp_path, capsys):
    options = argparse.Namespace(model=Hostile())
    torch.save({"model": state(), "args": options}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="not a weights file that can be loaded safely"):
        heads(tmp_path / "mae.pth", 12)
    assert "executed" not in capsys.readouterr().out
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_our_own_files_hold_no_options(tmp_path):
    content = {"model": {}, "config": {}, "class_names": [], "run": argparse.Namespace()}
    torch.save(content, tmp_path / "ours.pth")
    with pytest.raises(UserError, match="not a weights file that can be loaded safely"):
        weights.read(tmp_path / "ours.pth")


@pytest.mark.parametrize("without_prefix", [False, True])
def test_an_encoder_alone_can_be_fine_tuned(without_prefix, packed, tmp_path):
    whole = state()
    file = encoder_alone(whole)
    if without_prefix:  # as Hugging Face's ViTMAEModel names them
        theirs, _ = convert.to_hugging_face(
            file,
            {**SIZES, "num_heads": 12, "img_size": 64, "patch_size": 8, "in_chans": 1,
             "decoder_depth": 1, "mlp_ratio": 4.0, "norm_pix_loss": False},
        )  # fmt: skip
        file = {name.removeprefix("vit."): tensor for name, tensor in theirs.items()}
    torch.save(file, tmp_path / "encoder.pth")
    run_script("finetune.py", "--data", packed, "--strategy", "head", "--epochs", 1, "--quiet",
               "--pretrained", tmp_path / "encoder.pth", "--num-heads", 12, "--out",
               tmp_path / "run")  # fmt: skip
    model, _ = weights.load_classifier(tmp_path / "run" / "vit-mae-classifier-wt.pth")
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in encoder_alone(whole).items())
    assert model.blocks[0].attn.num_heads == 12


def test_an_mae_of_ours_without_its_decoder_is_damaged(runs, packed, tmp_path):
    content = torch.load(runs / "pretrain" / "vit-mae-wt.pth", weights_only=True)
    content["model"] = encoder_alone(content["model"])
    torch.save(content, tmp_path / "ours.pth")
    process = run_script("finetune.py", "--data", packed, "--strategy", "head", "--pretrained",
                         tmp_path / "ours.pth", "--out", tmp_path / "run", check=False)  # fmt: skip
    assert_user_error(process, "ours.pth", "is missing")


def test_colour_images_are_refused(packed, tmp_path):
    torch.save({"model": state(in_chans=3)}, tmp_path / "rgb.pth")
    process = run_script("finetune.py", "--data", packed, "--strategy", "full", "--pretrained",
                         tmp_path / "rgb.pth", "--num-heads", 12, "--out", tmp_path / "run",
                         check=False)  # fmt: skip
    assert_user_error(process, "rgb.pth", "3 channels")


def test_random_weights_have_the_default_heads():
    common = ["--data", "d", "--out", "o"]
    arguments = [*common, "--strategy", "full", "--pretrained"]
    for given, expected in (((), 4), (("--num-heads", "2"), 2)):
        args = finetune.parse_args([*arguments, "none", *given])
        finetune.fill_in_network(args, None)
        assert args.num_heads == expected
    assert finetune.parse_args([*arguments, "mae.pth"]).num_heads is None
    assert pretrain.parse_args(common).num_heads == 4


@pytest.mark.parametrize("script", ["finetune.py", "pretrain.py"])
def test_help_says_the_default_heads_once(script):
    text = " ".join(run_script(script, "--help").stdout.split())
    assert "attention heads of the encoder (default: 4) --" in text
    assert "default: None" not in text
