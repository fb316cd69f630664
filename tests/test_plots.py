"""lib/plots.py: a run keeps its colour, little data misleads nobody, and a phone shows the pictures."""

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.colors import to_hex

from experiments import results
from lib import plots, tasks
from predict import Answer


def draw_runs(runs):
    rates = np.array([0.0, 1.0])
    plots.roc_curves("roc", {run: {"a": (rates, rates, 0.5), "b": (rates, rates, 0.5)} for run in runs})
    plots.reliability("reliability", {run: [(0.5, 0.5, 3), (0.9, 0.9, 4)] for run in runs})
    plots.familiarity("familiarity", {run: np.array([0.1, 0.5]) for run in runs}, 0.01)


def colours(figure, run):
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {to_hex(line.get_color()) for line in lines if str(line.get_label()).split(" ")[0] == run}


def test_a_run_has_one_colour_whichever_others_are_drawn(drawn):
    found = set()
    for runs in (["residual"], ["head", "mine", "full", "residual"], ["residual", "theirs"]):
        draw_runs(runs)
        for figure in drawn.values():
            found |= colours(figure, "residual")
            every = [colour for run in runs for colour in colours(figure, run)]
            assert len(every) == len(set(every)) == len(runs)
    assert len(found) == 1


@pytest.mark.parametrize("auc", [0.99974, 1.0])
def test_one_validation_has_its_figures_in_words_and_no_axis_far_above_one(drawn, auc):
    line = {"epoch": 1.0, "train_loss": 0.5, "validation_loss": 0.25, "train_accuracy": 0.75,
            "validation_accuracy": 0.875, "validation_macro_auc": auc}  # fmt: skip
    plots.curves("curves", [line], tasks.CLASS_CURVES)
    loss, accuracy, macro = drawn["curves"].axes
    texts = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (loss, accuracy, macro)]
    assert texts == [["train 0.5", "validation 0.25"], ["train 0.75", "validation 0.875"], [f"validation {auc:g}"]]
    assert [[text.get_text() for text in axes.texts] for axes in (loss, accuracy, macro)] == [
        ["0.5", "0.25"], ["0.75", "0.875"], [f"{auc:g}"]
    ]  # fmt: skip
    assert all("no curve" in axes.get_title() for axes in (loss, accuracy, macro))
    for axes in (accuracy, macro):
        assert 1 < axes.get_ylim()[1] <= 1.05
        assert axes.get_xlim()[0] == 0


def is_seen(axes):
    """Whether all points of the lines lie inside the axes, on a scale that can show them."""
    axes.figure.canvas.draw()
    points = np.concatenate([axes.transData.transform(line.get_xydata()) for line in axes.get_lines()])
    return np.isfinite(points).all() and axes.bbox.expanded(1.01, 1.01).count_contains(points) == len(points)


@pytest.mark.parametrize("validations", [1, 2, 10])
def test_every_curve_lies_inside_its_axes_whatever_its_sign_and_range(drawn, validations):
    """A negative log-likelihood was drawn on a logarithmic axis, and errors in dex as shares up to one: both were
    empty."""
    steps = np.arange(1, validations + 1)
    figures = {"loss": 2 - 3 * steps, "error": 0.2 / steps**2, "psnr": 42 + 0.01 * steps, "accuracy": 1 - 0.1 / steps,
               "macro_auc": 1 - 0.01 / steps}  # fmt: skip
    history = [{"epoch": float(step), **{f"{part}_{name}": float(values[step - 1]) for name, values in figures.items()
                                         for part in ("train", "validation")}} for step in steps]  # fmt: skip
    for panels in (tasks.MASS_CURVES, tasks.SHARP_CURVES, tasks.CLASS_CURVES):
        plots.curves("curves", history, panels)
        assert all(is_seen(axes) for axes in drawn["curves"].axes), panels
        assert drawn["curves"].get_figwidth() <= 5.4
        plt.close("all")


def test_the_loss_of_sharpening_is_drawn_in_its_one_unit(drawn):
    """Training gives it in units of what interpolation leaves, validation as it is."""
    history = [{"epoch": float(i), "train_loss": 0.9, "validation_loss": 6e-5, "validation_psnr": 42.0} for i in (1, 2)]
    plots.curves("curves", history, tasks.SHARP_CURVES)
    assert [len(axes.get_lines()) for axes in drawn["curves"].axes] == [1, 1]
    assert drawn["curves"].axes[0].get_yscale() == "linear"


def test_the_pictures_of_a_report_fit_a_narrow_screen(drawn):
    draw_runs(["full", "residual"])
    plots.confusion_matrices("confusion", {run: np.eye(2, dtype=int) for run in "abcd"}, ["a", "b"])
    image = np.ones((12, 8, 8))
    plots.mistakes("mistakes", image, [(i, 0, 1, 0.9) for i in range(12)], ["a", "b"])
    plots.residual_maps("maps", image, image, 1.0, ["a"] * 12)
    answers = [Answer("a.npy", one[None], np.array([0.5, 0.5]), "a", None, None) for one in image]
    for count, residual_map in ((12, image[0]), (12, None), (1, image[0])):
        shown = [answer._replace(residual_map=residual_map) for answer in answers[:count]]
        plots.contact_sheet(f"sheet {count} {residual_map is None}", shown, ["a", "b"], 1.0)
    masses = np.linspace(-24, -22, 9)
    plots.masses("masses", masses, masses, masses - 1, masses + 1, {"-24 to -22": (0.9, 0.8, 0.95)}, 0.9)
    for figure in drawn.values():
        assert figure.get_figwidth() <= plots.WIDTH  # inches, in which titles have 8 points and more
        titles = [axes.title for axes in figure.axes if axes.get_title()]
        assert all(title.get_fontsize() >= 8 for title in titles)


def test_the_page_draws_maps_in_the_colours_of_the_sheet():
    script = (ROOT / "examples" / "web" / "table.mjs").read_text()
    number = {name: json.loads(value) for name, value in re.findall(r"const ([A-Z_]+) = (.+?);", script[:2000])
              if name in ("LINEAR_SIGMAS", "MOST_SIGMAS", "TICKS")}  # fmt: skip
    assert number == {"LINEAR_SIGMAS": plots.LINEAR_SIGMAS, "MOST_SIGMAS": plots.MOST_SIGMAS,
                      "TICKS": list(plots.TICKS)}  # fmt: skip


def test_dots_of_groups_have_a_panel_each_and_are_read_on_a_phone(drawn):
    aucs = {"AUC one": (0.9, 0.01), "AUC two": (1.0, 0.0)}
    kinds = {f"a kind of image with a long name, {i}": aucs for i in range(9)}
    results.dots("dots", {f"{group}: {name}": figures for group in ("full", "residual")
                        for name, figures in ({"clean": {}} | kinds).items()})  # fmt: skip
    figure = drawn["dots"]
    assert [panel.get_title() for panel in figure.axes] == ["full", "residual"]
    for panel in figure.axes:
        assert [label.get_text() for label in panel.get_yticklabels()] == list(kinds)
    assert figure.get_figwidth() <= plots.WIDTH
    figure.canvas.draw()
    assert all(panel.get_position().width > 0.3 for panel in figure.axes)  # labels and legend leave room for marks
