"""A few images and PyTorch's answers to them, as text inside an exported file; numpy alone.

Whoever opens the file compares its runtime's answers with them. That reveals whatever changes them:
8-bit sums that saturate, products of 11 bits on a GPU, an error of the runtime, a damaged file.
"""

import base64
import json
import math
import zlib

import numpy as np

KEY = "known_answers"  # of the metadata
MOST_IMAGES = 3
MOST_CHARACTERS = 60_000
LARGEST_SIDE = 160  # pixels a side that are stored of a larger image; they are repeated to its size
MOST_NUMBERS = 256  # that are stored of one answer
# Largest `difference` on another machine, by precision and output. export.py allows less on its own.
TOLERANCES = {
    "float32": {"probabilities": 1e-3, "familiarity": 0.05, "residual": 1e-3, "score": 1e-3,
                "log10_mass": 1e-3, "low": 1e-3, "high": 1e-3, "sharpened": 1e-3, "rms_error": 1e-3},  # relative
    "float16": {"probabilities": 0.05, "familiarity": 0.05},
    "int8": {"probabilities": 0.2, "familiarity": 0.05},
}


def storable(images):
    """Images (n, 1, H, H) as they are after they were stored: float32, rounded to 11 bits."""
    unit, pixels = _rounded(images)
    return _restored(pixels, unit, images.shape[-1])


def text_of(images, answers):
    """The text for images (n, 1, H, H) of `storable` and {output: answers (n, ...)}.

    It holds at most MOST_IMAGES of them, and fewer if they are large.
    """
    for count in range(min(MOST_IMAGES, len(images)), 0, -1):
        unit, pixels = _rounded(images[:count])
        kept = {name: _text(_thinned(answer[:count])) for name, answer in answers.items()}
        content = {"images": _text(pixels), "count": count, "unit": unit, "answers": kept}
        text = json.dumps(content)
        if len(text) <= MOST_CHARACTERS:
            break
    return text


def read(text, side):
    """(images (n, 1, side, side), {output: numbers (n, k) of its answers}) of a text of `text_of`.

    Raises ValueError, KeyError or TypeError for another text.
    """
    if len(text) > 2 * MOST_CHARACTERS:
        raise ValueError("the known answers are too long")
    content = json.loads(text)
    count, unit, stored_side = content["count"], float(content["unit"]), -(-side // _step(side))
    if not 0 < count <= MOST_IMAGES or not math.isfinite(unit):
        raise ValueError("no known answers where the metadata has some")
    pixels = _array(content["images"], "<f2", count * stored_side**2)
    images = _restored(pixels.reshape(count, stored_side, stored_side), unit, side)
    answers = {
        name: _array(kept, "<f4", count * MOST_NUMBERS, exactly=False).reshape(count, -1)
        for name, kept in content["answers"].items()
    }
    return images, answers


def thinned(answers):
    """What is stored of {output: answers (n, ...)}."""
    return {name: _thinned(np.asarray(answer)) for name, answer in answers.items()}


def differences(right, got, steps=None):
    """{output: `difference`} between right answers {output: (n, ...)} and those of a runtime.

    A familiarity is a rank among the images of the predicted class, so it is compared where the
    classes agree. They may differ where two are nearly as probable. It may differ by `steps` (n,).
    """
    apart = {name: difference(got[name], answer) for name, answer in right.items() if name != "familiarity"}
    if "familiarity" in right:
        same = right["probabilities"].argmax(axis=1) == got["probabilities"].argmax(axis=1)
        allowed = 0 if steps is None else steps[same]
        apart["familiarity"] = difference(got["familiarity"][same], right["familiarity"][same], allowed)
    return apart


def difference(got, right, allowed=0):
    """Largest difference of two arrays beyond `allowed`; of numbers above one, relative to the largest that is right.

    Infinite if they cannot be compared.
    """
    if got.shape != right.shape:
        return math.inf
    if not got.size:
        return 0.0
    largest = float(np.maximum(np.abs(got - right) - allowed, 0).max()) / max(1.0, float(np.abs(right).max()))
    return math.inf if math.isnan(largest) else largest


def _step(side):
    """Every how many pixels one is stored."""
    return -(-side // LARGEST_SIDE)


def _rounded(images):
    """(unit, pixels (n, h, h) float16) of images (n, 1, H, H)."""
    largest = float(np.abs(images).max())
    unit = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
    step = _step(images.shape[-1])
    return unit, (images[:, 0, ::step, ::step].astype(np.float64) / unit).astype("<f2")


def _restored(pixels, unit, side):
    step = _step(side)
    images = (pixels.astype(np.float64) * unit).astype(np.float32)
    images = images.repeat(step, axis=1).repeat(step, axis=2)[:, :side, :side]
    return np.ascontiguousarray(images[:, None])


def _thinned(answer):
    """Evenly spaced numbers (n, k) of an answer (n, ...), at most MOST_NUMBERS of each image."""
    flat = answer.reshape(len(answer), -1).astype("<f4")
    step = -(-flat.shape[1] // MOST_NUMBERS) | 1  # odd, so that it meets every column of a map
    return flat[:, ::step]


def _text(array):
    # Bytes of one kind beside each other compress better.
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _array(text, dtype, numbers, exactly=True):
    size = np.dtype(dtype).itemsize
    content = zlib.decompressobj().decompress(base64.b64decode(text), numbers * size + 1)
    if len(content) > numbers * size or (exactly and len(content) < numbers * size):
        raise ValueError("another number of known answers")
    return np.frombuffer(content, np.uint8).reshape(size, -1).T.copy().view(dtype)[:, 0]
