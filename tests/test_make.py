"""The Makefile: what it calls exists, and `make reproduce` leaves all and then does nothing."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import HUNG, ROOT, TINY_DECODER, TINY_NETWORK
from test_predict import read_csv


def make(*arguments):
    command = ["make", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture
def python(tmp_path):
    """A python that starts the scripts with fewer resamples than the Makefile asks for."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in evaluate.py|reconstruct.py) set -- "$@" --resamples 20;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_make_reproduce_runs_on_a_folder_and_does_nothing_twice(python, folder, tmp_path):
    ready = tmp_path / "ready"
    ready.touch()
    small = " ".join(TINY_NETWORK)
    command = ["reproduce", f"PY={python}", f"READY={ready}", f"DATA={folder}",
               f"RUNS={tmp_path / 'runs'}", "BASELINE=1",
               # Half of the patches hidden: fewer masks, so the maps are exported faster.
               f"PRETRAINING=--epochs 8 --mask-ratio 0.5 {small} {' '.join(TINY_DECODER)}",
               f"FINETUNING=--epochs 2 {small}"]  # fmt: skip
    printed = make(*command)
    out = tmp_path / "runs"
    for run in ("head", "layernorm", "full", "residual", "scratch"):
        assert (out / run / "vit-mae-classifier-wt.pth").exists()
    assert (out / "classifier.onnx").exists()
    assert len(read_csv(out / "predictions.csv")) == 15
    assert "| macro AUC |" in printed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    make(*command)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before

    # A script that crashes has failed, although predict.py exits with 1 for a file it cannot read.
    crashing = tmp_path / "crashing"
    crashing.write_text('#!/bin/sh\n[ "$1" != predict.py ] && exec ' + f'"{python}" "$@"\nexit 1\n')
    crashing.chmod(0o755)
    (out / "classifier.onnx").touch()
    process = subprocess.run(
        ["make", *command, f"PY={crashing}"], cwd=ROOT, capture_output=True, text=True, timeout=HUNG
    )
    assert process.returncode != 0
    assert not (out / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (("reproduce", "BASELINE=1"), {
            "simulate.py", "prepare.py", "pretrain.py", "finetune.py", "evaluate.py",
            "reconstruct.py", "export.py", "predict.py",
        }),
        (("study", "UNSEEN=x", "CUTOUTS=a b"), {
            "simulate.py", "prepare.py", "experiments/study.py", "experiments/results.py",
        }),
        (("real", "REAL=Makefile"), {
            "simulate.py", "pretrain.py", "finetune.py", "experiments/real_images.py",
        }),
        (("bench",), {"experiments/bench.py"}),
    ],
)  # fmt: skip
def test_make_calls_scripts_with_options_that_they_have(goal, expected, tmp_path):
    """Asks make what it would do in an empty folder of runs, and parses each command."""
    said = make("-n", *goal, "PY=python", f"RUNS={tmp_path / 'runs'}").replace("\\\n", " ")
    called = set()
    # Inside a recipe of several commands a script follows a semicolon.
    for script, arguments in re.findall(r"(?:^|;\s+|bench/bin/)python (\S+\.py)([^;\n]*)", said, re.M):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        words = shlex.split(arguments.split("&&")[0].replace("$mode", "--resume"))
        module.parse_args(words)
        called.add(script)
    assert called == expected
