"""Weights files: written atomically, opened once, checked when loaded.

A weights file is `{"model": state dict, "config": arguments of the constructor and of the intensity
transform, "class_names": [...], "run": what it was trained on and how, "seen": hashes of the images
that training and validation saw, int64}`, and where there were enough images "familiarity":
{"model", "config"} of a `familiarity.Familiarity`. All are plain tensors, numbers and text, which
`torch.load(weights_only=True)` reads.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.augment import disturbances
from lib.convert import from_foreign, heads_told
from lib.familiarity import Familiarity
from lib.errors import UserError, named_errors, reason_of
from lib.files import atomic_write, read_json, sha256_of
from lib.names import check_class_names
from mae import MAE, Classifier, Encoder, IntensityTransform, MassEstimator, ResidualClassifier, Sharpener

LARGEST = {"embed_dim": 4096, "decoder_embed_dim": 4096, "depth": 64, "decoder_depth": 64}
LARGEST |= {"img_size": 4096, "patch_size": 512, "mlp_ratio": 16}
LARGEST |= {"num_heads": 64, "decoder_num_heads": 64, "num_classes": 10_000}
LARGEST |= {"components": 1024, "leading": 16, "calibration": 10_000_000}
MOST_PATCHES_A_SIDE = 128


class Kind(NamedTuple):
    """What weights are for.

    argument : one that only the networks of this kind are constructed with; None of MAEs, which are the rest.
    network : the class of the network.
    does : what the weights do, as messages say it.
    command : what leaves such weights.
    """

    argument: str | None
    network: type
    does: str
    command: str


# By --task of finetune.py, and MAEs.
KINDS = {
    "classes": Kind("num_classes", Classifier, "classify images", "finetune.py --task classes"),
    "mass": Kind("centre", MassEstimator, "estimate masses", "finetune.py --task mass"),
    "sharpen": Kind("factor", Sharpener, "sharpen images", "finetune.py --task sharpen"),
    "mae": Kind(None, MAE, "reconstruct images", "pretrain.py"),
}


class Weights(NamedTuple):
    """An opened weights file. `content` has the keys model, config, class_names, run, seen.

    "seen" are hashes (n,) uint64, see `datasets.Dataset`. There may be the key familiarity.
    """

    path: Path
    sha256: str
    content: dict

    @property
    def kind(self):
        """Its key in `KINDS`."""
        config = self.content["config"]
        return next((kind for kind, each in KINDS.items() if each.argument in config), "mae")

    @property
    def is_classifier(self):
        return self.kind == "classes"


# Writing


def save(path, model_state, config, class_names, run, seen, familiarity=None):
    """Write a weights file.

    `run` must be plain (numbers, text, lists, dicts); `seen` (n,) uint64 are hashes of the images
    that training and validation saw, see `datasets.Dataset`; `familiarity` is a `Familiarity` and its
    arguments, or None.
    """
    content = {
        "model": plain(model_state),
        "config": config,
        "class_names": list(class_names),
        "run": json.loads(json.dumps(run)),
        "seen": torch.from_numpy(np.unique(seen).view(np.int64)),
    }
    if familiarity:
        guard, arguments = familiarity
        content["familiarity"] = {"model": plain(guard.state_dict()), "config": arguments}
    save_tensors(path, content)


def plain(state):
    """A copy of a state dict in the CPU's memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def save_tensors(path, content):
    """`torch.save`, atomically; UserError if it cannot be written."""
    try:
        # To an open file, because torch writes a path's name, which has the host's, into the archive.
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except RuntimeError:  # torch's writer hides the reason
        raise UserError(f"cannot write {path}: is the disk full?") from None


def save_safetensors(path, state):
    """Write float32 tensors as a .safetensors file (huggingface.co/docs/safetensors): a header, then the numbers."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.write(tensor.detach().float().contiguous().numpy().astype("<f4").tobytes())


# Reading


def read(path, num_heads=None, foreign=False):
    """Open a weights file: `Weights`, whose tensors are not checked against a network yet.

    With `foreign` this also opens an MAE of facebookresearch/mae or Hugging Face, whose config then
    has no transform; `num_heads`, its attention heads, is needed where the file does not tell them.
    Raises UserError, naming the file, if it is missing or something else.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: give a weights file")
    # A training script of facebookresearch keeps its options in the file.
    allowed = [argparse.Namespace] if foreign else []
    if path.suffix == ".safetensors":
        content, sha256 = _safetensors(path)
    else:
        content, sha256 = _torch_file(path, allowed)
    if foreign and not (isinstance(content, dict) and "config" in content):
        content = _converted(path, content, num_heads)
    kinds = {"model": dict, "config": dict, "class_names": list, "run": dict}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a weights file of this project")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: not a weights file of this project: {key!r} is missing")
    try:
        json.dumps([content["config"], content["run"]])
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: its configuration is no plain text and numbers") from None
    for key in ("mae", "transform"):
        if not isinstance(content["config"].get(key, {}), dict):
            raise UserError(f"{path}: {key} in its configuration is no configuration")
    if not 0 < _number(content["run"].get("mask_ratio", 0.5)) < 1:
        raise UserError(f"{path}: mask_ratio in its run is not between 0 and 1")
    pixel_range = content["run"].get("pixel_range", [0, 0, 0])
    if not isinstance(pixel_range, list) or len(pixel_range) != 3 or any(
        math.isnan(_number(value)) for value in pixel_range
    ):
        raise UserError(f"{path}: pixel_range in its run is no range")
    if not 0 < _number(content["run"].get("smooth_rms", 1.0)) < math.inf:
        raise UserError(f"{path}: smooth_rms in its run is no positive number")
    for key in ("classes", "class_names"):
        if not _are_text(content["run"].get(key, [])):
            raise UserError(f"{path}: {key} in its run are no names")
    if not isinstance(content["run"].get("made", {}), dict):
        raise UserError(f"{path}: made in its run is no dictionary")
    if not _are_text(content["class_names"]):
        raise UserError(f"{path}: class names must be text")
    check_class_names(content["class_names"], path, "rename its folder and train again")
    seen = content.get("seen")
    if not isinstance(seen, torch.Tensor) or seen.dtype != torch.int64 or seen.dim() != 1:
        raise UserError(f"{path}: does not say which images it was trained on; train again")
    content["seen"] = seen.numpy().view(np.uint64)
    return Weights(path, sha256, content)


def _number(value):
    """`value` as float; NaN if it is no number, or too large."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _are_text(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _torch_file(path, allowed):
    """What torch.load reads, which may hold the classes `allowed`, and the file's SHA-256."""
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(allowed):
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True), sha256
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror or error}") from None
    except Exception:  # torch raises many kinds for a broken or hostile file
        raise UserError(f"{path}: not a weights file that can be loaded safely") from None


def _safetensors(path):
    """The tensors of a .safetensors file, and its SHA-256."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from None
    with named_errors(path, "safetensors file"):
        return load_file(path), sha256_of(path)


def _converted(path, content, num_heads):
    """The content of a foreign MAE's checkpoint, converted to this project's format."""
    model_name = None
    if isinstance(content, dict):
        options = content.get("args")
        if isinstance(options, argparse.Namespace):
            model_name = vars(options).get("model")
        content = content.get("model", content)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise UserError(f"{path}: not the weights of a masked autoencoder")
    try:
        state, config = from_foreign(content, num_heads)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    beside = path.parent / "config.json"
    described = read_json(beside) if beside.exists() else {}
    told = heads_told(config["embed_dim"], model_name, described)
    if num_heads is None and told is None:
        raise UserError(f"{path} does not tell its number of attention heads: give --num-heads")
    if None not in (num_heads, told) and num_heads != told:
        raise UserError(f"{path}: --num-heads {num_heads} is given, but it has {told}")
    config["num_heads"] = told if num_heads is None else num_heads
    nothing = torch.zeros(0, dtype=torch.int64)
    return {"model": state, "config": config, "class_names": [], "run": {}, "seen": nothing}


# Networks, all in evaluation mode, ready to use; `loop.fit` puts what it trains in training mode


def load_mae(path):
    """The `MAE` of a weights file, its `IntensityTransform`, and the file's content; UserError."""
    opened = read(path)
    return *mae_of(opened), opened.content


def load_classifier(path):
    """The `classifier_of` a weights file, and the file's content; UserError."""
    opened = read(path)
    return classifier_of(opened), opened.content


def mae_of(opened):
    """The `MAE` and `IntensityTransform` of opened `Weights`.

    Raises UserError, naming the file, if tensors are missing, not finite or of another shape than
    the configuration says, or if it has no transform.
    """
    require_kind(opened, "mae")
    arguments = {k: v for k, v in opened.content["config"].items() if k != "transform"}
    model = _build(opened.path, MAE, arguments, opened.content["model"])
    try:
        return model, IntensityTransform(**transform_in(opened))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{opened.path}: its configuration has no usable transform") from None


def encoder_of(opened):
    """`mae_of`; of a foreign file the `Encoder` alone, and None.

    A foreign decoder would be of no use: the file does not tell its attention heads, nor the scale
    of the pixels that it predicts.
    """
    if opened.content["run"]:
        return mae_of(opened)
    parts_of_decoder = ("decoder_", "mask_token")
    state = {k: v for k, v in opened.content["model"].items() if not k.startswith(parts_of_decoder)}
    return _build(opened.path, Encoder, opened.content["config"], state), None


def transform_in(opened):
    """The arguments of `IntensityTransform`; UserError unless all of them are there.

    Defaults in the place of some would change what the network sees.
    """
    arguments = opened.content["config"].get("transform", {})
    if arguments.keys() != {"kind", "offset", "softening", "mean", "std"}:
        raise UserError(f"{opened.path}: its configuration has no usable transform")
    return arguments


def classifier_of(opened):
    """The `Classifier` or `ResidualClassifier` of opened `Weights`; UserError as in `mae_of`."""
    model = network_of(opened, "classes")
    if len(opened.content["class_names"]) != opened.content["config"].get("num_classes"):
        raise UserError(f"{opened.path}: the number of class names is wrong; train again")
    return model


def network_of(opened, task):
    """The network of opened `Weights` of a --task; UserError as in `mae_of`."""
    require_kind(opened, task)
    transform_in(opened)
    config = opened.content["config"]
    network = ResidualClassifier if task == "classes" and "mae" in config else KINDS[task].network
    return _build(opened.path, network, config, opened.content["model"])


def require_kind(opened, kind):
    """UserError unless opened `Weights` are of this one of KINDS."""
    if opened.kind != kind:
        does, command = KINDS[opened.kind].does, KINDS[kind].command
        raise UserError(f"{opened.path}: these weights {does}: give those of {command}")


def familiarity_in(opened):
    """The `Familiarity` of opened `Weights`; None if they have none."""
    path, content = opened.path, opened.content
    stored = content.get("familiarity")
    if stored is None:
        return None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in ("model", "config")):
        raise UserError(f"{path}: its familiarity is damaged; train again")
    network = content["config"].get("mae", content["config"])
    if stored["config"].get("img_size") != network.get("img_size"):
        raise UserError(f"{path}: its familiarity is for images of another size; train again")
    return _build(path, Familiarity, stored["config"], stored["model"])


def familiarity_for(opened, dataset, augmentations):
    """The `Familiarity` of opened `Weights`, and its arguments, for a training that starts from them.

    None if it was fitted to other images than those of `dataset`, if `augmentations` disturb or turn
    these otherwise than before.
    """
    run, stored = opened.content["run"], opened.content.get("familiarity")
    before = run.get("augment")
    if run.get("data_fingerprint") != dataset.fingerprint or not isinstance(before, list):
        return None
    if disturbances(before) != disturbances(augmentations) or ("flips" in before) != ("flips" in augmentations):
        return None
    familiarity = familiarity_in(opened)
    return familiarity and (familiarity, stored["config"])


def _build(path, model_class, arguments, state):
    """`model_class(**arguments)` with the tensors `state`, for evaluation; UserError if they do not fit."""
    _check_sizes(path, arguments)
    try:
        model = model_class(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{path}: no {model_class.__name__} has its configuration: {reason_of(error)}"
        ) from None
    check_state(path, model, state)
    model.load_state_dict(state)
    return model.eval()


def _check_sizes(path, arguments):
    """UserError for a configuration whose network would be too large, or not for these images."""
    arguments = {**arguments, **arguments.get("mae", {})}
    for name, limit in LARGEST.items():
        value = arguments.get(name, 1)
        if not isinstance(value, int | float) or not 0 <= value <= limit:
            raise UserError(f"{path}: {name} = {value!r} in its configuration is out of range")
    if arguments.get("in_chans", 1) != 1:
        raise UserError(f"{path} is for images of {arguments['in_chans']} channels; those here have one")
    side = max(arguments.get("img_size", 64), 1) // max(arguments.get("patch_size", 8), 1)
    if side > MOST_PATCHES_A_SIDE and "components" not in arguments:  # a Familiarity has no patches
        raise UserError(
            f"{path}: its configuration asks for more than {MOST_PATCHES_A_SIDE}×{MOST_PATCHES_A_SIDE} patches"
        )


def check_state(path, model, state):
    """UserError, naming the tensor, unless `state` fits `model` and is finite."""
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        raise UserError(f"{path}: tensor {name} is missing; is it the right kind of weights?")
    for name in state.keys() - expected.keys():
        raise UserError(f"{path}: unexpected tensor {name!r}; is it the right kind of weights?")
    for name, tensor in state.items():
        shape = tuple(expected[name].shape)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            raise UserError(f"{path}: tensor {name} should have shape {shape}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} has NaN or infinite values")
