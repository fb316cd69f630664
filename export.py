"""Export a classifier to one ONNX file: raw images in, probabilities out; nothing else needed.

The intensity transform is in the graph and the class names are in the metadata. The file is
compared with PyTorch on real images before it takes its name; one that differs is not left.
"""

import argparse
import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import data
import train
import weights
from files import UserError, file_to_be, run, sha256_of

EXAMPLE = "example: python export.py --weights runs/full/vit-mae-classifier-wt.pth --out lens.onnx"
OPSET = 18
TOLERANCE = 1e-4  # on probabilities
CHECKED_BATCHES = (1, 7, 256)


class Probabilities(nn.Module):
    """Raw images (B, 1, H, W) to class probabilities (B, classes)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier(images).softmax(dim=1)


def write_onnx(model, path, metadata):
    """Export `model`, a `Probabilities`, with text metadata {key: value}, weights inside."""
    size = model.classifier.img_size
    example = torch.zeros(2, 1, size, size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # about its own internals, nothing that a user can mend
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["images"], output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        )  # fmt: skip
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


def largest_difference(model, path, images):
    """Largest |probability(onnxruntime) - probability(PyTorch)| over `images` (256, 1, H, W).

    The images are fed in batches of 1, 7 and 256; each must agree.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    worst = 0.0
    for batch in CHECKED_BATCHES:
        for start in range(0, 7 * batch if batch < 256 else 256, batch):
            part = slice(start, start + batch)
            (got,) = session.run(None, {"images": images[part]})
            difference = np.abs(got - expected[part]).max()
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf)))
    return worst


def real_images(args, content, model):
    """256 images (256, 1, H, W) of the validation split, repeated if there are fewer."""
    where = args.data or content["run"].get("data")
    if not where or not Path(where).is_dir():
        raise UserError(f"the training data ({where}) is not here: name images with --data")
    dataset = data.load(where, args.cache_dir)
    if dataset.img_size != model.img_size:
        raise UserError(f"{where} has images of {dataset.img_size} pixels, not {model.img_size}")
    rows = np.random.default_rng(args.seed).permutation(data.split(dataset)["validation"])
    return dataset.images[np.resize(rows, max(CHECKED_BATCHES))][:, None]


def best_on_validation(loaded):
    """Of {path: (model, content)} the path with the best validation macro AUC, then lowest loss."""

    def rank(path):
        best = loaded[path][1]["run"].get("best")
        if not isinstance(best, dict):
            raise UserError(f"{path} does not say how it did on validation: train anew")
        return best.get("validation_macro_auc", 0.0), -best.get("validation_loss", np.inf)

    return max(loaded, key=rank)


def export(args):
    loaded = {path: weights.load_classifier(path) for path in args.weights}
    path = best_on_validation(loaded) if len(loaded) > 1 else args.weights[0]
    classifier, content = loaded[path]
    model = Probabilities(classifier).eval()
    images = real_images(args, content, classifier)
    metadata = {
        "class_names": json.dumps(content["class_names"]),
        "img_size": str(classifier.img_size),
        "transform": json.dumps(content["config"]["transform"]),
        "weights_sha256": sha256_of(path),
        "run": json.dumps(content["run"]),
    }
    with file_to_be(args.out) as temporary:
        write_onnx(model, temporary, metadata)
        difference = largest_difference(model, temporary, images)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{args.out} not written: its probabilities differ by {difference:.1e} from "
                f"PyTorch's, more than {TOLERANCE:.0e}"
            )
    size = args.out.stat().st_size / 1e6
    print(f"{path} -> {args.out}: {size:.1f} MB, within {difference:.1e} of PyTorch")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=train.HelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="PTH",
        help="classifier; of several, the best on validation is exported",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.onnx", help="file to write"
    )
    parser.add_argument(
        "--data", type=Path, default=None, help="images to check with; default: the training data"
    )
    parser.add_argument("--cache-dir", type=Path, default=None, help="see data.py")
    parser.add_argument("--seed", type=int, default=0, help="which images are used to check")
    parser.add_argument("--device", default="cpu", choices=("cpu", "auto"), help="always the CPU")
    return parser.parse_args(argv)


def main(argv=None):
    export(parse_args(argv))


if __name__ == "__main__":
    run(main)
