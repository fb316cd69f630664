"""Draw the figures of the documentation: what the networks see in an image, and their structure.

Leaves overview.png and design.png in --out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import numpy as np
import torch

from lib.class_evaluation import predict_probabilities
from lib import compatibility, datasets, options, plots, simulated, weights
from lib.device import resolve_device
from lib.files import PICTURE, require_own
from lib.loader import batch_reader
from lib.residuals import smooth_rms_of
from mae import complementary_masks

import matplotlib.pyplot as plt  # after lib.plots, which chooses how it draws

EXAMPLE = """example:
  python docs/figures.py --data runs/data --mae runs/pretrain/vit-mae-wt.pth \\
      --classifier runs/residual/vit-mae-classifier-wt.pth --out docs"""


@torch.no_grad()
def overview_of(args):
    """What `draw_overview` shows of the first test image of every class, as its arguments."""
    dataset, device = datasets.load(args.data, args.cache_dir), resolve_device(args.device)
    mae, transform, trained = weights.load_mae(args.mae)
    classifier, content = weights.load_classifier(args.classifier)
    compatibility.check_size(args.mae, mae, dataset)
    compatibility.check_size(args.classifier, classifier, dataset)
    if content["class_names"] != list(dataset.class_names):
        raise UserError(f"{args.classifier} is of other classes than {args.data}")
    test = compatibility.rows_to_evaluate(dataset, content, whole=False)
    rows = np.array([test[dataset.labels[test] == k][0] for k in range(len(dataset.class_names))])

    mae.to(device)
    images = transform.to(device)(batch_reader(dataset.images, device)(rows))
    noise = torch.rand(1, mae.num_patches, generator=torch.Generator().manual_seed(args.seed))
    noise = noise.expand(len(rows), -1).to(device)
    masked, reconstruction = mae.reconstruct(images, 0.75, noise)
    residual = mae.residual(images, complementary_masks(mae.num_patches, 0.75, rounds=2))
    pictures = [t[:, 0].cpu().numpy() for t in (images, masked, reconstruction, residual)]
    probabilities = predict_probabilities(classifier, dataset.images, rows, device)
    sigma, marks = smooth_rms_of(trained, pictures[3]), simulated.marks_of(dataset, rows)
    return (*pictures, sigma, probabilities, dataset.class_names, marks)


def draw_overview(
    path, original, masked, reconstruction, residual, sigma, probabilities, class_names, marks=None
):
    """A row an image (n, H, W): what the MAE makes of it, and what the classifier says of it.

    `probabilities` (n, classes); `marks` as in `plots.residual_maps`.
    """
    titles = ("image", "75 % masked", "reconstruction", "substructure map", "class")
    figure, axes = plt.subplots(
        len(original), 5, figsize=(9, 1.75 * len(original)), squeeze=False, layout="constrained"
    )
    for i, row in enumerate(axes):
        low, high = original[i].min(), original[i].max()
        for panel, images in zip(row, (original, masked, reconstruction), strict=False):
            panel.imshow(images[i], vmin=low, vmax=high, cmap="magma", origin="lower")
        drawn = plots.substructure_map(row[3], residual[i], sigma)
        if marks is not None:
            plots.circles(row[3], marks[i])
        for panel in row[:4]:
            panel.set(xticks=[], yticks=[], facecolor="0.8")
        row[0].set_ylabel(plots.label_of(class_names[i]))
        best = int(np.argmax(probabilities[i]))
        colors = ["tab:blue" if k == best else "0.7" for k in range(len(class_names))]
        row[4].barh(range(len(class_names)), probabilities[i], color=colors)
        row[4].set_yticks(range(len(class_names)), [plots.label_of(name) for name in class_names])
        row[4].set(xlim=(0, 1), xticks=[0, 0.5, 1])
        row[4].yaxis.tick_right()
        row[4].invert_yaxis()
    plots.map_scale(figure, drawn, axes[:, 3], "σ of smooth lenses", plots.TICKS[::2], location="bottom",
                    fraction=0.05)  # fmt: skip
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title)
    plots.save(figure, path)


def draw_design(path):
    """Boxes and arrows: pre-training above, below it classification by the encoder and by residual maps."""
    figure, axes = plt.subplots(figsize=(9, 5))
    axes.set(xlim=(-0.5, 100.5), ylim=(0, 56))
    axes.set_axis_off()

    def box(x, y, width, text, color):
        axes.add_patch(
            plt.Rectangle((x, y), width, 10, facecolor=color, edgecolor="0.3", linewidth=0.8)
        )
        axes.text(x + width / 2, y + 5, text, ha="center", va="center", fontsize=8)

    def arrow(start, end):
        style = {"arrowstyle": "-|>", "color": "0.3", "linewidth": 1}
        axes.annotate("", xy=end, xytext=start, arrowprops=style)

    given, learned, partly = "#f3e3c3", "#cfe0f5", "#dff0d8"
    upper, middle, lower = 42, 22, 2
    box(0, upper, 15, "smooth lenses\nlog, standardised", given)
    box(19, upper, 14, "16 patches\n75 % hidden", given)
    box(37, upper, 18, "encoder: 4 blocks\nwidth 128, 5 tokens", learned)
    box(59, upper, 18, "decoder: 1 block\nwidth 96, 17 tokens", learned)
    box(81, upper, 19, "hidden patches\nmean squared error", given)
    box(0, middle, 15, "all classes\nlog, standardised", given)
    box(19, middle, 14, "16 patches", given)
    box(37, middle, 18, "encoder, 17 tokens\nfixed, its norms, or all", partly)
    box(59, middle, 18, "mean, deviation and\nextremes of tokens", given)
    box(81, middle, 19, "512 → 64 → classes\ncross-entropy", learned)
    box(0, lower, 15, "all classes\nlog, standardised", given)
    box(19, lower, 14, "four masks", given)
    box(37, lower, 18, "the whole MAE, fixed:\nimage − prediction", given)
    box(59, lower, 18, "4 stages: convolution,\nhalving; then mean", learned)
    box(81, lower, 19, "96 → 64 → classes\ncross-entropy", learned)
    for y in (upper + 5, middle + 5, lower + 5):
        for start, end in ((15, 19), (33, 37), (55, 59), (77, 81)):
            arrow((start, y), (end, y))
    arrow((46, upper), (46, middle + 10))
    axes.text(47, (upper + middle + 10) / 2, "weights", va="center", fontsize=8)
    for y, title in ((upper, "pre-training, no labels"), (middle, "head, layernorm, full"),
                     (lower, "residual")):  # fmt: skip
        axes.text(0, y + 11.5, title, fontsize=9, fontweight="bold")
    axes.text(100, 0, "blue learns; green by strategy", ha="right", fontsize=8)
    plots.save(figure, path)


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    parser.add_argument("--mae", type=path_argument, required=True, help="weights of pretrain.py")
    parser.add_argument(
        "--classifier", type=path_argument, required=True, help="weights of finetune.py"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=1, help="of the mask that is shown")
    options.add_device_argument(parser)
    return options.parsed(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    for name in ("overview.png", "design.png"):
        require_own(args.out / name, PICTURE)
    draw_overview(args.out / "overview.png", *overview_of(args))
    draw_design(args.out / "design.png")


if __name__ == "__main__":
    run_main(main)
