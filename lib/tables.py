"""Tables of text: what is in them, as Markdown and as HTML."""

import html
import re

from lib.errors import one_line


def with_interval(measure, digits, scale=1):
    """A `metrics.with_bounds`, times `scale`, as text such as 0.9958 (0.9941–0.9972)."""
    value, low, high = (f"{scale * measure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def comparison(results, class_names):
    """Rows of text, the header first: AUC of each class, macro AUC and accuracy of each run.

    `results` is {run: what `class_evaluation.results_of` gives}.
    """
    rows = [["run", *(f"AUC {name}" for name in class_names), "macro AUC", "accuracy %"]]
    for run, result in results.items():
        aucs = [with_interval(auc, 4) for auc in (*(result["auc"][name] for name in class_names), result["macro"])]
        rows.append([run, *aucs, with_interval(result["accuracy"], 2, 100)])
    return rows


def markdown(rows):
    """A Markdown table of rows of text, the header first; names of classes and runs stay names."""
    header, *body = [[re.sub(r"[\\|<*`[]", r"\\\g<0>", one_line(cell)) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_html(rows, kinds):
    """An HTML table of rows of text, the header first; `kinds` are the CSS classes of its rows.

    Every cell but the first of a row has its column's name as data-label, which narrow screens show.
    """
    names, lines = [html.escape(one_line(cell)) for cell in rows[0]], []
    for row, kind in zip(rows, kinds, strict=True):
        tag = "td" if lines else "th"
        labels = [f' data-label="{name}"' if lines and i else "" for i, name in enumerate(names)]
        labelled = zip(labels, row, strict=True)
        cells = "".join(f"<{tag}{label}>{html.escape(one_line(cell))}</{tag}>" for label, cell in labelled)
        lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
