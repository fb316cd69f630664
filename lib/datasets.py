"""Packed data sets: opening, splitting and choosing rows; without torch.

A folder of images (see `listing`) is packed once (see `packing`), into a cache whose name is a fingerprint
of the folder's files, so a changed folder is packed again. Old packed copies are not deleted.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import shortcuts
from lib.errors import UserError, warn
from lib.files import is_hidden, read_json
from lib.listing import BOUNDS, PARTS, fingerprint_of_files, listing_of
from lib.names import check_class_names
from lib.npy import forget_pages, read_npy
from lib.packing import BLOCK_BYTES, FORMAT, fingerprint_of, names_of, pack

RANGE_IMAGES = 2000  # that a range of pixels is computed from
SHOWN_NAMES = 3  # of files that are not read
SPLIT = "copies-80-10-10"  # the rule of `split`; weights carry the rule they were trained under


class Dataset(NamedTuple):
    """A packed data set.

    images : (N, H, H) float32, mapped into memory, raw pixels.
    labels : (N,) int64, index into class_names.
    hashes : (N,) uint64, of each image in any orientation, see `copies.hashes_of`.
    originals : (N,) uint64, what copies of one image share, see `copies.originals_of`.
    class_names : names of the classes, sorted as the folders are.
    fingerprint : identity of images, labels, hashes and class names.
    origin : description of the images' source.
    masses : (N,) float64 mass of the axion in eV, NaN where it is unknown; None if no file has one.
    coarse : (N, h, h) float32, of pairs the coarse images of files, whose sharp ones are `images`; else None.
    per_file : how many images each file of the folder has; None if each has one.
    """

    images: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray
    originals: np.ndarray
    class_names: tuple
    fingerprint: str
    origin: str
    masses: np.ndarray | None = None
    coarse: np.ndarray | None = None
    per_file: list | None = None

    @property
    def img_size(self):
        return self.images.shape[1]


def load(path, cache_dir=None, progress=True):
    """Open a data set in either layout; a folder that is not packed yet is packed first.

    Parameters
    ----------
    path : folder in the folder layout or the packed layout.
    cache_dir : where packed copies of folders are kept; by default `<path>/.packed`.

    Returns a `Dataset`. Raises UserError, naming the path and the remedy, for a missing or empty
    folder, a file that holds no image, images of several sizes, NaN or infinite pixels.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no data set at {path}: give a folder of class folders, or a packed one")
    if (path / "dataset.json").exists():
        return _open_packed(path)
    listing = listing_of(path)
    cache_dir = Path(cache_dir) if cache_dir else path / ".packed"
    inside, root = cache_dir.resolve(), path.resolve()
    if inside.is_relative_to(root) and not is_hidden(inside.relative_to(root)):
        raise UserError(f"--cache-dir {cache_dir} would become part of the data: choose another")
    packed = cache_dir / fingerprint_of_files(listing, FORMAT)[:32]
    if (packed / "dataset.json").exists():
        return _open_packed(packed)
    pack(listing, packed, f"folder {path.name}", progress)
    if listing.coarse:
        warn(
            f"pairs: sharp images in {next(iter(listing.files))}, coarse ones in {listing.coarse[0].parent.name}"
        )
    if listing.others:
        names = ", ".join(str(other.relative_to(path)) for other in listing.others[:SHOWN_NAMES])
        more = ", ..." if len(listing.others) > SHOWN_NAMES else ""
        warn(f"{len(listing.others)} other files were not read: {names}{more}")
    dataset = _open_packed(packed)
    for line in shortcuts.differences(dataset):
        warn(line)
    return dataset


def _open_packed(folder):
    description = read_json(folder / "dataset.json")
    class_names, fingerprint = description.get("class_names"), description.get("fingerprint")
    are_names = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    if description.get("format") != FORMAT or not are_names or not isinstance(fingerprint, str):
        raise UserError(f"{folder}/dataset.json is of another version: rebuild the data set")
    check_class_names(class_names, folder, "make the data set again, with another name")
    known = description.get("sha256")
    known = known if isinstance(known, dict) else {}
    images = read_npy(folder / "images.npy")
    n = len(images)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.dtype != np.float32:
        raise UserError(f"{folder}/images.npy: expected (N, H, H) float32, got {images.shape}")
    labels, hashes = _beside(folder, "labels", np.int64, (n,)), _beside(folder, "hashes", np.uint64, (2, n))
    masses = _beside(folder, "masses", np.float64, (n,)) if "masses" in known else None
    coarse = _beside(folder, "coarse", np.float32, (n, None, None)) if "coarse" in known else None
    if n and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UserError(f"{folder}/labels.npy has values out of range: rebuild the data set")
    per_file = description.get("per_file")
    if per_file is not None and not (
        isinstance(per_file, list) and all(type(k) is int and k > 0 for k in per_file) and sum(per_file) == n
    ):  # how many images each file has
        raise UserError(f"{folder}/dataset.json does not match images.npy: rebuild the data set")
    digests = {"images": _digest_of_images(images, folder)}
    for name, array in (("labels", labels), ("hashes", hashes), ("masses", masses), ("coarse", coarse)):
        if array is not None:
            digests[name] = hashlib.sha256(array).hexdigest()
    changed = [f"{name}.npy" for name in digests if known and known.get(name) != digests[name]]
    if changed or fingerprint_of(digests, class_names) != fingerprint:
        names = " and ".join(changed or ["dataset.json"])
        raise UserError(f"{folder}/{names}: changed after packing; rebuild the data set")
    origin = str(description.get("origin", ""))
    return Dataset(images, labels, *hashes, tuple(class_names), fingerprint, origin, masses, coarse, per_file)


def _beside(folder, name, dtype, shape):
    """An array beside the images of a packed data set; UserError unless it has the `shape`; None: any number."""
    array = read_npy(folder / f"{name}.npy")
    same_shape = array.ndim == len(shape) and all(
        k in (None, side) for k, side in zip(shape, array.shape, strict=True)
    )
    if not same_shape or array.dtype != dtype or (dtype == np.float32 and not np.isfinite(array).all()):
        raise UserError(f"{folder}/{name}.npy does not match images.npy: rebuild the data set")
    return array


def _digest_of_images(images, folder):
    """SHA-256 of images (n, H, H), a block at a time; UserError for NaN or infinite pixels."""
    digest, step = hashlib.sha256(), max(1, BLOCK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), step):
        block = np.ascontiguousarray(images[start : start + step])
        if not np.isfinite(block).all():
            raise UserError(f"{folder}/images.npy has NaN or infinite pixels: rebuild the data set")
        digest.update(block)
        forget_pages(images)
    return digest.hexdigest()


def files_of(path, dataset):
    """The files of a folder's images, in the order of the rows; none of a packed data set, which has no names.

    Images of a stack have names such as stack.npy[17]. Raises UserError if the folder has changed since `load`.
    """
    if (path / "dataset.json").exists():
        return []
    files = [file for files in listing_of(path).files.values() for file in files]
    if len(files) != (len(dataset.labels) if dataset.per_file is None else len(dataset.per_file)):
        raise UserError(f"{path} has changed while it was read: repeat the command")
    return names_of(files, dataset.per_file)


# Choosing rows


def split(dataset):
    """Rows of the three parts, about 80/10/10 % of every class: {"train": (n,), ...}, each sorted.

    The image alone, turned or rescaled as it may be, decides its part: a test image stays a test
    image whatever else is in the data set, in any order. Folders of parts keep theirs, see `Listing`.
    There are two exceptions. A copy that rounding moved into another part joins the training images if one of
    the copies is there, else validation. And of a class so small that a part would stay empty, one image is
    moved, see `_parts_of_few`.
    Raises UserError if a class has fewer than three different images.
    """
    place = dataset.originals / 2.0**64  # uniform in [0, 1); copies have the lowest of theirs
    part_of_row = np.digitize(place, BOUNDS)
    for label, class_name in enumerate(dataset.class_names):
        rows = np.flatnonzero(dataset.labels == label)
        if len(np.unique(part_of_row[rows])) < len(PARTS):
            if len(np.unique(dataset.originals[rows])) < len(PARTS):
                raise UserError(
                    f"class {class_name} has fewer than {len(PARTS)} different images, one for "
                    "training, validation and test each: give more"
                )
            part_of_row[rows] = _parts_of_few(dataset.originals[rows], part_of_row[rows])
    return {part: np.flatnonzero(part_of_row == i) for i, part in enumerate(PARTS)}


def _parts_of_few(originals, parts):
    """The `parts` (n,) of a small class, with an image in each.

    An empty part gets the image with the highest hash of training, or else of a part that has several. The
    part of an image then depends on the others. Weights store the hashes of the images that they have seen,
    so scoring detects an image whose part has changed.
    """
    parts = parts.copy()
    for part in (2, 1, 0):  # test, validation, training
        if not (parts == part).any():
            full = [other for other in range(3) if len(np.unique(originals[parts == other])) > 1]
            highest = originals[parts == full[0]].max()
            parts[originals == highest] = part
    return parts


def without_copies(dataset, rows):
    """The `rows` (n,), of each image and class only the first."""
    which = np.stack([dataset.originals[rows], dataset.labels[rows].astype(np.uint64)])
    return rows[np.sort(np.unique(which, axis=1, return_index=True)[1])]


def means_every_class(given, class_names):
    """Whether the classes `given` to an option are every one: ["all"], unless a class is called so."""
    return given == ["all"] and "all" not in class_names


def extremes_of(dataset, rows):
    """Minimum and maximum (n, 2) of about RANGE_IMAGES of the rows."""
    chosen = rows[:: max(1, len(rows) // RANGE_IMAGES)]
    return np.array([(image.min(), image.max()) for image in (dataset.images[row] for row in chosen)])


def rows_of_classes(dataset, rows, names):
    """Those of `rows` whose class is among `names`; UserError for an unknown class."""
    for name in names:
        if name not in dataset.class_names:
            there = ", ".join(dataset.class_names)
            raise UserError(f"--classes {name}: no such class in the data (found: {there})")
    labels = [dataset.class_names.index(name) for name in names]
    return rows[np.isin(dataset.labels[rows], labels)]


def fraction_of_each_class(labels, rows, fraction, seed):
    """A random fraction of the `rows` of every class, at least two of each."""
    rng = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == label])
        kept.append(of_class[: max(2, round(fraction * len(of_class)))])
    return np.sort(np.concatenate(kept))
