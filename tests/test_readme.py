"""Every command of the README and example of --help works, with the files that it speaks of."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import HUNG, ROOT

# What is added to be quick, by script.
SHORTER = {
    "simulate.py": ["--per-class", "20"], "pretrain.py": ["--epochs", "1"],
    "finetune.py": ["--epochs", "1"], "evaluate.py": ["--resamples", "20"],
    "reconstruct.py": ["--resamples", "20"],
    # The test's small networks are near chance, where rounding reorders images.
    "export.py": ["--allowed-fall", "1"],
}  # fmt: skip
NEEDED = ("docs", "examples", "tests", "Makefile", "requirements.txt", "requirements-bench.txt")
# Commands that are not run here, and why; make is asked what it would do.
ELSEWHERE = {
    "make": "test_pipeline.py, test_study.py and continuous integration run what it runs",
    "pip": "installs from the network",
    "npm": "continuous integration runs it before the tests",
    "cp": "test_examples.py puts the files there",
    "python -m http.server": "test_examples.py serves and opens the page",
    "python tests/reference/make_lenstronomy.py": "needs lenstronomy; its images are checked in",
    "python evaluate.py --data lenstronomy-test": "needs lenstronomy's images",
    "python experiments/real_images.py": "needs real images; see test_real_images.py",
    "python study.py": "hours; test_study.py runs every experiment",
    "python results.py": "test_study.py puts results together",
    "python bench.py": "minutes of timing; test_bench.py runs its parts",
    "torchrun --nnodes": "needs two machines; test_distributed.py starts two processes",
}  # fmt: skip


def commands_of(text):
    """The command lines in the sh blocks of a Markdown text, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def examples():
    """The commands at the end of every script's --help."""
    for path in sorted(ROOT.glob("*.py")):
        script = importlib.import_module(path.stem)
        if hasattr(script, "main"):
            text = script.EXAMPLE.replace("\\\n", " ")
            yield from (" ".join(c.split()) for c in re.findall(r"python \w+\.py.*", text))


COMMANDS = commands_of((ROOT / "README.md").read_text())
COMMANDS += [c for c in examples() if c not in COMMANDS]
RUN_HERE = [c for c in COMMANDS if not c.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def place(runs, folder, packed, tmp_path_factory):
    """A copy of the project with a data set, trained runs and cutouts, as the README has them."""
    place = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in NEEDED:
            (place / path.name).symlink_to(path)
    (place / "runs").mkdir()
    for path in runs.iterdir():
        (place / "runs" / path.name).symlink_to(path)
    (place / "runs" / "data").symlink_to(packed)
    (place / "lenses").symlink_to(folder)
    (place / "real").mkdir()
    (place / "real" / "testVI_pictures.npz").touch()
    (place / "cutouts").symlink_to(folder / "cdm")
    return place


def test_every_script_is_among_the_commands():
    scripts = {path.name for path in ROOT.glob("*.py") if "EXAMPLE = " in path.read_text()}
    assert scripts == {word for c in COMMANDS for word in c.split() if word in scripts}
    assert len(scripts) == 11


@pytest.mark.parametrize("command", RUN_HERE)
def test_command(command, place, monkeypatch):
    launcher, *words = command.split()
    script = next(word for word in words if word.endswith(".py"))
    # Into new folders: those of the fixture stay as they are.
    if "--out" in words:
        out = words.index("--out") + 1
        words[out] = f"new-{len(words)}-{os.path.basename(words[out])}"
    words += SHORTER.get(script, [])
    if launcher == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*launch, *words], cwd=place, check=True, timeout=HUNG)
    else:
        assert launcher == "python", "say in ELSEWHERE where this is tested"
        # As python would, but in this process, which has torch loaded already.
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        assert not ended.value.code
    if "--out" in words:
        assert (place / words[out]).exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_what_to_do(command, place):
    words = [word.replace("/path/to/dataset", "lenses") for word in command.split()]
    process = subprocess.run(
        ["make", "-n", *words[1:]], cwd=place, capture_output=True, text=True, timeout=HUNG
    )
    assert process.returncode == 0, process.stderr
