"""Pack a folder of images into one memory-mapped array, and say what the data set holds.

Training packs a folder by itself. This script shows beforehand whether the images can be read, and
how many of each class fall into the training, validation and test parts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import one_line, run_main, starting

starting(__name__)

import numpy as np

from lib import options, shortcuts
from lib.datasets import load, split

EXAMPLE = "example: python data.py --data lenses"


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    dataset = load(args.data, args.cache_dir)
    parts = split(dataset)
    print(f"{len(dataset.labels)} images of {dataset.img_size}×{dataset.img_size} pixels, {dataset.origin}")
    for label, class_name in enumerate(dataset.class_names):
        counts = [f"{(dataset.labels[rows] == label).sum()} {part}" for part, rows in parts.items()]
        originals = dataset.originals[dataset.labels == label]
        copies = len(originals) - len(np.unique(originals))
        more = f"; {copies} are copies, {len(originals) - copies} images are different" if copies else ""
        print(f"  {class_name}: {', '.join(counts)}{more}")
    if (args.data / "dataset.json").exists():  # of a folder, packing says it
        for line in shortcuts.differences(dataset):
            print(one_line(line))


if __name__ == "__main__":
    run_main(main)
