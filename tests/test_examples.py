"""The minimal consumers of an exported model: each agrees with PyTorch on the same images."""

import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import HUNG, ROOT, run_script

from lib import datasets, familiarity, weights

EXAMPLES = ROOT / "examples"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=60000", "--timeout=60000", "--dump-dom",
)  # fmt: skip
needs_node = pytest.mark.skipif(
    not shutil.which("node") or not (EXAMPLES / "node_modules").is_dir(),
    reason="needs Node.js and `npm ci` in examples/",
)
EXAMPLE_COMMANDS = [
    pytest.param((sys.executable, EXAMPLES / "classify.py"), id="python"),
    pytest.param(("node", EXAMPLES / "classify.mjs"), id="javascript", marks=needs_node),
]
UNLIKE = "Unlike the training images: the probabilities mean nothing."


def page_of(web, files, profile, port=0):
    """The page in the folder `web` once it has shown the files, and the HTTP methods it used.

    `profile` is a folder of the browser's; it knows again what lies at the same `port` (0: any).
    """
    methods = set()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            methods.add(self.command)

    handler = functools.partial(Quiet, directory=web.parent)
    with http.server.ThreadingHTTPServer(("localhost", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}/{web.name}/?files={','.join(files)}"
        page = subprocess.check_output(
            [CHROMIUM, *CHROMIUM_OPTIONS, f"--user-data-dir={profile}", address],
            text=True, stderr=subprocess.DEVNULL, timeout=HUNG,
        )  # fmt: skip
        server.shutdown()
    assert "Ready." in page, page
    return page, methods


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def calibrated_on_all(path, dataset, out):
    """Write a classifier's weights anew, with a familiarity that is calibrated on all images."""
    content = torch.load(path, weights_only=True)
    rows = np.arange(len(dataset.images))
    known, config = familiarity.fit(dataset, rows, rows, content["config"]["transform"])
    content["familiarity"] = {"model": known.state_dict(), "config": config}
    torch.save(content, out)


@pytest.fixture(scope="module")
def site(runs, folder, tmp_path_factory):
    """A copy of examples/web with models, three images and noise.

    Returns (folder, what PyTorch gives as probabilities, what onnxruntime gives as familiarity).
    """
    root = tmp_path_factory.mktemp("examples")
    web = root / "web"
    shutil.copytree(EXAMPLES / "web", web)
    shutil.copy(EXAMPLES / "formats.mjs", root)
    if (EXAMPLES / "node_modules").is_dir():
        (root / "node_modules").symlink_to(EXAMPLES / "node_modules")
    cache = ("--data", folder, "--cache-dir", runs / "cache")
    dataset = datasets.load(folder, runs / "cache")
    path = root / "weights.pth"
    calibrated_on_all(runs / "full" / "vit-mae-classifier-wt.pth", dataset, path)
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
def test_javascript_example_names_files_that_are_none(site):
    web = site[0]
    (web / "text.npy").write_text("no array")
    (web / "hostile.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O', }")
    command = ["node", EXAMPLES / "classify.mjs", web / "classifier.onnx"]
    for name in ("text.npy", "hostile.npy"):
        process = subprocess.run([*command, web / name], capture_output=True, text=True)
        assert process.returncode != 0
        assert "Error: not a" in process.stderr


@needs_node
@pytest.mark.parametrize("arguments", [(), ("model.onnx",)])
def test_javascript_example_says_how_it_is_called(arguments):
    process = subprocess.run(["node", EXAMPLES / "classify.mjs", *arguments], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "error: give a model and files: node classify.mjs MODEL.onnx FILE.npy ...\n"


@needs_node
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_web_page_classifies_in_the_browser(site, tmp_path):
    web, expected, familiar = site
    page, methods = page_of(web, [f"{i}.npy" for i in range(4)], tmp_path)
    assert_outputs(page, expected, familiar)
    assert page.count("<canvas") == 8
    *others, noise = page.split("<article")[1:]
    assert f"unfamiliar</h2><p>{UNLIKE}</p>" in noise
    assert UNLIKE not in "".join(others)
    assert methods == {"GET"}  # nothing is sent
    assert "trained on other data" not in page


@needs_node
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_web_page_takes_models_that_were_replaced_and_doubts_maps_of_other_data(site, tmp_path):
    """A browser takes a file of 30 days as fresh for three: the old model went on answering."""
    web, port = tmp_path / "web", free_port()
    shutil.copytree(site[0].parent, tmp_path, dirs_exist_ok=True, symlinks=True)
    for path in (*web.glob("*.onnx"), *web.glob("*.mjs"), tmp_path / "formats.mjs"):
        os.utime(path, (time.time() - 30 * 86400,) * 2)
    first, _ = page_of(web, ["0.npy"], tmp_path / "profile", port)
    assert "classifier.onnx tells axion, cdm, no_sub apart" in first
    proto = onnx.load(web / "classifier.onnx")
    metadata = {p.key: p.value for p in proto.metadata_props}
    onnx.helper.set_model_props(
        proto, metadata | {"class_names": '["new1", "new2", "new3"]', "data_fingerprint": "other"}
    )
    onnx.save(proto, web / "classifier.onnx")
    second, _ = page_of(web, ["0.npy"], tmp_path / "profile", port)
    assert "classifier.onnx tells new1, new2, new3 apart" in second
    assert "reconstruction.onnx was trained on other data" in second
    (web / "app.mjs").write_text((web / "app.mjs").read_text().replace("Ready.", "Ready. A newer page."))
    assert "A newer page" in page_of(web, ["0.npy"], tmp_path / "profile", port)[0]
