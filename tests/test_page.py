"""The web page: what a visitor picks or drops is classified in the browser, in order, and nothing is sent."""

import contextlib
import csv
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from browser import CHROMIUM, browser, serving
from conftest import ROOT, with_metadata
from matplotlib import colormaps
from matplotlib.colors import AsinhNorm
from test_examples import damaged, needs_node, site  # noqa: F401, a fixture
from test_images import objects
from test_predict_inputs import SIDE, image_of, write_models

from lib import plots

PAGE = ROOT / "examples" / "page.py"
UNLIKE = "Unfamiliar images are unlike the training images: their probabilities mean nothing."
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
pytestmark = [needs_node]


def build(models, out):
    """Write the page with the models of a folder, and put its files beside the page."""
    process = subprocess.run([sys.executable, PAGE, models, "--out", out], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for path in models.glob("*.npy"):
        shutil.copy(path, out)
    return out


def in_place(models, out):
    """The sources of the page, as `examples/` has them, with the models of a folder beside them."""
    examples = PAGE.parent
    shutil.copytree(examples / "web", out)
    for name in ("formats.mjs", "fits.mjs"):
        shutil.copy(examples / name, out.parent)
    (out.parent / "node_modules").symlink_to(examples / "node_modules")
    for path in [*models.glob("*.npy"), *models.glob("*.onnx")]:
        shutil.copy(path, out)
    return out


@contextlib.contextmanager
def opened(folder, profile, files=(), port=0):
    """The page in a folder, its models open and its files classified, and the requests it made."""
    with serving(folder.parent, port) as (address, requests), browser(profile) as page:
        page.go(f"{address}/{folder.name}/?files={','.join(files)}")
        page.until("document.getElementById('status')?.textContent.startsWith('Ready')")
        if files:
            until_finished(page)
        yield page, requests


def until_finished(page):
    page.until("/^[\\d,]+ images?$/.test(document.getElementById('progress').textContent)")


def rows_of(page):
    """The cells of the rows in sight."""
    return page.evaluate(
        "[...document.querySelectorAll('#rows tr')].slice(1, -1).map((row) =>"
        " [...row.cells].slice(1).map((cell) => cell.textContent))"
    )


def errors_of(page):
    return page.evaluate("[...document.querySelectorAll('#errors li')].map((line) => line.textContent)")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The page with quick models of 8 pixels, whose probabilities and residuals are the mean brightness."""
    models = tmp_path_factory.mktemp("models")
    write_models(models)
    for i, mean in enumerate((0.5, 0.2, 0.9)):
        (models / "examples" / "kind").mkdir(parents=True, exist_ok=True)
        np.save(models / "examples" / "kind" / f"{i}.npy", image_of(mean))
    (models / "examples" / "noisy" / "kind").mkdir(parents=True, exist_ok=True)
    np.save(models / "examples" / "noisy" / "kind" / "0.npy", image_of(0.1))
    return build(models, models / "page")


@pytest.fixture
def cutouts(tmp_path):
    """Function that writes images of these means, and returns their paths."""

    def write(means):
        folder = tmp_path / "cutouts"
        folder.mkdir(exist_ok=True)
        for name, mean in means.items():
            np.save(folder / f"{name}.npy", image_of(mean))
        return [folder / f"{name}.npy" for name in means]

    return write


# The folder


def test_a_folder_that_is_no_page_is_not_replaced(small, tmp_path):
    out = shutil.copytree(small, tmp_path / "page")
    (out / "mine.txt").touch()
    for folder in (out, tmp_path):
        process = subprocess.run([sys.executable, PAGE, small.parent, "--out", folder], capture_output=True, text=True)
        assert process.returncode == 2
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    (out / "mine.txt").unlink()
    build(small.parent, out)


def test_the_page_takes_the_first_folder_with_both_models_and_says_what_is_missing(small, tmp_path):
    shutil.copy(small / "classifier.onnx", tmp_path)
    command = [sys.executable, PAGE, "--out", tmp_path / "page", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path} has no reconstruction.onnx: make reproduce makes both\n"
    assert not (tmp_path / "page").exists()
    process = subprocess.run([*command, small.parent], capture_output=True, text=True)
    assert process.stdout == f"{tmp_path / 'page'}: the page with the models of {small.parent} and 4 examples\n"


@needs_chromium
def test_the_page_runs_under_any_prefix_and_asks_its_own_folder_alone(small, tmp_path):
    shutil.copytree(small, tmp_path / "any" / "prefix" / "page")
    with serving(tmp_path) as (address, requests), browser(tmp_path / "profile") as page:
        page.go(f"{address}/any/prefix/page/")
        page.until("document.getElementById('status')?.textContent.startsWith('Ready')")
        page.click("#examples button")  # all
        until_finished(page)
        assert [row[:2] for row in rows_of(page)] == [
            *([f"kind/{i}.npy", "bright"] for i in range(3)), ["noisy/kind/0.npy", "bright"]]  # fmt: skip
        buttons = page.evaluate("[...document.querySelectorAll('#examples button')].map((each) => each.textContent)")
        assert buttons == ["all", "0.npy", "1.npy", "2.npy", "noisy/0.npy"]
        assert all(method == "GET" and path.startswith("/any/prefix/page/") for method, path in requests)
        sent = page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')")
        assert sent == "refused"


@needs_chromium
def test_the_page_says_what_it_needs(small, tmp_path):
    with browser(tmp_path) as page:
        page.go((small / "index.html").as_uri())
        page.until("document.getElementById('status')")
        assert "This page needs JavaScript and a web server" in page.text()
        assert "Choose" not in page.text()


@needs_chromium
@pytest.mark.parametrize("broken", ["classifier", "reconstruction", "gone", "exchanged", "damaged"])
def test_models_that_do_not_fit_are_named_in_a_sentence(broken, small, site, tmp_path):  # noqa: F811
    folder = shutil.copytree(small, tmp_path / "page")
    first, second = folder / "classifier.onnx", folder / "reconstruction.onnx"
    if broken == "exchanged":
        shutil.copy(second, tmp_path / "kept")
        first.rename(second)
        shutil.copy(tmp_path / "kept", first)
        sentence = "classifier.onnx: gives residual and score instead of probabilities: are classifier and maps"
    elif broken == "damaged":
        damaged(site[0] / "classifier.onnx", first)
        sentence = "classifier.onnx: its probabilities of the images stored in it is"
    elif broken == "gone":
        second.unlink()
        sentence = "there is no reconstruction.onnx beside this page"
    else:
        (folder / f"{broken}.onnx").write_text("no model")
        sentence = f"{broken}.onnx: "
    with serving(folder) as (address, _), browser(tmp_path / "profile") as page:
        page.go(address)
        page.until("document.querySelector('#status.error')")
        assert page.evaluate("document.getElementById('status').textContent").startswith(sentence)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@needs_chromium
@pytest.mark.parametrize("made", [build, in_place])
def test_the_page_takes_what_was_replaced_and_doubts_maps_of_other_data(made, site, tmp_path):  # noqa: F811
    """A browser takes a file of 30 days as fresh for three: the old model went on answering."""
    folder, port = made(site[0], tmp_path / "page"), free_port()
    for path in folder.glob("*.*"):
        os.utime(path, (time.time() - 30 * 86400,) * 2)
    with opened(folder, tmp_path / "profile", ["0.npy"], port) as (page, _):
        assert "classifier.onnx tells axion, cdm, no_sub apart" in page.text()
        assert "trained on other data" not in page.text()
    classifier = folder / "classifier.onnx"
    with_metadata(classifier, classifier, class_names='["new1", "new2", "new3"]', data_fingerprint="other")
    with opened(folder, tmp_path / "profile", ["0.npy"], port) as (page, _):
        assert "classifier.onnx tells new1, new2, new3 apart" in page.text()
        assert "reconstruction.onnx was trained on other data" in page.text()
    (folder / "app.mjs").write_text((folder / "app.mjs").read_text().replace("Ready.", "Ready. A newer page."))
    with opened(folder, tmp_path / "profile", ["0.npy"], port) as (page, _):
        assert "A newer page" in page.text()


# Files


@needs_chromium
def test_the_page_classifies_as_pytorch_does(site, tmp_path):  # noqa: F811
    models, expected, familiar = site
    folder = build(models, tmp_path / "page")
    with opened(folder, tmp_path / "profile", [f"{i}.npy" for i in range(4)]) as (page, requests):
        rows = rows_of(page)
        assert UNLIKE in page.text()
        assert page.evaluate("document.querySelectorAll('#rows canvas').length") == 8
    assert {method for method, _ in requests} == {"GET"}  # nothing is sent
    names = [*(("axion", "cdm", "no_sub")[i] for i in expected[:3].argmax(axis=1)), "unfamiliar"]
    assert [row[:2] for row in rows] == [[f"{i}.npy", name] for i, name in enumerate(names)]
    assert np.abs(np.array([row[2:5] for row in rows], dtype=float) - expected).max() < 1e-4
    assert np.abs(np.array([row[5] for row in rows], dtype=float) - familiar).max() < 0.03


@needs_chromium
def test_files_wait_for_the_models_and_are_classified_in_order(small, cutouts, tmp_path):
    paths, gate = cutouts({"b": 0.3, "a": 0.4, "c": 0.5}), threading.Event()
    np.save(tmp_path / "stack.npy", np.stack([image_of(0.6)] * 50))
    with serving(small, gate=gate) as (address, _), browser(tmp_path / "profile") as page:
        page.go(address)
        page.until("document.getElementById('tool')?.hidden === false")
        page.pick("#pick", [tmp_path / "stack.npy"])
        page.pick("#pick", paths)
        assert page.evaluate("document.getElementById('status').textContent") == "Loading the models…"
        gate.set()
        until_finished(page)
        assert "Loading" not in page.text()
        page.evaluate("document.getElementById('scroll').scrollTop = 1e6")
        page.until("document.getElementById('rows').textContent.includes('c.npy')")
        assert [row[0] for row in rows_of(page)][-5:] == ["stack.npy[48]", "stack.npy[49]", "b.npy", "a.npy", "c.npy"]


@needs_chromium
def test_folders_are_read_without_hidden_files(small, cutouts, tmp_path):
    (path,) = cutouts({"usual": 0.5})
    root = tmp_path / "survey"
    for name in ("a/b/2.npy", "a/10.npy", ".hidden/3.npy", "__MACOSX/4.npy", "a/._2.npy", "5.NPY"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / name)
    for i in range(120):  # a browser lists 100 at once
        (root / "more").mkdir(exist_ok=True)
        shutil.copy(path, root / "more" / f"{i}.npy")
    (root / "notes.txt").touch()
    with opened(small, tmp_path / "profile") as (page, _):
        page.drop([root, path])
        page.until("document.getElementById('progress').textContent === '124 images'")
        assert [row[0] for row in rows_of(page)][:4] == [
            "survey/5.NPY", "survey/a/10.npy", "survey/a/b/2.npy", "survey/more/0.npy"]  # fmt: skip
        assert errors_of(page) == ["1 other file not read: survey/notes.txt"]


@needs_chromium
def test_what_is_no_image_is_named_in_a_sentence(small, tmp_path):
    stack = np.stack([image_of(0.5), image_of(0), np.full((SIDE, SIDE), np.nan, np.float32)])
    contents = {"pickled": objects(image_of(0.5), 1e-23), "stack": stack, "text": np.array(["a"]),
                "evil": objects(image_of(0.5), print), "small": image_of(0.5)[:4]}  # fmt: skip
    for name, array in contents.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    fits = pytest.importorskip("astropy.io.fits")
    fits.PrimaryHDU(image_of(0.7)).writeto(tmp_path / "plain.fits")
    (tmp_path / "image.fits").write_bytes(b"SIMPLE  =                    T")
    with opened(small, tmp_path / "profile", ["gone.npy"]) as (page, _):
        page.pick("#pick", [*(tmp_path / f"{name}.npy" for name in contents), tmp_path / "image.fits",
                           tmp_path / "plain.fits"])  # fmt: skip
        page.until("document.getElementById('progress').textContent === '4 images'")
        assert [row[:2] for row in rows_of(page)] == [
            ["pickled.npy", "bright"], ["stack.npy[0]", "bright"], ["stack.npy[1]", "unfamiliar"],
            ["plain.fits", "bright"]]  # fmt: skip
        errors = errors_of(page)
    for error, start in zip(errors, ("gone.npy: there is no gone.npy beside this page",
                                     "stack.npy[2]: NaN or infinite pixels", "text.npy: not an array",
                                     "evil.npy: not a pickle", "small.npy: not an image of 8×8 pixels or a stack",
                                     "image.fits: not a whole FITS header"), strict=True):  # fmt: skip
        assert error.startswith(start)


# The table


@needs_chromium
def test_a_thousand_images_show_progress_and_only_the_rows_in_sight(small, tmp_path):
    np.save(tmp_path / "stack.npy", np.stack([image_of(0.02 + i / 2000) for i in range(1000)]))
    with opened(small, tmp_path / "profile") as (page, _):
        page.evaluate(
            "window.seen = []; new MutationObserver(() => seen.push(document.getElementById('progress').textContent))"
            ".observe(document.getElementById('progress'), { childList: true }); 0"
        )
        page.pick("#pick", [tmp_path / "stack.npy"])
        page.until("document.getElementById('progress').textContent === '1,000 images'")
        assert page.evaluate("seen.some((text) => /^\\d+ of 1,000, about \\d+ s left$/.test(text))")
        assert len(rows_of(page)) < 40
        assert rows_of(page)[0][0] == "stack.npy[0]"
        page.evaluate("document.getElementById('scroll').scrollTop = 1e6")
        page.until("document.getElementById('rows').textContent.includes('stack.npy[999]')")


@needs_chromium
def test_the_table_is_sorted_filtered_and_cleared(small, cutouts, tmp_path):
    means = {"f10": 0.5, "f9": 0.2, "strange": 0.001, "f1": 0.9}
    with opened(small, tmp_path / "profile") as (page, _):
        page.pick("#pick", cutouts(means))
        until_finished(page)
        names = {title: i for i, title in enumerate(page.evaluate(
            "[...document.querySelectorAll('#head th')].map((cell) => cell.textContent)"))}  # fmt: skip
        assert list(names) == ["image, map", "file", "prediction", "bright", "dark", "familiarity", "residual"]
        orders = {"file": ["f1", "f9", "f10", "strange"], "residual": ["strange", "f9", "f10", "f1"],
                  "bright": ["strange", "f9", "f10", "f1"], "dark": ["f1", "f10", "f9", "strange"],
                  "familiarity": ["strange", "f9", "f10", "f1"]}  # fmt: skip
        for column, expected in orders.items():
            for order in (expected, expected[::-1]):
                page.click(f"#head th:nth-child({names[column] + 1}) button")
                assert [row[0].removesuffix(".npy") for row in rows_of(page)] == order
        page.evaluate("const f = document.getElementById('filter'); f.value = 'unfamiliar';"
                      "f.dispatchEvent(new Event('change'))")  # fmt: skip
        assert [row[0] for row in rows_of(page)] == ["strange.npy"]
        page.click("#clear")
        assert rows_of(page) == []
        page.pick("#pick", cutouts({"again": 0.5}))
        until_finished(page)
        assert [row[0] for row in rows_of(page)] == ["again.npy"]


@needs_chromium
def test_what_is_cleared_does_not_come_back(small, cutouts, tmp_path):
    np.save(tmp_path / "stack.npy", np.stack([image_of(0.5)] * 2000))
    with opened(small, tmp_path / "profile") as (page, _):
        page.pick("#pick", [tmp_path / "stack.npy"])
        page.until("document.getElementById('progress').textContent.includes('left')")
        page.click("#clear")
        page.pick("#pick", cutouts({"next": 0.5}))
        page.until("document.getElementById('progress').textContent === '1 image'")
        assert [row[0] for row in rows_of(page)] == ["next.npy"]


@needs_chromium
def test_planes_that_may_be_bands_are_said_to_be_read_as_lenses(small, tmp_path):
    np.save(tmp_path / "many.npy", np.stack([image_of(0.5)] * 6))
    np.save(tmp_path / "rgb.npy", np.stack([image_of(0.5)] * 3))
    with opened(small, tmp_path / "profile") as (page, _):
        bands = "each of its 3 planes is taken for a lens; for bands of one lens use predict.py --planes"
        for name, said in (("many", ""), ("rgb", f"rgb.npy: {bands}")):
            page.pick("#pick", [tmp_path / f"{name}.npy"])
            until_finished(page)
            assert page.evaluate("document.getElementById('planes').textContent") == said
        page.click("#clear")
        assert not page.evaluate("document.getElementById('planes').textContent")


@needs_chromium
def test_the_csv_is_that_of_predict(small, cutouts, tmp_path):
    names = ["usual", "a,b", 'q"uote', "=1+1", "-x", "@y", "ü", "faint", "strange"]
    means = [0.5, 0.3, 0.25, 1, 2, 0.7, 0.2, 0.011, 0.00001234]
    paths = cutouts(dict(zip(names, means, strict=True)))
    files = [f"./{path.name}" if path.name[0] in "-@" else path.name for path in paths]
    command = [sys.executable, ROOT / "predict.py", "--model", small / "classifier.onnx",
               "--maps", small / "reconstruction.onnx", "--out", tmp_path / "expected.csv", *files]  # fmt: skip
    subprocess.run(command, cwd=paths[0].parent, check=True, capture_output=True)
    with opened(small, tmp_path / "profile") as (page, _):
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got"))
        page.pick("#pick", paths)
        until_finished(page)
        page.click("#download")
        got = tmp_path / "got" / "predictions.csv"
        end = time.monotonic() + 20
        while not got.exists() and time.monotonic() < end:
            time.sleep(0.1)
    text = got.read_text()
    assert b"\r" not in got.read_bytes() and text.endswith("\n")
    expected = (tmp_path / "expected.csv").read_text()
    for ours, theirs in zip(csv.reader(text.splitlines()), csv.reader(expected.splitlines()), strict=True):
        assert [ours[0], ours[3]] == [theirs[0], theirs[3]]
        if ours[0] != "file":
            numbers = [[row[i] for i in (1, 2, 4, 5)] for row in (ours, theirs)]
            assert np.allclose(*np.array(numbers, dtype=float), rtol=1e-5, atol=2e-6)
            assert ("e" in ours[5]) == ("e" in theirs[5])
    assert [line.split(",")[0] for line in text.splitlines()] == [line.split(",")[0] for line in expected.splitlines()]


# The maps


@needs_chromium
@pytest.mark.parametrize("stated", [0.02, None])
def test_maps_have_one_scale(stated, small, tmp_path):
    """That of lib/plots.substructure_map; without the rms of smooth lenses, the median of the maps shown."""
    folder = shutil.copytree(small, tmp_path / "page")
    if stated:
        with_metadata(small / "reconstruction.onnx", folder / "reconstruction.onnx", smooth_rms=str(stated))
    images = np.random.default_rng(0).normal(0.5, 0.2, (3, SIDE, SIDE)).astype("f4") * [[[1]], [[2]], [[0.5]]]
    np.save(tmp_path / "stack.npy", images)
    sigma = stated or np.sqrt(np.median((images.astype("f4") ** 2).mean((1, 2))))
    with opened(folder, tmp_path / "profile") as (page, _):
        page.pick("#pick", [tmp_path / "stack.npy"])
        until_finished(page)
        pixels = page.evaluate(
            "[...document.querySelectorAll('#rows canvas:nth-child(2)')].map((canvas) => Array.from("
            f"canvas.getContext('2d').getImageData(0, 0, {SIDE}, {SIDE}).data))"
        )
        unit = page.evaluate("document.getElementById('unit').textContent")
        assert f"−{plots.MOST_SIGMAS}" in page.text() and f"+{plots.MOST_SIGMAS}" in page.text()
    assert unit == (
        "residual in sigma of smooth lenses" if stated else "residual in units of the median rms of the maps shown"
    )
    norm = AsinhNorm(linear_width=plots.LINEAR_SIGMAS, vmin=-plots.MOST_SIGMAS, vmax=plots.MOST_SIGMAS, clip=True)
    expected = colormaps["RdBu_r"](norm((images[:, ::-1] / sigma).ravel()), bytes=True).astype(int)
    assert np.abs(np.array(pixels).reshape(-1, 4) - expected).max() <= 4


@needs_chromium
def test_a_phone_shows_file_prediction_and_map(small, cutouts, tmp_path):
    with opened(small, tmp_path / "profile") as (page, _):
        page.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
        page.pick("#pick", cutouts({"a-file-with-a-long-name" * 3: 0.5}))
        until_finished(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        right = page.evaluate("document.querySelector('#rows td:nth-child(3)').getBoundingClientRect().right")
        assert right <= 400
        page.click("#rows tr:nth-child(2)")
        assert page.evaluate("document.getElementById('large').open")
        assert page.evaluate("document.querySelector('#large canvas').getBoundingClientRect().width") > 100
