"""Weights and checkpoints: saved so that a crash loses nothing, loaded with suspicion.

A weights file is `{"model": state dict, "config": arguments of the constructor and of the intensity
transform, "class_names": [...], "run": what it was trained on and how}`, plain tensors, numbers and
text, which `torch.load(weights_only=True)` reads.
"""

import json
import os
from pathlib import Path

import torch

from files import UserError, file_to_be
from foreign import from_foreign
from mae import MAE, Classifier, IntensityTransform

LARGEST = {"embed_dim": 4096, "decoder_embed_dim": 4096, "depth": 64, "decoder_depth": 64}
LARGEST |= {"img_size": 4096, "patch_size": 512, "in_chans": 64, "mlp_ratio": 16}
LARGEST |= {"num_heads": 64, "decoder_num_heads": 64, "num_classes": 10_000}


def save(path, model_state, config, class_names, run):
    """Write a weights file. `run` must be plain (numbers, text, lists, dicts)."""
    content = {
        "model": {name: tensor.detach().cpu().clone() for name, tensor in model_state.items()},
        "config": config,
        "class_names": list(class_names),
        "run": json.loads(json.dumps(run)),
    }
    _write(path, content)


def _write(path, content):
    try:
        with file_to_be(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError:  # torch's writer hides the reason
        raise UserError(f"cannot write {path}: is the disk full?") from None


def load_mae(path, num_heads=None):
    """The `MAE` of a weights file, its `IntensityTransform`, and the file's content.

    With `num_heads` also of a checkpoint of facebookresearch/mae or Hugging Face, which knows no
    transform: then it is None. Raises UserError, see `_load`.
    """
    foreign_state = _foreign_state(path) if num_heads else None
    if foreign_state is not None:
        try:
            state, config = from_foreign(foreign_state, num_heads)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        content = {"model": state, "config": config, "class_names": [], "run": {}}
        return _build(path, MAE, config, content), None, content
    content = _load(path)
    arguments = {k: v for k, v in content["config"].items() if k != "transform"}
    model = _build(path, MAE, arguments, content)
    try:
        transform = IntensityTransform(**content["config"]["transform"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its configuration has no usable transform") from None
    return model, transform, content


def _foreign_state(path):
    """The state dict of a checkpoint that is not this project's, or None if it is."""
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path} needs safetensors: pip install safetensors") from None
        try:
            return load_file(path)
        except Exception as error:  # a Rust library's
            raise UserError(f"{path}: no safetensors file: {error}") from None
    content = _read(path)
    if isinstance(content, dict) and "config" in content:
        return None
    if isinstance(content, dict):
        content = content.get("model", content)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise UserError(f"{path}: no weights of a masked autoencoder")
    return content


def holds_classifier(path):
    """Whether a weights file says that it is a classifier's; raises UserError, see `_load`."""
    content = _read(path) if Path(path).suffix != ".safetensors" else None
    config = content.get("config") if isinstance(content, dict) else None
    return isinstance(config, dict) and "num_classes" in config


def load_classifier(path):
    """The `Classifier` of a weights file and the file's content; raises UserError, see `_load`."""
    content = _load(path)
    model = _build(path, Classifier, content["config"], content)
    if len(content["class_names"]) != content["config"].get("num_classes"):
        raise UserError(f"{path}: as many class names as classes were expected; train anew")
    return model, content


def _load(path):
    """Content of a weights file.

    Raises UserError, naming the file, if it is missing, no weights file, incomplete, of another
    shape than its configuration says, or if weights are NaN.
    """
    content = _read(path)
    kinds = {"model": dict, "config": dict, "class_names": list, "run": dict}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a weights file of this project")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: not a weights file of this project: {key!r} is missing")
    if not all(isinstance(name, str) for name in content["class_names"]):
        raise UserError(f"{path}: class names must be text")
    return content


def _read(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror or error}") from None
    except Exception:  # torch raises many kinds for a broken or hostile file
        raise UserError(f"{path}: not a weights file that can be loaded safely") from None


def _build(path, kind, arguments, content):
    for name, limit in LARGEST.items():
        value = arguments.get(name, 1)
        if not isinstance(value, int | float) or not 0 <= value <= limit:
            raise UserError(f"{path}: {name} = {value!r} in its configuration is out of range")
    if max(arguments.get("img_size", 64), 1) // max(arguments.get("patch_size", 8), 1) > 128:
        raise UserError(f"{path}: its configuration asks for more than 128×128 patches")
    try:
        model = kind(**arguments)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{path}: no {kind.__name__} by its configuration: {error}") from None
    check_state(path, model, content["model"])
    model.load_state_dict(content["model"])
    return model


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


# Checkpoints of an unfinished run


def checkpoint_paths(out):
    return Path(out) / "checkpoint.pth", Path(out) / "checkpoint.previous.pth"


def save_checkpoint(out, content):
    """Write the checkpoint of a run; the one before stays beside it."""
    current, previous = checkpoint_paths(out)
    fresh = current.with_name("checkpoint.next.pth")
    _write(fresh, content)
    if current.exists():
        os.replace(current, previous)
    os.replace(fresh, current)


def load_checkpoint(out):
    """The newest checkpoint that can be read, or None; a broken one is named on the terminal."""
    for path in checkpoint_paths(out):
        if path.exists():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many kinds for a broken file
                print(f"{path} is broken ({type(error).__name__}): trying the one before")
    return None


def remove_checkpoints(out):
    for path in checkpoint_paths(out):
        path.unlink(missing_ok=True)
