"""What a network is trained for: targets, loss, validation and calibration."""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib import datasets, masses, metrics, pairs
from lib.errors import UserError, warn
from lib.loader import some_of

UNIT_PAIRS = 200  # training pairs that the unit of the loss comes from
CLASS_CURVES = {"loss": "cross-entropy", "accuracy": "accuracy", "macro_auc": "macro one-vs-rest AUC"}
MASS_CURVES = {"loss": "negative log-likelihood", "error": "mean error of log10 mass, dex"}
# The loss of training is in units of what interpolation leaves, that of validation is not.
SHARP_CURVES = {"train_loss": "loss / that of interpolation", "psnr": "PSNR, dB"}


class Task(NamedTuple):
    """What the outputs of a network mean for the rows of one data set.

    file : name of the weights file that a training leaves.
    config : arguments of the network's constructor that are the task's.
    targets : (N, ...) array, what is right for every row.
    known : (N,) bool, the rows that have a target.
    training_measures : (outputs (b, width), targets (b, ...)) -> {"loss": scalar tensor, ...}.
    validation_measures : (outputs (n, width), targets (n, ...)) -> {"loss": number, ...}.
    score : the validation measure whose largest value is the best; None where the last weights are kept.
    calibrated : (outputs, targets) of the validation images -> {name of a buffer: its value}.
    curves : what of a training is drawn, see `plots.curves`.
    inputs : the `Dataset` whose images the network sees; its rows are those of the targets.
    about : what else decides the weights, beside images and options.
    """

    file: str
    config: dict
    targets: np.ndarray
    known: np.ndarray
    training_measures: callable
    validation_measures: callable
    score: str | None
    calibrated: callable
    curves: dict
    inputs: datasets.Dataset
    about: dict = {}  # noqa: RUF012


def classification(dataset, rows):
    """Which class an image is of: logits, cross-entropy, macro AUC and a temperature."""
    if len(dataset.class_names) < 2:
        raise UserError(f"{dataset.origin} has one class only: a classifier needs at least two")
    return Task(
        file="vit-mae-classifier-wt.pth",
        config={"num_classes": len(dataset.class_names)},
        targets=dataset.labels,
        known=np.ones(len(dataset.labels), bool),
        training_measures=cross_entropy_and_accuracy,
        validation_measures=classification_measures,
        score="macro_auc",
        calibrated=lambda logits, labels: {"temperature": metrics.fit_temperature(logits, labels)},
        curves=CLASS_CURVES,
        inputs=dataset,
    )


def mass(dataset, rows):
    """log10 of the axion's mass, and its spread: Laplace's distribution, and intervals that hold 90 %.

    `rows` are those of the training part. Raises UserError if too few files of the data hold a mass.
    """
    if dataset.masses is None:
        raise UserError(f"{dataset.origin}: no file holds the mass of an axion: --task mass needs object arrays "
                        "[image, mass in eV], as the benchmark's axion files are")  # fmt: skip
    targets = np.log10(dataset.masses)
    known = targets[rows][np.isfinite(targets[rows])]
    if len(known) < 2:
        raise UserError(f"{dataset.origin}: {len(known)} training images have a mass: --task mass needs more")
    edges = masses.half_decades(known)
    with_mass = np.unique(dataset.labels[np.isfinite(targets)])
    classes = [dataset.class_names[label] for label in with_mass]
    return Task(
        file="vit-mae-mass-wt.pth",
        config={"centre": float(np.mean(known)), "edges": edges},
        targets=targets.astype(np.float32),
        known=np.isfinite(targets),
        training_measures=laplace,
        validation_measures=lambda *outputs: {name: value.item() for name, value in laplace(*outputs).items()},
        score=None,
        calibrated=lambda outputs, log_masses: {"widths": masses.fit_widths(outputs, log_masses, edges)},
        curves=MASS_CURVES,
        inputs=dataset,
        about={"masses_sha256": hashlib.sha256(dataset.masses).hexdigest(), "mass_classes": classes},
    )


def sharpening(dataset, rows):
    """The sharp images of pairs, from the coarse ones.

    Outputs (b, H·H + 1) are the pixels and an estimate of their rms error, see `strategies.Sharpen`. The loss
    is the mean squared error in units of what interpolation leaves, and in validation as it is.
    """
    inputs = pairs.coarse_of(dataset)
    config = {"factor": pairs.factor_of(dataset, inputs), "adds_noise": pairs.are_reductions(dataset, inputs, rows)}
    if not config["adds_noise"]:
        warn(f"{dataset.origin}: coarse images are not the bicubic reductions of sharp ones, so the noise "
             "that they show is not put back")  # fmt: skip
    some = some_of(rows, UNIT_PAIRS, dataset.images)
    sharp, coarse = (torch.from_numpy(each.images[some]).unsqueeze(1) for each in (dataset, inputs))
    left = mean_square(pairs.interpolated(coarse, config["factor"], "bilinear"), sharp).sqrt().item()
    unit = left or 1.0  # of blank images

    def training_measures(outputs, sharp):
        return {"loss": mean_square(outputs[:, :-1], sharp) / unit**2}

    return Task(
        file="vit-mae-sharpen-wt.pth",
        config={**config, "unit": unit},
        targets=dataset.images,
        known=np.ones(len(dataset.labels), bool),
        training_measures=training_measures,
        validation_measures=sharpening_measures,
        score="psnr",
        calibrated=lambda outputs, sharp: {"error_scale": error_scale(outputs, sharp)},
        curves=SHARP_CURVES,
        inputs=inputs,
        about={"coarse_sha256": hashlib.sha256(inputs.images).hexdigest()},
    )


def mean_square(images, others):
    """Mean squared difference of tensors of equally many pixels."""
    return (images.flatten(1) - others.flatten(1)).square().mean()


def sharpening_measures(outputs, sharp):
    """Mean squared error of outputs (n, H·H + 1) from sharp images (n, H, H), and its PSNR at a range of one."""
    loss = mean_square(outputs[:, :-1], sharp).item()
    return {"loss": loss, "psnr": -10 * math.log10(max(loss, 1e-30)) if math.isfinite(loss) else loss}


def error_scale(outputs, sharp):
    """What the last of outputs (n, H·H + 1) must be multiplied by to be the rms error, in the mean square."""
    errors = np.square(outputs[:, :-1] - sharp.reshape(len(sharp), -1)).mean(axis=1, dtype=np.float64)
    return float(np.sqrt(errors.mean() / max(np.square(outputs[:, -1], dtype=np.float64).mean(), 1e-30)))


TASKS = {"classes": classification, "mass": mass, "sharpen": sharpening}


def laplace(outputs, target):
    """Loss of Laplace's distribution, of outputs (b, 2), and the mean error in dex from targets (b,)."""
    estimate, log_spread = outputs.unbind(1)
    error = (estimate - target).abs()
    return {"loss": (log_spread + error * torch.exp(-log_spread)).mean(), "error": error.detach().mean()}


def cross_entropy_and_accuracy(logits, target):
    """Loss and accuracy of a training step, from logits (b, K) and classes (b,)."""
    correct = (logits.detach().argmax(dim=1) == target).float().mean()
    return {"loss": F.cross_entropy(logits, target), "accuracy": correct}


def classification_measures(logits, target):
    """Loss, accuracy and macro AUC of logits (n, K); the loss alone if it is not finite."""
    loss = F.cross_entropy(logits, target).item()
    if not math.isfinite(loss):
        return {"loss": loss}  # ends the run; it has no AUC
    probabilities = logits.softmax(dim=1).numpy()
    aucs = metrics.auc_by_class(probabilities, target.numpy())
    correct = metrics.accuracy(probabilities, target.numpy())
    return {"loss": loss, "accuracy": correct, "macro_auc": float(np.mean(aucs))}
