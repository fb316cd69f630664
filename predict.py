"""Classify images with an exported model; needs the folder lib, onnxruntime and numpy only.

Reads .npy, .npz and (with astropy) FITS files, single images or stacks (N, H, W). Writes a CSV
with a row an image: file, the probability of each class, prediction. Files that cannot be read are
listed in <out>.errors.csv; then the exit code is 1, and the others are predicted.
"""

import argparse
import contextlib
import csv
import heapq
import sys
from pathlib import Path

import numpy as np

from lib.files import UserError, atomic_write, path_argument, run
from lib.onnxfile import open_classifier, open_maps
from lib.readers import forget_pages, read_fits, read_npy, read_npz

EXAMPLE = """examples:
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/
  python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/ \\
      --sheet sheet.png --maps runs/reconstruction.onnx"""
FITS_SUFFIXES = (".fits", ".fit", ".fits.gz")
SUFFIXES = (".npy", ".npz", *FITS_SUFFIXES)
BATCH_SIZE = 32  # small enough that a layer's outputs stay in a CPU's cache


def find_files(paths):
    """The given files, and the image files in folders at any depth; UserError for a missing path."""
    for path in paths:
        if path.is_dir():
            found = (f for f in path.rglob("*") if f.name.lower().endswith(SUFFIXES))
            yield from sorted(f for f in found if f.is_file())
        elif path.exists():
            yield path
        else:
            raise UserError(f"no file or folder {path}")


def read_images(path, img_size, crop=False):
    """Images of one file: [(name, (n, H, H) in the file's number format)].

    `crop` takes the centre of larger images. UserError if the images do not fit.
    """
    lower = path.name.lower()
    if lower.endswith(FITS_SUFFIXES):
        arrays = [(str(path), read_fits(path))]
    elif lower.endswith(".npz"):
        arrays = [(f"{path}:{name}", array) for name, array in read_npz(path)]
    else:
        arrays = [(str(path), read_npy(path))]
    return [(name, fitting(name, array, img_size, crop)) for name, array in arrays]


def fitting(name, images, img_size, crop):
    """An array as (n, img_size, img_size); UserError, naming the remedy, if it does not fit."""
    if images.ndim == 2:
        images = images[None]
    elif images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim == 3:
        top, left = ((n - img_size) // 2 for n in images.shape[1:])
        if images.shape[1:] != (img_size, img_size) and min(top, left) >= 0:
            if not crop:
                raise UserError(
                    f"{name}: {images.shape[1]}×{images.shape[2]} pixels where the network takes "
                    f"{img_size}×{img_size}; --crop takes the centre"
                )
            return images[:, top : top + img_size, left : left + img_size]
    if images.ndim != 3 or images.shape[1:] != (img_size, img_size):
        raise UserError(
            f"{name}: expected an image of {img_size}×{img_size} pixels or a stack of them, got "
            f"shape {images.shape}"
        )
    return images


def batches_of(files, img_size, batch_size, errors, crop=False):
    """Yield (names, images (b, 1, H, W) float32); append what cannot be read to `errors`."""
    names, images = [], []
    for path in files:
        try:
            stacks = read_images(path, img_size, crop)
        except UserError as error:
            errors.append((str(path), str(error)))
            continue
        for stack_name, stack in stacks:
            for i in range(len(stack)):
                name = stack_name if len(stack) == 1 else f"{stack_name}[{i}]"
                with np.errstate(over="ignore"):
                    image = np.asarray(stack[i], dtype=np.float32)
                if not np.isfinite(image).all():
                    errors.append((name, f"{name}: NaN or infinite pixels"))
                    continue
                names.append(name)
                images.append(image)
                if len(names) == batch_size:
                    yield names, np.stack(images)[:, None]
                    names, images = [], []
                    forget_pages(stack)
    if names:
        yield names, np.stack(images)[:, None]


def progress(batches):
    """Show a bar if tqdm is installed; prediction works without it."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(batches, unit="batch", disable=None)
    return batches


def write_csv(path, rows):
    """Write the rows of an iterator; the file takes its name when all are written."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def predict(args):
    session, class_names, img_size = open_classifier(args.model, args.device)
    maps_of = open_maps(args.maps, img_size, args.device) if args.maps else None
    draw_sheet = sheet_drawer() if args.sheet else None
    files = list(find_files(args.paths))
    if not files:
        raise UserError(f"no {', '.join(SUFFIXES)} files found under the given paths")
    errors, counts, shown = [], dict.fromkeys(class_names, 0), []
    model_input = session.get_inputs()[0].name

    def rows():
        yield ["file", *class_names, "prediction", *(["residual"] if maps_of else [])]
        batches = batches_of(files, img_size, args.batch_size, errors, args.crop)
        for names, images in progress(batches):
            (probabilities,) = session.run(None, {model_input: images})
            scores = maps_of(images)[1] if maps_of else [None] * len(names)
            for name, image, row, score in zip(names, images, probabilities, scores, strict=True):
                prediction = class_names[int(row.argmax())]
                counts[prediction] += 1
                if args.sheet:
                    entry = (float(row.max()), sum(counts.values()), name, image.copy(), row)
                    keep_largest(shown, entry, args.sheet_images)
                line = [name, *(f"{p:.6f}" for p in row), prediction]
                yield line if score is None else [*line, f"{score:.6g}"]

    write_csv(args.out, rows())
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{sum(counts.values())} images in {args.out}: {summary}")
    if shown:
        shown.sort(key=lambda entry: (-entry[0], entry[1]))
        images = np.stack([entry[3] for entry in shown])
        maps = maps_of(images)[0][:, 0] if maps_of else None
        names = [Path(entry[2]).name for entry in shown]
        draw_sheet(args.sheet, images[:, 0], maps, names, [e[4] for e in shown], class_names)
        print(f"the {len(shown)} most confident in {args.sheet}")

    errors_path = args.out.with_name(args.out.name + ".errors.csv")
    if not errors:
        errors_path.unlink(missing_ok=True)  # an earlier call's
        return 0
    write_csv(errors_path, [("file", "error"), *errors])
    print(f"{len(errors)} could not be read, see {errors_path}; the first: {errors[0][1]}",
          file=sys.stderr)  # fmt: skip
    return 1


def keep_largest(heap, entry, count):
    """Add `entry`, a tuple that begins with its sort key, to a heap of the `count` largest."""
    if len(heap) < count:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def sheet_drawer():
    """`plots.contact_sheet`; imported here because only --sheet needs matplotlib."""
    try:
        from lib import plots
    except ImportError:
        raise UserError("--sheet needs matplotlib: pip install matplotlib") from None
    return plots.contact_sheet


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=path_argument, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--model", type=path_argument, required=True, metavar="FILE.onnx")
    parser.add_argument("--out", type=path_argument, required=True, metavar="CSV")
    parser.add_argument(
        "--crop", action="store_true", help="use the centre of images larger than the network's"
    )
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--maps", type=path_argument, metavar="FILE.onnx",
        help="file of export.py --what reconstruction: adds the column residual, an MAE's mean "
        "squared residual, and puts substructure maps on the sheet",
    )  # fmt: skip
    group.add_argument(
        "--sheet", type=path_argument, metavar="PNG", help="picture of the most confident predictions"
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
