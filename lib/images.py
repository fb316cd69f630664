"""Images from files: .npy, .npz, FITS and PNG, for training and prediction.

It needs numpy alone, astropy for FITS and matplotlib for PNG.

The files may come from strangers: nothing in them is executed, and headers are checked before they cost
memory.
"""

import ast
import codecs
import contextlib
import functools
import math
import mmap
import os
import pickle
import pickletools
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import fits, png, units, wcs
from lib.errors import UserError, named_errors
from lib.files import is_hidden, is_own_picture

SUFFIXES = (".npy", ".npz", *fits.SUFFIXES, png.SUFFIX)
PACKED_FILES = {"dataset.json", "images.npy", "labels.npy", "hashes.npy"}  # of a packed data set; more may be there
MASSES = "masses.npy"
MAP_ABOVE_BYTES = 8 * 2**20  # larger arrays are mapped into memory, not read
MAX_DIMENSIONS = 8
MAX_PICKLE_BYTES = 64 * 2**20  # an axion file is one image and a number
MAX_PICKLE_OPCODES = 100_000  # a stack of images takes about 20 an image
MAX_NPZ_BYTES = 2**30
LARGEST_PIXEL = 1.1  # in pixels of the network, of an image that is resampled
FEW_PLANES = 5  # a stack of so many may also be the bands of one lens
MINMAX = "minmax"
READABLE = "give .npy, .npz, FITS or PNG files"
KINDS_OF_FILES = {
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture",
    b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture", b"\x89HDF": "an HDF5 file", b"%PDF": "a PDF",
    b"PAR1": "a Parquet table", b"<?xm": "an XML file", b"<!DO": "a web page", b"\x80\x04\x95": "a pickle",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
}  # fmt: skip


# Finding files


def images_among(paths):
    """Those of the paths in a folder that hold images, by their names; the content decides what each is.

    PNG files count where there are no others, since beside them they are pictures of them. Those that the scripts
    have drawn never count.
    """
    named = [path for path in paths if path.name.lower().endswith(SUFFIXES)]
    others = [path for path in named if not is_png(path)]
    return others or [path for path in named if not is_own_picture(path)]


def is_png(path):
    return Path(path).name.lower().endswith(png.SUFFIX)


def is_fits(path):
    return Path(path).name.lower().endswith(fits.SUFFIXES)


def find_files(paths):
    """The files to predict: those given, and the image files in folders at any depth.

    Returns (files, others, errors): `others` are the files in folders that hold no images, `errors` the
    folders that cannot be listed, [(folder, reason)]. A file that is reached twice under one name counts
    once. Raises UserError for a missing path.
    """
    files, others, errors = {}, {}, []
    real_folder = functools.cache(os.path.realpath)
    for path in paths:
        if not path.exists():
            raise UserError(f"no file or folder {path}")
        for file, is_image in _walk(path, errors) if path.is_dir() else [(path, True)]:
            key = real_folder(file.parent), file.name
            (files if is_image else others).setdefault(key, file)
    return list(files.values()), [others[key] for key in others if key not in files], errors


def _walk(root, errors):
    """The files below a folder, sorted: [(path, whether it may hold images)].

    Links to folders are followed. Each folder is listed once, under its own name where it has one below
    `root`. Hidden files and folders are left out.
    """

    def cannot_list(error):
        errors.append((error.filename, f"cannot list folder {error.filename}: {error.strerror}"))

    found, listed, links = [], set(), [root]
    for link in links:  # which grows; all folders that are no links come first
        for folder, subfolders, names in os.walk(link, onerror=cannot_list):
            if os.path.realpath(folder) in listed:
                subfolders.clear()
                continue
            listed.add(os.path.realpath(folder))
            subfolders[:] = [name for name in subfolders if not is_hidden(name)]
            links += filter(os.path.islink, (Path(folder, name) for name in subfolders))
            no_images = PACKED_FILES - {"images.npy"} | {MASSES} if PACKED_FILES.issubset(names) else ()
            paths = [Path(folder, name) for name in names if not is_hidden(name)]
            images = set(images_among([path for path in paths if path.name not in no_images]))
            for path in paths:
                regular = path.is_file() or not path.exists()  # a dangling link becomes an error
                found.append((path, regular and path in images))
    return sorted(found)


# Reading images


class Found(NamedTuple):
    """An array of a file (None: no image), and what a FITS file says of it, see `fits.FitsImage`.

    numbers : of an object array, a tuple of those beside each image; () of other files.
    """

    name: str
    array: np.ndarray | None
    rounded: float = 0.0
    pixel_scale: float | None = None
    cards: dict | None = None
    numbers: tuple = ()


class How(NamedTuple):
    """How images are taken from files, as the user says.

    hdu : name or number of a FITS file's HDU; without it the only one that shows the sky.
    planes : what the planes (n, H, W) of a file are: "lenses", "bands" of one lens, which are averaged, or
        the number of the band to take. Without it a stack of a .npy file is lenses, a FITS cube is refused.
    crop : whether the centre of larger images is taken.
    centre : (x, y), column and row of the pixel to crop around, or "brightest".
    pixel_scale : arcsec of the files' pixels, or "wcs" for what their headers say; without it images are
        not resampled.
    wanted_scale : arcsec of the network's pixels, None if it is unknown.
    factor : what pixels are multiplied by, or MINMAX: every image is scaled to its own minimum and maximum.
    zero_point : magnitude of one of the network's unit, to which the headers of FITS files bring pixels; without
        it headers do not say the unit.
    """

    hdu: str | None = None
    planes: str | int | None = None
    crop: bool = False
    centre: tuple | str | None = None
    pixel_scale: float | str | None = None
    wanted_scale: float | None = None
    factor: float | str = 1.0
    zero_point: float | None = None


class Said(NamedTuple):
    """What there is to say of the files: lists that grow while images are read.

    errors : [(name, reason)] of what cannot be read.
    others : names of arrays and files that hold no images.
    notes : [(kind of NOTES, name, detail)] of what was read, but may not be what the user means.
    more : how many images more than one each file has and each stack.
    """

    errors: list
    others: list
    notes: list
    more: list

    def about_notes(self):
        """A line on each kind of note, with the name and the detail of the first."""
        for kind, text in NOTES.items():
            found = [(name, detail) for of_kind, name, detail in self.notes if of_kind == kind]
            if found:
                name, detail = found[0]
                count = f"{len(found)} file{'s' * (len(found) > 1)}"
                yield f"read {count}, such as {name}, {text.format(detail)}"


NOTES = {
    "scale": "whose WCS says another pixel scale than the network's: --pixel-scale wcs resamples them",
    "planes": "and took their planes for lenses: for bands of one lens give --planes bands or a band's number",
    "unit": "whose pixels were brought from the unit that the header says to the network's ({}); --scale or "
    "--zero-point says another unit",
    "no unit": "with the pixels as they are, since the header does not say their unit: {}",
    "rounded": "compressed by fpack with rounding (quantised floats): a network that learned from exact "
    "pixels takes the rounding for noise; use the original file, or compress it with quantize_level=0 and GZIP_2",
    "picture": "a picture: its pixels are from 0 to 1, which --scale brings to the network's unit, and 8 bits hide "
    "weak substructure; use the original file if there is one",
}  # fmt: skip


def read_image(path):
    """The image of a file that holds one square image, (H, H) float32, to train on.

    Raises UserError, naming the file and the remedy, for anything else.
    """
    stack, _ = read_stack(path)
    if len(stack) != 1:
        raise UserError(f"{path}: expected one square image, got {len(stack)}; give one a file")
    return training_image(stack, 0, path)


def read_stack(path):
    """(images (n, H, H) of a file to train on, a tuple of the numbers beside each, or () if it holds images alone).

    The images are as the file stores them, mapped into memory if it is large. Raises UserError, naming the file
    and the remedy, for anything else, also for a FITS cube whose planes may be bands of one lens.
    """
    arrays = [found for found in read_arrays(Path(path), How(planes="lenses")) if found.array is not None]
    if len(arrays) > 1:
        raise UserError(f"{path}: expected one square image or one stack, got {len(arrays)} arrays; give one a file")
    shape, stack = arrays[0].array.shape, _stack_of(arrays[0].array)
    if stack.ndim != 3 or stack.shape[1] != stack.shape[2] or not stack.size:
        raise UserError(f"{path}: expected one square image or a stack of them, got shape {shape}; remove it")
    if arrays[0].cards is not None:
        _require_lenses(path, stack, arrays[0].cards)
    return stack, arrays[0].numbers


def _require_lenses(path, stack, cards):
    """UserError if the planes (n, H, H) of a FITS file may be bands of one lens, by their number or the header."""
    axis = next((cards[name] for name in ("CTYPE3", "CTYPE4", "CUNIT3", "CUNIT4") if cards.get(name)), "")
    if len(stack) > FEW_PLANES and not axis or len(stack) == 1:
        return
    reason = f", along an axis {axis}," if axis else ", which"
    raise UserError(
        f"{path}: several planes, shape {stack.shape}{reason} may be bands of one lens: if they are, save one or "
        "their mean; if they are lenses, save them as a .npy stack or one a file"
    )


def training_image(stack, i, name):
    """Image `i` (H, H) float32 of a stack; UserError, which has its `name`, for NaN or infinite pixels."""
    image = _finite_float32(stack[i])
    if image is None:
        raise UserError(f"{name}: NaN or infinite pixels; repair or remove it")
    return image


def names_in(path, count):
    """The paths that name the images of a file of `count` images, as prediction names them: stack.npy[17]."""
    return [path] if count == 1 else [path.with_name(f"{path.name}[{i}]") for i in range(count)]


def read_images(files, img_size, said, how=How()):
    """Yield (name, image (H, H) float32) of every image in the files, see `read_placed_images`."""
    for name, image, _ in read_placed_images(files, img_size, said, how):
        yield name, image


def read_placed_images(files, img_size, said, how=How()):
    """Yield (name, image (H, H) float32, WCS) of every image in the files, to predict; H is `img_size`.

    The WCS is that of the part that was taken: cards as `wcs.cards_of` gives them, None for other files than FITS.
    What cannot be read, or may be misread, is appended to the lists of `said`.
    """
    for path in files:
        try:
            arrays = read_arrays(path, how)
        except UserError as error:
            said.errors.append((str(path), str(error)))
            continue
        said.more.append(sum(found.array is not None for found in arrays) - 1)
        for found in arrays:
            if found.array is None:
                said.others.append(found.name)
            else:
                yield from _images_in(found, img_size, said, how)


def _images_in(found, img_size, said, how):
    name, array = found.name, found.array
    if found.rounded:
        said.notes.append(("rounded", name, ""))
    if is_png(name):
        said.notes.append(("picture", name, ""))
    scale = found.pixel_scale if how.pixel_scale == "wcs" else how.pixel_scale
    if how.pixel_scale and not scale:
        said.errors.append((name, f"{name}: no WCS says its pixel scale; give --pixel-scale in arcsec"))
        return
    if not scale and found.pixel_scale and how.wanted_scale:
        if not 0.95 < found.pixel_scale / how.wanted_scale < 1.05:
            said.notes.append(("scale", name, ""))
    size = 1.0 if not scale else scale / how.wanted_scale  # of a pixel, in the network's pixels
    try:
        stack = _stack_of(array, how.planes)
    except ValueError as error:
        said.errors.append((name, f"{name}: {error}"))
        return
    height, width = (int(side * size + 1e-6) for side in stack.shape[1:]) if stack.ndim == 3 else (0, 0)
    if min(height, width) < img_size or not len(stack):
        wanted = f"expected an image of {img_size}×{img_size} pixels or a stack of them"
        said.errors.append((name, f"{name}: {wanted}, got shape {array.shape}{_about_bands(array)}"))
        return
    if not how.crop and not how.centre and (height, width) != (img_size, img_size):
        said.errors.append((name, f"{name}: {height}×{width} pixels where the network takes "
                                  f"{img_size}×{img_size}; --crop takes the centre"))  # fmt: skip
        return
    if how.planes is None and 1 < len(stack) <= FEW_PLANES and name.lower().endswith(".npy"):
        said.notes.append(("planes", name, ""))
    said.more.append(len(stack) - 1)
    factor = how.factor if how.factor == MINMAX else how.factor * _factor_of(found, said, how)
    sky = _sky_of(found, stack.shape[1:])
    for i, whole in enumerate(stack):
        image_name = name if len(stack) == 1 else f"{name}[{i}]"
        try:
            image, corner = _cropped(resampled(whole, size), img_size, how.centre)
        except ValueError as error:
            said.errors.append((image_name, f"{image_name}: {error}"))
        else:
            with np.errstate(all="ignore"):  # the network makes no sense of what is not finite
                image = from_0_to_1(image) if factor == MINMAX else image * np.float32(factor)
            yield image_name, image, None if sky is None else wcs.moved(sky, whole.shape, size, corner)
        if i % 256 == 255:
            forget_pages(array)


def _factor_of(found, said, how):
    """What brings the pixels of a FITS file to the network's unit; what the header says of it is noted."""
    if found.cards is None or how.zero_point is None:
        return 1.0
    zero_point, detail = units.zero_point_of(found.cards, found.pixel_scale)
    if zero_point is None:
        if detail:
            said.notes.append(("no unit", found.name, detail))
        return 1.0
    factor = 10 ** (0.4 * (how.zero_point - zero_point))
    said.notes.append(("unit", found.name, f"{detail}: factor {factor:.4g}"))
    return factor


def _sky_of(found, shape):
    """The cards of the WCS of images of `shape`, {} if their axes are not the first of the file; None if no FITS."""
    if found.cards is None:
        return None
    return wcs.cards_of(found.cards) if found.array.shape[-2:] == shape else {}


def from_0_to_1(image):
    """An image scaled to its own minimum and maximum, float32; NaN where all pixels are equal."""
    low = image.min()
    return ((image - low) / (image.max() - low)).astype(np.float32)


def resampled(image, size):
    """An image whose pixels are `size` new pixels wide, in new pixels: their sums of light are kept.

    Raises ValueError where that would make details that are not in the image.
    """
    if size == 1:
        return image
    if size > LARGEST_PIXEL:
        raise ValueError(f"its pixels are {size:.3g} times as wide as the network's: it has too little detail")

    def shares(side):
        """How much of each old pixel (columns) falls into each new one (rows), around the centre."""
        new, old = int(side * size + 1e-6), np.arange(side)
        edges = side / 2 + (np.arange(new + 1) - new / 2) / size
        return (np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)).clip(0)

    height, width = image.shape
    return shares(height) @ np.asarray(image, np.float64) @ shares(width).T


def _cropped(image, size, centre):
    """The part (size, size) of an image around its centre or another pixel, as float32, and its (top, left)."""
    top, left = ((side - size) // 2 for side in image.shape)
    if centre == "brightest":
        row, column = np.unravel_index(np.nanargmax(image), image.shape)
    elif centre:
        column, row = centre
    if centre:
        top, left = row - size // 2, column - size // 2
        if not (0 <= top <= image.shape[0] - size and 0 <= left <= image.shape[1] - size):
            raise ValueError(f"{size}×{size} pixels around column {column}, row {row} are not all in the image")
    image = _finite_float32(image[top : top + size, left : left + size])
    if image is None:
        raise ValueError("NaN or infinite pixels")
    return image, (int(top), int(left))


def read_arrays(path, how=How()):
    """The arrays of one file, a list of `Found`; UserError."""
    name = path.name.lower()
    require_known_kind(path)
    if is_fits(path):
        image = fits.read_fits(path, how.hdu)
        if image.pixels.ndim > 2 and how.planes is None:
            raise UserError(
                f"{path}: several planes, shape {image.pixels.shape}: predict.py --planes says what they "
                "are, lenses or bands"
            )
        name = f"{path}[{image.hdu}]" if image.hdu else str(path)
        return [Found(name, image.pixels, image.rounded, image.pixel_scale, image.cards)]
    if name.endswith(".npz"):
        return _read_npz(path)
    if name.endswith(png.SUFFIX):
        return [Found(str(path), png.read_png(path))]
    array, numbers = _read_npy(path)
    return [Found(str(path), array, numbers=numbers)]


def require_known_kind(path):
    """UserError that says what a file is, if its first bytes are those of another kind."""
    with named_errors(path, "image"), path.open("rb") as file:
        start = file.read(32)
    for beginning, kind in KINDS_OF_FILES.items():
        if start.startswith(beginning) and not (is_png(path) and start.startswith(png.BEGINNING)):
            remedy = f"name it {path.stem}.png" if start.startswith(png.BEGINNING) else READABLE
            raise UserError(f"{path} is {kind}: {remedy}")
    if _is_text(start):
        raise UserError(f"{path} is a text file: {READABLE}")


def _is_text(start):
    """Whether the first bytes of a file are text in UTF-8, and not the header of a FITS file, which is text, too."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    text = text.removeprefix("\ufeff")  # a byte-order mark
    return bool(text) and not text.startswith("SIMPLE") and all(c.isprintable() or c in "\t\r\n\f" for c in text)


def _stack_of(array, planes=None):
    """An array as images (n, H, W), if it is one or several.

    It may have a channel axis: (1, H, W), (H, W, 1), (n, 1, H, W) or (n, H, W, 1), and of several
    channels if `planes` says that they are bands, see `How`.
    """
    if planes not in (None, "lenses") and array.ndim in (3, 4):
        axis = -1 if array.shape[-1] < min(array.shape[-3:-1]) else -3
        if planes == "bands":
            array = array.mean(axis=axis)
        elif planes >= array.shape[axis]:
            raise ValueError(f"shape {array.shape} has no band {planes}")
        else:
            array = np.take(array, planes, axis=axis)
    elif type(planes) is int and planes > 0:
        raise ValueError(f"shape {array.shape} has no band {planes}")
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim in (3, 4) and array.shape[-1] == 1:
        array = array[..., 0]
    return array[None] if array.ndim == 2 else array


def _about_bands(array):
    bands = array.ndim in (3, 4) and 1 < min(array.shape[-1], array.shape[-3]) <= 2 * FEW_PLANES
    return "; if it has bands, give --planes bands or the number of one" if bands else ""


def _finite_float32(image):
    """The image as float32, or None if a pixel is NaN or infinite then."""
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, dtype=np.float32)
    return image if np.isfinite(image).all() else None


class _NoImageError(ValueError):
    """The array is sound, but text, labels or another kind that is no image."""


# .npy and .npz


def read_npy(path):
    """The array of a `.npy` file of numbers, or of an object array of images.

    Returns the array as it is stored, mapped into memory if it is large. Of an object array it returns the
    image of [image, number, ...], or the stack (n, H, W) of [image, image, ...] and of rows [image, number,
    ...]. Raises UserError, naming the file, for anything else.
    """
    return _read_npy(Path(path))[0]


def _read_npy(path):
    with named_errors(path, ".npy image"), path.open("rb") as file:
        return _read_array(file, os.fstat(file.fileno()).st_size, path)


def forget_pages(array):
    """Return the memory of an array that `read_npy` mapped; the array can still be read.

    Without this the pages of a file stay in the process after they were read.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _read_npz(path):
    """The arrays of a `.npz` file, [(name, array, or None where it is no image)]; UserError."""
    arrays = []
    with named_errors(path, ".npz file"), zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not is_hidden(info.filename)]
        if sum(info.file_size for info in members) > MAX_NPZ_BYTES:
            raise ValueError("its arrays are too large together; store them as .npy")
        for info in members:
            array, numbers = None, ()
            if info.filename.endswith(".npy"):
                # Read only as much as was announced, whatever the compressed stream holds.
                with archive.open(info) as member, contextlib.suppress(_NoImageError):
                    content = member.read(info.file_size)
                    array, numbers = _read_array(BytesIO(content), len(content), None)
            is_image = array is not None and array.ndim >= 2
            name = f"{path}:{info.filename.removesuffix('.npy')}"
            arrays.append(Found(name, array if is_image else None, numbers=numbers))
        if all(found.array is None for found in arrays):
            raise ValueError("there is no image in it")
    return arrays


def _read_array(file, size, path):
    """The array in an open `.npy` file of `size` bytes, mapped into memory if there is a path; see `_images_of`."""
    shape, order, dtype = _read_header(file)
    if dtype.kind == "O":
        if size > MAX_PICKLE_BYTES:
            raise ValueError("an object array of this size is not one image")
        return _images_of(_unpickle(file.read()))
    offset = file.tell()
    expected = math.prod(shape) * dtype.itemsize
    if size - offset != expected:
        raise ValueError(
            f"{size - offset} bytes of data where shape {shape} needs {expected}; is it truncated?"
        )
    if path and expected > MAP_ABOVE_BYTES:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order=order), ()
    return np.frombuffer(file.read(), dtype).reshape(shape, order=order), ()


def _read_header(file):
    """(shape, "C" or "F", dtype) of an open `.npy` file, which then stands at its data."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _NoImageError(f"format version {version} holds no plain numbers")
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > 4096:
        raise _NoImageError("the header is too long for an array of numbers")
    text = file.read(length)
    if len(text) != length or b"\\" in text:  # no array needs an escape, and Python warns of odd ones
        raise ValueError("the header is truncated or damaged")
    header = ast.literal_eval(text.decode("latin1").strip())
    if set(header) != {"descr", "fortran_order", "shape"} or type(header["fortran_order"]) is not bool:
        raise ValueError("the header is not that of an array")
    _check_shape(header["shape"])
    if not isinstance(header["descr"], str):
        raise _NoImageError("structured arrays are not images")
    return header["shape"], "F" if header["fortran_order"] else "C", _dtype_of(header["descr"])


def _check_shape(shape):
    is_tuple = type(shape) is tuple and len(shape) <= MAX_DIMENSIONS
    if not is_tuple or not all(type(n) is int and n >= 0 for n in shape):
        # It is not printed: the lists of a pickle may hold each other until their text fills any memory.
        raise ValueError("the shape is not one of an array")


def _dtype_of(text):
    """The dtype of a code like "<f8": floats, integers and bool up to 8 bytes, or objects ("|O")."""
    byte_order, code = (text[0], text[1:]) if text[:1] in ("<", ">", "|", "=") else ("=", text)
    if code in ("O", "O8"):  # as a header and as a pickle has it
        return np.dtype("O")
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise _NoImageError(f"data type {text[:20]!r} is not a plain number")
    return np.dtype(byte_order + code)


# Pickles of object arrays

# What numpy's pickles of arrays and numbers consist of (protocols 2 to 4).
_OPCODES = frozenset(
    "PROTO FRAME STOP GLOBAL STACK_GLOBAL REDUCE BUILD MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE "
    "EMPTY_LIST APPEND APPENDS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
_GLOBALS = {
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
}


class _Made:
    """Stands for what a function of numpy would make: its name, its arguments, and the state to set.

    numpy itself is not safe: its `__setstate__` of arrays reads beyond the end of a list that is shorter
    than the shape, and that of dtypes lets bytes of the file be used as pointers.
    """

    state = None

    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments

    def __setstate__(self, state):
        if self.state is not None:
            raise ValueError("its pickle sets a state twice")
        self.state = state

    @functools.cached_property
    def value(self):
        """A number, an array of numbers, or of an object array the list of its elements or rows."""
        if self.function == "scalar":
            dtype, content = self.arguments
            return float(_numbers(content, _dtype_made(dtype), (), "C"))
        if self.function != "_reconstruct":
            raise ValueError("its pickle has a function in the place of a value")
        _, shape, dtype, fortran_order, content = self.state
        _check_shape(shape)
        dtype = _dtype_made(dtype)
        if dtype.kind != "O":
            return _numbers(content, dtype, shape, "F" if fortran_order is True else "C")
        if type(content) is not list or len(content) != math.prod(shape):
            raise ValueError("the object array does not hold what its shape says")
        if len(shape) > 2:
            raise _NoImageError(f"an object array of shape {shape} is not a list of images")
        if len(shape) < 2:
            return content
        # numpy lists objects row by row even if the array is column-major.
        return [content[i : i + shape[1]] for i in range(0, len(content), shape[1] or 1)]


def _dtype_made(made):
    if not isinstance(made, _Made) or made.function != "dtype":
        raise ValueError("an array without a data type")
    code, byte_order = made.arguments[0], "=" if made.state is None else made.state[1]
    if type(code) is not str or byte_order not in ("<", ">", "|", "="):
        raise ValueError("an unknown data type")
    return _dtype_of(byte_order + code)


def _numbers(content, dtype, shape, order):
    fitting = type(content) is bytes and len(content) == math.prod(shape) * dtype.itemsize
    if dtype.kind == "O" or not fitting:
        raise ValueError("the array does not hold what its shape says")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in _GLOBALS.get(module, ()):
            raise ValueError(f"its pickle asks for {module}.{name}, which is refused")
        return lambda *arguments: _Made(name, arguments)


def _unpickle(content):
    """Read the pickle of a numpy object array as plain data and `_Made`; executes nothing.

    The opcodes are checked first: only those that numpy writes, not too many, and no memo index
    that would make the unpickler allocate gigabytes.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count > MAX_PICKLE_OPCODES:
            raise ValueError("its pickle has too many parts; store the images as plain numbers")
        if opcode.name not in _OPCODES:
            raise ValueError(f"its pickle uses {opcode.name}, which arrays and numbers do not need")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > MAX_PICKLE_OPCODES:
            raise ValueError("its pickle has an impossible memo index")
    return _Unpickler(BytesIO(content)).load()


def _images_of(unpickled):
    """(image (H, W) or stack (n, H, W) of an object array, a tuple of the numbers beside each image)."""
    if not isinstance(unpickled, _Made) or not isinstance(unpickled.value, list):
        raise ValueError("its pickle is not an object array")
    elements = _values(unpickled.value)
    if len(elements) > 1 and all(map(_is_image, elements)):
        rows = [[image] for image in elements]
    elif elements and all(isinstance(element, list | tuple) for element in elements):
        if sum(map(len, elements)) > MAX_PICKLE_OPCODES:  # one row may be there often
            raise ValueError("the object array has too many rows")
        rows = map(_values, elements)
    else:
        image, numbers = _image_and_numbers(elements)
        return image, (numbers,)
    images, numbers = zip(*map(_image_and_numbers, rows), strict=True)
    if len({image.shape for image in images}) > 1:
        raise ValueError("the images of the object array have different shapes")
    if sum(image.nbytes for image in images) > MAX_PICKLE_BYTES:  # one image may be there often
        raise ValueError("the object array has too many images; store them as plain numbers")
    return np.stack(images), numbers


def _image_and_numbers(row):
    """(image (H, W), (number, ...)) of a row [image, number, ...]."""
    if not row or not _is_image(row[0]):
        is_list = any(isinstance(element, np.ndarray | list | tuple) for element in row)
        raise (ValueError if is_list else _NoImageError)("the object array does not begin with an image")
    numbers = [e.item() if isinstance(e, np.ndarray) and e.shape in ((), (1,)) else e for e in row[1:]]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("the object array holds more than an image and numbers")
    return row[0], tuple(numbers)


def _values(elements):
    return [element.value if isinstance(element, _Made) else element for element in elements]


def _is_image(element):
    return isinstance(element, np.ndarray) and element.ndim >= 2


def with_known_edges(images, edges):
    """Images (N, H, W) whose outermost `edges` (N,) pixels are replaced by the nearest others.

    Raises ValueError for edges that are no such numbers or leave no pixel.
    """
    if edges.shape != (len(images),) or edges.dtype.kind not in "iu":
        raise ValueError(f"edge_unknown must be {len(images)} numbers of pixels")
    filled, edges = images.copy(), edges.astype(np.int64)
    for i in np.flatnonzero(edges):
        if not 0 < 2 * edges[i] < images.shape[1]:
            raise ValueError(f"edge_unknown of image {i} is {edges[i]} of {images.shape[1]} pixels")
        filled[i] = np.pad(images[i, edges[i] : -edges[i], edges[i] : -edges[i]], edges[i], mode="edge")
    return filled
