"""MAEs from elsewhere: their tensors by name, their heads told or asked for, what their files may hold."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from conftest import CLASSIFIER, Calls, assert_refused, finetune_on, finetuning, run_script

from lib import convert, weights
from lib.errors import UserError
from mae import MAE

# As transformers 5.24 names a model's tensors in memory; its files have older names.
NEWER = ((r"vit\.encoder\.layer", "vit.layers"),
         (r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj"),
         (r"attention\.output\.dense", "attention.o_proj"), (r"intermediate\.dense", "mlp.fc1"),
         (r"(?<!attention\.)output\.dense", "mlp.fc2"))  # fmt: skip
CONFIG = {"img_size": 64, "patch_size": 8, "in_chans": 1, "embed_dim": 96, "depth": 2, "num_heads": 12,
          "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, "mlp_ratio": 4.0,
          "norm_pix_loss": False}  # fmt: skip


def state(**sizes):
    torch.manual_seed(0)
    return MAE(**{**CONFIG, **sizes}).state_dict()


def encoder_alone(whole):
    return {n: t for n, t in whole.items() if "decoder" not in n and n != "mask_token"}


def heads(path, num_heads=None):
    return weights.read(path, num_heads, foreign=True).content["config"]["num_heads"]


@pytest.mark.parametrize("generation", ["files", "newer", "decoder renamed"])
def test_every_tensor_comes_back_from_hugging_face(generation):
    ours = state()
    theirs, described = convert.to_hugging_face(ours, CONFIG)
    assert all(name.startswith(("vit.", "decoder.")) for name in theirs)
    assert described["num_attention_heads"] == 12
    if generation == "newer":
        for pattern, other in NEWER:
            theirs = {re.sub(pattern, other, name): tensor for name, tensor in theirs.items()}
        assert "vit.layers.0.attention.q_proj.weight" in theirs
    if generation == "decoder renamed":
        theirs = {name.replace("decoder_layers", "decoder_encoder.layer"): tensor for name, tensor in theirs.items()}
    back, arguments = convert.from_foreign(theirs, 12)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    same = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    assert {name: arguments[name] for name in same} == {name: CONFIG[name] for name in same}


@pytest.mark.parametrize("form", ["facebookresearch", "bare", "encoder alone", "Hugging Face's ViTMAEModel"])
def test_a_foreign_checkpoint_gives_its_encoder(form, tmp_path):
    ours = state()
    if form == "encoder alone":
        content = encoder_alone(ours)
    elif form.startswith("Hugging"):
        theirs, _ = convert.to_hugging_face(encoder_alone(ours), CONFIG)
        content = {name.removeprefix("vit."): tensor for name, tensor in theirs.items()}
    else:
        content = {"model": ours} if form == "facebookresearch" else ours
    torch.save(content, tmp_path / "mae.pth")
    encoder, transform = weights.encoder_of(weights.read(tmp_path / "mae.pth", 12, foreign=True))
    assert transform is None
    got, expected = encoder.state_dict(), encoder_alone(ours)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert encoder.blocks[0].attn.num_heads == 12


def test_a_checkpoint_of_facebookresearch_can_be_fine_tuned(packed, tmp_path):
    ours = state()
    torch.save({"model": ours}, tmp_path / "mae.pth")
    finetune_on(packed, tmp_path / "run", tmp_path / "mae.pth", "head", "--epochs", 1, "--num-heads", 12)
    model, content = weights.load_classifier(tmp_path / "run" / CLASSIFIER)
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in encoder_alone(ours).items())
    assert model.blocks[0].attn.num_heads == 12
    assert content["config"]["transform"]["softening"] > 0


def test_ours_can_be_exported_to_hugging_face_and_taken_back(pretrained, packed, tmp_path):
    run_script("export.py", "--what", "huggingface", "--weights", pretrained, "--out", tmp_path / "hf")
    opened = weights.read(tmp_path / "hf" / "pytorch_model.bin", num_heads=2, foreign=True)
    back, transform = weights.encoder_of(opened)
    assert transform is None
    ours = weights.load_mae(pretrained)[0].state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.state_dict().items())
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    stored = torch.load(opened.path, weights_only=True)
    assert header.keys() == stored.keys() and sum(t.numel() for t in stored.values()) * 4 == len(numbers)
    for name, about in header.items():
        start, end = about["data_offsets"]
        values = np.frombuffer(numbers[start:end], "<f4").reshape(about["shape"])
        assert np.array_equal(values, stored[name].numpy())
    assert "no_sub" in (tmp_path / "hf" / "README.md").read_text()
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["do_rescale"] is False and processor["size"] == {"height": 64, "width": 64}
    assert_refused("finetune.py", finetuning(packed, tmp_path / "run", opened.path, "residual"),
                   "pytorch_model.bin", "from elsewhere", "another strategy")  # fmt: skip


def test_hugging_face_tells_the_heads_in_its_config(tmp_path):
    theirs, described = convert.to_hugging_face(state(), CONFIG)
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
    [("mae_vit_base_patch16", 768, 12), ("mae_vit_large_patch16", 1024, 16),
     ("mae_vit_huge_patch14", 1280, 16), ("vit_base_patch16", 768, 12),
     ("mae_vit_base_patch16", 96, None), ("another", 768, None), (None, 768, None)],
)  # fmt: skip
def test_facebookresearch_tells_the_heads_in_its_options(model, width, expected):
    assert convert.heads_told(width, model, {}) == expected


def test_a_checkpoint_may_hold_the_options_of_its_training(tmp_path):
    options = argparse.Namespace(lr=1.5e-4, model="mae_vit_base_patch16", resume="")
    torch.save({"model": state(embed_dim=768), "epoch": 1, "args": options}, tmp_path / "mae.pth")
    assert heads(tmp_path / "mae.pth") == 12


def test_options_hold_nothing_that_runs_and_our_own_files_hold_none(tmp_path, capsys):
    ours = {"model": {}, "config": {}, "class_names": [], "run": argparse.Namespace()}
    theirs = {"model": state(), "args": argparse.Namespace(model=Calls(print, "executed"))}
    for content, more in ((theirs, {"num_heads": 12, "foreign": True}), (ours, {})):
        torch.save(content, tmp_path / "mae.pth")
        with pytest.raises(UserError, match="not a weights file that can be loaded safely"):
            weights.read(tmp_path / "mae.pth", **more)
        assert argparse.Namespace not in torch.serialization.get_safe_globals()
    assert "executed" not in capsys.readouterr().out


def test_what_cannot_be_started_from_is_named(packed, pretrained, tmp_path):
    damaged = torch.load(pretrained, weights_only=True)
    damaged["model"] = encoder_alone(damaged["model"])
    files = {
        "other": ({"layer.weight": torch.zeros(3)}, "not a masked autoencoder"),
        "text": ({"vit.embeddings.cls_token": "text"}, "not the weights of a masked autoencoder"),
        "rgb": ({"model": state(in_chans=3)}, "3 channels"),
        "ours-without-decoder": (damaged, "is missing"),
        "headless": ({"model": state()}, "give --num-heads"),  # their number is not guessed
    }
    for name, (content, named) in files.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        more = ("--num-heads", 12) if name == "rgb" else ()
        assert_refused("finetune.py", finetuning(packed, tmp_path / "run", path, "head", *more), path.name, named)
