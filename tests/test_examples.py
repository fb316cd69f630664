"""The minimal consumers of an exported model: each agrees with PyTorch on the same images."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import HUNG, ROOT, run_script

from lib import data, weights

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


@pytest.fixture(scope="module")
def site(runs, folder, tmp_path_factory):
    """A copy of examples/web with models and three images; probabilities expected of PyTorch."""
    root = tmp_path_factory.mktemp("examples")
    web = root / "web"
    shutil.copytree(EXAMPLES / "web", web)
    shutil.copy(EXAMPLES / "formats.mjs", root)
    if (EXAMPLES / "node_modules").is_dir():
        (root / "node_modules").symlink_to(EXAMPLES / "node_modules")
    cache = ("--data", folder, "--cache-dir", runs / "cache")
    path = runs / "full" / "vit-mae-classifier-wt.pth"
    run_script("export.py", *cache, "--weights", path, "--out", web / "classifier.onnx")
    shutil.copy(runs / "reconstruction.onnx", web)
    dataset = data.load(folder, runs / "cache")
    images = np.array(dataset.images[[5, 105, 205]])
    for i, kind in enumerate(("<f8", ">f4", "<f4")):
        np.save(web / f"{i}.npy", images[i].astype(kind))
    model, _ = weights.load_classifier(path)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images)[:, None]).softmax(1).numpy()
    return web, expected


def probabilities_in(text):
    """Probabilities printed as name=0.123, or shown as name 0.123, in rows of three."""
    found = re.findall(r"(?:axion|cdm|no_sub)[= ](\d\.\d+)", text)
    return np.array(found, dtype=float).reshape(-1, 3)


def test_python_example(site):
    web, expected = site
    command = [sys.executable, EXAMPLES / "classify.py", web / "classifier.onnx"]
    output = subprocess.check_output([*command, *(web / f"{i}.npy" for i in range(3))], text=True)
    assert np.abs(probabilities_in(output) - expected).max() < 1e-4


@needs_node
def test_javascript_example(site):
    web, expected = site
    command = ["node", EXAMPLES / "classify.mjs", web / "classifier.onnx"]
    output = subprocess.check_output([*command, *(web / f"{i}.npy" for i in range(3))], text=True)
    assert np.abs(probabilities_in(output) - expected).max() < 1e-4
    (web / "text.npy").write_text("no array")
    (web / "hostile.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O', }")
    for name in ("text.npy", "hostile.npy"):
        process = subprocess.run([*command, web / name], capture_output=True, text=True)
        assert process.returncode != 0
        assert "Error: not a" in process.stderr


@needs_node
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_web_page_classifies_in_the_browser(site, tmp_path):
    web, expected = site
    commands = set()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            commands.add(self.command)

    handler = functools.partial(Quiet, directory=web.parent)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}/web/?files=0.npy,1.npy,2.npy"
        page = subprocess.check_output(
            [CHROMIUM, *CHROMIUM_OPTIONS, f"--user-data-dir={tmp_path}", address],
            text=True, stderr=subprocess.DEVNULL, timeout=HUNG,
        )  # fmt: skip
        server.shutdown()
    assert "Ready." in page, page
    assert np.abs(probabilities_in(page) - expected).max() < 1e-4
    assert page.count("<canvas") == 6
    assert commands == {"GET"}  # nothing is sent
