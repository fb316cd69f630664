"""Read image files from untrusted sources: `.npy`, `.npz` and FITS; numpy alone, astropy for FITS.

Nothing here executes what a file asks for. `read_npy` checks a header before it allocates memory,
and an object array goes through `_unpickle`, which knows numpy's own arrays and numbers only and
builds them itself.
"""

import ast
import bz2
import contextlib
import gzip
import math
import mmap
import os
import pickle
import pickletools
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np

from lib.errors import UserError, reason_of

MAX_PICKLE_BYTES = 64 * 2**20  # an axion file is one image and a number
MAX_PICKLE_OPCODES = 100_000  # a stack of images takes about 20 an image
MAX_NPZ_BYTES = 2**30
MAX_FITS_BYTES = 256 * 2**20
SAFE_FITS_COMPRESSION = ("RICE_1", "RICE_ONE", "GZIP_1", "GZIP_2", "NOCOMPRESS")
MAP_ABOVE_BYTES = 8 * 2**20  # larger arrays are mapped into memory, not read
MAX_DIMENSIONS = 8


def read_npy(path):
    """Read a `.npy` file of numbers, or an object array of images.

    Returns the array as it is stored, mapped into memory if it is large. Of an object array it
    returns the image of [image, number, ...], or the stack (n, H, W) of [image, image, ...] and of
    rows [image, number, ...]. Raises UserError, naming the file, for anything else; no code in the
    file is executed.
    """
    path = Path(path)
    with _named_errors(path, ".npy image"), path.open("rb") as file:
        return _read_array(file, os.fstat(file.fileno()).st_size, path)


def read_npz(path):
    """The arrays of a `.npz` file, [(name, array)], each as `read_npy` reads it; UserError.

    For what is sound but no image, such as labels, text, or a file that is no array, the array is
    None.
    """
    path = Path(path)
    with _named_errors(path, ".npz file"), zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not is_hidden(info.filename)]
        if sum(info.file_size for info in members) > MAX_NPZ_BYTES:
            raise ValueError("its arrays are too large together; store them as .npy")
        if not any(info.filename.endswith(".npy") for info in members):
            raise ValueError("there is no array in it")
        return [(m.filename.removesuffix(".npy"), _read_member(archive, m)) for m in members]


def _read_member(archive, info):
    """The array of one member of a `.npz` file, or None if it is no image."""
    if not info.filename.endswith(".npy"):
        return None
    # Read only as much as was announced, whatever the compressed stream holds.
    with archive.open(info) as member:
        content = member.read(info.file_size)
    try:
        array = _read_array(BytesIO(content), len(content), None)
    except _NoImageError:
        return None
    return array if array.ndim >= 2 else None


def is_hidden(path):
    """Whether a part of the path is a hidden name, or the folder __MACOSX that zip files bring."""
    return any(part[:1] == "." or part == "__MACOSX" for part in Path(path).parts)


def read_fits(path):
    """The first two-dimensional image of a FITS file, (H, W), see `fits_images`; UserError."""
    with _fits_units(path) as units:
        for unit, shape in units:
            if len(shape) == 2:
                return np.array(unit.data).reshape(shape)
        cubes = [shape for _, shape in units if len(shape) > 2]
        if cubes:
            raise ValueError(f"it has several planes, shape {cubes[0]}; give one image a file")
        raise ValueError("there is no two-dimensional image in it")


def fits_images(path):
    """All two-dimensional images (H, W) of a FITS file, a list; needs astropy. UserError.

    Axes of length one do not count. The file may be compressed by gzip, bzip2 or fpack, whatever
    its name says.
    """
    with _fits_units(path) as units:
        return [np.array(unit.data).reshape(shape) for unit, shape in units if len(shape) == 2]


@contextlib.contextmanager
def _fits_units(path):
    """The units of a FITS file, [(unit, shape)]; the shape is () of a table.

    Axes of length one are left out.
    """
    try:
        from astropy.io import fits
    except ImportError:
        raise UserError(f"{path}: FITS files need astropy: pip install astropy") from None
    path = Path(path)
    with _named_errors(path, "FITS image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = _decompressed(path)
        with fits.open(BytesIO(content), memmap=False, disable_image_compression=True) as units:
            _check_compressed_units(units)
        with fits.open(BytesIO(content), memmap=False) as units:
            shapes = [tuple(map(int, unit.shape)) if unit.is_image else () for unit in units]
            yield [(u, _without_unit_axes(s)) for u, s in zip(units, shapes, strict=True)]


def _decompressed(path):
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start[:2] == b"\x1f\x8b":
            file = gzip.open(file)
        elif start[:3] == b"BZh":
            file = bz2.open(file)
        content = file.read(MAX_FITS_BYTES + 1)
    if len(content) > MAX_FITS_BYTES:
        raise ValueError("it is too large for a cutout")
    return content


def _check_compressed_units(units):
    """ValueError if an image compressed by fpack cannot be decompressed safely.

    `units` are opened as the tables that hold the compressed tiles. Astropy's other decoders (of
    HCOMPRESS and PLIO) write outside their memory if a file is damaged.
    """
    for header in (unit.header for unit in units if unit.header.get("ZIMAGE")):
        if header["ZCMPTYPE"] not in SAFE_FITS_COMPRESSION:
            raise ValueError(f"compressed by {header['ZCMPTYPE']}; decompress it with funpack")
        axes = range(1, int(header["ZNAXIS"]) + 1)
        pixel = abs(int(header["ZBITPIX"])) // 8
        size = pixel * math.prod(int(header[f"ZNAXIS{i}"]) for i in axes)
        tile = pixel * math.prod(int(header.get(f"ZTILE{i}", 1)) for i in axes)
        stored = int(header["PCOUNT"])
        if max(size, tile) > MAX_FITS_BYTES or stored > 2 * size + 2**16:
            raise ValueError("it is too large for a cutout")


def _without_unit_axes(shape):
    """`shape` without its leading axes of length one, then trailing ones, down to two axes."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class _NoImageError(ValueError):
    """The array is sound, but text, labels or another kind that is no image."""


@contextlib.contextmanager
def _named_errors(path, kind):
    """Turn any error that a parser raises on arbitrary bytes into a UserError naming the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # the system's, not a parser's
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        reason = reason_of(error)
        raise UserError(f"{path}: not a usable {kind}: {reason}") from None


def forget_pages(array):
    """Return the memory of an array that `read_npy` mapped; the array can still be read.

    Without this the pages of a file stay in the process after they were read.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _read_array(file, size, path):
    """The array in an open `.npy` file of `size` bytes; mapped into memory if there is a path."""
    shape, fortran_order, dtype = _read_header(file)
    if dtype.kind != "O":
        return _read_numbers(path, file, size, shape, fortran_order, dtype)
    if size > MAX_PICKLE_BYTES:
        raise ValueError("an object array of this size is not one image")
    return _images_of(_unpickle(file.read()))


def _read_header(file):
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _NoImageError(f"format version {version} holds no plain numbers")
    length_bytes = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(length_bytes), "little")
    if length > 4096:
        raise _NoImageError("the header is too long for an array of numbers")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("the file is truncated")
    if b"\\" in text:  # no array needs an escape, and Python warns of odd ones on the terminal
        raise ValueError("the header is not that of an array")
    header = ast.literal_eval(text.decode("latin1").strip())
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("the header is not that of an array")
    shape, fortran_order, descr = header["shape"], header["fortran_order"], header["descr"]
    _check_shape(shape)
    if type(fortran_order) is not bool:
        raise ValueError("the header is not that of an array")
    if not isinstance(descr, str):
        raise _NoImageError("structured arrays are not images")
    dtype = np.dtype("O") if descr in ("|O", "O") else _number_dtype(descr)
    return shape, fortran_order, dtype


def _check_shape(shape):
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("the shape is not one of an array")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"impossible shape {shape}")


def _number_dtype(text):
    """The dtype of a code like "<f8": floats, integers and bool up to 8 bytes."""
    byte_order, code = (text[0], text[1:]) if text[:1] in ("<", ">", "|", "=") else ("=", text)
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise _NoImageError(f"data type {text[:20]!r} is not a plain number")
    return np.dtype(byte_order + code)


def _read_numbers(path, file, size, shape, fortran_order, dtype):
    offset = file.tell()
    expected = math.prod(shape) * dtype.itemsize
    if size - offset != expected:
        raise ValueError(
            f"{size - offset} bytes of data where shape {shape} needs {expected}; is it truncated?"
        )
    order = "F" if fortran_order else "C"
    if path and expected > MAP_ABOVE_BYTES:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order=order)
    return np.frombuffer(file.read(), dtype).reshape(shape, order=order)


# The opcodes that numpy's pickles of arrays and numbers consist of (protocols 2 to 4).
_PICKLE_OPCODES = frozenset(
    """
    PROTO FRAME STOP GLOBAL STACK_GLOBAL REDUCE BUILD MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE
    EMPTY_LIST APPEND APPENDS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINPUT LONG_BINPUT MEMOIZE BINGET
    LONG_BINGET
    """.split()
)


class _Array:
    """Stands for a numpy array while a pickle is read.

    `value` is an array of numbers; of an object array a list, in whose place a table of two axes
    has a list of rows.
    """

    __slots__ = ("value",)

    def __init__(self):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, content = state
        _check_shape(shape)
        if not isinstance(dtype, _DType):
            raise ValueError("an array without a data type")
        count = math.prod(shape)
        if dtype.code == "O8":
            if type(content) is not list or len(content) != count:
                raise ValueError("the object array does not hold what its shape says")
            self.value = content if len(shape) < 2 else _rows(content, shape)
            return
        number = _number_dtype(dtype.byte_order + dtype.code)
        if type(content) is not bytes or len(content) != count * number.itemsize:
            raise ValueError("the array does not hold what its shape says")
        order = "F" if fortran_order is True else "C"
        self.value = np.frombuffer(content, number).reshape(shape, order=order)


class _DType:
    """Stands for a numpy dtype while a pickle is read."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code, *_):
        if not isinstance(code, str):
            raise ValueError("an unknown data type")
        self.code, self.byte_order = code, "="

    def __setstate__(self, state):
        if not isinstance(state, tuple) or state[1] not in ("<", ">", "|", "="):
            raise ValueError("an unknown data type")
        self.byte_order = state[1]


def _scalar(dtype, content):
    number = _number_dtype(dtype.byte_order + dtype.code)
    if type(content) is not bytes or len(content) != number.itemsize:
        raise ValueError("a number of another size")
    return float(np.frombuffer(content, number)[0])


class _Callable:
    """Stands for a global of a pickle: calls one function of ours and cannot be changed."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise ValueError("the pickle tries to change a function")


_PICKLE_GLOBALS = {
    "ndarray": None,  # only ever an argument of _reconstruct
    "dtype": _DType,
    "_reconstruct": lambda *_: _Array(),
    "scalar": _scalar,
}
_PICKLE_MODULES = {
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in _PICKLE_MODULES.get(module, ()):
            raise ValueError(f"its pickle asks for {module}.{name}, which is refused")
        return _Callable(_PICKLE_GLOBALS[name])

    def persistent_load(self, _):
        raise ValueError("its pickle asks for an outside object, which is refused")


def _unpickle(content):
    """Read the pickle of a numpy object array with our own stand-ins; returns an `_Array`.

    The opcodes are checked first, without executing any: only those that numpy writes, not too
    many, and no memo index that would make the unpickler allocate gigabytes.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in _PICKLE_OPCODES or count > MAX_PICKLE_OPCODES:
            raise ValueError(f"its pickle uses {opcode.name}, which arrays and numbers do not need")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > MAX_PICKLE_OPCODES:
            raise ValueError("its pickle has an impossible memo index")
        if opcode.name == "GLOBAL" and argument.split(" ")[0] not in _PICKLE_MODULES:
            raise ValueError(f"its pickle asks for {argument[:80]}, which is refused")
    return _Unpickler(BytesIO(content)).load()


def _rows(elements, shape):
    """The elements of an object array of two axes as a list of rows.

    numpy lists objects row by row even if the array is column-major.
    """
    if not elements:
        return []
    if len(shape) > 2:
        raise _NoImageError(f"an object array of shape {shape} is not a list of images")
    return [elements[i * shape[1] : (i + 1) * shape[1]] for i in range(shape[0])]


def _images_of(unpickled):
    """The images of an object array: one (H, W), or a stack (n, H, W)."""
    if not isinstance(unpickled, _Array) or not isinstance(unpickled.value, list):
        raise ValueError("its pickle is not an object array")
    elements = [_content(element) for element in unpickled.value]
    if elements and isinstance(elements[0], list):
        images = [_image_of_row(element) for element in elements]
    elif len(elements) > 1 and all(_is_image(element) for element in elements):
        images = elements
    else:
        return _image_of_row(elements)
    if len({image.shape for image in images}) > 1:
        raise ValueError("the images of the object array have different shapes")
    if sum(image.nbytes for image in images) > MAX_PICKLE_BYTES:  # one image may be there often
        raise ValueError("the object array has too many images; store them as plain numbers")
    return np.stack(images)


def _image_of_row(row):
    """The image of [image, number, ...]."""
    elements = [_content(element) for element in row] if isinstance(row, list | tuple) else []
    if not any(isinstance(element, np.ndarray | list | tuple) for element in elements):
        raise _NoImageError("the object array does not begin with an image")
    if not _is_image(elements[0]):
        raise ValueError("the object array does not begin with an image")
    for element in elements[1:]:
        if not isinstance(element, int | float) and not _is_number(element):
            raise ValueError("the object array holds more than an image and numbers")
    return elements[0]


def _content(element):
    """An element of an object array with the array in the place of what stands for it."""
    if isinstance(element, tuple):
        return list(element)
    return element.value if isinstance(element, _Array) else element


def _is_image(element):
    return isinstance(element, np.ndarray) and element.ndim >= 2


def _is_number(element):
    return isinstance(element, np.ndarray) and element.ndim < 2 and element.size == 1
