"""One self-contained HTML page of an evaluation: nothing is loaded from outside."""

import base64
import html
from pathlib import Path

from lib import tables
from lib.errors import one_line
from lib.files import read_json, write_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; }
tr.best { background: var(--soft); font-weight: 600; }
tr.published { opacity: .75; }
small { opacity: .75; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
pre { overflow-x: auto; background: var(--soft); padding: .7rem; border-radius: 4px; }
"""


def write(folder, weights, results, class_names, best, published):
    """Write report.html into the evaluation's `folder`, from what lies there already.

    Parameters
    ----------
    weights : {run: path of its weights}; config.json and pictures lie beside them.
    results : {run: {"auc": {class name: figure}, "macro": figure, "accuracy": figure, "images",
        "calibration_error"}}, a figure being {"value", "low", "high"}.
    best : the run to highlight.
    published : rows of other work, see `evaluate.published_rows`.
    """
    configs = {name: config_beside(path) for name, path in weights.items()}
    images = next(iter(results.values()))["images"]
    parts = [
        "<h1>Lens classification: evaluation</h1>",
        f"<p>{images} images that no training saw. Best macro AUC: <b>{escaped(best)}</b>. "
        "95 % intervals: of a bootstrap for AUC, Wilson's for accuracy.</p>",
        "<h2>Comparison</h2>",
        comparison_table(results, best, class_names, published),
        picture(folder / "roc.png", "ROC curves, one class against the rest"),
        picture(folder / "confusion_matrix.png", "Confusion matrices"),
        picture(folder / "reliability.png", "Confidence against accuracy"),
        picture(folder / "familiarity.png", "How many of these images are how familiar"),
        "<h2>Most confident mistakes</h2>",
        picture(folder / "mistakes.png", f"Test images that {best} mistakes"),
    ]
    for run in sorted(pretrainings(configs.values())):
        parts.append(f"<h2>Pre-training: {escaped(run.name)}</h2>")
        parts.append(described(config_beside(run / "weights")))
        parts.append(picture(run / "loss.png", "Reconstruction error"))
        parts.append(picture(run / "reconstructions.png", "Held-out images, masked and restored"))
    for name, path in weights.items():
        parts.append(f"<h2>Fine-tuning: {escaped(name)}</h2>")
        parts.append(described(configs[name]))
        parts.append(picture(path.parent / "curves.png", "Loss, accuracy and AUC"))
    body = "\n".join(part for part in parts if part)
    write_text(
        folder / "report.html",
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Lens classification: evaluation</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n",
    )


def escaped(text):
    """Any text as part of the page."""
    return html.escape(one_line(text))


def pretrainings(configs):
    """Folders of the pre-trainings behind runs; and behind the classifiers they continued."""
    found, seen, left = set(), set(), list(configs)
    while left:
        start = left.pop().get("options", {}).get("pretrained", "none")
        if start == "none" or start in seen:
            continue
        seen.add(start)
        config = config_beside(Path(start))
        if "pretrained" in config.get("options", {}):
            left.append(config)
        else:
            found.add(Path(start).parent)
    return found


def config_beside(path):
    """The config.json of the run that left the weights at `path`; {} if there is none."""
    config = path.parent / "config.json"
    return read_json(config) if config.exists() else {}


def comparison_table(results, best, class_names, published):
    """The table of `tables.comparison` with calibration errors, the rows of other work below."""
    rows = tables.comparison(results, class_names)
    errors = ["calibration error", *(f"{result['calibration_error']:.4f}" for result in results.values())]
    rows = [[*row, error] for row, error in zip(rows, errors, strict=True)]
    kinds = ["", *("best" if name == best else "" for name in results), *["published"] * len(published)]
    return tables.as_html([*rows, *([*row, ""] for row in published)], kinds)


def described(config):
    """What a run was trained on, and its command."""
    if not config:
        return "<p>No config.json lies beside these weights.</p>"
    data = config.get("data", {})
    text = f"{data.get('images', '?')} images ({data.get('origin', 'unknown')}), split 80/10/10"
    return f"<p>{escaped(text)}.</p><pre>{escaped(str(config.get('command', '')))}</pre>"


def picture(path, caption):
    """A picture as part of the page; nothing where there is none."""
    if not path.exists():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    caption = escaped(caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{content}"></figure>'
