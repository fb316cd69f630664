"""Find substructure without labels: what an MAE that has seen smooth lenses only cannot explain.

Every patch of an image is predicted from others, under several masks; the score of an image is the
mean squared residual. Leaves in --out: scores.csv (row of the data set, class, score), metrics.json
(AUC of the score against the classes that the MAE was trained on), scores.png and maps.png (images
above their residuals; the true point masses are marked in data that simulate.py made).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import data
import plots
import simulate
import train
import weights
from evaluate import (
    add_test_arguments,
    bootstrap,
    check_size,
    check_test_arguments,
    rows_to_evaluate,
)
from files import UserError, make_folder, run, write_json, write_text
from mae import complementary_masks

EXAMPLE = """example:
  python reconstruct.py --data lenses --weights runs/pretrain/vit-mae-wt.pth --out runs/residuals"""


def residual_reader(path, dataset, device, mask_ratio, rounds, seed):
    """Load an MAE to look at `dataset` with.

    Returns (the weights file's content, function from rows to `MAE.residual`, function from rows
    to the images (b, 1, H, W) that the network sees).
    """
    mae, transform, content = weights.load_mae(path)
    check_size(path, mae, dataset)
    mae.eval().to(device)
    transform.to(device)
    read = train.batch_reader(dataset.images, device)
    masks = complementary_masks(mae.num_patches, mask_ratio, rounds, seed)

    def seen(batch):
        return transform(read(batch))

    return content, lambda batch: mae.residual(seen(batch), masks), seen


def scores_of(residuals, rows):
    """Mean squared residual of each image, (n,)."""
    return train.in_batches(lambda b: residuals(b)[1].mean(dim=(1, 2, 3)), rows).numpy()


def auc_by_kind(scores, strange, labels, class_names):
    """AUC of the score for everything strange, and for each strange class against the others."""
    result = {"all": roc_auc_score(strange, scores)}
    for label in np.unique(labels[strange]):
        chosen = ~strange | (labels == label)
        result[class_names[label]] = roc_auc_score(strange[chosen], scores[chosen])
    return result


def measure(scores, smooth, labels, class_names, resamples, seed):
    """{"all" or a class: {"value", "low", "high"}}: AUC with 95 % bootstrap intervals.

    `smooth` (n,) bool says which images are of the kind that the MAE was trained on.
    """
    values = auc_by_kind(scores, ~smooth, labels, class_names)

    def statistic(rows):
        return list(auc_by_kind(scores[rows], ~smooth[rows], labels[rows], class_names).values())

    intervals = bootstrap(statistic, labels, resamples, seed)
    return {
        name: {"value": float(value), "low": low, "high": high}
        for (name, value), (low, high) in zip(values.items(), intervals.tolist(), strict=True)
    }


@torch.no_grad()
def reconstruct(args):
    dataset = data.load(args.data, args.cache_dir)
    device = train.resolve_device(args.device)
    content, residuals, seen = residual_reader(
        args.weights, dataset, device, args.mask_ratio, args.rounds, args.seed
    )
    rows = rows_to_evaluate(args, dataset, content)
    labels = dataset.labels[rows]
    trained_on = content["run"].get("classes", [])
    smooth = np.isin(np.array(dataset.class_names)[labels], trained_on)
    make_folder(args.out)

    scores = scores_of(residuals, rows)
    lines = [
        f"{row},{dataset.class_names[label]},{score:.6g}"
        for row, label, score in zip(rows, labels, scores, strict=True)
    ]
    write_text(args.out / "scores.csv", "\n".join(["row,class,score", *lines]) + "\n")
    if smooth.any() and not smooth.all():
        measured = measure(scores, smooth, labels, dataset.class_names, args.resamples, args.seed)
        for name, auc in measured.items():
            print(f"{name}: AUC {auc['value']:.4f} ({auc['low']:.4f}–{auc['high']:.4f})")
        result = {"auc": measured, "trained_on": trained_on, "images": len(rows)}
        result |= {"masks": f"{args.rounds} rounds, {args.mask_ratio} hidden, seed {args.seed}"}
        write_json(args.out / "metrics.json", result)
    else:
        print(f"no AUC: the MAE was trained on {', '.join(trained_on)}, and so is all the data")
    plots.score_histogram(args.out / "scores.png", scores, labels, dataset.class_names)

    # Of each class the images at a tenth, a half and nine tenths of its scores.
    shown = []
    for label in np.unique(labels):
        order = np.flatnonzero(labels == label)[np.argsort(scores[labels == label])]
        shown.append(order[np.round(np.array([0.1, 0.5, 0.9]) * (len(order) - 1)).astype(int)])
    shown = np.concatenate(shown)
    plots.residual_maps(
        args.out / "maps.png",
        seen(rows[shown])[:, 0].cpu().numpy(),
        residuals(rows[shown])[0][:, 0].cpu().numpy(),
        [f"{dataset.class_names[labels[i]]}, score {scores[i]:.2g}" for i in shown],
        marks_of(dataset, rows[shown]),
    )


def marks_of(dataset, rows):
    """True point masses in pixels, a list of (P, 3): x, y and Einstein radius; None if unknown."""
    known = simulate.point_masses_of(dataset.origin, rows)
    if known is None:
        return None
    masses, instrument = known
    centre = (instrument.pixels - 1) / 2
    in_pixels = [m / instrument.pixel_scale for m in masses]
    return [np.column_stack([m[:, 1:] + centre, m[:, 0]]) for m in in_pixels]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=train.HelpFormatter
    )
    data.add_data_arguments(parser)
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="PTH", help="weights that pretrain.py left"
    )
    add_test_arguments(parser)
    parser.add_argument("--mask-ratio", type=float, default=0.75, help="share of patches hidden")
    parser.add_argument(
        "--rounds", type=int, default=2, help="sets of complementary masks to average over"
    )
    args = parser.parse_args(argv)
    check_test_arguments(args)
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {args.rounds}")
    if not 0 < args.mask_ratio < 1:
        raise UserError(f"--mask-ratio must be between 0 and 1, got {args.mask_ratio}")
    return args


def main(argv=None):
    reconstruct(parse_args(argv))


if __name__ == "__main__":
    run(main)
