"""Run Hugging Face's ViTMAE on random images and leave what it computes; needs transformers.

The tests compare `mae.MAE` with huggingface.npz: the same weights under the names of the reference
implementation (facebookresearch/mae), images, noise, loss and predictions.

    pip install transformers==5.24.0
    python tests/reference/make_huggingface.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

SIZES = {"img_size": 24, "patch_size": 4, "in_chans": 3, "embed_dim": 32, "depth": 2}
SIZES |= {"num_heads": 4, "decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}
MASK_RATIO = 0.7  # 36 patches: 10.8 would stay, so the rounding is compared too


def build(norm_pix_loss):
    config = ViTMAEConfig(
        image_size=SIZES["img_size"], patch_size=SIZES["patch_size"], num_channels=3,
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        decoder_intermediate_size=96, mask_ratio=MASK_RATIO, norm_pix_loss=norm_pix_loss,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).eval()
    # A fresh model of this version has zeros for positions; its own functions fill them.
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    with torch.no_grad():  # biases and norms start at constants: move everything
        for name, parameter in model.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def block(prefix, source, state):
    """One transformer block of Hugging Face under the reference names."""

    def find(*names):
        return next(state[f"{source}.{n}"] for n in names if f"{source}.{n}" in state)

    out = {}
    for kind in ("weight", "bias"):
        qkv = [
            find(f"attention.attention.{n}.{kind}", f"attention.{short}_proj.{kind}")
            for n, short in (("query", "q"), ("key", "k"), ("value", "v"))
        ]
        out[f"{prefix}.attn.qkv.{kind}"] = torch.cat(qkv)
        out[f"{prefix}.attn.proj.{kind}"] = find(
            f"attention.output.dense.{kind}", f"attention.o_proj.{kind}"
        )
        out[f"{prefix}.norm1.{kind}"] = find(f"layernorm_before.{kind}")
        out[f"{prefix}.norm2.{kind}"] = find(f"layernorm_after.{kind}")
        out[f"{prefix}.mlp.fc1.{kind}"] = find(f"intermediate.dense.{kind}", f"mlp.fc1.{kind}")
        out[f"{prefix}.mlp.fc2.{kind}"] = find(f"output.dense.{kind}", f"mlp.fc2.{kind}")
    return out


def reference_names(model):
    state = model.state_dict()
    names = {
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
        "decoder_embed.weight": "decoder.decoder_embed.weight",
        "decoder_embed.bias": "decoder.decoder_embed.bias",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_norm.weight": "decoder.decoder_norm.weight",
        "decoder_norm.bias": "decoder.decoder_norm.bias",
        "decoder_pred.weight": "decoder.decoder_pred.weight",
        "decoder_pred.bias": "decoder.decoder_pred.bias",
    }
    out = {ours: state[theirs] for ours, theirs in names.items()}
    encoder = (
        "vit.layers" if any(k.startswith("vit.layers.") for k in state) else "vit.encoder.layer"
    )
    for i in range(2):
        out |= block(f"blocks.{i}", f"{encoder}.{i}", state)
        out |= block(f"decoder_blocks.{i}", f"decoder.decoder_layers.{i}", state)
    return {name: tensor.numpy() for name, tensor in out.items()}


def main():
    rng = np.random.default_rng(0)
    side = SIZES["img_size"]
    images = rng.standard_normal((3, SIZES["in_chans"], side, side)).astype(np.float32)
    noise = rng.random((3, (side // SIZES["patch_size"]) ** 2)).astype(np.float32)
    arrays = {"images": images, "noise": noise, "mask_ratio": np.array(MASK_RATIO)}
    arrays |= {f"config/{name}": np.array(value) for name, value in SIZES.items()}
    for norm_pix_loss in (False, True):
        model = build(norm_pix_loss)
        with torch.no_grad():
            result = model(torch.from_numpy(images), noise=torch.from_numpy(noise))
        name = f"norm_pix_loss_{norm_pix_loss}"
        arrays[f"{name}/loss"] = result.loss.numpy()
        arrays[f"{name}/pred"], arrays[f"{name}/mask"] = result.logits.numpy(), result.mask.numpy()
    arrays |= {f"model/{key}": value for key, value in reference_names(model).items()}
    path = Path(__file__).with_name("huggingface.npz")
    np.savez_compressed(path, **arrays)
    print(f"{len(arrays)} arrays in {path}")


if __name__ == "__main__":
    main()
