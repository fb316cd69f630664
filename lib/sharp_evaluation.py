"""What evaluate.py does with weights of --task sharpen: sharp images of the test part beside the true ones."""

import math

import numpy as np
import torch
from scipy.ndimage import uniform_filter

from lib import compatibility, metrics, pairs, plots, weights
from lib.errors import UserError
from lib.loader import EVALUATION_BATCH
from lib.simulated import truth_of
from lib.tables import with_interval
from mae import noise_from, reduction_matrices

HEADER = ["run", "mean MSE", "PSNR, dB", "below the ceiling, dB", "PSNR of the mean MSE, dB", "SSIM", "images"]
SSIM_WINDOW = 7  # pixels
SKY = 1e-3  # variance of the noise without light, in that of a pixel of one; about a count of 800
SHOWN_PAIRS = 3


def evaluate(args, opened, dataset, device):
    """What is measured of opened `Weights` {run: each}, as `mass_evaluation.evaluate` gives it.

    Raises UserError as `compatibility.rows_to_evaluate` does, and if the runs are not tested on the same pairs.
    """
    coarse = pairs.coarse_of(dataset)
    whole = args.split == "all"
    every = {name: compatibility.rows_to_evaluate(coarse, each.content, whole) for name, each in opened.items()}
    rows = next(iter(every.values()))
    if any(not np.array_equal(rows, other) for other in every.values()):
        raise UserError("--weights: they are not tested on the same images: give one of them")
    models = {name: weights.network_of(each, "sharpen").to(device) for name, each in opened.items()}
    for name, model in models.items():
        compatibility.check_size(opened[name].path, model, coarse)
    errors = measured(models, dataset, coarse, rows, device)
    results = {name: summary(each, args) for name, each in errors.items()}
    best = min(models, key=lambda name: results[name]["mse"])
    shown = pictures(models[best], dataset, coarse, rows[:SHOWN_PAIRS], device)
    intervals = f"95 %: {args.resamples} bootstrap resamples, seed {args.seed}"
    return {"intervals": intervals, "results": results}, table_of(results), plots.sharpened, shown


@torch.no_grad()
def measured(models, dataset, coarse, rows, device):
    """{run or reference: {"mse", "ssim" and, of a run, "rms_error": (n,)}} of the pairs in `rows`.

    References are both interpolations and, of simulated pairs, the noise-free truth and the ceiling.
    """
    by_name = {}
    for start in range(0, len(rows), EVALUATION_BATCH):
        batch = rows[start : start + EVALUATION_BATCH]
        seen = torch.from_numpy(np.array(coarse.images[batch])).unsqueeze(1)
        sharp = np.array(dataset.images[batch])
        answers = {}
        for name, model in models.items():
            images, errors = (answer.cpu().numpy() for answer in model(seen.to(device)))
            answers[name] = images[:, 0], errors
        answers |= references(seen, dataset, batch)
        for name, (images, *errors) in answers.items():
            parts = by_name.setdefault(name, {"mse": [], "ssim": [], "rms_error": []})
            parts["mse"].append(np.square(images - sharp, dtype=np.float64).mean(axis=(1, 2)))
            parts["ssim"].append([ssim(*pair) for pair in zip(images, sharp, strict=True)])
            parts["rms_error"] += errors
    return {
        name: {key: np.concatenate(each) for key, each in parts.items() if each}
        for name, parts in by_name.items()
    }


def references(seen, dataset, rows):
    """{name: (images (n, H, H),)} that need no network, of coarse images (n, 1, h, h) in `rows`."""
    factor = dataset.img_size // seen.shape[-1]
    images = {
        mode: (pairs.interpolated(seen, factor, mode)[:, 0].numpy(),) for mode in ("bilinear", "bicubic")
    }
    truth = truth_of(dataset.origin, rows)
    if truth is not None and dataset.coarse is None:
        images["noise-free truth"] = (truth,)
        images["ceiling"] = (ceiling(torch.from_numpy(truth), seen[:, 0], factor).numpy(),)
    return images


def ceiling(truth, coarse, factor):
    """The best estimate of sharp images (n, H, H) with photon noise, from the truth and the coarse ones (n, h, h)."""
    b, g = reduction_matrices(coarse.shape[-1], factor)
    variance = 1 + truth.clamp_min(0) / SKY
    return truth + noise_from(coarse - b @ truth @ b.T, variance, b, g)


def ssim(image, other):
    """Structural similarity of two images (H, W) at a data range of one, as scikit-image has it by default.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", with a uniform
    window of 7 pixels, the sample covariance, and without the border of 3 pixels.
    """
    x, y = image.astype(np.float64), other.astype(np.float64)
    pixels = SSIM_WINDOW**2
    mean_x, mean_y = uniform_filter(x, SSIM_WINDOW), uniform_filter(y, SSIM_WINDOW)

    def covariance(a, mean_a, b, mean_b):
        return pixels / (pixels - 1) * (uniform_filter(a * b, SSIM_WINDOW) - mean_a * mean_b)

    c1, c2 = 0.01**2, 0.03**2
    xx, yy = covariance(x, mean_x, x, mean_x), covariance(y, mean_y, y, mean_y)
    xy = covariance(x, mean_x, y, mean_y)
    similarity = (2 * mean_x * mean_y + c1) * (2 * xy + c2) / ((mean_x**2 + mean_y**2 + c1) * (xx + yy + c2))
    border = SSIM_WINDOW // 2
    return similarity[border:-border, border:-border].mean()


def summary(measured, args):
    """The results of what `measured` gives; PSNR with a bootstrap interval, at a data range of one."""
    mse = np.maximum(measured["mse"], 1e-30)
    psnr = -10 * np.log10(mse)
    (interval,) = metrics.bootstrap(lambda counts: [counts @ psnr / counts.sum()], np.zeros(len(psnr), int),
                                    args.resamples, args.seed)  # fmt: skip
    result = {"mse": float(mse.mean()), "psnr": metrics.with_bounds(psnr.mean(), interval),
              "psnr_of_mean": -10 * math.log10(mse.mean()), "ssim": float(measured["ssim"].mean()),
              "images": len(mse)}  # fmt: skip
    if "rms_error" in measured:
        ratio = np.sqrt(mse) / np.maximum(measured["rms_error"], 1e-30)
        result["rms_error"] = {"true_over_estimated": float(ratio.mean()), "spread": float(ratio.std())}
    return result


def table_of(results):
    """Rows of text, the header first."""
    rows = [HEADER]
    for name, result in results.items():
        psnr = with_interval(result["psnr"], 3)
        below = f"{results['ceiling']['psnr']['value'] - result['psnr']['value']:.3f}" if "ceiling" in results else ""
        rows.append([name, f"{result['mse']:.4e}", psnr, below, f"{result['psnr_of_mean']:.3f}",
                     f"{result['ssim']:.4f}", str(result["images"])])  # fmt: skip
    return rows


@torch.no_grad()
def pictures(model, dataset, coarse, rows, device):
    """(coarse (n, h, h), ours, sharp (n, H, H), (sharp - ours)/σ of its noise) of some pairs.

    σ is that of photon noise whose mean square is the estimated error.
    """
    seen = torch.from_numpy(np.array(coarse.images[rows])).unsqueeze(1).to(device)
    images, errors = model(seen)
    variance = model.clean(seen).clamp_min(0) + SKY
    sigma = errors[:, None, None, None] * (variance / variance.mean(dim=(1, 2, 3), keepdim=True)).sqrt()
    small, ours, sigma = (each[:, 0].cpu().numpy() for each in (seen, images, sigma))
    sharp = np.array(dataset.images[rows])
    return small, ours, sharp, (sharp - ours) / sigma
