"""Which files of a folder are images, of which class and of which part; without torch.

<root>/<class>/           .npy, .npz, FITS or PNG files of one square image, or .npy, .npz and FITS files of
                          a stack of them; the folders name the classes.
<root>/<part>/<class>/    likewise in the parts train and val (or test), which are kept, see `Listing`.
<root>/labels.csv         a table whose columns file and label name the files and their classes.
<root>/HR/, <root>/LR/    two folders of pairs, whose files have the same names: the images of one are 2, 3
                          or 4 times as wide as those of the other.
"""

import csv
import hashlib
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.errors import UserError
from lib.files import is_hidden
from lib.images import SUFFIXES, images_among, read_stack
from lib.names import check_class_names

LABELS = "labels.csv"  # in place of class folders
MAX_LABELS_BYTES = 256 * 2**20
PARTS = ("train", "validation", "test")
BOUNDS = (0.8, 0.9)  # where training ends and the test part begins, see `datasets.split`
FACTORS = (2, 3, 4)  # by which sharp images of pairs may be wider than coarse ones
NAMES_OF_PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
                  "validation": "validation", "dev": "validation", "test": "test", "testing": "test"}  # fmt: skip


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
    folders = folders_in(root)
    part_of = {folder: NAMES_OF_PARTS.get(folder.name.lower()) for folder in folders}
    if not folders or not all(part_of.values()) or (Path(root) / LABELS).is_file():
        files, others = list_classes(root)
        sharp, coarse = pairs_among(files) or (files, [])
        places = {name: np.tile([0.0, 1.0], (len(paths), 1)) for name, paths in sharp.items()}
        return Listing(sharp, places, others, coarse)
    folders = sorted(folders, key=lambda folder: PARTS.index(part_of[folder]))
    parts = [part_of[folder] for folder in folders]
    if len(set(parts)) < len(parts) or parts[0] != "train" or len(parts) < 2:
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{root} has the folders {names}: give train and val or test, or one folder per class")
    starts = (0.0, BOUNDS[1], 1.0) if len(parts) == 2 else (0.0, *BOUNDS, 1.0)
    files, places, others = {}, {}, []
    for folder, low, high in zip(folders, starts, starts[1:], strict=False):
        in_part, others_in_part = list_classes(folder)
        if files and in_part.keys() != files.keys():
            raise UserError(f"{root}: {folder.name} has the classes {', '.join(in_part)}, {folders[0].name} "
                            f"has {', '.join(files)}: give both the same")  # fmt: skip
        for name, paths in in_part.items():
            files[name] = files.get(name, []) + paths
            places.setdefault(name, []).extend([(low, high)] * len(paths))
        others += others_in_part
    return Listing(files, {name: np.array(bounds) for name, bounds in places.items()}, others)


def folders_in(root):
    return [entry for entry in Path(root).iterdir() if entry.is_dir() and not is_hidden(entry.name)]


def pairs_among(files):
    """({name of the folder of sharp images: paths}, paths of the coarse ones) of {folder: paths}; None for no pairs.

    They are pairs if there are two folders with the same file names, and the first images say so.
    """
    if len(files) != 2:
        return None
    one, other = files.values()
    if [path.name for path in one] != [path.name for path in other]:
        return None
    side = {name: read_stack(paths[0])[0].shape[1] for name, paths in files.items()}
    coarse, sharp = sorted(files, key=side.get)
    if side[sharp] not in [factor * side[coarse] for factor in FACTORS]:
        return None
    return {sharp: files[sharp]}, files[coarse]


def list_classes(root):
    """{class name: sorted paths of its images} of class folders or of the table LABELS, and other files.

    Hidden files and `__MACOSX` do not count. Raises UserError, naming the folder and the remedy, for a class
    without images, images in sub-folders, and names that a class must not have.
    """
    if (Path(root) / LABELS).is_file():
        return labelled_files(Path(root))
    folders = sorted(folders_in(root), key=lambda folder: normal_name(folder.name))
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
                raise UserError(f"class folder {folder} has images in its sub-folder {entry.name}: put the "
                                f"images of a class directly into its folder, or give another than {root}")  # fmt: skip
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
            most = MAX_LABELS_BYTES // 2**20
            raise UserError(f"{table} has more than {most} MiB: is it a table of files and labels?")
        with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {table}, which must be a table in UTF-8: {error}") from None
    columns = lines[0][1] if lines else []
    if sorted(columns) != ["file", "label"]:
        raise UserError(f"{table} has the columns {', '.join(columns)[:200] or '(none)'}: expected file,label. If "
                        "folders name the classes, give the table another name")  # fmt: skip
    for line, row in lines:
        if len(row) != 2:
            raise UserError(f"{table}, line {line}: expected a file and its label, got {len(row)} cells")
    if len(lines) == 1:
        raise UserError(f"{table} lists no files")
    return [(line, (row[columns.index("file")], row[columns.index("label")])) for line, row in lines[1:]]


def normal_name(name):
    """A class name in the one form in which names are compared: systems write accents in two."""
    return unicodedata.normalize("NFC", name)


def fingerprint_of_files(listing, layout):
    """What changes if a file does: a digest of names, sizes, inodes and times, and the version of the `layout`."""
    digest = hashlib.sha256(f"format {layout}, masses\n".encode())
    for class_name, paths in {**listing.files, "": listing.coarse}.items():
        digest.update(np.ascontiguousarray(listing.places.get(class_name, ())))
        for path in paths:
            status = path.stat()
            # Tools that restore modification times cannot restore inodes and change times.
            known = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
            line = "\0".join((class_name, path.name, *map(str, known))) + "\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
