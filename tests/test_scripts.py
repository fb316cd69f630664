"""What all scripts have in common, and which file may import which."""

import ast
import graphlib
import importlib
import importlib.metadata
import json
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import (
    ROOT,
    TINY_NETWORK,
    assert_user_error,
    bound_by_permissions,
    run_code,
    run_python,
    run_script,
)
from test_predict import read_csv

from lib import weights

SCRIPTS = ("simulate", "prepare", "pretrain", "finetune", "evaluate", "reconstruct", "export",
           "predict")  # fmt: skip
EXPERIMENTS = ("study", "results", "bench", "real_images")
MODULES = [path.stem for path in sorted((ROOT / "lib").glob("*.py"))]


# What a user sees


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"experiments/{name}" for name in EXPERIMENTS)])
def test_help_shows_an_example_and_defaults(script):
    process = run_script(f"{script}.py", "--help")
    assert f"python {script}.py" in process.stdout
    if script != "experiments/real_images":  # whose options are those of its parts
        assert "default" in process.stdout


@pytest.mark.parametrize(
    ("script", "option"),
    [("prepare", "--device"), ("simulate", "--device"), ("export", "--device"), ("predict", "--seed")],
)
def test_options_that_would_do_nothing_are_refused(script, option):
    process = run_script(f"{script}.py", "--help")
    assert option not in process.stdout
    parse_args = importlib.import_module(script).parse_args
    given = {"prepare": ["--data", "x"], "simulate": ["--out", "x"],
             "export": ["--weights", "x", "--out", "x"],
             "predict": ["--model", "x", "--out", "x", "x"]}[script]  # fmt: skip
    parse_args(given)
    with pytest.raises(SystemExit):
        parse_args([*given, option, "0"])


def mistakes(runs, folder, tmp_path):
    """name: (script, arguments, what the error names)."""
    cache = ("--data", folder, "--cache-dir", runs / "cache")
    out = ("--out", tmp_path / "out")
    pretrained = runs / "pretrain" / "vit-mae-wt.pth"
    classifier = runs / "full" / "vit-mae-classifier-wt.pth"
    file = tmp_path / "file"
    file.write_text("a file, not a folder")
    small = tmp_path / "small"
    for name in ("axion", "cdm", "no_sub"):
        (small / name).mkdir(parents=True)
        for i in range(60):
            np.save(
                small / name / f"{i}.npy", np.random.default_rng([i, len(name)]).random((32, 32))
            )
    two = tmp_path / "two"
    for name in ("axion", "cdm"):
        (two / name).mkdir(parents=True)
        for i in range(60):
            np.save(two / name / f"{i}.npy", np.random.default_rng([i, len(name)]).random((64, 64)))
    full = ("--strategy", "full")
    return {
        "nothing to pack": ("prepare.py", ("--data", tmp_path / "gone"), "gone"),
        "no images a class": ("simulate.py", (*out, "--per-class", 0), "--per-class"),
        "simulated already": ("simulate.py", ("--out", small, "--per-class", 1), small),
        "no such class": ("pretrain.py", (*cache, *out, "--classes", "wdm"), "wdm"),
        "no no_sub": ("pretrain.py", ("--data", two, *out), "no_sub"),
        "patch size": ("pretrain.py", (*cache, *out, "--patch-size", 7), "--patch-size 7"),
        "heads": ("pretrain.py", (*cache, *out, "--num-heads", 5), "5 heads"),
        "mask ratio": ("pretrain.py", (*cache, *out, "--mask-ratio", 1), "--mask-ratio"),
        "epochs": ("pretrain.py", (*cache, *out, "--epochs", 0), "--epochs"),
        "mlp ratio": ("pretrain.py", (*cache, *out, "--mlp-ratio", 0), "--mlp-ratio"),
        "lr": ("pretrain.py", (*cache, *out, "--lr", -1), "--lr"),
        "device": ("pretrain.py", (*cache, *out, "--device", "cuda:77"), "--device"),
        "no device": ("pretrain.py", (*cache, *out, "--device", "abacus"), "--device"),
        "out is a file": ("pretrain.py", (*cache, "--out", file), file),
        "no weights": (
            "finetune.py", (*cache, *out, *full, "--pretrained", tmp_path / "no.pth"), "no.pth",
        ),
        "head of a classifier": (
            "finetune.py", (*cache, *out, *full, "--pretrained", classifier, "--pool", "cls"),
            "--pool",
        ),
        "other size": (
            "finetune.py", ("--data", small, *out, *full, "--pretrained", pretrained), "64 pixels",
        ),
        "head of nothing": (
            "finetune.py", (*cache, *out, "--pretrained", "none", "--strategy", "head"),
            "--pretrained none",
        ),
        "labels": (
            "finetune.py", (*cache, *out, *full, "--pretrained", "none", "--labels", 2), "--labels",
        ),
        "weights of an encoder": ("evaluate.py", (*cache, *out, "--weights", pretrained),
                                  pretrained),
        "size": ("evaluate.py", ("--data", small, *out, "--weights", classifier), "64 pixels"),
        "missing class": ("evaluate.py", ("--data", two, *out, "--weights", classifier), "no_sub"),
        "all of the training data": (
            "evaluate.py", (*cache, *out, "--weights", classifier, "--split", "all"),
            "--split all",
        ),
        "residuals of a classifier": ("reconstruct.py", (*cache, *out, "--weights", classifier),
                                      classifier),
        "residuals of another size": ("reconstruct.py", ("--data", small, *out, "--weights",
                                                         pretrained), "64 pixels"),
        "rounds": ("reconstruct.py", (*cache, *out, "--weights", pretrained, "--rounds", 0),
                   "--rounds"),
        "one kind": ("reconstruct.py", (*cache, *out, "--weights", pretrained, "--clusters", 1),
                     "--clusters"),
        "many kinds": ("reconstruct.py", (*cache, *out, "--weights", pretrained, "--clusters", 21),
                       "--clusters"),
        "no results": ("experiments/results.py", (runs, *out), runs),
        "seeds": ("experiments/study.py", (*cache, *out, "--seeds", -1), "--seeds"),
        "repeats": ("experiments/bench.py", (*out, "--repeats", 0), "--repeats"),
        "nothing to export": ("export.py", ("--weights", file, "--out", tmp_path / "m.onnx"), file),
        "no data to check with": (
            "export.py", ("--weights", classifier, "--out", tmp_path / "m.onnx", "--data", tmp_path / "x"), "--data",
        ),
        "no model": ("predict.py", ("--model", tmp_path / "x.onnx", *out, file), "x.onnx"),
        "no images": (
            "predict.py", ("--model", runs / "classifier.onnx", *out, tmp_path / "gone"), "gone",
        ),
        "empty folder": (
            "predict.py", ("--model", runs / "classifier.onnx", *out, runs / "full"), ".npy",
        ),
    }  # fmt: skip


def test_every_mistake_ends_with_one_line_that_names_it(runs, folder, tmp_path):
    for name, (script, arguments, named) in mistakes(runs, folder, tmp_path).items():
        process = run_script(script, *arguments, check=False)
        assert process.returncode == 2, name + process.stdout + process.stderr
        error = process.stderr.splitlines(keepends=True)[-1]  # behind a progress bar
        assert str(named) in error, name
        assert error.startswith("error: "), name
        assert error.endswith("\n"), name
        left = (
            [p.name for p in (tmp_path / "out").rglob("*")] if (tmp_path / "out").is_dir() else []
        )
        assert left == [], name


def test_an_unwritable_folder_is_named(runs, folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    process = run_python(
        "pretrain.py", "--data", folder, "--cache-dir", runs / "cache",
        "--out", tmp_path / "locked" / "run", check=False, before=bound_by_permissions(),
    )  # fmt: skip
    assert_user_error(process, tmp_path / "locked")
    assert len(process.stderr.splitlines()) == 1


def test_other_classes_and_sizes_work_throughout(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for level, name in enumerate(("faint", "bright")):
        (root / name).mkdir(parents=True)
        for i in range(60):
            np.save(root / name / f"{i}.npy", rng.random((48, 48)) + level)
    run_script("finetune.py", "--data", root, "--pretrained", "none", "--strategy", "full",
               "--out", tmp_path / "run", "--epochs", 8, "--batch-size", 16,
               *TINY_NETWORK)  # fmt: skip
    path = tmp_path / "run" / "vit-mae-classifier-wt.pth"
    assert weights.load_classifier(path)[1]["class_names"] == ["bright", "faint"]
    run_script("evaluate.py", "--data", root, "--weights", path, "--out", tmp_path / "e",
               "--resamples", 20)  # fmt: skip
    result = json.loads((tmp_path / "e" / "metrics.json").read_text())["results"]["run"]
    assert result["macro"]["value"] > 0.95
    assert "iampratyusht" not in (tmp_path / "e" / "comparison.md").read_text()
    run_script("export.py", "--weights", path, "--out", tmp_path / "two.onnx")
    run_script("predict.py", "--model", tmp_path / "two.onnx", "--out", tmp_path / "p.csv",
               root / "faint" / "1.npy")  # fmt: skip
    assert list(read_csv(tmp_path / "p.csv")[0]) == ["file", "bright", "faint", "prediction"]


# What imports what


def imports_of(path):
    """Dotted names of all modules that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            own = {f"lib.{name}" for name in MODULES} | {f"experiments.{n}" for n in EXPERIMENTS}
            found |= (names & own) or {node.module}
    return found


def first_parts(names):
    return {name.split(".")[0] for name in names}


def test_imports_do_nothing():
    names = [*SCRIPTS, "mae", *(f"lib.{name}" for name in MODULES if name != "__init__"),
             *(f"experiments.{name}" for name in EXPERIMENTS)]  # fmt: skip
    process = run_code("import " + ", ".join(names))
    assert process.stdout == process.stderr == ""


def test_no_script_is_imported_by_another_or_by_lib():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"mae"}
    assert scripts == set(SCRIPTS)
    for path in (*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")):
        wrong = first_parts(imports_of(path)) & (scripts | {"experiments", "docs", "tests"})
        assert not wrong, f"{path.name} imports {wrong}"


def test_the_network_imports_torch_and_the_standard_library_alone():
    assert first_parts(imports_of(ROOT / "mae.py")) <= {"torch"} | sys.stdlib_module_names


def test_imports_inside_lib_have_no_cycle():
    graph = {
        f"lib.{name}": {n for n in imports_of(ROOT / "lib" / f"{name}.py") if n.startswith("lib.")}
        for name in MODULES
    }
    assert sum(map(len, graph.values())) > len(graph)  # imports are found
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def packages_without(*kept):
    """Top-level names of all installed packages but `kept` and what these require."""
    needed, left = set(), list(kept)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in needed:
            needed.add(name)
            try:
                required = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # for another system
                continue
            left += [re.match(r"[\w.-]+", r)[0] for r in required if "extra ==" not in r]
    installed = importlib.metadata.packages_distributions().items()
    return [
        module for module, names in installed
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & needed
    ]  # fmt: skip


def test_prediction_needs_numpy_and_onnxruntime_alone(runs, lens_image, tmp_path):
    """On a machine that has predict.py, lib/ and a model, but no other package and no mae.py."""
    refused = packages_without("numpy", "onnxruntime")
    assert {"torch", "onnx", "sklearn", "matplotlib", "tqdm", "scipy", "astropy"} <= {*refused}
    shutil.copy(ROOT / "predict.py", tmp_path)
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    np.save(tmp_path / "one.npy", lens_image)
    code = (
        "import os, sys\n"
        "os.chdir(sys.argv.pop(1))\n"
        "import predict\n"
        "from lib import errors, files\n"
        "assert files.__file__.startswith(os.getcwd()), files.__file__\n"
        "arguments = sys.argv[1:]\n"
        "predict.main(arguments)\n"
        "try:\n"
        "    predict.main([*arguments, '--sheet', 'sheet.png'])\n"
        "except errors.UserError as error:\n"
        "    print(error)\n"
    )
    process = run_code(
        code, tmp_path, "--model", runs / "classifier.onnx", "--out", "out.csv", "one.npy",
        without=refused,
    )  # fmt: skip
    assert len(read_csv(tmp_path / "out.csv")) == 1
    assert "pip install matplotlib" in process.stdout
