"""What evaluate.py does with classifiers: their answers on test images, their quality, pictures and refusals."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, roc_curve

from lib import compatibility, lenses, many_lenses, metrics, plots, weights
from lib import predictions as written
from lib.errors import UserError, warn
from lib.guard import LEAST_FAMILIARITY, Guard
from lib.loader import batch_reader, in_batches

SHOWN_MISTAKES = 12
SIGNIFICANCE = 0.01  # of the test whether more images of a class are unfamiliar than should be

# (work, AUC by class, macro AUC, accuracy) that others report of Test VI.A, which holds images of Model_II;
# None: not given. Names with a slash are repositories on GitHub, which report their own held-out images.
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
    ("arnesh2212/Lens-FM-DeepLense, supervised ResNet18", {}, None, 0.9999),
)
# Likewise for the Common Test, which Many_Lenses simulates. Most of these works chose their model on the same
# `val` that they report.
COMMON_TEST = (
    ("arnesh2212/FM-Deeplense, MaxViT with ImageNet's weights", {}, 0.9977, None),
    ("vijayabhaskar78/DeepLense-GSoC-2026, HybridFNO, 8 views", {}, 0.9975, 0.9712),
    ("rsalehin/DeepLense-GSoC-2026, EqDenseNet-C8", {}, 0.9973, 0.9735),
    ("GitHub user Anukul1712, EfficientNet-B3", {}, 0.9963, None),
)


class Prediction(NamedTuple):
    """What a classifier says of rows (n,) of a data set.

    labels (n,) and probabilities (n, classes) are in the order of the data's classes. familiarity (n,)
    and the `Guard` that judges it are None if the weights hold none.
    """

    rows: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    familiarity: np.ndarray | None
    guard: Guard | None


def predictions_of(opened, dataset, device, whole):
    """{run: `Prediction`} of opened `Weights` on the test part, or on the `whole` data set.

    UserError as `compatibility.rows_to_evaluate` raises it, and for classes or sizes that do not fit.
    """
    predictions, strangenesses, trained_on = {}, {}, []
    for name, run in opened.items():
        model, content = weights.classifier_of(run), run.content
        compatibility.check_size(run.path, model, dataset)
        order = compatibility.class_order(content["class_names"], dataset, run.path)
        rows = compatibility.rows_to_evaluate(dataset, content, whole)
        probabilities = predict_probabilities(model, dataset.images, rows, device)
        judge, familiarity, guard = weights.familiarity_in(run), None, None
        if judge is not None:
            # Classifiers from one pre-training share the strangeness.
            fit = repr(content["familiarity"]["config"]), judge.strangeness_seen.numpy().tobytes()
            if fit not in strangenesses:
                strangenesses[fit] = strangeness_of(judge, dataset.images, rows, device)
            predicted = torch.from_numpy(probabilities.argmax(axis=1))
            familiarity = ranked(judge.cpu(), strangenesses[fit], predicted)
            guard = Guard(len(judge.strangeness_seen))
        trained_on.append(content["run"].get("data_fingerprint"))
        predictions[name] = Prediction(
            rows, dataset.labels[rows], probabilities[:, order], familiarity, guard
        )
    if len(set(trained_on)) > 1:
        warn(
            "these weights were trained on different data, so their figures differ by more than the training"
        )
    return predictions


def with_theirs(ours, dataset, args):
    """({run: `Prediction`} with those of --predictions, if any, lines that compare these with each run)."""
    if not args.predictions:
        return ours, []
    name = args.predictions.stem
    if name in ours:
        raise UserError(f"--predictions {args.predictions} has the name of a run: rename the file")
    rows, labels = next(iter(ours.values()))[:2]
    if any(not np.array_equal(rows, p.rows) for p in ours.values()):
        raise UserError("--predictions: the weights are not tested on the same images: give one of them")
    theirs = written.read(args.predictions, rows, dataset, args.data)
    lines = [written.compared(p.probabilities, theirs, labels, (run, name)) for run, p in ours.items()]
    return {**ours, name: Prediction(rows, labels, theirs, None, None)}, lines


def confusion_of(prediction, class_names):
    """Counts (classes, classes) of images, true class in rows."""
    predicted = prediction.probabilities.argmax(axis=1)
    return confusion_matrix(prediction.labels, predicted, labels=range(len(class_names)))


def draw(out, dataset, predictions, results, matrices, best):
    """The pictures of an evaluation, and whether all are there; one that fails is one line on stderr."""
    class_names = list(dataset.class_names)
    curves = {
        run: {name: (*roc_curve(p.labels == k, p.probabilities[:, k])[:2],
                     results[run]["auc"][name]["value"]) for k, name in enumerate(class_names)}
        for run, p in predictions.items()
    }  # fmt: skip
    reliability = {run: metrics.calibration(p.probabilities, p.labels)[1] for run, p in predictions.items()}
    familiarities = {run: p.familiarity for run, p in predictions.items() if p.familiarity is not None}
    mistakes = most_confident_mistakes(predictions[best])
    pictures = (
        (plots.roc_curves, "roc.png", curves),
        (plots.confusion_matrices, "confusion_matrix.png", matrices, class_names),
        (plots.reliability, "reliability.png", reliability),
        (plots.familiarity, "familiarity.png", familiarities, LEAST_FAMILIARITY),
        (plots.mistakes, "mistakes.png", dataset.images, mistakes, class_names),
    )
    return all([plots.attempt(show, out / name, *what) for show, name, *what in pictures])


def predict_probabilities(model, images, rows, device):
    """Class probabilities (n, K) of rows of the raw `images` (N, H, W), in float32."""
    read = batch_reader(images, device, once=True)
    model.to(device)
    return in_batches(lambda batch: model(read(batch)).softmax(dim=1), rows, bar="evaluation").numpy()


def strangeness_of(judge, images, rows, device):
    """Strangeness (n,), a tensor, of rows of the raw `images` (N, H, W)."""
    read = batch_reader(images, device, once=True)
    judge.to(device)
    return in_batches(lambda batch: judge.strangeness(read(batch)), rows, bar="familiarity")


def ranked(judge, strangeness, predicted):
    """Familiarity (n,) of images of some strangeness (n,) and predicted classes (n,), tensors."""
    rows = np.arange(len(predicted))
    return in_batches(lambda batch: judge.rank(strangeness[batch], predicted[batch]), rows).numpy()


def refusals(prediction, class_names):
    """{"unfamiliar": share of the images, "unfamiliar_by_class": {class name: share of its images},
    "refused_too_often": names of classes of which more are refused than chance explains,
    "familiar_accuracy": of the images that are answered, None without any}.
    """
    predicted = prediction.probabilities.argmax(axis=1)
    answered = prediction.guard.answers(predicted, prediction.familiarity)
    right = predicted == prediction.labels
    refused = {name: ~answered[prediction.labels == k] for k, name in enumerate(class_names)}
    by_chance = {name: binomtest(int(of_class.sum()), len(of_class), LEAST_FAMILIARITY, alternative="greater").pvalue
                 for name, of_class in refused.items()}  # fmt: skip
    return {
        "unfamiliar": float(1 - answered.mean()),
        "unfamiliar_by_class": {name: float(of_class.mean()) for name, of_class in refused.items()},
        "refused_too_often": [name for name, chance in by_chance.items() if chance < SIGNIFICANCE],
        "familiar_accuracy": float(right[answered].mean()) if answered.any() else None,
    }


def about_results(results, ours):
    """Lines on what the table does not show, of results by run; only those of `ours` can refuse images."""
    lines = [line for name in results if name in ours for line in about_refusals(name, results[name])]
    aucs = [auc for r in results.values() for auc in (*r["auc"].values(), r["macro"])]
    return lines + list(filter(None, [metrics.about_intervals(aucs)]))


def about_refusals(name, result):
    """Lines on how many images predict.py would refuse to classify."""
    if "unfamiliar" not in result:
        yield f"{name}: its weights hold no familiarity, so predict.py refuses no image by it"
        return
    by_class = {key: f"{share:.2%}" for key, share in result["unfamiliar_by_class"].items()}
    shares = ", ".join(f"{share} of {key}" for key, share in by_class.items())
    text = f"{name}: {result['unfamiliar']:.2%} of the images are unfamiliar ({shares})"
    if result["familiar_accuracy"] is not None:
        text += f"; of the others {result['familiar_accuracy']:.2%} are classified correctly"
    yield text
    for key in result["refused_too_often"]:
        yield (f"{name}: of {key} {by_class[key]} are refused as unfamiliar, more than the "
               f"{LEAST_FAMILIARITY:.0%} of ordinary images: train with more images of it")  # fmt: skip


def results_of(prediction, class_names, args):
    """{"auc": {class name: AUC}, "macro": AUC, "accuracy", "images": n, "calibration_error"}.

    AUC and accuracy are a `metrics.with_bounds`; the intervals are of a bootstrap, that of the accuracy is
    Wilson's. With a familiarity there is also what `refusals` gives.
    """
    labels, probabilities = prediction.labels, prediction.probabilities
    values = metrics.measures(probabilities, labels)
    statistic = metrics.measures_of_counts(probabilities, labels)
    intervals = metrics.bootstrap(statistic, labels, args.resamples, args.seed)
    *aucs, macro, _ = map(metrics.with_bounds, values, intervals)
    accuracy = metrics.share_of(probabilities.argmax(axis=1) == labels)
    error, _ = metrics.calibration(probabilities, labels)
    results = {"auc": dict(zip(class_names, aucs, strict=True)), "macro": macro, "accuracy": accuracy,
               "images": len(labels), "calibration_error": error}  # fmt: skip
    if prediction.familiarity is not None:
        results |= refusals(prediction, class_names)
    return results


def most_confident_mistakes(prediction):
    """[(row, true class, predicted class, its probability)], the most confident first."""
    labels, probabilities = prediction.labels, prediction.probabilities
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong])][:SHOWN_MISTAKES]
    return [(int(prediction.rows[i]), int(labels[i]), int(predicted[i]), float(confidence[i]))
            for i in wrong]  # fmt: skip


def published_rows(dataset):
    """Rows [name, AUC of each class, macro AUC, accuracy], as text.

    Empty for data that can be neither of Test VI.A nor of the Common Test: other classes, another size, another
    data model, noise.
    """
    origin, names, side = dataset.origin, set(dataset.class_names), dataset.img_size
    of_model = origin.startswith("simulate.py Model_II,") and origin.endswith("noise-free")
    published = ()
    if (names, side) == (set(many_lenses.CLASS_NAMES), many_lenses.CAMERA.pixels):
        published = () if origin.startswith(("pictures of ", "8-bit pictures of ")) else COMMON_TEST
    elif (names, side) == (set(lenses.CLASS_NAMES), 64) and (of_model or "simulate.py " not in origin):
        published = PUBLISHED
    return [
        [name, *(f"{aucs[key]:.2f}" if key in aucs else "" for key in dataset.class_names),
         f"{macro:.4g}" if macro else "", f"{100 * correct:.4g}" if correct else ""]
        for name, aucs, macro, correct in published
    ]  # fmt: skip
