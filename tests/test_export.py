"""export.py and lib/onnxfile.py: the exported file is the network, or it is not written."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import (CLASSIFIER, PRETRAINED, ROOT, TINY_NETWORK, Terminal, assert_user_error, run_script,
                      write_classes)  # fmt: skip

import export
import mae
from lib import datasets, onnxfile, onnxwrite, weights
from lib.errors import UserError
from lib.files import sha256_of


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_less_precision_gives_a_smaller_file_that_agrees(precision, runs, folder, tmp_path):
    out = tmp_path / "small.onnx"
    process = run_script(
        "export.py", "--weights", runs / "full" / CLASSIFIER, "--data", folder,
        "--cache-dir", runs / "cache", "--precision", precision, "--out", out,
        "--allowed-fall", 0.3,  # of 37 images, from a network that is hardly better than chance
    )  # fmt: skip
    assert "macro AUC" in process.stdout
    assert list(tmp_path.iterdir()) == [out]
    assert out.stat().st_size < (runs / "classifier.onnx").stat().st_size
    metadata = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert metadata["precision"] == precision
    assert json.loads(metadata["class_names"]) == ["axion", "cdm", "no_sub"]
    images = np.array(datasets.load(folder, runs / "cache").images[::10, None])
    reduced = export.run_session(out, images)[0]
    assert reduced.dtype == np.float32
    assert np.allclose(reduced.sum(1), 1, atol=1e-2)
    model, _ = weights.load_classifier(runs / "full" / CLASSIFIER)
    with torch.no_grad():
        expected = onnxwrite.Probabilities(model).eval()(torch.from_numpy(images)).numpy()
    spread = np.abs(expected - expected.mean(axis=0)).mean()  # how far a constant answer would be
    assert 0 < np.abs(reduced - expected).mean() < min(0.05, 0.3 * spread)


def test_int8_multiplies_unsigned_bytes_and_hands_on_floats(runs, folder, tmp_path):
    """No processor saturates in sums of unsigned bytes."""
    out = tmp_path / "int8.onnx"
    shutil.copy(runs / "classifier.onnx", out)
    images = np.array(datasets.load(folder, runs / "cache").images[:16, None])
    onnxwrite.reduce_precision(out, "int8", images, {})
    proto = onnx.load(out)
    made_by = {name: node for node in proto.graph.node for name in node.output}
    gemms = [node for node in proto.graph.node if node.op_type == "Gemm"]
    depth = json.loads((runs / "full" / "config.json").read_text())["model"]["depth"]
    assert len(gemms) == 4 * depth + 2  # of attention, MLP and head
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in gemms:
        for factor in (made_by[name] for name in node.input[:2]):
            assert factor.op_type == "DequantizeLinear"
            assert values[factor.input[2]].dtype == np.uint8  # its zero point
    assert not any(value.dtype == np.int8 for value in values.values())
    quantised = {n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    assert not any(node.output[0] in quantised for node in gemms)


@pytest.fixture
def exported_already(runs, monkeypatch):
    """In place of exporting, copy what the runs have exported."""

    def copy(model, path, metadata):
        shutil.copy(runs / "classifier.onnx", path)

    monkeypatch.setattr(export, "write_onnx", copy)


@pytest.mark.parametrize(("precision", "difference", "fallen", "named"), [
    ("float32", 2e-4, {}, r"2\.0e-04"), ("float16", 0, {"macro AUC": 0.98}, "macro AUC falls by 0.0100"),
    ("float16", 0, {"accuracy": 0.98}, "accuracy falls by 0.0100"),
])  # fmt: skip
def test_an_export_that_differs_or_loses_auc_or_accuracy_is_not_left(
    precision, difference, fallen, named, runs, folder, exported_already, tmp_path, monkeypatch
):
    same = {"macro AUC": 0.99, "accuracy": 0.99}
    values = iter((same, same | fallen))
    monkeypatch.setattr(export, "worst_differences", lambda *_: {"probabilities": difference})
    monkeypatch.setattr(export, "quality_of", lambda *_: next(values))
    with pytest.raises(UserError, match=named):
        export.main(["--weights", str(runs / "head" / CLASSIFIER), "--data", str(folder), "--cache-dir",
                     str(runs / "cache"), "--out", str(tmp_path / "x.onnx"), "--precision", precision])  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_an_export_uses_the_packed_copy_that_the_training_made(runs, folder, tmp_path):
    shutil.rmtree(folder / ".packed", ignore_errors=True)  # of other tests
    arguments = ["--weights", str(runs / "head" / CLASSIFIER), "--out", str(tmp_path / "x.onnx")]
    export.main(arguments)
    assert not (folder / ".packed").exists()
    (runs / "cache").rename(runs / "elsewhere")
    try:
        export.main(arguments)
    finally:
        (runs / "elsewhere").rename(runs / "cache")
    assert (folder / ".packed").exists()


def test_each_step_is_named_on_a_terminal_alone(runs, folder, tmp_path, capsys):
    arguments = ["--weights", runs / "full" / CLASSIFIER, "--data", folder, "--cache-dir", runs / "cache"]
    with contextlib.redirect_stderr(Terminal()) as terminal:
        export.main([*map(str, arguments), "--out", str(tmp_path / "x.onnx")])
    steps = terminal.getvalue().splitlines()
    assert len(steps) >= 4
    assert all(step.endswith(" ...") for step in steps)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run_script("export.py", *arguments, "--out", tmp_path / "y.onnx").stderr == ""


def test_exported_maps_are_those_of_pytorch(runs, folder):
    dataset = datasets.load(folder, runs / "cache")
    images = np.array(dataset.images[:5, None])
    residual, score = export.run_session(runs / "reconstruction.onnx", images, batch=2)
    network, transform, _ = weights.load_mae(runs / "pretrain" / PRETRAINED)
    masks = mae.complementary_masks(network.num_patches, 0.75, onnxwrite.ROUNDS)
    with torch.no_grad():
        expected = network.eval().residual(transform(torch.from_numpy(images)), masks)
    assert np.allclose(residual, expected.numpy(), atol=1e-4)
    assert np.allclose(score, mae.residual_scores(expected).numpy(), rtol=1e-3)


def test_exported_file_equals_pytorch_and_carries_its_identity(runs, folder):
    path = runs / "classifier.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(metadata["class_names"]) == ["axion", "cdm", "no_sub"]
    proto = onnx.load(path)
    assert (proto.ir_version, proto.opset_import[0].version) == (10, 20)
    assert (ROOT / "LICENSE").read_text().startswith(metadata["licence"])
    strategies = ("head", "layernorm", "full")
    digests = {sha256_of(runs / s / CLASSIFIER): s for s in strategies}
    strategy = digests[metadata["weights_sha256"]]
    files = [runs / s / CLASSIFIER for s in strategies]
    aucs = [weights.load_classifier(f)[1]["run"]["best"]["validation_macro_auc"] for f in files]
    assert aucs[strategies.index(strategy)] == max(aucs)
    model, _ = weights.load_classifier(runs / strategy / CLASSIFIER)
    images = np.array(datasets.load(folder, runs / "cache").images[:21, None])
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for count in (1, 7, 21):
        (got,) = session.run(None, {"images": images[:count]})
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(images[:count])).softmax(1).numpy()
        assert got.shape == (count, 3)
        assert np.abs(got - expected).max() < 1e-4


def test_a_model_with_weights_in_another_file_is_refused(runs, tmp_path):
    proto = onnx.load(runs / "classifier.onnx")
    path = tmp_path / "outside.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UserError, match=r"outside\.onnx"):
        onnxfile.open_classifier(path)


def test_classifiers_validated_on_different_data_are_not_compared(runs, packed, tmp_path):
    run_script("finetune.py", "--data", packed, "--pretrained", "none", "--strategy", "full",
               "--epochs", 1, "--labels", 0.5, "--out", tmp_path / "other", *TINY_NETWORK)  # fmt: skip
    other = tmp_path / "other" / CLASSIFIER
    content = torch.load(other, weights_only=True)
    content["run"]["data_fingerprint"] = "elsewhere"
    torch.save(content, other)
    refused = run_script("export.py", "--weights", runs / "full" / CLASSIFIER, other, "--out",
                         tmp_path / "x.onnx", check=False)  # fmt: skip
    assert_user_error(refused, "validated on different data")


def test_data_of_other_classes_is_named_before_anything_is_exported(runs, tmp_path, capsys):
    data = write_classes(tmp_path / "data", {"cdm": 12, "no_sub": 12, "spiral": 12}, size=64)
    path = runs / "full" / CLASSIFIER
    with pytest.raises(UserError, match=f"{path} knows the classes .*, not spiral: give data"):
        export.main(["--weights", str(path), "--data", str(data), "--precision", "float16",
                     "--out", str(tmp_path / "x.onnx")])  # fmt: skip
    assert "float32:" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["classifier", "reconstruction", "float16", "int8"])
def test_an_exported_file_names_no_path_of_this_machine(name, runs, folder, tmp_path):
    """It held a thousand stack traces of torch's exporter, and the folder of the data."""
    path = runs / f"{name}.onnx"
    if not path.exists():
        path = tmp_path / f"{name}.onnx"
        run_script("export.py", "--data", folder, "--cache-dir", runs / "cache", "--weights",
                   runs / "full" / CLASSIFIER, "--precision", name, "--allowed-fall", 1,
                   "--out", path)  # fmt: skip
    content = path.read_bytes()
    for part in (ROOT, folder, runs, sys.prefix, Path.home(), "site-packages", "mae.py", "stack_trace"):
        assert os.fsencode(part) not in content, part
