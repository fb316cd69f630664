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

import data
import distributed
import plots
import train
import weights
from augment import SYMMETRIES, augment
from evaluate import accuracy, auc_by_class, check_size
from files import UserError, run, sha256_of
from mae import POOLINGS, Classifier, random_masking

EXAMPLE = """examples:
  python finetune.py --data lenses --strategy full --out runs/full \\
      --pretrained runs/pretrain/vit-mae-wt.pth
  python finetune.py --data lenses --strategy full --out runs/scratch --pretrained none"""

# Defaults by strategy, chosen on validation. A small data set gets more epochs, until it has made
# `fewest_steps`.
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
OTHER_SIZE = ": pre-train on images of this size"
ALL_PATCHES_FROM = 0.5  # of the steps: from then on no patch is left out


def usual(args):
    """What is used where an option is not given, by strategy and kind of --pretrained."""
    continuing = args.pretrained != "none" and weights.holds_classifier(args.pretrained)
    return DEFAULTS[args.strategy] | (CONTINUING[args.strategy] if continuing else {})


def build_classifier(args, dataset, train_rows):
    """The `Classifier` that training starts from, and the arguments it was made with.

    --pretrained may be an MAE, whose encoder is taken; a classifier, taken whole, head included; or
    "none" for random weights. UserError where data and weights do not fit.
    """
    classes = {"num_classes": len(dataset.class_names), "pool": args.pool}
    if args.pretrained == "none":
        sizes = {n: getattr(args, n) for n in ("patch_size", "embed_dim", "depth", "num_heads")}
        transform = train.fit_transform(dataset.images, train_rows, args.transform, args.augment)
        config = {"img_size": dataset.img_size, **sizes, **classes, "transform": transform}
        return train.new_network(Classifier, config), config
    if weights.holds_classifier(args.pretrained):
        model, content = weights.load_classifier(args.pretrained)
        data.check_split(content["run"])
        check_size(args.pretrained, model, dataset, OTHER_SIZE)
        if content["class_names"] != list(dataset.class_names) or model.pool != args.pool:
            raise UserError(
                f"{args.pretrained} tells {', '.join(content['class_names'])} apart with --pool "
                f"{model.pool}; start from an MAE for other classes or another --pool"
            )
        model.temperature.fill_(1.0)
        return model, content["config"]
    mae, transform, content = weights.load_mae(args.pretrained, args.num_heads)
    if transform is not None:
        data.check_split(content["run"])
    else:  # a checkpoint from elsewhere
        content["config"]["transform"] = train.fit_transform(
            dataset.images, train_rows, args.transform, args.augment
        )
    check_size(args.pretrained, mae, dataset, OTHER_SIZE)
    sizes = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
    config = {k: v for k, v in content["config"].items() if k in (*sizes, "transform")} | classes
    model = Classifier(**config)
    encoder = {k: v for k, v in mae.state_dict().items() if k in model.state_dict()}
    model.load_state_dict({**model.state_dict(), **encoder})
    return model, config


# A strategy says which parameters learn: (name, parameter) pairs.


def learns_in_head(model):
    return [(f"fc.{name}", parameter) for name, parameter in model.fc.named_parameters()]


def learns_in_layernorm(model):
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    inside = [(f"{n}.{k}", p) for n, m in norms for k, p in m.named_parameters()]
    return inside + learns_in_head(model)


def learns_in_full(model):
    return [(name, p) for name, p in model.named_parameters() if name != "pos_embed"]


STRATEGIES = {
    "head": learns_in_head,
    "layernorm": learns_in_layernorm,
    "full": learns_in_full,
}


def layer_of(name, depth):
    """How deep a parameter lies: 0 the embedding, 1..depth the blocks, depth + 1 the head."""
    if name.startswith(("patch_embed", "cls_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def finetune(args):
    with distributed.first_goes_first():
        dataset = data.load(args.data, args.cache_dir)
    if len(dataset.class_names) < 2:
        raise UserError(f"{args.data} has one class only: a classifier needs at least two")
    parts = data.split(dataset)
    rows = parts["train"]
    if args.labels < 1:
        rows = share_of_each_class(dataset.labels, rows, args.labels, args.seed)
    if args.epochs is None:
        defaults = usual(args)
        args.epochs = train.enough_epochs(
            defaults["epochs"], defaults["fewest_steps"], len(rows), args.batch_size
        )
    device = train.resolve_device(args.device)
    torch.manual_seed(args.seed)
    model, config = build_classifier(args, dataset, rows)
    model.to(device)
    labels = torch.from_numpy(np.array(dataset.labels)).to(device)
    read = train.batch_reader(dataset.images, device)

    learning = STRATEGIES[args.strategy](model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in learning:
        parameter.requires_grad_(True)

    decay = args.layer_decay if args.strategy == "full" and args.pretrained != "none" else 1.0
    groups = train.parameter_groups(
        learning, args.weight_decay,
        lambda name: decay ** (len(model.blocks) + 1 - layer_of(name, len(model.blocks))),
    )  # fmt: skip

    if args.strategy == "head":
        # The encoder is frozen: its output is computed once, not every epoch.
        trained = model.fc
        model.eval()
        used = np.concatenate([rows, parts["validation"]])
        features = torch.zeros(len(dataset.labels), model.fc[0].in_features, device=device)
        features[used] = train.in_batches(lambda b: model.features(read(b)), used).to(device)

        def logits_of(batch, **_):
            return model.fc(features[batch])

        training_logits = logits_of
    else:
        trained = model

        def logits_of(batch, augmentations=()):
            return model(augment(read(batch), augmentations))

        def training_logits(batch, ids_keep):
            images = augment(read(batch), args.augment)
            own = distributed.share(len(batch))
            features = model.features(images[own], None if ids_keep is None else ids_keep[own])
            return model.fc(distributed.gather(features))

    def batch_loss(batch, progress):
        ids_keep = None
        if args.patch_dropout and args.strategy != "head" and progress < ALL_PATCHES_FROM:
            keep = max(1, round(model.num_patches * (1 - args.patch_dropout)))
            noise = torch.rand(len(batch), model.num_patches, device=device)
            ids_keep, _ = random_masking(noise, keep)
        logits = training_logits(batch, ids_keep=ids_keep).float()
        target = labels[batch]
        correct = (logits.detach().argmax(dim=1) == target).float().mean()
        return {"loss": F.cross_entropy(logits, target), "accuracy": correct}

    def validate():
        disturbances = [kind for kind in args.augment if kind not in SYMMETRIES]
        with train.same_random_numbers():

            def augmented(batch):
                return logits_of(batch, augmentations=disturbances)

            train.reestimate_batchnorm(trained, augmented, rows)
            logits = train.in_batches(augmented, parts["validation"])
        target = labels[parts["validation"]].cpu()
        probabilities = logits.softmax(dim=1).numpy()
        loss = F.cross_entropy(logits, target).item()
        if not math.isfinite(loss):
            return {"loss": loss}  # which ends the run; there is no AUC of it
        return {
            "loss": loss,
            "accuracy": accuracy(probabilities, target.numpy()),
            "macro_auc": float(np.mean(auc_by_class(probabilities, target.numpy()))),
        }

    with train.run_folder(args.out):
        source = "none" if args.pretrained == "none" else sha256_of(args.pretrained)
        settings = train.settings_of(args, dataset, pretrained_sha256=source)
        checkpoint = train.checkpoint_to_resume(args, settings)
        train.write_config(args.out, args, dataset, model=config)
        state, history, precision = train.fit(
            trained, groups, batch_loss, validate, rows, args=args, settings=settings,
            checkpoint=checkpoint, device=device, score=lambda measured: measured["macro_auc"],
            in_blocks=args.strategy != "head" and train.larger_than_memory(dataset.images),
        )  # fmt: skip
        trained.load_state_dict(state)
        trained.eval()
        logits = train.in_batches(logits_of, parts["validation"])
        if not distributed.is_first():
            return
        model.temperature.fill_(fit_temperature(logits, labels[parts["validation"]].cpu()))
        plots.classifier_curves(args.out / "curves.png", history)
        best = max(history, key=lambda line: line["validation_macro_auc"])
        weights.save(
            args.out / "vit-mae-classifier-wt.pth",
            model.state_dict(),
            config,
            dataset.class_names,
            {**settings, "precision": precision.name, "best": best, "data": str(args.data)},
        )
        weights.remove_checkpoints(args.out)
    print(f"weights in {args.out / 'vit-mae-classifier-wt.pth'}")


def fit_temperature(logits, target):
    """The number that logits (n, K) must be divided by for the least cross-entropy; 0.1 to 10.

    Cross-entropy is convex in the inverse of the temperature, so a search that narrows down an
    interval finds it.
    """
    low, high = 0.1, 10.0  # of the inverse
    for _ in range(50):
        third = (high - low) / 3
        one, other = low + third, high - third
        if F.cross_entropy(one * logits, target) < F.cross_entropy(other * logits, target):
            high = other
        else:
            low = one
    return 2 / (low + high)


def share_of_each_class(labels, rows, share, seed):
    """A random share of `rows`, the same of every class and at least two of each."""
    rng = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == label])
        kept.append(of_class[: max(2, round(share * len(of_class)))])
    return np.sort(np.concatenate(kept))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=train.HelpFormatter
    )
    data.add_data_arguments(parser)
    parser.add_argument(
        "--pretrained", required=True, metavar="PTH|none",
        help="weights that pretrain.py left; or a classifier to go on from, its head included; or "
        "an MAE of facebookresearch/mae or Hugging Face (give --num-heads); none: random weights",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", choices=STRATEGIES, required=True,
        help="what learns; it decides the defaults of --lr, --batch-size, --epochs, --augment "
        "and --patch-dropout",
    )  # fmt: skip
    train.add_training_arguments(parser)
    parser.set_defaults(batch_size=None, augment=None)
    group = parser.add_argument_group("classifier")
    group.add_argument(
        "--pool", choices=POOLINGS, default="stats",
        help="tokens that the head sees",
    )  # fmt: skip
    group.add_argument(
        "--layer-decay", type=float, default=0.75,
        help="learning rate of a block over that of the next one (full, pre-trained)",
    )  # fmt: skip
    group.add_argument(
        "--patch-dropout", type=float, default=None,
        help="share of patches left out at random, to be faster, in the first half of the "
        "steps (layernorm, full)",
    )  # fmt: skip
    group.add_argument(
        "--labels", type=float, default=1.0, help="share of the training labels to use"
    )
    train.add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.pretrained != "none":
        args.pretrained = Path(args.pretrained)
    defaults = usual(args)
    for name in ("lr", "batch_size", "augment", "patch_dropout"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    train.check_arguments(args)
    for flag in ("layer_decay", "labels"):
        if not 0 < getattr(args, flag) <= 1:
            raise UserError(f"--{flag.replace('_', '-')} must be in (0, 1]")
    if not 0 <= args.patch_dropout < 1:
        raise UserError(f"--patch-dropout must be in [0, 1), got {args.patch_dropout}")
    if args.augment and args.strategy == "head":
        raise UserError("--augment: the head learns from stored features; use another --strategy")
    if args.strategy != "full" and args.pretrained == "none":
        raise UserError("--pretrained none has nothing to keep fixed: use --strategy full")
    return args


def main(argv=None):
    args = parse_args(argv)
    with distributed.processes(args.device):
        finetune(args)


if __name__ == "__main__":
    run(main)
