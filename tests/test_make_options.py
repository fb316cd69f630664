"""make reproduce repeats what depends on a changed option, nothing else, whatever paths hold.

The scripts are replaced by a stub that writes down how it was called and leaves small files.
"""

import json
import os
import stat
import subprocess
import sys

import pytest
from conftest import HUNG, ROOT

STUB = """
import json, os, sys, pathlib
log, script, *words = sys.argv[1:]
def option(name):
    return words[words.index(name) + 1]
out = pathlib.Path(option("--out").removesuffix(".new"))
with open(log, "a") as file:
    file.write(json.dumps([script, out.name, words]) + "\\n")
with open(log + "-threads", "a") as file:
    file.write(f"{script} {os.environ.get('OMP_NUM_THREADS')}\\n")
def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
if script == "simulate.py":
    out = pathlib.Path(option("--out"))
    assert not out.exists()
    origin = f"simulate.py Model_II, {option('--per-class')} a class, seed {option('--seed')}, noise-free"
    write(out / "dataset.json", json.dumps({"origin": origin}, indent=2))
    write(out / "images.npy", "")
elif script == "prepare.py":
    folder = pathlib.Path(option("--data"))
    text = json.dumps(sorted(p.read_text() for p in folder.rglob("*") if p.is_file()))
    if not out.exists() or out.read_text() != text:
        write(out, text)
elif script in ("pretrain.py", "finetune.py"):
    name = "vit-mae-wt.pth" if script == "pretrain.py" else "vit-mae-classifier-wt.pth"
    if "--overwrite" in words:
        for file in out.glob("*"):
            file.unlink()
    assert not (out / name).exists(), "a finished run is not trained on"
    if not (out / "config.json").exists() or "--stop" not in words:
        write(out / "config.json", "")
    if "--stop" in words:
        sys.exit(1)
    write(out / name, "")
elif script == "evaluate.py":
    write(out / "metrics.json", "")
    write(out / "comparison.md", " ".join(words))
elif script == "reconstruct.py":
    write(out / "scores.csv", "")
else:
    write(out, "")
"""
ALL = ["prepare.py dataset.json", "pretrain.py pretrain", "finetune.py head", "finetune.py layernorm",
       "finetune.py full", "finetune.py residual", "evaluate.py evaluation", "reconstruct.py residuals",
       "export.py classifier.onnx", "export.py reconstruction.onnx", "predict.py predictions.csv"]  # fmt: skip
FINETUNED = ["finetune.py head", "finetune.py layernorm", "finetune.py full",
             "finetune.py residual", "evaluate.py evaluation", "export.py classifier.onnx", "predict.py predictions.csv"]  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """Function from options of make to (finished process, calls that were made)."""
    stub, log, ready = tmp_path / "stub.py", tmp_path / "log", tmp_path / "ready"
    stub.write_text(STUB)
    ready.touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {stub} {log} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def call(*options, check=True):
        log.write_text("")
        command = ["make", "reproduce", f"PY={python}", f"READY={ready}",
                   f"RUNS={tmp_path / 'runs'}", *options]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        process = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG, env=environment
        )
        assert not check or process.returncode == 0, process.stdout + process.stderr
        return process, [json.loads(line) for line in log.read_text().splitlines()]

    return call


def scripts(calls):
    """What was called, apart from prepare.py, which looks whether the data changed."""
    return sorted(f"{script} {out}" for script, out, _ in calls if script != "prepare.py")


def without_data(names):
    return sorted(name for name in names if not name.startswith("prepare.py"))


def images(folder, *classes, count=7):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.npy").write_text(f"{name} {i}")
    return folder


def test_the_same_command_does_nothing_twice(make, tmp_path):
    _, calls = make("PER_CLASS=20")
    assert scripts(calls) == without_data([*ALL, "simulate.py data", "simulate.py samples"])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    _, calls = make("PER_CLASS=20")
    assert scripts(calls) == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")} == before


@pytest.mark.parametrize("jobs", [(), ("-j2",), ("-kj8",), ("-j",)])
def test_stages_side_by_side_share_the_cores(jobs, make, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _, calls = make(*jobs)
    assert scripts(calls) == without_data([*ALL, "simulate.py data", "simulate.py samples"])
    told = dict(line.split() for line in (tmp_path / "log-threads").read_text().splitlines())
    shares = {"-j2": max(1, os.cpu_count() // 2), "-kj8": max(1, os.cpu_count() // 8),
              "-j": max(1, os.cpu_count() // 4)}  # fmt: skip
    share = str(shares[jobs[0]]) if jobs else "None"
    assert told["finetune.py"] == told["reconstruct.py"] == told["evaluate.py"] == share
    assert told["pretrain.py"] == "None"  # nothing runs beside it
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    make(*jobs, "PER_CLASS=20")
    assert set((tmp_path / "log-threads").read_text().splitlines()) >= {"finetune.py 7"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (("PRETRAINING=--mask-ratio 0.9",), ALL),
        (("FINETUNING=--labels 0.5",), FINETUNED),
        (("PER_CLASS=30",), [*ALL, "simulate.py data"]),
        (("BASELINE=1",), ["finetune.py scratch", "evaluate.py evaluation"]),
    ],
)
def test_what_depends_on_an_option_is_repeated(changed, expected, make):
    first = ("PER_CLASS=20", "PRETRAINING=--seed 1", "FINETUNING=--seed 2")
    make(*first)
    _, calls = make(*first, *changed)
    assert scripts(calls) == without_data(expected)
    words = [word for _, _, all_words in calls for word in all_words]
    for option in changed:
        for value in option.split("=")[1].split():
            assert option == "BASELINE=1" or value in words
    _, calls = make(*first, *changed)
    assert scripts(calls) == []
    _, calls = make(*first)
    assert "evaluate.py evaluation" in scripts(calls)
    assert not any("scratch" in word for _, _, words in calls for word in words)


@pytest.mark.parametrize(
    ("options", "clusters"),
    [((), ["--clusters", "3"]), (("CLUSTERS=",), []), (("DATA",), []),
     (("DATA", "CLUSTERS=2"), ["--clusters", "2"])],
)  # fmt: skip
def test_kinds_are_looked_for_where_their_number_is_known(options, clusters, make, tmp_path):
    """That is among simulated images, or where the user says it."""
    data = images(tmp_path / "data", "a", "b")
    options = [f"DATA={data}" if option == "DATA" else option for option in options]
    _, calls = make(*options)
    (words,) = (words for script, _, words in calls if script == "reconstruct.py")
    assert words[words.index("--out") + 2 :] == clusters
    _, calls = make(*options, "CLUSTERS=4")
    assert scripts(calls) == ["reconstruct.py residuals"]
    assert calls[-1][2][-2:] == ["--clusters", "4"]


def test_a_stopped_training_is_resumed_under_its_options_only(make, tmp_path):
    process, _ = make("PRETRAINING=--stop", check=False)
    assert process.returncode != 0
    kept = tmp_path / "runs" / "pretrain" / "checkpoint.pth"
    kept.touch()
    make("PRETRAINING=--stop", check=False)
    assert kept.exists()
    make("PRETRAINING=--seed 1")
    assert not kept.exists()


def test_changed_images_are_trained_on_again(make, tmp_path):
    data = images(tmp_path / "data", "a", "b")
    make(f"DATA={data}")
    (data / "a" / "7.npy").write_text("one more")
    _, calls = make(f"DATA={data}")
    assert scripts(calls) == without_data(ALL)


def test_other_data_are_predicted_on(make, tmp_path):
    make(f"DATA={images(tmp_path / 'one', 'a', 'b')}")
    other = images(tmp_path / "other", "a", "b")
    _, calls = make(f"DATA={other}")
    assert scripts(calls) == ["predict.py predictions.csv"]
    assert str(other / "a" / "0.npy") in calls[-1][2]


def test_images_of_every_kind_are_predicted_on(make, tmp_path):
    data = images(tmp_path / "data", "a")
    kinds = ("0.fits", "1.FIT.gz", "2.npz", "3.fts.bz2", "4.fz")
    for i, name in enumerate((*kinds, "5.txt")):
        (data / "a" / f"{i}.npy").rename(data / "a" / name)
    _, calls = make(f"DATA={data}")
    assert calls[-1][2][-5:] == [str(data / "a" / name) for name in kinds]


@pytest.mark.parametrize("name", ["my data", "it's", 'a "b"', "a$HOME", "a;b&c", "tab\tand  two", "é"])
@pytest.mark.parametrize("relative", [False, True])
def test_paths_may_hold_anything(name, relative, make, tmp_path):
    data = images(tmp_path / name, "no_sub", name, "with halo", "$(x)`y`")
    given = os.path.relpath(data, ROOT) if relative else str(data)
    _, calls = make(f"DATA={given}")
    assert all(words[words.index("--data") + 1] == given for *_, words in calls if "--data" in words)
    predicted = calls[-1][2][calls[-1][2].index("--") + 1 :]
    assert sorted(predicted) == sorted(
        f"{given}/{c}/{i}.npy" for c in ("no_sub", name, "with halo", "$(x)`y`") for i in range(5)
    )
    _, calls = make(f"DATA={given}")
    assert scripts(calls) == []


def test_a_packed_data_set_is_predicted_on_as_a_whole(make, tmp_path):
    data = tmp_path / "packed data"
    data.mkdir()
    (data / "dataset.json").write_text("{}")
    _, calls = make(f"DATA={data}")
    assert calls[-1][2][-1] == f"{data}/images.npy"


@pytest.mark.parametrize("origin", ["a survey", "simulate.py Model_I, 20 a class, seed 0, noise"])
def test_data_that_make_did_not_simulate_are_not_removed(origin, make, tmp_path):
    kept = tmp_path / "runs" / "data" / "dataset.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"origin": origin}, indent=2))
    process, calls = make(check=False)
    assert process.returncode != 0
    assert "was not simulated by make" in process.stderr
    assert kept.exists()
    assert calls == []
    kept.rename(kept.with_name("images.npy"))
    make(check=False)
    assert kept.with_name("images.npy").exists()


@pytest.mark.parametrize("option", ["RUNS=my runs", "RUNS=", "MODEL=my model.onnx"])
def test_a_path_that_make_cannot_take_is_one_line(option, make):
    process, calls = make(option, check=False)
    assert process.returncode != 0
    (line,) = process.stderr.strip().splitlines()
    assert f"{option.split('=')[0]} must be one path without spaces" in line
    assert calls == []
