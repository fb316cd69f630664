"""Which images an exported classifier answers, which it refuses, and why; numpy alone."""

import json
import math
from typing import NamedTuple

import numpy as np

LEAST_FAMILIARITY = 0.01  # below it an image is unlike the training images
UNFAMILIAR = "unfamiliar"  # the prediction for such an image
ANY_PIXELS = (-math.inf, math.inf, -math.inf)


class Guard(NamedTuple):
    """Refuses images that are unlike the training images.

    calibration : number of validation images that calibrated the familiarity, 0 if it is unknown;
        None of a classifier without familiarity.
    least_familiarity : images of less are refused.
    pixel_range : (low, high, faintest) of the training images, see `traits.pixel_range`. It decides
        where the familiarity cannot refuse.
    """

    calibration: int | None
    least_familiarity: float = LEAST_FAMILIARITY
    pixel_range: tuple = ANY_PIXELS

    @classmethod
    def of(cls, session, least_familiarity=LEAST_FAMILIARITY):
        """The guard of an opened classifier, see `onnxfile.open_classifier`."""
        metadata = session.get_modelmeta().custom_metadata_map
        calibration = None
        if len(session.get_outputs()) > 1:
            try:
                calibration = int(metadata["familiarity_images"])
            except (KeyError, ValueError):  # of an older version
                calibration = 0
        return cls(calibration, least_familiarity, _pixel_range_of(metadata.get("pixel_range", "null")))

    @property
    def can_refuse(self):
        """Whether any image can be less familiar: among n images the least is 1/(1 + n)."""
        images = self.calibration or 0
        return images > 0 and 1 / (1 + images) < self.least_familiarity

    def answers(self, predicted, familiarity):
        """Which images are answered, (n,) bool, from their predicted classes and familiarity (n,).

        Familiarities are compared in float32, so that equal numbers are equal.
        """
        if not self.can_refuse:
            return np.ones(len(predicted), bool)
        return familiarity >= np.float32(self.least_familiarity)

    def readable(self, images, errors):
        """Pass on the images, tuples (name, image, ...), that may be classified.

        Where the familiarity cannot refuse, those outside the range of pixels are appended to
        `errors`, [(name, reason)].
        """
        low, high, faintest = self.pixel_range
        for each in images:
            name, image = each[:2]
            smallest, largest = float(image.min()), float(image.max())
            if self.can_refuse or (low <= smallest and faintest <= largest <= high):
                yield each
                continue
            reason = (
                f"pixels from {smallest:.3g} to {largest:.3g}, far outside those of the training images "
                f"(accepted: from {low:.3g} to {high:.3g}, the brightest above {faintest:.3g}): another "
                "unit (predict.py --scale), sentinel values, hot pixels or a blank image?"
            )
            errors.append((name, f"{name}: {reason}"))

    def weakness(self, path):
        """One line on why the classifier at `path`, which cannot refuse, refuses no image by its familiarity."""
        if self.calibration is None:
            reason = f"{path} gives no familiarity (fewer than 100 validation images, or an old file)"
        elif self.least_familiarity == 0:
            reason = "--least-familiarity 0"
        else:
            least = f"{self.least_familiarity:g}"
            reason = f"{path} was calibrated on too few images to refuse any below {least}"
        left = "only the range of pixels" if math.isfinite(self.pixel_range[1]) else "nothing"
        return f"{reason}: {left} guards against images unlike the training images"


def _pixel_range_of(text):
    """The range that the metadata of a file states; ANY_PIXELS if it states none that can be used."""
    try:
        low, high, faintest = map(float, json.loads(text))
    except (TypeError, ValueError, RecursionError, OverflowError):
        return ANY_PIXELS
    return (low, high, faintest) if low <= high and faintest <= high else ANY_PIXELS
