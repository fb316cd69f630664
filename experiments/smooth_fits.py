"""Compare real images of another lens each with Many_Lenses: what does the best smooth lens leave?

A file of images is an .npz with `images` or `HR` (N, 150, 150), decoded from pictures and scaled to
their minimum and maximum; `labels` (N,), class names (without them all are `no`); `edge_unknown`
(N,), how many pixels at each border are invalid; `error` or `hr_error` (N,), the rms of decoding;
and `exact` (N,), which pictures have 256 levels. Simulated images are disturbed likewise: rounded,
or with noise of that rms. The smooth lens has seven parameters, a scale and a zero. For each class,
the command prints the mean of three measures, real and simulated, and the probability of a
two-sample Kolmogorov-Smirnov test.

With --find N instead, it fits N simulated images of each class, undisturbed, and prints how well χ²
alone tells substructure from smooth lenses: the AUC with its 95 % bootstrap interval. Then it
prints the AUC of an observer who is told which substructure an image may have, fits the lens, and
has to say whether the substructure is there. Its significance is what the best smooth lens leaves
of it, in σ of the photon noise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import functools
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import ks_2samp, norm
from tqdm import tqdm

from lib import many_lenses, options, raytracing
from lib.residuals import aucs_of
from lib.tables import with_interval

EXAMPLE = """examples:
  python experiments/smooth_fits.py --images real/common_test.npz
  python experiments/smooth_fits.py --find 300"""

CAMERA, SKY, EXPOSURE = many_lenses.CAMERA, many_lenses.SKY, many_lenses.EXPOSURE
COARSE = CAMERA._replace(pixels=50, pixel_scale=0.15, psf_radius=3)  # where fits look for their start
STARTS, ROUNDS = 3, 3  # best places of the coarse grid; fits, each with the noise of the one before
STEP = 1e-4  # of numerical derivatives, in units of TYPICAL
# θ_E, γ1, γ2, source x, y, and the ellipticity of the source (e1, e2), for which 0 is no edge.
TYPICAL = np.array([0.1, 0.05, 0.05, 0.05, 0.05, 0.1, 0.1])
LOWEST = np.array([0.5, -0.5, -0.5, -1.5, -1.5, -0.7, -0.7])
HIGHEST = np.array([2.2, 0.5, 0.5, 1.5, 1.5, 0.7, 0.7])
FREE = len(TYPICAL) + 2  # with scale and zero
CORNER = 20  # pixels a side of the dark corners
MEASURES = {"chi2": "reduced χ²", "rms": "rms of what is left", "corner": "noise in the corners"}


class Fit(NamedTuple):
    parameters: np.ndarray  # (7,) as in TYPICAL
    chi2: float  # reduced
    rms: float  # of the residual, in the image's unit
    corner: float  # rms of the residual in the corners, over the noise that they should have


def render(parameters, camera=CAMERA):
    """Smooth lenses (B, H, W) float64 of parameters (B, 7)."""
    theta_e, gamma1, gamma2, x, y, e1, e2 = np.atleast_2d(parameters).T
    c = np.hypot(e1, e2).clip(max=0.95)
    ratio, angle = (1 - c) / (1 + c), np.arctan2(e2, e1) / 2
    scene = many_lenses.scene_of(theta_e, gamma1, gamma2, torch.tensor(x), y, ratio, angle)
    return raytracing.render(scene, camera).numpy()


@functools.cache
def coarse_grid():
    """Parameters (n, 7) that fill the population, and their coarse images (n, 50, 50), without their means."""
    axes = (np.linspace(0.85, 1.65, 9), (0.05, 0.15, 0.25), (0.0,), np.linspace(-0.4, 0.4, 5),
            np.linspace(-0.4, 0.4, 5), (0.15,), (0.0,))  # fmt: skip
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    images = render(grid, COARSE)
    return grid, images - images.mean((1, 2), keepdims=True)


def starts_of(image):
    """The STARTS places of the coarse grid where a smooth lens is most like the image (150, 150)."""
    grid, images = coarse_grid()
    coarse = image.reshape(50, 3, 50, 3).mean((1, 3))
    likeness = (images * (coarse - coarse.mean())).sum((1, 2)) / np.sqrt((images**2).sum((1, 2)))
    return grid[np.argsort(-likeness)[:STARTS]]


def scaled(image, model, weight):
    """(s, s · model + zero) of the weighted least-squares fit to an image."""
    total = weight.sum()
    mean_model, mean = (weight * model).sum() / total, (weight * image).sum() / total
    centred = model - mean_model
    s = (weight * centred * (image - mean)).sum() / (weight * centred**2).sum()
    return s, s * centred + mean


def fit(image, error=0.0, edge=0):
    """The `Fit` of the smooth lens to an image (150, 150) that is scaled to its minimum and maximum.

    The image is s·k + zero, k ~ Poisson(100 · (lens + 0.1)), so that the variance of a pixel is
    s² · 100 · (lens + 0.1), and error² that of decoding. `edge` pixels at each border are left out.
    """
    inside = slice(edge, len(image) - edge)
    data = np.asarray(image, np.float64)[inside, inside]

    def models(parameters):
        return EXPOSURE * render(parameters)[:, inside, inside]

    def improved(start, weight):
        def residuals(parameters):  # (B, 7) -> (B, pixels)
            return np.stack([((data - one) * np.sqrt(weight)).ravel() for _, one in
                             (scaled(data, model, weight) for model in models(parameters))])  # fmt: skip

        def jacobian(parameters):
            moved = residuals(np.vstack([parameters, parameters + STEP * np.diag(TYPICAL)]))
            return ((moved[1:] - moved[0]) / (STEP * TYPICAL[:, None])).T

        return least_squares(lambda p: residuals(p)[0], start, jacobian, (LOWEST, HIGHEST),
                             x_scale=TYPICAL, xtol=1e-6, ftol=1e-6, max_nfev=40)  # fmt: skip

    # The first weights are those of the sky alone: bright pixels count too much, which is good for a start.
    weight = np.ones(data.shape)
    best = min((improved(start, weight) for start in starts_of(image)), key=lambda found: found.cost).x
    for _ in range(ROUNDS):
        (model,) = models(best)
        s, _ = scaled(data, model, weight)
        weight = 1 / (s**2 * (model + EXPOSURE * SKY) + error**2)
        best = improved(best, weight).x
    left = data - scaled(data, models(best)[0], weight)[1]
    pull = left * np.sqrt(weight)
    corners = np.concatenate([pull[:CORNER], pull[-CORNER:]])
    corners = np.concatenate([corners[:, :CORNER], corners[:, -CORNER:]])
    return Fit(best, (pull**2).sum() / (data.size - FREE), np.sqrt((left**2).mean()), np.sqrt((corners**2).mean()))


class Picture(NamedTuple):
    image: np.ndarray  # (150, 150)
    exact: bool
    error: float
    edge: int


def read(path):
    """{class name: list of `Picture`} of a file; UserError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = dict(archive)
        images, errors = (content[name if name in content else other] for name, other in
                          (("HR", "images"), ("hr_error", "error")))  # fmt: skip
        exact, edges = content["exact"], content["edge_unknown"]
    except Exception as error:  # numpy and zipfile raise many kinds
        raise UserError(f"{path}: no .npz file of such images, see --help: {error}") from None
    labels, side = content.get("labels", np.full(len(images), "no")), CAMERA.pixels
    if images.shape[1:] != (side, side) or {len(labels), len(errors), len(exact), len(edges)} != {len(images)}:
        raise UserError(f"{path}: expected images (N, {side}, {side}) and N of each other array")
    classes = defaultdict(list)
    for label, *own in zip(labels.tolist(), images, exact.tolist(), errors.tolist(), edges.tolist(), strict=True):
        classes[label].append(Picture(*own))
    if unknown := classes.keys() - set(many_lenses.CLASS_NAMES):
        raise UserError(f"{path}: unknown label {min(unknown)}; expected {', '.join(many_lenses.CLASS_NAMES)}")
    return classes


def rounded(images):
    """Images from 0 to 1 as pictures of 256 levels hold them: the middle of each level."""
    return (np.floor(256 * images).clip(0, 255) + 0.5) / 256


def simulated(class_name, count, seed, like):
    """`count` simulated `Picture`s, which are disturbed as those of the list `like` are."""
    rng = np.random.default_rng([seed, count])
    images = np.concatenate([images for _, images, _ in many_lenses.observed(class_name, count, seed)])
    found = []
    for i, image in enumerate(images.astype(np.float64)):
        own = like[i % len(like)]
        disturbed = rounded(image) if own.exact else image + own.error * rng.standard_normal(image.shape)
        found.append(own._replace(image=disturbed))
    return found


def fits_of(pictures):
    bar = tqdm(pictures, desc="smooth fits", unit="img", leave=False, disable=None)
    return [fit(picture.image, picture.error, picture.edge) for picture in bar]


def compared(real, others):
    """{measure: (mean, mean of the others, probability of a KS test)} of two lists of `Fit`."""
    return {name: (np.mean(one), np.mean(other), ks_2samp(one, other).pvalue) for name in MEASURES
            for one, other in [[[getattr(found, name) for found in fits] for fits in (real, others)]]}  # fmt: skip


def found_by_chi2(count, seed, resamples=1000):
    """How well χ² tells `count` simulated images of each class from smooth ones, as `residuals.aucs_of` says it."""
    undisturbed, names = Picture(None, False, 0.0, 0), many_lenses.CLASS_NAMES
    chi2 = [fit.chi2 for name in names for fit in fits_of(simulated(name, count, seed, [undisturbed]))]
    labels = np.repeat(np.arange(len(names)), count)
    return aucs_of(np.array(chi2), labels > 0, labels, names, resamples, seed)


def significances(class_name, count, seed):
    """How many σ (count,) the best smooth lens is away from `count` lenses of a class, without noise."""
    truths = np.concatenate([truths for _, _, truths in many_lenses.observed(class_name, count, seed)])
    bar = tqdm(truths.astype(np.float64), desc="fits without noise", unit="img", leave=False, disable=None)
    return np.sqrt([fit(truth).chi2 * (truth.size - FREE) for truth in bar])


def auc_when_told(significance):
    """AUC of the likelihood ratio of an observer who is told what to look for in each image.

    A substructure that would show with d σ gives a log-likelihood ratio of mean d²/2 where it is, -d²/2
    where it is not, and variance d² (Barrett, Abbey and Clarkson 1998, J. Opt. Soc. Am. A 15, 1520). The
    AUC is the mean over pairs of images, with substructure of d σ and without that of d' σ, of
    Φ(√(d² + d'²)/2).
    """
    square = np.square(significance)
    return norm.cdf(np.sqrt(square[:, None] + square) / 2).mean()


def found_when_told(count, seed):
    """{class: (`auc_when_told`, smallest, median and largest significance)} of `count` lenses of each class.

    "no" is the control: fits that end elsewhere than at the lens would show as significance.
    """
    of_class = {name: significances(name, count, seed) for name in many_lenses.CLASS_NAMES}
    return {name: (auc_when_told(own), own.min(), np.median(own), own.max()) for name, own in of_class.items()}


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--images", type=path_argument, metavar="NPZ", default=None, help="real images")
    group.add_argument("--find", type=int, metavar="N", default=None, help="simulated images a class that are fitted")
    parser.add_argument("--per-class", type=int, default=100, help="simulated images to compare with")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated images")
    args = options.parsed(parser, argv)
    if args.find is not None:
        options.refuse_unused(argv, ("per_class",), "--find says how many")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.find is not None:
        found = found_by_chi2(args.find, args.seed)
        for name, auc in {**found["classes"], "all": found["all"]}.items():
            print(f"{name} against {many_lenses.CLASS_NAMES[0]}, by χ² of the smooth fit: AUC {with_interval(auc, 4)}")
        for name, (auc, *significance) in found_when_told(args.find, args.seed).items():
            least, median, most = (f"{value:.3g}" for value in significance)
            print(f"{name}, told what to look for: AUC {auc:.6f}, significance {least} to {most} σ, median {median} σ")
        return
    for class_name, every in read(args.images).items():
        for exact in (True, False):
            pictures = [picture for picture in every if picture.exact == exact]
            if not pictures:
                continue
            others = fits_of(simulated(class_name, args.per_class, args.seed, pictures))
            kind = f"{class_name}, {len(pictures)} {'exact' if exact else 'solved'} pictures"
            for name, (mean, other, p) in compared(fits_of(pictures), others).items():
                print(f"{kind}: {MEASURES[name]} {mean:.4g}, simulated {other:.4g}, p = {p:.2g}", flush=True)


if __name__ == "__main__":
    run_main(main)
