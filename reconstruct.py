"""Find substructure without labels: what an MAE that has seen smooth lenses only cannot explain.

Every patch of an image is predicted from others, under several masks; the score of an image says
how much is left of it (`mae.residual_scores`). --clusters also sorts the images into kinds, by
their residual maps alone.
Leaves in --out: scores.csv (row of the data set, class, score, cluster, file of a folder),
metrics.json (AUC of the score against the classes that the MAE was trained on, agreement of
clusters and classes), scores.png and maps.png (images above their residuals; the true point masses
are marked in data that simulate.py made).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, one_line, path_argument, run_main, starting, warn

starting(__name__)

import numpy as np
import torch

from lib import clusters, compatibility, datasets, options, plots, simulated, weights
from lib.device import resolve_device
from lib.files import PICTURE, make_folder, require_own, write_csv, write_json
from lib.metrics import about_intervals
from lib.provenance import LIBRARY, identity_of, is_current, made_from, sign
from lib.residuals import (
    aucs_of, mask_ratio_of, residual_reader, scores_and_powers, scores_of, smooth_rms_of, unlike_training,
)  # fmt: skip
from lib.tables import with_interval

EXAMPLE = """examples:
  python reconstruct.py --data lenses --weights runs/pretrain/vit-mae-wt.pth --out runs/residuals
  python reconstruct.py --data lenses --weights runs/pretrain/vit-mae-wt.pth --clusters 3 \\
      --out runs/kinds"""

LEFT = {"metrics.json": rb'"(masks|made_from)"', "scores.csv": rb"\Arow,class,score\b", "scores.png": PICTURE,
        "maps.png": PICTURE}  # fmt: skip


@torch.no_grad()
def reconstruct(args):
    device, opened = resolve_device(args.device), weights.read(args.weights)
    dataset = datasets.load(args.data, args.cache_dir)
    files = datasets.files_of(args.data, dataset)
    content = opened.content
    residuals, transformed = residual_reader(opened, dataset, device, args.mask_ratio, args.rounds, args.seed)
    rows = compatibility.rows_to_evaluate(dataset, content, args.split == "all")
    fitted = rows if args.split == "all" or not args.clusters else datasets.split(dataset)["validation"]
    if args.clusters:
        clusters.gaussians_for(args.clusters, len(fitted))  # a mistake ends here, not after minutes
    labels = dataset.labels[rows]
    trained_on, has_substructure = unlike_training(content, labels, dataset.class_names)
    make_folder(args.out)
    if (args.out / "comparison.md").exists():
        raise UserError(f"{args.out} holds the results of evaluate.py: choose another --out")
    for name, pattern in LEFT.items():
        require_own(args.out / name, pattern)
    made = made_from(args, [*LIBRARY, __file__], data=identity_of(dataset), weights=opened.sha256)
    if args.update and is_current(
        args.out / "metrics.json", made, args.out / "scores.csv", args.out / "maps.png"
    ):
        return

    if args.clusters:
        scores, kinds, kind_of_row = sort_into_kinds(residuals, rows, fitted, args.clusters, args.seed)
    else:
        scores, kinds, kind_of_row = scores_of(residuals, rows), None, None
    (args.out / "metrics.json").unlink(missing_ok=True)  # an earlier call's
    write_scores(args.out / "scores.csv", rows, labels, scores, dataset.class_names, kind_of_row, files)
    how = dataset.class_names, args.resamples, args.seed
    result, lines = separation(scores, labels, has_substructure, trained_on, how)
    if kinds:
        result["clusters"] = measured = clusters.agreement(kinds, kind_of_row, labels, dataset.class_names)
        lines += [f"{args.clusters} clusters: accuracy {with_interval(measured['accuracy'], 2, 100)} %, "
                  f"overlap left {kinds.overlap:.3f}"]  # fmt: skip
    if result:
        ratio = mask_ratio_of(content) if args.mask_ratio is None else args.mask_ratio
        result |= {"trained_on": trained_on, "images": len(rows)}
        result |= {"masks": f"{args.rounds} rounds, {ratio} hidden, seed {args.seed}"}
        result |= {"weights": str(args.weights), "data_fingerprint": dataset.fingerprint}
        write_json(args.out / "metrics.json", result)
    plots.attempt(print, "\n".join(lines))
    if kinds and clusters.doubt(kinds):
        warn(clusters.doubt(kinds))
    pictures = (
        (plots.score_histogram, args.out / "scores.png", scores, labels, dataset.class_names),
        (draw_maps, args.out / "maps.png", dataset, rows, scores, transformed, residuals, content),
    )
    if all([plots.attempt(show, *what) for show, *what in pictures]):  # else --update tries again
        sign(args.out / "metrics.json", made)


def sort_into_kinds(residuals, rows, fitted, count, seed):
    """Sort the images `rows` into `count` kinds, which are found in the images `fitted`.

    Returns (scores (n,), the `clusters.Kinds`, the kind of each image (n,) int).
    """
    if fitted is rows:
        scores, powers = scores_and_powers(residuals, rows)
        kinds = clusters.fit(powers, count, seed)
    else:
        _, powers = scores_and_powers(residuals, fitted, bar="residuals to find kinds in")
        kinds = clusters.fit(powers, count, seed)
        scores, powers = scores_and_powers(residuals, rows)
    return scores, kinds, clusters.assign(kinds, powers)


def separation(scores, labels, has_substructure, trained_on, how):
    """How well scores tell substructure from what the MAE was trained on: ({"auc": measured}, lines).

    `how` are class names, resamples and seed of `residuals.aucs_of`. Without images of both kinds the
    dict is empty.
    """
    if has_substructure.all() or not has_substructure.any():
        some = "none" if has_substructure.any() else "all"
        return {}, [
            f"no AUC: the MAE was trained on {one_line(', '.join(trained_on))}, and {some} of the "
            "images are of these classes: pre-train on some of the classes to compare"
        ]
    measured = aucs_of(scores, has_substructure, labels, *how)
    lines = [f"all substructure: AUC {with_interval(measured['all'], 4)}"]
    lines += [f"{one_line(name)}: AUC {with_interval(auc, 4)}" for name, auc in measured["classes"].items()]
    lines += filter(None, [about_intervals([measured["all"], *measured["classes"].values()])])
    return {"auc": measured}, lines


def write_scores(path, rows, labels, scores, class_names, kind_of_row, files):
    """A line an image: row in the data set, class, score and, where they are known, cluster and file."""
    columns = {"row": rows, "class": [class_names[label] for label in labels],
               "score": [f"{score:.6g}" for score in scores]}  # fmt: skip
    if kind_of_row is not None:
        columns["cluster"] = kind_of_row
    if files:
        columns["file"] = [files[row] for row in rows]
    write_csv(path, [columns, *(map(str, line) for line in zip(*columns.values(), strict=True))])


def draw_maps(path, dataset, rows, scores, transformed, residuals, content):
    """Of each class the images at a tenth, a half and nine tenths of its scores, and their maps."""
    labels, chosen = dataset.labels[rows], []
    for label in np.unique(labels):
        order = np.flatnonzero(labels == label)[np.argsort(scores[labels == label])]
        chosen.append(order[np.round(np.array([0.1, 0.5, 0.9]) * (len(order) - 1)).astype(int)])
    chosen = np.concatenate(chosen)
    maps = residuals(rows[chosen])[:, 0].cpu().numpy()
    plots.residual_maps(
        path,
        transformed(rows[chosen])[:, 0].cpu().numpy(),
        maps,
        smooth_rms_of(content, maps),
        [f"{dataset.class_names[labels[i]]}, score {scores[i]:.2g}" for i in chosen],
        simulated.marks_of(dataset, rows[chosen]),
    )


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
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
    parser.add_argument(
        "--clusters", type=int, default=None, metavar="K",
        help="sort the images into K kinds without labels. The kinds are found in the validation part "
        "(with --split all: in the images themselves), and labels only score them (default: none)",
    )  # fmt: skip
    args = options.parsed(parser, argv)
    if args.clusters == 0:
        raise UserError("--clusters must be at least 2, got 0; leave it out for none")
    return args


def main(argv=None):
    reconstruct(parse_args(argv))


if __name__ == "__main__":
    run_main(main)
