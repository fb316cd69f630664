"""Classify cutouts without torch: python classify.py MODEL.onnx FILE ...

Reads what predict.py reads, with the same functions, and refuses the same images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.errors import UserError, one_line, run
from lib.images import read_images, within
from lib.onnxfile import (
    LEAST_FAMILIARITY,
    UNFAMILIAR,
    can_refuse,
    classify,
    is_unfamiliar,
    open_classifier,
    pixel_range,
    unguarded,
)


def main():
    if len(sys.argv) < 3:
        raise UserError("give a model and files: python classify.py MODEL.onnx FILE ...")
    model, *files = map(Path, sys.argv[1:])
    session, class_names, img_size = open_classifier(model)
    errors, others = [], []
    images = read_images(files, img_size, errors, others)
    guarded = can_refuse(session, LEAST_FAMILIARITY)
    if not guarded:
        print(one_line(unguarded(session, model, LEAST_FAMILIARITY)), file=sys.stderr)
        images = within(pixel_range(session), images, errors)
    for name, image in images:  # (64, 64), raw pixels
        (row,), familiarity = classify(session, image[None, None], model)
        if not all(0 <= p <= 1 for p in row):
            errors.append((name, f"{name}: no finite probabilities"))
            continue
        prediction = class_names[int(row.argmax())]
        values = [f"{n}={p:.6f}" for n, p in zip(class_names, row, strict=True)]
        if familiarity is not None:
            values.append(f"familiarity={familiarity[0]:.6f}")
            if guarded and is_unfamiliar(familiarity[0], LEAST_FAMILIARITY):
                prediction = UNFAMILIAR
        print(one_line(f"{name} {prediction} {' '.join(values)}"))
    for _, error in errors:
        print(one_line(f"error: {error}"), file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    run(main)
