"""Write networks to ONNX, in float32, float16 or int8; onnxruntime and other runtimes read them."""

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from onnxscript import optimizer
from onnxscript.ir.passes.common import LiftConstantsToInitializersPass
from torch import nn

from lib.onnxfile import OUTPUTS
from mae import Block, IntensityTransform, complementary_masks, residual_scores, set_attention_form

OPSET, IR_VERSION = 20, 10  # onnxruntime reads them since 1.18 of May 2024
ROUNDS = 2  # of complementary masks in a residual
# Kept in float32: the intensity transform, and the sums that decide how an image is turned.
WIDE_OPERATIONS = ["ScatterND", "Sub", "Div", "Log", "Clip", "Max", "Sqrt", "Asinh", "ReduceSum"]


class Probabilities(nn.Module):
    """Raw images (B, 1, H, W) to class probabilities (B, classes) and familiarity (B,).

    `familiarity` is a `Familiarity`; without one there is no such output. It takes the class of the
    largest probability, as everyone does who reads the file.
    """

    def __init__(self, classifier, familiarity=None):
        super().__init__()
        self.classifier, self.img_size = classifier, classifier.img_size
        self.familiarity = familiarity
        self.outputs = OUTPUTS["classifier"] if familiarity else OUTPUTS["classifier"][:1]

    def forward(self, images):
        probabilities = self.classifier(images).softmax(dim=1)
        probabilities = probabilities + zero_or_nan(images).flatten(1)
        if self.familiarity is None:
            return probabilities
        return probabilities, self.familiarity(images, probabilities.argmax(dim=1))


class Residuals(nn.Module):
    """Raw images (B, 1, H, W) to residual maps (B, 1, H, W) and their scores (B,)."""

    outputs = OUTPUTS["reconstruction"]

    def __init__(self, mae, transform, mask_ratio):
        super().__init__()
        self.mae, self.transform, self.img_size = mae, transform, mae.img_size
        self.masks = complementary_masks(mae.num_patches, mask_ratio, ROUNDS)

    def forward(self, images):
        residual = self.mae.residual(self.transform(images), self.masks)
        unknown = zero_or_nan(images)
        return residual + unknown, residual_scores(residual) + unknown.flatten()


class Answers(nn.Module):
    """The answers of a `MassEstimator` or `Sharpener` to raw images (B, 1, H, W), named by `outputs`."""

    def __init__(self, network, outputs):
        super().__init__()
        self.network, self.outputs, self.img_size = network, outputs, network.img_size

    def forward(self, images):
        unknown = zero_or_nan(images)
        return tuple(
            answer + (unknown if answer.dim() == 4 else unknown.flatten()) for answer in self.network(images)
        )


def zero_or_nan(images):
    """(B, 1, 1, 1): NaN for an image (1, H, W) with a NaN or infinite pixel, zero for others.

    Clamping and 8-bit numbers would turn such a pixel into an ordinary one.
    """
    return (images - images).sum(dim=(1, 2, 3), keepdim=True)


class ScaledTransform(nn.Module):
    """`IntensityTransform` whose constants are near one, whatever the unit of the images.

    Other constants may not fit into float16, and optimisations of a graph may take one below about 1e-8 for
    zero. Dividing by a power of two is exact, so the results stay the same.
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
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}, optimize=False,
        )  # fmt: skip
    # All that the exporter's optimisation does beyond this takes as long as the export. Runtimes do it, too.
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    # The converter to float16 leaves wide only what is an initializer.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
    save_proto(program.model_proto, path, metadata)


def save_proto(proto, path, metadata):
    drop_notes(proto)
    proto.ir_version = IR_VERSION
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


def drop_notes(message):
    """Remove what torch's exporter notes of every part: source files of this machine, 300 kB in all."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type:
            for part in value if isinstance(value, Sequence) else [value]:
                drop_notes(part)


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
    return sorted(needed(outputs & {"familiarity"}) - needed(outputs - {"familiarity"}))


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
    restored = {cast.output[0]: copied[cast.input[0]] for cast in casts
                if cast.input[0] in copied and cast.attribute[0].i == onnx.TensorProto.FLOAT}  # fmt: skip
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = restored.get(name, name)
