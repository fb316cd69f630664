"""What a network is trained for: targets, loss, validation figures and calibration."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib import metrics


class Task(NamedTuple):
    """What the outputs of a network mean for the rows of one data set.

    width : number of outputs for an image.
    targets : (N, ...) tensor, what is right for every row.
    training_figures : (outputs (b, width), targets (b, ...)) -> {"loss": scalar tensor, ...}.
    validation_figures : (outputs (n, width), targets (n, ...)) -> {"loss": number, ...}.
    score : the validation figure whose largest value is the best.
    calibrated : (outputs, targets) of the validation images -> {name of a buffer: its value}.
    """

    width: int
    targets: torch.Tensor
    training_figures: callable
    validation_figures: callable
    score: str
    calibrated: callable


def classification(dataset):
    """Which class an image is of: logits, cross-entropy, macro AUC and a temperature."""
    targets = torch.from_numpy(np.array(dataset.labels))
    return Task(
        len(dataset.class_names), targets, cross_entropy_and_accuracy, classification_figures,
        "macro_auc", lambda logits, labels: {"temperature": metrics.fit_temperature(logits, labels)},
    )  # fmt: skip


def cross_entropy_and_accuracy(logits, target):
    """Loss and accuracy of a training step, from logits (b, K) and classes (b,)."""
    correct = (logits.detach().argmax(dim=1) == target).float().mean()
    return {"loss": F.cross_entropy(logits, target), "accuracy": correct}


def classification_figures(logits, target):
    """Loss, accuracy and macro AUC of logits (n, K); the loss alone if it is not finite."""
    loss = F.cross_entropy(logits, target).item()
    if not math.isfinite(loss):
        return {"loss": loss}  # ends the run; it has no AUC
    probabilities = logits.softmax(dim=1).numpy()
    aucs = metrics.auc_by_class(probabilities, target.numpy())
    correct = metrics.accuracy(probabilities, target.numpy())
    return {"loss": loss, "accuracy": correct, "macro_auc": float(np.mean(aucs))}
