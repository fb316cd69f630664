"""The sheet of predictions: which are on it, in which order, in which colours."""

import numpy as np
import pytest
from conftest import ROOT, assert_refused

from lib import plots, sheet
from lib.guard import UNFAMILIAR
from predict import Answer

SIDE = 8


def answer(name, confidence, prediction="a", familiarity=0.5, residual=1.0):
    image = np.zeros((1, SIDE, SIDE), np.float32)
    return Answer(name, image, np.array([confidence, 1 - confidence]), prediction, familiarity, residual)


ANSWERS = [answer("sure", 0.9), answer("surest", 1.0, residual=3.0), answer("less", 0.6, "b", familiarity=0.02),
           answer("strange", 1.0, UNFAMILIAR, familiarity=0.001, residual=9.0), answer("last", 0.9)]  # fmt: skip


def chosen(order, most, answers=ANSWERS):
    choice = sheet.Choice(order, most)
    for one in answers:
        choice.offer(one)
    return [one.name for one in choice.answers()]


def test_a_chosen_answer_does_not_keep_its_whole_batch():
    batch = np.zeros((9, SIDE, SIDE))
    choice = sheet.Choice("confidence", 1)
    choice.offer(answer("one", 1.0)._replace(image=batch[:1], residual_map=batch[0]))
    (kept,) = choice.answers()
    assert not any(np.shares_memory(batch, own) for own in (kept.image, kept.residual_map))


@pytest.mark.parametrize(("order", "names"), [
    ("confidence", ["surest", "sure", "last", "less", "strange"]), ("doubt", ["less", "sure", "last"]),
    ("substructure", ["strange", "surest", "sure"]), ("familiarity", ["strange", "less", "sure"]),
])  # fmt: skip
def test_the_order_is_the_one_that_was_asked_for_and_of_equals_the_first_counts(order, names):
    for most in range(1, len(names) + 1):
        assert chosen(order, most) == names[:most]


def test_by_default_every_prediction_is_on_the_sheet():
    """Of hundreds of images with probability 1 all 16 that were shown had one class."""
    many = [answer(f"{i}", 1.0, kind) for i, kind in enumerate("a" * 300 + "b" * 2)]
    many.append(answer("x", 1.0, UNFAMILIAR))
    kinds = [many[int(name)].prediction if name != "x" else "x" for name in chosen("prediction", 16, many)]
    assert kinds == ["a"] * 13 + ["b"] * 2 + ["x"]
    names = chosen("random", 16, many)
    assert len(set(names)) == 16 and names == chosen("random", 16, many)
    assert names != [str(i) for i in range(16)]


def test_one_bad_image_does_not_blank_the_maps_of_the_others(drawn):
    maps = np.stack([np.full((SIDE, SIDE), size) for size in (0.1, 0.2, 1000.0)])
    answers = [answer("x" * 40 + f"{i}.npy", 1.0)._replace(residual_map=own) for i, own in enumerate(maps)]
    for name, sigma in {"known": 0.1, "unknown": None}.items():
        plots.contact_sheet(name, answers, ["a", "b"], sigma, 0.1)
        images = [panel.images[0] for panel in drawn[name].axes if panel.images][1::2]
        in_sigma = [image.get_array()[0, 0] for image in images]
        assert np.allclose(in_sigma, np.array([0.1, 0.2, 1000]) / (sigma or 0.2))
        assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(-plots.MOST_SIGMAS, plots.MOST_SIGMAS)}
    titles = [panel.get_title() for panel in drawn["known"].axes]
    assert all(any(title.startswith("x") and f"{i}.npy" in title for title in titles) for i in range(3))
    bar = drawn["known"].axes[0].lines[0]
    assert np.ptp(bar.get_xdata()) == pytest.approx(10)  # pixels of 0.1 arcsec


def test_a_sheet_of_what_is_not_there_is_refused(runs, tmp_path):
    assert_refused("predict.py", ["--model", runs / "classifier.onnx", "--out", tmp_path / "p.csv", "--sheet",
                                  tmp_path / "s.png", "--sheet-by", "substructure", ROOT], "--maps")  # fmt: skip
