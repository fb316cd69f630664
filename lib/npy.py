"""The arrays in .npy and .npz files, which may come from strangers; numpy alone.

Nothing in a file is executed, and headers are checked before they cost memory. Object arrays, such as
[image, mass] of the benchmark, are pickles: what is in them is read as plain data, see `_Made`.
"""

import ast
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

import numpy as np

from lib.errors import named_errors
from lib.files import is_hidden

MAP_ABOVE_BYTES = 8 * 2**20  # larger arrays are mapped into memory, not read
MAX_DIMENSIONS = 8
MAX_PICKLE_BYTES = 64 * 2**20  # an axion file is one image and a number
MAX_PICKLE_OPCODES = 100_000  # a stack of images takes about 20 an image
MAX_NPZ_BYTES = 2**30


class _NoImageError(ValueError):
    """The array is sound, but text, labels or another kind that is no image."""


def read_npy(path):
    """The array of a `.npy` file of numbers, or of an object array of images.

    Returns the array as it is stored, mapped into memory if it is large. Of an object array it returns the
    image of [image, number, ...], or the stack (n, H, W) of [image, image, ...] and of rows [image, number,
    ...]. Raises UserError, naming the file, for anything else.
    """
    return read_with_numbers(Path(path))[0]


def read_with_numbers(path):
    """(`read_npy`, a tuple of the numbers beside each image of an object array, () of others)."""
    with named_errors(path, ".npy image"), path.open("rb") as file:
        return _read_array(file, os.fstat(file.fileno()).st_size, path)


def forget_pages(array):
    """Return the memory of an array that `read_npy` mapped; the array can still be read.

    Without this the pages of a file stay in the process after they were read.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def read_npz(path):
    """[(name, array, numbers beside its images)] of a `.npz` file; None is no image; UserError."""
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
            arrays.append(
                (f"{path}:{info.filename.removesuffix('.npy')}", array if is_image else None, numbers)
            )
        if all(array is None for _, array, _ in arrays):
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
