"""Results of a study: each experiment's rows as JSON, its picture, and tables.md of them all.

study.py writes them. The seeds of a study are independent, so they may run apart, side by side or
on several machines; this script joins their results.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import plots, tables
from lib.errors import UserError, path_argument, run
from lib.files import read_json, write_json, write_text

EXAMPLE = """example:
  python experiments/results.py runs/study/results-0 runs/study/results-1 --out runs/results"""

FIGURES = ("AUC", "%", "error")  # keys of a row with one of these in them are measured
HOW = ("command", "commit", "precision")  # how rows were made
DRAWN = {"x", "label", "logarithmic", "y"}  # see `draw`


def by_run(rows):
    """{run: {figure: (mean, standard deviation, seeds)}}, in the order of the rows."""
    runs = {}
    for row in rows:
        for key, value in row.items():
            if _is_figure(key):
                runs.setdefault(row["run"], {}).setdefault(key, []).append(value)
    return {
        name: {
            key: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v))
            for key, v in figures.items()
        }
        for name, figures in runs.items()
    }


def _is_figure(key):
    return any(part in key for part in FIGURES)


def table(rows):
    """Markdown: a line a run, mean ± standard deviation over the seeds."""

    def cell(key, figures):
        if key not in figures:
            return ""
        mean, deviation, seeds = figures[key]
        digits = 2 if key.endswith("%") else 5
        tiny = "error" in key and mean <= 0.01
        text = f"{mean:.2e}" if tiny else f"{mean:.{digits}f}"
        spread = f"{deviation:.0e}" if tiny else f"{deviation:.{digits}f}"
        return f"{text} ± {spread}" if seeds > 1 else text

    runs = by_run(rows)
    keys = list(dict.fromkeys(key for figures in runs.values() for key in figures))
    rows = [[name, *(cell(key, figures) for key in keys)] for name, figures in runs.items()]
    return tables.markdown([["run", *keys], *rows])


def draw(path, rows, drawn):
    """The picture of an experiment: a dot a run or, as `drawn` says, a figure against a quantity.

    `drawn` is None or {"x": key of a row, "label": its label or None where every kind has its own,
    "logarithmic": bool, "y": the figure}.
    """
    if drawn is None:
        plots.dots(path, {
            run_name: {k: v[:2] for k, v in figures.items() if "AUC" in k}
            for run_name, figures in by_run(rows).items()
        })  # fmt: skip
        return
    series = {}
    for run_name, figures in by_run(rows).items():
        row = next(row for row in rows if row["run"] == run_name)
        series.setdefault(row["kind"], []).append((row[drawn["x"]], *figures[drawn["y"]][:2]))
    # Joined results may come in any order.
    series = {kind: sorted(points) for kind, points in series.items()}
    plots.series(path, series, drawn["label"], drawn["y"], drawn["logarithmic"])


def write(folder, name, what, made, rows, drawn=None):
    """Keep an experiment: its JSON and PNG, and the tables of all experiments in `folder`.

    `what` says what it compares. `made` is a list of dicts with the keys of HOW, one for each
    command that made some of the rows. For `drawn` see `draw`.
    """
    content = {"what": what, "made": made, "drawn": drawn, "rows": rows}
    write_json(folder / f"{name}.json", content)
    draw(folder / f"{name}.png", rows, drawn)
    text = ["# Results of study.py", ""]
    for other in names_in([folder]):
        kept = read(folder / f"{other}.json")
        text += [f"## {other}", "", kept["what"], "", table(kept["rows"]), ""]
        text += [f"- `{m['command']}`, commit {m['commit']}, {m['precision']}"
                 for m in kept["made"]]  # fmt: skip
        text += ["", f"![{other}]({other}.png)", ""]
    write_text(folder / "tables.md", "\n".join(text))


def names_in(folders):
    """Names of the experiments whose results lie in any of the folders."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.json")})


def read(path):
    """What `write` has kept of an experiment; UserError if it is something else."""
    kept = read_json(path)
    what, made, rows, drawn = (kept.get(key) for key in ("what", "made", "rows", "drawn"))
    if not (
        isinstance(what, str)
        and isinstance(made, list)
        and all(isinstance(m, dict) and set(HOW) <= m.keys() for m in made)
        and (drawn is None or (isinstance(drawn, dict) and DRAWN <= drawn.keys()))
        and isinstance(rows, list)
        and all(_is_row(row, drawn) for row in rows)
    ):
        raise UserError(f"{path}: not a result of study.py; run the experiment again")
    return kept


def _is_row(row, drawn):
    """Whether `row` has what the table and the picture need, numbers where they must be."""
    if not isinstance(row, dict):
        return False
    numbers = {"seed", *(key for key in row if _is_figure(key))}
    texts = {"run"}
    if drawn:
        numbers |= {drawn["x"], drawn["y"]}
        texts |= {"kind"}
    return all(isinstance(row.get(key), int | float) for key in numbers) and all(
        isinstance(row.get(key), str) for key in texts
    )


def join(folders, out):
    """Join the results in `folders`, of other seeds or other runs each; returns their names.

    Raises UserError if two folders hold the same run and seed, or if none holds any.
    """
    names = names_in(folders)
    if not names:
        raise UserError(f"no results of study.py in {', '.join(map(str, folders))}")
    for name in names:
        made, rows, source = [], [], {}
        for path in (f / f"{name}.json" for f in folders):
            if not path.exists():
                continue
            kept = read(path)
            made += kept["made"]
            for row in kept["rows"]:
                before = source.setdefault((row["run"], row["seed"]), path)
                if before != path:
                    raise UserError(
                        f"{before} and {path} both have seed {row['seed']} of {row['run']!r}: "
                        "leave one out"
                    )
                rows.append(row)
        runs = list(dict.fromkeys(row["run"] for row in rows))
        rows.sort(key=lambda row: (row["seed"], runs.index(row["run"])))
        write(out, name, kept["what"], made, rows, kept.get("drawn"))
    return names


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=path_argument, nargs="+", help="folders that study.py had as --results")
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/results"),
        help="folder of the joined results (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    names = join(args.folders, args.out)
    print(f"{', '.join(names)} in {args.out}")


if __name__ == "__main__":
    run(main)
