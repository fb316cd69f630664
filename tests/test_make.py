"""The Makefile: what it calls exists, in which order, with which options, whatever paths hold."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CLASSIFIER, HUNG, ROOT, TINY_DECODER, TINY_NETWORK, read_csv

# Writes down how it was called, and leaves the file that predict.py and make look at afterwards.
STUB = """
import json, os, sys, pathlib
log, script, *words = sys.argv[1:]
with open(log, "a") as file:
    file.write(json.dumps([script, words, os.environ.get("OMP_NUM_THREADS")]) + "\\n")
out = pathlib.Path(words[words.index("--out") + 1]) if "--out" in words else None
if script == "evaluate.py":
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").touch()
if script == "predict.py" and not os.environ.get("CRASH"):
    out.write_text("file,prediction")
sys.exit(script == "predict.py")
"""
STAGES = ["pretrain.py pretrain", "finetune.py head", "finetune.py layernorm", "finetune.py full",
          "finetune.py residual", "evaluate.py evaluation", "reconstruct.py residuals",
          "export.py classifier.onnx", "export.py reconstruction.onnx", "predict.py predictions.csv"]  # fmt: skip
SIMULATIONS = ["simulate.py data", "simulate.py samples"]


def run_make(*arguments, check=True, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    process = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True,
                             timeout=HUNG, env=kept | environment)  # fmt: skip
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path):
    """Options of make: folders of this test, and a python that keeps them short."""
    (tmp_path / "ready").touch()
    few = 'case "$1" in evaluate.py|reconstruct.py) set -- "$@" --resamples 20;; esac'
    python = executable(tmp_path / "python", f'{few}\nexec {sys.executable} "$@"')
    return [f"PY={python}", f"READY={tmp_path / 'ready'}", f"RUNS={tmp_path / 'runs'}"]


@pytest.fixture
def make(environment, tmp_path):
    """Function from options of make to (finished process, [(script, words, threads), ...])."""
    log, stub = tmp_path / "log", tmp_path / "stub.py"
    stub.write_text(STUB)
    python = executable(tmp_path / "stub", f'exec {sys.executable} -S {stub} {log} "$@"')

    def call(*options, goal="reproduce", **more):
        log.write_text("")
        process = run_make(goal, *environment, f"PY={python}", *options, **more)
        return process, [json.loads(line) for line in log.read_text().splitlines()]

    return call


def option(words, name):
    return words[words.index(name) + 1]


def called(calls):
    return [f"{script} {os.path.basename(option(words, '--out'))}" for script, words, _ in calls if script != "data.py"]


def images(folder, *classes, count=7):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.npy").touch()
    return folder


def test_make_reproduce_runs_on_a_folder_and_does_nothing_twice(environment, folder, tmp_path):
    small = " ".join(TINY_NETWORK)
    command = ["reproduce", *environment, f"DATA={folder}", "BASELINE=1",
               # Half of the patches hidden: fewer masks, so the maps are exported faster.
               f"PRETRAINING=--epochs 8 --mask-ratio 0.5 {small} {' '.join(TINY_DECODER)}",
               f"FINETUNING=--epochs 2 {small}"]  # fmt: skip
    printed = run_make(*command).stdout
    out = tmp_path / "runs"
    for run in ("head", "layernorm", "full", "residual", "scratch"):
        assert (out / run / CLASSIFIER).exists()
    assert (out / "classifier.onnx").exists()
    assert len(read_csv(out / "predictions.csv")) == 15
    assert "| macro AUC |" in printed

    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    again = run_make(*command).stdout
    assert again.count("already finished: ") == 6
    assert again.count("already up to date: ") == 4
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    run_make("clean", *environment)
    assert not out.exists()


TRAINED = {"pretrain.py", "finetune.py", "evaluate.py", "export.py"}
WHOLE = TRAINED | {"reconstruct.py", "predict.py"}


@pytest.mark.parametrize(("goal", "expected"), [
    (("reproduce", "BASELINE=1"), {"simulate.py", *WHOLE}), (("reproduce", "DATA=x"), {"data.py", *WHOLE}),
    (("quick",), {"simulate.py", *WHOLE}), (("bench",), {"experiments/bench.py"}),
    (("study", "UNSEEN=x", "CUTOUTS=a b"), {"simulate.py", "experiments/study.py", "experiments/results.py"}),
    (("real", "REAL=Makefile"), {"simulate.py", "pretrain.py", "finetune.py", "experiments/real_images.py"}),
    (("mass", "DATA=x"), {"data.py", *TRAINED}),
    *(((goal, *data), {script, *TRAINED}) for goal in ("sharpen", "many-lenses")
      for data, script in (((), "simulate.py"), (("DATA=x",), "data.py"))),
])  # fmt: skip
def test_make_calls_scripts_with_options_that_they_have(goal, expected, tmp_path):
    """Asks make what it would do in an empty folder of runs, and parses each command."""
    said = run_make("-n", *goal, "PY=python", f"RUNS={tmp_path / 'runs'}").stdout.replace("\\\n", " ")
    scripts = set()
    # Inside a recipe of several commands a script follows a semicolon.
    for script, arguments in re.findall(r"(?:^|;\s+|bench/bin/)python (\S+\.py)([^;\n]*)", said, re.M):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        module.parse_args(shlex.split(arguments.split("||")[0]))
        scripts.add(script)
    assert scripts == expected


@pytest.mark.parametrize("goal", ["reproduce", "study", "real", "bench", "test"])
def test_every_goal_makes_the_environment_that_it_needs(goal, tmp_path):
    said = run_make("-n", goal, f"READY={tmp_path / 'ready'}", f"PEERS={tmp_path / 'peers'}", "REAL=Makefile").stdout
    notice, first, *_ = said.splitlines()
    assert notice.startswith("echo 'making .venv") and first == "python3 -m venv .venv"  # pip is silent for minutes


@pytest.mark.parametrize("jobs", [(), ("-j2",), ("-kj8",), ("-j",)])
def test_stages_come_in_order_and_side_by_side_share_the_cores(jobs, make, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _, calls = make(*jobs)
    assert sorted(called(calls)) == sorted(STAGES + SIMULATIONS)
    place = {name: i for i, name in enumerate(called(calls))}
    for first, then in (("simulate.py data", "pretrain.py pretrain"), ("pretrain.py pretrain", "finetune.py full"),
                        ("finetune.py head", "finetune.py layernorm"),
                        ("finetune.py layernorm", "evaluate.py evaluation"),
                        ("pretrain.py pretrain", "reconstruct.py residuals"),
                        ("finetune.py residual", "export.py classifier.onnx"),
                        ("export.py reconstruction.onnx", "predict.py predictions.csv"),
                        ("simulate.py samples", "predict.py predictions.csv")):  # fmt: skip
        assert place[first] < place[then]
    if jobs in ((), ("-j2",)):  # the longest first
        assert max(place[f"finetune.py {name}"] for name in ("full", "residual")) < place["finetune.py head"]
    (words,) = (words for script, words, _ in calls if script == "evaluate.py")
    weights = words[words.index("--weights") + 1 : words.index("--out")]
    assert [Path(path).parent.name for path in weights] == ["head", "layernorm", "full", "residual"]
    for script, words, _ in calls:
        assert "--update" in words or script == "predict.py"
    told = {script: threads for script, _, threads in calls}
    shares = {"-j2": max(1, os.cpu_count() // 2), "-kj8": max(1, os.cpu_count() // 8),
              "-j": max(1, os.cpu_count() // 4)}  # fmt: skip
    share = str(shares[jobs[0]]) if jobs else None
    assert told["finetune.py"] == told["reconstruct.py"] == told["evaluate.py"] == share
    assert told["pretrain.py"] is None  # nothing runs beside it
    _, calls = make(*jobs, OMP_NUM_THREADS="7")
    assert {threads for *_, threads in calls} == {"7"}


def test_options_reach_their_scripts(make, tmp_path):
    def words_of(script, *options):
        (found, *_) = (words for name, words, _ in make(*options)[1] if name == script)
        return found

    assert words_of("pretrain.py", "PRETRAINING=--seed 1 --epochs 2")[-4:] == ["--seed", "1", "--epochs", "2"]
    assert words_of("finetune.py", "FINETUNING=--seed 2")[-2:] == ["--seed", "2"]
    assert option(words_of("simulate.py", "PER_CLASS=20"), "--per-class") == "20"
    assert any("scratch" in word for word in words_of("evaluate.py", "BASELINE=1"))
    assert not any("scratch" in word for word in words_of("evaluate.py"))
    said = run_make("-n", "quick", f"RUNS={tmp_path / 'x'}", "PER_CLASS=20", "PRETRAINING=--seed 3").stdout
    assert "--per-class '20'" in said and "--epochs 8 --lr 0.004 --seed 3" in said
    data = f"DATA={images(tmp_path / 'data', 'a', 'b')}"
    for options, clusters in (((), "3"), (("CLUSTERS=",), None), ((data,), None), ((data, "CLUSTERS=2"), "2")):
        words = words_of("reconstruct.py", *options)
        assert (option(words, "--clusters") if "--clusters" in words else None) == clusters


def test_images_of_every_kind_are_predicted_on_and_packed_ones_pictures_or_a_table_as_a_whole(make, tmp_path):
    (tmp_path / "fits" / "a").mkdir(parents=True)
    paths = [tmp_path / "fits" / "a" / name for name in ("0.fits", "1.FIT.gz", "2.npz", "3.fts.bz2", "4.fz")]
    for path in (*paths, tmp_path / "fits" / "a" / "5.txt"):
        path.touch()
    _, calls = make(f"DATA={tmp_path / 'fits'}")
    assert calls[-1][1][-5:] == list(map(str, paths))
    for name in ("a/1.png", "b/1.png", "labels.csv", "1.npy"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    _, calls = make(f"DATA={tmp_path / 'data'}")
    (words,) = (words for script, words, _ in calls if script == "predict.py")
    assert words[words.index("--") + 1 :] == [str(tmp_path / "data")]
    packed = tmp_path / "packed data"
    packed.mkdir()
    (packed / "dataset.json").write_text("{}")
    _, calls = make(f"DATA={packed}")
    assert calls[-1][1][-1] == f"{packed}/images.npy"


@pytest.mark.parametrize("name", ["my data", "it's", 'a "b"', "a$HOME", "a;b&c", "tab\tand  two", "é"])
@pytest.mark.parametrize("relative", [False, True])
def test_paths_may_hold_anything(name, relative, make, tmp_path):
    data = images(tmp_path / name, "no_sub", name, "with halo", "$(x)`y`")
    given = os.path.relpath(data, ROOT) if relative else str(data)
    _, calls = make(f"DATA={given}")
    assert [script for script, *_ in calls][0] == "data.py"
    assert all(option(words, "--data") == given for _, words, _ in calls if "--data" in words)
    predicted = calls[-1][1][calls[-1][1].index("--") + 1 :]
    assert sorted(predicted) == sorted(
        f"{given}/{c}/{i}.npy" for c in ("no_sub", name, "with halo", "$(x)`y`") for i in range(5)
    )


def test_predictions_of_an_earlier_call_do_not_hide_a_crash(make):
    """predict.py exits with 1 for a file that it cannot read, too: then it has left its table."""
    make()
    process, _ = make(check=False, CRASH="1")
    assert process.returncode != 0


def test_variables_of_the_environment_do_not_count(make, tmp_path):
    """They belong to something else; only what make's command line says is an option."""
    foreign = images(tmp_path / "foreign", "a")
    names = ("DATA", "BASELINE", "PER_CLASS", "CLUSTERS", "PRETRAINING", "FINETUNING", "REAL", "UNSEEN",
             "CUTOUTS", "SEEDS", "PYTHON", "VENV", "MODEL", "MAPS", "PRETRAINED", "PICTURES", "MADE",
             "SAMPLES", "IMAGES", "JOBS")  # fmt: skip
    usual = make()[1]
    assert make(**dict.fromkeys(names, str(foreign)))[1] == usual
    data = f"DATA={images(tmp_path / 'data', 'a', 'b')}"
    assert make(data, **dict.fromkeys(names, str(foreign)))[1] == make(data)[1]
    for goal in ("reproduce", "study"):
        said = run_make("-n", goal, RUNS=str(foreign), **dict.fromkeys(names, str(foreign))).stdout
        assert str(foreign) not in said
    run_make("clean", f"RUNS={tmp_path / 'runs'}", **dict.fromkeys(names, str(foreign)))
    assert not (tmp_path / "runs").exists()
    assert len(list((foreign / "a").iterdir())) == 7


def test_clean_removes_what_make_has_made_and_nothing_else(make, environment, tmp_path):
    theirs = tmp_path / "thesis"
    images(theirs / "data", "years")
    run_make("clean", f"RUNS={theirs}", f"MADE={theirs}")
    run_make("clean", RUNS=str(theirs))
    make(f"RUNS={theirs}")
    assert "nothing removed" in run_make("clean", f"RUNS={theirs}").stdout
    assert len(list((theirs / "data" / "years").iterdir())) == 7
    make()
    (tmp_path / "runs" / "mine").touch()
    assert "keeps" in run_make("clean", *environment).stdout
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [".made-by-make", "mine"]


@pytest.mark.parametrize("option", ["RUNS=my runs", "RUNS=", "MODEL=my model.onnx", "DATA="])
def test_a_path_that_make_cannot_take_is_one_line(option, make):
    process, calls = make(option, check=False)
    assert process.returncode != 0
    (line,) = process.stderr.strip().splitlines()
    assert option.split("=")[0] in line
    assert calls == []


def test_the_demo_says_what_takes_its_time_first_and_names_no_file_after_predict(tmp_path):
    small = tmp_path / "small"
    said = run_make("-n", "demo", f"SMALL={small}", f"RUNS={tmp_path / 'runs'}").stdout.splitlines()
    assert said[0].startswith(f"echo 'making {small}") and said[1] == f"python3 -m venv {small}"
    assert not [line for line in said[1:] if line.startswith("echo")]
