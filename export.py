"""Export to one ONNX file, raw images in, with everything needed in it.

A classifier gives calibrated probabilities and the familiarity of an image; `--what reconstruction`
exports an MAE, which gives residual maps and scores. The intensity transform is in the graph; class
names and origin are in the metadata. The file is compared with PyTorch on images of the data before
it is written. A file that differs, or that loses AUC or accuracy in lower precision, is not written.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import nn

from lib import compatibility, data, known_answers, options, weights
from lib.convert import to_hugging_face
from lib.errors import UserError, path_argument, run
from lib.files import atomic_directory, atomic_write, check_outputs, write_json
from lib.metrics import accuracy, auc_by_class
from lib.onnxfile import open_session
from lib.provenance import LIBRARY, made_from
from lib.residuals import mask_ratio_of
from mae import (
    Block,
    IntensityTransform,
    complementary_masks,
    residual_scores,
    set_attention_form,
)

EXAMPLE = """examples:
  python export.py --weights runs/full/vit-mae-classifier-wt.pth --out lens.onnx
  python export.py --weights runs/full/vit-mae-classifier-wt.pth --precision int8 --out small.onnx
  python export.py --what reconstruction --weights runs/pretrain/vit-mae-wt.pth --out maps.onnx"""
OPSET, IR_VERSION = 20, 10  # onnxruntime reads them since 1.18 of May 2024
LICENCE = "MIT"
TOLERANCE = 1e-4  # on probabilities in float32, and on residuals relative to the largest
# Familiarity is a rank among the validation images, which the rounding of float32 changes a little:
# 0.03 of it counts as 1e-4 of the others.
ROUGH = {"familiarity": 300.0}
CHECKED_BATCHES = (1, 7, 256)
ROUNDS = 2  # of complementary masks in a residual
# Kept in float32: the intensity transform, and the sums that decide how an image is turned.
WIDE_OPERATIONS = ["Sub", "Div", "Log", "Clip", "Max", "Sqrt", "Asinh", "ReduceSum"]
JUDGED_IMAGES = 3000  # validation images on which lower precision is judged


class Probabilities(nn.Module):
    """Raw images (B, 1, H, W) to class probabilities (B, classes) and familiarity (B,).

    `familiarity` is a `Familiarity`; without one there is no such output.
    """

    def __init__(self, classifier, familiarity=None):
        super().__init__()
        self.classifier, self.img_size = classifier, classifier.img_size
        self.familiarity = familiarity
        self.outputs = ("probabilities", "familiarity") if familiarity else ("probabilities",)

    def forward(self, images):
        probabilities = self.classifier(images).softmax(dim=1)
        probabilities = probabilities + zero_or_nan(images).flatten(1)
        if self.familiarity is None:
            return probabilities
        return probabilities, self.familiarity(images)


class Residuals(nn.Module):
    """Raw images (B, 1, H, W) to residual maps (B, 1, H, W) and their scores (B,)."""

    outputs = ("residual", "score")

    def __init__(self, mae, transform, mask_ratio):
        super().__init__()
        self.mae, self.transform, self.img_size = mae, transform, mae.img_size
        self.masks = complementary_masks(mae.num_patches, mask_ratio, ROUNDS)

    def forward(self, images):
        residual = self.mae.residual(self.transform(images), self.masks)
        unknown = zero_or_nan(images)
        return residual + unknown, residual_scores(residual) + unknown.flatten()


def zero_or_nan(images):
    """(B, 1, 1, 1): NaN for an image (1, H, W) with a NaN or infinite pixel, zero for others.

    Clamping and 8-bit numbers would turn such a pixel into an ordinary one.
    """
    return (images - images).sum(dim=(1, 2, 3), keepdim=True)


class ScaledTransform(nn.Module):
    """`IntensityTransform` whose constants are near one, whatever the unit of the images.

    torch's exporter takes a constant below about 1e-8 for zero. Dividing by a power of two is
    exact, so the results stay the same.
    """

    def __init__(self, transform):
        super().__init__()
        offset, softening = transform.offset.item(), transform.softening.item()
        self.unit = math.ldexp(1.0, math.frexp(max(abs(offset), softening))[1] - 1)
        self.scaled = IntensityTransform(
            transform.kind, offset / self.unit, softening / self.unit,
            transform.mean.item(), transform.std.item(),
        )  # fmt: skip

    def forward(self, images):
        return self.scaled(images / self.unit)


class FlatLinear(nn.Module):
    """A linear layer on tokens (B, n, D) as one matrix, which ONNX multiplies as a Gemm."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def flatten_linears(module):
    """Put a `FlatLinear` around every linear layer of transformer blocks inside `module`."""
    for block in (m for m in module.modules() if isinstance(m, Block)):
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, FlatLinear(layer))


def scale_transforms(model):
    """Replace every `IntensityTransform` inside `model` by a `ScaledTransform`."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, IntensityTransform):
                setattr(module, name, ScaledTransform(part))


def write_onnx(model, path, metadata):
    """Export `model`, one of the above, with text metadata {key: value}, weights inside.

    onnxruntime is faster with attention as plain products, with GELU as one operation (opset 20),
    and in int8 with a Gemm, bias included, where PyTorch has products of stacks. `model` itself is
    not changed.
    """
    model = copy.deepcopy(model)
    scale_transforms(model)
    set_attention_form(model, "plain")
    flatten_linears(model)
    example = torch.zeros(2, 1, model.img_size, model.img_size)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # about torch's own internals
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["images"], output_names=list(model.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        )  # fmt: skip
    save_proto(program.model_proto, path, metadata)


def save_proto(proto, path, metadata):
    proto.ir_version = IR_VERSION
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


class CalibrationImages(CalibrationDataReader):
    """Hands images (n, 1, H, W) to the quantiser in batches of 32."""

    def __init__(self, images):
        self.left = iter({"images": images[i : i + 32]} for i in range(0, len(images), 32))

    def get_next(self):
        return next(self.left, None)


def reduce_precision(path, precision, images, metadata):
    """Rewrite the float32 file at `path` in "float16" or "int8"; input and output stay float32.

    float16: weights and activations, except from the input through the intensity transform, whose
    range is wider.
    int8: the linear layers of blocks and head multiply 8-bit weights and activations, whose ranges
    come from `images` (n, 1, H, W); their outputs and everything else are float32. The bytes are
    unsigned, see `use_unsigned_bytes`.
    What computes the familiarity stays in float32, which it needs.
    """
    kept = nodes_for_familiarity_alone(onnx.load(path).graph)
    if precision == "float16":
        proto = convert_float_to_float16(
            onnx.load(path), keep_io_types=True, op_block_list=WIDE_OPERATIONS, node_block_list=kept
        )
        skip_round_trips(proto.graph, kept)
        OnnxModel(proto).prune_graph()
        OnnxModel(proto).topological_sort()
        del proto.graph.value_info[:]  # the old types
    else:
        quantised = path.with_name(f"{path.name}.int8")
        try:
            logging.disable(logging.WARNING)  # hints that do not apply here
            quantize_static(
                path, quantised, CalibrationImages(images), quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Gemm"], per_channel=True, nodes_to_exclude=kept,
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
            )  # fmt: skip
            proto = onnx.load(quantised)
        finally:
            logging.disable(logging.NOTSET)
            quantised.unlink(missing_ok=True)
        use_unsigned_bytes(proto.graph)
    save_proto(proto, path, metadata)


def use_unsigned_bytes(graph):
    """Shift every 8-bit number, zero points included, from -128...127 to 0...255.

    The values stay the same. x86 processors without VNNI multiply unsigned by signed bytes in sums of
    16 bits, which saturate; onnxruntime multiplies unsigned by unsigned ones exactly everywhere.
    """
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            shifted = onnx.numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(onnx.numpy_helper.from_array(shifted.astype(np.uint8), tensor.name))
    del graph.value_info[:]  # the signed types


def nodes_for_familiarity_alone(graph):
    """Names of the nodes that the output `familiarity` needs and the other outputs do not."""
    makers = {name: node for node in graph.node for name in node.output}

    def needed(outputs):
        names, left = set(), list(outputs)
        while left:
            node = makers.get(left.pop())
            if node is not None and node.name not in names:
                names.add(node.name)
                left += node.input
        return names

    outputs = {value.name for value in graph.output}
    own = outputs & {"familiarity"}
    return sorted(needed(own) - needed(outputs - own))


def skip_round_trips(graph, wide_nodes):
    """Feed nodes that compute in float32 from the float32 behind a float16 copy, where there is one.

    The converter puts such a copy behind the input and behind every node that stays in float32.
    """
    wide = {value.name for value in graph.input}
    for node in graph.node:
        if node.op_type in WIDE_OPERATIONS or node.name in wide_nodes:
            wide |= set(node.output)
    casts = [node for node in graph.node if node.op_type == "Cast"]
    copied = {cast.output[0]: cast.input[0] for cast in casts if cast.input[0] in wide}
    restored = {
        cast.output[0]: copied[cast.input[0]]
        for cast in casts
        if cast.input[0] in copied and cast.attribute[0].i == onnx.TensorProto.FLOAT
    }
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = restored.get(name, name)


def run_session(path, images, batch=256):
    """Outputs of an exported file on images (n, 1, H, W), a list of arrays."""
    session, _ = open_session(path, "cpu")
    parts = [
        session.run(None, {"images": images[start : start + batch]})
        for start in range(0, len(images), batch)
    ]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def answers_of(model, images):
    """{output: PyTorch's answers (n, ...)} to images (n, 1, H, W)."""
    with torch.no_grad():
        answers = model(torch.from_numpy(images))
    answers = answers if isinstance(answers, tuple) else (answers,)
    return {name: answer.numpy() for name, answer in zip(model.outputs, answers, strict=True)}


def largest_difference(model, path, images):
    """Largest difference between onnxruntime and PyTorch on `images` (256, 1, H, W).

    Where outputs exceed one, it is relative to the largest of them; see also ROUGH. The images are
    fed in batches of 1, 7 and 256.
    """
    answers = answers_of(model, images).values()
    worst = 0.0
    for batch in CHECKED_BATCHES:
        count = min(7 * batch, len(images))
        outputs = zip(model.outputs, run_session(path, images[:count], batch), answers, strict=True)
        for name, got, right in outputs:
            largest = ROUGH.get(name, max(1.0, np.abs(right).max()))
            difference = np.abs(got - right[:count]).max() / largest
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf)))
    return worst


def require_same_familiarity(model, path, images, out):
    """UserError if the file at `path` gives another familiarity of images than PyTorch."""
    with torch.no_grad():
        expected = model.familiarity(torch.from_numpy(images)).numpy()
    difference = np.abs(run_session(path, images)[1] - expected).max()
    if not difference <= ROUGH["familiarity"] * TOLERANCE:
        raise UserError(f"{out} not written: its familiarity differs by {difference:.2g} from PyTorch")


def store_known_answers(model, path, images, metadata):
    """Rewrite the file at `path` with some of the images (n, 1, H, W) and PyTorch's answers to them.

    These are images on which the file agrees with PyTorch, of every predicted class in turn. UserError
    if there are none.
    """
    images = known_answers.storable(images)
    answers, outputs = answers_of(model, images), run_session(path, images)
    worst = np.zeros(len(images))
    for (name, right), got in zip(answers.items(), outputs, strict=True):
        allowed = known_answers.TOLERANCES[metadata["precision"]][name] * max(1.0, np.abs(right).max())
        worst = np.maximum(worst, np.abs(got - right).reshape(len(images), -1).max(axis=1) / allowed)
    agree = np.flatnonzero(worst <= 0.5)  # leaves the rest to other machines
    if not len(agree):
        raise UserError(f"{metadata['precision']} changes the answers to every image: use a higher precision")
    classes = answers["probabilities"][agree].argmax(axis=1) if "probabilities" in answers else 0 * agree
    turn = [np.sum(classes[:i] == kind) for i, kind in enumerate(classes)]
    chosen = agree[np.argsort(turn, kind="stable")]
    text = known_answers.text_of(images[chosen], {name: a[chosen] for name, a in answers.items()})
    save_proto(onnx.load(path), path, metadata | {known_answers.KEY: text})
    open_session(path, "cpu")  # compares the answers


def latency(path, images):
    """Median milliseconds of a call with 1 and with 256 images on this machine."""
    session, _ = open_session(path, "cpu")
    medians = []
    for batch, repeats in ((1, 30), (256, 5)):
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            session.run(None, {"images": images[:batch]})
            seconds.append(time.perf_counter() - start)
        medians.append(1e3 * float(np.median(seconds[1:])))  # the first warms up
    return medians


def load_images(args, content, img_size):
    """The data to check with, and its split; UserError if it is missing or does not fit."""
    where = args.data or content["run"].get("data")
    if not where or not Path(where).is_dir():
        raise UserError(f"the training data ({where}) is not here: name images with --data")
    dataset = data.load(where, args.cache_dir)
    if dataset.img_size != img_size:
        raise UserError(f"{where} has images of {dataset.img_size} pixels, not {img_size}")
    compatibility.check_split(content["run"])
    return dataset, data.split(dataset)


def some_images(dataset, rows, count, seed):
    """`count` raw images (count, 1, H, W) of `rows`, repeated if there are fewer."""
    rows = np.random.default_rng(seed).permutation(rows)
    return dataset.images[np.resize(rows, count)][:, None]


def best_on_validation(opened):
    """Index of the weights with the best validation macro AUC, then the lowest loss."""

    first = opened[0]
    for other in opened[1:]:
        same = (
            other.content["run"].get("data_fingerprint") == first.content["run"].get("data_fingerprint")
            and other.content["class_names"] == first.content["class_names"]
        )
        if not same:
            raise UserError(
                f"{first.path} and {other.path} were validated on different data: export one of them"
            )

    def rank(i):
        best = opened[i].content["run"].get("best")
        if not isinstance(best, dict):
            raise UserError(f"{opened[i].path} has no validation figures: train again")
        return best.get("validation_macro_auc", 0.0), -best.get("validation_loss", np.inf)

    return max(range(len(opened)), key=rank)


def load_model(args):
    """(model to export, opened `Weights` that it comes from) that the options ask for."""
    opened = [weights.read(path) for path in args.weights]
    if args.what == "reconstruction":
        mae, transform = weights.mae_of(opened[0])
        return Residuals(mae, transform, mask_ratio_of(opened[0].content)).eval(), opened[0]
    classifiers = [weights.classifier_of(file) for file in opened]
    best = best_on_validation(opened) if len(opened) > 1 else 0
    known = weights.familiarity_in(opened[best].path, opened[best].content)
    return Probabilities(classifiers[best], known).eval(), opened[best]


def export_to_hugging_face(args):
    """Leave config.json and pytorch_model.bin, which transformers' ViTMAEForPreTraining loads."""
    mae, _, content = weights.load_mae(args.weights[0])
    config = {k: v for k, v in content["config"].items() if k != "transform"}
    state, described = to_hugging_face(mae.state_dict(), config)
    with atomic_directory(args.out) as folder:
        weights.save_tensors(folder / "pytorch_model.bin", state)
        write_json(folder / "config.json", described)
        write_json(folder / "transform.json", content["config"]["transform"])
    print(f"{args.weights[0]} -> {args.out}, for ViTMAEForPreTraining.from_pretrained")


def export(args):
    if args.what == "huggingface":
        export_to_hugging_face(args)
        return
    if args.out.suffix.lower() in (".pth", ".npy", ".npz", ".csv", ".json"):
        raise UserError(f"--out {args.out} has the suffix of another kind of file: name an .onnx file")
    check_outputs({"--out": args.out}, args.weights)
    model, opened = load_model(args)
    content = opened.content
    dataset, parts = load_images(args, content, model.img_size)
    images = some_images(dataset, parts["validation"], max(CHECKED_BATCHES), args.seed)
    if args.precision != "float32":
        order = compatibility.class_order(content["class_names"], dataset, opened.path)
    metadata = {
        "what": args.what,
        "licence": LICENCE,
        "class_names": json.dumps(content["class_names"]),
        "img_size": str(model.img_size),
        "transform": json.dumps(content["config"]["transform"]),
        "precision": args.precision,
        "weights_sha256": opened.sha256,
        "data_fingerprint": str(content["run"].get("data_fingerprint")),
        "pixel_range": json.dumps(content["run"].get("pixel_range")),
        "familiarity_images": str(familiarity_images(model)),
        "run": json.dumps(content["run"]),
    }
    checked_on = [dataset.fingerprint, dataset.class_names]
    made = made_from(args, [*LIBRARY, __file__], data=checked_on, weights=opened.sha256)
    metadata["made_from"] = json.dumps(made)
    if args.update and metadata["made_from"] == made_from_in(args.out):
        print(f"already up to date: {args.out}")
        return
    with atomic_write(args.out) as temporary:
        write_onnx(model, temporary, metadata)
        difference = largest_difference(model, temporary, images)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{args.out} not written: it differs by {difference:.1e} from PyTorch, more than "
                f"{TOLERANCE:.0e}"
            )
        print(described("float32", temporary, images) + f", within {difference:.1e} of PyTorch")
        if args.precision != "float32":
            lower_precision(temporary, args, model, dataset, order, parts, images, metadata)
        store_known_answers(model, temporary, images, metadata)
    print(f"{opened.path} -> {args.out}")


def made_from_in(path):
    """What an exported file says that it was made from; None if there is no such file."""
    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
    except Exception:  # of a broken file, onnx and protobuf raise many kinds
        return None
    return {item.key: item.value for item in properties}.get("made_from")


def lower_precision(path, args, model, dataset, order, parts, images, metadata):
    """Rewrite the float32 file at `path` in --precision; UserError if that costs too much.

    `order` (classes,) is the place of each of the data's classes among those of the model.
    """
    rows = parts["validation"][:: max(1, len(parts["validation"]) // JUDGED_IMAGES)]
    labels = order[dataset.labels[rows]]
    before = figures_of(path, dataset.images[rows], labels)
    calibration = some_images(dataset, parts["train"], max(CHECKED_BATCHES), args.seed)
    reduce_precision(path, args.precision, calibration, metadata)
    after = figures_of(path, dataset.images[rows], labels)
    difference = largest_difference(model, path, images)
    changes = [f"{name} {before[name]:.5f} -> {after[name]:.5f}" for name in before]
    print(
        f"{described(args.precision, path, images)}, within {difference:.1e} of PyTorch; "
        f"{', '.join(changes)} on {len(rows)} validation images"
    )
    for name in before:
        fall = before[name] - after[name]
        if not fall <= args.allowed_fall:
            raise UserError(
                f"{args.out} not written: its {name} falls by {fall:.4f}, more than --allowed-fall "
                f"{args.allowed_fall}"
            )
    if model.familiarity is not None:
        require_same_familiarity(model, path, images, args.out)


def familiarity_images(model):
    """How many images the familiarity of an exported model was calibrated on; 0 if it has none."""
    familiarity = getattr(model, "familiarity", None)
    return 0 if familiarity is None else len(familiarity.strangeness_seen)


def described(precision, path, images):
    one, many = latency(path, images)
    size = path.stat().st_size / 1e6
    return f"{precision}: {size:.2f} MB, {one:.2f} ms for 1 image, {many:.1f} ms for 256"


def figures_of(path, images, labels):
    """{"macro AUC", "accuracy"} of an exported classifier on raw images (n, H, W)."""
    probabilities, *_ = run_session(path, images[:, None])
    return {
        "macro AUC": float(np.mean(auc_by_class(probabilities, labels))),
        "accuracy": accuracy(probabilities, labels),
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=options.HelpFormatter
    )
    parser.add_argument(
        "--weights", type=path_argument, nargs="+", required=True, metavar="PTH",
        help="classifier (of several, the one that is best on validation) or MAE",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE.onnx", help="file (or folder) to write"
    )
    parser.add_argument(
        "--what",
        choices=("classifier", "reconstruction", "huggingface"),
        default="classifier",
        help="classifier, residual maps of an MAE, or a folder with an MAE for transformers",
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
    if args.what == "huggingface" and args.update:
        raise UserError("--update: only an ONNX file says what it was made from")
    if args.what != "classifier" and len(args.weights) > 1:
        raise UserError(f"--what {args.what} takes one file of weights")
    return args


def main(argv=None):
    export(parse_args(argv))


if __name__ == "__main__":
    run(main)
