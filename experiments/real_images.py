"""Compare the simulator, and classifiers, with real images of the benchmark.

A file of images is an .npz with `images` (N, H, W) in linear intensity and, where they are known,
`labels` (N,), class names, `selection` (N,), "random" or how somebody chose the image, and
`edge_unknown` (N,), how many pixels at each border are not known (their neighbours replace them);
or one image as .npy. Every image is divided by its own maximum.

    fit       Fit the smooth lens (the source's two coordinates and a scale) to `no_sub` images.
    pictures  Write simulated images as pictures show them: divided by the maximum, in 8 bits; with
              --any a third as smoothed displays show them, and a third as logarithmic ones.
    classify  Ask a classifier about real images. It must have been trained on such pictures, or on
              Many_Lenses, whose images have a maximum of 1: any other expects another unit, and its
              answers mean nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import argparse
import contextlib

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares

from lib.class_evaluation import predict_probabilities
from lib import copies, datasets, lenses, listing, options, packing, weights
from lib.device import resolve_device
from lib.files import atomic_directory, require_own, write_csv
from lib.npy import read_npy
from lib.provenance import identity_of, is_current, made_from, require_origin, sign

EXAMPLE = """examples:
  python experiments/real_images.py fit --images real/testVI_pictures.npz
  python experiments/real_images.py fit --images real/model3_no_sub.npy --model Model_III
  python experiments/real_images.py pictures --data runs/data --out runs/pictures
  python experiments/real_images.py classify --images real/testVI_pictures.npz \\
      --weights runs/pictures-full/vit-mae-classifier-wt.pth --out predictions.csv"""

COLUMNS = ("labels", "selection", "source")  # of a file, beside its images
BLOCK = 4096  # images that are made together
CODE = (__file__, *(module.__file__ for module in (packing, copies, datasets, listing)))  # that decides pictures
LEVELS = 256  # of an 8-bit picture
START_GRID = 15  # source positions a side that a fit starts from
# Pictures that cannot be decoded exactly: log10 of the noise of those solved from smoothed displays,
# and of the softening s of those that show log(1 + x/s), both over the image's maximum.
SMOOTHED_NOISE_RANGE, LOGARITHM_RANGE = (-3.5, -2.7), (-2.5, 0.0)
SPREAD, SPREAD_GAIN = 2.0, 5.0  # pixels, factor: errors reach beyond the light, at half the size


def with_known_edges(images, edges):
    """Images (N, H, W) whose outermost `edges` (N,) pixels are replaced by the nearest others.

    Raises ValueError for edges that are no such numbers or leave no pixel.
    """
    if edges.shape != (len(images),) or edges.dtype.kind not in "iu":
        raise ValueError(f"edge_unknown must be {len(images)} numbers of pixels")
    filled, edges = images.copy(), edges.astype(np.int64)
    for i in np.flatnonzero(edges):
        if not 0 < 2 * edges[i] < images.shape[1]:
            raise ValueError(f"edge_unknown of image {i} is {edges[i]} of {images.shape[1]} pixels")
        filled[i] = np.pad(images[i, edges[i] : -edges[i], edges[i] : -edges[i]], edges[i], mode="edge")
    return filled


def load_images(path):
    """Images (N, H, H) float64 of maximum 1, and a dict of the columns that are known; UserError."""
    columns = {}
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                images = archive["images"]
                columns = {name: archive[name] for name in COLUMNS if name in archive.files}
                edges = archive["edge_unknown"] if "edge_unknown" in archive.files else np.zeros(len(images), int)
        except Exception as error:  # numpy and zipfile raise many kinds
            raise UserError(f"{path}: no .npz file with `images` (N, H, H): {error}") from None
    else:
        images, edges = read_npy(path)[None], np.zeros(1, int)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or not len(images):
        raise UserError(f"{path}: expected images (N, H, H), got shape {images.shape}")
    if images.dtype.kind not in "fiu" or not np.isfinite(images).all():
        raise UserError(f"{path}: images must be finite numbers")
    try:
        images = with_known_edges(images, edges)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    peaks = images.max(axis=(1, 2), keepdims=True)
    if not (peaks > 0).all():
        raise UserError(f"{path}: image {int((peaks <= 0).argmax())} has no positive pixel")
    for name, column in columns.items():
        if column.shape != (len(images),) or column.dtype.kind != "U":
            raise UserError(f"{path}: {name} must be {len(images)} texts")
    return images / peaks.astype(np.float64), columns


# fit


def fit_smooth_lens(image, model="Model_II"):
    """The smooth lens nearest to an image (H, H) in any unit.

    Returns (source (2,) in arcsec, residual (H, H) as a share of the image's maximum). The scale is
    solved for, so a fit has two free parameters.
    """
    target = image / image.max()

    def fitted(sources):  # (n, 2) -> (n, H, H)
        images = lenses.render(np.asarray(sources), np.zeros((len(sources), 0, 3)), model).numpy()
        products = (images * target).sum((1, 2)) / (images**2).sum((1, 2))
        return images * products[:, None, None]

    axis = np.linspace(-1, 1, START_GRID) * lenses.SOURCE_RANGE
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    start = grid[((fitted(grid) - target) ** 2).sum((1, 2)).argmin()]
    result = least_squares(
        lambda source: (fitted(source[None])[0] - target).ravel(),
        start, x_scale=0.01, diff_step=1e-4, xtol=1e-12, ftol=1e-12,
    )  # fmt: skip
    return result.x, target - fitted(result.x[None])[0]


def fit(args):
    images, columns = load_images(args.images)
    rows = np.flatnonzero(columns["labels"] == "no_sub") if "labels" in columns else range(len(images))
    pixels = lenses.INSTRUMENTS[args.model].pixels
    if images.shape[1] != pixels:
        raise UserError(f"{args.images}: {args.model} has images of {pixels} pixels; see --model")
    if not len(rows):
        raise UserError(f"{args.images}: no image is labelled no_sub")
    worst = 0.0
    for row in rows:
        source, residual = fit_smooth_lens(images[row], args.model)
        rms, largest = np.sqrt(np.mean(residual**2)), np.abs(residual).max()
        worst = max(worst, rms)
        print(f"{row}: source ({source[0]:+.5f}, {source[1]:+.5f})″, rms {rms:.2g} of the peak, "
              f"largest difference {largest:.2g}")  # fmt: skip
    print(f"{len(rows)} images, largest rms {worst:.2g} of the peak")


# pictures


def as_pictures(images):
    """Images (..., H, W) as an 8-bit colour map shows them, decoded again; maximum 1.

    matplotlib takes the colour floor(256 x) of x in [0, 1], and the middle of its step is what can
    be known of x: (k + ½)/256, but 0 for the first colour and 1 for the last.
    """
    k = np.floor(images / images.max(axis=(-2, -1), keepdims=True) * LEVELS).clip(0, LEVELS - 1)
    return np.where(k == 0, 0.0, np.where(k == LEVELS - 1, 1.0, (k + 0.5) / LEVELS))


def as_any_pictures(images, rng):
    """Images (n, H, W) as pictures of a random kind each: 8-bit, smoothed or logarithmic."""
    kinds = rng.integers(3, size=(len(images), 1, 1))
    x = (images / images.max(axis=(1, 2), keepdims=True)).clip(0)
    pictures = as_pictures(x)
    # What solving for the pixels under a smooth display leaves: errors where there is light, and
    # less of them around it.
    errors = rng.standard_normal(x.shape) * (pictures > 0)
    errors += SPREAD_GAIN * gaussian_filter(errors, (0, SPREAD, SPREAD))
    noise = 10 ** rng.uniform(*SMOOTHED_NOISE_RANGE, kinds.shape)
    smoothed = (pictures + noise * errors).clip(0, 1)
    s = 10 ** rng.uniform(*LOGARITHM_RANGE, kinds.shape)
    logarithmic = s * np.expm1(as_pictures(np.log1p(x / s)) * np.log1p(1 / s))
    return np.where(kinds == 0, pictures, np.where(kinds == 1, smoothed, logarithmic))


def is_exact(images):
    """(N,) bool: decoded exactly, so that every pixel is the middle of an 8-bit step."""
    return np.abs(as_pictures(images) - images).max(axis=(1, 2)) < 1e-6


def places_of(dataset):
    """(N, 2): the pictures of images stay in the parts of these, see `listing.Listing`.

    Of data sets that are too small to be split they are 0 and 1.
    """
    places, bounds = np.tile([0.0, 1.0], (len(dataset.labels), 1)), (0, *listing.BOUNDS, 1)
    with contextlib.suppress(UserError):
        for rows, low, high in zip(datasets.split(dataset).values(), bounds, bounds[1:], strict=False):
            places[rows] = low, high
    return places


def pictures(args):
    dataset, rng = datasets.load(args.data), np.random.default_rng(args.seed)
    if dataset.coarse is not None:
        raise UserError(f"{args.data} holds pairs, whose coarse images would be lost: give one of the two folders")
    kind = f"pictures of any kind, seed {args.seed}," if args.any else "8-bit pictures"
    made = made_from(argparse.Namespace(), CODE, kind=kind, data=identity_of(dataset))
    if args.update:
        if is_current(args.out / "dataset.json", made):
            return
        require_origin(args.out / "dataset.json", "pictures of ", "8-bit pictures ")
    with atomic_directory(args.out, "dataset.json" if args.update else None, packing.OWN_FILES) as folder:
        origin = f"{kind} of {dataset.origin}"
        writer = packing.PackedWriter(folder, dataset.images.shape, dataset.class_names, origin)
        places = places_of(dataset)
        for start in range(0, len(dataset.images), BLOCK):
            images = np.asarray(dataset.images[start : start + BLOCK], np.float64)
            if not (images.max(axis=(1, 2)) > 0).all():
                raise UserError(f"{args.data}: an image has no positive pixel")
            shown = as_any_pictures(images, rng) if args.any else as_pictures(images)
            rows = slice(start, start + len(shown))
            masses = np.nan if dataset.masses is None else dataset.masses[rows]
            writer.append(shown, dataset.labels[rows], places[rows], masses)
        writer.close()
        sign(folder / "dataset.json", made)
    print(f"{len(dataset.images)} pictures in {args.out}")


# classify


def classify(args):
    require_own(args.out, rb"\Aimage,exact,")
    images, columns = load_images(args.images)
    model, content = weights.load_classifier(args.weights)
    class_names = content["class_names"]
    if images.shape[1] != model.img_size:
        raise UserError(f"{args.images}: {args.weights} takes images of {model.img_size} pixels")
    for name in np.unique(columns.get("labels", [])):
        if name not in class_names:
            raise UserError(f"{args.images}: {args.weights} does not know the label {name}")
    rows, device = np.arange(len(images)), resolve_device(args.device)
    probabilities = predict_probabilities(model, images.astype(np.float32), rows, device)
    predicted, exact = np.array(class_names)[probabilities.argmax(1)], is_exact(images)
    shares = [[f"{p:.6f}" for p in row] for row in probabilities]
    extra = zip(*columns.values(), strict=True) if columns else ((),) * len(images)
    lines = ([str(i), str(int(exact[i])), *map(str, known), *shares[i], predicted[i]]
             for i, known in enumerate(extra))  # fmt: skip
    write_csv(args.out, [["image", "exact", *columns, *class_names, "prediction"], *lines])
    print(f"{len(images)} images in {args.out}")
    if "labels" not in columns:
        return
    right = predicted == columns["labels"]
    selection = columns.get("selection", np.full(len(images), "random"))
    for kind in np.unique(selection):
        for name, chosen in (("exactly decoded", exact), ("others", ~exact)):
            chosen = chosen & (selection == kind)
            if chosen.any():
                print(f"{kind}, {name}: {right[chosen].sum()} of {chosen.sum()} right")


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(function, help):
        command = commands.add_parser(function.__name__, help=help, formatter_class=options.HelpFormatter)
        command.set_defaults(function=function)
        return command.add_argument

    option = add(fit, "fit the smooth lens to no_sub images")
    option("--images", type=path_argument, required=True, metavar="NPZ|NPY")
    option("--model", choices=lenses.INSTRUMENTS, default="Model_II")
    option = add(pictures, "a data set as 8-bit pictures")
    option("--data", type=path_argument, required=True, help="data set to convert")
    option("--out", type=path_argument, required=True, help="folder to create")
    option("--any", action="store_true", help="pictures of any kind, not 8-bit alone")
    option("--seed", type=int, default=0, help="of the kinds and their noise")
    option("--update", action="store_true", help="do nothing if --out holds these pictures; replace others")
    option = add(classify, "ask a classifier about real images")
    option("--images", type=path_argument, required=True, metavar="NPZ")
    option("--weights", type=path_argument, required=True, metavar="PTH")
    option("--out", type=path_argument, required=True, metavar="CSV")
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return options.parsed(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    run_main(main)
