"""Every picture of the project; nothing here computes a result."""

import os
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # another value may be for a notebook, or unknown
import matplotlib

matplotlib.use("Agg")  # no window: machines without a screen, and whoever has imported it before

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import AsinhNorm

from lib.errors import one_line, reason_of, warn
from lib.files import CREATOR, atomic_write
from lib.traits import typical_rms

LONGEST_LABEL = 80
WITH_METADATA = (".png", ".pdf", ".svg", ".eps", ".ps")  # other formats cannot say who made them
RESIDUAL = "residual (image − prediction), in the network's scale"
SIGMAS = "residual (image − prediction), in σ of smooth lenses"
SHARES = ("accuracy", "macro_auc")  # values of a training that are 1 at best
WIDE = 3  # ratio of the largest to the smallest value from which curves are logarithmic
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
        warn(f"not shown ({show.__name__}): {reason_of(error)}")
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


def _draw_curves(axes, history, name, label):
    """A line for each part, with its last value in the legend; of one validation the values, and no line.

    Positive values that vary by more than WIDE have a logarithmic axis; the axis of SHARES ends at 1.
    """
    # The weights that a classifier continues from are validated before anything is trained.
    points = {}
    for part in ("train", "validation"):
        column = name if name.startswith(part) else f"{part}_{name}"
        points[part] = [(line["epoch"], line[column]) for line in history if column in line]
    last = ", last" if len(history) > 1 else ""
    is_single, every = len(history) == 1, []
    for (part, pairs), marker, colour, side in zip(points.items(), "so", ("0.45", "black"), (-7, 7), strict=True):
        if not pairs:
            continue
        epochs, values = zip(*pairs, strict=True)
        every += values
        axes.plot(epochs, values, marker=marker, ms=4, color=colour, label=f"{part}{last} {values[-1]:.6g}")
        if is_single:  # the value as text on one side of its mark
            axes.annotate(f"{values[0]:.6g}", pairs[0], (side, 0), textcoords="offset points", va="center",
                          ha="right" if side < 0 else "left")  # fmt: skip
    end = history[-1]["epoch"]
    axes.set(xlim=(0, 2 * end if is_single else 1.04 * end), xlabel="epoch", ylabel=label)
    if is_single:
        axes.set_title("one validation, so there is no curve")
    low, high = min(every), max(every)
    if name in SHARES:
        missing = 1 - low or 0.1
        axes.set_ylim(1 - 1.4 * missing, 1 + 0.1 * missing)
    elif 0 < WIDE * low < high:
        axes.set_yscale("log")
    axes.legend()


def curves(path, history, panels):
    """A panel for each of `panels`, {name in the history: label}, one above the other, for narrow screens.

    A name such as train_loss is of one part, loss of both.
    """
    figure, axes = plt.subplots(len(panels), 1, figsize=(4.2, 2.8 * len(panels) + 0.6), squeeze=False)
    for panel, (name, label) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_curves(panel, history, name, label)
    figure.tight_layout()
    save(figure, path)


def sharpened(path, coarse, ours, sharp, sigmas):
    """Rows of (coarse image, ours, sharp image, error in σ of the noise), each (n, pixels, pixels)."""
    titles = ("coarse", "ours", "sharp", "(sharp − ours) / σ")
    figure, axes = _grid(len(ours), 4, (9, 2.2 * len(ours)))
    for row, *images, error in zip(axes, coarse, ours, sharp, sigmas, strict=True):
        low, high = images[-1].min(), images[-1].max()
        for panel, image in zip(row, images, strict=False):
            shown = _show(panel, image, vmin=low, vmax=high)
        figure.colorbar(shown, ax=row[2])
        figure.colorbar(_show(row[3], error, "RdBu_r", vmin=-4, vmax=4), ax=row[3])
        for panel, title in zip(row, titles, strict=True):
            panel.set(xticks=[], yticks=[], title=title)
            panel.grid(visible=False)
    save(figure, path)


def _grid(rows, columns, size):
    """A figure of a size in inches, and its panels (rows, columns)."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _show(panel, image, cmap="magma", **scale):
    """Draw an image (H, W), its first row below."""
    return panel.imshow(image, cmap=cmap, origin="lower", **scale)


def _without_axes(axes):
    for panel in axes.flat:
        panel.set_axis_off()


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
    figure, axes = _grid(classes * examples, 4, (7.8, 1.8 * classes * examples))
    residual = original - reconstruction
    limit = np.quantile(np.abs(residual[np.abs(residual) > 0]), 0.99) if residual.any() else 1
    for i, row in enumerate(axes):
        c, e = divmod(i, examples)
        low, high = original[c, e].min(), original[c, e].max()
        for panel, image in zip(row, (original, masked, reconstruction), strict=False):
            _show(panel, image[c, e], vmin=low, vmax=high)
        last = _show(row[3], residual[c, e], "RdBu_r", vmin=-limit, vmax=limit)
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
    return _show(panel, residual / sigma, "RdBu_r", norm=norm)


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
    figure, axes = _grid(2 * rows, columns, (PANEL * columns, (2 * PANEL + 0.25) * rows + 0.8))
    _without_axes(axes)
    for i, (image, residual, title) in enumerate(zip(images, residuals, titles, strict=True)):
        row, column = divmod(i, columns)
        upper, lower = axes[2 * row : 2 * row + 2, column]
        _show(upper, image)
        upper.set_title(label_of(title), fontsize=8)
        shown = substructure_map(lower, residual, sigma)
        if marks is not None:
            circles(lower, marks[i])
    more = "" if marks is None else "\ncircles: true point masses, Einstein radii"
    map_scale(figure, shown, axes[0], SIGMAS + more, **ABOVE)
    save(figure, path)


def circles(panel, marks):
    """Thin circles (P, 3): x, y, radius in pixels; at least half a pixel, to be seen."""
    drawn = [plt.Circle((x, y), max(radius, 0.5)) for x, y, radius in marks]
    panel.add_collection(PatchCollection(drawn, facecolor="none", edgecolor="black", linewidth=0.4))


def contact_sheet(path, answers, class_names, sigma, pixel_scale=None):
    """Raw images with name, prediction and probabilities; beside them their residual maps, if they have some.

    answers : `predict.Answer` of the images. A prediction that is no class is red.
    sigma : see `substructure_map`; None for the `typical_rms` of the maps.
    pixel_scale : arcsec; where it is known, the first image has a bar of one arcsec.
    """
    maps = None if answers[0].residual_map is None else np.stack([answer.residual_map for answer in answers])
    panels = 1 if maps is None else 2
    columns = min(4 // panels, len(answers))  # for narrow screens
    rows = -(-len(answers) // columns)
    size = (PANEL_OF_SHEET * columns * panels, (PANEL_OF_SHEET + 0.4) * rows + 0.7 * (panels - 1))
    figure, axes = _grid(rows, columns * panels, size)
    _without_axes(axes)
    unit = None if maps is None else sigma or typical_rms(maps)
    for i, answer in enumerate(answers):
        panel, *beside = axes.reshape(-1, panels)[i]
        _show(panel, _stretched(answer.image[0]))
        shares = zip(class_names, answer.probabilities, strict=True)
        title = f"{label_of(shortened(answer.name, 18))}\n{label_of(answer.prediction)}"
        colour = "black" if answer.prediction in class_names else "crimson"
        panel.set_title(title, fontsize=8, fontweight="bold", color=colour)
        panel.text(0.02, 0.02, "\n".join(f"{label_of(name)} {p:.3f}" for name, p in shares), fontsize=7, color="white",
                   transform=panel.transAxes)  # fmt: skip
        for panel_of_map in beside:
            drawn = substructure_map(panel_of_map, maps[i], unit)
            panel_of_map.set_title("substructure map", fontsize=8)
    if pixel_scale:
        side = answers[0].image.shape[-1]
        end = 0.95 * side
        axes[0, 0].plot([end - 1 / pixel_scale, end], [0.06 * side] * 2, color="white", linewidth=1.5)
        axes[0, 0].text(end, 0.08 * side, "1″", color="white", fontsize=7, ha="right")
    if maps is not None:
        map_scale(figure, drawn, axes[0], **ABOVE)
    save(figure, path)


def shortened(text, most):
    """A text of at most `most` characters: what is left out is in its middle, since names end in numbers."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[half + 1 - most :]}"


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
    """One panel a class, one above the other, for narrow screens.

    `curves`: {run: {class: (false positive, true positive, AUC)}}. The false positive rate is logarithmic: good
    classifiers differ near zero only.
    """
    class_names, styles = list(next(iter(curves.values()))), run_styles(curves)
    figure, axes = plt.subplots(len(class_names), 1, figsize=(4.2, 3.4 * len(class_names)), squeeze=False)
    for panel, class_name in zip(axes[:, 0], class_names, strict=True):
        for run, by_class in curves.items():
            false_positive, true_positive, auc = by_class[class_name]
            label = f"{label_of(run)} {auc:.4f}"
            panel.plot(false_positive, true_positive, label=label, **styles[run])
        chance = np.geomspace(1e-4, 1)
        panel.plot(chance, chance, color="0.7", linestyle=":")
        panel.set(xscale="log", xlim=(1e-4, 1), title=f"{label_of(class_name)} against the rest",
                  xlabel="false positive rate", ylabel="true positive rate")  # fmt: skip
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

    Draws nothing without values. Images like the training images lie on the diagonal; `least` is where
    predictions end.
    """
    if not values:
        return
    figure, axes = plt.subplots(figsize=(4.5, 4))
    diagonal, styles = np.array([1e-4, 1]), run_styles(values)
    axes.plot(diagonal, diagonal, color="0.7", linestyle=":", label="like the training images")
    axes.axvline(least, color="black", linewidth=1, label=f"refused below {least:g}")
    for run, of_run in values.items():
        share = np.arange(1, len(of_run) + 1) / len(of_run)
        axes.step(np.sort(of_run), share, where="post", label=label_of(run), **styles[run])
    axes.set(xscale="log", yscale="log", xlabel="familiarity", ylabel="share of images below")
    axes.legend()
    save(figure, path)


def mistakes(path, images, chosen, class_names):
    """Images (N, H, W) at `chosen`: [(row, true class, predicted class, probability), ...]."""
    columns = 3
    rows = max(1, -(-len(chosen) // columns))
    figure, axes = _grid(rows, columns, (1.8 * columns, 2.1 * rows))
    _without_axes(axes)
    if not chosen:
        axes[0, 0].text(0, 0.5, "no mistakes")
    for panel, (row, true, predicted, probability) in zip(axes.flat, chosen, strict=False):
        _show(panel, _stretched(images[row]))
        taken, given = label_of(class_names[true]), label_of(class_names[predicted])
        panel.set_title(f"{taken} taken for\n{given} ({probability:.3f})", fontsize=8)
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
