"""Fine-tune a classifier on all classes: head, LayerNorms, whole network, or residual maps.

The strategies `head`, `layernorm` and `full` put a head on the pre-trained encoder. `residual`
keeps the whole MAE as it is and trains a small network on what it does not explain of an image.

Leaves in --out: vit-mae-classifier-wt.pth (weights of the best validation macro AUC; for `residual`
the last ones), config.json, metrics.jsonl and curves.png (loss, accuracy and AUC).
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lib import data, distributed, familiarity, metrics, optim, options, plots, weights
from lib.augment import SYMMETRIES
from lib.device import resolve_device
from lib.errors import UserError, run
from lib.loader import fit_transform, in_batches, larger_than_memory
from lib.loop import fit, precision_of
from lib.residuals import mask_ratio_of
from lib.run import open_run
from lib.strategies import STRATEGIES, freeze_others, reestimate_batchnorm
from mae import (
    MAE,
    POOLINGS,
    Classifier,
    ResidualClassifier,
    set_attention_form,
    usual_squares,
)

EXAMPLE = """examples:
  python finetune.py --data lenses --strategy residual --out runs/residual \\
      --pretrained runs/pretrain/vit-mae-wt.pth
  python finetune.py --data lenses --strategy full --out runs/full \\
      --pretrained runs/pretrain/vit-mae-wt.pth
  python finetune.py --data lenses --strategy full --out runs/scratch --pretrained none"""

# Defaults of each strategy, chosen on validation. Where the epochs make fewer than `fewest_steps`,
# there are more of them, and `few` replaces other defaults.
DEFAULTS = {
    "head": {"lr": 8e-3, "batch_size": 1024, "epochs": 100, "fewest_steps": 1000,
             "augment": (), "patch_dropout": 0.0},
    "layernorm": {"lr": 1e-2, "batch_size": 64, "epochs": 2, "fewest_steps": 1000,
                  "augment": (), "patch_dropout": 0.5},
    "full": {"lr": 3e-3, "batch_size": 128, "epochs": 4, "fewest_steps": 1000,
             "augment": (), "patch_dropout": 0.5, "layer_decay": 0.75,
             "few": {"augment": ("flips",), "patch_dropout": 0.0, "layer_decay": 1.0}},
    "residual": {"lr": 3e-3, "batch_size": 64, "epochs": 2, "fewest_steps": 1000,
                 "augment": ("halfturn",), "patch_dropout": 0.0},
}  # fmt: skip
# What differs for random weights: with all patches they overfit few images.
FROM_SCRATCH = {"full": {"few": {"augment": ("flips",)}}}
# What differs when continuing from a classifier: its head is already trained, so use small steps.
CONTINUING = {
    "head": {"lr": 8e-4, "epochs": 20, "fewest_steps": 300},
    "layernorm": {"lr": 3e-4, "batch_size": 128, "epochs": 1, "fewest_steps": 300,
                  "patch_dropout": 0.0},
    "full": {"lr": 2e-4, "epochs": 1, "fewest_steps": 300, "few": {}, "patch_dropout": 0.0},
    "residual": {"lr": 3e-4, "epochs": 1, "fewest_steps": 300},
}
# Validation figure that decides which weights are kept; None: the last ones are. The AUC of
# `residual` soon reaches 1 and says no more.
SCORES = {"head": "macro_auc", "layernorm": "macro_auc", "full": "macro_auc", "residual": None}
RESIDUAL_VALIDATIONS = 4  # its epochs may be many and short
DEFAULT_POOL = "stats"
TAKEN_NAMES = {"file", "prediction", "familiarity", "residual", "unfamiliar"}  # in predictions
OTHER_SIZE = ": pre-train on images of this size"


def finetune(args):
    with distributed.main_process_first():
        dataset = data.load(args.data, args.cache_dir)
    if len(dataset.class_names) < 2:
        raise UserError(f"{args.data} has one class only: a classifier needs at least two")
    for name in TAKEN_NAMES & set(dataset.class_names):
        raise UserError(f"class folder {name}: predict.py uses this name otherwise; rename the folder")
    parts = data.split(dataset)
    rows = parts["train"]
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
            train(args, dataset, rows, parts, source, run)


def train(args, dataset, rows, parts, source, run):
    """Train on the labelled `rows` of the training part, and save the weights."""
    device, validation = resolve_device(args.device), parts["validation"]
    torch.manual_seed(args.seed)
    model, config = build_classifier(args, source, dataset, rows)
    model.to(device)
    run.write_config(model=config)
    labels = torch.from_numpy(np.array(dataset.labels)).to(device)
    precision = precision_of(run, device)
    set_attention_form(model, precision.attention)
    with precision.autocast(device):  # what is computed once and stored
        way = STRATEGIES[args.strategy](
            model, dataset, np.concatenate([rows, validation]), args, run, device
        )
    freeze_others(model, way.learning)

    def batch_loss(batch, progress):
        logits, target = way.training_logits(batch, progress).float(), labels[batch]
        correct = (logits.detach().argmax(dim=1) == target).float().mean()
        return {"loss": F.cross_entropy(logits, target), "accuracy": correct}

    def validate():
        with precision.autocast(device):
            logits = validation_logits()
        return validation_figures(logits, labels[validation].cpu())

    def validation_logits():
        reestimate_batchnorm(way.trained, way.logits, rows)
        return in_batches(way.logits, validation)

    groups = optim.parameter_groups(way.learning, args.weight_decay, layer_decay(args, model))
    state, history = fit(
        way.trained, groups, batch_loss, validate, rows, run, device, precision,
        score=SCORES[args.strategy],
        in_blocks=args.strategy != "head" and larger_than_memory(dataset.images),
        on_device=way.on_device, changes_at=way.changes_at,
    )  # fmt: skip
    way.trained.load_state_dict(state)
    logits = validation_logits()  # in float32, apart from what is stored
    known = weights.familiarity_for(source, dataset, args.augment) if source else None
    if known is None:
        # It needs no labels, so it may see all images of the training part.
        known = familiarity.fit(
            dataset, parts["train"], validation, config["transform"], args.augment, args.quiet
        )
    if not distributed.is_main():
        return
    if known is None:
        print(
            f"a familiarity needs {familiarity.FEWEST_IMAGES} validation images, and there are "
            f"{len(validation)}: the classifier cannot refuse images unlike its training images"
        )
    model.temperature.fill_(metrics.fit_temperature(logits.numpy(), dataset.labels[validation]))
    seen = dataset.hashes[np.concatenate([parts["train"], validation])]
    best = history[-1]
    if SCORES[args.strategy]:
        best = max(reversed(history), key=lambda line: line["validation_macro_auc"])
    run.save_weights(
        model.state_dict(), config, np.concatenate([seen, source.content["seen"]]) if source else seen, known,
        number_format=precision.name,
        pixel_range=data.pixel_range(data.extremes_of(dataset, rows)),
        best=best,
    )  # fmt: skip
    plots.attempt(plots.classifier_curves, args.out / "curves.png", history)


def fill_in_defaults(args, source, images):
    """Set the options that were not given, by strategy, --pretrained and the number of images."""
    defaults = strategy_defaults(args.strategy, source)
    batch_size = args.batch_size or defaults["batch_size"]
    epochs = optim.enough_epochs(defaults["epochs"], defaults["fewest_steps"], images, batch_size)
    if epochs > defaults["epochs"]:
        defaults |= {"epochs": epochs, **defaults.get("few", {})}
    for name in ("lr", "batch_size", "epochs", "augment", "patch_dropout"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    if args.batch_size == 1:
        raise UserError("--batch-size must be at least 2: BatchNorm needs several images a step")
    if args.strategy == "residual":
        args.validations = args.validations or min(args.epochs, RESIDUAL_VALIDATIONS)
    check_strategy(args)
    if args.strategy != "residual" and args.pool is None:
        kept = source.content["config"].get("pool") if source else None  # of a classifier
        args.pool = kept or DEFAULT_POOL
    decays = args.strategy == "full" and source is not None
    if args.layer_decay not in (None, 1) and not decays:
        raise UserError("--layer-decay needs --strategy full and pre-trained weights")
    args.layer_decay = (args.layer_decay or defaults["layer_decay"]) if decays else 1.0
    fill_in_network(args, source)


def check_strategy(args):
    """UserError, naming the flag, for options that the strategy has no use for."""
    if args.patch_dropout and args.strategy not in ("layernorm", "full"):
        raise UserError("--patch-dropout: all patches are needed; use --strategy layernorm or full")
    if args.strategy == "head" and args.augment:
        raise UserError("--augment: the head learns from stored features; use another --strategy")
    if args.strategy == "residual":
        if set(args.augment) - set(SYMMETRIES):
            raise UserError(
                f"--augment: residual maps are computed once, so only {', '.join(SYMMETRIES)} or "
                "none is possible; use --strategy full"
            )
        if args.pool:
            raise UserError("--pool: there are no patch tokens; leave it out or use another --strategy")


def fill_in_network(args, source):
    """Set the options of the network to those of `source`, or to the defaults without one.

    Raises UserError if an option that was given says something else than the weights.
    """
    network = dict(options.NETWORK)
    if source is not None:
        config = source.content["config"]
        kind = config.get("transform", {}).get("kind", args.transform or network["transform"])
        network |= {**config.get("mae", config), "transform": kind}
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
    if source is None:
        return DEFAULTS[strategy] | FROM_SCRATCH.get(strategy, {})
    return DEFAULTS[strategy] | (CONTINUING[strategy] if source.is_classifier else {})


def build_classifier(args, source, dataset, train_rows):
    """The network that training starts from, and the arguments of its constructor.

    `source` is None for random weights; an opened MAE, of which the encoder is taken (`residual`:
    all of it); or an opened classifier, which is taken whole, head included. UserError where data,
    weights and strategy do not fit.
    """
    def new_transform():
        return fit_transform(dataset.images, train_rows, args.transform, args.augment)

    classes = {"num_classes": len(dataset.class_names)}
    if args.strategy != "residual":
        classes["pool"] = args.pool
    if source is None:
        sizes = {n: getattr(args, n) for n in ("patch_size", "embed_dim", "depth", "num_heads")}
        config = {"img_size": dataset.img_size, **sizes, **classes, "transform": new_transform()}
        return options.new_network(Classifier, config), config
    content = source.content
    data.check_unit(dataset, train_rows, content["run"])
    if source.is_classifier:
        return continued_classifier(args, source, dataset), content["config"]
    pretrained, transform = weights.encoder_of(source)
    data.check_size(source.path, pretrained, dataset, OTHER_SIZE)
    if transform is None:  # a checkpoint from elsewhere
        transform = new_transform()
    else:
        data.check_split(content["run"])
        transform = content["config"]["transform"]
    if args.strategy == "residual":
        return residual_classifier(source, pretrained, {**classes, "transform": transform})
    sizes = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
    config = {name: content["config"][name] for name in sizes if name in content["config"]}
    config |= {**classes, "transform": transform}
    model = Classifier(**config)
    encoder = {k: v for k, v in pretrained.state_dict().items() if k in model.state_dict()}
    model.load_state_dict({**model.state_dict(), **encoder})
    return model, config


def continued_classifier(args, source, dataset):
    """The classifier of an opened weights file, to be trained further; see `build_classifier`."""
    content = source.content
    model = weights.classifier_of(source)
    data.check_split(content["run"])
    data.check_size(source.path, model, dataset, OTHER_SIZE)
    if isinstance(model, ResidualClassifier) != (args.strategy == "residual"):
        other = "residual" if isinstance(model, ResidualClassifier) else "head, layernorm or full"
        raise UserError(f"{source.path} is a classifier of --strategy {other}: continue with that")
    if content["class_names"] != list(dataset.class_names):
        raise UserError(
            f"{source.path} tells {', '.join(content['class_names'])} apart; start from an MAE for "
            "other classes"
        )
    if args.strategy != "residual" and model.pool != args.pool:
        raise UserError(
            f"{source.path} has --pool {model.pool}; start from an MAE for another --pool"
        )
    model.temperature.fill_(1.0)
    return model


def residual_classifier(source, mae, more):
    """The `ResidualClassifier` around an `MAE`, and its arguments; `more` of them are given."""
    if not isinstance(mae, MAE):
        raise UserError(
            f"{source.path} is from elsewhere: --strategy residual needs the decoder of an MAE of "
            "pretrain.py; use another strategy"
        )
    sizes = {k: v for k, v in source.content["config"].items() if k != "transform"}
    averaged = usual_squares(mae.img_size)
    config = {"mae": sizes, "mask_ratio": mask_ratio_of(source.content), "averaged": averaged, **more}
    try:
        model = ResidualClassifier(**config)
    except ValueError as error:
        raise UserError(f"--strategy residual: {error}; use another strategy") from None
    model.mae.load_state_dict(mae.state_dict())
    return model, config


def layer_decay(args, model):
    """Function from a parameter's name to the factor of its learning rate.

    The rate of a block is --layer-decay times that of the next one.
    """
    if args.layer_decay == 1:
        return lambda name: 1.0
    depth = len(model.blocks)
    return lambda name: args.layer_decay ** (depth + 1 - layer_of(name, depth))


def layer_of(name, depth):
    """How deep a parameter lies: 0 the embedding, 1..depth the blocks, depth + 1 the head."""
    if name.startswith(("patch_embed", "cls_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


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
        "MAE of facebookresearch/mae or Hugging Face, except for residual (give --num-heads where its "
        "file does not tell); none: random weights",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", choices=STRATEGIES, required=True,
        help="what is trained: the head, every LayerNorm, the whole network, or a network on residual "
        "maps; sets the defaults of --lr, --batch-size, --epochs, --augment, --patch-dropout and --layer-decay",
    )  # fmt: skip
    options.add_training_arguments(parser)
    parser.set_defaults(batch_size=None, augment=None)
    group = parser.add_argument_group("classifier")
    group.add_argument(
        "--pool", choices=POOLINGS, default=None,
        help="how the patch tokens are summarised for the head (default: "
        f"{DEFAULT_POOL}; residual has none)",
    )  # fmt: skip
    group.add_argument(
        "--layer-decay", type=float, default=None,
        help="learning rate of a block over that of the next one (full, pre-trained)",
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
    if args.strategy == "residual":
        raise UserError("--strategy residual needs the weights of pretrain.py, not --pretrained none")
    if args.strategy != "full":
        raise UserError("--pretrained none leaves nothing to freeze: use --strategy full")
    return args


def main(argv=None):
    args = parse_args(argv)
    with distributed.process_group(args.device):
        finetune(args)


if __name__ == "__main__":
    run(main)
