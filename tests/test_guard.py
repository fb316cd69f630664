"""lib/guard.py: which images are refused, and what is said where none can be."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.guard import ANY_PIXELS, Guard

PREDICTED = np.array([0, 1, 2, 0])


def session(outputs=2, **metadata):
    """What `Guard.of` asks of an onnxruntime session."""
    return SimpleNamespace(get_outputs=lambda: [None] * outputs,
                           get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=metadata))  # fmt: skip


def test_an_image_exactly_at_the_limit_is_answered():
    familiarity = np.array([0.00999, 0.01, 0.5, np.nan], np.float32)
    assert Guard(600).answers(PREDICTED, familiarity).tolist() == [False, True, True, False]


def test_the_least_familiarity_of_all_is_refused():
    guard = Guard(100)
    assert guard.can_refuse
    assert not guard.answers(PREDICTED, np.full(4, 1 / 101, np.float32)).any()


@pytest.mark.parametrize("stated", ["", "null", "[1, 2]", "[[1], 2, 3]", "{}", "[" * 9,
                                    "[" * 10**5, f"[0, {9 * 10**400}, 1]", "[NaN, NaN, NaN]"])  # fmt: skip
def test_a_file_with_unreadable_metadata_has_no_bounds(stated):
    guard = Guard.of(session(familiarity_images="many", pixel_range=stated))
    assert (guard.calibration, guard.pixel_range) == (0, ANY_PIXELS)
    assert Guard.of(session(outputs=1, familiarity_images="600")).calibration is None
