"""The strategies of fine-tuning: what each one trains, and how it computes the logits of rows."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lib import distributed
from lib.augment import augment
from lib.loader import EVALUATION_BATCH, StoredImages, batch_reader, in_batches, read_disturbed
from lib.residuals import stored_maps
from mae import random_masking

ALL_PATCHES_FROM = 0.5  # of the steps: patch dropout ends here
BATCHNORM_IMAGES = 2048  # training images that BatchNorm's statistics are computed from


class Strategy(NamedTuple):
    """How one training computes.

    trained : the module that is trained, validated and checkpointed.
    learning : its parameters that are trained, (name, parameter) pairs; all others are frozen.
    training_logits : (rows (b,), fraction of the steps done) -> logits (b, K) of a training step.
    logits : rows (b,) -> logits (b, K) as the finished network gives them, before its temperature.
    on_device, changes_at : of `training_logits`, see `loop.fit`.
    """

    trained: nn.Module
    learning: list
    training_logits: callable
    logits: callable
    on_device: bool
    changes_at: tuple = ()


def head(model, dataset, rows, args, run, device):
    """Train the head alone; the frozen encoder's output is computed once, not every epoch."""
    read = batch_reader(dataset.images, device)
    stored = stored_features(model, read, rows, len(dataset.labels))

    def logits(batch, progress=None):
        return model.fc(stored[batch])

    return Strategy(model.fc, head_parameters(model), logits, logits, on_device=True)


def layernorm(model, dataset, rows, args, run, device):
    """Train every LayerNorm and the head."""
    return encoder(model, dataset, args, device, layernorm_parameters(model))


def full(model, dataset, rows, args, run, device):
    """Train the whole network."""
    return encoder(model, dataset, args, device, all_parameters(model))


def encoder(model, dataset, args, device, learning):
    """Train parameters of the encoder, `learning`, on augmented images."""
    read = batch_reader(dataset.images, device)

    def training_logits(batch, progress):
        part = distributed.local_slice(len(batch))
        ids_keep = patches_to_keep(model, len(batch), args.patch_dropout, progress, device)
        images = augment(read(batch[part]), args.augment, len(batch), part)
        own = model.features(images, None if ids_keep is None else ids_keep[part])
        return model.fc(distributed.gather(own))

    def logits(batch):
        return model.fc(model.features(read_disturbed(read, batch, args.augment)))

    changes_at = (ALL_PATCHES_FROM,) if args.patch_dropout else ()
    on_device = isinstance(read, StoredImages)
    return Strategy(model, learning, training_logits, logits, on_device, changes_at)


def residual(model, dataset, rows, args, run, device):
    """Train a small network on the frozen MAE's residual maps, which are computed once.

    The maps are kept in --out until the run is finished. Of several processes each takes the whole
    step, as it does for the head: it is short.
    """
    read = batch_reader(dataset.images, device)
    model.eval()
    maps = stored_maps(
        lambda batch: model.maps(read(batch)), rows, run.maps_path, model.map_side, args.quiet
    )
    read_maps = batch_reader(maps, device)
    on_device = isinstance(read_maps, StoredImages)
    place = np.full(len(dataset.labels), -1)
    place[rows] = np.arange(len(rows))
    if on_device:
        place = torch.from_numpy(place).to(device)

    def training_logits(batch, progress):
        return model.network(augment(read_maps(place[batch]), args.augment))

    def logits(batch):
        return model.logits(read_maps(place[batch]))

    learning = list(model.network.named_parameters())
    return Strategy(model.network, learning, training_logits, logits, on_device)


STRATEGIES = {"head": head, "layernorm": layernorm, "full": full, "residual": residual}


# What learns


def head_parameters(model):
    return [(f"fc.{name}", parameter) for name, parameter in model.fc.named_parameters()]


def layernorm_parameters(model):
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    inside = [(f"{n}.{k}", p) for n, m in norms for k, p in m.named_parameters()]
    return inside + head_parameters(model)


def all_parameters(model):
    return [(name, p) for name, p in model.named_parameters() if name != "pos_embed"]


def freeze_others(model, learning):
    """Let only the parameters of `learning`, (name, parameter) pairs, have gradients."""
    model.requires_grad_(False)
    for _, parameter in learning:
        parameter.requires_grad_(True)


# Parts of a step


def stored_features(model, read, rows, count):
    """Pooled encoder outputs (count, d) on the device; only `rows` are computed."""
    model.eval()
    computed = in_batches(lambda batch: model.features(read(batch)), rows)
    device = model.cls_token.device
    features = torch.zeros(count, computed.shape[1], device=device)
    features[rows] = computed.to(device)
    return features


def patches_to_keep(model, images, dropout, progress, device):
    """Random patches (images, n) that a training step sees; None for all of them.

    `progress` is the fraction of the steps done: from ALL_PATCHES_FROM on no patch is dropped.
    """
    if not dropout or progress >= ALL_PATCHES_FROM:
        return None
    keep = max(1, round(model.num_patches * (1 - dropout)))
    ids_keep, _ = random_masking(torch.rand(images, model.num_patches, device=device), keep)
    return ids_keep


@torch.no_grad()
def reestimate_batchnorm(model, forward, rows):
    """Recompute BatchNorm's running statistics from training rows, with dropout off.

    The bias in front of a BatchNorm has no gradient, so Adam lets it drift, and running means lag
    behind it: without this, validation may look like chance while training goes well.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches
        norm.train()
    # Rows may be sorted by class: every batch must hold all classes, or variances are too small.
    chosen = np.random.default_rng(0).permutation(rows)[:BATCHNORM_IMAGES]
    batch = min(EVALUATION_BATCH, len(chosen))
    for start in range(0, len(chosen) - batch + 1, batch):
        forward(chosen[start : start + batch])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
