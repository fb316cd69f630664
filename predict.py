"""Classify images with an exported model; needs the folder lib, onnxruntime and numpy only.

Reads .npy, .npz and (with astropy) FITS files, single images or stacks (N, H, W). Writes a CSV
with a row an image: file, the probability of each class, prediction. Files that cannot be read are
listed in <out>.errors.csv; then the exit code is 1, and the others are predicted. In folders,
hidden files do not count, and files of other kinds are named at the end. The CSV is UTF-8; bytes
of a file name that are not UTF-8 stand in it as escapes such as \\xff.
"""

import argparse
import collections
import contextlib
import csv
import functools
import heapq
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from lib.files import UserError, atomic_write, check_output, one_line, readable, run
from lib.onnxfile import open_classifier, open_maps, run_model
from lib.readers import forget_pages, is_hidden, read_fits, read_npy, read_npz

EXAMPLE = """examples:
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/ \\
      --sheet sheet.png --maps runs/reconstruction.onnx"""
FITS_SUFFIXES = (
    *(name + packed for name in (".fits", ".fit", ".fts") for packed in ("", ".gz", ".bz2")), ".fz"
)  # fmt: skip
SUFFIXES = (".npy", ".npz", *FITS_SUFFIXES)
PACKED_FILES = {"dataset.json", "images.npy", "labels.npy", "hashes.npy"}  # of a packed data set
BATCH_SIZE = 32  # small enough that a layer's outputs stay in a CPU's cache
NAMED_OTHERS = 5  # of the files that are not read


def find_files(paths):
    """The files to predict: those given, and the image files in folders at any depth.

    Returns (files, others, errors): `others` are the files in folders that hold no images, `errors`
    the folders that cannot be listed, [(folder, reason)]. A file that is reached twice under one
    name counts once. Raises UserError for a missing path.
    """
    files, others, errors = {}, {}, []
    real_folder = functools.cache(os.path.realpath)
    for path in paths:
        if path.is_dir():
            found = walk(path, errors)
        elif path.exists():
            found = [(path, True)]
        else:
            raise UserError(f"no file or folder {path}")
        for file, is_image in found:
            key = real_folder(file.parent), file.name
            (files if is_image else others).setdefault(key, file)
    return list(files.values()), [others[key] for key in others if key not in files], errors


def walk(root, errors):
    """The files below a folder, sorted: [(path, whether it may hold images)].

    Links to folders are followed. Each folder is listed once, under its own name where it has one
    below `root`. Hidden files and folders are left out.
    """
    found, listed = [], set()
    pending = collections.deque([root])  # real folders in front, links to folders behind them
    while pending:
        folder = pending.popleft()
        try:
            status = folder.stat()
            names = os.listdir(folder)
        except OSError as error:
            errors.append((str(folder), f"cannot list folder {folder}: {error.strerror}"))
            continue
        if (status.st_dev, status.st_ino) in listed:
            continue
        listed.add((status.st_dev, status.st_ino))
        no_images = PACKED_FILES - {"images.npy"} if PACKED_FILES.issubset(names) else ()
        for name in names:
            path = folder / name
            if is_hidden(name):
                continue
            if not os.path.isdir(path):
                regular = path.is_file() or not path.exists()  # a dangling link becomes an error
                is_image = name.lower().endswith(SUFFIXES) and name not in no_images
                found.append((path, is_image and regular))
            elif path.is_symlink():
                pending.append(path)
            else:
                pending.appendleft(path)
    return sorted(found)


def read_images(files, img_size, errors, others, crop=False):
    """Yield (name, image (H, H) float32) of every image in the files.

    What cannot be read is appended to `errors`, [(name, reason)]; arrays of a .npz that are no
    images are appended to `others`. `crop` takes the centre of larger images.
    """
    for path in files:
        try:
            arrays = read_arrays(path)
        except UserError as error:
            errors.append((str(path), str(error)))
            continue
        for name, array in arrays:
            if array is None:
                others.append(name)
                continue
            try:
                stack = fitting(name, array, img_size, crop)
            except UserError as error:
                errors.append((name, str(error)))
                continue
            for i in range(len(stack)):
                image_name = name if len(stack) == 1 else f"{name}[{i}]"
                with np.errstate(over="ignore"):
                    image = np.asarray(stack[i], dtype=np.float32)
                if np.isfinite(image).all():
                    yield image_name, image
                else:
                    errors.append((image_name, f"{image_name}: NaN or infinite pixels"))
                if i % 256 == 255:
                    forget_pages(array)


def read_arrays(path):
    """The arrays of one file, [(name, array, or None where it is no image)]; UserError."""
    lower = path.name.lower()
    if lower.endswith(FITS_SUFFIXES):
        return [(str(path), read_fits(path))]
    if not lower.endswith(".npz"):
        return [(str(path), read_npy(path))]
    arrays = [(f"{path}:{name}", array) for name, array in read_npz(path)]
    if all(array is None for _, array in arrays):
        raise UserError(f"{path}: there is no image in it")
    return arrays


def fitting(name, array, img_size, crop):
    """An array as (n, img_size, img_size); UserError, naming the remedy, if it does not fit.

    It may have a channel axis: (1, H, W), (H, W, 1), (n, 1, H, W) or (n, H, W, 1).
    """
    images = array
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    elif images.ndim in (3, 4) and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim == 2:
        images = images[None]
    if images.ndim == 3 and min(images.shape[1:]) >= img_size and len(images):
        height, width = images.shape[1:]
        if (height, width) != (img_size, img_size) and not crop:
            raise UserError(
                f"{name}: {height}×{width} pixels where the network takes "
                f"{img_size}×{img_size}; --crop takes the centre"
            )
        top, left = (height - img_size) // 2, (width - img_size) // 2
        return images[:, top : top + img_size, left : left + img_size]
    raise UserError(
        f"{name}: expected an image of {img_size}×{img_size} pixels or a stack of them, got "
        f"shape {array.shape}"
    )


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


def write_csv(path, rows):
    """Write the rows of an iterator; the file takes its name when all are written."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([readable(cell) for cell in row] for row in rows)


def check_outputs(outputs, inputs):
    """UserError if an output is an input or another output, or cannot be written.

    outputs : {what to call it: path}.
    """
    taken = {identity(path): "a file that is read" for path in inputs}
    for what, path in outputs.items():
        other = taken.setdefault(identity(path), what)
        if other != what:
            raise UserError(f"{what} {path} is also {other}: choose another name")
    for path in outputs.values():
        check_output(path)


def identity(path):
    """What two paths have in common if they name one file."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def predict(args):
    session, class_names, img_size = open_classifier(args.model, args.device)
    maps_of = open_maps(args.maps, img_size, args.device) if args.maps else None
    draw_sheet = sheet_drawer(args.sheet) if args.sheet else None
    files, others, errors = find_files(args.paths)
    if not files and not errors:
        raise UserError("no .npy, .npz or FITS files found under the given paths")
    outputs = {"--out": args.out, "the errors file": errors_path_of(args.out)}
    if args.sheet:
        outputs["--sheet"] = args.sheet
    models = [args.model, *([args.maps] if args.maps else [])]
    check_outputs(outputs, [*files, *models])
    ours = {identity(path) for path in (*outputs.values(), *models)}
    others = [str(path) for path in others if identity(path) not in ours]
    counts, shown = dict.fromkeys(class_names, 0), []

    def rows():
        yield ["file", *class_names, "prediction", *(["residual"] if maps_of else [])]
        images_read = read_images(files, img_size, errors, others, args.crop)
        for names, images in progress(batches_of(images_read, args.batch_size)):
            (probabilities,) = run_model(session, images, args.model)
            scores = maps_of(images)[1] if maps_of else [None] * len(names)
            for name, image, row, score in zip(names, images, probabilities, scores, strict=True):
                if not np.isfinite(row).all():
                    errors.append((name, f"{name}: too extreme pixels: no finite probabilities"))
                    continue
                prediction = class_names[int(row.argmax())]
                counts[prediction] += 1
                if args.sheet:
                    entry = (float(row.max()), sum(counts.values()), name, image.copy(), row)
                    keep_largest(shown, entry, args.sheet_images)
                line = [name, *(f"{p:.6f}" for p in row), prediction]
                yield line if score is None else [*line, f"{score:.6g}"]

    # All results are written before anything is printed.
    write_csv(args.out, rows())
    write_errors(args.out, errors)
    sheet_error = None
    if shown:
        sheet_error = try_to_draw(draw_sheet, args.sheet, shown, class_names, maps_of)

    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(one_line(f"{sum(counts.values())} images in {args.out}: {summary}"))
    if args.sheet and not sheet_error:
        print(one_line(f"the {len(shown)} most confident in {args.sheet}"
                       if shown else f"nothing to draw in {args.sheet}"))  # fmt: skip
    if others:
        print(one_line(not_read(others)), file=sys.stderr)
    if errors:
        print(one_line(f"{len(errors)} could not be read, see {errors_path_of(args.out)}; the "
                       f"first: {errors[0][1]}"), file=sys.stderr)  # fmt: skip
    if sheet_error:
        raise UserError(f"{sheet_error}; the predictions are in {args.out}")
    return 1 if errors else 0


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


def keep_largest(heap, entry, count):
    """Add `entry`, a tuple that begins with its sort key, to a heap of the `count` largest."""
    if len(heap) < count:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


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
    """Draw the sheet; returns None, or why that failed."""
    shown.sort(key=lambda entry: (-entry[0], entry[1]))
    images = np.stack([entry[3] for entry in shown])
    names = [one_line(os.path.basename(entry[2])).replace("$", r"\$") for entry in shown]
    classes = [one_line(name).replace("$", r"\$") for name in class_names]
    try:
        maps = maps_of(images)[0][:, 0] if maps_of else None
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks
        draw_sheet(path, images[:, 0], maps, names, [entry[4] for entry in shown], classes)
    except Exception as error:  # matplotlib raises many kinds
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return f"--sheet {path}: cannot be drawn: {reason}"
    return None


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument(
        "--crop", action="store_true", help="use the centre of images larger than the network's"
    )
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--maps", type=Path, metavar="FILE.onnx",
        help="file of export.py --what reconstruction: adds the column residual, an MAE's mean "
        "squared residual, and puts substructure maps on the sheet",
    )  # fmt: skip
    group.add_argument(
        "--sheet", type=Path, metavar="PNG", help="picture of the most confident predictions"
    )
    group.add_argument(
        "--sheet-images", type=int, default=40, help="images on the sheet (default: 40)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE,
        help=f"images at once (default: {BATCH_SIZE}; more may be faster on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)"
    )
    args = parser.parse_args(argv)
    for flag, value in (("batch-size", args.batch_size), ("sheet-images", args.sheet_images)):
        if value < 1:
            raise UserError(f"--{flag} must be at least 1, got {value}")
    return args


def main(argv=None):
    return predict(parse_args(argv))


if __name__ == "__main__":
    run(main)
