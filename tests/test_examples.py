"""The minimal consumers of an exported model: each agrees with PyTorch on the same images."""

import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CLASSIFIER, HUNG, ROOT, run_script

from lib import datasets, familiarity, weights

EXAMPLES = ROOT / "examples"
needs_node = pytest.mark.skipif(not shutil.which("node") or not (EXAMPLES / "node_modules").is_dir(),
                                reason="needs Node.js and `npm ci` in examples/")  # fmt: skip
EXAMPLE_COMMANDS = [pytest.param((sys.executable, EXAMPLES / "classify.py"), id="python"),
                    pytest.param(("node", EXAMPLES / "classify.mjs"), id="javascript", marks=needs_node)]  # fmt: skip


def calibrated_on_all(path, dataset, out):
    """Write a classifier's weights anew, with a familiarity that is calibrated on all images."""
    content = torch.load(path, weights_only=True)
    rows = np.arange(len(dataset.images))
    known, config = familiarity.fit(dataset, rows, rows, content["config"]["transform"])
    content["familiarity"] = {"model": known.state_dict(), "config": config}
    torch.save(content, out)


@pytest.fixture(scope="module")
def site(runs, folder, tmp_path_factory):
    """A folder with models, three images and noise.

    Returns (folder, what PyTorch gives as probabilities, what onnxruntime gives as familiarity).
    """
    web = tmp_path_factory.mktemp("examples")
    cache = ("--data", folder, "--cache-dir", runs / "cache")
    dataset = datasets.load(folder, runs / "cache")
    path = web / "weights.pth"
    calibrated_on_all(runs / "full" / CLASSIFIER, dataset, path)
    run_script("export.py", *cache, "--weights", path, "--out", web / "classifier.onnx")
    shutil.copy(runs / "reconstruction.onnx", web)
    noise = np.random.default_rng(0).random((1, 64, 64), dtype=np.float32)
    images = np.concatenate([dataset.images[[5, 105, 205]], noise])
    for i, kind in enumerate(("<f8", ">f4", "<f4", "<f4")):
        np.save(web / f"{i}.npy", images[i].astype(kind))
    model, _ = weights.load_classifier(path)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images)[:, None]).softmax(1).numpy()
    session = onnxruntime.InferenceSession(web / "classifier.onnx")
    (familiar,) = session.run(["familiarity"], {"images": images[:, None]})
    assert familiar[3] < 0.01 < familiar[:3].min()
    return web, expected, familiar


def assert_outputs(text, expected, familiar):
    """Probabilities and familiarity, printed as name=0.123 or shown as name 0.123, are the expected."""
    found = re.findall(r"(?:axion|cdm|no_sub)[= ](\d\.\d+)", text)
    found = np.array(found, dtype=float).reshape(-1, 3)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4
    found = np.array(re.findall(r"familiarity[= ](\d\.\d+)", text), dtype=float)
    assert found.shape == familiar.shape
    assert np.abs(found - familiar).max() < 0.03


@pytest.mark.parametrize("command", EXAMPLE_COMMANDS)
def test_example(command, site):
    web, expected, familiar = site
    files = [f"{i}.npy" for i in range(4)]
    process = subprocess.run([*command, "classifier.onnx", *files], cwd=web, capture_output=True,
                             text=True, timeout=HUNG)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert_outputs(process.stdout, expected, familiar)
    names = [("axion", "cdm", "no_sub")[i] for i in expected[:3].argmax(axis=1)]
    words = [line.split()[:2] for line in process.stdout.splitlines()]
    assert words == [list(pair) for pair in zip(files, [*names, "unfamiliar"], strict=True)]


@needs_node
@pytest.mark.parametrize("arguments", [(), ("model.onnx",)])
def test_javascript_example_says_how_it_is_called(arguments):
    process = subprocess.run(["node", EXAMPLES / "classify.mjs", *arguments], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "error: give a model and files: node classify.mjs MODEL.onnx FILE.npy ...\n"


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_javascript_example_names_the_package_that_is_missing(tmp_path):
    for name in ("classify.mjs", "formats.mjs", "fits.mjs"):
        shutil.copy(EXAMPLES / name, tmp_path)
    process = subprocess.run(["node", tmp_path / "classify.mjs", "a.onnx", "b.npy"], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: onnxruntime-web is not there: npm ci") and process.stderr.count("\n") == 1


def damaged(path, out):
    """Write a model whose weights have changed a little, as damage or another processor may change its answers."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        numbers = onnx.numpy_helper.to_array(tensor)
        if numbers.dtype == np.float32 and numbers.ndim == 2:
            tensor.CopyFrom(onnx.numpy_helper.from_array(numbers * np.float32(1.5), tensor.name))
    onnx.save(proto, out)


@pytest.mark.parametrize("command", EXAMPLE_COMMANDS)
def test_example_refuses_other_answers_than_those_of_pytorch(command, site, tmp_path):
    web = site[0]
    damaged(web / "classifier.onnx", tmp_path / "m.onnx")
    process = subprocess.run([*command, tmp_path / "m.onnx", web / "0.npy"], capture_output=True, text=True)
    assert process.returncode != 0
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert re.search(r"m\.onnx: .*its probabilities of the images stored in it is .* from PyTorch's", line), line
