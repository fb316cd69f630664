"""Simulate lens images of the classes no_sub, cdm and axion, as the DeepLense benchmark has them.

Model_I has its own camera with photon noise, Model_II models Euclid and Model_III the Hubble
Space Telescope. The physics is in lib/lenses.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import path_argument, run_main, starting

starting(__name__)

import numpy as np

from lib import copies, datasets, lenses, options
from lib.datasets import PACKED_FILES, PackedWriter, require_space
from lib.files import atomic_directory, make_folder
from lib.provenance import is_current, made_from, require_origin, sign

EXAMPLE = "example: python simulate.py --model Model_II --per-class 1000 --out lenses"
# The file of each layout that says what the images were made from.
DESCRIPTIONS = {"packed": "dataset.json", "folder": ".simulated.json"}
OWN_FILES = r"(axion|cdm|no_sub)(/\1_sim_\d+\.npy)?|\.simulated\.json|\.packed(/.*)?"  # of the public layout


def write_folder(out, batches, whole=False, made=None, replaced=None):
    """Write the public folder layout: one .npy an image, axion as object array [image, mass].

    Images are float64, and int64 where they are counts (`whole`). `made` is kept beside them, for
    `replaced` see `atomic_directory`.
    """
    counts = dict.fromkeys(lenses.CLASS_NAMES, 0)
    with atomic_directory(out, replaced, OWN_FILES) as folder:
        for class_name in lenses.CLASS_NAMES:
            (folder / class_name).mkdir()
        for class_name, images, axion_mass in batches:
            for i, image in enumerate(images):
                content = image.astype(np.int64 if whole else np.float64)
                if axion_mass is not None:
                    content = np.array([content, axion_mass[i]], dtype=object)
                name = f"{class_name}_sim_{counts[class_name]}.npy"
                np.save(folder / class_name / name, content, allow_pickle=True)
                counts[class_name] += 1
        sign(folder / DESCRIPTIONS["folder"], made)


def write_packed(out, batches, per_class, model, origin, made=None, replaced=None):
    """Write the packed layout that training maps into memory; more as for `write_folder`."""
    pixels = lenses.INSTRUMENTS[model].pixels
    with atomic_directory(out, replaced, PACKED_FILES) as folder:
        shape = (len(lenses.CLASS_NAMES) * per_class, pixels, pixels)
        writer = PackedWriter(folder, shape, lenses.CLASS_NAMES, origin)
        for class_name, images, _ in batches:
            writer.append(images, lenses.CLASS_NAMES.index(class_name))
        writer.close()
        sign(folder / DESCRIPTIONS["packed"], made)


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument("--model", choices=lenses.INSTRUMENTS, default="Model_II", help="data model")
    parser.add_argument("--per-class", type=int, default=10000, help="images of each class")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--out", type=path_argument, required=True, help="folder to create")
    parser.add_argument(
        "--layout", choices=("packed", "folder"), default="packed",
        help="one memory-mapped array, or the public layout of one .npy an image",
    )  # fmt: skip
    parser.add_argument(
        "--noise", action="store_true",
        help="Model_II and Model_III: an observation with sky, read-out and photon noise in place "
        "of the noise-free files that are published (Model_I has its noise always)",
    )  # fmt: skip
    options.add_update_argument(parser)
    return options.parsed(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    made, replaced = made_from(args, [lenses.__file__, datasets.__file__, copies.__file__, __file__]), None
    if args.update:
        replaced = DESCRIPTIONS[args.layout]
        if is_current(args.out / replaced, made):
            return
        if args.layout == "packed":
            require_origin(args.out / replaced, "simulate.py ")
    instrument = lenses.INSTRUMENTS[args.model]
    batches = lenses.simulate(args.model, args.per_class, args.seed, args.noise)
    if args.layout == "folder":
        make_folder(args.out.parent)
        pixels = len(lenses.CLASS_NAMES) * args.per_class * instrument.pixels**2
        require_space(args.out.parent, 8 * pixels)
        write_folder(args.out, batches, instrument.counts, made, replaced)
    else:
        origin = lenses.origin_of(args.model, args.per_class, args.seed, args.noise)
        write_packed(args.out, batches, args.per_class, args.model, origin, made, replaced)
    print(f"{len(lenses.CLASS_NAMES) * args.per_class} images of {args.model} in {args.out}")


if __name__ == "__main__":
    run_main(main)
