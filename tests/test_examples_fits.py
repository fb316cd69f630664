"""The JavaScript examples read plain FITS images as predict.py reads them, and refuse others in a sentence."""

import numpy as np
import pytest
from conftest import ROOT
from test_examples_inputs import SIDE, as_images, needs_node, read_in_javascript, read_in_python

from lib import fits as fits_reader
from lib import units

fits = pytest.importorskip("astropy.io.fits")
pytestmark = needs_node
IMAGE = np.random.default_rng(0).random((SIDE, SIDE))


def hdu(pixels, kind=fits.PrimaryHDU, **cards):
    """An HDU of these pixels, with cards in its header."""
    unit = kind(pixels)
    unit.header.update(cards)
    return unit


def scaled(pixels, dtype, scale, zero):
    """An HDU whose stored numbers mean zero + scale × number."""
    return hdu(pixels.astype(dtype), BSCALE=scale, BZERO=zero)


def write(path, *units):
    """Write HDUs without scaling the numbers that they hold."""
    path.write_bytes(b"".join(header_and_numbers(unit) for unit in units))
    return path


def header_and_numbers(unit):
    numbers = b"" if unit.data is None else np.asarray(unit.data).astype(unit.data.dtype.newbyteorder(">")).tobytes()
    return unit.header.tostring().encode() + numbers + bytes(-len(numbers) % 2880)


WHOLE = (IMAGE * 200 - 100).round()
GOOD = {
    "bytes": [hdu((IMAGE * 255).astype("u1"))],
    "16 bits": [hdu((WHOLE * 300).astype("i2"))],
    "32 bits": [hdu((WHOLE * 2e7).astype("i4"))],
    "float32": [hdu(IMAGE.astype("f4"))],
    "float64": [hdu(IMAGE * 1e-20)],
    **{f"scaled {kind}": [scaled(WHOLE if kind != "u1" else WHOLE + 100, kind, 1.7e-5, -0.3)]
       for kind in ("u1", "i2", "i4", "f4", "f8")},
    "unsigned 16 bits": [scaled(WHOLE * 300, "i2", 1, 32768)],
    "unsigned 32 bits": [scaled(WHOLE * 2e7, "i4", 1, 2**31)],
    "signed bytes": [scaled(WHOLE + 100, "u1", 1, -128)],
    "axes of length one": [hdu(IMAGE[None, None])],
    "an extension": [fits.PrimaryHDU(), hdu(IMAGE, fits.ImageHDU, EXTNAME="SCI")],
    "beside a table": [hdu(IMAGE), fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(999.0))])],
    "an unused blank": [hdu((IMAGE * 99).astype("i2"), BLANK=-32768)],
    "quotes": [hdu(IMAGE, OBJECT="it's / a lens", BUNIT="")],
}
BLANK = int(WHOLE[0, 0] * 300)
BAD = {
    "two images": ([hdu(IMAGE), hdu(IMAGE, fits.ImageHDU)], "2 images in one FITS file"),
    "a cube": ([hdu(np.stack([IMAGE] * 3))], "a cube of shape (3, 8, 8)"),
    "64 bits": ([hdu((IMAGE * 99).astype("i8"))], "BITPIX 64"),
    "a unit": ([hdu(IMAGE, BUNIT="nJy")], "says the unit (BUNIT)"),
    "a unit for all": ([hdu(None, MAGZERO=25.0), hdu(IMAGE, fits.ImageHDU)], "says the unit (MAGZERO)"),
    "a weight map": ([fits.PrimaryHDU(), hdu(IMAGE, fits.ImageHDU, EXTNAME="SCI_WHT")], "called SCI_WHT"),
    "blank pixels": ([hdu((IMAGE * 99).astype("i2"), BLANK=int(IMAGE[0, 0] * 99))], "NaN or infinite pixels"),
    "blank zeros": ([hdu((IMAGE * 9).astype("i2"), BLANK=0)], "NaN or infinite pixels"),
    "blank unsigned": ([hdu((WHOLE * 300).astype("i2"), BZERO=32768, BLANK=BLANK)], "NaN or infinite pixels"),
    "no image": ([fits.PrimaryHDU()], "no image"),
    "another size": ([hdu(IMAGE[:4])], "not an image of 8×8 pixels"),
}  # fmt: skip


def test_javascript_reads_the_same_numbers_of_plain_fits(tmp_path):
    paths = [write(tmp_path / f"{i}.fits", *each) for i, each in enumerate(GOOD.values())]
    for name, path, got in zip(GOOD, paths, read_in_javascript(paths), strict=True):
        assert not isinstance(got, str), f"{name}: {got}"
        assert np.array_equal(as_images(got), read_in_python(path)), name


def test_what_needs_a_choice_or_a_unit_is_left_to_predict(tmp_path):
    paths = [write(tmp_path / f"{i}.fits", *each) for i, (each, _) in enumerate(BAD.values())]
    for path, (name, (_, reason)), got in zip(paths, BAD.items(), read_in_javascript(paths), strict=True):
        if name.startswith("blank"):
            assert read_in_python(path) is None
        assert isinstance(got, str) and reason in got, f"{name}: {got}"
        if name in ("two images", "a cube", "64 bits", "a unit", "a unit for all"):
            assert "predict.py" in got


def test_compressed_files_are_left_to_predict(tmp_path):
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(IMAGE)]).writeto(tmp_path / "0.fits")
    fits.PrimaryHDU(IMAGE).writeto(tmp_path / "1.fits.gz")
    for got in read_in_javascript([tmp_path / "0.fits", tmp_path / "1.fits.gz"]):
        assert isinstance(got, str) and "compressed" in got and "predict.py" in got


def test_an_exponent_may_be_written_with_d(tmp_path):
    path = write(tmp_path / "x.fits", scaled(WHOLE, "i2", 1.5e-5, 0.0))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1.5E-05", b"1.5D-05"))
    assert path.read_bytes() != content
    assert np.array_equal(as_images(read_in_javascript([path])[0]), read_in_python(path))


def test_truncated_and_hostile_headers_are_refused(tmp_path):
    content = write(tmp_path / "whole.fits", hdu(IMAGE)).read_bytes()
    texts = {"NAXIS1  =                    8": ("-8", "1E30", "8.5", "9007199254740991", "'8'"),
             "BITPIX  =                  -64": ("0", "-63", "'a'", "T"),
             "NAXIS   =                    2": ("999", "-1")}  # fmt: skip
    files = [content[:length] for length in (6, 9, 80, 2879, 2880, 2880 + 8 * SIDE**2 - 1)]
    files += [content.replace(card.encode(), card[:10].encode() + value.rjust(20).encode())
              for card, values in texts.items() for value in values]  # fmt: skip
    files.append(content.replace(b"BITPIX", b"BITPIY"))
    assert len(set(files)) == len(files) == 18 and content not in files
    paths = [tmp_path / f"{i}.fits" for i in range(len(files))]
    for path, each in zip(paths, files, strict=True):
        path.write_bytes(each)
    for file, got in zip(files, read_in_javascript(paths), strict=True):
        assert isinstance(got, str) and got.startswith("Error: "), (file[:400], got)


def test_the_words_that_name_no_sky_and_units_are_those_of_predict():
    source = (ROOT / "examples" / "fits.mjs").read_text()
    words = source[source.index("new Set((") : source.index(".split(' ')")]
    assert {word for word in words.replace("'", " ").split() if word.isupper()} == set(fits_reader.NO_SKY)
    assert all(f"'{name}'" in source for name in (*units.ZERO_POINTS, "BUNIT", "PHOTFLAM"))
