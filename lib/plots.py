"""Every picture of the project; nothing here computes a result."""

import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # another value may be for a notebook, or unknown
import matplotlib

matplotlib.use("Agg")  # no window: machines without a screen, and whoever has imported it before

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import AsinhNorm

from lib.errors import one_line, reason_of
from lib.files import CREATOR, atomic_write
from lib.traits import typical_rms

LONGEST_LABEL = 80
WITH_METADATA = (".png", ".pdf", ".svg", ".eps", ".ps")  # other formats cannot say who made them
RESIDUAL = "residual (image − prediction), in the network's scale"
SIGMAS = "residual (image − prediction), in σ of smooth lenses"
SHARES = ("accuracy", "macro_auc")  # figures of a training that are 1 at best
WIDE = 3  # ratio of the largest to the smallest figure from which curves are logarithmic
MOST_SIGMAS, LINEAR_SIGMAS = 100, 3  # where the colours of a map end, and up to where they are linear
TICKS = (-MOST_SIGMAS, -20, -5, 0, 5, 20, MOST_SIGMAS)

WIDTH = 5.4  # inches, which can be read on narrow screens
PANEL, PANEL_OF_SHEET = 1.75, 1.35  # of which so many stand side by side
# A colour bar above many rows, where it is seen.
ABOVE = {"location": "top", "fraction": 0.08, "aspect": 40, "ticks": TICKS}

# A run has one colour in every picture, whichever others stand beside it.
RUN_COLOURS = {"head": "C0", "layernorm": "C1", "full": "C2", "residual": "C3", "scratch": "C4"}
OTHER_COLOURS = ("C6", "C8", "C9", "C5", "C7")

plt.rcParams.update({
    "axes.formatter.useoffset": False, "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9,
})  # fmt: skip


def attempt(show, *what):
    """Call `show(*what)` when the results are written: failing to show them is one line on stderr.

    Returns whether that worked.

    A failed picture must not end a run. If the first of `what` is the picture's file, the picture of an
    earlier call is removed: nobody should take it for this one.
    """
    try:
        if what and isinstance(what[0], Path) and what[0].is_file():
            what[0].unlink()
        show(*what)
    except Exception as error:  # matplotlib, the fonts, the terminal or a full disk
        plt.close("all")
        print(f"not shown ({show.__name__}): {one_line(reason_of(error))}", file=sys.stderr)
        return False
    return True


def label_of(name):
    """The name of a class, run or file as a label: plain text of at most LONGEST_LABEL characters.

    A dollar sign would start a formula, and legends leave out what begins with an underscore.
    """
    text = one_line(name)
    text = shortened(text, LONGEST_LABEL).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text


def save(figure, path):
    """Write a figure atomically and close it. It says who made it, see `files.require_own`."""
    metadata = {"Creator": CREATOR} if path.suffix.lower() in WITH_METADATA else None
    with atomic_write(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", metadata=metadata)
    plt.close(figure)


def run_styles(runs):
    """{run: colour and width of its line}; each line is thinner than those below it, so that none is hidden."""
    others = [run for run in runs if run not in RUN_COLOURS]
    colours = RUN_COLOURS | {run: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, run in enumerate(others)}
    return {
        run: {"color": colours[run], "linewidth": 1.2 + 1.3 * (len(runs) - 1 - i)}
        for i, run in enumerate(runs)
    }


def _curves(axes, history, name, label):
    """A line for each part, with its last value in the legend; of one validation the values, and no line.

    Positive figures that vary by more than WIDE have a logarithmic axis; those of SHARES are drawn up to 1, their best.
    """
    # The weights that a classifier continues from are validated before anything is trained.
    points = {part: [(line["epoch"], line[f"{part}_{name}"]) for line in history if f"{part}_{name}" in line]
              for part in ("train", "validation")}  # fmt: skip
    last = ", last" if len(history) > 1 else ""
    for part, own in points.items():
        if not own:
            continue
        epochs, values = zip(*own, strict=True)
        marker, colour = ("s", "0.45") if part == "train" else ("o", "black")
        axes.plot(epochs, values, marker=marker, ms=4, color=colour, label=f"{part}{last} {values[-1]:.6g}")
        if len(history) == 1:
            _value_beside(axes, epochs[0], values[0], is_left=part == "train")
    end = history[-1]["epoch"]
    axes.set(xlim=(0, 1.04 * end), xlabel="epoch", ylabel=label)
    if len(history) == 1:
        axes.set(xlim=(0, 2 * end), title="one validation, so there is no curve")
    figures = [value for own in points.values() for _, value in own]
    low, high = min(figures), max(figures)
    if name in SHARES:
        missing = 1 - low or 0.1
        axes.set_ylim(1 - 1.4 * missing, 1 + 0.1 * missing)
    elif 0 < WIDE * low < high:
        axes.set_yscale("log")
    axes.legend()


def _value_beside(axes, x, y, is_left):
    """A value as text on one side of its mark."""
    axes.annotate(f"{y:.6g}", (x, y), (-7 if is_left else 7, 0), textcoords="offset points", va="center",
                  ha="right" if is_left else "left")  # fmt: skip


def _panels_of_curves(path, history, *panels):
    """Panels of (name in the history, label), one above the other, for narrow screens."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(4.2, 2.8 * len(panels) + 0.6), squeeze=False)
    for panel, (name, label) in zip(axes[:, 0], panels, strict=True):
        _curves(panel, history, name, label)
    figure.tight_layout()
    save(figure, path)


def loss_curves(path, history, label):
    """Training and validation loss over the epochs."""
    _panels_of_curves(path, history, ("loss", label))


def classifier_curves(path, history):
    """Loss, accuracy and macro AUC over the epochs."""
    _panels_of_curves(path, history, ("loss", "cross-entropy"), ("accuracy", "accuracy"),
                      ("macro_auc", "macro one-vs-rest AUC"))  # fmt: skip


def mass_curves(path, history):
    """Loss and mean error of the axion's mass over the epochs."""
    _panels_of_curves(path, history, ("loss", "negative log-likelihood"), ("error", "mean error of log10 mass, dex"))


def sharpening_curves(path, history):
    """The training loss in units of what interpolation leaves, and the PSNR of the validation, over the epochs."""
    history = [{name: line[name] for name in ("epoch", "train_loss", "validation_psnr")} for line in history]
    _panels_of_curves(path, history, ("loss", "loss / that of interpolation"), ("psnr", "PSNR, dB"))


def sharpened(path, coarse, ours, sharp, sigmas):
    """Rows of (coarse image, ours, sharp image, error in σ of the noise), each (n, pixels, pixels)."""
    titles = ("coarse", "ours", "sharp", "(sharp − ours) / σ")
    figure, axes = plt.subplots(len(ours), 4, figsize=(9, 2.2 * len(ours)), squeeze=False, layout="constrained")
    for row, *images, error in zip(axes, coarse, ours, sharp, sigmas, strict=True):
        low, high = images[-1].min(), images[-1].max()
        for panel, image in zip(row, images, strict=False):
            shown = panel.imshow(image, vmin=low, vmax=high, cmap="magma", origin="lower")
        figure.colorbar(shown, ax=row[2])
        figure.colorbar(row[3].imshow(error, vmin=-4, vmax=4, cmap="RdBu_r", origin="lower"), ax=row[3])
        for panel, title in zip(row, titles, strict=True):
            panel.set(xticks=[], yticks=[], title=title)
            panel.grid(visible=False)
    save(figure, path)


def masses(path, truth, estimates, low, high, shares, coverage):
    """Estimates against true log10 masses (n,), the widths of the intervals, and how many hold the truth.

    shares : {half decade: (share of its intervals that hold the truth, low, high of its 95 % interval)}.
    """
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 10))
    limits = [truth.min(), truth.max()]
    axes[0].plot(limits, limits, color="black", linewidth=0.8)
    axes[0].scatter(truth, estimates, s=4, alpha=0.4)
    axes[0].set(xlabel="true log10 mass / eV", ylabel="estimate")
    axes[1].scatter(truth, high - low, s=4, alpha=0.4)
    axes[1].set(xlabel="true log10 mass / eV", ylabel="width of the interval, dex", yscale="log")
    for panel in axes[:2]:
        panel.locator_params(axis="x", nbins=5)  # else their labels meet
    names, bounds = list(shares), np.array(list(shares.values()))
    reach = np.abs(bounds[:, 1:].T - bounds[:, 0])
    axes[2].errorbar(range(len(names)), bounds[:, 0], reach, fmt="o", capsize=3)
    axes[2].axhline(coverage, color="black", linewidth=0.8)
    axes[2].set(xlabel="true log10 mass / eV", ylabel="share of intervals that hold the truth")
    axes[2].set_xticks(range(len(names)), names, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def reconstructions(path, original, masked, reconstruction, class_names):
    """Rows of (original, masked, reconstruction, residual); arrays (classes, examples, H, W)."""
    classes, examples = original.shape[:2]
    titles = ("original", "masked", "reconstruction", "residual")
    figure, axes = plt.subplots(
        classes * examples, 4, figsize=(7.8, 1.8 * classes * examples), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    residual = original - reconstruction
    limit = np.quantile(np.abs(residual[np.abs(residual) > 0]), 0.99) if residual.any() else 1
    for i, row in enumerate(axes):
        c, e = divmod(i, examples)
        low, high = original[c, e].min(), original[c, e].max()
        for panel, image in zip(row, (original, masked, reconstruction), strict=False):
            panel.imshow(image[c, e], vmin=low, vmax=high, cmap="magma", origin="lower")
        last = row[3].imshow(residual[c, e], vmin=-limit, vmax=limit, cmap="RdBu_r", origin="lower")
        for panel, title in zip(row, titles, strict=True):
            panel.set(xticks=[], yticks=[], title=title if i == 0 else "")
            panel.set_facecolor("0.8")
        row[0].set_ylabel(label_of(class_names[c]))
    figure.colorbar(last, ax=axes, fraction=0.03, label=RESIDUAL)
    save(figure, path)


def substructure_map(panel, residual, sigma):
    """Draw a residual map (H, W) in units of `sigma`, in colours that are the same in every picture.

    sigma : rms of the residuals that the MAE leaves of smooth lenses, see `residuals.smooth_rms`.
    Returns what `map_scale` takes.
    """
    norm = AsinhNorm(linear_width=LINEAR_SIGMAS, vmin=-MOST_SIGMAS, vmax=MOST_SIGMAS)
    return panel.imshow(residual / sigma, norm=norm, cmap="RdBu_r", origin="lower")


def map_scale(figure, drawn, axes, label=SIGMAS, ticks=TICKS, **where):
    """The colour bar of `substructure_map`."""
    bar = figure.colorbar(drawn, ax=axes, label=label, extend="both", **{"fraction": 0.02, **where})
    bar.set_ticks(ticks, labels=[f"{tick:+d}" if tick else "0" for tick in ticks])


def residual_maps(path, images, residuals, sigma, titles, marks=None):
    """Images (n, H, W) above their residuals, in rows of three for narrow screens, see `substructure_map`.

    `marks`, a list of (P, 3), are the x, y and radius in pixels of circles on the residuals.
    """
    columns = 3
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(PANEL * columns, (2 * PANEL + 0.25) * rows + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel in axes.flat:
        panel.set_axis_off()
    for i, (image, residual, title) in enumerate(zip(images, residuals, titles, strict=True)):
        row, column = divmod(i, columns)
        axes[2 * row, column].imshow(image, cmap="magma", origin="lower")
        axes[2 * row, column].set_title(label_of(title), fontsize=8)
        shown = substructure_map(axes[2 * row + 1, column], residual, sigma)
        if marks is not None:
            circles(axes[2 * row + 1, column], marks[i])
    more = "" if marks is None else "\ncircles: true point masses, Einstein radii"
    map_scale(figure, shown, axes[0], SIGMAS + more, **ABOVE)
    save(figure, path)


def circles(panel, marks):
    """Thin circles (P, 3): x, y, radius in pixels; at least half a pixel, to be seen."""
    drawn = [plt.Circle((x, y), max(radius, 0.5)) for x, y, radius in marks]
    panel.add_collection(
        PatchCollection(drawn, facecolor="none", edgecolor="black", linewidth=0.4)
    )


def contact_sheet(path, answers, class_names, maps, sigma, pixel_scale=None):
    """Raw images with name, prediction and probabilities; beside them their maps (n, H, W), unless None.

    answers : `predict.Answer` of the images. A prediction that is no class is red.
    sigma : see `substructure_map`; None for the `typical_rms` of the maps.
    pixel_scale : arcsec; where it is known, the first image has a bar of one arcsec.
    """
    panels = 1 if maps is None else 2
    columns = min(4 // panels, len(answers))  # for narrow screens
    rows = -(-len(answers) // columns)
    figure, axes = plt.subplots(
        rows, columns * panels,
        figsize=(PANEL_OF_SHEET * columns * panels, (PANEL_OF_SHEET + 0.4) * rows + 0.7 * (panels - 1)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel in axes.flat:
        panel.set_axis_off()
    unit = None if maps is None else sigma or typical_rms(maps)
    for i, answer in enumerate(answers):
        line, column = divmod(i, columns)
        panel = axes[line, panels * column]
        panel.imshow(_stretched(answer.image[0]), cmap="magma", origin="lower")
        rows_of_text = zip(class_names, answer.probabilities, strict=True)
        each = "\n".join(f"{label_of(name)} {p:.3f}" for name, p in rows_of_text)
        title = f"{label_of(shortened(answer.name, 18))}\n{label_of(answer.prediction)}"
        colour = "black" if answer.prediction in class_names else "crimson"
        panel.set_title(title, fontsize=8, fontweight="bold", color=colour)
        panel.text(0.02, 0.02, each, fontsize=7, color="white", transform=panel.transAxes)
        if maps is not None:
            drawn = substructure_map(axes[line, 2 * column + 1], maps[i], unit)
            axes[line, 2 * column + 1].set_title("substructure map", fontsize=8)
    if pixel_scale:
        _arcsec_bar(axes[0, 0], answers[0].image.shape[-1], pixel_scale)
    if maps is not None:
        map_scale(figure, drawn, axes[0], **ABOVE)
    save(figure, path)


def shortened(text, most):
    """A text of at most `most` characters: what is left out is in its middle, since names end in numbers."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[half + 1 - most :]}"


def _arcsec_bar(panel, side, pixel_scale):
    end = 0.95 * side
    panel.plot([end - 1 / pixel_scale, end], [0.06 * side] * 2, color="white", linewidth=1.5)
    panel.text(end, 0.08 * side, "1″", color="white", fontsize=7, ha="right")


def _stretched(image):
    """A raw image in a scale that shows faint and bright parts."""
    image = np.asarray(image, dtype=np.float64)
    return np.arcsinh(image / max(1e-2 * np.abs(image).mean(), np.finfo(np.float32).tiny))


def score_histogram(path, scores, labels, class_names):
    """Distribution of the scores (N,) by class, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(5, 3.5))
    positive = np.maximum(scores, np.finfo(np.float32).tiny)
    edges = np.geomspace(positive.min(), positive.max() * 1.001, 60)
    for label in np.unique(labels):
        name = label_of(class_names[label])
        axes.hist(positive[labels == label], edges, histtype="step", label=name)
    axes.set(xscale="log", yscale="log", xlabel="score", ylabel="images")
    axes.legend()
    save(figure, path)


def roc_curves(path, curves):
    """One panel a class, one above the other, for narrow screens; `curves`: {run: {class: (false positive, true positive, AUC)}}.

    The false positive rate is logarithmic: good classifiers differ near zero only.
    """
    class_names, styles = list(next(iter(curves.values()))), run_styles(curves)
    figure, axes = plt.subplots(
        len(class_names), 1, figsize=(4.2, 3.4 * len(class_names)), squeeze=False
    )
    for panel, class_name in zip(axes[:, 0], class_names, strict=True):
        for run, by_class in curves.items():
            false_positive, true_positive, auc = by_class[class_name]
            label = f"{label_of(run)} {auc:.4f}"
            panel.plot(false_positive, true_positive, label=label, **styles[run])
        chance = np.geomspace(1e-4, 1)
        panel.plot(chance, chance, color="0.7", linestyle=":")
        panel.set(
            xscale="log",
            xlim=(1e-4, 1),
            title=f"{label_of(class_name)} against the rest",
            xlabel="false positive rate",
            ylabel="true positive rate",
        )
        panel.legend(title="AUC", loc="lower right")
    figure.tight_layout()
    save(figure, path)


def reliability(path, runs):
    """Accuracy against confidence; `runs`: {run: [(confidence, accuracy, images), ...]}."""
    figure, axes = plt.subplots(figsize=(4.2, 3.8))
    styles = run_styles(runs)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    for name, table in runs.items():
        confidence, correct, images = np.transpose(table)
        colour = styles[name]["color"]
        axes.plot(confidence, correct, label=label_of(name), color=colour)
        axes.scatter(confidence, correct, 4 + 60 * images / images.sum(), color=colour)
    axes.set(xlabel="confidence", ylabel="accuracy (size: share of the images)")
    axes.legend()
    save(figure, path)


def familiarity(path, values, least):
    """Share of images below a familiarity, both logarithmic; `values`: {run: familiarity (n,)}.

    Images like the training images lie on the diagonal; `least` is where predictions end.
    """
    figure, axes = plt.subplots(figsize=(4.5, 4))
    diagonal, styles = np.array([1e-4, 1]), run_styles(values)
    axes.plot(diagonal, diagonal, color="0.7", linestyle=":", label="like the training images")
    axes.axvline(least, color="black", linewidth=1, label=f"refused below {least:g}")
    for run_name, own in values.items():
        share = np.arange(1, len(own) + 1) / len(own)
        axes.step(np.sort(own), share, where="post", label=label_of(run_name), **styles[run_name])
    axes.set(xscale="log", yscale="log", xlabel="familiarity", ylabel="share of images below")
    axes.legend()
    save(figure, path)


def mistakes(path, images, chosen, class_names):
    """Images (N, H, W) at `chosen`: [(row, true class, predicted class, probability), ...]."""
    columns = 3
    rows = max(1, -(-len(chosen) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.8 * columns, 2.1 * rows), squeeze=False, layout="constrained"
    )
    for panel in axes.flat:
        panel.set_axis_off()
    if not chosen:
        axes[0, 0].text(0, 0.5, "no mistakes")
    for panel, (row, true, predicted, probability) in zip(axes.flat, chosen, strict=False):
        panel.imshow(_stretched(images[row]), cmap="magma", origin="lower")
        taken, given = label_of(class_names[true]), label_of(class_names[predicted])
        title = f"{taken} taken for\n{given} ({probability:.3f})"
        panel.set_title(title, fontsize=8)
    save(figure, path)


def confusion_matrices(path, matrices, class_names):
    """One panel a run; `matrices`: {run: (classes, classes) counts, true class in rows}."""
    figure, axes = plt.subplots(len(matrices), 1, figsize=(4.2, 3.6 * len(matrices)), squeeze=False)
    ticks, labels = range(len(class_names)), [label_of(name) for name in class_names]
    for panel, (run_name, matrix) in zip(axes[:, 0], matrices.items(), strict=True):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        panel.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if share[row, column] > 0.5 else "black"
            text = f"{count}\n{100 * share[row, column]:.1f} %"
            panel.text(column, row, text, ha="center", va="center", color=color)
        panel.set(title=label_of(run_name), xlabel="predicted", ylabel="true")
        panel.set_xticks(ticks, labels)
        panel.set_yticks(ticks, labels)
        panel.grid(False)
    figure.tight_layout()
    save(figure, path)
