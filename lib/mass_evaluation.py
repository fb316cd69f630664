"""What evaluate.py does with weights of --task mass: estimates of the test images beside their true masses."""

import numpy as np
import torch

from lib import compatibility, masses, plots, weights
from lib.errors import UserError
from lib.loader import batch_reader, in_batches
from lib.tables import with_interval

HEADER = ["run", "mean error, dex", "median error, dex", "intervals that hold the mass %", "mean width, dex", "images"]


def evaluate(args, opened, dataset, device):
    """What is measured of opened `Weights` {run: each}.

    Returns ({"intervals": how they were made, "results": {run: its measures}}, rows of the table as text, a function
    of `plots`, what it draws).
    Raises UserError as `compatibility.rows_to_evaluate` does, and if none of the images has a mass.
    """
    estimates = {
        name: estimates_of(each, dataset, device, args.split == "all") for name, each in opened.items()
    }
    results = {name: masses.results_of(*each, args.resamples, args.seed) for name, each in estimates.items()}
    intervals = f"95 %; errors: {args.resamples} bootstrap resamples, seed {args.seed}; shares: Wilson"
    best = min(results, key=lambda name: results[name]["error"]["value"])
    parts = results[best]["half_decades"]
    shares = {name: list(part["coverage"].values()) for name, part in parts.items()}
    drawn = (*estimates[best], shares, masses.COVERAGE)
    return {"intervals": intervals, "results": results}, table_of(results), plots.masses, drawn


def estimates_of(opened, dataset, device, whole):
    """(true log10 masses, estimates, low, high), each (n,), of the rows to evaluate that have a mass."""
    model = weights.network_of(opened, "mass").to(device)
    compatibility.check_size(opened.path, model, dataset)
    rows = compatibility.rows_to_evaluate(dataset, opened.content, whole)
    known = rows[[]] if dataset.masses is None else rows[np.isfinite(dataset.masses[rows])]
    if not len(known):
        raise UserError("none of the images to evaluate has the mass of an axion beside it")
    read = batch_reader(dataset.images, device, once=True)
    answers = in_batches(lambda batch: torch.stack(model(read(batch)), dim=1), known, bar="evaluation")
    return np.log10(dataset.masses[known]), *answers.numpy().astype(np.float64).T


def table_of(results):
    """Rows of text, the header first: each run on all images, and in each half decade."""

    def cells(name, result, error, median=""):
        share = with_interval(result["coverage"], 1, 100)
        return [name, error, median, share, f"{result['width']:.4f}", str(result["images"])]

    rows = [HEADER]
    for name, result in results.items():
        rows.append(cells(name, result, with_interval(result["error"], 4), f"{result['median_error']:.4f}"))
        for part, in_part in result["half_decades"].items():
            rows.append(cells(f"{name}, {part}", in_part, f"{in_part['error']['value']:.4f}"))
    return rows
