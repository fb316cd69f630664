"""What a masked autoencoder that knows smooth lenses cannot explain: residual maps and scores."""

import math

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from lib import compatibility, datasets, distributed, metrics, packing, weights
from lib.clusters import octave_powers
from lib.errors import UserError
from lib.files import atomic_write
from lib.loader import batch_reader, in_batches
from lib.metrics import auc_of_counts, bootstrap
from lib.npy import read_npy
from lib.traits import LEAST_RMS, typical_rms
from mae import complementary_masks, residual_scores

SMOOTH_IMAGES = 500
MAPS_TOGETHER = 2048  # that are kept in memory while they are computed


def mask_ratio_of(content):
    """The mask ratio that an MAE was trained with, from the content of its weights file."""
    return content["run"].get("mask_ratio", 0.75)


def residual_reader(opened, dataset, device, mask_ratio, rounds, seed):
    """Apply the MAE of opened `Weights` to rows of `dataset`; None for the mask ratio of its training.

    Returns (function from rows to `MAE.residual`, function from rows to the images (b, 1, H, W) that
    the network sees). Raises UserError as `weights.mae_of` does, and for images of another size.
    """
    mae, transform = weights.mae_of(opened)
    compatibility.check_size(opened.path, mae, dataset)
    mae.to(device)
    transform.to(device)
    read = batch_reader(dataset.images, device, once=True)
    ratio = mask_ratio_of(opened.content) if mask_ratio is None else mask_ratio
    masks = complementary_masks(mae.num_patches, ratio, rounds, seed)

    def transformed(batch):
        return transform(read(batch))

    return lambda batch: mae.residual(transformed(batch), masks), transformed


def scores_of(residuals, rows):
    """The score of each image, (n,); see `mae.residual_scores`."""
    return in_batches(lambda batch: residual_scores(residuals(batch)), rows, bar="residuals").numpy()


def scores_and_powers(residuals, rows, bar="residuals"):
    """(scores (n,) as of `scores_of`, powers (n, octaves) of the maps, see `octave_powers`).

    The maps are not kept. `bar` is the text of a live bar on a terminal.
    """

    def of_batch(batch):
        maps = residuals(batch)
        powers = torch.from_numpy(octave_powers(maps[:, 0].cpu().numpy()))
        return torch.cat([residual_scores(maps).unsqueeze(1).cpu(), powers], dim=1)

    table = in_batches(of_batch, rows, bar=bar).numpy()
    return table[:, 0], table[:, 1:]


@torch.no_grad()
def smooth_rms(mae, images_of, rows, mask_ratio):
    """Rms of the residuals that an MAE leaves of SMOOTH_IMAGES of the images that it was trained for.

    `images_of` gives images (b, 1, H, W), as the network sees them, of rows (b,).
    """
    masks = complementary_masks(mae.num_patches, mask_ratio, rounds=2)
    rows = rows[:: max(1, len(rows) // SMOOTH_IMAGES)]
    squares = in_batches(
        lambda batch: mae.residual(images_of(batch), masks).square().mean(dim=(1, 2, 3)), rows
    )
    return max(float(squares.double().mean().sqrt()), LEAST_RMS)


def smooth_rms_of(content, maps):
    """The `smooth_rms` in the content of a weights file; without it the `typical_rms` of `maps` (n, H, W)."""
    return float(content["run"].get("smooth_rms") or typical_rms(maps))


def stored_maps(maps_of, rows, path, shape, quiet=False):
    """Maps of `rows` as one array (n, channels · side, side) float16, mapped from the file `path`.

    The file is made unless it is there. `maps_of` gives maps (b, *shape), (channels, side, side), of rows (b,);
    several processes share the work, the main one writes.
    """
    channels, side, _ = shape
    stored = (len(rows), channels * side, side)
    if not distributed.from_main(lambda: _is_complete(path, stored)):
        if distributed.is_main():
            packing.require_space(path.parent, 2 * math.prod(stored))
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                _write_maps(file, maps_of, rows, stored, quiet)
        else:
            _write_maps(None, maps_of, rows, stored, quiet=True)
        distributed.wait()
    return np.load(path, mmap_mode="r")


def _is_complete(path, shape):
    """Whether the file at `path` holds an array of maps of that shape."""
    try:
        return read_npy(path).shape == shape
    except UserError:
        return False


def _write_maps(file, maps_of, rows, shape, quiet):
    """Write an array of maps of that `shape` into an open file; without a file only compute this process's part."""
    if file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    largest = float(np.finfo(np.float16).max)
    with tqdm(total=len(rows), desc="residual maps", unit="img", disable=True if quiet else None) as bar:
        for start in range(0, len(rows), MAPS_TOGETHER):
            part = in_batches(maps_of, rows[start : start + MAPS_TOGETHER])
            if file:
                file.write(part.clamp(-largest, largest).half().numpy())
            bar.update(len(part))


def unlike_training(content, labels, class_names):
    """What an MAE was not trained on: (names of its classes, (n,) bool: is an image of another?).

    `content` is that of its weights file.
    """
    trained_on = content["run"].get("classes", [])
    if datasets.means_every_class(trained_on, content["class_names"]):
        trained_on = list(class_names)
    return trained_on, ~np.isin(np.array(class_names)[labels], trained_on)


def aucs_of(scores, has_substructure, labels, class_names, resamples, seed):
    """{"all": `metrics.with_bounds`, "classes": {class: the same}}: AUC with 95 % bootstrap intervals.

    All substructure, and each class of it, against smooth images. `has_substructure` (n,) bool marks images
    of another kind than the MAE was trained on.
    """
    strange = np.unique(labels[has_substructure])
    kept = [np.ones(len(labels), bool), *(~has_substructure | (labels == label) for label in strange)]
    statistics = [auc_of_counts(scores[part], has_substructure[part]) for part in kept]

    def statistic(counts):
        return [auc_of(counts[part]) for part, auc_of in zip(kept, statistics, strict=True)]

    intervals = bootstrap(statistic, labels, resamples, seed)
    every, *others = (metrics.with_bounds(roc_auc_score(has_substructure[part], scores[part]), interval)
                      for part, interval in zip(kept, intervals, strict=True))  # fmt: skip
    return {"all": every, "classes": dict(zip((class_names[k] for k in strange), others, strict=True))}
