"""Translate MAE weights between our names, those of facebookresearch/mae, and Hugging Face's."""

import re

import torch

from lib.errors import UserError

# Hugging Face's name (of any generation of transformers) -> ours, which is facebookresearch's.
PARTS = {
    r"(?:vit\.)?embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"(?:vit\.)?embeddings\.cls_token": "cls_token",
    r"(?:vit\.)?embeddings\.position_embeddings": "pos_embed",
    r"(?:vit\.)?layernorm": "norm",
    r"(?:vit\.)?decoder\.mask_token": "mask_token",
    r"decoder\.(decoder_pos_embed|decoder_embed|decoder_norm|decoder_pred)": r"\1",
    r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.": r"blocks.\1.",
    r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.": r"decoder_blocks.\1.",
}
# Likewise inside a block: the name that we write, and others that are read.
IN_BLOCK = {
    "attn.q": ("attention.attention.query", "attention.attention.q_proj",
               "attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.attention.k_proj",
               "attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.attention.v_proj",
               "attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
OURS_IN_BLOCK = {theirs: ours for ours, names in IN_BLOCK.items() for theirs in names}
# Of facebookresearch's models: width of the encoder and its attention heads.
PUBLISHED_HEADS = {"base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}
TO_HUGGING_FACE = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "norm": "vit.layernorm",
}


def our_name(name):
    """Our name of a tensor of Hugging Face's; `attn.q`, `.k` and `.v` are still separate."""
    for pattern, ours in PARTS.items():
        name, count = re.subn(f"^{pattern}", ours, name)
        if count:
            break
    block = re.match(r"((?:decoder_)?blocks\.\d+\.)(.*)\.(weight|bias)$", name)
    return f"{block[1]}{OURS_IN_BLOCK.get(block[2], block[2])}.{block[3]}" if block else name


def from_foreign(state, num_heads):
    """State dict of a foreign MAE -> (our state dict, arguments of its `mae.Encoder`).

    Sizes are read off the tensors; only `num_heads` cannot be. Raises UserError if the tensors are
    not those of an MAE with square patches.
    """
    renamed = {our_name(name): tensor for name, tensor in state.items()}
    try:
        for name in [name for name in renamed if ".attn.q." in name]:
            parts = [renamed.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        embed_dim, in_chans, patch_size, _ = renamed["patch_embed.proj.weight"].shape
        patches = renamed["pos_embed"].shape[1] - 1
        depth = 1 + max(int(n.split(".")[1]) for n in renamed if n.startswith("blocks."))
        hidden = renamed["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"not a masked autoencoder: {error} is missing") from None
    config = {
        "img_size": patch_size * round(patches**0.5), "patch_size": patch_size,
        "in_chans": in_chans, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads,
        "mlp_ratio": hidden / embed_dim,
    }  # fmt: skip
    return renamed, config


def heads_told(embed_dim, model_name, described):
    """Attention heads of a foreign encoder of width `embed_dim`, or None.

    `model_name` is what facebookresearch's training script calls the network, such as
    "mae_vit_base_patch16"; `described` is the dict of Hugging Face's config.json.
    """
    told = described.get("num_attention_heads")
    if described.get("hidden_size") == embed_dim and type(told) is int:
        return told
    published = re.match(r"(?:mae_)?vit_(base|large|huge)_", str(model_name))
    width, heads = PUBLISHED_HEADS[published[1]] if published else (None, None)
    return heads if width == embed_dim else None


def to_hugging_face(state, config):
    """Our state dict and configuration -> those of `transformers.ViTMAEForPreTraining`."""
    theirs = {}
    for name, tensor in state.items():
        block = re.match(r"(decoder_)?blocks\.(\d+)\.(.*)\.(weight|bias)$", name)
        if block:
            layer = "decoder.decoder_layers" if block[1] else "vit.encoder.layer"
            pieces = {block[3]: tensor}
            if block[3] == "attn.qkv":
                pieces = dict(zip(("attn.q", "attn.k", "attn.v"), tensor.chunk(3), strict=True))
            for part, piece in pieces.items():
                theirs[f"{layer}.{block[2]}.{IN_BLOCK[part][0]}.{block[4]}"] = piece.clone()
            continue
        stem, kind = re.fullmatch(r"(.*?)(\.weight|\.bias|)", name).groups()
        theirs[TO_HUGGING_FACE.get(stem, f"decoder.{stem}") + kind] = tensor
    described = {
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
        "image_size": config["img_size"], "patch_size": config["patch_size"],
        "num_channels": config["in_chans"], "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"], "num_attention_heads": config["num_heads"],
        "intermediate_size": int(config["embed_dim"] * config["mlp_ratio"]),
        "decoder_hidden_size": config["decoder_embed_dim"],
        "decoder_num_hidden_layers": config["decoder_depth"],
        "decoder_num_attention_heads": config["decoder_num_heads"],
        "decoder_intermediate_size": int(config["decoder_embed_dim"] * config["mlp_ratio"]),
        "norm_pix_loss": config["norm_pix_loss"], "layer_norm_eps": 1e-6, "hidden_act": "gelu",
        "qkv_bias": True,
    }  # fmt: skip
    return theirs, described
