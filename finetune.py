"""Fine-tune a classifier on all classes: the head alone, every LayerNorm, or the whole network.

Leaves in --out: vit-mae-classifier-wt.pth (weights of the best validation macro AUC), config.json,
metrics.jsonl and curves.png (loss, accuracy and AUC).
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib import data, distributed, metrics, optim, options, plots, weights
from lib.augment import augment, disturbances
from lib.device import resolve_device
from lib.files import UserError, run
from lib.loader import (
    EVALUATION_BATCH,
    batch_reader,
    fit_transform,
    fixed_random_numbers,
    in_batches,
    larger_than_memory,
)
from lib.loop import fit
from lib.run import open_run
from mae import POOLINGS, Classifier, random_masking

EXAMPLE = """examples:
  python finetune.py --data lenses --strategy full --out runs/full \\
      --pretrained runs/pretrain/vit-mae-wt.pth
  python finetune.py --data lenses --strategy full --out runs/scratch --pretrained none"""

# Defaults of each strategy, chosen on validation. A small data set gets more epochs, until it has
# made `fewest_steps`.
DEFAULTS = {
    "head": {"lr": 8e-3, "batch_size": 1024, "epochs": 100, "fewest_steps": 1000,
             "augment": (), "patch_dropout": 0.0},
    "layernorm": {"lr": 1e-2, "batch_size": 64, "epochs": 2, "fewest_steps": 1000,
                  "augment": ("halfturn",), "patch_dropout": 0.5},
    "full": {"lr": 3e-3, "batch_size": 128, "epochs": 6, "fewest_steps": 1000,
             "augment": ("halfturn",), "patch_dropout": 0.5},
}  # fmt: skip
# What differs when continuing from a classifier: its head is already trained, so use small steps.
CONTINUING = {
    "head": {"lr": 8e-4, "epochs": 20, "fewest_steps": 300},
    "layernorm": {"lr": 3e-4, "batch_size": 128, "epochs": 1, "fewest_steps": 300,
                  "patch_dropout": 0.0},
    "full": {"lr": 2e-4, "epochs": 1, "fewest_steps": 300, "patch_dropout": 0.0},
}
LAYER_DECAY = 0.75  # of a pre-trained network that is trained as a whole
ALL_PATCHES_FROM = 0.5  # of the steps: patch dropout ends here
BATCHNORM_IMAGES = 2048  # training images that BatchNorm's statistics are computed from
OTHER_SIZE = ": pre-train on images of this size"


def finetune(args):
    with distributed.main_process_first():
        dataset = data.load(args.data, args.cache_dir)
    if len(dataset.class_names) < 2:
        raise UserError(f"{args.data} has one class only: a classifier needs at least two")
    parts = data.split(dataset)
    rows, validation = parts["train"], parts["validation"]
    if args.labels < 1:
        rows = data.fraction_of_each_class(dataset.labels, rows, args.labels, args.seed)
    source = None
    if args.pretrained != "none":
        source = weights.read(args.pretrained, args.num_heads, foreign=True)
        if args.pretrained.resolve().parent == args.out.resolve():
            raise UserError(f"--out {args.out} holds the weights to start from: choose another")
    fill_in_defaults(args, source, len(rows))
    started_from = source.sha256 if source else "none"
    with open_run(
        args, dataset, "vit-mae-classifier-wt.pth", pretrained_sha256=started_from
    ) as run:
        if not run.is_finished:
            train(args, dataset, rows, validation, source, run)


def train(args, dataset, rows, validation, source, run):
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    model, config = build_classifier(args, source, dataset, rows)
    model.to(device)
    labels = torch.from_numpy(np.array(dataset.labels)).to(device)
    read = batch_reader(dataset.images, device)
    learning = learning_parameters(model, args.strategy)

    if args.strategy == "head":
        # The encoder is frozen: compute its output once, not every epoch.
        trained = model.fc
        stored = stored_features(model, read, np.concatenate([rows, validation]), len(labels))

        def features_of(batch):
            return stored[batch]

        def training_features(batch, _):
            return stored[batch]
    else:
        trained = model

        def features_of(batch):
            return model.features(augment(read(batch), disturbances(args.augment)))

        def training_features(batch, progress):
            part = distributed.local_slice(len(batch))
            ids_keep = patches_to_keep(model, len(batch), args.patch_dropout, progress, device)
            images = augment(read(batch[part]), args.augment, len(batch), part)
            own = model.features(images, None if ids_keep is None else ids_keep[part])
            return distributed.gather(own)

    def batch_loss(batch, progress):
        logits = model.fc(training_features(batch, progress)).float()
        target = labels[batch]
        correct = (logits.detach().argmax(dim=1) == target).float().mean()
        return {"loss": F.cross_entropy(logits, target), "accuracy": correct}

    def logits_of(batch):
        return model.fc(features_of(batch))

    def validate():
        with fixed_random_numbers():
            reestimate_batchnorm(trained, logits_of, rows)
            logits = in_batches(logits_of, validation)
        return validation_figures(logits, labels[validation].cpu())

    groups = optim.parameter_groups(learning, args.weight_decay, layer_decay(args, model))
    run.write_config(model=config)
    state, history, precision = fit(
        trained, groups, batch_loss, validate, rows, run, device, score="macro_auc",
        in_blocks=args.strategy != "head" and larger_than_memory(dataset.images),
    )  # fmt: skip
    trained.load_state_dict(state)
    trained.eval()
    with fixed_random_numbers():
        logits = in_batches(logits_of, validation)
    if not distributed.is_main():
        return
    model.temperature.fill_(metrics.fit_temperature(logits.numpy(), dataset.labels[validation]))
    seen = dataset.hashes[np.concatenate([rows, validation])]
    run.save_weights(
        model.state_dict(), config, np.concatenate([seen, source.seen]) if source else seen,
        number_format=precision.name,
        pixel_range=data.pixel_range(data.extremes_of(dataset, rows)),
        best=max(history, key=lambda line: line["validation_macro_auc"]),
    )  # fmt: skip
    plots.attempt(plots.classifier_curves, args.out / "curves.png", history)


def fill_in_defaults(args, source, images):
    """Set the options that were not given, by strategy, --pretrained and the number of images."""
    defaults = strategy_defaults(args.strategy, source)
    for name in ("lr", "batch_size", "augment", "patch_dropout"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    if args.epochs is None:
        args.epochs = optim.enough_epochs(
            defaults["epochs"], defaults["fewest_steps"], images, args.batch_size
        )
    if args.batch_size == 1:
        raise UserError("--batch-size must be at least 2: BatchNorm needs several images a step")
    if args.strategy == "head":
        for name in ("augment", "patch_dropout"):
            if getattr(args, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: the head learns from stored features; use another "
                    "--strategy"
                )
    decays = args.strategy == "full" and source is not None
    if args.layer_decay not in (None, 1) and not decays:
        raise UserError("--layer-decay needs --strategy full and pre-trained weights")
    args.layer_decay = (args.layer_decay or LAYER_DECAY) if decays else 1.0
    fill_in_network(args, source)


def fill_in_network(args, source):
    """Set the options of the network to those of `source`, or to the defaults without one.

    Raises UserError if an option that was given says something else than the weights.
    """
    network = dict(options.NETWORK)
    if source is not None:
        config = source.content["config"]
        kind = config.get("transform", {"kind": args.transform or network["transform"]})["kind"]
        network |= {**config, "transform": kind}
    for name in options.NETWORK:
        value = getattr(args, name)
        if source is None and value is not None:
            continue
        if value not in (None, network[name]):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the network of {args.pretrained} has "
                f"{network[name]}; leave the option out"
            )
        setattr(args, name, network[name])


def strategy_defaults(strategy, source):
    """Defaults of a strategy that starts from `source`: opened `Weights` or None."""
    continues = source is not None and source.is_classifier
    return DEFAULTS[strategy] | (CONTINUING[strategy] if continues else {})


def build_classifier(args, source, dataset, train_rows):
    """The `Classifier` that training starts from, and the arguments of its constructor.

    `source` is None for random weights; an opened MAE, of which the encoder is taken; or an opened
    classifier, which is taken whole, head included. UserError where data and weights do not fit.
    """
    def new_transform():
        return fit_transform(dataset.images, train_rows, args.transform, args.augment)

    classes = {"num_classes": len(dataset.class_names), "pool": args.pool}
    if source is None:
        sizes = {n: getattr(args, n) for n in ("patch_size", "embed_dim", "depth", "num_heads")}
        config = {"img_size": dataset.img_size, **sizes, **classes, "transform": new_transform()}
        return options.new_network(Classifier, config), config
    content = source.content
    data.check_unit(dataset, train_rows, content["run"])
    if source.is_classifier:
        model = weights.classifier_of(source)
        data.check_split(content["run"])
        data.check_size(source.path, model, dataset, OTHER_SIZE)
        if content["class_names"] != list(dataset.class_names) or model.pool != args.pool:
            raise UserError(
                f"{source.path} tells {', '.join(content['class_names'])} apart with --pool "
                f"{model.pool}; start from an MAE for other classes or another --pool"
            )
        model.temperature.fill_(1.0)
        return model, content["config"]
    pretrained, transform = weights.encoder_of(source)
    data.check_size(source.path, pretrained, dataset, OTHER_SIZE)
    sizes = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
    config = {name: content["config"][name] for name in sizes if name in content["config"]}
    if transform is None:  # a checkpoint from elsewhere
        config |= {**classes, "transform": new_transform()}
    else:
        data.check_split(content["run"])
        config |= {**classes, "transform": content["config"]["transform"]}
    model = Classifier(**config)
    encoder = {k: v for k, v in pretrained.state_dict().items() if k in model.state_dict()}
    model.load_state_dict({**model.state_dict(), **encoder})
    return model, config


# A strategy gives the trainable parameters: (name, parameter) pairs.


def head_parameters(model):
    return [(f"fc.{name}", parameter) for name, parameter in model.fc.named_parameters()]


def layernorm_parameters(model):
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    inside = [(f"{n}.{k}", p) for n, m in norms for k, p in m.named_parameters()]
    return inside + head_parameters(model)


def all_parameters(model):
    return [(name, p) for name, p in model.named_parameters() if name != "pos_embed"]


STRATEGIES = {
    "head": head_parameters,
    "layernorm": layernorm_parameters,
    "full": all_parameters,
}


def learning_parameters(model, strategy):
    """The parameters that a strategy trains; all others are frozen."""
    learning = STRATEGIES[strategy](model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in learning:
        parameter.requires_grad_(True)
    return learning


def layer_decay(args, model):
    """Function from a parameter's name to the factor of its learning rate.

    The rate of a block is --layer-decay times that of the next one.
    """
    depth = len(model.blocks)
    return lambda name: args.layer_decay ** (depth + 1 - layer_of(name, depth))


def layer_of(name, depth):
    """How deep a parameter lies: 0 the embedding, 1..depth the blocks, depth + 1 the head."""
    if name.startswith(("patch_embed", "cls_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


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
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
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


def validation_figures(logits, target):
    """Loss, accuracy and macro AUC of logits (n, K); the loss alone if it is not finite."""
    loss = F.cross_entropy(logits, target).item()
    if not math.isfinite(loss):
        return {"loss": loss}  # ends the run; it has no AUC
    probabilities = logits.softmax(dim=1).numpy()
    aucs = metrics.auc_by_class(probabilities, target.numpy())
    correct = metrics.accuracy(probabilities, target.numpy())
    return {"loss": loss, "accuracy": correct, "macro_auc": float(np.mean(aucs))}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=options.HelpFormatter
    )
    options.add_data_arguments(parser)
    parser.add_argument(
        "--pretrained", required=True, metavar="PTH|none",
        help="weights of pretrain.py; or a classifier to continue from, its head included; or an "
        "MAE of facebookresearch/mae or Hugging Face (give --num-heads where its file does not "
        "tell); none: random weights",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", choices=STRATEGIES, required=True,
        help="which parameters are trained; sets the defaults of --lr, --batch-size, --epochs, --augment "
        "and --patch-dropout",
    )  # fmt: skip
    options.add_training_arguments(parser)
    parser.set_defaults(batch_size=None, augment=None)
    group = parser.add_argument_group("classifier")
    group.add_argument(
        "--pool", choices=POOLINGS, default="stats",
        help="how the patch tokens are summarised for the head",
    )  # fmt: skip
    group.add_argument(
        "--layer-decay", type=float, default=None,
        help="learning rate of a block over that of the next one (full, pre-trained; default: "
        f"{LAYER_DECAY})",
    )  # fmt: skip
    group.add_argument(
        "--patch-dropout", type=float, default=None,
        help="fraction of patches dropped at random in the first half of the steps, which makes "
        "them faster (layernorm, full)",
    )  # fmt: skip
    group.add_argument(
        "--labels", type=float, default=1.0, help="fraction of the training labels to use"
    )
    options.add_model_arguments(parser)
    args = parser.parse_args(argv)
    options.check_numbers(args)
    if args.pretrained != "none":
        args.pretrained = Path(args.pretrained)
        return args
    if args.strategy != "full":
        raise UserError("--pretrained none leaves nothing to freeze: use --strategy full")
    return args


def main(argv=None):
    args = parse_args(argv)
    with distributed.process_group(args.device):
        finetune(args)


if __name__ == "__main__":
    run(main)
