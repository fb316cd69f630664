"""Images from files: .npy, .npz, FITS and PNG, for training and prediction.

It needs numpy alone, astropy for FITS and matplotlib for PNG. The files may come from strangers, see `npy`,
`fits` and `png`.
"""

import codecs
import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import fits, png, units, wcs
from lib.errors import UserError, named_errors
from lib.files import is_hidden, is_own_picture
from lib.fits import FileArray
from lib.npy import forget_pages, read_npz, read_with_numbers

SUFFIXES = (".npy", ".npz", *fits.SUFFIXES, png.SUFFIX)
MASSES = "masses.npy"
ALWAYS_PACKED = {"dataset.json", "images.npy", "labels.npy", "hashes.npy"}  # the files of every packed data set
PACKED_FILES = ALWAYS_PACKED | {MASSES, "coarse.npy"}  # and of some
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

    entries, listed, links = [], set(), [root]
    for link in links:  # which grows; all folders that are no links come first
        for folder, subfolders, names in os.walk(link, onerror=cannot_list):
            if os.path.realpath(folder) in listed:
                subfolders.clear()
                continue
            listed.add(os.path.realpath(folder))
            subfolders[:] = [name for name in subfolders if not is_hidden(name)]
            links += filter(os.path.islink, (Path(folder, name) for name in subfolders))
            no_images = ALWAYS_PACKED - {"images.npy"} | {MASSES} if ALWAYS_PACKED.issubset(names) else ()
            paths = [Path(folder, name) for name in names if not is_hidden(name)]
            images = set(images_among([path for path in paths if path.name not in no_images]))
            for path in paths:
                regular = path.is_file() or not path.exists()  # a dangling link becomes an error
                entries.append((path, regular and path in images))
    return sorted(entries)


# Reading images


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
            of_this = [(name, detail) for of_kind, name, detail in self.notes if of_kind == kind]
            if of_this:
                name, detail = of_this[0]
                count = f"{len(of_this)} file{'s' * (len(of_this) > 1)}"
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
    arrays = [each for each in read_arrays(Path(path), How(planes="lenses")) if each.array is not None]
    if len(arrays) > 1:
        raise UserError(f"{path}: expected one square image or one stack, got {len(arrays)} arrays; give one a file")
    array, cards = arrays[0].array, arrays[0].cards or {}
    stack = _stack_of(array)
    if stack.ndim != 3 or stack.shape[1] != stack.shape[2] or not stack.size:
        raise UserError(
            f"{path}: expected one square image or a stack of them, got shape {array.shape}; remove it"
        )
    axis = next((cards[name] for name in ("CTYPE3", "CTYPE4", "CUNIT3", "CUNIT4") if cards.get(name)), "")
    if arrays[0].cards is not None and len(stack) > 1 and (axis or len(stack) <= FEW_PLANES):
        reason = f", along an axis {axis}," if axis else ", which"
        raise UserError(
            f"{path}: several planes, shape {stack.shape}{reason} may be bands of one lens: if they are, "
            "save one or their mean; if they are lenses, save them as a .npy stack or one a file"
        )
    return stack, arrays[0].numbers


def training_image(stack, i, name):
    """Image `i` (H, H) float32 of a stack; UserError, which has its `name`, for NaN or infinite pixels."""
    try:
        return _finite_float32(stack[i])
    except ValueError as error:
        raise UserError(f"{name}: {error}; repair or remove it") from None


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
        said.more.append(sum(each.array is not None for each in arrays) - 1)
        for each in arrays:
            if each.array is None:
                said.others.append(each.name)
                continue
            try:
                yield from _placed_images_of(each, img_size, said, how)
            except ValueError as error:
                said.errors.append((each.name, f"{each.name}: {error}"))


def _placed_images_of(file, img_size, said, how):
    """`read_placed_images` of one `FileArray`; ValueError if it holds no images of that size."""
    if file.rounded:
        said.notes.append(("rounded", file.name, ""))
    if is_png(file.name):
        said.notes.append(("picture", file.name, ""))
    size = _size_of_pixels(file, said, how)
    stack = _stack_of(file.array, how.planes)
    height, width = (int(side * size + 1e-6) for side in stack.shape[1:]) if stack.ndim == 3 else (0, 0)
    if min(height, width) < img_size or not len(stack):
        bands = (
            file.array.ndim in (3, 4)
            and 1 < min(file.array.shape[-1], file.array.shape[-3]) <= 2 * FEW_PLANES
        )
        remedy = "; if it has bands, give --planes bands or the number of one" if bands else ""
        raise ValueError(f"expected an image of {img_size}×{img_size} pixels or a stack of them, got shape "
                         f"{file.array.shape}{remedy}")  # fmt: skip
    if not how.crop and not how.centre and (height, width) != (img_size, img_size):
        raise ValueError(
            f"{height}×{width} pixels where the network takes {img_size}×{img_size}; --crop takes the centre"
        )
    if how.planes is None and 1 < len(stack) <= FEW_PLANES and file.name.lower().endswith(".npy"):
        said.notes.append(("planes", file.name, ""))
    said.more.append(len(stack) - 1)
    factor = how.factor if how.factor == MINMAX else how.factor * _factor_of(file, said, how)
    cards = None
    if file.cards is not None:  # {} if the axes of the images are not the first of the file
        cards = wcs.cards_of(file.cards) if file.array.shape[-2:] == stack.shape[1:] else {}
    for i, whole in enumerate(stack):
        name = file.name if len(stack) == 1 else f"{file.name}[{i}]"
        try:
            image, corner = _cropped(resampled(whole, size), img_size, _moved_centre(how.centre, whole.shape, size))
        except ValueError as error:
            said.errors.append((name, f"{name}: {error}"))
        else:
            with np.errstate(all="ignore"):  # the network makes no sense of what is not finite
                image = from_0_to_1(image) if factor == MINMAX else image * np.float32(factor)
            yield name, image, None if cards is None else wcs.moved(cards, whole.shape, size, corner)
        if i % 256 == 255:
            forget_pages(file.array)


def _size_of_pixels(file, said, how):
    """The width of a file's pixels in pixels of the network; ValueError if it is needed and unknown."""
    scale = file.pixel_scale if how.pixel_scale == "wcs" else how.pixel_scale
    if how.pixel_scale and not scale:
        raise ValueError("no WCS says its pixel scale; give --pixel-scale in arcsec")
    if not scale and file.pixel_scale and how.wanted_scale and not 0.95 < file.pixel_scale / how.wanted_scale < 1.05:
        said.notes.append(("scale", file.name, ""))
    return scale / how.wanted_scale if scale else 1.0


def _factor_of(file, said, how):
    """What brings the pixels of a FITS file to the network's unit; what the header says of it is noted."""
    if file.cards is None or how.zero_point is None:
        return 1.0
    zero_point, detail = units.zero_point_of(file.cards, file.pixel_scale)
    if zero_point is None:
        if detail:
            said.notes.append(("no unit", file.name, detail))
        return 1.0
    factor = 10 ** (0.4 * (how.zero_point - zero_point))
    said.notes.append(("unit", file.name, f"{detail}: factor {factor:.4g}"))
    return factor


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

    rows, columns, bad = shares(image.shape[0]), shares(image.shape[1]).T, ~np.isfinite(image)
    new = rows @ np.where(bad, 0, image).astype(np.float64) @ columns
    if not bad.any():
        return new
    return np.where(rows @ bad @ columns > 1e-9, np.nan, new)  # 0 · NaN is NaN everywhere; shares are rounded


def _moved_centre(centre, shape, size):
    """The pixel of a `resampled` image into which the `centre` (x, y) of the one of that `shape` falls."""
    if centre in (None, "brightest"):
        return centre
    sides = zip(centre, reversed(shape), strict=True)
    return tuple(math.floor((x + 0.5 - side / 2) * size + int(side * size + 1e-6) / 2) for x, side in sides)


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
            raise ValueError(f"{size}×{size} pixels around column {column}, row {row} are not all in the image, "
                             f"which has {image.shape[1]}×{image.shape[0]} of the network's pixels")  # fmt: skip
    return _finite_float32(image[top : top + size, left : left + size]), (int(top), int(left))


def read_arrays(path, how=How()):
    """The arrays of one file, a list of `FileArray`; UserError."""
    name = path.name.lower()
    require_known_kind(path)
    if is_fits(path):
        image = fits.read_fits(path, how.hdu)
        if image.array.ndim > 2 and how.planes is None:
            raise UserError(f"{path}: several planes, shape {image.array.shape}: predict.py --planes says "
                            "what they are, lenses or bands")  # fmt: skip
        return [image]
    if name.endswith(".npz"):
        return [FileArray(*each) for each in read_npz(path)]
    if name.endswith(png.SUFFIX):
        return [FileArray(str(path), png.read_png(path))]
    return [FileArray(str(path), *read_with_numbers(path))]


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


def _finite_float32(image):
    """The image as float32; ValueError if a pixel is NaN or infinite then."""
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(image).all():
        raise ValueError("NaN or infinite pixels")
    return image
