"""predict.py: every kind of file is read, and what cannot be read is listed."""

import contextlib
import os
import shutil

import numpy as np
import pytest
from conftest import Terminal, assert_user_error, read_csv, run_code, run_script, with_metadata

import predict


def test_prediction_reads_every_kind_and_lists_what_it_cannot(runs, folder, tmp_path, lens_image):
    cutouts = tmp_path / "cutouts" / "night" / "field"
    cutouts.mkdir(parents=True)
    np.save(cutouts / "plain.npy", lens_image)
    shutil.copy(next((folder / "axion").glob("*.npy")), cutouts / "axion.npy")
    np.save(cutouts / "stack.npy", np.stack([lens_image] * 3))
    np.save(cutouts / "channel.npy", np.stack([lens_image] * 2)[:, None])
    pytest.importorskip("astropy.io.fits").PrimaryHDU(lens_image).writeto(cutouts / "hdu.fits")
    np.save(cutouts / "nan.npy", np.full((64, 64), np.nan))
    np.save(cutouts / "small.npy", lens_image[:32, :32])
    (cutouts / "broken.npy").write_bytes(b"no image")
    out = tmp_path / "predictions.csv"
    arguments = ("--model", runs / "classifier.onnx", "--out", out, "--batch-size", 3)
    process = run_script("predict.py", *arguments, tmp_path / "cutouts", check=False)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    rows = read_csv(out)
    assert list(rows[0]) == ["file", "axion", "cdm", "no_sub", "prediction"]
    names = [os.path.basename(row["file"]) for row in rows]
    assert sorted(names) == sorted(
        ["axion.npy", "channel.npy[0]", "channel.npy[1]", "hdu.fits", "plain.npy", "stack.npy[0]",
         "stack.npy[1]", "stack.npy[2]"]
    )  # fmt: skip
    for row in rows:
        probabilities = {name: float(row[name]) for name in ("axion", "cdm", "no_sub")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.get)
    assert "gives no familiarity" in process.stderr
    by_name = dict(zip(names, rows, strict=True))
    assert float(by_name["plain.npy"]["cdm"]) == pytest.approx(float(by_name["stack.npy[2]"]["cdm"]), abs=1e-5)
    errors = read_csv(tmp_path / "predictions.csv.errors.csv")
    assert sorted(os.path.basename(row["file"]) for row in errors) == ["broken.npy", "nan.npy", "small.npy"]

    good = run_script("predict.py", *arguments, cutouts / "plain.npy")
    assert good.returncode == 0
    assert not (tmp_path / "predictions.csv.errors.csv").exists()


def test_a_terminal_counts_images_of_all_that_there_are(runs, tmp_path, lens_image):
    np.savez(tmp_path / "two.npz", first=lens_image, second=np.stack([lens_image] * 5), text=np.array("no image"))
    np.save(tmp_path / "single.npy", lens_image)
    np.save(tmp_path / "small.npy", lens_image[:32, :32])
    with contextlib.redirect_stderr(Terminal()) as terminal:
        predict.main(["--model", str(runs / "classifier.onnx"), "--out", str(tmp_path / "p.csv"), str(tmp_path)])
    assert "| 7/7 [" in terminal.getvalue()


@pytest.mark.parametrize(("fingerprint", "doubted"), [("other", True), (None, True), ("None", True), ("", False)])
def test_maps_of_other_data_are_doubted(fingerprint, doubted, runs, lens_image, tmp_path):
    """An MAE of images in another unit gave numbers without a word."""
    more = {} if fingerprint == "" else {"data_fingerprint": fingerprint}
    with_metadata(runs / "reconstruction.onnx", tmp_path / "maps.onnx", **more)
    np.save(tmp_path / "lens.npy", lens_image)
    process = run_script("predict.py", "--model", runs / "classifier.onnx", "--maps", tmp_path / "maps.onnx",
                         "--out", tmp_path / "p.csv", tmp_path / "lens.npy")  # fmt: skip
    lines = [line for line in process.stderr.splitlines() if "maps.onnx was trained on other data" in line]
    assert len(lines) == doubted


def test_prediction_draws_a_sheet_with_maps(runs, folder, tmp_path):
    maps = runs / "reconstruction.onnx"
    process = run_script("predict.py", "--model", runs / "classifier.onnx", "--maps", maps, "--out", tmp_path / "p.csv",
                         "--sheet", tmp_path / "sheet.png", "--sheet-images", 5, folder / "cdm")  # fmt: skip
    assert "5 of them in" in process.stdout
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    rows = read_csv(tmp_path / "p.csv")
    assert list(rows[0])[-3:] == ["no_sub", "prediction", "residual"]
    assert all(float(row["residual"]) > 0 for row in rows)
    refused = run_script("predict.py", "--model", runs / "classifier.onnx", "--maps", runs / "classifier.onnx", "--out",
                         tmp_path / "q.csv", folder / "cdm", check=False)  # fmt: skip
    assert_user_error(refused, "--what reconstruction")


def test_prediction_of_a_large_stack_stays_small(runs, tmp_path):
    count = int(os.environ.get("PREDICT_IMAGES", "10000"))
    stack = np.lib.format.open_memmap(tmp_path / "stack.npy", mode="w+", dtype=np.float32, shape=(count, 64, 64))
    stack[:, 32, 32] = 2  # a sparse file, but for one page an image
    stack[-1] = np.nan
    del stack
    code = (
        "import resource, predict\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "code = predict.main()\n"
        "print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "raise SystemExit(code)\n"
    )
    process = run_code(code, "--model", runs / "classifier.onnx", "--out", tmp_path / "out.csv", tmp_path / "stack.npy",
                       check=False)  # fmt: skip
    assert process.returncode == 1  # the last image
    grew = int(process.stdout.split("grew")[1])  # KiB
    assert grew < 100 * 1024, "the stack (160 MB or more) should not be held in memory"
    with (tmp_path / "out.csv").open() as file:
        assert sum(1 for _ in file) == count
