"""Evaluate classifiers on the test split: accuracy, AUC with intervals, ROC, confusion matrix.

Leaves in --out: metrics.json, comparison.md (the table, beside the published rows), roc.png,
confusion_matrix.png, reliability.png, familiarity.png, mistakes.png, and report.html with all of it
in one file. Of weights of --task mass: metrics.json, comparison.md and masses.png (errors, and how
many of the intervals hold the true mass); of --task sharpen: metrics.json, comparison.md and
sharpened.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, one_line, path_argument, run_main, starting

starting(__name__)

from lib import class_evaluation, datasets, mass_evaluation, options, plots, report, sharp_evaluation, tables, weights
from lib import predictions as written
from lib.device import resolve_device
from lib.files import PICTURE, check_outputs, make_folder, require_own, sha256_of, write_json, write_text
from lib.provenance import LIBRARY, identity_of, is_current, made_from, sign

EXAMPLE = """example:
  python evaluate.py --data lenses --out runs/evaluation \\
      --weights runs/full/vit-mae-classifier-wt.pth"""

PREDICTIONS = "predictions.csv"
# By task: what is left beside metrics.json and comparison.md. The first two must be there, others may fail.
BESIDE = {
    "classes": ("report.html", "roc.png", "confusion_matrix.png", "reliability.png", "familiarity.png", "mistakes.png"),
    "mass": ("masses.png",), "sharpen": ("sharpened.png",),
}  # fmt: skip
LEFT = {name: PICTURE for names in BESIDE.values() for name in names}
LEFT |= {"metrics.json": rb'"(calibration_error|coverage|psnr_of_mean)"', "comparison.md": rb"\A\| run ",
         "report.html": rb"<title>Lens classification"}  # fmt: skip
# By task: what evaluates it, where that is no classification.
OTHER_TASKS = {"mass": mass_evaluation.evaluate, "sharpen": sharp_evaluation.evaluate}


def evaluate(args):
    opened = {name: weights.read(path)
              for name, path in zip(names_of_runs(args.weights), args.weights, strict=True)}  # fmt: skip
    dataset = datasets.load(args.data, args.cache_dir)
    make_folder(args.out)
    if (args.out / "scores.csv").exists():
        raise UserError(f"{args.out} holds the results of reconstruct.py: choose another --out")
    for name, pattern in LEFT.items():
        require_own(args.out / name, pattern)
    if args.save_predictions:
        check_outputs({"predictions.csv": args.out / PREDICTIONS}, [args.predictions] if args.predictions else [])
        require_own(args.out / PREDICTIONS, rb"\Arun,row,")
    theirs = sha256_of(args.predictions) if args.predictions else None
    hashes = {name: run.sha256 for name, run in opened.items()}
    made = made_from(args, [*LIBRARY, __file__], data=identity_of(dataset), weights=hashes, theirs=theirs)
    task = task_of(opened, args)
    beside = ["comparison.md", *BESIDE[task][:2]]
    beside += [PREDICTIONS] if args.save_predictions else []
    if args.update and is_current(args.out / "metrics.json", made, *map(args.out.joinpath, beside)):
        return
    for name in LEFT.keys() - {"metrics.json", "comparison.md", *BESIDE[task]}:
        (args.out / name).unlink(missing_ok=True)  # of another task
    about = {
        "data": {"origin": dataset.origin, "fingerprint": dataset.fingerprint},
        "weights": {name: str(run.path) for name, run in opened.items()},
        "split": args.split,
    }
    device = resolve_device(args.device)
    if task not in OTHER_TASKS:
        is_complete = evaluate_classifiers(args, opened, dataset, device, about)
    else:
        measured, rows, draw, drawn = OTHER_TASKS[task](args, opened, dataset, device)
        leave(args.out, about | {"task": task} | measured, rows, [])
        is_complete = plots.attempt(draw, args.out / BESIDE[task][0], *drawn)
    if is_complete:  # else --update tries again
        sign(args.out / "metrics.json", made)


def evaluate_classifiers(args, opened, dataset, device, about):
    """Leave all that an evaluation of classifiers leaves in --out; returns whether all pictures are there."""
    ours = class_evaluation.predictions_of(opened, dataset, device, args.split == "all")
    class_names = list(dataset.class_names)
    predictions, comparisons = class_evaluation.with_theirs(ours, dataset, args)
    results = {name: class_evaluation.results_of(p, class_names, args) for name, p in predictions.items()}
    matrices = {name: class_evaluation.confusion_of(p, class_names) for name, p in predictions.items()}
    published = class_evaluation.published_rows(dataset)
    measured = {
        "intervals": f"95 %; AUC: {args.resamples} bootstrap resamples, seed {args.seed}; accuracy: Wilson",
        "class_names": class_names,
        "results": results,
        "confusion": {name: matrix.tolist() for name, matrix in matrices.items()},
    }
    remarks = [*class_evaluation.about_results(results, ours), *comparisons]
    leave(args.out, about | measured, tables.comparison(results, class_names) + published, remarks)
    if args.save_predictions:
        written.write(args.out / PREDICTIONS, predictions, dataset, args.data)
    best = max(results, key=lambda name: results[name]["macro"]["value"])
    drawn = class_evaluation.draw(args.out, dataset, predictions, results, matrices, best)
    return plots.attempt(report.write, args.out, opened, results, dataset, best, published, remarks) and drawn


def leave(out, content, rows, remarks):
    """Leave the `content` of metrics.json and comparison.md in `out`, and print the `rows` and remarks."""
    table = tables.markdown(rows)
    write_json(out / "metrics.json", content)
    write_text(out / "comparison.md", table + "\n")
    plots.attempt(print, "\n".join([table, *map(one_line, remarks)]))


def task_of(opened, args):
    """The task of opened `Weights`; UserError if they have several, or for options of classifiers."""
    tasks = {run.kind for run in opened.values()}
    if not tasks & OTHER_TASKS.keys():
        return "classes"
    if len(tasks) > 1:
        raise UserError("--weights: each task has a table of its own: evaluate one of them in a call")
    (task,) = tasks
    for name in ("save_predictions", "predictions"):
        if getattr(args, name):
            raise UserError(f"{options.flag_of(name)} is for classifiers; these weights {weights.KINDS[task].does}")
    return task


def names_of_runs(paths):
    """A short name for each weights file: that of its folder, or its path where folders agree.

    UserError if a file is given twice.
    """
    full = [path.resolve() for path in paths]
    for path, resolved in zip(paths, full, strict=True):
        if full.count(resolved) > 1:
            raise UserError(f"--weights names {path} twice")
    folders = [path.parent.name for path in full]
    names = [f if folders.count(f) == 1 else str(p) for f, p in zip(folders, paths, strict=True)]
    return names if len(set(names)) == len(names) else [str(path) for path in full]


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    parser.add_argument(
        "--weights", type=path_argument, nargs="+", required=True, metavar="PTH",
        help="what finetune.py left: classifiers, or networks of one other --task",
    )
    options.add_test_arguments(parser)
    parser.add_argument("--save-predictions", action="store_true",
                        help="also write predictions.csv, a line an image")  # fmt: skip
    parser.add_argument(
        "--predictions", type=path_argument, metavar="CSV", default=None,
        help="somebody else's probabilities of the same test images, to stand in the tables and to be "
        "compared in a paired test: columns row (or file), and one for each class (default: none)",
    )  # fmt: skip
    return options.parsed(parser, argv)


def main(argv=None):
    evaluate(parse_args(argv))


if __name__ == "__main__":
    run_main(main)
