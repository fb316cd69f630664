"""Options that several scripts share: groups of arguments, and checks that name the flag."""

import argparse
import math

from lib.augment import KINDS
from lib.errors import UserError, path_argument
from lib.weights import LARGEST, MOST_PATCHES_A_SIDE
from mae import TRANSFORM_KINDS

NETWORK = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "transform": "log"}
LARGEST_SEED = 2**63 - 1  # of torch
MOST_VALIDATIONS = 50  # unless --validations says otherwise


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option, unless its help does, and the example as it was written."""

    def _get_help_string(self, action):
        said = action.default is None or "default:" in action.help
        return action.help if said else super()._get_help_string(action)


def add_data_arguments(parser):
    """The options with which every script names its data."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=path_argument, required=True, help="data set: folder of class folders, or packed"
    )
    group.add_argument(
        "--cache-dir", type=path_argument, default=None,
        help="where a folder's packed copy is kept (default: .packed inside the folder)",
    )  # fmt: skip


def add_device_argument(group):
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_update_argument(group):
    group.add_argument(
        "--update", action="store_true",
        help="do nothing if --out holds the result of the same options, data, weights and code",
    )  # fmt: skip


def add_model_arguments(parser):
    """The geometry of a network that starts from random weights; defaults are NETWORK's."""
    group = parser.add_argument_group("network")

    def add(name, text, **more):
        default = f"(default: {NETWORK[name.replace('-', '_')]})"
        group.add_argument(f"--{name}", help=f"{text} {default}", **more)

    add("patch-size", "side of a patch in pixels", type=int)
    add("embed-dim", "width of the encoder", type=int)
    add("depth", "blocks of the encoder", type=int)
    add("num-heads", "attention heads of the encoder", type=int)
    add("transform", "intensity scale that the network sees", choices=TRANSFORM_KINDS)


def add_training_arguments(parser):
    """How the training loop runs."""
    group = parser.add_argument_group("training")
    group.add_argument("--out", type=path_argument, required=True, help="folder of the run")
    group.add_argument(
        "--epochs", type=int, default=None,
        help="passes over the training images (default: depends on the script and strategy; more "
        "for a small data set)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=64, help="images per step")
    group.add_argument("--lr", type=float, default=None, help="largest learning rate")
    group.add_argument("--weight-decay", type=float, default=0.05, help="on matrices")
    group.add_argument(
        "--validations", type=int, default=None, metavar="N",
        help=f"validations in all (default: one an epoch, at most {MOST_VALIDATIONS})",
    )  # fmt: skip
    group.add_argument(
        "--augment", type=augmentation_kinds, default="halfturn", metavar="KIND,...",
        help=f"random changes of training images: none, or any of {','.join(KINDS)} (lens, shear "
        "and source are symmetric under half a turn; flips: mirror images and quarter turns)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of weights, order, masks and dropout")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="number format of training; auto: bfloat16 where the machine is fast in it",
    )  # fmt: skip
    add_device_argument(group)
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="resume from the run's checkpoint, if there is one"
    )
    either.add_argument(
        "--overwrite", action="store_true", help="replace a finished or stopped run in --out"
    )
    either.add_argument(
        "--update", action="store_true",
        help="skip a finished run of the same settings and data, resume a stopped one, replace any other",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def add_test_arguments(parser):
    """What is tested on, where the results go, and how they are resampled."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--out", type=path_argument, required=True, help="folder for the results")
    group.add_argument(
        "--split", choices=("test", "all"), default="test",
        help="the test part, or all images of data that training never saw",
    )  # fmt: skip
    group.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    group.add_argument("--seed", type=int, default=0, help="random seed")
    add_device_argument(group)
    add_update_argument(group)


def augmentation_kinds(text):
    """("halfturn", "noise") of "halfturn,noise"; () of "none"."""
    kinds = () if text == "none" else tuple(kind for kind in text.split(",") if kind)
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is not one of {', '.join(KINDS)}")
    return kinds


def check_numbers(args):
    """UserError, naming the flag, for numbers out of range; options that are None are skipped."""

    def check(names, valid, expected):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not valid(value):
                raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {value}")

    counts = ("epochs", "batch_size", "validations", "patch_size", "embed_dim", "num_heads",
              "decoder_embed_dim", "decoder_num_heads", "resamples", "rounds", "per_class",
              "repeats", "files", "auc_per_class")  # fmt: skip
    check(counts, lambda value: value >= 1, "at least 1")
    check(("resamples",), lambda value: value <= 1_000_000, "at most 1,000,000")
    check(("rounds",), lambda value: value <= 100, "at most 100")
    check(("seed",), lambda value: 0 <= value <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}")
    check(("depth", "decoder_depth"), lambda value: value >= 0, "at least 0")
    check(("weight_decay",), lambda value: 0 <= value < math.inf, "at least 0")
    check(("lr", "mlp_ratio"), lambda value: 0 < value < math.inf, "positive")
    check(("mask_ratio",), lambda value: 0 < value < 1, "between 0 and 1")
    check(("layer_decay", "labels"), lambda value: 0 < value <= 1, "in (0, 1]")
    check(("patch_dropout",), lambda value: 0 <= value < 1, "in [0, 1)")
    check(("allowed_fall",), lambda value: 0 <= value <= 1, "from 0 to 1")


def new_network(kind, config):
    """`kind(**config)`, an `MAE` or `Classifier`; UserError, naming the flag, if that is invalid."""
    for name, limit in LARGEST.items():
        if config.get(name, 0) > limit:
            raise UserError(f"--{name.replace('_', '-')} must be at most {limit}, got {config[name]}")
    patch_size, img_size = config["patch_size"], config["img_size"]
    if img_size % patch_size:
        raise UserError(
            f"--patch-size {patch_size} does not divide the image size {img_size}: "
            "choose one that does"
        )
    if img_size // patch_size > MOST_PATCHES_A_SIDE:
        raise UserError(
            f"--patch-size {patch_size} cuts images of {img_size} pixels into more than "
            f"{MOST_PATCHES_A_SIDE}×{MOST_PATCHES_A_SIDE} patches: choose a larger one"
        )
    for name in ("embed_dim", "decoder_embed_dim"):
        if int(config.get(name, 1) * config.get("mlp_ratio", 4.0)) < 1:
            raise UserError(f"--mlp-ratio {config['mlp_ratio']} leaves no width: choose a larger one")
    try:
        return kind(**config)
    except ValueError as error:
        raise UserError(f"these network options do not fit together: {error}") from None
