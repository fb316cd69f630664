"""Classify cutouts without torch: python classify.py MODEL.onnx FILE ...

Reads what predict.py reads, with the same functions, and refuses the same images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.errors import UserError, one_line, run_main, starting

starting(__name__)

from lib.guard import UNFAMILIAR, Guard
from lib.images import How, Said, read_images
from lib.onnxfile import classify, number_in, open_classifier


def main():
    if len(sys.argv) < 3:
        raise UserError("give a model and files: python classify.py MODEL.onnx FILE ...")
    model, *files = map(Path, sys.argv[1:])
    session, class_names, img_size = open_classifier(model)
    guard, said = Guard.of(session), Said([], [], [], [])
    if not guard.can_refuse:
        print(one_line(guard.weakness(model)), file=sys.stderr)
    how = How(zero_point=number_in(session, "zero_point"))  # FITS headers say their unit
    images = guard.readable(read_images(files, img_size, said, how), said.errors)
    for name, image in images:  # (64, 64), raw pixels
        probabilities, familiarity = classify(session, image[None, None], model)
        if not all(0 <= p <= 1 for p in probabilities[0]):
            said.errors.append((name, f"{name}: no finite probabilities"))
            continue
        predicted = probabilities.argmax(axis=1)
        (answered,) = guard.answers(predicted, familiarity)
        prediction = class_names[predicted[0]] if answered else UNFAMILIAR
        values = [f"{n}={p:.6f}" for n, p in zip(class_names, probabilities[0], strict=True)]
        if familiarity is not None:
            values.append(f"familiarity={familiarity[0]:.6f}")
        print(one_line(f"{name} {prediction} {' '.join(values)}"))
    for line in said.about_notes():
        print(one_line(line), file=sys.stderr)
    for _, error in said.errors:
        print(one_line(f"error: {error}"), file=sys.stderr)
    return 1 if said.errors else 0


if __name__ == "__main__":
    run_main(main)
