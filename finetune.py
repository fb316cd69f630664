"""Fine-tune a classifier on all classes: head, LayerNorms, whole network, or residual maps.

The strategies `head`, `layernorm` and `full` put a head on the pre-trained encoder. `residual`
keeps the whole MAE as it is and trains a small network on what it does not explain of an image.
With --task mass that network estimates the mass of the axion and an interval; it learns from the
images whose files hold the mass. With --task sharpen the MAE of coarse images (pretrain.py
--coarse) learns to make them sharp.

Leaves in --out: vit-mae-classifier-wt.pth (weights of the best validation macro AUC; for
`residual` the last ones), vit-mae-mass-wt.pth or vit-mae-sharpen-wt.pth, config.json,
metrics.jsonl and curves.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import numpy as np
import torch

from lib import datasets, distributed, familiarity, network, options, plots, recipe, traits, weights
from lib.device import resolve_device
from lib.guard import LEAST_FAMILIARITY
from lib.loader import are_on_device, batch_reader, in_batches, larger_than_memory
from lib.loop import Objective, check_batch, fit, precision_of
from lib.run import open_run
from lib.strategies import (
    DEFAULT_POOL, STRATEGIES, TASK_STRATEGIES, freeze_others, reestimate_batchnorm, strategy_of,
)  # fmt: skip
from lib.tasks import TASKS
from mae import POOLINGS, default_map_pool, most_tokens, set_attention_form

EXAMPLE = """examples:
  python finetune.py --data lenses --strategy residual --out runs/residual \\
      --pretrained runs/pretrain/vit-mae-wt.pth
  python finetune.py --data lenses --strategy full --out runs/full \\
      --pretrained runs/pretrain/vit-mae-wt.pth
  python finetune.py --data lenses --strategy full --out runs/scratch --pretrained none
  python finetune.py --data lenses --task mass --strategy residual --out runs/mass \\
      --pretrained runs/pretrain/vit-mae-wt.pth"""


def finetune(args):
    start = open_start(args)
    with distributed.main_process_first():
        dataset = datasets.load(args.data, args.cache_dir)
    parts = datasets.split(dataset)
    task = TASKS[args.task](dataset, parts["train"])
    parts = {part: rows[task.known[rows]] for part, rows in parts.items()}
    if not len(parts["validation"]):
        raise UserError(f"{args.data}: no validation image has what --task {args.task} learns: give more such images")
    rows = parts["train"]
    if args.labels < 1:
        rows = datasets.fraction_of_each_class(dataset.labels, rows, args.labels, args.seed)
    strategy = strategy_of(args)
    chosen = strategy.recipe(args, start, len(rows))
    # A --map-pool that names the default makes the same run.
    about = {**network.options_of(args, task.inputs.img_size, start), **task.about,
             "map_pool": None if args.map_pool == default_map_pool(task.inputs.img_size) else args.map_pool,
             "pretrained_sha256": start.sha256 if start else "none"}  # fmt: skip
    with open_run(args, task.inputs, task.file, chosen, **about) as run:
        if run.is_finished:
            return
        train(task, strategy, start, rows, parts, run)


def open_start(args):
    """The opened `Weights` that training starts from; None for random weights."""
    if args.pretrained == "none":
        return None
    start = weights.read(args.pretrained, args.num_heads, foreign=True)
    if args.pretrained.resolve().parent == args.out.resolve():
        raise UserError(f"--out {args.out} holds the weights to start from: choose another")
    return start


def train(task, strategy, start, rows, parts, run):
    """Train on the labelled `rows` of the training part; save the weights."""
    args, chosen, dataset = run.args, run.recipe, task.inputs
    check_batch(chosen, rows)
    device, validation = resolve_device(args.device), parts["validation"]
    fitted = weights.familiarity_for(start, dataset, chosen.augment) if start and strategy.classifies else None
    torch.manual_seed(chosen.seed)
    model, config = strategy.build(args, start, chosen, task, rows)
    few = " (few)" if strategy.defaults_from(start).are_few(len(rows)) else ""
    # Now that the options are known to fit together.
    distributed.say(f"{args.strategy}, {len(rows):,} training images{few}: {chosen}")
    model.to(device)
    precision = precision_of(run, device, most_tokens(model))
    set_attention_form(model, precision.attention)
    with precision.autocast(device):  # what is computed once and stored
        learner, training_outputs, outputs_of = strategy.learner(
            model, dataset, np.concatenate([rows, validation]), run, device
        )
    read_targets = batch_reader(task.targets, device)
    learner = learner._replace(
        on_device=learner.on_device and are_on_device(read_targets),
        in_blocks=learner.in_blocks or larger_than_memory(task.targets),
    )
    run.write_config(model=config)  # removes what it replaces, now that nothing is in the way
    freeze_others(model, learner.learning)

    def batch_loss(batch, progress):
        return task.training_measures(training_outputs(batch, progress).float(), read_targets(batch).squeeze(1))

    def validation_outputs():
        reestimate_batchnorm(learner.model, outputs_of, rows)
        return in_batches(outputs_of, validation)

    def validate():
        with precision.autocast(device):
            outputs = validation_outputs()
        return task.validation_measures(outputs, torch.from_numpy(task.targets[validation]))

    score = task.score if chosen.keep == "best" else None
    objective = Objective(batch_loss, validate, score, is_trained=start is not None and start.is_classifier)
    state, history, kept = fit(learner, objective, rows, run, device, precision)
    learner.model.load_state_dict(state)
    outputs = validation_outputs()  # in float32, apart from what is stored
    if strategy.classifies and not fitted:
        fitted = new_familiarity(dataset, parts, config, run)
    if fitted:
        fitted[0].class_seen.copy_(outputs.argmax(dim=1))
        say_small_classes(fitted[0].class_seen, dataset.class_names)
    if not distributed.is_main():
        return
    for name, value in task.calibrated(outputs.numpy(), task.targets[validation]).items():
        model.get_buffer(name).copy_(torch.as_tensor(value))
    seen = dataset.hashes[np.concatenate([parts["train"], validation])]
    if start:
        seen = np.concatenate([seen, start.content["seen"]])
    run.save_weights(
        model.state_dict(), config, seen, fitted, number_format=precision.name,
        pixel_range=traits.pixel_range(datasets.extremes_of(dataset, rows)), best=kept,
    )  # fmt: skip
    plots.attempt(plots.curves, args.out / "curves.png", history, task.curves)


def new_familiarity(dataset, parts, config, run):
    """The `Familiarity` of the training's images and its arguments, or None: too few images.

    The fit needs no labels, so it may see all images of the training part.
    """
    fitted = familiarity.fit(
        dataset, parts["train"], parts["validation"], config["transform"], run.recipe.augment, run.quiet
    )
    if fitted is None:
        distributed.say(
            f"a familiarity needs {familiarity.FEWEST_IMAGES} validation images, and there are "
            f"{len(parts['validation'])}: the classifier cannot refuse images unlike its training images"
        )
    return fitted


def say_small_classes(predicted, class_names):
    """One line if too few validation images (n,) are `predicted` as a class for a share of 1 %."""
    counts = zip(class_names, predicted.bincount(minlength=len(class_names)).tolist(), strict=True)
    few = [f"{name} ({count})" for name, count in counts if count < familiarity.FEWEST_IMAGES]
    if few:
        distributed.say(
            f"fewer than {familiarity.FEWEST_IMAGES} validation images are predicted as {', '.join(few)}: of "
            f"n such images up to 1/(1 + n) may be refused as unfamiliar, not {LEAST_FAMILIARITY:.0%}"
        )


def start_argument(text):
    """"none", or a path."""
    return text if text == "none" else path_argument(text)


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    parser.add_argument(
        "--pretrained", type=start_argument, required=True, metavar="PTH|none",
        help="weights of pretrain.py; or a classifier to continue from, its head included; or an "
        "MAE of facebookresearch/mae or Hugging Face, except for residual (give --num-heads where its "
        "file does not tell); none: random weights",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", choices=STRATEGIES, required=True,
        help="what is trained: the head, every LayerNorm, the whole network, or a network on residual "
        "maps. The defaults below are those of a start from an MAE; random weights, a classifier and "
        "few images have others, which the run prints",
    )  # fmt: skip
    parser.add_argument(
        "--task", choices=TASKS, default="classes",
        help="what is learned: the class of an image, (--strategy residual) the mass of its axion, or (--strategy "
        "full) to sharpen an image; mass computes in float32 unless --precision says otherwise",
    )  # fmt: skip
    recipe.add_arguments(parser, {name: s.defaults for name, s in (STRATEGIES | TASK_STRATEGIES).items()})
    group = parser.add_argument_group("classifier")
    group.add_argument(
        "--pool", choices=POOLINGS, default=None,
        help="how the patch tokens are summarised for the head (default: "
        f"{DEFAULT_POOL}; residual has none)",
    )  # fmt: skip
    group.add_argument(
        "--map-pool", type=int, default=None, metavar="N",
        help="residual: average maps over squares of N pixels a side, which makes steps faster (default: 1; more for "
        "images of 128 pixels or more; a classifier that is continued keeps its own)",
    )  # fmt: skip
    group.add_argument(
        "--with-image", action="store_true",
        help="residual: see the image beside its map, for data with another lens in every image (a classifier that "
        "is continued keeps what it sees)",
    )  # fmt: skip
    group.add_argument(
        "--labels", type=float, default=1.0, help="fraction of the training labels to use"
    )
    network.add_arguments(parser)
    args = options.parsed(parser, argv)
    strategy_of(args).check(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    with distributed.process_group(args.device):
        finetune(args)


if __name__ == "__main__":
    run_main(main)
