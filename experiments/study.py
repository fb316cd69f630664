"""Experiments that explain the figures: what pre-training gains, what decides it, where it fails.

An experiment is a list of commands of this project, each with --update, and a table of what they
left, so finished runs are not repeated and a stopped one resumes. The runs lie in --out, the rows,
tables and pictures in --out/results (see results.py). Test figures choose nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import argparse
import itertools
import shlex
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import evaluate
import finetune
import pretrain
import reconstruct
import simulate
from experiments import kinds, results
from lib import class_evaluation, clusters, compatibility, datasets, lenses, options, residuals, weights
from lib.device import choose_precision, resolve_device
from lib.files import make_folder, read_json, write_json
from lib.provenance import circumstances

EXAMPLE = """examples:
  python experiments/study.py --data lenses --out own/study
  python experiments/study.py --data lenses --out own/study --only labels scratch --seeds 0"""

# Epochs from scratch that cost at least as much processor time as pre-training and fine-tuning.
SCRATCH_EPOCHS = 7
LABEL_SHARES = (0.001, 0.003, 0.01, 0.1, 1.0)
UNFAMILIAR_PER_CLASS = 300
MISTAKES_PER_CLASS = 10000
OTHER_MODELS = {  # options of pre-training, and of fine-tuning; noise takes more epochs
    "Model_I": (("--patch-size", 10), ("--epochs", 6)),
    "Model_III": ((), ()),
}
OTHER_PER_CLASS = 30_000  # images
STRENGTH_BINS = 8
CLUSTERED_IMAGES = 20_000  # training images that kinds are found in
RING_WIDTH = 0.3  # arcsec around the Einstein ring
FRESH_SEED = 1000  # of images simulated for testing; training data has other seeds


class Images(NamedTuple):
    """A data set to train or to test on, and which images of it are tested on."""

    folder: Path
    dataset: datasets.Dataset
    split: str = "test"  # or "all" of an unseen data set
    name: str = "test"


class Study(NamedTuple):
    """What all experiments have in common."""

    args: argparse.Namespace
    own: Images
    tests: tuple  # of Images, the own first
    cutouts: np.ndarray | None  # real ones (n, 64, 64), without labels
    precision: str
    device: torch.device


# Commands


def call(script, own, given="", changes=()):
    """Run a script with its options `own`, those that the user has `given` and an experiment's `changes`."""
    own, given, changes = grouped(own), grouped(shlex.split(given)), grouped(changes)
    for flag in own.keys() & given.keys():
        raise UserError(f"{flag} {' '.join(given[flag])}: the study itself sets it; leave it out")
    script.main([word for flag, values in (own | given | changes).items() for word in (flag, *values)])


def grouped(words):
    """{option: its values} of a command's words; UserError for an option given twice, or none at first."""
    options = {}
    for word in map(str, words):
        if word.startswith("--"):
            flag, *value = word.split("=", 1)
            if flag in options:
                raise UserError(f"{flag} is given twice: give it once")
            options[flag] = value
        elif options:
            options[flag].append(word)
        else:
            raise UserError(f"{word} is no option: give options such as --epochs 2")
    return options


def options_of(study, out, seed, images):
    """The options that every training of a study has, and no user may give."""
    images = images or study.own
    cache = ("--cache-dir", study.args.cache_dir) if study.args.cache_dir else ()
    return ("--data", images.folder, *cache, "--out", out, "--update", "--seed", seed,
            "--precision", study.precision, "--device", study.device)  # fmt: skip


def pretrained(study, seed, *changes, name="base", images=None):
    """Weights of a pre-training with the options `changes`, by default on the study's data."""
    out = study.args.out / name / f"seed{seed}" / "pretrain"
    call(pretrain, options_of(study, out, seed, images), study.args.pretraining, changes)
    return out / "vit-mae-wt.pth"


def finetuned(study, seed, strategy, start, *changes, name="base", images=None, labels=1.0):
    """Weights of a fine-tuning that starts from the MAE `start`, or from "none".

    `layernorm` continues from the head's run, which comes first.
    """
    if strategy == "layernorm":
        start = finetuned(study, seed, "head", start, name=name, images=images)
    out = study.args.out / name / f"seed{seed}" / ("scratch" if start == "none" else strategy)
    own = options_of(study, out, seed, images)
    own += ("--pretrained", start, "--strategy", strategy, "--labels", labels)
    call(finetune, own, study.args.finetuning, changes)
    return out / "vit-mae-classifier-wt.pth"


def left_by(script, study, path, images):
    """The metrics.json that evaluate.py or reconstruct.py leaves of the weights `path`."""
    out = path.parent / f"{script.__name__}-{images.name}"
    cache = ("--cache-dir", study.args.cache_dir) if study.args.cache_dir else ()
    call(script, ("--data", images.folder, *cache, "--weights", path, "--out", out, "--split", images.split,
                  "--resamples", 1, "--device", study.device, "--update"))  # fmt: skip
    return read_json(out / "metrics.json")


def measured(study, path, images):
    """AUC of each class, macro AUC and accuracy (%) of a classifier."""
    (result,) = left_by(evaluate, study, path, images)["results"].values()
    row = {f"AUC {name}": auc["value"] for name, auc in result["auc"].items()}
    return row | {"macro AUC": result["macro"]["value"], "accuracy %": 100 * result["accuracy"]["value"]}


def residual_auc(study, path, images):
    """AUC of an MAE's residual, which needs no labels: all substructure, and each kind of it."""
    auc = left_by(reconstruct, study, path, images).get("auc")
    if auc is None:
        raise UserError(f"{path}: trained on all of the classes, or on none: there is nothing to compare")
    return {f"residual AUC {name}": a["value"] for name, a in {"all": auc["all"], **auc["classes"]}.items()}


# Experiments: each gives the rows of its table for a seed, dicts with "run" and "seed".


def tested(study, name, seed, path):
    """Rows of a classifier: on the test split and, if there are any, on unseen images."""
    for images in study.tests:
        yield {"run": f"{name}, {images.name}", "seed": seed, **measured(study, path, images)}


def strategies(study, seed):
    """Every strategy, on the test split and on unseen images."""
    start = pretrained(study, seed)
    for strategy in finetune.STRATEGIES:
        yield from tested(study, strategy, seed, finetuned(study, seed, strategy, start))


def scratch(study, seed):
    """The whole network from the pre-trained encoder and from random weights, all labels.

    "Same compute": as many epochs as cost what pre-training and fine-tuning cost together.
    """
    start, longer = pretrained(study, seed), ("--epochs", SCRATCH_EPOCHS)
    for name, path in (
        ("pre-trained, full", finetuned(study, seed, "full", start)),
        ("from scratch, same epochs", finetuned(study, seed, "full", "none")),
        ("from scratch, same compute", finetuned(study, seed, "full", "none", *longer, name="longer")),
    ):
        yield from tested(study, name, seed, path)


def without_labels(study, seed):
    """Telling substructure from smooth lenses, and all kinds apart, by the residual without labels.

    "clusters": kinds that are found in the residuals of training images, scored by the classes.
    """
    path = pretrained(study, seed)
    for images in study.tests:
        row = residual_auc(study, path, images) | cluster_accuracy(study, path, images)
        yield {"run": images.name, "seed": seed, **row}


def cluster_accuracy(study, path, images):
    """Accuracy (%) of kinds that are found in an MAE's residuals, as many as the study has classes.

    They are found in training images of the study, without labels, with the MAE's seed.
    """
    def powers_of(dataset, rows):
        maps_of, _ = residuals.residual_reader(opened, dataset, study.device, None, rounds=2, seed=0)
        return residuals.scores_and_powers(maps_of, rows)[1]

    opened, own = weights.read(path), study.own.dataset
    content = opened.content
    seed, count = content["run"]["seed"], len(own.class_names)
    rows = compatibility.rows_to_evaluate(images.dataset, content, images.split == "all")
    train = np.random.default_rng(seed).permutation(datasets.split(own)["train"])
    found_kinds = clusters.fit(powers_of(own, np.sort(train[:CLUSTERED_IMAGES])), count, seed)
    found, labels = clusters.assign(found_kinds, powers_of(images.dataset, rows)), images.dataset.labels[rows]
    _, class_of = clusters.match(found, labels, count, count)
    return {"clusters accuracy %": 100 * float((class_of[found] == labels).mean())}


def labels(study, seed):
    """Part of the training labels: how many does pre-training save?

    The MAE has seen images that are known to be smooth; "scratch" has not.
    """
    start = pretrained(study, seed)
    starts = {"residual": start, "full": start, "head": start, "scratch": "none"}
    yield from with_few_labels(study, seed, "base", starts)


def labels_all_classes(study, seed):
    """The same with an MAE that has seen the images of all classes, without their labels."""
    start = pretrained(study, seed, *on_all_classes(study), name="all-classes")
    yield from with_few_labels(study, seed, "all-classes", {"residual": start, "full": start})


def on_all_classes(study):
    """Options of a pre-training on all classes that takes as many steps as the default one."""
    args = pretrain.parse_args(["--data", "x", "--out", "x", *shlex.split(study.args.pretraining)])
    rows = datasets.split(study.own.dataset)["train"]
    images = len(pretrain.rows_to_learn_from(study.own.dataset, rows, args.classes))
    epochs = pretrain.DEFAULTS.recipe(args, images).epochs * images / len(rows)
    return "--classes", "all", "--epochs", max(1, round(epochs))


def with_few_labels(study, seed, folder, starts):
    """Rows of every share of the labels; `starts` is {strategy: MAE to start from}, or "none" for scratch.

    All runs validate on the whole validation part, three times, whatever labels they train on.
    """
    images = len(datasets.split(study.own.dataset)["train"])
    for share, (kind, start) in itertools.product(LABEL_SHARES, starts.items()):
        strategy = "full" if start == "none" else kind
        if share < 1:
            path = finetuned(study, seed, strategy, start, "--validations", 3,
                             name=f"{folder}-labels-{share:g}", labels=share)  # fmt: skip
        else:
            path = finetuned(study, seed, strategy, start, name=folder)
        count = round(share * images)
        yield {"run": f"{kind}, {count} labels", "seed": seed, "kind": kind, "labels": count,
               **measured(study, path, study.own)}  # fmt: skip


def unfamiliar(study, seed):
    """Images unlike the training images: which does a classifier refuse, and which answers are right?

    AUC: telling clean images from those of a kind by familiarity, or by what is known without it,
    the largest probability and the energy (Liu et al. 2020, arXiv:2010.03759). "Held back": a
    kind that was not looked at until the design of the familiarity was fixed.
    """
    start = pretrained(study, seed)
    for strategy in ("full", "residual"):
        path = finetuned(study, seed, strategy, start)
        model, familiarity = known_classifier(path)
        if familiarity is None:
            raise UserError(f"{path} has no familiarity: give more images, or remove {path.parent}")
        tests = kinds.every(UNFAMILIAR_PER_CLASS, FRESH_SEED + 2, study.cutouts)
        for kind, row in kinds.answers_to(tests, model, familiarity, study.device):
            yield {"run": f"{strategy}: {kind}", "seed": seed, "strategy": strategy, **row}


def known_classifier(path):
    """(model, familiarity) of weights for the classes of simulate.py."""
    opened = weights.read(path)
    if tuple(opened.content["class_names"]) != lenses.CLASS_NAMES:
        raise UserError(f"{path}: this experiment needs data with the classes of simulate.py")
    return weights.classifier_of(opened), weights.familiarity_in(opened)


def instruments(study, seed):
    """The other two data models, by the strategy `residual` and without labels."""
    for model, (pretraining, finetuning) in OTHER_MODELS.items():
        folder = study.args.out / f"data-{model}"
        call(simulate, ("--model", model, "--per-class", OTHER_PER_CLASS, "--out", folder, "--update"))
        images = Images(folder, datasets.load(folder))
        start = pretrained(study, seed, *pretraining, name=model, images=images)
        path = finetuned(study, seed, "residual", start, *finetuning, name=model, images=images)
        row = measured(study, path, images) | residual_auc(study, start, images)
        yield {"run": model, "seed": seed, **row}


def mistakes(study, seed):
    """Where `full` goes wrong: accuracy and AUC against the strength of the substructure.

    On images simulated for this. AUC is that of a bin's images against all of the other classes.
    """
    model, _ = known_classifier(finetuned(study, seed, "full", pretrained(study, seed)))
    parts = lenses.simulate("Model_II", MISTAKES_PER_CLASS, FRESH_SEED + 1)
    images = np.concatenate([images for _, images, _ in parts])
    probabilities = class_evaluation.predict_probabilities(model, images, np.arange(len(images)), study.device)
    truth = np.repeat(np.arange(len(lenses.CLASS_NAMES)), MISTAKES_PER_CLASS)
    for class_name, (quantity, values) in substructure_strengths().items():
        k = lenses.CLASS_NAMES.index(class_name)
        edges = np.quantile(values, np.linspace(0, 1, STRENGTH_BINS + 1))
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, STRENGTH_BINS - 1)
        for b in range(STRENGTH_BINS):
            own, others = probabilities[truth == k][bins == b], probabilities[truth != k, k]
            auc = roc_auc_score(np.repeat([True, False], [len(own), len(others)]),
                                np.concatenate([own[:, k], others]))  # fmt: skip
            yield {
                "run": f"{class_name}, {quantity} {edges[b]:.2f} to {edges[b + 1]:.2f}",
                "seed": seed, "kind": f"{class_name}: {quantity}",
                "strength": float(values[bins == b].mean()), "AUC": float(auc),
                "accuracy %": 100 * float((own.argmax(axis=1) == k).mean()),
            }  # fmt: skip


def substructure_strengths():
    """{class: (quantity, its value for each of the images that `mistakes` simulates)}."""
    draws = {name: [parameters for _, parameters in lenses.draw(name, MISTAKES_PER_CLASS, FRESH_SEED + 1)]
             for name in ("axion", "cdm")}  # fmt: skip
    axion_mass = np.concatenate([mass for _, _, mass in draws["axion"]])
    radius, x, y = np.concatenate([masses for _, masses, _ in draws["cdm"]]).transpose(2, 0, 1)
    mass = (radius / lenses.einstein_radius(1.0)) ** 2
    ring = lenses.einstein_radius(lenses.LENS_MASS) * lenses.deflection_factor()
    near = np.abs(np.hypot(x, y) - ring) < RING_WIDTH
    mass_near = (mass * near).sum(axis=1).clip(lenses.CDM_MASS_RANGE[0])  # the least where none is
    return {
        "axion": ("log10 m / eV", np.log10(axion_mass)),
        "cdm": ("log10 subhalo mass near the ring / M☉", np.log10(mass_near)),
    }


EXPERIMENTS = {
    function.__name__: function
    for function in (strategies, scratch, without_labels, labels, labels_all_classes, unfamiliar,
                     instruments, mistakes)
}  # fmt: skip
# What pictures draw against what; the other experiments' have a dot a run.
BY_LABELS = {"x": "labels", "label": "training labels", "logarithmic": True, "y": "accuracy %"}
DRAWN = {
    "labels": BY_LABELS, "labels_all_classes": BY_LABELS,
    "mistakes": {"x": "strength", "label": None, "logarithmic": False, "y": "AUC"},
}  # fmt: skip


# The script


def claim(out, dataset):
    """Make the folder of runs one of its data set: runs on other data would be replaced there."""
    path = out / "data.json"
    if path.exists() and read_json(path).get("fingerprint") != dataset.fingerprint:
        raise UserError(f"{out} holds the runs of another data set: name another --out, or remove it")
    make_folder(out)
    write_json(path, {"fingerprint": dataset.fingerprint})


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    add = parser.add_argument
    add("--out", type=path_argument, required=True, help="folder of the runs and of results/")
    add("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="EXPERIMENT", help="experiments")
    add("--unseen", type=path_argument, default=None,
        help="lenstronomy's images, to test on as well (see tests/reference/make_lenstronomy.py)")  # fmt: skip
    add("--cutouts", type=path_argument, default=None, metavar="FOLDER",
        help="real cutouts, FITS or .npy, for the experiment `unfamiliar`; they are only read")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    add("--pretraining", default="", metavar="OPTIONS", help="more options of every pretrain.py")
    add("--finetuning", default="", metavar="OPTIONS", help="more options of every finetune.py")
    options.add_device_argument(parser)
    args = parser.parse_args(argv)
    if min(args.seeds) < 0:
        raise UserError("--seeds must not be negative")
    for flag, text in (("--pretraining", args.pretraining), ("--finetuning", args.finetuning)):
        try:
            grouped(shlex.split(text))
        except ValueError as error:
            raise UserError(f"{flag} {text}: {error}") from None
    return args


def study_of(args):
    """The `Study` that the options ask for."""
    own = Images(args.data, datasets.load(args.data, args.cache_dir))
    tests = [own]
    if args.unseen:
        tests.append(Images(args.unseen, datasets.load(args.unseen, args.cache_dir), "all", "lenstronomy"))
    cutouts = kinds.read_cutouts(args.cutouts) if args.cutouts else None
    device = resolve_device(args.device)
    return Study(args, own, tuple(tests), cutouts, choose_precision("auto", device).name, device)


def main(argv=None):
    args = parse_args(argv)
    study = study_of(args)
    claim(args.out, study.own.dataset)
    results.check_folder(args.out / "results", args.only)
    command = shlex.join(["python", "experiments/study.py", *map(str, argv or sys.argv[1:])])
    made = [{"command": command, "commit": circumstances()["commit"] or "unknown", "precision": study.precision}]
    for name in args.only:
        what = EXPERIMENTS[name].__doc__.splitlines()[0]
        print(f"== {name}: {what}", flush=True)
        rows = [row for seed in args.seeds for row in EXPERIMENTS[name](study, seed)]
        results.write(args.out / "results", name, what, made, rows, DRAWN.get(name))
        print(results.table(rows), flush=True)


if __name__ == "__main__":
    run_main(main)
