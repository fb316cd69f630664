"""Every command of the documentation and example of --help works, with the files it speaks of."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import zlib

import pytest
from conftest import HUNG, ROOT, replacing

from lib import lenses, strategies

README = ROOT / "README.md"
TEXTS = {path: path.read_text() for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
SCRIPTS = {path.name: path for path in ROOT.glob("*.py") if "EXAMPLE = " in path.read_text()}
EXPERIMENTS = {
    f"experiments/{path.name}": path
    for path in (ROOT / "experiments").glob("*.py") if "EXAMPLE = " in path.read_text()
}  # fmt: skip
# What is added to be quick, by script.
SHORTER = {
    "simulate.py": ["--per-class", "20"], "pretrain.py": ["--epochs", "1"],
    "finetune.py": ["--epochs", "1"], "evaluate.py": ["--resamples", "20"],
    "reconstruct.py": ["--resamples", "20"],
    # The test's small networks are near chance, where rounding reorders images.
    "export.py": ["--allowed-fall", "1"],
}  # fmt: skip
NEEDED = ("docs", "examples", "experiments", "lib", "models", "tests", "Makefile", "requirements.txt",
          "requirements-predict.txt")
# Commands that are not run here, and why; make is asked what it would do.
ELSEWHERE = {
    "make": "test_make.py, test_study.py and continuous integration run what it runs",
    "python3 -m venv": "makes an environment",
    "python3.11 -m venv": "makes an environment",
    "python -m pytest": "these tests",
    "python -m pip": "installs from the network",
    "npm": "continuous integration runs it before the tests",
    "node": "test_examples.py runs it where Node.js is installed",
    "python -m http.server": "test_page.py serves and opens the page",
    ".venv-lenstronomy/bin/python": "needs lenstronomy; its images are checked in",
    ".venv-bench/bin/python": "minutes of timing; test_bench.py runs its parts",
    "python evaluate.py --data lenstronomy-test": "needs lenstronomy's images",
    "python experiments/real_images.py": "needs real images; see test_real_images.py",
    "python evaluate.py --data new-lenses": "an hour of training makes its weights",
    "python finetune.py --data runs/many-lenses/data": "an hour of training makes its MAE",
    "python evaluate.py --data few-lenses": "an hour of training makes its weights",
    "python experiments/smooth_fits.py": "needs real images, or minutes; see test_real_lenses.py",
    "python predict.py --model runs/many-lenses.onnx": "an hour of training makes it; test_reading.py has its options",
    "python experiments/real_pairs.py": "needs real pairs; see test_sharpen.py",
    "python experiments/study.py": "hours; test_study.py runs every experiment",
    "python experiments/results.py": "test_study.py puts results together",
    "python experiments/bench.py": "minutes of timing; test_bench.py runs its parts",
    "torchrun --nnodes": "needs two machines; test_distributed.py starts two processes",
}  # fmt: skip
ENVIRONMENT = r"\.venv(-predict)?/bin/"


def written_commands(text):
    """The command lines in the sh blocks of a Markdown text, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def commands_of(text):
    """The same without the environment, as --help has them."""
    return [re.sub(f"^{ENVIRONMENT}", "", command) for command in written_commands(text)]


def examples():
    """The commands at the end of every script's --help."""
    for name in (*sorted(SCRIPTS), *sorted(EXPERIMENTS)):
        script = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        text = script.EXAMPLE.replace("\\\n", " ")
        yield from (" ".join(c.split()) for c in re.findall(r"python [\w/]+\.py.*", text))


def what_it_does(command):
    """A command without the name of its output; own/ is the same folder as runs/ in `place`."""
    return re.sub(r"--out \S+", "--out", command).replace("own/", "runs/")


COMMANDS = list(dict.fromkeys(c for text in TEXTS.values() for c in commands_of(text)))
EXAMPLES = list(examples())
RUN_HERE = {
    what_it_does(command): command
    for command in COMMANDS + EXAMPLES if not command.startswith(tuple(ELSEWHERE))
}.values()  # fmt: skip


@pytest.fixture(scope="module")
def place(runs, sharp_runs, public, folder, packed, tmp_path_factory):
    """A copy of the project with a data set, trained runs and cutouts, as the README has them."""
    place = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in NEEDED:
            (place / path.name).symlink_to(path)
    (place / "runs").mkdir()
    for path in (*runs.iterdir(), *sharp_runs.iterdir()):
        (place / "runs" / path.name).symlink_to(path)
    (place / "runs" / "data").symlink_to(packed)
    (place / "runs" / "samples").symlink_to(folder)
    (place / "coarse").symlink_to(public / "LR")
    (place / "own").symlink_to(place / "runs")  # the reader's own training
    (place / "lenses").symlink_to(folder)
    (place / "million").symlink_to(packed)
    (place / "real").mkdir()
    (place / "real" / "testVI_pictures.npz").touch()
    (place / "cutouts").symlink_to(folder / "cdm")
    return place


def test_written_commands_use_the_projects_environment():
    """A reader has .venv/ from make, and may have no other python with torch."""
    for path, text in TEXTS.items():
        for command in written_commands(text):
            launcher = command.split()[0]
            if "torchrun" in launcher or "python" in launcher:
                in_environment = re.fullmatch(r"\.venv(-\w+)?/bin/(python|torchrun)", launcher)
                makes_one = re.match(r"python3(\.\d+)? -m venv \.venv", command)
                assert in_environment or makes_one, f"{path.name}: {command}"


def test_readme_names_every_file_and_no_other():
    text = TEXTS[README]
    folders = {folder: {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
               for folder in (".", "lib", "experiments", "docs")}  # fmt: skip
    files = {name for name in folders["."] if name.endswith((".py", ".txt"))} | folders["lib"] | folders["experiments"]
    assert {*files, "Makefile"} - {"__init__.py"} <= set(re.findall(r"[\w.-]+", text))
    for folder in ("lib", "experiments", "examples", "docs", "tests"):
        assert f"{folder}/" in text
    tree = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    assert set(re.findall(r"\b[\w-]+\.(?:py|txt)\b", tree)) <= set().union(*folders.values())
    words = {word for command in COMMANDS + EXAMPLES for word in command.split()}
    assert SCRIPTS.keys() | EXPERIMENTS.keys() <= words


def test_every_link_leads_to_a_file_and_every_document_is_linked():
    linked = set()
    for path, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("https://"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
                linked.add((path.parent / target).resolve())
    assert {path for path in TEXTS if path != README} <= linked


@pytest.mark.parametrize("command", RUN_HERE, ids=str)
def test_command(command, place, monkeypatch):
    launcher, *words = command.split()
    script = next(word for word in words if word.endswith(".py"))
    if script != "export.py" or "--precision" in words:  # --allowed-fall is for lower precision
        words = replacing(words, SHORTER.get(script, []))
    # Into new folders: those of the fixture stay as they are.
    if "--out" in words:
        out = words.index("--out") + 1
        words[out] = f"new-{zlib.crc32(command.encode())}-{os.path.basename(words[out])}"
    if launcher == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*launch, *words], cwd=place, check=True, timeout=HUNG)
    else:
        assert launcher == "python", "say in ELSEWHERE where this is tested"
        # As python would, but in this process, which has torch loaded already.
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", words)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code
    if "--out" in words:
        assert (place / words[out]).exists()


@pytest.mark.parametrize("path", [p for p, text in TEXTS.items() if "```python" in text], ids=lambda p: p.name)
def test_python_of_the_documentation(path, place, monkeypatch, capsys):
    """It runs, and what it prints is a prediction of an image that the classifier knows."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(strategies, "STRATEGIES", dict(strategies.STRATEGIES))
    for code in re.findall(r"```python\n(.*?)```", TEXTS[path], re.DOTALL):
        # The test's few images have other names than those of make reproduce.
        image = sorted((place / "runs" / "samples" / "cdm").iterdir())[0]
        exec(code.replace("cdm_sim_0.npy", image.name), {})
        printed = capsys.readouterr().out.split()
        assert bool(printed) == ("print(" in code)
        assert not printed or printed[0] in (*lenses.CLASS_NAMES, "unfamiliar")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_what_to_do(command, place):
    words = [word.replace("/path/to/dataset", "lenses") for word in command.split()]
    process = subprocess.run(["make", "-n", *words[1:]], cwd=place, capture_output=True, text=True, timeout=HUNG)
    assert process.returncode == 0, process.stderr
