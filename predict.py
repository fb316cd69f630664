"""Classify (or sharpen) images with an exported model; needs the folder lib, onnxruntime and numpy
only.

Reads .npy, .npz, FITS (with astropy) and grey PNG files (with matplotlib), single images or stacks
(N, H, W). Writes a CSV with one row per image: file, the probability of each class, prediction and,
if the model gives it, familiarity: the share of the validation images of the predicted class that
are at least as strange. An image that is stranger than nearly all of them is "unfamiliar": its
probabilities mean nothing. Files that cannot be read are listed in <out>.errors.csv; then the exit
code is 1, and the others are predicted. In folders, hidden files do not count, and files of other
kinds are named at the end. The CSV is UTF-8; bytes of file names that are not UTF-8 are written as
escapes such as \\xff, and a name that a spreadsheet would take for a formula has ./ in front, which
names the same file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, one_line, path_argument, run_main, starting, warn

starting(__name__)

import contextlib
import itertools
from typing import NamedTuple

import numpy as np

from lib import maps as saved_maps
from lib import options, reading, sheet, traits
from lib.files import PICTURE, check_outputs, identity, require_own, write_csv
from lib.guard import LEAST_FAMILIARITY, UNFAMILIAR, Guard
from lib.images import Said, find_files, read_placed_images
from lib.onnxfile import (
    classify, metadata_of, number_in, open_beside, open_classifier, open_sharpener, run_model,
)  # fmt: skip
from lib.outputs import STANDARD_OUTPUT, require_writable, write_table

EXAMPLE = """examples:
  python predict.py --out predictions.csv models/examples
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/ \\
      --sheet sheet.png --maps runs/reconstruction.onnx"""
MODELS = Path(__file__).resolve().parent / "models"
BATCH_SIZE = 32  # small enough that a layer's outputs stay in a CPU's cache
MOST_STRANGE = 200  # unfamiliar images that are looked at for what they have in common
NAMED_OTHERS = 5  # of the files that are not read


def batches_of(images, batch_size):
    """Collect (name, image, WCS) triples: yield (names, images (b, 1, H, W), WCS of each)."""
    size = min(batch_size, sys.maxsize)  # the most that islice takes
    while batch := list(itertools.islice(images, size)):
        names, pixels, skies = zip(*batch, strict=True)
        yield names, np.stack(pixels)[:, None], skies


def progress(answers, files, said):
    """Pass on the answers and, if tqdm is installed, count them on a terminal.

    The total is right for `files` of one image each; a file of more raises it when it is opened.
    """
    try:
        from tqdm import tqdm
    except ImportError:  # prediction works without it
        yield from answers
        return
    before = len(said.errors)
    with tqdm(total=files, unit="image", disable=None) as bar:
        for answer in answers:
            bar.total = files + sum(said.more) + before - len(said.errors)
            bar.update()
            yield answer


class Answer(NamedTuple):
    """What is said of one image (1, H, W).

    `familiarity`, `residual` and `residual_map` (H, W) are None without a source, `wcs` unless it is of a FITS file.
    mass : log10 of the axion's mass in eV, low and high; NaN for a prediction without one, () without a source.
    """

    name: str
    image: np.ndarray
    probabilities: np.ndarray
    prediction: str
    familiarity: float | None
    residual: float | None
    residual_map: np.ndarray | None = None
    wcs: dict | None = None
    mass: tuple = ()


def predict(args):
    session, class_names, img_size = open_classifier(args.model, args.device)
    guard = Guard.of(session, args.least_familiarity)
    maps = open_beside("--maps", args.maps, session, img_size, args.device)
    masses = open_beside("--mass", args.mass, session, img_size, args.device)
    choice = sheet_choice(args, guard) if args.sheet else None
    files, said, batches = inputs_of(args, session, img_size, guard, maps)
    others, errors = said.others, said.errors
    answers = answers_to(batches, args.model, session, class_names, guard, maps, masses, errors)
    summary = Summary([*class_names, *([UNFAMILIAR] if guard.can_refuse else [])], choice)
    header = ["file", *class_names, "prediction", *(["familiarity"] if guard.calibration is not None else []),
              *(["residual"] if maps else []), *(("log10_mass", "low", "high") if masses else [])]  # fmt: skip

    # All results are written before anything is printed.
    with saved_maps.saving(args.save_maps, maps.sigma) if args.save_maps else contextlib.nullcontext() as save:
        write_table(args.out, rows_of(header, progress(answers, len(files), said), summary, save))
    write_errors(args.out, errors)
    shown, sheet_error = choice.answers() if choice else [], None
    if shown:
        sheet_error = sheet.draw(
            args.sheet, shown, class_names, maps and maps.sigma, number_in(session, "pixel_scale")
        )

    counts, total = summary.counts, sum(summary.counts.values())
    where = "" if args.out == STANDARD_OUTPUT else f" in {args.out}"
    each = ", ".join(f"{count} {name}" for name, count in counts.items())
    say(args, f"{total} {'image' if total == 1 else 'images'}{where}: {each}")
    if args.sheet and not sheet_error:
        say(args, f"{len(shown)} of them in {args.sheet}, {sheet.ORDERS[args.sheet_by]}"
                  if shown else f"nothing to draw in {args.sheet}")  # fmt: skip
    if args.save_maps:
        say(args, f"{total} substructure maps in {args.save_maps}, {summary.with_wcs} of them with a WCS")
    lines = [*(source.doubt for source in (maps, masses) if source and source.doubt), *said.about_notes()]
    if not guard.can_refuse:
        lines.append(guard.weakness(args.model))
    elif counts[UNFAMILIAR]:
        reference, least = traits.reference_in(metadata_of(session)), args.least_familiarity
        unit_known = (args.scale, args.zero_point) != (None, None) or any(
            kind == "unit" for kind, *_ in said.notes
        )
        chance, advice = by_chance(counts[UNFAMILIAR], total, least), []
        if reference is not None:
            advice = traits.advice(np.array(summary.strange), reference, unit_known, chance)
        lines.append(about_unfamiliar(counts[UNFAMILIAR], total, least, advice))
    for line in (*lines, *about_files(args, others, errors)):
        warn(line)
    if sheet_error:
        raise UserError(f"{sheet_error}; the predictions are in {args.out}")
    return 1 if errors else 0


def inputs_of(args, session, img_size, guard, maps=None):
    """(files, what there is to `Said` of them, batches of their images that the guard takes as readable).

    Raises UserError if there are none, or if an output is one of them.
    """
    files, others, errors = find_files(reading.paths_named(args.paths))
    if not files and not errors:
        raise UserError("no .npy, .npz, FITS or PNG files found under the given paths")
    said = Said(errors, check_paths(args, files, others, maps), [], [])
    images = read_placed_images(files, img_size, said, reading.how_to_read(args, session))
    return files, said, batches_of(guard.readable(images, errors), args.batch_size)


def sharpen(args):
    """Write the sharp image of each coarse one, and a table of their files and rms errors."""
    session, img_size = open_sharpener(args.model, args.device)
    files, said, batches = inputs_of(args, session, img_size, Guard.of(session))
    rows = []
    with saved_maps.saving_sharp(args.sharpened) as save:
        answers = sharpened(batches, session, args.model, said.errors)
        for name, sharp, error in progress(answers, len(files), said):
            rows.append([name, save(name, sharp), f"{error:.6g}"])
        write_table(args.out, [["file", "sharpened", "rms_error"], *rows])
    write_errors(args.out, said.errors)
    say(args, f"{len(rows)} sharp images in {args.sharpened}, their rms errors in {args.out}")
    for line in (*said.about_notes(), *about_files(args, said.others, said.errors)):
        warn(line)
    return 1 if said.errors else 0


def sharpened(batches, session, path, errors):
    """Yield (name, sharp image (H, H), its rms error); images without a finite answer go to `errors` instead."""
    for names, images, _ in batches:
        for name, sharp, error in zip(names, *run_model(session, images, path), strict=True):
            if np.isfinite(sharp).all() and np.isfinite(error):
                yield name, sharp[0], error
            else:
                errors.append((name, f"{name}: the network gives no finite answer for such pixels"))


def say(args, line):
    """Print a line, on stderr if the table is on stdout."""
    print(one_line(line), file=sys.stderr if args.out == STANDARD_OUTPUT else sys.stdout)


def sheet_choice(args, guard):
    """The `sheet.Choice` that the options ask for; UserError if it cannot be made or drawn."""
    sheet.require_drawable(args.sheet)
    if args.sheet_by == "substructure" and not args.maps:
        raise UserError("--sheet-by substructure needs --maps")
    if args.sheet_by == "familiarity" and guard.calibration is None:
        raise UserError(f"--sheet-by familiarity: {args.model} gives none")
    return sheet.Choice(args.sheet_by, args.sheet_images)


def check_paths(args, files, others, maps):
    """Those of `others` that this call neither reads nor writes; UserError if an output is an input."""
    require_writable(args.out)
    outputs = {}
    if args.out != STANDARD_OUTPUT:
        outputs = {"--out": args.out, "the errors file": errors_path_of(args.out)}
        require_own(errors_path_of(args.out), rb"\Afile,error\s")
    if args.sheet:
        outputs["--sheet"] = args.sheet
    models = [path for path in (args.model, args.maps, args.mass) if path]
    check_outputs(outputs, [*files, *models])
    if args.sheet:
        require_own(args.sheet, PICTURE)
    if args.save_maps:
        saved_maps.require_usable(args.save_maps, maps, [*files, *models, *outputs.values()])
    if args.sharpened:
        saved_maps.require_apart("--sharpened", args.sharpened, [*files, *models, *outputs.values()])
        require_own(args.sharpened / saved_maps.SHARP_INDEX, rb"\Afile,sharpened\s")
    ours = {identity(path) for path in (*outputs.values(), *models)}
    return [str(path) for path in others if identity(path) not in ours]


def answers_to(batches, path, session, class_names, guard, maps, masses, errors):
    """The `Answer` to each image of the batches, by the classifier at `path`.

    Images without finite probabilities are appended to `errors` instead.
    """
    for names, images, skies in batches:
        probabilities, familiarity = classify(session, images, path)
        predicted = probabilities.argmax(axis=1)
        answered = guard.answers(predicted, familiarity)
        residual_maps, residuals = maps.of(images) if maps else (None, None)
        of_axions = np.stack(masses.of(images), axis=1) if masses else np.empty((len(images), 0))
        for i, name in enumerate(names):
            if not np.isfinite(probabilities[i]).all():
                errors.append((name, f"{name}: the network gives no finite probabilities for such pixels"))
                continue
            prediction = class_names[predicted[i]] if answered[i] else UNFAMILIAR
            has_mass = masses and prediction in masses.classes
            yield Answer(
                name, images[i], probabilities[i], prediction,
                None if familiarity is None else familiarity[i],
                None if residuals is None else residuals[i],
                None if residual_maps is None else residual_maps[i, 0], skies[i],
                tuple(of_axions[i] if has_mass else np.full_like(of_axions[i], np.nan)),
            )  # fmt: skip


class Summary:
    """What is said at the end of all answers.

    counts : how many images have each of the `predictions`.
    strange : `traits.traits_of` of the first MOST_STRANGE unfamiliar images.
    with_wcs : how many images have a WCS.
    choice : the `sheet.Choice` that is offered all answers, or None.
    """

    def __init__(self, predictions, choice):
        self.counts, self.strange, self.with_wcs, self.choice = dict.fromkeys(predictions, 0), [], 0, choice

    def add(self, answer):
        self.counts[answer.prediction] += 1
        self.with_wcs += bool(answer.wcs)
        if answer.prediction == UNFAMILIAR and len(self.strange) < MOST_STRANGE:
            self.strange.append(traits.traits_of(answer.image)[0])
        if self.choice:
            self.choice.offer(answer)


def rows_of(header, answers, summary, save):
    """The rows of the CSV; each answer is added to the `summary`, and its map saved by `save`, if that is not None."""
    yield header
    for answer in answers:
        summary.add(answer)
        if save:
            save(answer)
        row = [answer.name, *(f"{p:.6f}" for p in answer.probabilities), answer.prediction]
        row += [] if answer.familiarity is None else [f"{answer.familiarity:.6f}"]
        row += [] if answer.residual is None else [f"{answer.residual:.6g}"]
        yield row + [f"{number:.4f}" for number in answer.mass]


def about_files(args, others, errors):
    """Lines on files that were not read, with the names of the first."""
    if others:
        names = ", ".join(others[:NAMED_OTHERS]) + (", ..." if len(others) > NAMED_OTHERS else "")
        yield f"{len(others)} other {'file was' if len(others) == 1 else 'files were'} not read: {names}"
    if errors and args.out == STANDARD_OUTPUT:
        yield from (f"not read: {reason}" for _, reason in errors)
    elif errors:
        first, where = errors[0][1], errors_path_of(args.out)
        yield f"{len(errors)} could not be read, see {where}; the first: {first}"


def by_chance(count, total, least):
    """Whether so many of ordinary images may be unfamiliar."""
    return count <= 3 * least * total


def about_unfamiliar(count, total, least, advice):
    """One line on images that are unlike the training images: what is measurably so, else what may be."""
    are = "is" if count == 1 else "are"
    line = f"{count} of {total} images {are} unlike the training images: the probabilities mean nothing. "
    if by_chance(count, total, least):
        line += f"Of images like the training images, {100 * least:g} % count as unlike them, too. "
    if advice:
        return f"{line}In the median image {'; '.join(advice)}{'' if advice[-1].endswith('?') else '.'}"
    return (
        f"{line}Another unit? Use --scale. Noise, PSF, orientation, centre, another lens? Train with --augment "
        "halfturn,noise,shift,rotate (see docs/training.md)."
    )


def errors_path_of(out):
    return out.with_name(out.name + ".errors.csv")


def write_errors(out, errors):
    """Write <out>.errors.csv, or remove that of an earlier call; nothing beside standard output."""
    if out == STANDARD_OUTPUT:
        return
    if errors:
        write_csv(errors_path_of(out), [("file", "error"), *errors])
    else:
        errors_path_of(out).unlink(missing_ok=True)


def add_other_tasks(parser):
    """The options for files of export.py that hold no classifier."""
    parser.add_argument(
        "--mass", type=path_argument, metavar="FILE.onnx",
        help="file of export.py --what mass: adds log10 of the axion's mass in eV, and low and high, which "
        "hold it in 90 of 100 images; nan where another class, or none, is predicted",
    )  # fmt: skip
    parser.add_argument(
        "--sharpened", type=path_argument, metavar="FOLDER",
        help="sharpen images in place of classifying them: --model is a file of export.py --what sharpen, the folder "
        "gets an .npy for each image, and --out its name and an estimate of its rms error",
    )  # fmt: skip


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--model", type=path_argument, default=None, metavar="FILE.onnx",
        help="classifier that export.py wrote (default: models/classifier.onnx, with the maps of "
        "models/reconstruction.onnx)",
    )  # fmt: skip
    parser.add_argument("--out", type=path_argument, required=True, metavar="CSV",
                        help="table to write: .csv, .fits or .vot; - is standard output")  # fmt: skip
    reading.add_arguments(parser)
    parser.add_argument(
        "--least-familiarity", type=float, default=LEAST_FAMILIARITY, metavar="SHARE",
        help=f'predict "{UNFAMILIAR}" for images of less familiarity; it is also the share of '
        "ordinary images that get this prediction; 0: for none",
    )  # fmt: skip
    add_other_tasks(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--maps", type=path_argument, metavar="FILE.onnx",
        help="file of export.py --what reconstruction: adds the column residual, what an MAE "
        "leaves unexplained of an image, and puts substructure maps on the sheet",
    )  # fmt: skip
    group.add_argument(
        "--save-maps", type=path_argument, metavar="FOLDER",
        help="folder for the substructure map of every image, in sigma of smooth lenses: FITS with the image's WCS "
        "for FITS files, .npy for others, and maps.csv, which says which is whose",
    )  # fmt: skip
    group.add_argument("--sheet", type=path_argument, metavar="PNG", help="picture of some predictions")
    group.add_argument(
        "--sheet-by", choices=tuple(sheet.ORDERS), default="prediction",
        help="which are on it: " + "; ".join(f"{name}: {text}" for name, text in sheet.ORDERS.items()),
    )  # fmt: skip
    group.add_argument("--sheet-images", type=int, default=40, help="images on the sheet")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE,
        help="images at once; more may be faster on a GPU",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what computes")
    args = options.parsed(parser, argv)
    reading.refuse_unused(args, argv)
    if not args.sheet:
        options.refuse_unused(argv, ("sheet_images", "sheet_by"), "there is no --sheet")
    if args.sharpened:
        unused = ("maps", "save_maps", "mass", "sheet", "least_familiarity")
        options.refuse_unused(argv, unused, "--sharpened classifies no images")
        if args.model is None:
            raise UserError("--sharpened needs --model, a file of export.py --what sharpen")
    if args.model is None:
        if args.maps is None and (MODELS / "reconstruction.onnx").exists():
            args.maps = MODELS / "reconstruction.onnx"
        args.model = MODELS / "classifier.onnx"
    return args


def main(argv=None):
    args = parse_args(argv)
    return sharpen(args) if args.sharpened else predict(args)


if __name__ == "__main__":
    run_main(main)
