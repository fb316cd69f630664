"""Every form of FITS file is read as what it is, or refused by name."""

import bz2
import gzip
import io

import numpy as np
import pytest

from lib import readers
from lib.errors import UserError
from lib.readers import read_fits

fits = pytest.importorskip("astropy.io.fits")
IMAGE = np.random.default_rng(0).random((8, 8)).astype(np.float32)


def fits_bytes(*units):
    file = io.BytesIO()
    fits.HDUList(list(units)).writeto(file)
    return file.getvalue()


def write_and_read(path, content):
    path.write_bytes(content)
    return read_fits(path)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 8, 8), (8, 8, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_axes_of_length_one_do_not_count(shape, packed, tmp_path):
    image = IMAGE.reshape(shape)
    units = [fits.PrimaryHDU(), fits.CompImageHDU(image)] if packed else [fits.PrimaryHDU(image)]
    read = write_and_read(tmp_path / "one.fits", fits_bytes(*units))
    assert read.shape == (8, 8)
    assert np.allclose(read, IMAGE, atol=0.05)  # fpack quantises floats


@pytest.mark.parametrize("name", ["x.fits", "x.fts", "x.fit.gz", "x.fits.bz2", "x.fits.fz"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_compression_is_recognised_by_content(name, compress, tmp_path):
    content = compress(fits_bytes(fits.PrimaryHDU(IMAGE)))
    assert np.array_equal(write_and_read(tmp_path / name, content), IMAGE)


def test_the_first_two_dimensional_image_is_read(tmp_path):
    cube = fits.PrimaryHDU(np.zeros((2, 8, 8)))
    column = fits.Column("x", "E", array=np.zeros(3))
    units = [cube, fits.BinTableHDU.from_columns([column]), fits.ImageHDU(IMAGE[None])]
    units.append(fits.ImageHDU(2 * IMAGE))
    assert np.array_equal(write_and_read(tmp_path / "many.fits", fits_bytes(*units)), IMAGE)


def test_a_cube_is_refused_and_says_why(tmp_path):
    with pytest.raises(UserError, match=r"cube\.fits.*several planes, shape \(2, 8, 8\)"):
        write_and_read(tmp_path / "cube.fits", fits_bytes(fits.PrimaryHDU(np.zeros((2, 8, 8)))))


@pytest.mark.parametrize("packed", [False, True])
def test_scaled_and_blank_pixels_are_numbers_and_nan(packed, tmp_path):
    stored = np.arange(64, dtype=np.int16).reshape(8, 8)
    unit = fits.CompImageHDU(stored) if packed else fits.ImageHDU(stored)
    unit.header.update(BLANK=5)
    content = fits_bytes(fits.PrimaryHDU(), unit)
    # BSCALE and BZERO are added as cards: astropy would scale the pixels when it writes them.
    end = content.index(b"END" + b" " * 77, content.index(b"BLANK   ="))
    scaling = {"BSCALE": 0.5, "BZERO": 10.0}
    cards = "".join(f"{name:8}= {value:20}".ljust(80) for name, value in scaling.items()).encode()
    content = content[:end] + cards + b"END".ljust(80) + content[end + 240 :]
    image = write_and_read(tmp_path / "scaled.fits", content)
    expected = 10 + 0.5 * stored.astype(float)
    assert np.isnan(image[0, 5])
    assert np.isnan(image).sum() == 1
    assert np.allclose(np.delete(image.ravel(), 5), np.delete(expected.ravel(), 5))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_decompressed_size_is_limited(compress, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_FITS_BYTES", 10_000)
    content = compress(fits_bytes(fits.PrimaryHDU(np.zeros((64, 64)))))
    with pytest.raises(UserError, match="too large for a cutout"):
        write_and_read(tmp_path / "large.fits", content)


@pytest.mark.parametrize("card", ["ZNAXIS1", "ZNAXIS2", "ZTILE1", "ZTILE2", "PCOUNT"])
def test_a_packed_image_announces_no_more_than_a_cutout(card, tmp_path):
    content = fits_bytes(fits.PrimaryHDU(), fits.CompImageHDU(IMAGE))
    at = content.index(card.ljust(8).encode() + b"=")
    value = f"{card:8}= {10**9:20}".encode()
    with pytest.raises(UserError, match="too large for a cutout"):
        write_and_read(tmp_path / "bomb.fits.fz", content[:at] + value + content[at + 30 :])


def test_a_truncated_file_is_refused(tmp_path):
    for unit in (fits.ImageHDU(IMAGE[None]), fits.CompImageHDU(IMAGE), fits.ImageHDU(IMAGE)):
        content = fits_bytes(fits.PrimaryHDU(), unit)
        with pytest.raises(UserError, match="not a usable FITS image"):
            write_and_read(tmp_path / "cut.fits", content[: 2 * 2880 + 10])


@pytest.mark.parametrize("method", ["RICE_1", "GZIP_1", "GZIP_2"])
def test_safe_compressions_are_read(method, tmp_path):
    stored = np.arange(64, dtype=np.int16).reshape(8, 8)
    unit = fits.CompImageHDU(stored, compression_type=method)
    assert np.array_equal(
        write_and_read(tmp_path / "x.fits.fz", fits_bytes(fits.PrimaryHDU(), unit)), stored
    )


@pytest.mark.parametrize("method", ["HCOMPRESS_1", "PLIO_1"])
def test_compressions_whose_decoders_crash_on_damage_are_refused(method, tmp_path):
    unit = fits.CompImageHDU(np.ones((8, 8), dtype=np.int16), compression_type=method)
    with pytest.raises(UserError, match=f"x.fits.fz.*{method}.*funpack"):
        write_and_read(tmp_path / "x.fits.fz", fits_bytes(fits.PrimaryHDU(), unit))


@pytest.mark.parametrize("method", ["", "RICE_1", "GZIP_1"])
def test_damaged_files_are_refused_or_read_and_crash_nothing(method, tmp_path):
    rng = np.random.default_rng(0)
    unit = fits.CompImageHDU(IMAGE, compression_type=method) if method else fits.ImageHDU(IMAGE)
    original = fits_bytes(fits.PrimaryHDU(), unit)
    digits = [i for i in range(2880, len(original)) if original[i : i + 1].isdigit()]
    refused = 0
    for _ in range(300):
        content = bytearray(original)
        for i in rng.choice(digits, 3):
            content[i] = ord("0") + rng.integers(10)
        content[rng.integers(len(content))] = rng.integers(256)
        try:
            write_and_read(tmp_path / "damaged.fits", bytes(content))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30
