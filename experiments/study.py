"""Experiments that explain the figures: what pre-training gains, what decides it, where it fails.

Every experiment trains with the project's own scripts, one run a folder in --out. Finished runs are
not repeated, and a stopped run resumes. The results are kept in --results (see results.py). Test
figures choose nothing.
"""

import argparse
import functools
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import finetune
import pretrain
import simulate
from experiments import kinds, refusals, results
from lib import augment, clusters, data, lenses, metrics, options, residuals, weights
from lib.device import choose_precision, resolve_device
from lib.errors import UserError, path_argument, run
from lib.files import make_folder, read_json, sha256_of, write_json
from lib.run import FREE_OPTIONS
from mae import POOLINGS

EXAMPLE = """examples:
  python experiments/study.py --data lenses --out own/study
  python experiments/study.py --data lenses --out own/study --only labels mask_ratio --seeds 0"""

STRATEGIES = tuple(finetune.STRATEGIES)
# Epochs from scratch that cost at least as much processor time as pre-training and fine-tuning.
SCRATCH_EPOCHS = 7
# Options of the scripts that a study sets itself.
OWN = ("--data", "--cache-dir", "--seed", "--out", "--resume", "--overwrite", "--device",
       "--precision", "--strategy", "--pretrained", "--labels")  # fmt: skip
LABEL_SHARES = (0.001, 0.003, 0.01, 0.1, 1.0)
ROBUSTNESS_PER_CLASS = 1000
ROBUSTNESS_KINDS = (
    "clean", "Euclid noise", "PSF −20 %", "PSF +20 %", "shifted 1 px", "turned 90°",
    "turned at random",
)  # fmt: skip
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


class Lab(NamedTuple):
    """Where a study reads and writes, and what its runs have in common."""

    data: Path
    dataset: data.Dataset  # what `data` holds
    unseen: data.Dataset | None  # of another simulator, for testing only
    cutouts: np.ndarray | None  # real ones (n, 64, 64), without labels
    out: Path
    seeds: tuple
    label_shares: tuple  # of the training labels, for experiments with few
    pretraining: tuple  # options of every pretrain.py run
    finetuning: tuple  # options of every finetune.py run
    common: tuple  # options of both
    device: torch.device


# Runs


def claim(lab):
    """Make the study's folder one of its data set: runs on other data would be replaced there.

    Raises UserError if it holds the runs of another data set, or of a version that did not say.
    """
    path = lab.out / "data.json"
    is_old = not path.exists() and any(lab.out.glob("*/seed*/*/study.json"))
    if is_old or (path.exists() and read_json(path).get("fingerprint") != lab.dataset.fingerprint):
        of = "an older version" if is_old else f"another data set than {lab.data}"
        raise UserError(f"{lab.out} holds the runs of {of}: name another --out, or remove it")
    make_folder(lab.out)
    write_json(path, {"fingerprint": lab.dataset.fingerprint})


def trained(script, out, arguments, file, fingerprint, source=""):
    """Weights file of a run of `script`; an identical run that is finished is not repeated.

    `fingerprint` identifies the data, `source` the weights that the run starts from. A run of other
    options, defaults, data or source is replaced.
    """
    argv = [*map(str, arguments), "--out", str(out), "--resume"]
    given = vars(script.parse_args(argv))
    given = {k: str(v) for k, v in given.items() if k not in FREE_OPTIONS}
    constants = ("DEFAULTS", "FROM_SCRATCH", "CONTINUING", "DEFAULT_POOL", "SCORES",
                 "RESIDUAL_VALIDATIONS", "EPOCHS", "FEWEST_STEPS")  # fmt: skip
    defaults = [getattr(script, name, None) for name in constants]
    identity = json.dumps([given, defaults, fingerprint, source])
    identity = hashlib.sha256(identity.encode()).hexdigest()
    marker = out / "study.json"
    if marker.exists() and read_json(marker).get("identity") != identity:
        shutil.rmtree(out)
    make_folder(out)
    write_json(marker, {"identity": identity})
    if not (out / file).exists():
        script.main(argv)
    return out / file


def pretrained(lab, name, seed, *options, images=None):
    """Weights of a pre-training; `images` is a data set in place of the study's."""
    arguments = [*lab.pretraining, "--data", images or lab.data, "--seed", seed, *lab.common]
    return trained(
        pretrain, lab.out / name / f"seed{seed}" / "pretrain", [*arguments, *options],
        "vit-mae-wt.pth", fingerprint_of(lab, images),
    )  # fmt: skip


def fingerprint_of(lab, images):
    """Identity of the study's data set, or of the one that stands in its place."""
    return (data.load(images) if images else lab.dataset).fingerprint


def finetuned(lab, name, seed, strategy, start, *options, images=None):
    """Weights of a fine-tuning that starts from the MAE `start`, or from "none".

    `layernorm` continues from the head's run, which comes first.
    """
    if strategy == "layernorm":
        start = finetuned(lab, name, seed, "head", start, images=images)
    finetuning = lab.finetuning if start == "none" else without_network(lab.finetuning)
    arguments = [*finetuning, "--data", images or lab.data, "--seed", seed, *lab.common]
    source = "" if start == "none" else sha256_of(start)
    folder = strategy if start != "none" else "scratch"
    return trained(
        finetune, lab.out / name / f"seed{seed}" / folder,
        [*arguments, "--pretrained", start, "--strategy", strategy, *options],
        "vit-mae-classifier-wt.pth", fingerprint_of(lab, images), source,
    )  # fmt: skip


def without_network(arguments):
    """Options without those of the network, which weights decide; all of them take a value."""
    flags = {f"--{name.replace('_', '-')}" for name in options.NETWORK}
    words, kept = iter(arguments), []
    for word in words:
        if word in flags:
            next(words, None)
        elif word.split("=")[0] not in flags:
            kept.append(word)
    return kept


def cached_result(measure):
    """Keep the dict that `measure(lab, path, dataset, whole)` returns beside the weights `path`.

    A later call of the same code for the same weights reads it from there. `whole` measures on all
    images of the data set instead of its test split.
    """

    @functools.wraps(measure)
    def cached(lab, path, dataset, whole=False):
        if not dataset.fingerprint:  # simulated for one use
            return measure(lab, path, dataset, whole)
        part = "all" if whole else "test"
        made_by = f"{code_digest()}-{sha256_of(path)[:8]}"
        name = f"{measure.__name__}-{part}-{dataset.fingerprint}-{made_by}.json"
        file = path.parent / name
        if not file.exists():
            write_json(file, measure(lab, path, dataset, whole))
        return read_json(file)

    return cached


@functools.cache
def code_digest():
    """Eight hex digits of the code that figures depend on: other code may measure others."""
    root = Path(__file__).resolve().parents[1]
    files = [root / "mae.py", root / "evaluate.py", Path(__file__), *sorted((root / "lib").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


@cached_result
def measured(lab, path, dataset, whole):
    """AUC of each class, macro AUC and accuracy (%) of a classifier."""
    model, content = weights.load_classifier(path)
    rows = data.rows_to_evaluate(dataset, content, whole)
    labels = data.class_order(content["class_names"], dataset, path)[dataset.labels[rows]]
    probabilities = evaluate.predict_probabilities(model, dataset.images, rows, lab.device)
    *aucs, macro, accuracy = metrics.measures(probabilities, labels).tolist()
    by_class = {f"AUC {name}": auc for name, auc in zip(content["class_names"], aucs, strict=True)}
    return {**by_class, "macro AUC": macro, "accuracy %": 100 * accuracy}


def residuals_on(lab, path, dataset):
    """(content of an MAE's weights file, function from rows of `dataset` to `MAE.residual`)."""
    content, residuals_of, _ = residuals.residual_reader(
        path, dataset, lab.device, mask_ratio=None, rounds=2, seed=0
    )
    return content, residuals_of


@cached_result
def residual_auc(lab, path, dataset, whole):
    """AUC of an MAE's residual, which needs no labels: all substructure, and each kind of it."""
    content, residuals_of = residuals_on(lab, path, dataset)
    rows = data.rows_to_evaluate(dataset, content, whole)
    labels = dataset.labels[rows]
    _, has_substructure = residuals.unlike_training(content, labels, dataset.class_names)
    if has_substructure.all() or not has_substructure.any():
        classes = ", ".join(content["run"]["classes"])
        raise UserError(f"{path} was trained on {classes}: no other classes to compare")
    scores = residuals.scores_of(residuals_of, rows)
    every, by_class = residuals.auc_by_kind(scores, has_substructure, labels, dataset.class_names)
    columns = {f"residual AUC {name}": float(auc) for name, auc in by_class.items()}
    return {"residual AUC all": float(every), **columns}


@cached_result
def cluster_accuracy(lab, path, dataset, whole):
    """Accuracy (%) of kinds that are found in an MAE's residuals, as many as the study has classes.

    They are found in training images of the study, without labels, with the MAE's seed.
    """
    content, residuals_of = residuals_on(lab, path, dataset)
    _, residuals_of_own = residuals_on(lab, path, lab.dataset)
    rows, seed = data.rows_to_evaluate(dataset, content, whole), content["run"]["seed"]
    train = np.random.default_rng(seed).permutation(data.split(lab.dataset)["train"])
    chosen = np.sort(train[:CLUSTERED_IMAGES])
    _, powers = residuals.scores_and_powers(residuals_of_own, chosen)
    found_kinds = clusters.fit(powers, len(lab.dataset.class_names), seed)
    _, powers = residuals.scores_and_powers(residuals_of, rows)
    found, labels = clusters.assign(found_kinds, powers), dataset.labels[rows]
    _, class_of = clusters.match(found, labels, found_kinds.count, len(dataset.class_names))
    return {"clusters accuracy %": 100 * float((class_of[found] == labels).mean())}


def chain(lab, name, seed, strategies=STRATEGIES, pretraining=(), finetuning=()):
    """Pre-train and fine-tune by each strategy; one dict of what came out.

    `finetuning` are options of the strategies that train the encoder.
    """
    start = pretrained(lab, name, seed, *pretraining)
    _, _, content = weights.load_mae(start)
    row = {"reconstruction error": content["run"]["last"]["validation_loss"]}
    for strategy in strategies:
        options = () if strategy in ("head", "residual") else finetuning
        path = finetuned(lab, name, seed, strategy, start, *options)
        row |= summary(lab, strategy, path)
    return row


def summary(lab, strategy, path):
    """The columns of a strategy in tables that compare several."""
    result = measured(lab, path, lab.dataset)
    return {f"{strategy} {figure}": result[figure] for figure in ("macro AUC", "accuracy %")}


def usual_pretraining(lab):
    """(epochs, share of the training images) of the study's default pre-training."""
    args = pretrain.parse_args(["--data", "unused", "--out", "unused", *lab.pretraining])
    rows = data.split(lab.dataset)["train"]
    images = len(pretrain.rows_to_learn_from(lab.dataset, rows, args.classes))
    return pretrain.epochs_for(args, images), images / len(rows)


def on_all_classes(lab):
    """Options of a pre-training on all classes that takes as many steps as the default one."""
    epochs, share = usual_pretraining(lab)
    return ["--classes", "all", "--epochs", max(1, round(epochs * share))]


# Experiments: each takes the lab and gives the rows of its table, dicts with "run" and "seed".


def strategies(lab):
    """Every strategy, on the test split and on unseen images."""
    rows = []
    for seed in lab.seeds:
        start = pretrained(lab, "base", seed)
        for strategy in STRATEGIES:
            path = finetuned(lab, "base", seed, strategy, start)
            rows += results_of(lab, strategy, seed, path)
    return rows


def scratch(lab):
    """The whole network from the pre-trained encoder and from random weights, all labels.

    "Same compute": as many epochs as cost what pre-training and fine-tuning cost together.
    """
    rows = []
    for seed in lab.seeds:
        start = pretrained(lab, "base", seed)
        longer = ("--epochs", SCRATCH_EPOCHS)
        for name, path in {
            "pre-trained, full": finetuned(lab, "base", seed, "full", start),
            "from scratch, same epochs": finetuned(lab, "base", seed, "full", "none"),
            "from scratch, same compute": finetuned(lab, "longer", seed, "full", "none", *longer),
        }.items():
            rows += results_of(lab, name, seed, path)
    return rows


def results_of(lab, name, seed, path):
    """Rows of a classifier: on the test split and, if there are any, on unseen images."""
    return [
        {"run": f"{name}, {where}", "seed": seed,
         **measured(lab, path, images, whole=where != "test")}
        for where, images in test_sets(lab).items()
    ]  # fmt: skip


def test_sets(lab):
    return {"test": lab.dataset} | ({"lenstronomy": lab.unseen} if lab.unseen else {})


def without_labels(lab):
    """Telling substructure from smooth lenses, and all kinds apart, by the residual without labels.

    "clusters": kinds that are found in the residuals of training images, scored by the classes.
    """
    rows = []
    for seed in lab.seeds:
        path = pretrained(lab, "base", seed)
        for where, images in test_sets(lab).items():
            whole = where != "test"
            rows.append({"run": where, "seed": seed,
                         **residual_auc(lab, path, images, whole),
                         **cluster_accuracy(lab, path, images, whole)})  # fmt: skip
    return rows


def labels(lab):
    """Part of the training labels: how many does pre-training save?

    The MAE has seen images that are known to be smooth; "scratch" has not.
    """
    rows = []
    for seed in lab.seeds:
        start = pretrained(lab, "base", seed)
        rows += with_few_labels(lab, seed, "base", {
            "residual": ("residual", start), "full": ("full", start), "head": ("head", start),
            "scratch": ("full", "none"),
        })  # fmt: skip
    return rows


def labels_all_classes(lab):
    """The same with an MAE that has seen the images of all classes, without their labels."""
    rows = []
    for seed in lab.seeds:
        start = pretrained(lab, "all-classes", seed, *on_all_classes(lab))
        ways = {"residual": ("residual", start), "full": ("full", start)}
        rows += with_few_labels(lab, seed, "all-classes", ways)
    return rows


def with_few_labels(lab, seed, folder, ways):
    """Rows of every share of the labels; `ways` is {name: (strategy, MAE to start from)}.

    All runs validate on the whole validation part, three times, whatever labels they train on.
    """
    rows, images = [], len(data.split(lab.dataset)["train"])
    for share in lab.label_shares:
        options = ["--labels", share, "--validations", 3] if share < 1 else []
        name = f"{folder}-labels-{share:g}" if share < 1 else folder
        for kind, (strategy, start) in ways.items():
            result = measured(lab, finetuned(lab, name, seed, strategy, start, *options), lab.dataset)
            count = round(share * images)
            rows.append({"run": f"{kind}, {count} labels", "seed": seed, "kind": kind,
                         "labels": count, **result})  # fmt: skip
    return rows


def mask_ratio(lab):
    """Share of patches that pre-training hides."""
    return [
        {"run": f"{100 * ratio:.0f} % hidden", "seed": seed, "mask_ratio": ratio,
         **chain(lab, "base" if ratio == 0.75 else f"mask-{ratio:g}", seed,
                 pretraining=["--mask-ratio", ratio])}
        for seed in lab.seeds
        for ratio in (0.5, 0.75, 0.9)
    ]  # fmt: skip


def pretraining_images(lab):
    """Pre-training on smooth lenses against all classes without labels, for as many steps."""
    rows = []
    for seed in lab.seeds:
        rows.append({"run": "no_sub", "seed": seed, **chain(lab, "base", seed)})
        row = chain(lab, "all-classes", seed, pretraining=on_all_classes(lab))
        rows.append({"run": "all classes", "seed": seed, **row})
    return rows


def choices(lab):
    """Pooling, patch size, intensity scale and normalised targets, one seed each."""
    seed, rows = lab.seeds[0], []

    def add(run, *arguments, **options):
        row = chain(lab, *arguments, strategies=("head", "full"), **options)
        rows.append({"run": run, "seed": seed, **row})

    add("defaults", "base", seed)
    start = pretrained(lab, "base", seed)
    for pool in POOLINGS:
        if pool != finetune.DEFAULT_POOL:
            row = {"run": f"pooling {pool}", "seed": seed}
            for strategy in ("head", "full"):
                path = finetuned(lab, f"pool-{pool}", seed, strategy, start, "--pool", pool)
                row |= summary(lab, strategy, path)
            rows.append(row)
    for kind in ("linear", "sqrt", "asinh"):
        add(f"transform {kind}", f"transform-{kind}", seed, pretraining=["--transform", kind])
    add("norm_pix_loss", "norm-pix", seed, pretraining=["--norm-pix-loss"])
    # Four times the patches cost about four and a half times as much a step.
    epochs = max(1, round(usual_pretraining(lab)[0] / 4.5))
    add(
        "patch size 4, same compute", "patch-4", seed,
        pretraining=["--patch-size", 4, "--epochs", epochs],
        finetuning=["--labels", 0.45, "--epochs", 1],
    )  # fmt: skip
    return rows


def real_images(lab):
    """Trained on clean images and with augmentation, tested on what a telescope would see."""
    tests = {k: kinds.make(k, ROBUSTNESS_PER_CLASS, FRESH_SEED)[0] for k in ROBUSTNESS_KINDS}
    everything = ",".join(augment.KINDS)
    rows, seed = [], lab.seeds[0]
    for name, folder, changes in (
        ("clean images", "base", ""),
        ("--augment halfturn,noise", "augment-noise", "halfturn,noise"),
        (f"--augment {everything}", "augment-all", everything),
    ):
        options = ["--augment", changes] if changes else []
        start = pretrained(lab, folder, seed, *options)
        path = finetuned(lab, folder, seed, "full", start, *options)
        row = {"run": f"trained with {name}", "seed": seed}
        for test, images in tests.items():
            result = measured(lab, path, as_dataset(images, ROBUSTNESS_PER_CLASS), whole=True)
            row |= {f"{test}: AUC": result["macro AUC"], f"{test}: %": result["accuracy %"]}
        rows.append(row)
    return rows


def unfamiliar(lab):
    """Images unlike the training images: which does a classifier refuse, and which of the others does it get right?

    AUC: telling clean images from those of a kind by familiarity, or by what is known without it,
    the largest probability and the energy (Liu et al. 2020, arXiv:2010.03759). "Held back": a
    kind that was not looked at until the design of the familiarity was fixed.
    """
    networks = {}
    for seed in lab.seeds:
        start = pretrained(lab, "base", seed)
        for strategy in ("full", "residual"):
            path = finetuned(lab, "base", seed, strategy, start)
            model, familiarity = known_classifier(path, "unfamiliar")
            if familiarity is None:
                raise UserError(f"{path} has no familiarity: give more images, or remove {path.parent}")
            networks[seed, strategy] = model, familiarity
    images = kinds.every(UNFAMILIAR_PER_CLASS, FRESH_SEED + 2, lab.cutouts)
    return refusals.rows_of(networks, images, lab.device)


def known_classifier(path, experiment):
    """(model, familiarity) of weights for the classes of simulate.py."""
    model, content = weights.load_classifier(path)
    if tuple(content["class_names"]) != lenses.CLASS_NAMES:
        raise UserError(f"{experiment}: the study's data must have the classes of simulate.py")
    return model, weights.familiarity_in(path, content)


def as_dataset(images, per_class):
    """A `data.Dataset` of freshly simulated images, sorted by class."""
    labels = np.repeat(np.arange(len(lenses.CLASS_NAMES)), per_class)
    hashes = np.zeros(len(images), np.uint64)  # never split
    return data.Dataset(images, labels, hashes, lenses.CLASS_NAMES, "", "freshly simulated")


def instruments(lab):
    """The other two data models, by the strategy `residual` and without labels."""
    rows = []
    for model, (pretraining, finetuning) in OTHER_MODELS.items():
        images = lab.out / f"data-{model}"
        if not images.exists():
            size = ("--per-class", str(OTHER_PER_CLASS))
            simulate.main(["--model", model, *size, "--out", str(images)])
        dataset = data.load(images)
        for seed in lab.seeds:
            start = pretrained(lab, model, seed, *pretraining, images=images)
            path = finetuned(lab, model, seed, "residual", start, *finetuning, images=images)
            row = measured(lab, path, dataset) | residual_auc(lab, start, dataset)
            rows.append({"run": model, "seed": seed, **row})
    return rows


def mistakes(lab):
    """Where `full` goes wrong: accuracy and AUC against the strength of the substructure.

    On images simulated for this. AUC is that of a bin's images against all of the other classes.
    """
    parts = lenses.simulate("Model_II", MISTAKES_PER_CLASS, FRESH_SEED + 1)
    images = np.concatenate([images for _, images, _ in parts])
    truth = as_dataset(images, MISTAKES_PER_CLASS).labels
    strengths, rows = substructure_strengths(), []
    for seed in lab.seeds:
        path = finetuned(lab, "base", seed, "full", pretrained(lab, "base", seed))
        model, _ = known_classifier(path, "mistakes")
        probabilities = evaluate.predict_probabilities(
            model, images, np.arange(len(images)), lab.device
        )
        for class_name, (quantity, values) in strengths.items():
            k = lenses.CLASS_NAMES.index(class_name)
            correct = probabilities[truth == k].argmax(axis=1) == k
            edges = np.quantile(values, np.linspace(0, 1, STRENGTH_BINS + 1))
            bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, STRENGTH_BINS - 1)
            for b in range(STRENGTH_BINS):
                own, others = probabilities[truth == k, k][bins == b], probabilities[truth != k, k]
                auc = roc_auc_score(
                    np.repeat([True, False], [len(own), len(others)]),
                    np.concatenate([own, others]),
                )
                rows.append({
                    "run": f"{class_name}, {quantity} {edges[b]:.2f} to {edges[b + 1]:.2f}",
                    "seed": seed, "kind": f"{class_name}: {quantity}",
                    "strength": float(values[bins == b].mean()), "AUC": float(auc),
                    "accuracy %": 100 * float(correct[bins == b].mean()),
                })  # fmt: skip
    return rows


def substructure_strengths():
    """{class: (quantity, its value for each of the images that `mistakes` simulates)}."""
    draws = {
        name: [parameters for _, parameters in
               lenses.draw(name, MISTAKES_PER_CLASS, FRESH_SEED + 1)]
        for name in ("axion", "cdm")
    }  # fmt: skip
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
    for function in (
        strategies, scratch, without_labels, labels, labels_all_classes, mask_ratio, pretraining_images, choices,
        real_images, unfamiliar, instruments, mistakes,
    )
}  # fmt: skip
# What pictures draw against what; the other experiments' have a dot a run.
DRAWN = {
    "labels": {"x": "labels", "label": "training labels", "logarithmic": True, "y": "accuracy %"},
    "labels_all_classes": {"x": "labels", "label": "training labels", "logarithmic": True,
                           "y": "accuracy %"},
    "mistakes": {"x": "strength", "label": None, "logarithmic": False, "y": "AUC"},
}


def words_of(flag, text):
    """The options in the value of a flag; UserError for an open quote or an option of OWN."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None
    for word in words:
        if word.split("=")[0] in OWN:
            raise UserError(f"{flag} {text}: the study itself sets {word.split('=')[0]}; leave it out")
    return words


def command_of(args, name, precision):
    """The command that repeats one experiment of this study."""
    words = ["python", "experiments/study.py", "--data", args.data, "--out", args.out]
    results_folder = args.results if args.results != args.out / "results" else None
    for flag, value in (("--cache-dir", args.cache_dir), ("--results", results_folder),
                        ("--unseen", args.unseen), ("--cutouts", args.cutouts),
                        ("--pretraining", args.pretraining), ("--finetuning", args.finetuning),
                        ("--precision", precision)):  # fmt: skip
        words += [f"{flag}={value}"] if value else []
    if tuple(args.label_shares) != LABEL_SHARES:
        words += ["--label-shares", *args.label_shares]
    return shlex.join(map(str, [*words, "--only", name, "--seeds", *args.seeds]))


def commit():
    """The commit of this checkout, or "unknown"."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
            capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return process.stdout.strip() or "unknown"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=options.HelpFormatter
    )
    options.add_data_arguments(parser)
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the runs")
    parser.add_argument(
        "--results", type=path_argument, help="folder of rows, tables and pictures (default: <out>/results)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments"
    )
    parser.add_argument(
        "--unseen", type=path_argument, default=None,
        help="lenstronomy's images, to test on as well (see tests/reference/make_lenstronomy.py)",
    )  # fmt: skip
    parser.add_argument(
        "--cutouts", type=path_argument, default=None, metavar="FOLDER",
        help="real cutouts, FITS or .npy, for the experiment `unfamiliar`; they are only read",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument(
        "--label-shares", type=float, nargs="+", default=list(LABEL_SHARES), metavar="SHARE",
        help="of the training labels, for the experiments with few of them",
    )  # fmt: skip
    parser.add_argument(
        "--pretraining", default="", metavar="OPTIONS", help="more options of every pretrain.py"
    )
    parser.add_argument(
        "--finetuning", default="", metavar="OPTIONS", help="more options of every finetune.py"
    )
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of every run; auto: bfloat16 where the machine is fast in it",
    )  # fmt: skip
    options.add_device_argument(parser)
    args = parser.parse_args(argv)
    args.results = args.results or args.out / "results"
    if min(args.seeds) < 0:
        raise UserError("--seeds must not be negative")
    if not all(0 < share <= 1 for share in args.label_shares):
        raise UserError("--label-shares must be in (0, 1]")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = resolve_device(args.device)
    precision = choose_precision(args.precision, device).name
    cache = ["--cache-dir", str(args.cache_dir)] if args.cache_dir else []
    lab = Lab(
        args.data, data.load(args.data, args.cache_dir),
        data.load(args.unseen, args.cache_dir) if args.unseen else None,
        kinds.read_cutouts(args.cutouts) if args.cutouts else None, args.out, tuple(args.seeds),
        tuple(args.label_shares),
        words_of("--pretraining", args.pretraining), words_of("--finetuning", args.finetuning),
        ("--precision", precision, "--device", args.device, *cache), device,
    )  # fmt: skip
    claim(lab)
    for name in args.only:
        what = EXPERIMENTS[name].__doc__.splitlines()[0]
        print(f"== {name}: {what}", flush=True)
        rows = EXPERIMENTS[name](lab)
        made = {"command": command_of(args, name, precision), "commit": commit(), "precision": precision}
        results.write(args.results, name, what, [made], rows, DRAWN.get(name))
        print(results.table(rows), flush=True)


if __name__ == "__main__":
    run(main)
