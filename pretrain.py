"""Pre-train a masked autoencoder on the images of one class, by default the smooth lenses.

Leaves in --out: vit-mae-wt.pth (weights), config.json, metrics.jsonl, loss.png and
reconstructions.png (held-out images of every class: original, masked, reconstruction, residual).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
from lib.errors import run_main, starting

starting(__name__)

import numpy as np
import torch

from lib import datasets, distributed, familiarity, listing, network, options, pairs, plots, recipe, traits
from lib.augment import augment
from lib.device import resolve_device
from lib.intensity import fit_transform
from lib.loader import batch_reader, in_batches, read_disturbed
from lib.loop import Objective, check_batch, fit, learner_of, precision_of
from lib.residuals import smooth_rms
from lib.run import open_run
from mae import MAE, IntensityTransform, most_tokens, set_attention_form

EXAMPLE = "example: python pretrain.py --data lenses --out runs/pretrain"
DEFAULTS = recipe.Defaults(epochs=8, fewest_steps=1500, batch_size=64, lr=2e-3, beta2=0.95, keep="last")


def pretrain(args):
    with distributed.main_process_first():
        dataset = datasets.load(args.data, args.cache_dir)
        if args.coarse:
            dataset = pairs.coarse_of(dataset)
    parts = datasets.split(dataset)
    rows, validation = (
        rows_to_learn_from(dataset, parts[part], args.classes) for part in ("train", "validation")
    )
    chosen = DEFAULTS.recipe(args, len(rows))
    with open_run(args, dataset, "vit-mae-wt.pth", chosen, **network.options_of(args, dataset.img_size)) as run:
        if run.is_finished:
            return
        train(dataset, rows, validation, parts, run)


def train(dataset, rows, validation, parts, run):
    """Train on images `rows`, validate on `validation`, which are of the `parts`, and save the weights."""
    args, chosen = run.args, run.recipe
    check_batch(chosen, rows)
    device = resolve_device(args.device)
    config, kind = mae_config(args, dataset.img_size)
    constants = fit_transform(dataset.images, rows, kind, chosen.augment)

    torch.manual_seed(chosen.seed)
    model = network.build(MAE, config).to(device)
    # Now that the options are known to fit together.
    distributed.say(f"{', '.join(args.classes)}, {len(rows):,} training images: {chosen}")
    transform = IntensityTransform(**constants).to(device)
    read = batch_reader(dataset.images, device)
    noise = validation_noise(len(validation), model.num_patches, seed=0)
    place = {row: i for i, row in enumerate(validation)}

    def batch_loss(batch, _):
        part = distributed.local_slice(len(batch))
        images = augment(read(batch[part]), chosen.augment, len(batch), part)
        noise = torch.rand(len(batch), model.num_patches, device=device)[part]
        loss, _, _ = model(transform(images), args.mask_ratio, noise)
        return {"loss": loss}

    def validate():
        def loss_of(batch):
            fixed = noise[[place[row] for row in batch]].to(device)
            images = transform(read_disturbed(read, batch, chosen.augment))
            loss, _, _ = model(images, args.mask_ratio, fixed)
            return loss.expand(len(batch))  # every image has the same number of hidden patches

        return {"loss": in_batches(loss_of, validation).mean().item()}

    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    learner = learner_of(model, learning, dataset, read)
    run.write_config(model=config, transform=constants)
    precision = precision_of(run, device, most_tokens(model))
    set_attention_form(model, precision.attention)
    state, history, last = fit(learner, Objective(batch_loss, validate), rows, run, device, precision)
    # For the classifiers that start from these weights.
    fitted = familiarity.fit(
        dataset, parts["train"], parts["validation"], constants, chosen.augment, args.quiet
    )
    left = smooth_rms(model.eval(), lambda batch: transform(read(batch)), validation, args.mask_ratio)
    if not distributed.is_main():
        return
    run.save_weights(
        state, {**config, "transform": constants},
        dataset.hashes[np.concatenate([rows, validation])], fitted,
        number_format=precision.name, last=last,
        pixel_range=traits.pixel_range(datasets.extremes_of(dataset, rows)),
        smooth_rms=left,
    )  # fmt: skip
    plots.attempt(
        plots.curves, args.out / "loss.png", history, {"loss": "reconstruction error (masked patches)"}
    )
    pictures = held_out_reconstructions(model, transform, read, dataset, parts["validation"], args)
    plots.attempt(
        plots.reconstructions, args.out / "reconstructions.png", *pictures, dataset.class_names
    )


def mae_config(args, img_size):
    """The arguments of `MAE` that the options ask for, and the kind of intensity scale."""
    sizes = network.options_of(args, img_size)
    transform = sizes.pop("transform")
    names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "mlp_ratio", "norm_pix_loss")
    return {"img_size": img_size, "in_chans": 1, **sizes, **{n: getattr(args, n) for n in names}}, transform


def rows_to_learn_from(dataset, rows, classes):
    """Those of `rows` whose class is among `classes`, or all of them for ["all"]."""
    whole = datasets.means_every_class(classes, dataset.class_names)
    return rows if whole else datasets.rows_of_classes(dataset, rows, classes)


def validation_noise(count, num_patches, seed):
    """The masks of validation: fixed noise (count, N), so that epochs can be compared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, num_patches, generator=generator)


@torch.no_grad()
def held_out_reconstructions(model, transform, read, dataset, rows, args):
    """Two images of every class among `rows`, masked and reconstructed.

    A class of one image shows it twice. Returns (original, masked, reconstruction), each
    (classes, 2, H, W), in the network's scale. Hidden pixels of `masked` are NaN; visible pixels of
    `reconstruction` are the original's.
    """
    model.eval()
    chosen = np.concatenate(
        [np.resize(rows[dataset.labels[rows] == k][:2], 2) for k in range(len(dataset.class_names))]
    )
    images = transform(read(chosen))
    noise = validation_noise(len(chosen), model.num_patches, seed=1).to(images.device)
    masked, reconstruction = model.reconstruct(images, args.mask_ratio, noise)
    shape = (len(dataset.class_names), -1, dataset.img_size, dataset.img_size)
    return tuple(t.cpu().numpy().reshape(shape) for t in (images, masked, reconstruction))


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    options.add_data_arguments(parser)
    recipe.add_arguments(parser, {"pretrain": DEFAULTS})
    network.add_arguments(parser)
    group = parser.add_argument_group("masked autoencoder")
    group.add_argument("--mask-ratio", type=float, default=0.75, help="fraction of patches to hide")
    group.add_argument("--decoder-embed-dim", type=int, default=96, help="width of the decoder")
    group.add_argument("--decoder-depth", type=int, default=1, help="blocks of the decoder")
    group.add_argument("--decoder-num-heads", type=int, default=4, help="its attention heads")
    group.add_argument("--mlp-ratio", type=float, default=4.0, help="MLP width over block width")
    group.add_argument(
        "--norm-pix-loss", action="store_true", help="compare with patch-wise normalised pixels"
    )
    group.add_argument(
        "--classes", nargs="+", type=listing.normal_name, default=["no_sub"], metavar="CLASS",
        help="classes to learn from, without their labels; all for every class, unless one is called so",
    )  # fmt: skip
    group.add_argument(
        "--coarse", action="store_true",
        help="learn from the coarse images of pairs, or from images reduced by two: for finetune.py --task sharpen",
    )  # fmt: skip
    return options.parsed(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    with distributed.process_group(args.device):
        pretrain(args)


if __name__ == "__main__":
    run_main(main)
