"""Whether weights and a data set fit each other; each check is a UserError that says why not."""

import numpy as np

from lib import datasets
from lib.errors import UserError, warn


def rows_to_evaluate(dataset, content, whole):
    """The rows on which weights may be scored: the test part, or with `whole` all rows; copies once.

    `content` is that of the weights file. Raises UserError if the weights were trained under
    another split, if any of the rows was among their training or validation images, or if the data
    is in another unit.
    """
    if len(content["seen"]) or not whole:  # a foreign MAE has seen none of these images
        check_split(content["run"])
    rows = np.arange(len(dataset.labels)) if whole else datasets.split(dataset)["test"]
    seen = dataset.originals[np.isin(dataset.hashes, content["seen"])]
    overlap = int(np.isin(dataset.originals[rows], seen).sum())
    if overlap:
        split, remedy = "test", "a class or its split has changed since then: train again on this data"
        if whole:
            split, remedy = "all", "use --split test or other images"
        raise UserError(
            f"--split {split}: the weights were trained on {overlap} of these {len(rows)} images; {remedy}"
        )
    check_unit(dataset, rows, content["run"])
    different = datasets.without_copies(dataset, rows)
    if len(different) < len(rows):
        warn(f"{len(rows) - len(different)} of {len(rows)} images are copies of others and left out")
    return different


def check_unit(dataset, rows, run):
    """UserError if most of some rows have pixels far outside the training images of weights."""
    low, high, faintest = run.get("pixel_range") or (-np.inf, np.inf, -np.inf)
    names = run.get("classes")  # that an MAE was trained on
    if names is not None and not datasets.means_every_class(names, run.get("class_names", ())):
        rows = rows[np.isin(np.array(dataset.class_names)[dataset.labels[rows]], names)]
    if not len(rows):
        return
    lowest, highest = datasets.extremes_of(dataset, rows).T
    outside = (lowest < low) | (highest > high) | (highest < faintest)
    if outside.mean() > 0.5:
        raise UserError(f"{outside.mean():.0%} of the images have pixels far outside those that the weights "
                        f"were trained on ({low:.3g} to {high:.3g}): are they in another unit?")  # fmt: skip


def check_split(run):
    """UserError unless the training that a weights file describes (`run`) used this split."""
    if run.get("split") != datasets.SPLIT:
        raise UserError("the weights were trained under another split of the data, so what they have seen is "
                        "unknown: train again")  # fmt: skip


def check_size(path, network, dataset, remedy=""):
    """UserError, naming the weights, if the data's images have another size than the network's."""
    if network.img_size != dataset.img_size:
        raise UserError(
            f"{path} is for images of {network.img_size} pixels, the data has {dataset.img_size}{remedy}"
        )


def class_order(class_names, dataset, path):
    """Place of each of the data's classes among a model's `class_names`, (classes,) int.

    Raises UserError, naming the weights at `path`, if their classes are not those of the data.
    """
    for name in dataset.class_names:
        if name not in class_names:
            raise UserError(
                f"{path} knows the classes {', '.join(class_names)}, not {name}: give data of its classes"
            )
    for name in class_names:
        if name not in dataset.class_names:
            raise UserError(f"the data has no class folder {name}, which {path} was trained on")
    return np.array([class_names.index(name) for name in dataset.class_names])
