"""Evaluate classifiers on the test split: accuracy, AUC with intervals, ROC, confusion matrix.

Leaves in --out: metrics.json, comparison.md (the table, beside the published rows), roc.png,
confusion_matrix.png, reliability.png, mistakes.png, and report.html with all of it in one file.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve
from tqdm import tqdm

import data
import plots
import report
import train
import weights
from files import UserError, make_folder, run, write_json, write_text

EXAMPLE = """example:
  python evaluate.py --data lenses --out runs/evaluation \\
      --weights runs/full/vit-mae-classifier-wt.pth"""

CALIBRATION_BINS = 15
SHOWN_MISTAKES = 12

# (work, AUC by class, macro AUC, accuracy) that others report of Test VI.A; None: not given. Names
# with a slash are repositories on GitHub, whose figures are of their own held-out images.
PUBLISHED = (
    ("iampratyusht/Deeplense-task, head", {"axion": 0.92, "cdm": 0.92, "no_sub": 0.99}, None, None),
    ("the same, LayerNorm", {"axion": 0.94, "cdm": 0.90, "no_sub": 0.99}, None, None),
    ("the same, full", {"axion": 0.90, "cdm": 0.89, "no_sub": 0.90}, None, 0.928),
    ("arXiv:2512.06642, from scratch", {}, 0.957, 0.825),
    ("arXiv:2512.06642, MAE", {}, 0.968, 0.8865),
    ("vijayabhaskar78/DeepLense-GSoC-2026, MAE", {}, 0.9952, 0.9571),
    ("razancodes/DeepLense-Tests, MAE and latent MIM", {}, 0.9955, 0.9594),
    ("WaleedAlzamil80/deeplense25, MAE", {}, None, 0.97),
    ("arnesh2212/FM-Deeplense, MAE, best epoch", {}, 0.9958, 0.9966),
)


def accuracy(probabilities, labels):
    """Share of images whose most probable class is the true one."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def auc_by_class(probabilities, labels):
    """One-vs-rest area under the ROC curve of each class: (N, K), (N,) -> list of K."""
    return [
        float(roc_auc_score(labels == k, probabilities[:, k]))
        for k in range(probabilities.shape[1])
    ]


def measures(probabilities, labels):
    """The numbers of one evaluation as an array: AUC of each class, macro AUC, accuracy."""
    aucs = auc_by_class(probabilities, labels)
    return np.array([*aucs, np.mean(aucs), accuracy(probabilities, labels)])


def calibration(probabilities, labels, bins=CALIBRATION_BINS):
    """How far confidence is from accuracy (Guo et al. 2017, equation 3).

    Returns (expected calibration error, [(mean confidence, accuracy, images) of each bin that has
    images]); confidence is the largest probability, bins are equally wide.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    table = [
        (float(confidence[index == b].mean()), float(correct[index == b].mean()), int(n))
        for b, n in enumerate(np.bincount(index, minlength=bins))
        if n
    ]
    error = sum(n * abs(accurate - confident) for confident, accurate, n in table) / len(labels)
    return error, table


def bootstrap(statistic, labels, resamples, seed, progress=True):
    """95 % percentile intervals (n, 2) of `statistic`, resampling images within each class.

    `statistic` gives n numbers of a selection of images: indices (N,) -> (n,).
    """
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    values = []
    for _ in tqdm(
        range(resamples), desc="bootstrap", leave=False, disable=None if progress else True
    ):
        rows = np.concatenate([rng.choice(members, len(members)) for members in by_class])
        values.append(statistic(rows))
    return np.quantile(values, [0.025, 0.975], axis=0).T


def predict_probabilities(model, images, rows, device):
    """Class probabilities (n, K) of rows of the raw `images` (N, H, W), in float32."""
    read = train.batch_reader(images, device)
    model.eval().to(device)
    return train.in_batches(lambda b: model(read(b)).softmax(dim=1), rows).numpy()


def names_of_runs(paths):
    """A short name for each weights file: its folder's."""
    names = [path.resolve().parent.name for path in paths]
    return [n if names.count(n) == 1 else str(p) for n, p in zip(names, paths, strict=True)]


def check_size(path, network, dataset, remedy=""):
    """UserError, naming the weights, if the data's images have another size than the network's."""
    if network.img_size != dataset.img_size:
        raise UserError(
            f"{path} is for images of {network.img_size} pixels, the data has "
            f"{dataset.img_size}{remedy}"
        )


def labels_for(class_names, dataset, path):
    """Labels of the data in the order of a model's class names; UserError where they differ."""
    for name in dataset.class_names:
        if name not in class_names:
            raise UserError(f"{path} knows the classes {', '.join(class_names)}, not {name}")
    for name in class_names:
        if name not in dataset.class_names:
            raise UserError(f"the data has no class folder {name}, which {path} was trained on")
    order = np.array([class_names.index(name) for name in dataset.class_names])
    return order[dataset.labels]


def evaluate(args):
    dataset = data.load(args.data, args.cache_dir)
    device = train.resolve_device(args.device)
    make_folder(args.out)
    results, curves, matrices, reliability, mistakes = {}, {}, {}, {}, {}
    for name, path in zip(names_of_runs(args.weights), args.weights, strict=True):
        model, content = weights.load_classifier(path)
        class_names = content["class_names"]
        check_size(path, model, dataset)
        labels = labels_for(class_names, dataset, path)
        rows = rows_to_evaluate(args, dataset, content)
        probabilities = predict_probabilities(model, dataset.images, rows, device)
        labels = labels[rows]
        values = measures(probabilities, labels)
        intervals = bootstrap(
            lambda chosen, p=probabilities, y=labels: measures(p[chosen], y[chosen]),
            labels, args.resamples, args.seed,
        )  # fmt: skip
        keys = [*class_names, "macro", "accuracy"]
        results[name] = {
            key: {"value": value, "low": low, "high": high}
            for key, value, (low, high) in zip(
                keys, values.tolist(), intervals.tolist(), strict=True
            )
        }
        results[name]["images"] = len(rows)
        results[name]["calibration_error"], reliability[name] = calibration(probabilities, labels)
        mistakes[name] = most_confident_mistakes(probabilities, labels, rows)
        matrices[name] = confusion_matrix(
            labels, probabilities.argmax(axis=1), labels=range(len(class_names))
        )
        curves[name] = {
            class_name: (*roc_curve(labels == k, probabilities[:, k])[:2], values[k])
            for k, class_name in enumerate(class_names)
        }

    table = comparison(results, class_names)
    print(table)
    write_json(
        args.out / "metrics.json",
        {
            "data": {"origin": dataset.origin, "fingerprint": dataset.fingerprint},
            "split": args.split,
            "intervals": f"95 %, {args.resamples} bootstrap resamples, seed {args.seed}",
            "class_names": class_names,
            "results": results,
            "confusion": {name: matrix.tolist() for name, matrix in matrices.items()},
        },
    )
    write_text(args.out / "comparison.md", table + "\n")
    plots.roc_curves(args.out / "roc.png", curves)
    plots.confusion_matrices(args.out / "confusion_matrix.png", matrices, class_names)
    plots.reliability(args.out / "reliability.png", reliability)
    best = max(results, key=lambda name: results[name]["macro"]["value"])
    plots.mistakes(args.out / "mistakes.png", dataset.images, mistakes[best], class_names)
    paths = dict(zip(results, args.weights, strict=True))
    report.write(args.out, paths, results, class_names, best, published_rows(class_names))


def most_confident_mistakes(probabilities, labels, rows):
    """[(row, true class, predicted class, its probability)], the most confident first."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong])][:SHOWN_MISTAKES]
    return [(int(rows[i]), int(labels[i]), int(predicted[i]), float(confidence[i])) for i in wrong]


def rows_to_evaluate(args, dataset, content):
    """The rows of the test part, or all rows.

    UserError if "all" is asked of the very data that the weights were trained on.
    """
    trained_on = content["run"].get("data_fingerprint")
    if args.split == "all":
        if trained_on == dataset.fingerprint:
            raise UserError("--split all: the weights were trained on this data; use --split test")
        return np.arange(len(dataset.labels))
    data.check_split(content["run"])
    return data.split(dataset)["test"]


def comparison(results, class_names):
    """Markdown table of the results with intervals, the published rows below."""

    def cell(entry, scale=1, digits=4):
        low, high = scale * entry["low"], scale * entry["high"]
        return f"{scale * entry['value']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"

    header = ["run", *(f"AUC {name}" for name in class_names), "macro AUC", "accuracy %"]
    lines = [header, ["---"] * len(header)]
    for name, result in results.items():
        aucs = [cell(result[key]) for key in (*class_names, "macro")]
        lines.append([name, *aucs, cell(result["accuracy"], 100, 2)])
    lines += published_rows(class_names)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def published_rows(class_names):
    """Rows [name, AUC of each class, macro AUC, accuracy], as text; none for other classes."""
    if set(class_names) != {"axion", "cdm", "no_sub"}:
        return []
    return [
        [name, *(f"{aucs[key]:.2f}" if key in aucs else "" for key in class_names),
         f"{macro:.4g}" if macro else "", f"{100 * correct:.4g}" if correct else ""]
        for name, aucs, macro, correct in PUBLISHED
    ]  # fmt: skip


def add_test_arguments(parser):
    """What is tested on, where the results go, and how they are resampled."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--out", type=Path, required=True, help="folder for the results")
    group.add_argument(
        "--split", choices=("test", "all"), default="test",
        help="the test part, or all images of data that training never saw",
    )  # fmt: skip
    group.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    group.add_argument("--seed", type=int, default=0, help="of all that is random here")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def check_test_arguments(args):
    """UserError, naming the flag, for numbers that make no sense."""
    if args.resamples < 1:
        raise UserError(f"--resamples must be at least 1, got {args.resamples}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=train.HelpFormatter
    )
    data.add_data_arguments(parser)
    parser.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="PTH", help="classifiers"
    )
    add_test_arguments(parser)
    args = parser.parse_args(argv)
    check_test_arguments(args)
    return args


def main(argv=None):
    evaluate(parse_args(argv))


if __name__ == "__main__":
    run(main)
