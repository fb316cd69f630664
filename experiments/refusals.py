"""What a classifier says of images that may be strange to it, and how good it is at refusing them."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from experiments.kinds import HELD_BACK
from lib.guard import Guard
from lib.loader import batch_reader, in_batches


class Answers(NamedTuple):
    """What is said of images (n,): the class, and three measures that are low for strange ones."""

    predicted: np.ndarray
    answered: np.ndarray  # bool: predict.py does not refuse it
    familiarity: np.ndarray
    softmax: np.ndarray  # minus the probability of the other classes, which does not round to 1
    energy: np.ndarray  # minus the energy, of logits without the fitted temperature


def rows_of(networks, kinds, device):
    """Rows of a table, see study.py: every classifier's figures for every kind of images.

    `networks` is {(seed, strategy): (model, familiarity)}, `kinds` yields what `kinds.every` does.
    """
    rows, clean = [], {}
    for kind, images, truth in kinds:
        held_back = kind in HELD_BACK
        name = f"{kind} (held back)" if held_back else kind
        for (seed, strategy), network in networks.items():
            answers = answers_of(*network, images, device)
            row = {"run": f"{strategy}: {name}", "seed": seed, "strategy": strategy}
            row |= {"held_back": held_back, **figures(answers, truth, clean.get((seed, strategy)))}
            rows.append(row)
            clean.setdefault((seed, strategy), answers)  # they come first
    return sorted(rows, key=lambda row: (row["seed"], row["strategy"]))


def answers_of(model, familiarity, images, device):
    """The `Answers` of a classifier and its familiarity to raw images (n, H, W)."""
    read = batch_reader(images, device)
    model, familiarity = (part.eval().to(device) for part in (model, familiarity))

    def both(rows):
        batch = read(rows)
        return torch.cat([model(batch), familiarity(batch).unsqueeze(1)], dim=1)

    together = in_batches(both, np.arange(len(images))).numpy()
    logits, known = together[:, :-1].astype(np.float64), together[:, -1]
    others = np.sort(softmax(logits, axis=1), axis=1)[:, :-1].sum(axis=1)
    energy = logsumexp(logits * model.temperature.item(), axis=1)
    predicted = logits.argmax(axis=1)
    answered = Guard(len(familiarity.strangeness_seen)).answers(predicted, known)
    return Answers(predicted, answered, known, -others, energy)


def figures(answers, truth, clean):
    """Figures of the `Answers` to images of a kind, of right classes `truth` if there are any.

    `clean` are the `Answers` to clean images, None if these are they.
    """
    answered = answers.answered
    row = {"answered %": 100 * float(answered.mean())}
    if truth is not None:
        right = answers.predicted == truth
        if answered.any():
            row["right of answered %"] = 100 * float(right[answered].mean())
        row["accuracy %"] = 100 * float(right.mean())
    if clean:
        is_clean = np.repeat([True, False], [len(clean.predicted), len(answers.predicted)])
        for name in ("familiarity", "softmax", "energy"):
            both = np.concatenate([getattr(clean, name), getattr(answers, name)])
            row[f"AUC {name}"] = float(roc_auc_score(is_clean, both))
    return row
