"""Weights travel: from and to the names of Hugging Face and facebookresearch."""

import re

import pytest
import torch
from conftest import assert_user_error, run_script

from lib import convert, weights
from lib.errors import UserError
from mae import MAE

# As transformers 5.24 names a model's tensors in memory; its files have older names.
NEWER = (
    (r"vit\.encoder\.layer", "vit.layers"),
    (r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(?<!attention\.)output\.dense", "mlp.fc2"),
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = MAE(embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16, decoder_num_heads=2)
    return model.eval()


def config_of(runs):
    content = weights.load_mae(runs / "pretrain" / "vit-mae-wt.pth")[2]
    return {k: v for k, v in content["config"].items() if k != "transform"}


@pytest.mark.parametrize("generation", ["files", "newer", "decoder renamed"])
def test_every_tensor_comes_back_from_hugging_face(generation, runs):
    config = config_of(runs)
    state = MAE(**config).state_dict()
    theirs, described = convert.to_hugging_face(state, config)
    assert all(name.startswith(("vit.", "decoder.")) for name in theirs)
    assert described["num_attention_heads"] == config["num_heads"]
    if generation == "newer":
        for pattern, other in NEWER:
            theirs = {re.sub(pattern, other, name): tensor for name, tensor in theirs.items()}
        assert "vit.layers.0.attention.q_proj.weight" in theirs
    if generation == "decoder renamed":
        theirs = {
            name.replace("decoder_layers", "decoder_encoder.layer"): tensor
            for name, tensor in theirs.items()
        }
    back, arguments = convert.from_foreign(theirs, config["num_heads"])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    same = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    assert {name: arguments[name] for name in same} == {name: config[name] for name in same}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_checkpoint_of_facebookresearch_can_be_fine_tuned(wrapped, network, packed, tmp_path):
    state = network.state_dict()
    torch.save({"model": state} if wrapped else state, tmp_path / "mae.pth")
    common = ("--data", packed, "--strategy", "head", "--epochs", 1, "--pretrained",
              tmp_path / "mae.pth", "--num-heads", 2)  # fmt: skip
    run_script("finetune.py", *common, "--out", tmp_path / "run")
    model, content = weights.load_classifier(tmp_path / "run" / "vit-mae-classifier-wt.pth")
    assert torch.equal(model.blocks[2].attn.qkv.weight, network.blocks[2].attn.qkv.weight)
    assert content["config"]["transform"]["softening"] > 0


def test_ours_can_be_exported_to_hugging_face_and_taken_back(runs, packed, tmp_path):
    path = runs / "pretrain" / "vit-mae-wt.pth"
    run_script("export.py", "--what", "huggingface", "--weights", path, "--out", tmp_path / "hf")
    opened = weights.read(tmp_path / "hf" / "pytorch_model.bin", num_heads=2, foreign=True)
    back, transform = weights.encoder_of(opened)
    assert transform is None
    ours = weights.load_mae(path)[0].state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.state_dict().items())
    process = run_script("finetune.py", "--data", packed, "--strategy", "residual", "--pretrained",
                         opened.path, "--out", tmp_path / "residual", check=False)  # fmt: skip
    assert_user_error(process, "pytorch_model.bin", "from elsewhere", "another strategy")


def test_what_is_no_mae_is_refused(tmp_path, packed):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: not a masked autoencoder"):
        weights.read(tmp_path / "other.pth", num_heads=2, foreign=True)
    torch.save({"vit.embeddings.cls_token": "text"}, tmp_path / "text.pth")
    process = run_script(
        "finetune.py", "--data", packed, "--strategy", "head", "--pretrained",
        tmp_path / "text.pth", "--out", tmp_path / "run", check=False,
    )  # fmt: skip
    assert_user_error(process, "text.pth")
