"""Pre-train a masked autoencoder on the images of one class, by default the smooth lenses.

Leaves in --out: vit-mae-wt.pth (weights), config.json, metrics.jsonl, loss.png and
reconstructions.png (held-out images of every class: original, masked, reconstruction, residual).
"""

import argparse

import numpy as np
import torch

import data
import distributed
import plots
import train
import weights
from augment import SYMMETRIES, augment
from files import UserError, run
from mae import MAE

EXAMPLE = "example: python pretrain.py --data lenses --out runs/pretrain"
EPOCHS, FEWEST_STEPS = 8, 1500


def mae_config(args, img_size):
    """The arguments of `MAE` that the options ask for."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim",
             "decoder_depth", "decoder_num_heads", "mlp_ratio", "norm_pix_loss")  # fmt: skip
    return {"img_size": img_size, "in_chans": 1, **{n: getattr(args, n) for n in names}}


def rows_of_classes(dataset, rows, names):
    """Those of `rows` whose class is among `names`; UserError for a class that is not there."""
    for name in names:
        if name not in dataset.class_names:
            found = ", ".join(dataset.class_names)
            raise UserError(f"--classes {name}: no such class folder in the data (found: {found})")
    labels = [dataset.class_names.index(name) for name in names]
    return rows[np.isin(dataset.labels[rows], labels)]


def epochs_of(args, images):
    """--epochs, or where it is not given what is usual for so many training images."""
    return args.epochs or train.enough_epochs(EPOCHS, FEWEST_STEPS, images, args.batch_size)


def validation_noise(count, num_patches, seed):
    """The masks of validation: fixed noise (count, N), so that epochs can be compared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, num_patches, generator=generator)


def pretrain(args):
    with distributed.first_goes_first():
        dataset = data.load(args.data, args.cache_dir)
    parts = data.split(dataset)
    classes = dataset.class_names if args.classes == ["all"] else args.classes
    rows, validation = (
        rows_of_classes(dataset, parts[part], classes) for part in ("train", "validation")
    )
    args.epochs = epochs_of(args, len(rows))
    device = train.resolve_device(args.device)
    config = mae_config(args, dataset.img_size)
    transform_constants = train.fit_transform(dataset.images, rows, args.transform, args.augment)

    torch.manual_seed(args.seed)
    model = train.new_network(MAE, config).to(device)
    transform = train.IntensityTransform(**transform_constants).to(device)
    read = train.batch_reader(dataset.images, device)
    noise = validation_noise(len(validation), model.num_patches, seed=0)
    place = {row: i for i, row in enumerate(validation)}

    def batch_loss(batch, _):
        images = augment(read(batch), args.augment)
        noise = torch.rand(len(batch), model.num_patches, device=device)
        own = distributed.share(len(batch))
        loss, _, _ = model(transform(images[own]), args.mask_ratio, noise[own])
        return {"loss": loss}

    def validate():
        disturbances = [kind for kind in args.augment if kind not in SYMMETRIES]

        def loss_of(batch):
            fixed = noise[[place[row] for row in batch]].to(device)
            images = transform(augment(read(batch), disturbances))
            loss, _, _ = model(images, args.mask_ratio, fixed)
            return loss.expand(len(batch))  # every image has as many removed patches

        with train.same_random_numbers():
            return {"loss": train.in_batches(loss_of, validation).mean().item()}

    groups = train.parameter_groups(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], args.weight_decay
    )
    with train.run_folder(args.out):
        settings = train.settings_of(args, dataset)
        checkpoint = train.checkpoint_to_resume(args, settings)
        train.write_config(args.out, args, dataset, model=config, transform=transform_constants)
        state, history, precision = train.fit(
            model, groups, batch_loss, validate, rows,
            args=args, settings=settings, checkpoint=checkpoint, device=device, betas=(0.9, 0.95),
            in_blocks=train.larger_than_memory(dataset.images),
        )  # fmt: skip
        if not distributed.is_first():
            return
        plots.loss_curves(args.out / "loss.png", history, "reconstruction error (masked patches)")
        plots.reconstructions(
            args.out / "reconstructions.png",
            *held_out_reconstructions(model, transform, read, dataset, parts["validation"], args),
            dataset.class_names,
        )
        weights.save(
            args.out / "vit-mae-wt.pth",
            state,
            {**config, "transform": transform_constants},
            dataset.class_names,
            {**settings, "precision": precision.name, "last": history[-1], "data": str(args.data)},
        )
        weights.remove_checkpoints(args.out)
    print(f"weights in {args.out / 'vit-mae-wt.pth'}")


@torch.no_grad()
def held_out_reconstructions(model, transform, read, dataset, rows, args):
    """Two validation images of every class, masked and reconstructed.

    Returns (original, masked, reconstruction), each (classes, 2, H, W), in the network's scale;
    removed pixels of `masked` are NaN and visible ones of `reconstruction` are the original.
    """
    model.eval()
    chosen = np.concatenate(
        [rows[dataset.labels[rows] == label][:2] for label in range(len(dataset.class_names))]
    )
    images = transform(read(chosen))
    noise = validation_noise(len(chosen), model.num_patches, seed=1).to(images.device)
    images, masked, reconstruction = model.reconstruct(images, args.mask_ratio, noise)
    shape = (len(dataset.class_names), -1, dataset.img_size, dataset.img_size)
    return tuple(t.cpu().numpy().reshape(shape) for t in (images, masked, reconstruction))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=train.HelpFormatter
    )
    data.add_data_arguments(parser)
    train.add_training_arguments(parser)
    parser.set_defaults(lr=2e-3)
    train.add_model_arguments(parser)
    group = parser.add_argument_group("masked autoencoder")
    group.add_argument("--mask-ratio", type=float, default=0.75, help="share of patches removed")
    group.add_argument("--decoder-embed-dim", type=int, default=96, help="width of the decoder")
    group.add_argument("--decoder-depth", type=int, default=1, help="blocks of the decoder")
    group.add_argument("--decoder-num-heads", type=int, default=4, help="its attention heads")
    group.add_argument("--mlp-ratio", type=float, default=4.0, help="MLP width over block width")
    group.add_argument(
        "--norm-pix-loss", action="store_true", help="compare with patch-wise normalised pixels"
    )
    group.add_argument(
        "--classes", nargs="+", default=["no_sub"], metavar="CLASS",
        help="classes to learn from, without their labels; all for every one",
    )  # fmt: skip
    args = parser.parse_args(argv)
    train.check_arguments(args)
    if not 0 < args.mask_ratio < 1:
        raise UserError(f"--mask-ratio must be between 0 and 1, got {args.mask_ratio}")
    return args


def main(argv=None):
    args = parse_args(argv)
    with distributed.processes(args.device):
        pretrain(args)


if __name__ == "__main__":
    run(main)
