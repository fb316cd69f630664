"""Pack a folder of images into one memory-mapped array, and say what the data set holds.

Training packs a folder by itself. This script shows beforehand whether the images can be read, and
how many of each class fall into the training, validation and test parts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

from lib import options
from lib.datasets import load, split
from lib.files import read_json, write_json

EXAMPLE = "example: python data.py --data lenses"


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    parser.add_argument(
        "--out", type=path_argument, metavar="JSON",
        help="write the description to this file; an identical file is not touched",
    )  # fmt: skip
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
        if args.data.resolve() in args.out.resolve().parents:
            raise UserError(f"--out {args.out} lies inside the data: choose another file")
        description = {"fingerprint": dataset.fingerprint, "img_size": size, "images": counts}
        before = read_json(args.out) if args.out.exists() else description.keys()
        if not description.keys() <= set(before):
            raise UserError(f"{args.out} is no description of a data set: choose another file")
        if before != description:
            write_json(args.out, description)


if __name__ == "__main__":
    run_main(main)
