"""One self-contained HTML page of an evaluation: nothing is loaded from outside."""

import base64
import html

from lib import tables, weights
from lib.errors import UserError, one_line
from lib.files import read_json, write_text
from lib.provenance import circumstances

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
figure { display: inline-block; vertical-align: top; margin: .5rem 1rem .5rem 0; max-width: 100%; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
@media (max-width: 600px) {  /* a row is a block of lines, each with the name of its column */
  tr:first-child, td[data-label]:empty { display: none; }
  tr, td { display: block; }
  tr { padding: .3rem 0; border-bottom: 1px solid var(--line); }
  td { border: 0; padding: 0 .7rem; }
  td:first-child { font-weight: 600; }
  td[data-label] { display: flex; justify-content: space-between; gap: 1rem; }
  td[data-label]::before { content: attr(data-label); font-weight: 400; }
}
pre { overflow-x: auto; background: var(--soft); padding: .7rem; border-radius: 4px; }
"""


def write(folder, opened, results, dataset, best, published, remarks):
    """Write report.html into the evaluation's `folder`, from what lies there already.

    Parameters
    ----------
    opened : {run: its `Weights`}. config.json and pictures beside them are shown if they are
        theirs, see `config_of`.
    results : {run: what `class_evaluation.results_of` gives}.
    dataset : the `datasets.Dataset` that was evaluated on.
    best : the run to highlight.
    published : rows of other work, see `class_evaluation.published_rows`.
    remarks : lines below the table.
    """
    (folder / "report.html").unlink(missing_ok=True)  # if this one fails, no earlier one is taken for it
    images = next(iter(results.values()))["images"]
    made = circumstances()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    written = f"Written on {made['date']} by commit {made['commit'] or 'unknown'}, with {versions}."
    parts = [
        "<h1>Lens classification: evaluation</h1>",
        f"<p>{images} images, none of them among the training images of these weights. Best macro AUC: "
        f"<b>{escaped(best)}</b>. 95 % intervals: of a bootstrap for AUC, Wilson's for accuracy.</p>",
        f"<p>Data: {escaped(dataset.origin)}, fingerprint {escaped(dataset.fingerprint[:8])}. {escaped(written)}</p>",
        "<h2>Comparison</h2>",
        comparison_table(results, best, dataset.class_names, published),
        *(f"<p>{escaped(line)}</p>" for line in remarks),
        picture(folder / "roc.png", "ROC curves, one class against the rest"),
        picture(folder / "confusion_matrix.png", "Confusion matrices"),
        picture(folder / "reliability.png", "Confidence against accuracy"),
        picture(folder / "familiarity.png", "How many of these images are how familiar"),
        "<h2>Most confident mistakes</h2>",
        picture(folder / "mistakes.png", f"Test images that {best} mistakes"),
    ]
    behind = {name: pretraining_behind(run) for name, run in opened.items()}
    sources = {source.sha256: source for source, _ in behind.values() if source}
    for source in sorted(sources.values(), key=lambda source: source.path):
        parts.append(f"<h2>Pre-training: {escaped(source.path.parent.name)}</h2>")
        parts += described(source, {"loss": "Reconstruction error",
                                    "reconstructions": "Held-out images, masked and restored"})  # fmt: skip
    for name, run in opened.items():
        doubt = behind[name][1]
        parts += [f"<h2>Fine-tuning: {escaped(name)}</h2>", doubt and f"<p>{escaped(doubt)}</p>"]
        parts += described(run, {"curves": "Loss, accuracy and AUC"})
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


def pretraining_behind(run):
    """The `Weights` of the pre-training behind those of a fine-tuning, None if unknown, and a sentence."""
    while True:
        start = config_of(run).get("options", {}).get("pretrained", "none")
        if start == "none":
            return None, ""
        try:
            source = weights.read(start, foreign=True)
        except UserError:
            return None, f"{start}, from which it started, cannot be read."
        if source.sha256 != run.content["run"].get("pretrained_sha256"):
            return None, f"{start}, from which it started, has been replaced since."
        if not source.is_classifier:
            return source, ""
        run = source


def config_of(run):
    """The config.json beside opened `Weights`; {} if there is none, or if it is of other weights.

    It is theirs if data, network, and whatever both say of the training agree.
    """
    path = run.path.parent / "config.json"
    config, said = read_json(path) if path.exists() else {}, run.content["run"]
    network = {k: v for k, v in config.items() if k == "transform"} | config.get("model", {})
    told = {**config.get("options", {}), **config.get("recipe", {})}
    told["data_fingerprint"] = config.get("data", {}).get("fingerprint")
    theirs = network == run.content["config"] and all(
        said[name] == value for name, value in told.items() if name in said and value is not None
    )  # None: decided later
    return config if theirs else {}


def comparison_table(results, best, class_names, published):
    """The table of `tables.comparison` with calibration errors, the rows of other work below."""
    rows = tables.comparison(results, class_names)
    errors = ["calibration error", *(f"{result['calibration_error']:.4f}" for result in results.values())]
    rows = [[*row, error] for row, error in zip(rows, errors, strict=True)]
    kinds = ["", *("best" if name == best else "" for name in results), *["published"] * len(published)]
    return tables.as_html([*rows, *([*row, ""] for row in published)], kinds)


def described(run, pictures):
    """What opened `Weights` were trained on, the command, and the pictures {name: caption} beside them."""
    config = config_of(run)
    if not config:
        yield "<p>No config.json of these weights lies beside them; pictures there are left out.</p>"
        return
    data = config["data"]
    text = f"{data.get('images', '?')} images ({data.get('origin', 'unknown')})"
    yield f"<p>{escaped(text)}.</p><pre>{escaped(str(config.get('command', '')))}</pre>"
    for name, caption in pictures.items():
        yield picture(run.path.parent / f"{name}.png", caption)


def picture(path, caption):
    """A picture as part of the page; nothing where there is none."""
    if not path.exists():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    caption = escaped(caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{content}"></figure>'
