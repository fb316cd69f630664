"""Folders of pictures that predict.py saves: substructure maps and sharp images.

A map is .npy, or for a FITS image a FITS file with its coordinates on the sky.
"""

import contextlib
import os
import re
from pathlib import Path

import numpy as np

from lib.errors import UserError, readable
from lib.files import CREATOR, atomic_directory, naming_full_disk, require_own, write_csv

INDEX = "maps.csv"
SHARP_INDEX, OWN_SHARP = "sharp.csv", r"sharp\.csv|[\w.-]+\.sharp\.npy"
OWN = r"maps\.csv|[\w.-]+\.map\.(fits|npy)"
SUFFIX = r"\.(npy|npz|fits?|fts|fz|png)(\.(gz|bz2|fz))?(?=$|[\[:])"  # of an image's file, before [HDU] or :array
MOST_LETTERS = 100  # of a file's name


def require_usable(folder, maps, others):
    """UserError unless maps can be saved into a folder, in which none of the paths `others` lies."""
    if maps is None:
        raise UserError("--save-maps needs --maps")
    if maps.sigma is None:
        raise UserError("--save-maps: the file of --maps does not say what smooth lenses leave: export it again")
    require_apart("--save-maps", folder, others)
    require_own(folder / INDEX, rb"\Afile,map\s")


def require_apart(flag, folder, others):
    """UserError, naming the flag, if one of the paths `others` lies in a folder that is replaced."""
    inside = os.path.realpath(folder)
    for path in others:
        if Path(os.path.realpath(path)).is_relative_to(inside):
            raise UserError(f"{flag} {folder}: {path} is in it; choose another folder")


@contextlib.contextmanager
def saving(folder, sigma):
    """Yield a function that saves the map of one `predict.Answer`, in units of `sigma`; see `_folder_of`."""
    with _folder_of(folder, "map", INDEX, OWN) as add:

        def save(answer):
            pixels = (answer.residual_map / sigma).astype(np.float32)
            if answer.wcs is None:
                add(answer.name, ".map.npy", lambda path: np.save(path, pixels))
            else:
                add(answer.name, ".map.fits", lambda path: _write_fits(path, pixels, answer, sigma))

        yield save


@contextlib.contextmanager
def saving_sharp(folder):
    """Yield a function that saves the sharp image (H, H) of a name, and returns its file; see `_folder_of`."""
    with _folder_of(folder, "sharpened", SHARP_INDEX, OWN_SHARP) as add:
        yield lambda name, image: add(name, ".sharp.npy", lambda path: np.save(path, image))


@contextlib.contextmanager
def _folder_of(folder, what, index, pattern):
    """Yield a function from (name of an image, suffix, function that writes a path) to the name of the new file.

    The folder appears at the end, with a table `index` whose columns are `file` and `what`; an earlier one, whose
    paths match `pattern`, is replaced. UserError as `atomic_directory` raises it.
    """
    with atomic_directory(folder, index, pattern) as temporary:
        rows, taken = [("file", what)], set()

        def add(name, suffix, write):
            file = _free_name(name, taken) + suffix
            with naming_full_disk(folder):
                write(temporary / file)
            rows.append((name, file))
            return file

        yield add
        write_csv(temporary / index, rows)


def _free_name(name, taken):
    """A file name of plain letters after an image's name, of which `taken` has none in any case; it is added."""
    stem = re.sub(SUFFIX, "", os.path.basename(name), flags=re.IGNORECASE)
    stem = re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII).strip("._-")
    stem = stem[-MOST_LETTERS:].lstrip("._-") or "image"
    free, count = stem, 1
    while free.lower() in taken:
        count += 1
        free = f"{stem}-{count}"
    taken.add(free.lower())
    return free


def _write_fits(path, pixels, answer, sigma):
    from astropy.io import fits

    header = fits.Header()
    header.update(answer.wcs)
    header["CREATOR"] = CREATOR
    header["SIGMA"] = (sigma, "rms over smooth lenses, model's unit")
    header["COMMENT"] = "Substructure map: the residual of the MAE in units of SIGMA"
    header["COMMENT"] = "of " + readable(answer.name).encode("ascii", "backslashreplace").decode()
    fits.PrimaryHDU(pixels, header).writeto(path)
