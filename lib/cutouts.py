"""Find the image files under given paths and read their cutouts; numpy alone, astropy for FITS."""

import collections
import functools
import os

import numpy as np

from lib.errors import UserError
from lib.readers import forget_pages, is_hidden, read_fits, read_npy, read_npz

FITS_SUFFIXES = (
    *(name + packed for name in (".fits", ".fit", ".fts") for packed in ("", ".gz", ".bz2")), ".fz"
)  # fmt: skip
SUFFIXES = (".npy", ".npz", *FITS_SUFFIXES)
PACKED_FILES = {"dataset.json", "images.npy", "labels.npy", "hashes.npy"}  # of a packed data set


def find_files(paths):
    """The files to predict: those given, and the image files in folders at any depth.

    Returns (files, others, errors): `others` are the files in folders that hold no images, `errors`
    the folders that cannot be listed, [(folder, reason)]. A file that is reached twice under one
    name counts once. Raises UserError for a missing path.
    """
    files, others, errors = {}, {}, []
    real_folder = functools.cache(os.path.realpath)
    for path in paths:
        if path.is_dir():
            found = walk(path, errors)
        elif path.exists():
            found = [(path, True)]
        else:
            raise UserError(f"no file or folder {path}")
        for file, is_image in found:
            key = real_folder(file.parent), file.name
            (files if is_image else others).setdefault(key, file)
    return list(files.values()), [others[key] for key in others if key not in files], errors


def walk(root, errors):
    """The files below a folder, sorted: [(path, whether it may hold images)].

    Links to folders are followed. Each folder is listed once, under its own name where it has one
    below `root`. Hidden files and folders are left out.
    """
    found, listed = [], set()
    pending = collections.deque([root])  # real folders in front, links to folders behind them
    while pending:
        folder = pending.popleft()
        try:
            status = folder.stat()
            names = os.listdir(folder)
        except OSError as error:
            errors.append((str(folder), f"cannot list folder {folder}: {error.strerror}"))
            continue
        if (status.st_dev, status.st_ino) in listed:
            continue
        listed.add((status.st_dev, status.st_ino))
        no_images = PACKED_FILES - {"images.npy"} if PACKED_FILES.issubset(names) else ()
        for name in names:
            path = folder / name
            if is_hidden(name):
                continue
            if not os.path.isdir(path):
                regular = path.is_file() or not path.exists()  # a dangling link becomes an error
                is_image = name.lower().endswith(SUFFIXES) and name not in no_images
                found.append((path, is_image and regular))
            elif path.is_symlink():
                pending.append(path)
            else:
                pending.appendleft(path)
    return sorted(found)


def read_images(files, img_size, errors, others, crop=False):
    """Yield (name, image (H, H) float32) of every image in the files.

    What cannot be read is appended to `errors`, [(name, reason)]; arrays of a .npz that are no
    images are appended to `others`. `crop` takes the centre of larger images.
    """
    for path in files:
        try:
            arrays = read_arrays(path)
        except UserError as error:
            errors.append((str(path), str(error)))
            continue
        for name, array in arrays:
            if array is None:
                others.append(name)
                continue
            try:
                stack = fitting(name, array, img_size, crop)
            except UserError as error:
                errors.append((name, str(error)))
                continue
            for i in range(len(stack)):
                image_name = name if len(stack) == 1 else f"{name}[{i}]"
                with np.errstate(over="ignore"):
                    image = np.asarray(stack[i], dtype=np.float32)
                if np.isfinite(image).all():
                    yield image_name, image
                else:
                    errors.append((image_name, f"{image_name}: NaN or infinite pixels"))
                if i % 256 == 255:
                    forget_pages(array)


def read_arrays(path):
    """The arrays of one file, [(name, array, or None where it is no image)]; UserError."""
    lower = path.name.lower()
    if lower.endswith(FITS_SUFFIXES):
        return [(str(path), read_fits(path))]
    if not lower.endswith(".npz"):
        return [(str(path), read_npy(path))]
    arrays = [(f"{path}:{name}", array) for name, array in read_npz(path)]
    if all(array is None for _, array in arrays):
        raise UserError(f"{path}: there is no image in it")
    return arrays


def fitting(name, array, img_size, crop):
    """An array as (n, img_size, img_size); UserError, naming the remedy, if it does not fit.

    It may have a channel axis: (1, H, W), (H, W, 1), (n, 1, H, W) or (n, H, W, 1).
    """
    images = array
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    elif images.ndim in (3, 4) and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim == 2:
        images = images[None]
    if images.ndim == 3 and min(images.shape[1:]) >= img_size and len(images):
        height, width = images.shape[1:]
        if (height, width) != (img_size, img_size) and not crop:
            raise UserError(
                f"{name}: {height}×{width} pixels where the network takes "
                f"{img_size}×{img_size}; --crop takes the centre"
            )
        top, left = (height - img_size) // 2, (width - img_size) // 2
        return images[:, top : top + img_size, left : left + img_size]
    raise UserError(
        f"{name}: expected an image of {img_size}×{img_size} pixels or a stack of them, got "
        f"shape {array.shape}"
    )
