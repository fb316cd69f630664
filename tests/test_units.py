"""The unit in a FITS header is used where it can mean one thing only, and named; else the user is asked."""


import pytest
from conftest import read_csv, run_script
from test_predict_inputs import image_of, write_classifier

from lib.units import zero_point_of

ACS_F814W = {"PHOTFLAM": 7.0332e-20, "PHOTPLAM": 8045.0, "PHOTZPT": -21.1}  # AB zero point 25.947 (ACS handbook)


@pytest.mark.parametrize(("cards", "expected"), [
    ({"MAGZERO": 24.6}, 24.6),
    ({"MAGZPT": 25.0, "BUNIT": "electron/s", "EXPTIME": 565.0}, 25.0),
    ({"ZEROPT": 25, "BUNIT": "counts s-1"}, 25.0),
    ({"PHOTZPT": 30.0, "BUNIT": "ADU", "EXPTIME": 1.0}, 30.0),
    ({"MAGZERO": 25.0, "MAGZPT": 25.001}, 25.0),
    ({"BUNIT": "nJy"}, 31.4), ({"BUNIT": "uJy/pixel"}, 23.9), ({"BUNIT": "nanomaggy"}, 22.5),
    ({"BUNIT": "Jy", "MAGZERO": 8.9}, 8.9),
    ({"BUNIT": "MJy/sr"}, 28.0866),  # pixels of 0.03 arcsec, JWST user documentation
    ({**ACS_F814W, "BUNIT": "ELECTRONS/S"}, 25.947),
    ({**ACS_F814W, "BUNIT": "ELECTRONS", "EXPTIME": 100.0}, 30.947),
])  # fmt: skip
def test_a_header_that_means_one_thing_says_the_zero_point(cards, expected):
    found, text = zero_point_of(cards, 0.03)
    assert found == pytest.approx(expected, abs=2e-3)
    assert text


@pytest.mark.parametrize(("cards", "named"), [
    ({"MAGZERO": 25.0, "BUNIT": "ADU", "EXPTIME": 100.0}, "--exposure 100"),
    ({"MAGZERO": 25.0, "EXPTIME": 100.0}, "--exposure 100"),
    (ACS_F814W, "per second"),
    ({"MAGZERO": 25.0, "MAGZPT": 26.0}, "contradict"), ({"BUNIT": "nJy", "MAGZERO": 25.0}, "contradict"),
    ({"BUNIT": "electron/s"}, "no zero point"), ({"BUNIT": "km/s", "MAGZERO": 25.0}, "unknown BUNIT km/s"),
    ({"PHOTZPT": -21.1, "BUNIT": "ELECTRONS/S"}, "-21.1"), ({"MAGZERO": 25.0, "MAGSYS": "Vega"}, "Vega"),
    ({"BUNIT": "sigma"}, "sigma"), ({"BUNIT": "electron/s", "MAGZERO": "25"}, "no zero point"),
    ({"BUNIT": "M Jy"}, "M Jy"),
])  # fmt: skip
def test_a_header_that_may_mean_several_things_says_what_to_give(cards, named):
    found, text = zero_point_of(cards, 0.03)
    assert found is None
    assert named in text and "--zero-point" in text


def test_a_header_without_unit_says_nothing_and_surface_brightness_needs_the_pixels():
    assert zero_point_of({"OBJECT": "lens", "EXPTIME": 5.0}, 0.1) == (None, "")
    assert zero_point_of({"BUNIT": "MJy/sr"}, None)[0] is None


def test_predictions_use_the_header_unless_the_user_says_the_unit(tmp_path):
    """2.5 magnitudes are a factor of ten; the network gives the mean of what it sees as the familiarity."""
    fits = pytest.importorskip("astropy.io.fits")
    write_classifier(tmp_path / "m.onnx", familiarity_images=1000, zero_point=25.0)
    write_classifier(tmp_path / "unknown.onnx", familiarity_images=1000)
    header = fits.Header({"MAGZERO": 27.5, "BUNIT": "adu/s"})
    fits.HDUList([fits.PrimaryHDU(header=header), fits.ImageHDU(image_of(0.2))]).writeto(tmp_path / "x.fits")
    header["EXPTIME"], header["BUNIT"] = 4.0, "adu"
    fits.PrimaryHDU(image_of(0.2), header).writeto(tmp_path / "counts.fits")
    fits.PrimaryHDU(image_of(0.2)).writeto(tmp_path / "plain.fits")

    def familiarity(name, *options, model="m.onnx"):
        process = run_script("predict.py", "--out", tmp_path / "p.csv", "--model", tmp_path / model, *options,
                             tmp_path / name)  # fmt: skip
        (row,) = read_csv(tmp_path / "p.csv")
        return pytest.approx(float(row["familiarity"]), abs=1e-6), process.stderr.splitlines()

    seen, (line,) = familiarity("x.fits")
    assert seen == 0.02 and "MAGZERO 27.5, BUNIT adu/s: factor 0.1" in line
    seen, (line,) = familiarity("counts.fits")
    assert seen == 0.2 and "--zero-point 27.5" in line and "--exposure 4" in line
    seen, _ = familiarity("counts.fits", "--zero-point", 27.5, "--exposure", 4)
    assert seen == 0.005
    for options in ((), ("--scale", 1), ("--zero-point", 25)):
        assert familiarity("plain.fits", *options) == (0.2, [])
    assert familiarity("x.fits", "--scale", 1) == (0.2, [])
    assert familiarity("x.fits", model="unknown.onnx") == (0.2, [])
