"""Classify images with an exported model; needs the folder lib, onnxruntime and numpy only.

Reads .npy, .npz and (with astropy) FITS files, single images or stacks (N, H, W). Writes a CSV
with one row per image: file, the probability of each class, prediction and, if the model gives it,
familiarity: the share of validation images that are at least as strange. An image that is stranger
than nearly all of them is "unfamiliar": its probabilities mean nothing. Files that cannot be read
are listed in <out>.errors.csv; then the exit code is 1, and the others are predicted. In folders,
hidden files do not count, and files of other kinds are named at the end. The CSV is UTF-8; bytes
of file names that are not UTF-8 are written as escapes such as \\xff, and a name that a spreadsheet
would take for a formula has ./ in front, which names the same file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, one_line, path_argument, reason_of, run_main, starting

starting(__name__)

import contextlib
import heapq
import os
import warnings
from typing import NamedTuple

import numpy as np

from lib import options
from lib.files import PICTURE, check_outputs, identity, require_own, write_csv
from lib.guard import LEAST_FAMILIARITY, UNFAMILIAR, Guard
from lib.images import SUFFIXES, find_files, read_images
from lib.onnxfile import classify, open_classifier, open_maps

EXAMPLE = """examples:
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/ \\
      --sheet sheet.png --maps runs/reconstruction.onnx"""
BATCH_SIZE = 32  # small enough that a layer's outputs stay in a CPU's cache
NAMED_OTHERS = 5  # of the files that are not read


def batches_of(images, batch_size):
    """Collect (name, image) pairs: yield (names, images (b, 1, H, W))."""
    names, batch = [], []
    for name, image in images:
        names.append(name)
        batch.append(image)
        if len(names) == batch_size:
            yield names, np.stack(batch)[:, None]
            names, batch = [], []
    if names:
        yield names, np.stack(batch)[:, None]


def progress(batches):
    """Show a bar if tqdm is installed; prediction works without it."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(batches, unit="batch", disable=None)
    return batches


class Answer(NamedTuple):
    """What is said of one image (1, H, W); `familiarity` and `residual` are None without a source."""

    name: str
    image: np.ndarray
    probabilities: np.ndarray
    prediction: str
    familiarity: float | None
    residual: float | None


def predict(args):
    session, class_names, img_size = open_classifier(args.model, args.device)
    guard = Guard.of(session, args.least_familiarity)
    maps_of = open_maps(args.maps, img_size, args.device) if args.maps else None
    draw_sheet = sheet_drawer(args.sheet) if args.sheet else None
    files, others, errors = find_files(args.paths)
    if not files and not errors:
        raise UserError("no .npy, .npz or FITS files found under the given paths")
    others = check_paths(args, files, others)

    images = scaled(read_images(files, img_size, errors, others, args.crop), args.scale)
    batches = progress(batches_of(guard.readable(images, errors), args.batch_size))
    answers = answers_to(batches, args.model, session, class_names, guard, maps_of, errors)
    counts = dict.fromkeys([*class_names, *([UNFAMILIAR] if guard.can_refuse else [])], 0)
    shown = []
    answers = watched(answers, counts, shown, args.sheet_images if args.sheet else 0)
    header = ["file", *class_names, "prediction", *(["familiarity"] if guard.calibration is not None else []),
              *(["residual"] if maps_of else [])]  # fmt: skip

    # All results are written before anything is printed.
    write_csv(args.out, rows_of(header, answers))
    write_errors(args.out, errors)
    sheet_error = None
    if shown:
        sheet_error = try_to_draw(draw_sheet, args.sheet, shown, class_names, maps_of)

    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(one_line(f"{sum(counts.values())} images in {args.out}: {summary}"))
    if args.sheet and not sheet_error:
        print(one_line(f"the {len(shown)} most confident in {args.sheet}"
                       if shown else f"nothing to draw in {args.sheet}"))  # fmt: skip
    for line in warnings_of(args, guard, counts, others, errors):
        print(one_line(line), file=sys.stderr)
    if sheet_error:
        raise UserError(f"{sheet_error}; the predictions are in {args.out}")
    return 1 if errors else 0


def check_paths(args, files, others):
    """Those of `others` that this call neither reads nor writes; UserError if an output is an input."""
    if args.out.name.lower().endswith((*SUFFIXES, ".pth", ".onnx")):
        raise UserError(f"--out {args.out} has the suffix of another kind of file: name a .csv file")
    outputs = {"--out": args.out, "the errors file": errors_path_of(args.out)}
    if args.sheet:
        outputs["--sheet"] = args.sheet
    models = [args.model, *([args.maps] if args.maps else [])]
    check_outputs(outputs, [*files, *models])
    require_own(args.out, rb"\Afile,.*\bprediction\b")
    require_own(outputs["the errors file"], rb"\Afile,error\s")
    if args.sheet:
        require_own(args.sheet, PICTURE)
    ours = {identity(path) for path in (*outputs.values(), *models)}
    return [str(path) for path in others if identity(path) not in ours]


def answers_to(batches, path, session, class_names, guard, maps_of, errors):
    """The `Answer` to each image of the batches, by the classifier at `path`.

    Images without finite probabilities are appended to `errors` instead.
    """
    for names, images in batches:
        probabilities, familiarity = classify(session, images, path)
        predicted = probabilities.argmax(axis=1)
        answered = guard.answers(predicted, familiarity)
        residuals = maps_of(images)[1] if maps_of else None
        for i, name in enumerate(names):
            if not np.isfinite(probabilities[i]).all():
                reason = "the network gives no finite probabilities for such pixels"
                errors.append((name, f"{name}: {reason}"))
                continue
            yield Answer(
                name, images[i], probabilities[i], class_names[predicted[i]] if answered[i] else UNFAMILIAR,
                None if familiarity is None else familiarity[i],
                None if residuals is None else residuals[i],
            )  # fmt: skip


def watched(answers, counts, shown, most):
    """Pass on the answers; count the predictions in `counts`, and keep the most confident in `shown`.

    `shown` becomes a heap of (rank, `Answer`), at most `most` of them; of equals the first is kept.
    """
    for number, answer in enumerate(answers):
        counts[answer.prediction] += 1
        rank = (answer.prediction != UNFAMILIAR, float(answer.probabilities.max()), -number)
        if most and (len(shown) < most or rank > shown[0][0]):
            kept = answer._replace(image=answer.image.copy())  # not the whole batch
            heapq.heappush(shown, (rank, kept))
            if len(shown) > most:
                heapq.heappop(shown)
        yield answer


def rows_of(header, answers):
    """The rows of the CSV."""
    yield header
    for answer in answers:
        row = [answer.name, *(f"{p:.6f}" for p in answer.probabilities), answer.prediction]
        row += [] if answer.familiarity is None else [f"{answer.familiarity:.6f}"]
        yield row + ([] if answer.residual is None else [f"{answer.residual:.6g}"])


def warnings_of(args, guard, counts, others, errors):
    """What a user should know of the predictions, a line each."""
    if not guard.can_refuse:
        yield guard.weakness(args.model)
    elif counts[UNFAMILIAR]:
        yield about_unfamiliar(counts[UNFAMILIAR], sum(counts.values()), args.least_familiarity)
    if others:
        yield not_read(others)
    if errors:
        first, where = errors[0][1], errors_path_of(args.out)
        yield f"{len(errors)} could not be read, see {where}; the first: {first}"


def scaled(images, factor):
    """The (name, image) pairs with their pixels multiplied by `factor`."""
    for name, image in images:
        with np.errstate(over="ignore", invalid="ignore"):  # the network makes no sense of it
            image = image * factor
        yield name, image


def about_unfamiliar(count, total, least):
    """One line on images that are unlike the training images, with the remedies."""
    are = "is" if count == 1 else "are"
    line = (
        f"{count} of {total} images {are} unlike the training images: the probabilities mean "
        "nothing. Another unit? Use --scale. Noise, another orientation or another centre? Train "
        "with --augment halfturn,noise,shift,rotate (see docs/training.md)."
    )
    if count <= 3 * least * total:
        line += f" Of images like the training images, {100 * least:g} % count as unlike them, too."
    return line


def errors_path_of(out):
    return out.with_name(out.name + ".errors.csv")


def write_errors(out, errors):
    """Write <out>.errors.csv, or remove that of an earlier call."""
    if errors:
        write_csv(errors_path_of(out), [("file", "error"), *errors])
    else:
        errors_path_of(out).unlink(missing_ok=True)


def not_read(others):
    """One line that counts the files that are no images and names the first of them."""
    names = ", ".join(others[:NAMED_OTHERS]) + (", ..." if len(others) > NAMED_OTHERS else "")
    if len(others) == 1:
        return f"1 other file was not read: {names}"
    return f"{len(others)} other files were not read: {names}"


def sheet_drawer(path):
    """`plots.contact_sheet`; imported here because only --sheet needs matplotlib.

    Raises UserError if there is no matplotlib, or if it draws no files with this suffix.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase

        from lib import plots
    except ImportError:
        raise UserError("--sheet needs matplotlib: pip install matplotlib") from None
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--sheet {path}: give it the suffix of a picture, such as .png")
    return plots.contact_sheet


def try_to_draw(draw_sheet, path, shown, class_names, maps_of):
    """Draw the sheet of `watched` answers; returns None, or why that failed."""
    answers = [answer for _, answer in sorted(shown, key=lambda entry: entry[0], reverse=True)]
    images = np.stack([answer.image for answer in answers])
    names = [os.path.basename(answer.name) for answer in answers]
    rows = [answer.probabilities for answer in answers]
    predictions = [answer.prediction for answer in answers]
    try:
        maps = maps_of(images)[0][:, 0] if maps_of else None
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks
        draw_sheet(path, images[:, 0], maps, names, rows, class_names, predictions)
    except Exception as error:  # matplotlib raises many kinds
        reason = reason_of(error)
        return f"--sheet {path}: cannot be drawn: {reason}"
    return None


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument("paths", type=path_argument, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--model", type=path_argument, required=True, metavar="FILE.onnx",
                        help="classifier that export.py wrote")  # fmt: skip
    parser.add_argument("--out", type=path_argument, required=True, metavar="CSV",
                        help="table to write")  # fmt: skip
    parser.add_argument(
        "--crop", action="store_true", help="use the centre of images larger than the network's"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="FACTOR",
        help="multiply all pixels by it: for images in another unit than the training images "
        "(0.00392 for 1/255)",
    )  # fmt: skip
    parser.add_argument(
        "--least-familiarity", type=float, default=LEAST_FAMILIARITY, metavar="SHARE",
        help=f'predict "{UNFAMILIAR}" for images of less familiarity; it is also the share of '
        "ordinary images that get this prediction; 0: for none",
    )  # fmt: skip
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--maps", type=path_argument, metavar="FILE.onnx",
        help="file of export.py --what reconstruction: adds the column residual, what an MAE "
        "leaves unexplained of an image, and puts substructure maps on the sheet",
    )  # fmt: skip
    group.add_argument(
        "--sheet", type=path_argument, metavar="PNG", help="picture of the most confident predictions"
    )
    group.add_argument(
        "--sheet-images", type=int, default=40, help="images on the sheet"
    )
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE,
        help="images at once; more may be faster on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="what computes"
    )
    args = options.parsed(parser, argv)
    if not args.sheet:
        options.refuse_unused(argv, ("sheet_images",), "there is no --sheet")
    return args


def main(argv=None):
    return predict(parse_args(argv))


if __name__ == "__main__":
    run_main(main)
