"""From a folder of images to one memory-mapped array, its split and its rows; without torch.

Folder layout:  <root>/<class>/, .npy, .npz, FITS or PNG files of one square image, or .npy, .npz and
                FITS files of a stack of them; the folders name the classes.
                Also <root>/train/<class>/ and <root>/val/<class>/ (or test), whose parts are kept, see `Listing`.
                Or <root>/labels.csv, whose columns file and label name the files and their classes.
                Two folders of pairs, such as HR and LR, whose files have the same names: images of one are 2, 3 or 4
                times as wide as those of the other. Its sharp images are the data set, see `Dataset.coarse`.
Packed layout:  images.npy (N, H, H) float32, labels.npy (N,), hashes.npy (2, N), dataset.json; where files hold
                the mass of an axion beside their image, masses.npy (N,); of pairs, coarse.npy (N, h, h) float32.

A folder is packed once, into a cache whose name is a fingerprint of the folder's files (names,
sizes, inodes and times), so a changed folder is packed again. Old packed copies are not deleted.
"""

import csv
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib import copies, png, shortcuts
from lib.errors import UserError, one_line
from lib.files import atomic_directory, is_hidden, make_folder, read_json, write_json
from lib.images import (
    FEW_PLANES, MASSES, SUFFIXES, forget_pages, images_among, is_fits, is_png, names_in, read_npy, read_stack, training_image,
)  # fmt: skip
from lib.names import check_class_names

FORMAT = 3
BLOCK_BYTES = 2**22  # of images that are read or written together
OUTLYING = 30  # see `pixel_range`
KEPT = 256  # images of a stack whose pages of the file stay in memory
RANGE_IMAGES = 2000  # that a range of pixels is computed from
LABELS = "labels.csv"  # in place of class folders
MAX_LABELS_BYTES = 256 * 2**20
SHOWN_NAMES = 3  # of files that are not read
PARTS = ("train", "validation", "test")
COARSE = "coarse.npy"
MASS_RANGE = (1e-35, 1e-10)  # eV; a number outside is no mass of an axion, but a label or an index
BOUNDS = (0.8, 0.9)  # where training ends and the test part begins, see `split`
FACTORS = (2, 3, 4)  # by which sharp images of pairs may be wider than coarse ones
PACKED_FILES = r"dataset\.json|(images|labels|hashes|masses|coarse)\.npy"  # of the packed layout
NAMES_OF_PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
                  "validation": "validation", "dev": "validation", "test": "test", "testing": "test"}  # fmt: skip
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


# Packing


class PackedWriter:
    """Writes the packed layout into an existing folder, a batch of images at a time."""

    def __init__(self, folder, shape, class_names, origin):
        self.folder, self.class_names, self.origin = Path(folder), list(map(normal_name, class_names)), origin
        self.shape = shape
        require_space(self.folder, 4 * math.prod(shape))
        # A plain file, since a full disk kills a process that writes to mapped memory.
        self.file = (self.folder / "images.npy").open("wb")
        self._write_header()
        self.blocks = []  # (labels, hashes, places, masses, figures) of the images of each `append`
        self.digest = hashlib.sha256()
        self.count = 0

    def _write_header(self):
        """Write the header of images.npy, whose length does not depend on the number of images."""
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "<f4", "fortran_order": False, "shape": tuple(self.shape)}
        )

    def announce(self, more):
        """Expect so many images more; UserError if the disk has no room for them."""
        require_space(self.folder, 4 * more * math.prod(self.shape[1:]))
        self.shape = (self.shape[0] + more, *self.shape[1:])

    def append(self, images, labels, places=(0.0, 1.0), masses=np.nan):
        """Add images (b, H, H).

        labels (b,), or the one label of all; places (b, 2), see `Listing`; masses (b,), see `Dataset`.
        """
        images = np.ascontiguousarray(images, dtype="<f4")
        self.file.write(images)
        self.digest.update(images)
        figures = copies.figures_of(images)
        count = len(images)
        self.blocks.append((
            np.broadcast_to(labels, count), copies.hashes_of(images, figures), np.broadcast_to(places, (count, 2)),
            np.broadcast_to(masses, count), figures,
        ))  # fmt: skip
        self.count += count

    def close(self, coarse=None, per_file=None):
        """Finish the layout; for `coarse` (n, h, h) float32 and `per_file` see `Dataset`."""
        if self.count != self.shape[0]:
            raise ValueError(f"{self.count} images written, {self.shape[0]} announced")
        self._write_header()
        self.file.close()
        labels, hashes, places, masses, figures = map(np.concatenate, zip(*self.blocks, strict=True))
        self.labels, self.masses = labels.astype(np.int64), masses.astype(np.float64)
        images = read_npy(self.folder / "images.npy")
        originals = copies.originals_of(images, hashes, figures)
        self.hashes = np.stack([hashes, placed(originals, places)])
        forget_pages(images)
        np.save(self.folder / "labels.npy", self.labels)
        np.save(self.folder / "hashes.npy", self.hashes)
        digests, masses = digests_of(self.digest, self.labels, self.hashes), {}
        if not np.isnan(self.masses).all():
            np.save(self.folder / MASSES, self.masses)
            masses = {"masses": hashlib.sha256(self.masses).hexdigest()}
        if coarse is not None:
            np.save(self.folder / COARSE, coarse)
            masses["coarse"] = hashlib.sha256(coarse).hexdigest()
        # Written last: readers take the layout as complete once this file exists.
        description = {
            "format": FORMAT,
            "class_names": self.class_names,
            "fingerprint": fingerprint_of(digests, self.class_names),
            "sha256": digests | masses,
            "origin": self.origin,
            **({"per_file": per_file} if per_file else {}),
        }
        write_json(self.folder / "dataset.json", description)


def placed(originals, places):
    """The `originals` (n,), moved into the `places` (n, 2) of their parts. Copies all go to the first part."""
    _, which = np.unique(originals, return_inverse=True)
    start = np.full(which.max() + 1, 1.0)
    np.minimum.at(start, which, places[:, 0])
    first = np.zeros((len(start), 2))
    first[which[places[:, 0] == start[which]]] = places[places[:, 0] == start[which]]
    low, high = first[which].T
    if not (low.any() or (high < 1).any()):
        return originals  # without folders of parts
    moved = (low + (high - low) * (originals / 2.0**64)) * 2.0**64
    return np.minimum(moved, np.nextafter(high * 2.0**64, 0)).astype(np.uint64)


def digests_of(images, labels, hashes):
    """{name of a file: SHA-256 of its numbers}; `images` is a hash object that was fed with the pixels."""
    return {"images": images.hexdigest(), "labels": hashlib.sha256(labels).hexdigest(),
            "hashes": hashlib.sha256(hashes).hexdigest()}  # fmt: skip


def fingerprint_of(digests, class_names):
    return hashlib.sha256(json.dumps([digests, class_names]).encode()).hexdigest()


def normal_name(name):
    """A class name in the one form in which names are compared: systems write accents in two."""
    return unicodedata.normalize("NFC", name)


def require_space(folder, needed):
    """UserError unless the disk of `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.3g} GB, its disk has {free / 1e9:.3g} GB left: free "
            "some space or choose another disk"
        )


class Listing(NamedTuple):
    """The files of a folder.

    files : {class name: paths of its images, sorted, those of train before others}.
    places : {class name: (n, 2)}. The hash of an image puts it between these two numbers, and `split` cuts at
        BOUNDS. Without folders for parts they are 0 and 1. With train and one other folder, the images of train
        are in (0, 0.9), where a ninth becomes the validation part, and the others in (0.9, 1), the test part.
    others : paths of files that are no images.
    coarse : paths of the coarse images of pairs, in the order of the sharp ones in `files`; empty for others.
    """

    files: dict
    places: dict
    others: list
    coarse: list = []  # noqa: RUF012


def listing_of(root):
    """The `Listing` of a folder, with or without folders of parts. Raises UserError as `list_classes` does."""
    folders = [f for f in Path(root).iterdir() if f.is_dir() and not is_hidden(f.name)]
    named = {f: NAMES_OF_PARTS.get(f.name.lower()) for f in folders}
    if not folders or not all(named.values()) or (Path(root) / LABELS).is_file():
        files, others = list_classes(root)
        sharp, coarse = pairs_among(files) or (files, [])
        places = {name: np.tile([0.0, 1.0], (len(own), 1)) for name, own in sharp.items()}
        return Listing(sharp, places, others, coarse)
    parts = sorted(named, key=lambda folder: PARTS.index(named[folder]))
    found = [named[folder] for folder in parts]
    if len(set(found)) < len(found) or found[0] != "train" or len(found) < 2:
        names = ", ".join(folder.name for folder in parts)
        raise UserError(f"{root} has the folders {names}: give train and val or test, or one folder per class")
    starts = (0.0, BOUNDS[1], 1.0) if len(parts) == 2 else (0.0, *BOUNDS, 1.0)
    files, places, others = {}, {}, []
    for folder, low, high in zip(parts, starts, starts[1:], strict=False):
        own, more = list_classes(folder)
        if files and own.keys() != files.keys():
            raise UserError(f"{root}: {folder.name} has the classes {', '.join(own)}, {parts[0].name} has "
                            f"{', '.join(files)}: give both the same")  # fmt: skip
        for name, paths in own.items():
            files[name] = files.get(name, []) + paths
            places.setdefault(name, []).extend([(low, high)] * len(paths))
        others += more
    return Listing(files, {name: np.array(each) for name, each in places.items()}, others)


def pairs_among(files):
    """({name of the folder of sharp images: paths}, paths of the coarse ones) of {folder: paths}; None for no pairs.

    They are pairs if there are two folders with the same file names, and the first images say so.
    """
    if len(files) != 2:
        return None
    (one, own), (other, others) = files.items()
    if [path.name for path in own] != [path.name for path in others]:
        return None
    sides = [read_stack(paths[0])[0].shape[1] for paths in (own, others)]
    if max(sides) not in [factor * min(sides) for factor in FACTORS]:
        return None
    return ({one: own}, others) if sides[0] > sides[1] else ({other: others}, own)


def list_classes(root):
    """{class name: sorted paths of its images} of the folder layout, and the list of other files.

    A table LABELS names the classes in place of folders, see `labelled_files`. Hidden files and `__MACOSX` do not count. Raises UserError, naming the folder and the remedy,
    for a class without images, images in sub-folders, and names that a class must not have.
    """
    if (Path(root) / LABELS).is_file():
        return labelled_files(Path(root))
    folders = [f for f in Path(root).iterdir() if f.is_dir() and not is_hidden(f.name)]
    folders.sort(key=lambda folder: normal_name(folder.name))
    if not folders:
        raise UserError(f"{root} has no class folders: expected {root}/<class>/*.npy (or .npz, FITS, PNG), or a table "
                        f"{root}/{LABELS}")  # fmt: skip
    check_class_names([folder.name for folder in folders], root)
    class_files, others = {}, []
    for folder in folders:
        entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
        for entry in entries:
            if entry.exists() and not entry.is_file() and not entry.is_dir():
                raise UserError(f"{entry} is no regular file: remove it")
            if entry.is_dir() and not (inside := set(entry.rglob("*"))).isdisjoint(images_among([*entries, *inside])):
                raise UserError(
                    f"class folder {folder} has images in its sub-folder {entry.name}: put the "
                    f"images of a class directly into its folder, or give another folder than {root}"
                )
        files = images_among(entries)
        others += sorted({*entries}.difference(files))
        if not files:
            raise UserError(f"class folder {folder} has no .npy, .npz, FITS or PNG files: fill it or remove it")
        name = normal_name(folder.name)
        if name in class_files:
            raise UserError(f"{root} has two folders {name}, their accents written in two ways: put them together")
        class_files[name] = files
    return class_files, others


def labelled_files(root):
    """{class name: sorted paths of its images} of the table LABELS in `root`, and the list of other files there.

    Raises UserError, naming the line, for files that are missing, outside the folder, no images or there twice, and
    for a label that no class must have.
    """
    table, labels = root / LABELS, {}
    for line, (name, label) in _lines_of(table):
        path = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{table}, line {line}: {name} is outside {root}: give paths inside it, without ..")
        if not os.path.isfile(path):
            raise UserError(f"{table}, line {line}: there is no file {path}")
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{table}, line {line}: {name} is no .npy, .npz, FITS or PNG file")
        if path in labels:
            raise UserError(f"{table}, line {line}: {name} is there twice; leave one line")
        labels[path] = normal_name(label)
    class_files = {name: [] for name in sorted(set(labels.values()))}
    check_class_names(class_files, table, "give these files another label")
    for path in sorted(labels):
        class_files[labels[path]].append(path)
    inside = (path for path in root.rglob("*") if not is_hidden(path.relative_to(root)))
    return class_files, sorted(path for path in inside if path.is_file() and path not in labels and path != table)


def _lines_of(table):
    """[(number of the line, (file, label))] of the table LABELS; UserError if it is not one."""
    try:
        if table.stat().st_size > MAX_LABELS_BYTES:
            raise UserError(f"{table} has more than {MAX_LABELS_BYTES // 2**20} MiB: is it a table of files and labels?")
        with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {table}, which must be a table in UTF-8: {error}") from None
    columns = lines[0][1] if lines else []
    if sorted(columns) != ["file", "label"]:
        raise UserError(f"{table} has the columns {', '.join(columns)[:200] or '(none)'}: expected file,label. If folders name the "
                        "classes, give the table another name")  # fmt: skip
    for line, row in lines:
        if len(row) != 2:
            raise UserError(f"{table}, line {line}: expected a file and its label, got {len(row)} cells")
    if len(lines) == 1:
        raise UserError(f"{table} lists no files")
    return [(line, (row[columns.index("file")], row[columns.index("label")])) for line, row in lines[1:]]


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


def names_of(files, per_file):
    """The path of each image of the files, see `images.names_in`; for `per_file` see `Dataset`."""
    if per_file is None:
        return files
    return [name for file, count in zip(files, per_file, strict=True) for name in names_in(file, count)]


def _pack(listing, packed, origin, progress):
    """Pack a folder; images far outside the rest are named. UserError as `load` raises it."""
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
            images = _images_of(shown, writer, per_file, size, paths[0])
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


def _images_of(paths, writer, per_file, size, first):
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
        yield from ((image, i, mass_among(own)) for image, own in zip(images_in(path, stack), beside, strict=True))


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
    few = [path for path, count in zip(paths, per_file or [], strict=False) if 1 < count <= FEW_PLANES]
    if few:
        print(f"{len(few)} files have 2 to {FEW_PLANES} planes, such as {few[0]}: each plane is an image of its own. "
              "If they are bands of one lens, save one of them or their mean", file=sys.stderr)  # fmt: skip
    cubes = [path for path, count in zip(paths, per_file or [], strict=False) if count > 1 and is_fits(path)]
    if cubes:
        print(f"{len(cubes)} FITS cubes, such as {cubes[0]}: each plane is an image of its own. "
              "If they are bands of one lens, save one of them or their mean", file=sys.stderr)  # fmt: skip


def warn_of_images(paths, originals, labels, extremes):
    """Lines on stderr on copies, on images in several classes, and on those far outside the rest."""
    coarse = [path for path in paths if is_png(path) and png.bits_of(path) <= 8]
    if coarse:
        print(f"{len(coarse)} images are pictures of 8 bits, such as {coarse[0]}: so few steps of brightness hide weak "
              "substructure; use the original files if there are any", file=sys.stderr)  # fmt: skip
    _, first, which = np.unique(originals, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(paths)))
    if len(again):
        print(f"{len(again)} images are copies of others (turned, rescaled or rounded ones count, too), such "
              f"as {paths[again[0]]} of {paths[first[which][again[0]]]}: copies are in one part, and are tested "
              "once", file=sys.stderr)  # fmt: skip
    labelled_twice = images_of_several_classes(originals, labels)
    if len(labelled_twice):
        print(f"{len(labelled_twice)} images stand in more than one class, such as "
              f"{paths[labelled_twice[0]]}: remove the copies with the wrong label",
              file=sys.stderr)  # fmt: skip
    outliers = far_outside(extremes)
    if len(outliers):
        low, high = np.median(extremes, axis=0)
        example = outliers[0]
        print(
            f"{len(outliers)} images are far outside the rest, such as {paths[example]} with "
            f"pixels from {extremes[example, 0]:.3g} to {extremes[example, 1]:.3g}; those of "
            f"the median image go from {low:.3g} to {high:.3g}. Sentinel values or hot pixels? "
            "Repair or remove them.",
            file=sys.stderr,
        )


def images_of_several_classes(originals, labels):
    """Rows of images whose copies have another label."""
    _, image = np.unique(originals, return_inverse=True)
    lowest, highest = np.full(image.max() + 1, labels.max()), np.zeros(image.max() + 1, labels.dtype)
    np.minimum.at(lowest, image, labels)
    np.maximum.at(highest, image, labels)
    return np.flatnonzero((lowest < highest)[image])


def far_outside(extremes):
    """Rows of `extremes` (n, 2), minimum and maximum of each image, beyond `pixel_range`."""
    low, high, _ = pixel_range(extremes)
    return np.flatnonzero((extremes[:, 0] < low) | (extremes[:, 1] > high))


def pixel_range(extremes):
    """[low, high, faintest] of images that are not far outside those with these `extremes` (n, 2).

    Pixels lie between low and high. The distance allowed beyond the median image is its range of
    pixels and OUTLYING times the spread between the quartiles. The brightest pixel of an image is
    at least `faintest`, a tenth of that of the faintest image above the zero level of the darkest images.
    """
    low, high = np.median(extremes, axis=0)
    lower, upper = np.quantile(extremes, [0.25, 0.75], axis=0)
    allowed = high - low + OUTLYING * (upper - lower)
    zero = np.quantile(extremes[:, 0], 0.01)  # of some classes it may be above all pixels of others
    faintest = zero + (extremes[:, 1].min() - zero) / 10
    return [float(low - allowed[0]), float(high + allowed[1]), float(faintest)]


def extremes_of(dataset, rows):
    """Minimum and maximum (n, 2) of about RANGE_IMAGES of the rows."""
    chosen = rows[:: max(1, len(rows) // RANGE_IMAGES)]
    return np.array([(image.min(), image.max()) for image in (dataset.images[row] for row in chosen)])


def _folder_fingerprint(listing):
    digest = hashlib.sha256(f"format {FORMAT}, masses\n".encode())
    for class_name, paths in {**listing.files, "": listing.coarse}.items():
        digest.update(np.ascontiguousarray(listing.places.get(class_name, ())))
        for path in paths:
            status = path.stat()
            # Tools that restore modification times cannot restore inodes and change times.
            known = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
            line = "\0".join((class_name, path.name, *map(str, known))) + "\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# Opening


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
    packed = cache_dir / _folder_fingerprint(listing)[:32]
    if not (packed / "dataset.json").exists():
        _pack(listing, packed, origin=f"folder {path.name}", progress=progress)
        if listing.coarse:
            print(f"pairs: sharp images in {next(iter(listing.files))}, coarse ones in {listing.coarse[0].parent.name}",
                  file=sys.stderr)  # fmt: skip
        if listing.others:
            names = ", ".join(str(other.relative_to(path)) for other in listing.others[:SHOWN_NAMES])
            print(f"{len(listing.others)} other files were not read: {names}"
                  f"{', ...' if len(listing.others) > SHOWN_NAMES else ''}", file=sys.stderr)  # fmt: skip
        dataset = _open_packed(packed)
        for line in shortcuts.differences(dataset):
            print(one_line(line), file=sys.stderr)
        return dataset
    return _open_packed(packed)


def _open_packed(folder):
    description = read_json(folder / "dataset.json")
    class_names = description.get("class_names")
    fingerprint = description.get("fingerprint")
    valid = (
        description.get("format") == FORMAT
        and isinstance(class_names, list)
        and all(isinstance(name, str) for name in class_names)
        and isinstance(fingerprint, str)
    )
    if not valid:
        raise UserError(f"{folder}/dataset.json is of another version: rebuild the data set")
    check_class_names(class_names, folder, "make the data set again, with another name")
    images, labels, hashes = (
        read_npy(folder / f"{name}.npy") for name in ("images", "labels", "hashes")
    )
    n = len(images)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.dtype != np.float32:
        raise UserError(f"{folder}/images.npy: expected (N, H, H) float32, got {images.shape}")
    for name, array, dtype in (("labels", labels, np.int64), ("hashes", hashes, np.uint64)):
        shape = (n,) if array is labels else (2, n)
        if array.shape != shape or array.dtype != dtype:
            raise UserError(f"{folder}/{name}.npy does not match images.npy: rebuild the data set")
    if n and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UserError(f"{folder}/labels.npy has values out of range: rebuild the data set")
    digest, step = hashlib.sha256(), max(1, BLOCK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, n, step):
        block = np.ascontiguousarray(images[start : start + step])
        if not np.isfinite(block).all():
            raise UserError(f"{folder}/images.npy has NaN or infinite pixels: rebuild the data set")
        digest.update(block)
        forget_pages(images)
    known, digests = description.get("sha256"), digests_of(digest, labels, hashes)
    masses = None
    if isinstance(known, dict) and "masses" in known:
        masses = read_npy(folder / MASSES)
        if masses.shape != (n,) or masses.dtype != np.float64:
            raise UserError(f"{folder}/{MASSES} does not match images.npy: rebuild the data set")
        digests["masses"] = hashlib.sha256(masses).hexdigest()
    coarse = None
    if isinstance(known, dict) and "coarse" in known:
        coarse = read_npy(folder / COARSE)
        if coarse.ndim != 3 or len(coarse) != n or coarse.dtype != np.float32 or not np.isfinite(coarse).all():
            raise UserError(f"{folder}/{COARSE} does not match images.npy: rebuild the data set")
        digests["coarse"] = hashlib.sha256(coarse).hexdigest()
    per_file = description.get("per_file")
    if per_file is not None and not _counts_images(per_file, n):
        raise UserError(f"{folder}/dataset.json does not match images.npy: rebuild the data set")
    changed = [f"{name}.npy" for name in digests if isinstance(known, dict) and known.get(name) != digests[name]]
    for name in ("masses", "coarse"):  # whatever is known of them, the images are the same
        digests.pop(name, None)
    if changed or fingerprint_of(digests, class_names) != fingerprint:
        names = " and ".join(changed or ["dataset.json"])
        raise UserError(f"{folder}/{names}: changed after packing; rebuild the data set")
    origin = str(description.get("origin", ""))
    return Dataset(images, labels, *hashes, tuple(class_names), fingerprint, origin, masses, coarse, per_file)


def _counts_images(per_file, n):
    """Whether a value of a description says how many of `n` images each file has."""
    return isinstance(per_file, list) and all(type(k) is int and k > 0 for k in per_file) and sum(per_file) == n


# Choosing rows


def split(dataset):
    """Rows of the three parts, about 80/10/10 % of every class: {"train": (n,), ...}, each sorted.

    The image alone, turned or rescaled as it may be, decides its part: a test image stays a test
    image whatever else is in the data set, in any order. Folders of parts keep theirs, see `Listing`.
    There are two exceptions. A copy
    that rounding moved into another part joins the training images if one of the copies is there,
    else validation. And of a class so small that a part would stay empty, see `_parts_of_few`.
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

    An empty part gets the image with the highest hash of training, or else of a part that has several. The part of an image then depends on the others. Weights store the hashes of the images that
    they have seen, so scoring detects an image whose part has changed.
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


def rows_of_classes(dataset, rows, names):
    """Those of `rows` whose class is among `names`; UserError for an unknown class."""
    for name in names:
        if name not in dataset.class_names:
            found = ", ".join(dataset.class_names)
            raise UserError(f"--classes {name}: no such class in the data (found: {found})")
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
