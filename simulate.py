"""Simulate lens images as the DeepLense benchmark has them.

Model_I has its own camera with photon noise, Model_II models Euclid and Model_III the Hubble
Space Telescope. These have one lens, and the classes no_sub, cdm and axion. Many_Lenses (the Common
Test) has another lens in every image, photon noise, and the classes no, sphere and vort. Pairs
(Specific Test VI.B) are such images without substructure, sharp and reduced. The physics is in
lib/raytracing.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import numpy as np

from lib import copies, lenses, listing, many_lenses, options, packing, pairs, raytracing, simulated
from lib.files import atomic_directory, make_folder
from lib.packing import PackedWriter, require_space
from lib.provenance import is_current, made_from, require_origin, sign

EXAMPLE = "example: python simulate.py --model Model_II --per-class 1000 --out lenses"
# The file of each layout that says what the images were made from.
DESCRIPTIONS = {"packed": "dataset.json", "folder": ".simulated.json"}
# Paths inside the public layouts: class folders, with parts or without, and pairs.
OWN_FILES = (
    r"((train|val)(/|$))?((axion|cdm|no_sub)(/\w+_sim_\d+\.npy)?|(no|sphere|vort)(/\d+\.npy)?)?"
    r"|(HR|LR)(/sample\d+\.npy)?|\.simulated\.json|\.packed(/.*)?"
)


def write_folder(out, batches, model="Model_II", train=None, made=None, replaced=None):
    """Write the public layout: one .npy an image, in class folders.

    train : the first so many images of a class go into `train`, the others into `val`; None: there are no
        such folders.
    made : is kept beside the images. For `replaced` see `atomic_directory`.
    """
    class_names = simulated.MODELS[model].class_names
    counts = dict.fromkeys(class_names, 0)
    with atomic_directory(out, replaced, OWN_FILES) as folder:
        for part in ("",) if train is None else ("train", "val"):
            for class_name in class_names:
                (folder / part / class_name).mkdir(parents=True)
        for class_name, images, axion_mass in batches:
            for i, image in enumerate(images):
                place, part = counts[class_name], ""
                if train is not None:
                    part, place = ("train", place) if place < train else ("val", place - train)
                mass = None if axion_mass is None else axion_mass[i]
                name, content = file_of(model, class_name, place, image, mass)
                np.save(folder / part / class_name / name, content, allow_pickle=True)
                counts[class_name] += 1
        sign(folder / DESCRIPTIONS["folder"], made)


def file_of(model, class_name, place, image, axion_mass):
    """Name and content of a public file. `place` counts from 0 in its folder.

    Many_Lenses: (1, H, W) float32. Others: (H, W) float64, or int64 where they are counts; with an axion
    mass, an object array [image, mass].
    """
    if model == simulated.MANY_LENSES:
        return f"{place + 1}.npy", image[None]
    content = image.astype(np.int64 if simulated.MODELS[model].always_noisy else np.float64)
    if axion_mass is not None:
        content = np.array([content, axion_mass], dtype=object)
    return f"{class_name}_sim_{place}.npy", content


def write_pairs(out, pairs, made=None, replaced=None):
    """Write pairs (HR (b, H, W), LR (b, H/2, W/2), ...) as `{HR,LR}/sampleN.npy`, (1, H, W), N from 1."""
    count = 0
    with atomic_directory(out, replaced, OWN_FILES) as folder:
        for name in ("HR", "LR"):
            (folder / name).mkdir()
        for sharp, coarse, *_ in pairs:
            for one, other in zip(sharp, coarse, strict=True):
                count += 1
                np.save(folder / "HR" / f"sample{count}.npy", one[None])
                np.save(folder / "LR" / f"sample{count}.npy", other[None])
        sign(folder / DESCRIPTIONS["folder"], made)


def write_packed(out, batches, per_class, model, origin, made=None, replaced=None, train=None):
    """Write the packed layout that training maps into memory; more as for `write_folder`.

    With `train`, the split keeps the first so many images of a class for training and validation, and
    the others are the test part, as of a folder with `train` and `val`.
    """
    class_names, pixels = simulated.MODELS[model].class_names, simulated.MODELS[model].camera.pixels
    counts = dict.fromkeys(class_names, 0)
    with atomic_directory(out, replaced, packing.OWN_FILES) as folder:
        writer = PackedWriter(folder, (len(class_names) * per_class, pixels, pixels), class_names, origin)
        places = np.tile([0.0, 1.0], (per_class, 1))  # now that there is known to be space for so many
        if train is not None:
            places[:train, 1] = places[train:, 0] = listing.BOUNDS[1]
        for class_name, images, masses in batches:
            first, counts[class_name] = counts[class_name], counts[class_name] + len(images)
            masses = np.nan if masses is None else masses
            writer.append(images, class_names.index(class_name), places[first : first + len(images)], masses)
        writer.close()
        sign(folder / DESCRIPTIONS["packed"], made)


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument("--model", choices=simulated.MODELS, default="Model_II", help="data model")
    parser.add_argument("--per-class", type=int, default=10000, help="images of each class, or pairs")
    parser.add_argument(
        "--val-per-class", type=int,
        help="images of each class in `val` beside those in `train`; 0: without these two folders "
        "(default: a quarter of --per-class for Many_Lenses, 0 for others)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--out", type=path_argument, required=True, help="folder to create")
    parser.add_argument(
        "--layout", choices=("packed", "folder"), default="packed",
        help="one memory-mapped array, or the public layout of one .npy an image",
    )  # fmt: skip
    parser.add_argument(
        "--noise", action="store_true",
        help="Model_II and Model_III: an observation with sky, read-out and photon noise in place "
        "of the noise-free files that are published (the others have their noise always)",
    )  # fmt: skip
    options.add_update_argument(parser)
    args = options.parsed(parser, argv)
    if args.noise and simulated.MODELS[args.model].always_noisy:
        raise UserError(f"--noise: images of {args.model} have their noise always; leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    code = [
        module.__file__
        for module in (lenses, many_lenses, pairs, raytracing, simulated, listing, packing, copies)
    ]
    made, replaced = made_from(args, [*code, __file__]), None
    if args.update:
        replaced = DESCRIPTIONS[args.layout]
        if is_current(args.out / replaced, made):
            return
        if args.layout == "packed":
            require_origin(args.out / replaced, "simulate.py ")
    val = args.val_per_class
    if val is None:
        val = args.per_class // 4 if args.model == simulated.MANY_LENSES else 0
    total, train = args.per_class + val, args.per_class if val else None
    model = simulated.MODELS[args.model]
    if args.layout == "folder":
        make_folder(args.out.parent)
        require_space(args.out.parent, 8 * len(model.class_names) * total * model.camera.pixels**2)
    if args.layout == "folder" and args.model == simulated.PAIRS:
        if val:
            raise UserError("--val-per-class: the public pairs have no such parts; leave it out")
        write_pairs(args.out, many_lenses.simulate_pairs(total, args.seed), made, replaced)
    else:
        batches = simulated.simulate(args.model, total, args.seed, args.noise)
        if args.layout == "folder":
            write_folder(args.out, batches, args.model, train, made, replaced)
        else:
            origin = simulated.origin_of(args.model, total, args.seed, args.noise)
            write_packed(args.out, batches, total, args.model, origin, made, replaced, train)
    print(f"{len(model.class_names) * total} images of {args.model} in {args.out}")


if __name__ == "__main__":
    run_main(main)
