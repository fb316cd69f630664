"""How a training learns: one frozen value, made from the options, the start and the number of images."""

import argparse
import math
from typing import NamedTuple

from lib import options
from lib.augment import KINDS
from lib.errors import path_argument

MOST_VALIDATIONS = 50  # unless --validations says otherwise


class Recipe(NamedTuple):
    """How a training learns, apart from its network, data and start. `config.json` stores it.

    epochs, batch_size : passes over the training images, and images a step.
    lr, beta2 : largest learning rate, see `optim.learning_rate`, and the second beta of AdamW.
    weight_decay : of matrices.
    augment : random changes of training images, a subset of `augment.KINDS`.
    patch_dropout : fraction of patches that are dropped in the first half of the steps.
    layer_decay : learning rate of a transformer block, as a fraction of that of the next one.
    pool : how the head sees the patch tokens, see `mae.Classifier`; None without a head on tokens.
    validations : number of validations in all.
    keep : "best", the weights of the best validation, or "last".
    seed : of weights, order, masks and dropout.
    precision : number format, see `device.choose_precision`.
    """

    epochs: int
    batch_size: int
    lr: float
    beta2: float
    weight_decay: float
    augment: tuple
    patch_dropout: float
    layer_decay: float
    pool: str | None
    validations: int
    keep: str
    seed: int
    precision: str

    def __str__(self):
        return ", ".join(f"{name.replace('_', ' ')} {_as_text(v)}" for name, v in self._asdict().items())


class Defaults(NamedTuple):
    """What a recipe says where no option does.

    epochs : there are more of them where they make fewer than `fewest_steps` steps.
    few : replaces other defaults for that few images, see `are_few`.
    most_validations : one an epoch, but no more.
    """

    epochs: int
    fewest_steps: int
    batch_size: int
    lr: float
    beta2: float = 0.999
    weight_decay: float = 0.05
    augment: tuple = ("halfturn",)
    patch_dropout: float = 0.0
    layer_decay: float = 1.0
    keep: str = "best"
    most_validations: int = MOST_VALIDATIONS
    few: dict = {}  # noqa: RUF012

    def are_few(self, images):
        """Whether the default epochs of so many training images make fewer than `fewest_steps` steps.

        Options play no part: another --batch-size or --epochs does not change the rest of the recipe.
        """
        return self.epochs * (images // self.batch_size) < self.fewest_steps

    def recipe(self, args, images, pool=None):
        """The `Recipe` of parsed options `args` for a number of training images."""
        defaults = self._replace(**self.few) if self.are_few(images) else self

        def chosen(name):
            given = getattr(args, name, None)
            return getattr(defaults, name) if given is None else given

        steps_per_epoch = max(1, images // chosen("batch_size"))
        epochs = args.epochs or max(self.epochs, math.ceil(self.fewest_steps / steps_per_epoch))
        from_options = ("batch_size", "lr", "weight_decay", "augment", "patch_dropout", "layer_decay")
        return Recipe(
            epochs=epochs, validations=args.validations or min(epochs, defaults.most_validations),
            pool=pool, beta2=defaults.beta2, keep=defaults.keep, seed=args.seed,
            precision=args.precision, **{name: chosen(name) for name in from_options},
        )  # fmt: skip


# Options


def add_arguments(parser, defaults):
    """The options of a training. `defaults`: {what it is for, such as a strategy: `Defaults`}."""

    def add(group, name, help, **more):
        told = {key: _as_text(getattr(each, name)) for key, each in defaults.items()}
        same = len(set(told.values())) == 1
        text = next(iter(told.values())) if same else ", ".join(f"{k} {v}" for k, v in told.items())
        few = "; more for few images" if name == "epochs" else ""
        group.add_argument(options.flag_of(name), default=None, help=f"{help} (default: {text}{few})", **more)

    group = parser.add_argument_group("training")
    group.add_argument("--out", type=path_argument, required=True, help="folder of the run")
    add(group, "epochs", "passes over the training images", type=int)
    add(group, "batch_size", "images per step", type=int)
    add(group, "lr", "largest learning rate", type=float)
    add(group, "weight_decay", "on matrices", type=float)
    add(
        group, "augment", f"random changes of training images: none, or any of {','.join(KINDS)} (lens, "
        "shear and source are symmetric under half a turn; flips: mirror images and quarter turns)",
        type=augmentation_kinds, metavar="KIND,...",
    )  # fmt: skip
    if any(each.patch_dropout for each in defaults.values()):
        add(group, "patch_dropout", "fraction of patches dropped at random in the first half of the "
            "steps, which makes them faster (layernorm, full)", type=float)  # fmt: skip
        add(group, "layer_decay", "learning rate of a block, as a fraction of the next block's (full, pre-trained)",
            type=float)  # fmt: skip
    most = min(each.most_validations for each in defaults.values())
    group.add_argument(
        "--validations", type=int, default=None, metavar="N",
        help=f"validations in all (default: one an epoch, at most {MOST_VALIDATIONS}"
        + (f"; residual {most})" if most < MOST_VALIDATIONS else ")"),
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of weights, order, masks and dropout")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="number format of training; auto: bfloat16 where the machine is fast in it",
    )  # fmt: skip
    options.add_device_argument(group)
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="resume from the run's checkpoint, if there is one"
    )
    either.add_argument("--overwrite", action="store_true", help="replace a finished or stopped run in --out")
    either.add_argument(
        "--update", action="store_true",
        help="skip a finished run of the same settings and data, resume a stopped one, replace any other",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def augmentation_kinds(text):
    """("halfturn", "noise") of "noise,halfturn", in the order of KINDS; () of "none"."""
    given = [] if text == "none" else text.split(",")
    for kind in given:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is not one of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in given)


def _as_text(value):
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
