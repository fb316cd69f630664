"""Options that several scripts share, and checks that name the flag; the standard library alone."""

import argparse
import math
import sys

from lib.errors import UserError, path_argument

LARGEST_SEED = 2**63 - 1  # of torch
# Options by what their number must be; those of a script that has none of them are skipped.
LIMITS = (
    (("epochs", "batch_size", "validations", "patch_size", "embed_dim", "num_heads",
      "decoder_embed_dim", "decoder_num_heads", "resamples", "rounds", "per_class", "repeats",
      "sheet_images", "find", "map_pool"), lambda value: value >= 1, "at least 1"),
    (("resamples",), lambda value: value <= 1_000_000, "at most 1,000,000"),
    (("rounds",), lambda value: value <= 100, "at most 100"),
    (("seed",), lambda value: 0 <= value <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}"),
    (("depth", "decoder_depth", "val_per_class"), lambda value: value >= 0, "at least 0"),
    (("weight_decay",), lambda value: 0 <= value < math.inf, "at least 0"),
    (("lr", "mlp_ratio", "exposure"), lambda value: 0 < value < math.inf, "positive"),
    (("mask_ratio",), lambda value: 0 < value < 1, "between 0 and 1"),
    (("layer_decay", "labels"), lambda value: 0 < value <= 1, "in (0, 1]"),
    (("patch_dropout", "least_familiarity"), lambda value: 0 <= value < 1, "in [0, 1)"),
    (("allowed_fall",), lambda value: 0 <= value <= 1, "from 0 to 1"),
    (("zero_point",), lambda value: 0 < value < 100, "a magnitude"),
)  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option, unless its help does, and the example as it was written."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class StoreOnce(argparse.Action):
    """Stores an option's values as argparse does, and refuses a second time: argparse would drop the first."""

    given = False

    def __call__(self, parser, namespace, values, option_string=None):
        if self.given and option_string:
            raise UserError(f"{option_string} is given twice: give it once, with all that it should have")
        self.given = True
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose options are given once, and written out: a short form would be a second name."""

    def __init__(self, **more):
        super().__init__(**{"allow_abbrev": False, **more})
        for action in (None, "store"):
            self.register("action", action, StoreOnce)


def new_parser(description, example):
    """A script's parser; it reads one command line."""
    return Parser(description=description, epilog=example, formatter_class=HelpFormatter)


def add_data_arguments(parser):
    """The options with which every script names its data."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=path_argument, required=True,
        help="data set: folder of class folders or with a table labels.csv, or packed",
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


def flag_of(name):
    """The flag of an option: "--batch-size" of "batch_size"."""
    return f"--{name.replace('_', '-')}"


def refuse_unused(argv, names, reason):
    """UserError if one of the options `names` is given, even with its default: it would do nothing."""
    given = {word.split("=")[0] for word in map(str, sys.argv[1:] if argv is None else argv)}
    for flag in map(flag_of, names):
        if flag in given:
            raise UserError(f"{flag}: {reason}; leave it out")


def parsed(parser, argv):
    """The options of a command line; UserError, naming the flag, for a number that is out of range."""
    args = parser.parse_args(argv)
    for names, is_valid, expected in LIMITS:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not is_valid(value):
                raise UserError(f"{flag_of(name)} must be {expected}, got {value}")
    return args
