"""The image in a PNG picture, which may come from a stranger; needs matplotlib, without torch."""

import zlib
from io import BytesIO

import numpy as np

from lib.errors import UserError, named_errors

SUFFIX = ".png"
BEGINNING = b"\x89PNG\r\n\x1a\n"
MAX_BYTES = 256 * 2**20
LARGEST_SIDE = 4096
NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks that say what the pixels are
PLANES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each type of colour; Pillow keeps 8 bits of several planes


def read_png(path):
    """The pixels (H, W) float32 of a greyscale picture, from 0 to 1; its upper row is the first.

    8 bits are divided by 255, 16 bits by 65535. A picture in colours is read if it is grey: all planes equal, and
    opaque. Raises UserError, naming the file, for any other, for one that is damaged, and without matplotlib.
    """
    try:
        from matplotlib.image import imread
    except ImportError:
        raise UserError(f"{path}: PNG pictures need matplotlib: pip install matplotlib") from None
    with named_errors(path, "PNG picture"), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
        pixels = imread(BytesIO(_checked(content)), format="png")
    if pixels.ndim == 3:
        if pixels.shape[2] == 4 and not (pixels[..., 3] == 1).all():
            raise UserError(f"{path}: a picture with transparent pixels; save it as a greyscale PNG")
        if not (pixels[..., :3] == pixels[..., :1]).all():
            raise UserError(f"{path}: a picture in colours; save one band as a greyscale PNG, FITS or .npy")
        pixels = np.ascontiguousarray(pixels[..., 0])
    return pixels


def bits_of(path):
    """Bits of a pixel in each plane of a picture, 0 for a file that is none."""
    with named_errors(path, "PNG picture"), path.open("rb") as file:
        start = file.read(25)
    return start[24] if start.startswith(BEGINNING) and len(start) == 25 else 0


def _checked(content):
    """The PNG without the chunks that its pixels do not need: texts and profiles may unpack to any size.

    Raises ValueError unless it is whole and of a cutout's size (PNG specification, sections 5, 9 and 11.2).
    """
    if not content.startswith(BEGINNING) or content[12:16] != b"IHDR" or len(content) < 33:
        raise ValueError("its first bytes are not those of a PNG")
    if len(content) > MAX_BYTES:
        raise ValueError("it is too large for a cutout")
    width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
    bits, planes, is_interlaced = content[24], PLANES.get(content[25], 0), content[28]
    if not 0 < min(width, height) <= max(width, height) <= LARGEST_SIDE:
        raise ValueError(f"{width}×{height} pixels are no cutout; {LARGEST_SIDE} is the largest side")
    if bits * planes not in (1, 2, 4, 8, 16, 24, 32) or (bits == 16 and planes > 1) or is_interlaced:
        raise ValueError("interlaced, or of 16 bits in several planes; save it as a plain greyscale PNG")
    chunks = list(_chunks(content))
    if any(kind == b"acTL" for kind, _ in chunks):
        raise ValueError("it is an animation; save one picture")
    if [kind for kind, _ in chunks].count(b"IHDR") > 1:  # Pillow would believe the last
        raise ValueError("it has two headers")
    packed = [chunk[8:-4] for kind, chunk in chunks if kind == b"IDAT"]
    # Pillow takes rows that are missing for black ones.
    size = height * (1 + -(-width * bits * planes // 8))
    if len(zlib.decompressobj().decompress(b"".join(packed), size + 1)) != size:
        raise ValueError(f"it does not hold the {width}×{height} pixels that it announces")
    return BEGINNING + b"".join(chunk for kind, chunk in chunks if kind in NEEDED)


def _chunks(content):
    """Yield (kind, bytes) of each chunk up to the last; ValueError if one is damaged or missing."""
    kind, at = b"", len(BEGINNING)
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(content[at : at + 4])
        kind = content[at + 4 : at + 8]
        if len(kind) < 4 or end > len(content):
            raise ValueError("it is truncated")
        if zlib.crc32(memoryview(content)[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
            raise ValueError("it is damaged: a checksum is wrong")
        yield kind, content[at:end]
        at = end
