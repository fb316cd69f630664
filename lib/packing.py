"""From a folder of images to one memory-mapped array; without torch.

The packed layout: images.npy (N, H, H) float32, labels.npy (N,), hashes.npy (2, N), dataset.json; where
files hold the mass of an axion beside their image, masses.npy (N,); of pairs, coarse.npy (N, h, h) float32.
See `datasets.Dataset`.
"""

import hashlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import copies, png
from lib.errors import UserError, warn
from lib.files import atomic_directory, make_folder, write_json
from lib.images import FEW_PLANES, PACKED_FILES, is_fits, is_png, names_in, read_stack, training_image
from lib.listing import normal_name
from lib.npy import forget_pages, read_npy
from lib.traits import far_outside

FORMAT = 3
BLOCK_BYTES = 2**22  # of images that are read or written together
KEPT = 256  # images of a stack whose pages of the file stay in memory
MASS_RANGE = (1e-35, 1e-10)  # eV; a number outside is no mass of an axion, but a label or an index
OWN_FILES = "|".join(map(re.escape, sorted(PACKED_FILES)))  # paths in a folder of the packed layout


class PackedWriter:
    """Writes the packed layout into an existing folder, a batch of images at a time."""

    def __init__(self, folder, shape, class_names, origin):
        self.folder, self.class_names, self.origin = Path(folder), list(map(normal_name, class_names)), origin
        self.shape = shape
        require_space(self.folder, 4 * math.prod(shape))
        # A plain file, since a full disk kills a process that writes to mapped memory.
        self.file = (self.folder / "images.npy").open("wb")
        self._write_header()
        self.blocks = []  # (labels, hashes, places, masses, signatures) of the images of each `append`
        self.digest = hashlib.sha256()
        self.count = 0

    def _write_header(self):
        """Write the header of images.npy, whose length does not depend on the number of images."""
        self.file.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def announce(self, more):
        """Expect so many images more; UserError if the disk has no room for them."""
        require_space(self.folder, 4 * more * math.prod(self.shape[1:]))
        self.shape = (self.shape[0] + more, *self.shape[1:])

    def append(self, images, labels, places=(0.0, 1.0), masses=np.nan):
        """Add images (b, H, H).

        labels (b,), or the one label of all; places (b, 2), see `listing.Listing`; masses (b,), see
        `datasets.Dataset`.
        """
        images = np.ascontiguousarray(images, dtype="<f4")
        self.file.write(images)
        self.digest.update(images)
        signatures = copies.signatures_of(images)
        count = len(images)
        self.blocks.append((
            np.broadcast_to(labels, count), copies.hashes_of(images, signatures), np.broadcast_to(places, (count, 2)),
            np.broadcast_to(masses, count), signatures,
        ))  # fmt: skip
        self.count += count

    def close(self, coarse=None, per_file=None):
        """Finish the layout; for `coarse` (n, h, h) float32 and `per_file` see `datasets.Dataset`."""
        if self.count != self.shape[0]:
            raise ValueError(f"{self.count} images written, {self.shape[0]} announced")
        self._write_header()
        self.file.close()
        labels, hashes, places, masses, signatures = map(np.concatenate, zip(*self.blocks, strict=True))
        self.labels = labels.astype(np.int64)
        images = read_npy(self.folder / "images.npy")
        originals = copies.originals_of(images, hashes, signatures)
        self.hashes = np.stack([hashes, placed(originals, places)])
        forget_pages(images)
        arrays = {"labels": self.labels, "hashes": self.hashes}
        if not np.isnan(masses).all():
            arrays["masses"] = masses.astype(np.float64)
        if coarse is not None:
            arrays["coarse"] = coarse
        digests = {"images": self.digest.hexdigest()}
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array)
            digests[name] = hashlib.sha256(array).hexdigest()
        # Written last: readers take the layout as complete once this file exists.
        write_json(self.folder / "dataset.json", {
            "format": FORMAT, "class_names": self.class_names, "fingerprint": fingerprint_of(digests, self.class_names),
            "sha256": digests, "origin": self.origin, **({"per_file": per_file} if per_file else {}),
        })  # fmt: skip


def placed(originals, places):
    """The `originals` (n,), moved into the `places` (n, 2) of their parts. Copies all go to the first part."""
    by_place = places[:, 0].argsort(kind="stable")
    _, first = np.unique(originals[by_place], return_index=True)
    _, which = np.unique(originals, return_inverse=True)
    low, high = places[by_place[first]][which].T
    if not (low.any() or (high < 1).any()):
        return originals  # without folders of parts
    moved = (low + (high - low) * (originals / 2.0**64)) * 2.0**64
    return np.minimum(moved, np.nextafter(high * 2.0**64, 0)).astype(np.uint64)


def fingerprint_of(digests, class_names):
    """The identity of a packed data set. Masses and coarse images do not count."""
    digests = {name: digests[name] for name in ("images", "labels", "hashes")}
    return hashlib.sha256(json.dumps([digests, class_names]).encode()).hexdigest()


def require_space(folder, needed):
    """UserError unless the disk of `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.3g} GB, its disk has {free / 1e9:.3g} GB left: free "
            "some space or choose another disk"
        )


def names_of(files, per_file):
    """The path of each image of the files, see `images.names_in`; for `per_file` see `datasets.Dataset`."""
    if per_file is None:
        return files
    return [name for file, count in zip(files, per_file, strict=True) for name in names_in(file, count)]


def pack(listing, packed, origin, progress):
    """Pack a folder; images far outside the rest are named. UserError as `datasets.load` raises it."""
    paths = [path for files in listing.files.values() for path in files]
    labels = np.repeat(np.arange(len(listing.files)), [len(files) for files in listing.files.values()])
    places = np.concatenate(list(listing.places.values()))
    size = read_stack(paths[0])[0].shape[1]
    extremes, per_file = [], []
    try:
        make_folder(packed.parent)
    except UserError as error:
        raise UserError(f"{error}; --cache-dir keeps the packed copy elsewhere") from None
    try:
        with atomic_directory(packed) as folder:
            writer = PackedWriter(folder, (len(paths), size, size), listing.files, origin)
            shown = tqdm(paths, desc="pack", unit="file", disable=None if progress else True)
            images = images_of(shown, writer, per_file, size, paths[0])
            while batch := list(itertools.islice(images, max(1, BLOCK_BYTES // (4 * size**2)))):
                pixels, which, masses = map(np.array, zip(*batch, strict=True))
                extremes.append(np.stack([pixels.min(axis=(1, 2)), pixels.max(axis=(1, 2))], axis=1))
                writer.append(pixels, labels[which], places[which], masses)
            per_file = None if max(per_file) == 1 else per_file
            writer.close(coarse_images(paths, per_file, listing.coarse) if listing.coarse else None, per_file)
    except (OSError, UserError):
        if not (packed / "dataset.json").exists():
            raise
        return  # another process packed the same folder
    warn_of_planes(paths, per_file)
    warn_of_images(names_of(paths, per_file), writer.hashes[1], writer.labels, np.concatenate(extremes))


def images_of(paths, writer, per_file, size, first):
    """Yield (image (size, size) float32, index of its file, its mass) of the files.

    How many images each has is announced to the `writer`, for one of them it expects, and appended to `per_file`.
    """
    for i, path in enumerate(paths):
        stack, numbers = read_stack(path)
        if stack.shape[1] != size:
            raise UserError(f"{path} is {stack.shape[1]} pixels wide and {first} {size}: all images must have one size")
        if len(stack) > 1:
            writer.announce(len(stack) - 1)
        per_file.append(len(stack))
        beside = numbers or [()] * len(stack)
        yield from (
            (image, i, mass_among(beside_it))
            for image, beside_it in zip(images_in(path, stack), beside, strict=True)
        )


def images_in(path, stack):
    """Yield the images (H, H) float32 of a file's stack (n, H, H), without keeping all in memory; UserError."""
    for i, name in enumerate(names_in(path, len(stack))):
        yield training_image(stack, i, name)
        if i % KEPT == KEPT - 1:
            forget_pages(stack)


def coarse_images(sharp, per_file, coarse):
    """The coarse images (n, h, h) of files; UserError unless all are of one size, and as many as the sharp ones."""
    images = []
    for i, (of, path) in enumerate(zip(sharp, coarse, strict=True)):
        stack, count = read_stack(path)[0], per_file[i] if per_file else 1
        if len(stack) != count:
            raise UserError(f"{path} has {len(stack)} images, its partner {of} {count}: give each sharp image its "
                            "coarse one")  # fmt: skip
        images += images_in(path, stack)
        if images[-1].shape != images[0].shape:
            raise UserError(f"{path} is {stack.shape[1]} pixels wide and {coarse[0]} {len(images[0])}: all coarse "
                            "images of pairs must have one size")  # fmt: skip
    return np.stack(images)


def mass_among(numbers):
    """The mass of the axion in eV that the numbers beside an image begin with, or NaN."""
    low, high = MASS_RANGE
    return numbers[0] if numbers and low < numbers[0] < high else np.nan


def warn_of_planes(paths, per_file):
    """A line on stderr on files of a few planes, which may be the bands of one lens."""
    counts = list(zip(paths, per_file or [], strict=False))
    few = [path for path, count in counts if 1 < count <= FEW_PLANES]
    cubes = [path for path, count in counts if count > 1 and is_fits(path)]
    for chosen, what in ((few, f"files have 2 to {FEW_PLANES} planes"), (cubes, "FITS cubes")):
        if chosen:
            warn(f"{len(chosen)} {what}, such as {chosen[0]}: each plane is an image of its own. If they are "
                 "bands of one lens, save one of them or their mean")  # fmt: skip


def warn_of_images(paths, originals, labels, extremes):
    """Lines on stderr on copies, on images in several classes, and on those far outside the rest."""
    coarse = [path for path in paths if is_png(path) and png.bits_of(path) <= 8]
    if coarse:
        warn(f"{len(coarse)} images are pictures of 8 bits, such as {coarse[0]}: so few steps of brightness "
             "hide weak substructure; use the original files if there are any")  # fmt: skip
    _, first, which = np.unique(originals, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(paths)))
    if len(again):
        warn(
            f"{len(again)} images are copies of others (turned, rescaled or rounded ones count, too), such "
            f"as {paths[again[0]]} of {paths[first[which][again[0]]]}: copies are in one part, and are tested once"
        )
    labelled_twice = images_of_several_classes(originals, labels)
    if len(labelled_twice):
        warn(f"{len(labelled_twice)} images stand in more than one class, such as "
             f"{paths[labelled_twice[0]]}: remove the copies with the wrong label")  # fmt: skip
    outliers = far_outside(extremes)
    if len(outliers):
        low, high = np.median(extremes, axis=0)
        least, most = extremes[outliers[0]]
        warn(f"{len(outliers)} images are far outside the rest, such as {paths[outliers[0]]} with pixels "
             f"from {least:.3g} to {most:.3g}; those of the median image go from {low:.3g} to {high:.3g}. "
             "Sentinel values or hot pixels? Repair or remove them.")  # fmt: skip


def images_of_several_classes(originals, labels):
    """Rows of images whose copies have another label."""
    _, image = np.unique(originals, return_inverse=True)
    lowest, highest = np.full(image.max() + 1, labels.max()), np.zeros(image.max() + 1, labels.dtype)
    np.minimum.at(lowest, image, labels)
    np.maximum.at(highest, image, labels)
    return np.flatnonzero((lowest < highest)[image])
