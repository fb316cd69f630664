"""The picture of some predictions: which are on it, and how it is drawn; matplotlib only draws."""

import heapq
import os
import warnings

import numpy as np

from lib.errors import UserError, reason_of
from lib.guard import UNFAMILIAR

ORDERS = {
    "prediction": "some of each prediction",
    "confidence": "the most confident first",
    "doubt": "the least confident first",
    "substructure": "the largest residuals first",
    "familiarity": "the least familiar first",
    "random": "drawn at random",
}


class Choice:
    """Keeps the `most` answers (`predict.Answer`) that come first in an order of ORDERS.

    Of equal answers it keeps the earlier one. The random numbers depend on the number of answers before.
    """

    def __init__(self, order, most):
        self.order, self.most, self.offered = order, most, 0
        self.rng = np.random.default_rng(0)
        self.heaps = {}  # {prediction, or None for all: heap of (rank, answer)}

    def offer(self, answer):
        self.offered += 1
        rank = self._rank(answer), -self.offered
        heap = self.heaps.setdefault(answer.prediction if self.order == "prediction" else None, [])
        if self.most and (len(heap) < self.most or rank > heap[0][0]):
            own = {name: getattr(answer, name) for name in ("image", "residual_map")}  # views of the whole batch
            own = {name: None if view is None else view.copy() for name, view in own.items()}
            heapq.heappush(heap, (rank, answer._replace(**own)))
            if len(heap) > self.most:
                heapq.heappop(heap)

    def _rank(self, answer):
        """Answers of a larger rank come earlier."""
        if self.order in ("prediction", "random"):
            return self.rng.random()
        if self.order == "substructure":
            return float(answer.residual)
        if self.order == "familiarity":
            return -float(answer.familiarity)
        confidence = float(answer.probabilities.max())
        return answer.prediction != UNFAMILIAR, confidence if self.order == "confidence" else -confidence

    def answers(self):
        """The chosen answers, in order; with "prediction" as many of each as there is room for."""
        sorted_heaps = [sorted(heap, key=lambda entry: entry[0], reverse=True) for heap in self.heaps.values()]
        turns = [(turn, kind) for kind, heap in enumerate(sorted_heaps) for turn in range(len(heap))]
        kept = sorted(turns)[: self.most]
        return [sorted_heaps[kind][turn][1] for turn, kind in sorted(kept, key=lambda pair: (pair[1], pair[0]))]


def require_drawable(path):
    """UserError if there is no matplotlib, or if it draws no files with this suffix."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UserError("--sheet needs matplotlib: pip install matplotlib") from None
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--sheet {path}: give it the suffix of a picture, such as .png")


def draw(path, answers, class_names, sigma, pixel_scale):
    """Draw the answers; returns None, or why that failed.

    sigma : see `plots.contact_sheet`.
    pixel_scale : arcsec, None if unknown.
    """
    from lib import plots

    labelled = [answer._replace(name=os.path.basename(answer.name)) for answer in answers]
    try:
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks
        plots.contact_sheet(path, labelled, class_names, sigma, pixel_scale)
    except Exception as error:  # matplotlib raises many kinds
        return f"--sheet {path}: cannot be drawn: {reason_of(error)}"
    return None
