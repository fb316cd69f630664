"""Classify cutouts without torch: python classify.py MODEL.onnx FILE ...

Reads what predict.py reads, with the same functions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.cutouts import read_images, within
from lib.files import UserError, one_line, run
from lib.onnxfile import open_classifier, pixel_range


def main():
    if len(sys.argv) < 3:
        raise UserError("give a model and files: python classify.py MODEL.onnx FILE ...")
    model, *files = map(Path, sys.argv[1:])
    session, class_names, img_size = open_classifier(model)
    errors, others = [], []
    images = within(pixel_range(session), read_images(files, img_size, errors, others), errors)
    for name, image in images:  # (64, 64), raw pixels
        (probabilities,) = session.run(["probabilities"], {"images": image[None, None]})
        row = probabilities[0]
        if not all(0 <= p <= 1 for p in row):
            errors.append((name, f"{name}: no finite probabilities"))
            continue
        values = " ".join(f"{n}={p:.6f}" for n, p in zip(class_names, row, strict=True))
        print(one_line(f"{name} {class_names[int(row.argmax())]} {values}"))
    for _, error in errors:
        print(one_line(f"error: {error}"), file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    run(main)
