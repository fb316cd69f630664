"""Draw the figures of the documentation: what the networks see in an image, and their structure.

Leaves overview.png and design.png in --out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import predict_probabilities
from lib import data, lenses, options, plots, weights
from lib.device import resolve_device
from lib.errors import UserError, path_argument, run
from lib.loader import batch_reader
from mae import complementary_masks

EXAMPLE = """example:
  python docs/figures.py --data runs/data --mae runs/pretrain/vit-mae-wt.pth \\
      --classifier runs/residual/vit-mae-classifier-wt.pth --out docs"""


@torch.no_grad()
def overview_of(args):
    """What `plots.overview` shows of the first test image of every class, as its arguments."""
    dataset, device = data.load(args.data, args.cache_dir), resolve_device(args.device)
    mae, transform, _ = weights.load_mae(args.mae)
    classifier, content = weights.load_classifier(args.classifier)
    data.check_size(args.mae, mae, dataset)
    data.check_size(args.classifier, classifier, dataset)
    if content["class_names"] != list(dataset.class_names):
        raise UserError(f"{args.classifier} is of other classes than {args.data}")
    test = data.rows_to_evaluate(dataset, content, whole=False)
    rows = np.array([test[dataset.labels[test] == k][0] for k in range(len(dataset.class_names))])

    mae.eval().to(device)
    images = transform.to(device)(batch_reader(dataset.images, device)(rows))
    noise = torch.rand(1, mae.num_patches, generator=torch.Generator().manual_seed(args.seed))
    noise = noise.expand(len(rows), -1).to(device)
    masked, reconstruction = mae.reconstruct(images, 0.75, noise)
    residual = mae.residual(images, complementary_masks(mae.num_patches, 0.75, rounds=2))
    pictures = [t[:, 0].cpu().numpy() for t in (images, masked, reconstruction, residual)]
    probabilities = predict_probabilities(classifier, dataset.images, rows, device)
    return (*pictures, probabilities, dataset.class_names, lenses.marks_of(dataset, rows))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=options.HelpFormatter
    )
    options.add_data_arguments(parser)
    parser.add_argument("--mae", type=path_argument, required=True, help="weights of pretrain.py")
    parser.add_argument(
        "--classifier", type=path_argument, required=True, help="weights of finetune.py"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=1, help="of the mask that is shown")
    options.add_device_argument(parser)
    args = parser.parse_args(argv)
    options.check_numbers(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    plots.overview(args.out / "overview.png", *overview_of(args))
    plots.design(args.out / "design.png")


if __name__ == "__main__":
    run(main)
