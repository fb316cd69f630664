"""Weights files: written whole or not at all, read exactly, and checked before they are used."""

import functools
import os
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSIFIER, PRETRAINED, Calls, assert_refused, assert_same_tensors

from lib import files, weights
from lib.errors import UserError
from mae import MAE, Classifier, ResidualClassifier

TRANSFORM = {"kind": "log", "offset": 0.0, "softening": 0.5, "mean": 0.0, "std": 1.0}
TINY = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
CLASS_NAMES = ("a", "b", "c")
SEEN = np.array([1, 2**63 + 1], dtype=np.uint64)


def saved(path, kind, config, transform=TRANSFORM, run=()):
    """Write a weights file of a new network: (path, network)."""
    network = kind(**config)
    config = {**config, "transform": transform}
    weights.save(path, network.state_dict(), config, CLASS_NAMES, dict(run), SEEN)
    return path, network


@pytest.fixture
def mae_file(tmp_path):
    config = {**TINY, "decoder_embed_dim": 8, "decoder_num_heads": 2}
    run = {"lr": 0.1, "augment": ("noise",)}
    return saved(tmp_path / "mae.pth", MAE, config, {**TRANSFORM, "kind": "asinh"}, run)


@pytest.fixture
def classifier_file(tmp_path):
    config = {**TINY, "num_classes": 3, "pool": "stats", "transform": TRANSFORM}
    return saved(tmp_path / "classifier.pth", Classifier, config)


def spoiled(path, spoil):
    """The file at `path` after `spoil` has changed its content."""
    content = torch.load(path, weights_only=True)
    spoil(content)
    torch.save(content, path.with_name("spoiled.pth"))
    return path.with_name("spoiled.pth")


def test_a_weights_file_does_not_name_the_machine_that_wrote_it(mae_file):
    path, content = mae_file[0], mae_file[0].read_bytes()
    assert os.uname().nodename.encode() + b"-" not in content
    assert b".tmp" not in content
    weights.save_tensors(path, torch.load(path, weights_only=True))
    assert path.read_bytes() == content


def test_what_is_saved_is_read_and_says_what_it_is(mae_file, classifier_file, runs):
    mae, transform, content = weights.load_mae(mae_file[0])
    assert_same_tensors(mae.state_dict(), mae_file[1].state_dict())
    assert (transform.kind, transform.softening) == ("asinh", 0.5)
    assert content["class_names"] == list(CLASS_NAMES)
    assert content["run"] == {"lr": 0.1, "augment": ["noise"]}
    classifier, _ = weights.load_classifier(classifier_file[0])
    assert_same_tensors(classifier.state_dict(), classifier_file[1].state_dict())
    # Else dropout and the statistics of a batch would change the answers.
    assert not any(part.training for network in (mae, classifier) for part in network.modules())
    for (path, _), is_classifier in ((mae_file, False), (classifier_file, True)):
        opened = weights.read(path)
        assert opened.is_classifier == is_classifier
        assert opened.sha256 == files.sha256_of(path)
        assert opened.path == path
    for path in (classifier_file[0], runs / "residual" / CLASSIFIER):
        with pytest.raises(UserError, match=f"{path}: these weights classify images: give those of pretrain.py"):
            weights.load_mae(path)
    with pytest.raises(UserError, match=r"mae\.pth: these weights reconstruct images: give those of finetune\.py"):
        weights.load_classifier(mae_file[0])


def test_a_failed_write_names_the_file_and_leaves_the_old_one(mae_file, monkeypatch):
    path, network = mae_file
    before = path.read_bytes()

    def half(_, temporary):
        temporary.write(before[:100])
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match=r"mae\.pth: is the disk full"):
        weights.save(path, network.state_dict(), {}, [], {}, SEEN)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["mae.pth"]


def test_weights_of_strangers_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Calls(os.system, "touch executed")}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match=r"hostile\.pth"):
        weights.load_mae(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # where nothing stops it


WRONG_WEIGHTS = {
    "missing tensor": (lambda c: c["model"].pop("norm.weight"), r"norm\.weight is missing"),
    "unexpected tensor": (lambda c: c["model"].update(x=torch.zeros(1)), "unexpected tensor 'x'"),
    "other shape": (lambda c: c["model"].update(cls_token=torch.zeros(1)), "cls_token should have"),
    "no tensor": (lambda c: c["model"].update(cls_token="text"), "cls_token should have"),
    "NaN": (lambda c: c["model"]["norm.bias"].fill_(float("nan")), r"norm\.bias has NaN"),
    "huge network": (lambda c: c["config"].update(embed_dim=10**9), "embed_dim"),
    "many patches": (lambda c: c["config"].update(img_size=4096, patch_size=1), "128×128 patches"),
    "unknown option": (lambda c: c["config"].update(colour=1), "colour"),
    "no configuration": (lambda c: c.pop("config"), "'config' is missing"),
    "no transform": (lambda c: c["config"].pop("transform"), "no usable transform"),
    "empty transform": (lambda c: c["config"].update(transform={}), "no usable transform"),
    "half a transform": (lambda c: c["config"]["transform"].pop("mean"), "no usable transform"),
    "pixel range": (lambda c: c["run"].update(pixel_range=[1, 2]), "pixel_range"),
    "no pixel range": (lambda c: c["run"].update(pixel_range=None), "pixel_range"),
    "other transform": (lambda c: c["config"].update(transform={**TRANSFORM, "kind": "cube"}), "transform"),
    "class names": (lambda c: c.update(class_names=[1, 2]), "class names must be text"),
    "classes of an MAE": (lambda c: c["run"].update(classes=[1]), "classes in its run"),
    "huge range": (lambda c: c["run"].update(pixel_range=[0, 10**400, 0]), "pixel_range"),
    "classes of the data": (lambda c: c["run"].update(class_names=5), "class_names in its run"),
    "circumstances": (lambda c: c["run"].update(made="x"), "made in its run"),
    "residuals of smooth lenses": (lambda c: c["run"].update(smooth_rms="x"), "smooth_rms"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_by_name(name, mae_file):
    spoil, reason = WRONG_WEIGHTS[name]
    path = spoiled(mae_file[0], spoil)
    with pytest.raises(UserError, match=rf"spoiled\.pth.*{reason}"):
        weights.load_mae(path)


def test_a_wrong_number_of_orientations_is_a_short_line(tmp_path):
    config = {"mae": {**TINY, "decoder_embed_dim": 8, "decoder_num_heads": 2}, "num_classes": 3}
    path, _ = saved(tmp_path / "residual.pth", functools.partial(ResidualClassifier, transform=TRANSFORM), config)
    weights.load_classifier(path)
    content = torch.load(path, weights_only=True)
    for wrong in ("8" * 10**6, 4, None, [8]):
        content["config"]["orientations"] = wrong
        torch.save(content, path)
        with pytest.raises(UserError, match="2 or 8 orientations") as error:
            weights.load_classifier(path)
        assert len(str(error.value)) < 500


def test_a_classifier_needs_a_name_for_each_class(classifier_file):
    path = spoiled(classifier_file[0], lambda c: c["class_names"].pop())
    with pytest.raises(UserError, match=r"spoiled\.pth: the number of class names is wrong"):
        weights.load_classifier(path)


def test_files_that_hold_no_weights_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot read weights .*missing\.pth"):
        weights.read(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "list.pth"):
        with pytest.raises(UserError, match=rf"{name}: not a weights file"):
            weights.read(tmp_path / name)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"x\.safetensors needs safetensors: pip install"):
        weights.read(tmp_path / "x.safetensors", num_heads=2, foreign=True)


@pytest.mark.parametrize("run", ["pretrain", "head", "residual"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [(lambda content: content["config"].pop("transform"),
      "{file}: its configuration has no usable transform"),
     (lambda content: content["run"].update(split="an older one"), "another split")],
)  # fmt: skip
def test_weights_of_no_transform_or_another_split_are_refused_by_every_script(
    damage, named, run, runs, folder, tmp_path
):
    """With other constants a network is confidently wrong; under another split it has seen test images."""
    file = PRETRAINED if run == "pretrain" else CLASSIFIER
    content = torch.load(runs / run / file, weights_only=True)
    damage(content)
    torch.save(content, tmp_path / file)
    what = "reconstruction" if run == "pretrain" else "classifier"
    strategy = "residual" if run == "residual" else "head"
    data = ("--data", folder, "--cache-dir", runs / "cache")
    for script, command in (
        ("export.py", ("--what", what, "--weights", tmp_path / file, "--out", tmp_path / "m.onnx")),
        ("finetune.py", ("--pretrained", tmp_path / file, "--strategy", strategy, "--out",
                         tmp_path / "run")),
        *(("evaluate.py" if run != "pretrain" else "reconstruct.py",
           ("--weights", tmp_path / file, "--out", tmp_path / "out", "--split", part)) for part in ("test", "all")),
    ):  # fmt: skip
        assert_refused(script, (*data, *command), named.format(file=tmp_path / file))
