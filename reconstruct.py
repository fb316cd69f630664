"""Find substructure without labels: what an MAE that has seen smooth lenses only cannot explain.

Every patch of an image is predicted from others, under several masks; the score of an image is the
mean squared residual. Leaves in --out: scores.csv (row of the data set, class, score), metrics.json
(AUC of the score against the classes that the MAE was trained on), scores.png and maps.png (images
above their residuals; the true point masses are marked in data that simulate.py made).
"""

import argparse
import csv

import numpy as np
import torch

from lib import data, lenses, options, plots
from lib.device import resolve_device
from lib.files import UserError, atomic_write, make_folder, one_line, path_argument, run, write_json
from lib.residuals import mask_ratio_of, measure, residual_reader, scores_of

EXAMPLE = """example:
  python reconstruct.py --data lenses --weights runs/pretrain/vit-mae-wt.pth --out runs/residuals"""


@torch.no_grad()
def reconstruct(args):
    dataset = data.load(args.data, args.cache_dir)
    device = resolve_device(args.device)
    content, residuals, transformed = residual_reader(
        args.weights, dataset, device, args.mask_ratio, args.rounds, args.seed
    )
    rows = data.rows_to_evaluate(dataset, content, args.split == "all")
    labels = dataset.labels[rows]
    trained_on = content["run"].get("classes", [])
    if trained_on == ["all"]:
        trained_on = list(dataset.class_names)
    has_substructure = ~np.isin(np.array(dataset.class_names)[labels], trained_on)
    make_folder(args.out)
    if (args.out / "comparison.md").exists():
        raise UserError(f"{args.out} holds the results of evaluate.py: choose another --out")

    scores = scores_of(residuals, rows)
    write_scores(args.out / "scores.csv", rows, labels, scores, dataset.class_names)
    if has_substructure.any() and not has_substructure.all():
        measured = measure(
            scores, has_substructure, labels, dataset.class_names, args.resamples, args.seed
        )
        result = {"auc": measured, "trained_on": trained_on, "images": len(rows)}
        ratio = mask_ratio_of(content) if args.mask_ratio is None else args.mask_ratio
        result |= {"masks": f"{args.rounds} rounds, {ratio} hidden, seed {args.seed}"}
        result |= {"weights": str(args.weights), "data_fingerprint": dataset.fingerprint}
        write_json(args.out / "metrics.json", result)
        lines = [f"{one_line(name)}: {as_text(auc)}" for name, auc in measured["classes"].items()]
        text = "\n".join([f"all substructure: {as_text(measured['all'])}", *lines])
    else:
        (args.out / "metrics.json").unlink(missing_ok=True)  # an earlier call's
        some = "all" if not has_substructure.any() else "none"
        text = (
            f"no AUC: the MAE was trained on {one_line(', '.join(trained_on))}, and {some} of the "
            "images are of these classes: pre-train on some of the classes to compare"
        )
    for show, *what in (
        (print, text),
        (plots.score_histogram, args.out / "scores.png", scores, labels, dataset.class_names),
        (draw_maps, args.out / "maps.png", dataset, rows, scores, transformed, residuals),
    ):
        plots.attempt(show, *what)


def as_text(figure):
    return f"AUC {figure['value']:.4f} ({figure['low']:.4f}–{figure['high']:.4f})"


def write_scores(path, rows, labels, scores, class_names):
    """A line an image: its row in the data set, its class and its score."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "class", "score"])
        for row, label, score in zip(rows, labels, scores, strict=True):
            writer.writerow([row, class_names[label], f"{score:.6g}"])


def draw_maps(path, dataset, rows, scores, transformed, residuals):
    """Of each class the images at a tenth, a half and nine tenths of its scores, and their maps."""
    labels, chosen = dataset.labels[rows], []
    for label in np.unique(labels):
        order = np.flatnonzero(labels == label)[np.argsort(scores[labels == label])]
        chosen.append(order[np.round(np.array([0.1, 0.5, 0.9]) * (len(order) - 1)).astype(int)])
    chosen = np.concatenate(chosen)
    plots.residual_maps(
        path,
        transformed(rows[chosen])[:, 0].cpu().numpy(),
        residuals(rows[chosen])[0][:, 0].cpu().numpy(),
        [f"{dataset.class_names[labels[i]]}, score {scores[i]:.2g}" for i in chosen],
        lenses.marks_of(dataset, rows[chosen]),
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=options.HelpFormatter
    )
    options.add_data_arguments(parser)
    parser.add_argument(
        "--weights", type=path_argument, required=True, metavar="PTH", help="weights of pretrain.py"
    )
    options.add_test_arguments(parser)
    parser.add_argument(
        "--mask-ratio", type=float, default=None,
        help="fraction of patches to hide (default: that of the training)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=2, help="sets of complementary masks to average over"
    )
    args = parser.parse_args(argv)
    options.check_numbers(args)
    return args


def main(argv=None):
    reconstruct(parse_args(argv))


if __name__ == "__main__":
    run(main)
