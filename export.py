"""Export to one ONNX file, raw images in, with everything needed in it.

A classifier gives calibrated probabilities and the familiarity of an image. `--what
reconstruction` exports an MAE, which gives residual maps and scores; `--what mass` exports a
network that estimates the mass of an axion; `--what sharpen` exports one that sharpens images.
The intensity transform is in the graph; class names and origin are in the metadata. The file is
compared with PyTorch on images of the data before it is written. A file that differs, or that
loses AUC or accuracy in lower precision, is not written.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import json
import time

import numpy as np
import onnx
import torch

from lib import compatibility, datasets, known_answers, options, pairs, traits, weights
from lib.convert import to_hugging_face
from lib.files import atomic_directory, atomic_write, check_outputs, require_own, write_json, write_text
from lib.known_answers import difference
from lib.loader import some_of
from lib.metrics import accuracy, auc_by_class
from lib.onnxfile import OUTPUTS, open_session
from lib.onnxwrite import Answers, Probabilities, Residuals, reduce_precision, save_proto, write_onnx
from lib.provenance import LIBRARY, circumstances, identity_of, made_from
from lib.residuals import mask_ratio_of
from lib.simulated import pixels_of

EXAMPLE = """examples:
  python export.py --weights runs/full/vit-mae-classifier-wt.pth --out lens.onnx
  python export.py --weights runs/full/vit-mae-classifier-wt.pth --precision int8 --out small.onnx
  python export.py --what reconstruction --weights runs/pretrain/vit-mae-wt.pth --out maps.onnx"""
LICENCE = "MIT"
# Largest difference from PyTorch in float32, see `known_answers.difference`. The familiarity is a rank
# among the validation images, which rounding changes a little, beyond `rank_steps`; it is computed in
# float32 always.
TOLERANCES = {"probabilities": 1e-4, "familiarity": 0.03, "residual": 1e-4, "score": 1e-4}
TOLERANCES |= {"log10_mass": 1e-4, "low": 1e-4, "high": 1e-4, "sharpened": 1e-4, "rms_error": 1e-4}
CHECKED_BATCHES = (1, 7, 256)
DESCRIBED_IMAGES = 1000  # training images whose traits are kept, see `traits`
JUDGED_IMAGES = 3000  # validation images on which lower precision is judged


def export(args):
    if args.what == "huggingface":
        export_to_hugging_face(args)
        return
    if args.out.suffix.lower() in (".pth", ".npy", ".npz", ".csv", ".json"):
        raise UserError(f"--out {args.out} has the suffix of another kind of file: name an .onnx file")
    check_outputs({"--out": args.out}, args.weights)
    require_own(args.out, b"weights_sha256")
    say("reading weights and images")
    model, opened = load_model(args)
    dataset, parts = load_images(args, opened.content, model.img_size)
    images = some_images(dataset, parts["validation"], max(CHECKED_BATCHES), args.seed)
    if args.precision != "float32":
        order = compatibility.class_order(opened.content["class_names"], dataset, opened.path)
    metadata = metadata_of(args, model, opened, dataset, parts["train"])
    if args.update and metadata["made_from"] == made_from_in(args.out):
        print(f"already up to date: {args.out}")
        return
    with atomic_write(args.out) as temporary:
        say("tracing the network")
        write_onnx(model, temporary, metadata)
        say(f"comparing it with PyTorch on {len(images)} images")
        apart = worst_differences(model, temporary, images)
        require_agreement(apart, args.out)
        say("measuring its time")
        print(f"{size_and_speed('float32', temporary, images)}; {as_text(apart)}")
        if args.precision != "float32":
            lower_precision(temporary, args, model, dataset, order, parts, images, metadata)
        say("storing images with known answers")
        store_known_answers(temporary, args, model, images, metadata)
    print(f"{opened.path} -> {args.out}")


def export_to_hugging_face(args):
    """Leave what transformers' ViTMAEForPreTraining loads, and a card that says what the images must be."""
    mae, _, content = weights.load_mae(args.weights[0])
    config = {k: v for k, v in content["config"].items() if k != "transform"}
    state, described = to_hugging_face(mae.state_dict(), config)
    with atomic_directory(args.out) as folder:
        weights.save_tensors(folder / "pytorch_model.bin", state)
        weights.save_safetensors(folder / "model.safetensors", state)
        write_json(folder / "config.json", described)
        write_json(folder / "transform.json", content["config"]["transform"])
        size = {"height": described["image_size"], "width": described["image_size"]}
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), False)
        write_json(folder / "preprocessor_config.json",
                   {"image_processor_type": "ViTImageProcessor", "size": size, **steps})  # fmt: skip
        write_text(folder / "README.md", card_of(content, described))
    print(f"{args.weights[0]} -> {args.out}, for ViTMAEForPreTraining.from_pretrained")


def card_of(content, described):
    """The model card: what the network was trained on, and how images become its input."""
    run, side = content["run"], described["image_size"]
    made = run.get("made", {})
    return f"""---
license: {LICENCE.lower()}
library_name: transformers
tags: [masked-autoencoder, gravitational-lensing]
---
# Masked autoencoder for gravitational lenses

A ViT MAE for single-channel images of {side}×{side} pixels ({run.get("pixel_scale", "?")} arcsec, unit:
{run.get("unit", "unknown")}), pre-trained on the classes {", ".join(run.get("classes", ["unknown"]))} with
{run.get("mask_ratio", 0.75):.0%} of the patches hidden. Commit {made.get("commit") or "unknown"},
{made.get("date", "date unknown")}.

It does not take raw pixels: transform.json has the constants of the intensity transform. With kind `log`, the input is
`(log(1 + max((x - offset) / softening, 0)) - mean) / std`; `IntensityTransform` in `mae.py` has all kinds.
No image processor resizes or rescales (preprocessor_config.json).
"""


def say(step):
    """Name a step that takes long before it starts, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"{step} ...", file=sys.stderr, flush=True)


# What is exported, and the images that it is checked with


def load_model(args):
    """(model to export, opened `Weights` that it comes from) that the options ask for."""
    opened = [weights.read(path) for path in args.weights]
    if args.what == "reconstruction":
        mae, transform = weights.mae_of(opened[0])
        return Residuals(mae, transform, mask_ratio_of(opened[0].content)).eval(), opened[0]
    if args.what != "classifier":
        return Answers(weights.network_of(opened[0], args.what), OUTPUTS[args.what]).eval(), opened[0]
    classifiers = [weights.classifier_of(file) for file in opened]
    best = best_on_validation(opened) if len(opened) > 1 else 0
    model = Probabilities(classifiers[best], weights.familiarity_in(opened[best]))
    return model.eval(), opened[best]


def best_on_validation(opened):
    """Index of the weights with the best validation macro AUC, then the lowest loss."""
    data = [(each.content["run"].get("data_fingerprint"), each.content["class_names"]) for each in opened]
    for other, of_other in zip(opened, data, strict=True):
        if of_other != data[0]:
            raise UserError(
                f"{opened[0].path} and {other.path} were validated on different data: export one of them"
            )

    def rank(i):
        best = opened[i].content["run"].get("best")
        try:
            return float(best["validation_macro_auc"]), -float(best["validation_loss"])
        except (TypeError, KeyError, ValueError, OverflowError):
            raise UserError(f"{opened[i].path} has no validation figures: train again") from None

    return max(range(len(opened)), key=rank)


def load_images(args, content, img_size):
    """The data to check with, and its split; UserError if it is missing or does not fit.

    By default it is the training data, and its packed copy is looked for where the training kept it.
    """
    where, cache_dir, trained = args.data, args.cache_dir, content["run"]
    if where is None:
        where, kept = str(trained.get("data", "")), str(trained.get("cache_dir") or "")
        if cache_dir is None and kept and Path(kept).is_dir():
            cache_dir = kept
    if not where or not Path(where).is_dir():
        raise UserError(f"the training data ({where}) is not here: name images with --data")
    dataset = datasets.load(where, cache_dir)
    if args.what == "sharpen":
        dataset = pairs.coarse_of(dataset)
    if dataset.img_size != img_size:
        raise UserError(f"{where} has images of {dataset.img_size} pixels, not {img_size}")
    compatibility.check_split(trained)
    return dataset, datasets.split(dataset)


def some_images(dataset, rows, count, seed):
    """`count` raw images (count, 1, H, W) of `rows`, repeated if there are fewer."""
    rows = np.random.default_rng(seed).permutation(rows)
    return dataset.images[np.resize(rows, count)][:, None]


def metadata_of(args, model, opened, dataset, train):
    """The text {key: value} that the file carries; `train` are rows of training images."""
    # The file may be published: without the paths of this machine.
    trained = {k: v for k, v in opened.content["run"].items() if k not in ("data", "cache_dir")}
    familiarity, reference, measures = getattr(model, "familiarity", None), "null", trained
    if trained.get("data_fingerprint") == dataset.fingerprint:
        some = some_of(train, DESCRIBED_IMAGES, dataset.images)
        reference = json.dumps(traits.reference_of(dataset.images[some]))
        measures = pixels_of(dataset.origin)
    made = made_from(args, [*LIBRARY, __file__], data=identity_of(dataset), weights=opened.sha256)
    return {
        "what": args.what,
        "licence": LICENCE,
        "class_names": json.dumps(opened.content["class_names"]),
        "img_size": str(model.img_size),
        "transform": json.dumps(opened.content["config"]["transform"]),
        "precision": args.precision,
        "weights_sha256": opened.sha256,
        "data_fingerprint": str(trained.get("data_fingerprint")),
        "pixel_range": json.dumps(trained.get("pixel_range")),
        "familiarity_images": str(len(familiarity.strangeness_seen) if familiarity else 0),
        **{name: json.dumps(measures.get(name)) for name in ("pixel_scale", "unit", "zero_point")},
        "smooth_rms": json.dumps(trained.get("smooth_rms")),
        "mass_classes": json.dumps(trained.get("mass_classes")),
        "figures": reference,
        "made": json.dumps(circumstances()),
        "run": json.dumps(trained),
        "made_from": json.dumps(made),
    }


def made_from_in(path):
    """What an exported file says that it was made from; None if there is no such file."""
    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
    except Exception:  # of a broken file, onnx and protobuf raise many kinds
        return None
    return {item.key: item.value for item in properties}.get("made_from")


# How far the file is from PyTorch


def run_session(path, images, batch=256):
    """Outputs of an exported file on images (n, 1, H, W), a list of arrays."""
    session, _ = open_session(path, "cpu")
    parts = [
        session.run(None, {"images": images[start : start + batch]}) for start in range(0, len(images), batch)
    ]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def answers_of(model, images):
    """{output: PyTorch's answers (n, ...)} to images (n, 1, H, W)."""
    with torch.no_grad():
        answers = model(torch.from_numpy(images))
    answers = answers if isinstance(answers, tuple) else (answers,)
    return {name: answer.numpy() for name, answer in zip(model.outputs, answers, strict=True)}


def worst_differences(model, path, images):
    """{output: largest difference between onnxruntime and PyTorch} on `images` (256, 1, H, W).

    The images are fed in batches of 1, 7 and 256.
    """
    answers, worst = answers_of(model, images), dict.fromkeys(model.outputs, 0.0)
    steps = rank_steps(model, answers)
    for batch in CHECKED_BATCHES:
        count = min(7 * batch, len(images))
        got = dict(zip(answers, run_session(path, images[:count], batch), strict=True))
        right = {name: a[:count] for name, a in answers.items()}
        apart = known_answers.differences(right, got, None if steps is None else steps[:count])
        worst = {name: max(worst[name], apart[name]) for name in worst}
    return worst


def rank_steps(model, answers):
    """By how much rounding changes a familiarity, (n,), for `answers_of` n images; None without familiarity.

    It exchanges an image with its neighbour in rank. Among m images of a class that is 1/(1 + m), or twice
    that beside the strangest of them, see `Familiarity.rank`.
    """
    familiarity = getattr(model, "familiarity", None)
    if familiarity is None:
        return None
    probabilities = answers["probabilities"]
    counts = familiarity.class_seen.bincount(minlength=probabilities.shape[1]).numpy()
    return 2 / (1 + counts[probabilities.argmax(axis=1)])


def require_agreement(apart, out):
    """UserError if any of the differences {output: largest} is more than float32 explains."""
    for name, value in apart.items():
        if not value <= TOLERANCES[name]:
            raise UserError(
                f"{out} not written: its {name} is {value:.1e} from PyTorch's, more than {TOLERANCES[name]:g}"
            )


def as_text(apart):
    return ", ".join(f"{name} within {value:.1e}" for name, value in apart.items()) + " of PyTorch"


def lower_precision(path, args, model, dataset, order, parts, images, metadata):
    """Rewrite the float32 file at `path` in --precision; UserError if that costs too much.

    `order` (classes,) is the place of each of the data's classes among those of the model.
    """
    rows = parts["validation"][:: max(1, len(parts["validation"]) // JUDGED_IMAGES)]
    labels = order[dataset.labels[rows]]
    say(f"judging float32 on {len(rows)} validation images")
    before = quality_of(path, dataset.images[rows], labels)
    calibration = some_images(dataset, parts["train"], max(CHECKED_BATCHES), args.seed)
    say(f"reducing to {args.precision}, and judging that")
    reduce_precision(path, args.precision, calibration, metadata)
    after = quality_of(path, dataset.images[rows], labels)
    apart = worst_differences(model, path, images)
    changes = ", ".join(f"{name} {before[name]:.5f} -> {after[name]:.5f}" for name in before)
    print(
        f"{size_and_speed(args.precision, path, images)}; {as_text(apart)}; {changes} on {len(rows)} validation images"
    )
    require_agreement({name: apart[name] for name in apart if name == "familiarity"}, args.out)
    for name in before:
        fall = before[name] - after[name]
        if not fall <= args.allowed_fall:
            raise UserError(f"{args.out} not written: its {name} falls by {fall:.4f}, more than "
                            f"--allowed-fall {args.allowed_fall}")  # fmt: skip


def quality_of(path, images, labels):
    """{"macro AUC", "accuracy"} of an exported classifier on raw images (n, H, W)."""
    probabilities, *_ = run_session(path, images[:, None])
    return {
        "macro AUC": float(np.mean(auc_by_class(probabilities, labels))),
        "accuracy": accuracy(probabilities, labels),
    }


def size_and_speed(precision, path, images):
    """A file's size, and the median milliseconds of a call with 1 and with 256 images here, as text."""
    session, _ = open_session(path, "cpu")
    medians = []
    for batch, repeats in ((1, 30), (256, 5)):
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            session.run(None, {"images": images[:batch]})
            seconds.append(time.perf_counter() - start)
        medians.append(1e3 * float(np.median(seconds[1:])))  # the first warms up
    size, (one, many) = path.stat().st_size / 1e6, medians
    return f"{precision}: {size:.2f} MB, {one:.2f} ms for 1 image, {many:.1f} ms for 256"


def store_known_answers(path, args, model, images, metadata):
    """Add some of the images (n, 1, H, W), and PyTorch's answers to them, to the file at `path`.

    These are images on which the file agrees with PyTorch, of every predicted class in turn. UserError
    if there are none. In a class of few validation images one rank is more than what is allowed: the
    familiarity of its images is not stored.
    """
    images = known_answers.storable(images)
    answers = answers_of(model, images)
    outputs = dict(zip(answers, run_session(path, images), strict=True))
    allowed, worst = known_answers.TOLERANCES[args.precision], np.zeros(len(images))
    steps = rank_steps(model, answers)
    if steps is not None:
        is_steady = steps <= 0.5 * allowed["familiarity"]
        if is_steady.any():
            worst[~is_steady] = np.inf
        else:
            del answers["familiarity"]
    for name, right in answers.items():
        each = [difference(*pair) / allowed[name] for pair in zip(outputs[name], right, strict=True)]
        worst = np.maximum(worst, each)
    agree = np.flatnonzero(worst <= 0.5)  # leaves the rest to other machines
    if not len(agree):
        raise UserError(f"{args.out} not written: {args.precision} changes the answers to all images")
    classes = answers["probabilities"][agree].argmax(axis=1) if "probabilities" in answers else 0 * agree
    turn = [np.sum(classes[:i] == kind) for i, kind in enumerate(classes)]
    chosen = agree[np.argsort(turn, kind="stable")]
    text = known_answers.text_of(images[chosen], {name: a[chosen] for name, a in answers.items()})
    save_proto(onnx.load(path), path, metadata | {known_answers.KEY: text})
    open_session(path, "cpu")  # compares the answers


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--weights", type=path_argument, nargs="+", required=True, metavar="PTH",
        help="classifier (of several, the one that is best on validation) or MAE",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE.onnx", help="file (or folder) to write"
    )
    parser.add_argument(
        "--what",
        choices=("classifier", "reconstruction", "mass", "sharpen", "huggingface"),
        default="classifier",
        help="classifier, residual maps of an MAE, masses of axions, sharp images, or a folder with an MAE for "
        "transformers",
    )
    parser.add_argument(
        "--precision", choices=("float32", "float16", "int8"), default="float32",
        help="of the weights (classifier only)",
    )  # fmt: skip
    options.add_update_argument(parser)
    group = parser.add_argument_group("checks")
    group.add_argument(
        "--allowed-fall", type=float, default=0.002, metavar="SHARE",
        help="largest accepted loss of macro AUC and of accuracy on validation in lower precision",
    )  # fmt: skip
    group.add_argument(
        "--data", type=path_argument, default=None, help="images to check with; default: the training data"
    )
    group.add_argument(
        "--cache-dir", type=path_argument, default=None, help="where a folder's packed copy is kept"
    )
    group.add_argument("--seed", type=int, default=0, help="which images are used to check")
    args = options.parsed(parser, argv)
    if args.what != "classifier" and args.precision != "float32":
        raise UserError(f"--precision {args.precision}: only a classifier is exported in it")
    if args.what == "huggingface":
        unused = ("update", "data", "cache_dir", "seed", "allowed_fall")
        options.refuse_unused(argv, unused, "only an ONNX file is compared, and says what it was made from")
    elif args.precision == "float32":
        options.refuse_unused(argv, ("allowed_fall",), "only --precision float16 or int8 may lose accuracy")
    if args.what != "classifier" and len(args.weights) > 1:
        raise UserError(f"--what {args.what} takes one file of weights")
    return args


def main(argv=None):
    export(parse_args(argv))


if __name__ == "__main__":
    run_main(main)
