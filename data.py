"""From a folder of `.npy` images to one memory-mapped array, and its split; numpy alone.

Public layout:  <root>/<class>/*.npy, one square image a file; the classes are the folders.
Packed layout:  images.npy (N, H, H) float32, labels.npy (N,), hashes.npy (N,), dataset.json.

A folder is packed once, into a cache whose name is a fingerprint of the folder's file names, sizes
and modification times, so a changed folder is packed again.
"""

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from files import (
    UserError,
    directory_to_be,
    forget_pages,
    make_folder,
    read_json,
    read_npy,
    run,
    write_json,
)

EXAMPLE = "example: python data.py --data lenses"
FORMAT = 2
CHECK_BLOCK = 4096  # images looked at together when pixels are checked
FLUSH_EVERY = 50_000  # images written, until their memory is given back
PARTS = ("train", "validation", "test")
SPLIT = "content-80-10-10"  # kept with the weights: which rule they were trained under


class Dataset(NamedTuple):
    """A packed data set.

    images : (N, H, H) float32, mapped into memory, raw pixels.
    labels : (N,) int64, index into class_names.
    hashes : (N,) uint64, of the images' content; copies have the same.
    class_names : names of the classes, sorted as the folders are.
    fingerprint : identity of images and labels.
    origin : where the images came from, in words.
    """

    images: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray
    class_names: tuple
    fingerprint: str
    origin: str

    @property
    def img_size(self):
        return self.images.shape[1]


class PackedWriter:
    """Writes the packed layout into an existing folder, a batch of images at a time."""

    def __init__(self, folder, shape, class_names, origin):
        self.folder, self.class_names, self.origin = Path(folder), list(class_names), origin
        self.images = np.lib.format.open_memmap(
            self.folder / "images.npy", mode="w+", dtype=np.float32, shape=shape
        )
        self.labels = np.empty(shape[0], dtype=np.int64)
        self.hashes = np.empty(shape[0], dtype=np.uint64)
        self.fingerprint = hashlib.sha256()
        self.count = 0

    def append(self, images, label):
        """Add images (b, H, H) of one class."""
        for image in np.ascontiguousarray(images, dtype=np.float32):
            digest = hashlib.blake2b(image, digest_size=16).digest()
            self.fingerprint.update(digest + label.to_bytes(4, "little"))
            self.hashes[self.count] = int.from_bytes(digest[:8], "little")
            self.labels[self.count] = label
            self.images[self.count] = image
            self.count += 1
            if self.count % FLUSH_EVERY == 0:
                self.images.flush()
                forget_pages(self.images)

    def close(self):
        if self.count != len(self.images):
            raise ValueError(f"{self.count} images written where {len(self.images)} were announced")
        self.images.flush()
        np.save(self.folder / "labels.npy", self.labels)
        np.save(self.folder / "hashes.npy", self.hashes)
        # Last, and what a reader looks for: the layout is complete when it is there.
        description = {
            "format": FORMAT,
            "class_names": self.class_names,
            "fingerprint": self.fingerprint.hexdigest(),
            "origin": self.origin,
        }
        write_json(self.folder / "dataset.json", description)


def load(path, cache_dir=None, progress=True):
    """Open a data set in either layout; a folder is packed first if it has not been yet.

    Parameters
    ----------
    path : folder in the public or the packed layout.
    cache_dir : where packed folders are kept; by default `<path>/.packed`.

    Returns a `Dataset`. Raises UserError, naming the path and the remedy, for a missing or empty
    folder, a file that is no image, mixed sizes, NaN or infinite pixels.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no data set at {path}: give a folder of class folders, or a packed one")
    if (path / "dataset.json").exists():
        return _open_packed(path)
    class_files = list_classes(path)
    cache_dir = Path(cache_dir) if cache_dir else path / ".packed"
    packed = cache_dir / _folder_fingerprint(class_files)[:32]
    if not (packed / "dataset.json").exists():
        _pack(class_files, packed, origin=f"folder {path.name}", progress=progress)
    return _open_packed(packed)


def list_classes(root):
    """{class name: sorted list of .npy paths} of the public layout; UserError if one is empty."""
    folders = [f for f in sorted(Path(root).iterdir()) if f.is_dir() and f.name[0] != "."]
    if not folders:
        raise UserError(f"{root} has no class folders: expected {root}/<class>/*.npy")
    class_files = {folder.name: sorted(folder.glob("*.npy")) for folder in folders}
    for name, files in class_files.items():
        if not files:
            raise UserError(f"class folder {root}/{name} has no .npy files: fill it or remove it")
    return class_files


def _folder_fingerprint(class_files):
    digest = hashlib.sha256(f"format {FORMAT}\n".encode())
    for class_name, paths in class_files.items():
        for path in paths:
            status = path.stat()
            line = f"{class_name}/{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_image(path):
    """One raw image of a file in the public layout, (H, H) float32; UserError if it is not one."""
    image = read_npy(path)
    if image.ndim == 3 and 1 in (image.shape[0], image.shape[2]):  # a channel axis
        image = image.squeeze(0 if image.shape[0] == 1 else 2)
    if image.ndim != 2 or image.shape[0] != image.shape[1] or image.size == 0:
        raise UserError(f"{path}: expected one square image, got shape {image.shape}; remove it")
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{path}: NaN or infinite pixels; repair or remove it")
    return image


def _pack(class_files, packed, origin, progress):
    paths = [(p, label) for label, files in enumerate(class_files.values()) for p in files]
    first, first_path = read_image(paths[0][0]), paths[0][0]
    try:
        make_folder(packed.parent)
    except UserError as error:
        raise UserError(f"{error}; --cache-dir keeps the packed copy elsewhere") from None
    try:
        with directory_to_be(packed) as folder:
            writer = PackedWriter(folder, (len(paths), *first.shape), class_files, origin)
            for path, label in tqdm(
                paths, desc="pack", unit="img", disable=None if progress else True
            ):
                image = read_image(path)
                if image.shape != first.shape:
                    raise UserError(
                        f"{path} is {image.shape[0]} pixels wide and {first_path} "
                        f"{first.shape[0]}: all images must have one size"
                    )
                writer.append(image[None], label)
            writer.close()
    except (OSError, UserError):
        if not (packed / "dataset.json").exists():  # else another process packed the same folder
            raise
    for stale in packed.parent.iterdir():
        if stale != packed and (stale / "dataset.json").exists():
            shutil.rmtree(stale, ignore_errors=True)


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
        raise UserError(f"{folder}/dataset.json is not of this version: make the data set again")
    images, labels, hashes = (
        read_npy(folder / f"{name}.npy") for name in ("images", "labels", "hashes")
    )
    n = len(images)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.dtype != np.float32:
        raise UserError(f"{folder}/images.npy: expected (N, H, H) float32, got {images.shape}")
    for name, array, dtype in (("labels", labels, np.int64), ("hashes", hashes, np.uint64)):
        if array.shape != (n,) or array.dtype != dtype:
            raise UserError(f"{folder}/{name}.npy does not match images.npy: make the set again")
    if n and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UserError(f"{folder}/labels.npy has values out of range: make the set again")
    for start in range(0, n, CHECK_BLOCK):
        if not np.isfinite(images[start : start + CHECK_BLOCK]).all():
            raise UserError(f"{folder}/images.npy has NaN or infinite pixels: make the set again")
        forget_pages(images)
    origin = str(description.get("origin", ""))
    return Dataset(images, labels, hashes, tuple(class_names), fingerprint, origin)


def split(dataset):
    """Rows of the three parts, about 80/10/10 % of every class: {"train": (n,), ...}, each sorted.

    The content of an image, its float32 pixels, alone decides its part. So a test image stays one
    whatever else is in the data set, in whatever order or layout, and copies are never on both
    sides. The same image in other units is another image.
    Raises UserError if a part has no image of some class.
    """
    share = dataset.hashes / 2.0**64  # uniform in [0, 1)
    part_of_row = np.digitize(share, (0.8, 0.9))
    parts = {part: np.flatnonzero(part_of_row == i) for i, part in enumerate(PARTS)}
    for label, class_name in enumerate(dataset.class_names):
        of_class = dataset.labels == label
        for part, rows in parts.items():
            if not of_class[rows].any():
                raise UserError(
                    f"none of the {of_class.sum()} images of class {class_name} fell into the "
                    f"{part} part (80 % train, 10 % validation, 10 % test): give more images"
                )
    return parts


def check_split(run):
    """UserError unless the training that weights say they come from (`run`) used this split."""
    if run.get("split") != SPLIT:
        raise UserError("the weights were trained under another split of the data: train again")


def add_data_arguments(parser):
    """The options with which every script names its data."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=Path, required=True, help="data set: folder of class folders, or packed"
    )
    group.add_argument(
        "--cache-dir", type=Path, default=None,
        help="where a folder's packed copy is kept (default: .packed inside the folder)",
    )  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Pack a folder of .npy images, if it has not been, and say what it holds.",
        epilog=EXAMPLE,
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="JSON",
        help="description to leave; a file that says the same already is not touched",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="accepted like everywhere; always the CPU")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    dataset = load(args.data, args.cache_dir)
    parts = split(dataset)
    counts = {
        class_name: {part: int((dataset.labels[rows] == k).sum()) for part, rows in parts.items()}
        for k, class_name in enumerate(dataset.class_names)
    }
    size = dataset.img_size
    print(f"{len(dataset.labels)} images of {size}×{size} pixels, {dataset.origin}")
    for class_name, by_part in counts.items():
        print(f"  {class_name}: " + ", ".join(f"{n} {part}" for part, n in by_part.items()))
    if args.out:
        described = {"fingerprint": dataset.fingerprint, "img_size": size, "images": counts}
        if not args.out.exists() or read_json(args.out) != described:
            write_json(args.out, described)


if __name__ == "__main__":
    run(main)
