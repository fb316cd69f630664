"""Classify images with an exported model; needs onnxruntime and numpy only.

Writes a CSV with a row an image: file, the probability of each class, prediction. Files that cannot
be read are listed in <out>.errors.csv; then the exit code is 1, and the others are predicted.
"""

import argparse
import contextlib
import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from files import UserError, file_to_be, forget_pages, read_npy, run

EXAMPLE = "example: python predict.py --model runs/classifier.onnx --out predictions.csv cutouts/"


def open_model(path, device="auto"):
    """Returns (onnxruntime session, class names, image size) of a file that `export.py` left.

    Raises UserError if it is missing, no ONNX file, or lacks what the exporter writes.
    """
    if not path.is_file():
        raise UserError(f"no model at {path}: export one with export.py")
    providers = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    elif device == "cuda":
        raise UserError("--device cuda: this onnxruntime has no CUDA; use cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        # From bytes: weights in other files cannot be reached from there.
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
        metadata = session.get_modelmeta().custom_metadata_map
        (model_input,), (model_output,) = session.get_inputs(), session.get_outputs()
        class_names = json.loads(metadata["class_names"])
        _, channels, height, width = model_input.shape
        if model_input.type != "tensor(float)" or channels != 1 or height != width:
            raise ValueError("another input than raw images (batch, 1, H, H)")
        if not all(isinstance(n, str) for n in class_names) or not isinstance(height, int):
            raise ValueError("metadata of another kind")
        if model_output.shape[1] != len(class_names):
            raise ValueError("another number of outputs than class names")
    except Exception as error:  # onnxruntime raises many kinds for a broken or hostile file
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise UserError(f"{path} is no classifier of export.py: {reason}") from None
    return session, class_names, height


def find_files(paths):
    """Files as they are and, recursively, the .npy files of folders; UserError for none there."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob("*.npy"))
        elif path.exists():
            yield path
        else:
            raise UserError(f"no file or folder {path}")


def read_images(path, img_size):
    """Images of one file, (n, H, H) of its own number format; UserError if they do not fit."""
    images = read_npy(path)
    if images.ndim == 2:
        images = images[None]
    elif images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or images.shape[1:] != (img_size, img_size):
        raise UserError(
            f"{path}: expected an image of {img_size}×{img_size} pixels or a stack of them, got "
            f"shape {images.shape}"
        )
    return images


def batches_of(files, img_size, batch_size, errors):
    """Yield (names, images (b, 1, H, H) float32); what cannot be read is appended to `errors`."""
    names, images = [], []
    for path in files:
        try:
            stack = read_images(path, img_size)
        except UserError as error:
            errors.append((str(path), str(error)))
            continue
        for i in range(len(stack)):
            name = str(path) if len(stack) == 1 else f"{path}[{i}]"
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
    """Show a bar if tqdm happens to be installed; prediction itself does not need it."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(batches, unit="batch", disable=None)
    return batches


def write_csv(path, rows):
    """Write rows as they come; the file takes its name when all are there."""
    with file_to_be(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def predict(args):
    session, class_names, img_size = open_model(args.model, args.device)
    files = list(find_files(args.paths))
    if not files:
        raise UserError("no .npy files found under the given paths")
    errors, counts = [], dict.fromkeys(class_names, 0)
    model_input = session.get_inputs()[0].name

    def rows():
        yield ["file", *class_names, "prediction"]
        for names, images in progress(batches_of(files, img_size, args.batch_size, errors)):
            (probabilities,) = session.run(None, {model_input: images})
            for name, row in zip(names, probabilities, strict=True):
                prediction = class_names[int(row.argmax())]
                counts[prediction] += 1
                yield [name, *(f"{p:.6f}" for p in row), prediction]

    write_csv(args.out, rows())
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{sum(counts.values())} images in {args.out}: {summary}")

    errors_path = args.out.with_name(args.out.name + ".errors.csv")
    if not errors:
        errors_path.unlink(missing_ok=True)  # of an earlier call
        return 0
    write_csv(errors_path, [("file", "error"), *errors])
    print(f"{len(errors)} could not be read, see {errors_path}; the first: {errors[0][1]}",
          file=sys.stderr)  # fmt: skip
    return 1


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--batch-size", type=int, default=256, help="images at once (default: 256)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)"
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    return args


def main(argv=None):
    return predict(parse_args(argv))


if __name__ == "__main__":
    run(main)
