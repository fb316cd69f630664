"""How well an exported file sharpens real pairs of Specific Test VI.B, beside interpolation.

The pairs are an .npz with HR (N, 2H, 2H), LR (N, H, H) and edge_unknown (N,): so many pixels of HR
at each border are not known. They are replaced by their neighbours, LR is reduced again, and no
measure counts them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # which python -P leaves out
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import numpy as np
import torch

from experiments.real_images import with_known_edges
from lib import options, pairs, tables
from lib.onnxfile import open_sharpener, run_model
from lib.sharp_evaluation import ssim

EXAMPLE = "example: python experiments/real_pairs.py --model runs/sharpen.onnx --pairs pairs.npz"
REACH = 2  # pixels that the reduction of an unknown one, or its interpolation, changes beside it


def load_pairs(path):
    """(sharp images (N, 2H, 2H), coarse ones (N, H, H), pixels to leave out at each border (N,)); UserError."""
    try:
        with np.load(path) as content:
            sharp, coarse, edges = (content[name] for name in ("HR", "LR", "edge_unknown"))
        sharp, coarse = with_known_edges(sharp.astype(np.float32), edges), coarse.astype(np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} has no pairs HR, LR and edge_unknown: {error}") from None
    edges = edges.astype(np.int64)
    for i in np.flatnonzero(edges):
        coarse[i] = pairs.reduced(torch.from_numpy(sharp[i])).numpy()
    return sharp, coarse, np.where(edges > 0, edges + REACH, 0)


def measures_of(images, sharp, edges):
    """(mean MSE, mean PSNR, PSNR of the mean MSE, mean SSIM) without the borders."""
    inner = [(slice(edge, -edge or None),) * 2 for edge in edges]
    known = [(a[i], b[i]) for a, b, i in zip(images, sharp, inner, strict=True)]
    errors = np.array([np.square(a - b, dtype=np.float64).mean() for a, b in known])
    alike = [ssim(a, b) for a, b in known]
    return errors.mean(), -10 * np.log10(errors).mean(), -10 * np.log10(errors.mean()), np.mean(alike)


def compare(model, path):
    """{what: `measures_of` all pairs, and of those without an unknown border}, true over estimated rms error."""
    sharp, coarse, edges = load_pairs(path)
    session, side = open_sharpener(model)
    if coarse.shape[1:] != (side, side):
        raise UserError(f"{model} is for images of {side} pixels, the pairs have {coarse.shape[1]}")
    images, errors = run_model(session, coarse[:, None], model)
    seen = torch.from_numpy(coarse)[:, None]
    found = {"ours": images[:, 0]}
    found |= {mode: pairs.interpolated(seen, 2, mode)[:, 0].numpy() for mode in ("bilinear", "bicubic")}
    true = np.sqrt([measures_of(*each)[0] for each in zip(images, sharp[:, None], edges[:, None], strict=True)])
    whole = edges == 0
    measures = {name: measures_of(each, sharp, edges) for name, each in found.items()}
    beside = f"{whole.sum()} without an unknown border"
    measures |= {f"{name}, {beside}": measures_of(each[whole], sharp[whole], edges[whole])
                for name, each in found.items()}  # fmt: skip
    return measures, float((true / errors).mean())


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=path_argument, required=True, help="file of export.py --what sharpen")
    parser.add_argument("--pairs", type=path_argument, required=True, help=".npz of real pairs")
    return options.parsed(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    measures, ratio = compare(args.model, args.pairs)
    rows = [["", "mean MSE", "PSNR, dB", "PSNR of the mean MSE, dB", "SSIM"]]
    rows += [[name, f"{a:.4e}", f"{b:.3f}", f"{c:.3f}", f"{d:.4f}"] for name, (a, b, c, d) in measures.items()]
    print(tables.markdown(rows))
    print(f"true over estimated rms error: {ratio:.3f} in the mean")


if __name__ == "__main__":
    run_main(main)
