"""Which files predict.py reads, in which unit and at which scale, and where its table goes."""

import csv
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import HUNG, ROOT, assert_user_error, read_csv, run_script
from test_predict_inputs import IMAGES, SIDE, image_of, models, predict, write_classifier  # noqa: F401

from lib import outputs


@pytest.fixture
def calibrated(tmp_path):
    """Options for a model with pixels of 0.1 arcsec and the zero point 25."""
    write_classifier(tmp_path / "m.onnx", familiarity_images=1000, pixel_scale=0.1, zero_point=25.0)
    return "--model", tmp_path / "m.onnx"


def test_patterns_lists_and_standard_input_name_files(predict, models, tmp_path):  # noqa: F811
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    names = ["a.npy", "b.npy", "deep/c.npy"]
    for name in names:
        np.save(folder / name, IMAGES[0])
    assert predict(f"{folder}/**/*.npy").rows == [str(folder / name) for name in names]
    (tmp_path / "list.txt").write_text("\n".join(str(folder / name) for name in names[1:]) + "\n\n")
    assert predict(f"@{tmp_path}/list.txt").rows == [str(folder / name) for name in names[1:]]
    command = [sys.executable, ROOT / "predict.py", "--model", models / "classifier.onnx", "--out", "-", "-"]
    process = subprocess.run(command, input=f"{folder}/a.npy\n", capture_output=True, text=True, timeout=HUNG)
    (row,) = csv.DictReader(io.StringIO(process.stdout))
    assert row["file"] == f"{folder}/a.npy" and process.returncode == 0
    for bad, named in {f"@{tmp_path}/none": "none", f"{folder}/x*.npy": "x*.npy"}.items():
        assert_user_error(predict(bad, check=False), named)
    np.save(tmp_path / "@b.npy", IMAGES[0])
    process = subprocess.run([*command[:-1], "@b.npy"], cwd=tmp_path, capture_output=True, text=True, timeout=HUNG)
    assert "@b.npy" in process.stdout  # a file of that name is no list
    (tmp_path / "list.txt").write_text("\n")
    assert_user_error(predict(f"@{tmp_path}/list.txt", check=False), "lists no files")


def test_standard_output_has_the_table_alone_and_stderr_the_rest(predict, tmp_path):  # noqa: F811
    np.save(tmp_path / "x.npy", IMAGES[0])
    np.save(tmp_path / "y.npy", IMAGES[0][:4])
    process = predict("--out", "-", tmp_path / "x.npy", tmp_path / "y.npy", check=False)
    assert "1 image: " in process.stderr
    assert process.returncode == 1
    assert [row["file"] for row in csv.DictReader(io.StringIO(process.stdout))] == [str(tmp_path / "x.npy")]
    assert "y.npy" in process.stderr and "1 image" in process.stderr
    assert not (tmp_path / "-").exists() and not list(tmp_path.glob("*.errors.csv"))


@pytest.mark.parametrize("suffix", ["fits", "vot"])
def test_tables_for_astronomers_hold_numbers_and_are_replaced(suffix, predict, tmp_path):  # noqa: F811
    table = pytest.importorskip("astropy.table").Table
    np.save(tmp_path / "lénse.npy", IMAGES)
    out = tmp_path / "t" / f"p.{suffix}"
    for _ in range(2):
        predict("--out", out, tmp_path / "lénse.npy")
    read = table.read(out)
    assert len(read) == 3 and read["bright"].dtype.kind == "f" and read["familiarity"].dtype.kind == "f"
    assert np.allclose(read["bright"] + read["dark"], 1, atol=1e-5)
    assert str(read["file"][1]).endswith("nse.npy[1]") and "bright" in str(read["prediction"][0])


def test_tables_of_other_kinds_and_other_peoples_files_are_refused(predict, tmp_path):  # noqa: F811
    np.save(tmp_path / "x.npy", IMAGES[0])
    for name in ("p.parquet", "p.json", "p.onnx", "p.npy"):
        assert_user_error(predict("--out", tmp_path / name, tmp_path / "x.npy", check=False), name)
    fits = pytest.importorskip("astropy.io.fits")
    fits.PrimaryHDU(IMAGES[0]).writeto(tmp_path / "theirs.fits")
    assert_user_error(predict("--out", tmp_path / "theirs.fits", tmp_path / "x.npy", check=False), "theirs.fits")


def test_without_astropy_other_tables_are_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(outputs.UserError, match="pip install astropy"):
        outputs.require_writable(tmp_path / "p.fits")


def familiarity_of(image, tmp_path, *options):
    """What the model gives for the mean of the image that it sees."""
    np.save(tmp_path / "x.npy", image)
    run_script("predict.py", "--out", tmp_path / "p.csv", *options, tmp_path / "x.npy")
    (row,) = read_csv(tmp_path / "p.csv")
    return float(row["familiarity"])


def test_images_are_resampled_to_the_pixels_of_the_model(calibrated, tmp_path):
    fine = np.random.default_rng(0).random((2 * SIDE, 2 * SIDE)) / 100
    given = familiarity_of(fine, tmp_path, *calibrated, "--pixel-scale", 0.05)
    assert given == pytest.approx(4 * fine.mean(), abs=1e-6)


def test_images_are_scaled_to_their_own_minimum_and_maximum(calibrated, tmp_path):
    image = IMAGES[0]
    expected = ((image - image.min()) / np.ptp(image)).mean()
    for given in (image, 300 * image - 7):
        assert familiarity_of(given, tmp_path, *calibrated, "--scale", "minmax") == pytest.approx(expected, abs=1e-5)
    for unusable in (np.ones_like(image), np.where(image > 0.9, np.inf, image)):
        np.save(tmp_path / "x.npy", unusable)
        process = run_script("predict.py", "--out", tmp_path / "p.csv", *calibrated, "--scale", "minmax",
                             tmp_path / "x.npy", check=False)  # fmt: skip
        assert process.returncode == 1 and "x.npy" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize(("options", "named"), [
    *((("--scale", factor), "--scale") for factor in (0, -1, "nan", "inf", "max")),
    (("--zero-point", 25, "--scale", 2), "--scale"), (("--exposure", 5), "--exposure"),
    (("--zero-point", math.nan), "--zero-point"), (("--zero-point", 25, "--exposure", 0), "--exposure"),
    (("--pixel-scale", 0), "--pixel-scale"), (("--pixel-scale", "x"), "--pixel-scale"),
    (("--centre", "5"), "--centre"), (("--centre", "-1,2"), "--centre"), (("--planes", "x"), "--planes"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, named, calibrated, tmp_path):
    np.save(tmp_path / "x.npy", IMAGES[0])
    process = run_script("predict.py", *calibrated, "--out", tmp_path / "p.csv", *options, tmp_path / "x.npy",
                         check=False)  # fmt: skip
    assert process.returncode == 2 and named in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["--zero-point", "--pixel-scale"])
def test_a_model_that_does_not_say_its_own_unit_is_named(option, predict, tmp_path):  # noqa: F811
    np.save(tmp_path / "x.npy", IMAGES[0])
    assert_user_error(predict(option, 1, tmp_path / "x.npy", check=False), option, "does not say")
