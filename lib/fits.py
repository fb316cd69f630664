"""The image in a FITS file, which may come from a stranger; needs astropy, without torch."""

import bz2
import contextlib
import gzip
import math
import re
import warnings
import zlib
from io import BytesIO
from typing import NamedTuple

import numpy as np

from lib import wcs
from lib.errors import UserError, named_errors

SUFFIXES = (
    *(name + packed for name in (".fits", ".fit", ".fts") for packed in ("", ".gz", ".bz2")), ".fz"
)  # fmt: skip
MAX_BYTES = 256 * 2**20
SAFE_COMPRESSION = ("RICE_1", "RICE_ONE", "GZIP_1", "GZIP_2", "NOCOMPRESS")
MOST_FLAGS = 16  # different values of an integer image that is a mask
# Words in the name of an HDU that holds something else than the sky.
NO_SKY = frozenset(
    "WHT WEIGHT WEIGHTS IVAR INVVAR ERR ERROR ERRORS RMS SIGMA STD STDDEV VAR VARIANCE NOISE UNCERT SNR CHI "
    "MASK FLAG FLAGS DQ BPM SEG SEGM SEGMENTATION CTX CON CONTEXT COVERAGE EXP EXPTIME EXPOSURE AREA "
    "PSF KERNEL BKG BACKGROUND SKY MODEL RESID RESIDUAL RESIDUALS".split()
)


class FileArray(NamedTuple):
    """An array of a file (None: no image), and what a FITS file says of it.

    numbers : of an object array, a tuple of those beside each image; () of other files.
    rounded : the step to which compression has rounded the pixels; 0 if it has not.
    pixel_scale : arcsec, of its WCS; None without one.
    cards : {name: number or text} of its header, and of the first one where that has no image; None of other files.
    """

    name: str
    array: np.ndarray | None
    numbers: tuple = ()
    rounded: float = 0.0
    pixel_scale: float | None = None
    cards: dict | None = None


def read_fits(path, hdu=None):
    """The `FileArray` of a file: that of `hdu`, a name or number, or the only one that shows the sky.

    Maps of weights, errors, masks and PSFs do not count; they are known by name and content. Axes of length
    one do not count either. The file may be compressed by gzip, bzip2 or fpack, whatever its name says.
    Raises UserError if no image is left, listing the HDUs, or several are, listing these.
    """
    with _opened(path) as (units, stored, steps):
        shapes = _shapes_of(units)
        images = [i for i, shape in enumerate(shapes) if len(shape) >= 2]
        if hdu is None:
            chosen = _showing_the_sky(units, images)
        else:
            number = int(hdu) if str(hdu).isdigit() else None
            chosen = [i for i in images if i == number or units[i].name.upper() == str(hdu).upper()]
        if len(chosen) != 1:
            listed = ", ".join(f"{i} {units[i].name} {shapes[i] or 'no image'}" for i in chosen or range(len(units)))
            whose = "they are" if chosen else "its HDUs"
            raise UserError(f"{path}: {_why_none_is_chosen(chosen, images, hdu)}; {whose}: {listed}")
        (i,) = chosen
        name = str(path) if len(images) == 1 else f"{path}[{units[i].name or i}]"
        pixels = _pixels_of(units[i], stored[i]).reshape(shapes[i])
        # What the header does not say, the first may say of all, if it has no pixels itself.
        cards = ({} if units[0].shape else wcs.plain(units[0].header)) | wcs.plain(units[i].header)
        return FileArray(name, pixels, (), steps[i], _scale_of(units[i]), cards)


def all_images(path):
    """All two-dimensional images (H, W) of a FITS file, a list. UserError."""
    with _opened(path) as (units, stored, _):
        return [_pixels_of(units[i], stored[i]).reshape(shape)
                for i, shape in enumerate(_shapes_of(units)) if len(shape) == 2]  # fmt: skip


# Choosing an HDU


def _showing_the_sky(units, images):
    left = [i for i in images if not NO_SKY.intersection(re.split(r"[^A-Z]+", units[i].name.upper()))]
    if len(left) > 1:
        left = [i for i in left if not _is_no_sky(np.asarray(units[i].data))]
    science = [i for i in left if units[i].name.upper() == "SCI"]
    return science if len(science) == 1 else left


def _is_no_sky(pixels):
    """Whether an image is constant, holds flags, or is a PSF: positive with the sum one."""
    if pixels.dtype.kind in "iub" and len(np.unique(pixels)) <= MOST_FLAGS:
        return True
    least, most = np.nanmin(pixels), np.nanmax(pixels)
    return bool(least == most or (abs(np.nansum(pixels) - 1) < 0.02 and least > -0.01 * most))


def _why_none_is_chosen(chosen, images, hdu):
    if not images:
        return "there is no image in it"
    if hdu is not None:
        return f"{'no image' if not chosen else 'several images'} with --hdu {hdu}"
    reason = "several images that may be meant" if chosen else "only maps of weights, errors, masks or PSFs"
    return f"{reason}; predict.py --hdu NAME chooses one, and training needs it in a file of its own"


# Opening


@contextlib.contextmanager
def _opened(path):
    """(HDUs, the same with the numbers as they are stored, the rounding step of each) of a checked file."""
    try:
        from astropy.io import fits
    except ImportError:
        raise UserError(f"{path}: FITS files need astropy: pip install astropy") from None
    with named_errors(path, "FITS image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = _decompressed(path)
        with fits.open(BytesIO(content), memmap=False, disable_image_compression=True) as units:
            _check_compressed_units(units)
            steps = [_step_of(unit) for unit in units]
        stored = fits.open(BytesIO(content), memmap=False, do_not_scale_image_data=True)
        with stored, fits.open(BytesIO(content), memmap=False) as units:
            yield units, stored, steps


def _pixels_of(unit, stored):
    """The pixels of an HDU; NaN where its header calls an integer missing (BLANK, FITS standard 4.0, 4.4.2.5).

    Astropy by itself keeps missing pixels as numbers if BLANK is 0 or if the integers are unsigned.
    """
    pixels, blank = np.array(unit.data), stored.header.get("BLANK")
    if type(blank) is not int or stored.header["BITPIX"] < 0:
        return pixels
    return np.where(np.asarray(stored.data) == blank, np.nan, pixels)


def _shapes_of(units):
    return [_without_unit_axes(unit.shape) if unit.is_image else () for unit in units]


def _step_of(unit):
    """The step to which fpack has rounded the pixels of a compressed HDU, 0 if it has not."""
    if not unit.header.get("ZIMAGE") or "ZSCALE" not in unit.columns.names:
        return abs(float(unit.header.get("ZSCALE", 0))) if unit.header.get("ZIMAGE") else 0.0
    return float(np.max(unit.data["ZSCALE"]))


def _scale_of(unit):
    """Arcsec of a pixel's side (FITS WCS papers I and II); None without square pixels of the sky."""
    header = unit.header
    try:
        if str(header.get("CTYPE1", ""))[:4].strip("-") not in wcs.SKY:
            return None
        steps = [float(header.get(f"CDELT{i}", 1)) for i in (1, 2)]
        matrix = [[float(header.get(f"CD{i}_{j}", header.get(f"PC{i}_{j}", float(i == j)) * steps[i - 1]))
                   for j in (1, 2)] for i in (1, 2)]  # fmt: skip
        width, height = np.hypot(*np.array(matrix))
    except (TypeError, ValueError, OverflowError):
        return None
    is_square = math.isfinite(width) and width > 0 and abs(width - height) < 0.01 * width
    return 3600 * float(width + height) / 2 if is_square else None


def _without_unit_axes(shape):
    """`shape` without its leading axes of length one, then trailing ones, down to two axes."""
    shape = tuple(map(int, shape))
    while len(shape) > 2 and 1 in (shape[0], shape[-1]):
        shape = shape[1:] if shape[0] == 1 else shape[:-1]
    return shape


def _decompressed(path):
    with path.open("rb") as file:
        start = file.read(3)
        file.seek(0)
        if start[:2] == b"\x1f\x8b":
            file = gzip.open(file)
        elif start == b"BZh":
            file = bz2.open(file)
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError("it is too large for a cutout")
    return content


def _check_compressed_units(units):
    """ValueError if an image compressed by fpack cannot be decompressed safely.

    `units` are opened as the tables that hold the compressed tiles. Astropy's other decoders (of HCOMPRESS
    and PLIO) write outside their memory if a file is damaged.
    """
    for unit in (unit for unit in units if unit.header.get("ZIMAGE")):
        header = unit.header
        if header["ZCMPTYPE"] not in SAFE_COMPRESSION:
            raise ValueError(f"compressed by {header['ZCMPTYPE']}; decompress it with funpack")
        axes = range(1, int(header["ZNAXIS"]) + 1)
        pixel = abs(int(header["ZBITPIX"])) // 8
        size = pixel * math.prod(int(header[f"ZNAXIS{i}"]) for i in axes)
        tile = pixel * math.prod(int(header.get(f"ZTILE{i}", 1)) for i in axes)
        if max(size, tile) > MAX_BYTES or int(header["PCOUNT"]) > 2 * size + 2**16:
            raise ValueError("it is too large for a cutout")
        _check_deflated_tiles(unit, 8 * size // pixel)


def _check_deflated_tiles(table, most):
    """ValueError if the tiles that gzip compressed hold more than `most` bytes: astropy sets no limit."""
    names = ["GZIP_COMPRESSED_DATA"]
    if table.header["ZCMPTYPE"].startswith("GZIP"):
        names.append("COMPRESSED_DATA")
    for name in (name for name in names if name in table.columns.names):
        for tile in table.data[name]:
            content = zlib.decompressobj(wbits=47).decompress(np.asarray(tile).tobytes(), most + 1)
            most -= len(content)
            if most < 0:
                raise ValueError("its tiles hold more than the image that it announces")
