"""Results of a study: each experiment's rows as JSON, its picture, and tables.md of them all.

study.py writes them. The seeds of a study are independent, so they may run apart, side by side or
on several machines; this script joins their results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.errors import UserError, path_argument, run_main, starting

starting(__name__)

import numpy as np

from lib import options, plots, tables
from lib.files import PICTURE, read_json, require_own, write_json, write_text

EXAMPLE = """example:
  python experiments/results.py runs/study/all-0/results runs/study/all-1/results --out runs/results"""

MEASURES = ("AUC", "%")  # keys of a row with one of these in them are measured
HOW = ("command", "commit", "precision")  # how rows were made


def by_run(rows):
    """{run: {measure: (mean, standard deviation, seeds)}}, in the order of the rows."""
    runs = {}
    for row in rows:
        for key in filter(is_measure, row):
            runs.setdefault(row["run"], {}).setdefault(key, []).append(row[key])
    return {
        name: {k: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v))
               for k, v in measures.items()}
        for name, measures in runs.items()
    }  # fmt: skip


def is_measure(key):
    return any(part in key for part in MEASURES)


def table(rows):
    """Markdown: a line a run, mean ± standard deviation over the seeds."""

    def cell(key, measures):
        if key not in measures:
            return ""
        mean, deviation, seeds = measures[key]
        digits = 2 if key.endswith("%") else 5
        return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if seeds > 1 else "")

    runs = by_run(rows)
    keys = list(dict.fromkeys(key for measures in runs.values() for key in measures))
    lines = [[name, *(cell(key, measures) for key in keys)] for name, measures in runs.items()]
    return tables.markdown([["run", *keys], *lines])


def draw(path, rows, drawn):
    """The picture of an experiment: a dot a run or, as `drawn` says, a measure against a quantity.

    `drawn` is None or {"x": key of a row, "label": its label or None where every kind has its own,
    "logarithmic": bool, "y": the measure}.
    """
    runs = by_run(rows)
    if drawn is None:
        dots(path, {name: {k: v[:2] for k, v in measures.items() if "AUC" in k} for name, measures in runs.items()})
        return
    points_of, rows_of = {}, {row["run"]: row for row in rows}
    for name, measures in runs.items():
        point = (rows_of[name][drawn["x"]], *measures[drawn["y"]][:2])
        points_of.setdefault(rows_of[name]["kind"], []).append(point)
    lines = {kind: sorted(points) for kind, points in points_of.items()}  # joined ones may come in any order
    series(path, lines, drawn["label"], drawn["y"], drawn["logarithmic"])


def dots(path, runs):
    """A line a run, a mark a measure; `runs`: {run: {measure: (AUC, its deviation)}}.

    Runs without measures are left out. Runs named "group: run" have a panel a group. The axis is 1 − AUC,
    logarithmic: good measures differ near one only.
    """
    groups = {}
    for name, measures in runs.items():
        group, colon, own = name.partition(": ")
        if measures:
            groups.setdefault(group if colon else "", {})[own if colon else name] = measures
    figure, axes = plots.plt.subplots(
        len(groups), 1, figsize=(plots.WIDTH, 1 + sum(0.5 + 0.22 * len(group) for group in groups.values())),
        squeeze=False, sharex=True, layout="constrained",
        gridspec_kw={"height_ratios": [len(group) for group in groups.values()]},
    )  # fmt: skip
    names = list(dict.fromkeys(name for group in groups.values() for measures in group.values() for name in measures))
    for panel, (group, own) in zip(axes[:, 0], groups.items(), strict=True):
        for i, name in enumerate(names):
            lines = [(y, measures[name]) for y, measures in enumerate(own.values()) if name in measures]
            y = [line + 0.5 * (i - (len(names) - 1) / 2) / len(names) for line, _ in lines]
            error = [max(1 - auc, 1e-6) for _, (auc, _) in lines]
            deviations = [deviation for _, (_, deviation) in lines]
            panel.errorbar(error, y, xerr=deviations, fmt="o", ms=4, color=f"C{i}", label=plots.label_of(name))
        panel.set(xscale="log", title=plots.label_of(group), ylim=(len(own) - 0.5, -0.5))
        panel.set_yticks(range(len(own)), [plots.label_of(name) for name in own])
    axes[-1, 0].set_xlabel("1 − AUC (left is better; from 1e-6)")
    legends = [panel.get_legend_handles_labels() for panel in axes[:, 0]]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncol=2)
    plots.save(figure, path)


def series(path, lines, x_label, y_label, logarithmic):
    """How far a measure is from its best against a quantity, logarithmic.

    `lines` is {name: [(x, measure, its deviation), ...]}; `y_label` names the measure, an AUC or, if
    it ends in %, a percentage. Without an `x_label` every line has a panel and its name, the
    quantity, stands below it; the panels are one above the other, for narrow screens.
    """
    panels = 1 if x_label else len(lines)
    best, least = (100, 0.01) if y_label.endswith("%") else (1, 1e-6)
    figure, axes = plots.plt.subplots(panels, 1, figsize=(plots.WIDTH, 0.5 + 3.2 * panels), squeeze=False)
    for i, (name, points) in enumerate(lines.items()):
        x, value, deviation = np.transpose(points)
        missing = np.maximum(best - value, least)
        panel = axes[i % panels, 0]
        label = plots.label_of(name)
        panel.errorbar(x, missing, yerr=deviation, marker="o", ms=4, label=label)
        panel.set(
            xscale="log" if logarithmic else "linear", yscale="log", xlabel=x_label or label,
            ylabel=f"{best} − {y_label} (lower is better)",
        )  # fmt: skip
    if x_label:
        axes[0, 0].legend()
    figure.tight_layout()
    plots.save(figure, path)


def check_folder(folder, names):
    """UserError if the files of these experiments, or the tables, would replace others in `folder`."""
    for name in names:
        if (folder / f"{name}.json").exists():
            read(folder / f"{name}.json")
        else:
            require_own(folder / f"{name}.png", PICTURE)
    require_own(folder / "tables.md", rb"\A# Results of study\.py")


def write(folder, name, what, made, rows, drawn=None):
    """Keep an experiment: its JSON and PNG, and the tables of all experiments in `folder`.

    `what` says what it compares. `made` is a list of dicts with the keys of HOW, one for each
    command that made some of the rows. For `drawn` see `draw`.
    """
    write_json(folder / f"{name}.json", {"what": what, "made": made, "drawn": drawn, "rows": rows})
    draw(folder / f"{name}.png", rows, drawn)
    text = ["# Results of study.py", ""]
    for path in sorted(folder.glob("*.json")):
        kept = read(path)
        text += [f"## {path.stem}", "", kept["what"], "", table(kept["rows"]), ""]
        text += ["- `{command}`, commit {commit}, {precision}".format(**made) for made in kept["made"]]
        text += ["", f"![{path.stem}]({path.stem}.png)", ""]
    write_text(folder / "tables.md", "\n".join(text))


def read(path):
    """What `write` has kept of an experiment; UserError if it is something else."""
    kept = read_json(path)
    try:
        drawn, rows = kept["drawn"], kept["rows"]
        axes = [drawn["x"], drawn["y"]] if drawn else []
        texts = [kept["what"], *(made[key] for made in kept["made"] for key in HOW)]
        texts += [row[key] for row in rows for key in (("run", "kind") if drawn else ("run",))]
        numbers = [row[key] for row in rows for key in ("seed", *axes, *filter(is_measure, row))]
        is_valid = isinstance(rows, list) and (not drawn or {"label", "logarithmic"} <= drawn.keys())
    except (KeyError, TypeError, AttributeError):
        is_valid = False
    if not (is_valid and all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int | float) for number in numbers)):  # fmt: skip
        raise UserError(f"{path}: not a result of study.py; run the experiment again")
    return kept


def join(folders, out):
    """Join the results in `folders`, of other seeds or other runs each; returns their names.

    Raises UserError if two folders hold the same run and seed, or if none holds any.
    """
    names = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    if not names:
        raise UserError(f"no results of study.py in {', '.join(map(str, folders))}")
    check_folder(out, names)
    for name in names:
        parts = {path: read(path) for path in (f / f"{name}.json" for f in folders) if path.exists()}
        source = {}
        for path, part in parts.items():
            for row in part["rows"]:
                before = source.setdefault((row["run"], row["seed"]), path)
                if before != path:
                    raise UserError(
                        f"{before} and {path} both have seed {row['seed']} of {row['run']!r}: leave one out"
                    )
        rows = [row for part in parts.values() for row in part["rows"]]
        runs = list(dict.fromkeys(row["run"] for row in rows))
        rows.sort(key=lambda row: (row["seed"], runs.index(row["run"])))
        made = [made for part in parts.values() for made in part["made"]]
        *_, last = parts.values()
        write(out, name, last["what"], made, rows, last["drawn"])
    return names


def parse_args(argv=None):
    parser = options.new_parser(__doc__, EXAMPLE)
    parser.add_argument("folders", type=path_argument, nargs="+", help="folders results/ of study.py")
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/results"),
        help="folder of the joined results (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    print(f"{', '.join(join(args.folders, args.out))} in {args.out}")


if __name__ == "__main__":
    run_main(main)
