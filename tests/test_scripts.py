"""What all scripts have in common, and which file may import which."""

import ast
import graphlib
import importlib.metadata
import json
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import (
    CLASSIFIER, PRETRAINED, ROOT, TINY_NETWORK, assert_user_error, bound_by_permissions, read_csv, run_code,
    run_python, run_script, write_classes,
)  # fmt: skip

from lib import weights

SCRIPTS = ("simulate", "data", "pretrain", "finetune", "evaluate", "reconstruct", "export", "predict")
EXPERIMENTS = ("study", "results", "bench", "real_images")
MODULES = [path.stem for path in sorted((ROOT / "lib").glob("*.py"))]


# What a user sees


@pytest.mark.parametrize(
    ("script", "given", "option"),
    [("export", ("--what", "huggingface", "--weights", "x", "--out", "x"), (flag, value))
     for flag, value in (("--data", "d"), ("--cache-dir", "d"), ("--seed", "0"), ("--allowed-fall", "0.002"))]
    + [("export", ("--weights", "x", "--out", "x"), ("--allowed-fall", "0.1")),
       ("predict", ("--model", "x", "--out", "x", "x"), ("--sheet-images", "40"))],
)  # fmt: skip
def test_options_that_do_nothing_beside_others_are_refused(script, given, option):
    for words in (option, ("=".join(option),)):
        process = run_script(f"{script}.py", *given, *words, check=False)
        assert_user_error(process, option[0], "leave it out")


def mistakes(runs, folder, tmp_path):
    """name: (script, arguments, what the error names)."""
    cache, out = ("--data", folder, "--cache-dir", runs / "cache"), ("--out", tmp_path / "out")
    mae, classifier = runs / "pretrain" / PRETRAINED, runs / "full" / CLASSIFIER
    file = tmp_path / "file"
    file.write_text("a file, not a folder")
    small = write_classes(tmp_path / "small", {"axion": 60, "cdm": 60, "no_sub": 60}, size=32)
    two = write_classes(tmp_path / "two", {"axion": 60, "cdm": 60}, size=64)
    pretrain = "pretrain.py", (*cache, *out)
    full = (*out, "--strategy", "full", "--pretrained")
    finetune = "finetune.py", (*cache, *full, "none")
    evaluate = "evaluate.py", (*cache, *out, "--weights", classifier)
    reconstruct = "reconstruct.py", (*cache, *out, "--weights", mae)
    simulate, onnx = ("simulate.py", out), ("--out", tmp_path / "m.onnx")
    predict = "predict.py", ("--model", runs / "classifier.onnx", *out, folder / "cdm")
    export = "export.py", ("--weights", classifier, *onnx)
    impossible = ((simulate, "--per-class", 0), (simulate, "--seed", -1), (pretrain, "--classes", "wdm"),
                  (pretrain, "--mask-ratio", 1), (pretrain, "--epochs", 0), (pretrain, "--mlp-ratio", 0),
                  (pretrain, "--lr", -1), (pretrain, "--patch-size", 7), (pretrain, "--device", "cuda:77"),
                  (finetune, "--labels", 2), (evaluate, "--split", "all"), (reconstruct, "--rounds", 0),
                  *((script, "--seed", seed) for script in (evaluate, reconstruct, export) for seed in (-1, 10**22)),
                  *((evaluate, "--resamples", count) for count in (0, -1)),
                  *((export, "--allowed-fall", share) for share in ("nan", -0.1, "inf", 2)),
                  *((predict, "--least-familiarity", share) for share in (1, -0.1, "nan")),
                  (reconstruct, "--clusters", 1), (reconstruct, "--clusters", 21),
                  (("experiments/study.py", (*cache, *out)), "--seeds", -1),
                  (("experiments/bench.py", out), "--repeats", 0))  # fmt: skip
    return {
        f"{script} {option} {value}": (script, (*given, option, value), value if option == "--classes" else option)
        for (script, given), option, value in impossible
    } | {
        "nothing to pack": ("data.py", ("--data", tmp_path / "gone"), "gone"),
        "simulated already": ("simulate.py", ("--out", small, "--per-class", 1), small),
        "noise twice": ("simulate.py", ("--model", "Pairs", "--noise", *out), "--noise"),
        "no no_sub": ("pretrain.py", ("--data", two, *out), "no_sub"),
        "heads": (pretrain[0], (*pretrain[1], "--num-heads", 5), "5 heads"),
        "out is a file": ("pretrain.py", (*cache, "--out", file), file),
        "no weights": ("finetune.py", (*cache, *full, tmp_path / "no.pth"), "no.pth"),
        "other size": ("finetune.py", ("--data", small, *full, mae), "64 pixels"),
        "weights of an encoder": ("evaluate.py", (*cache, *out, "--weights", mae), mae),
        "size": ("evaluate.py", ("--data", small, *out, "--weights", classifier), "64 pixels"),
        "missing class": ("evaluate.py", ("--data", two, *out, "--weights", classifier), "no_sub"),
        "residuals of a classifier": ("reconstruct.py", (*cache, *out, "--weights", classifier), classifier),
        "maps of another size": ("reconstruct.py", ("--data", small, *out, "--weights", mae), "64 pixels"),
        "no results": ("experiments/results.py", (runs, *out), runs),
        "nothing to export": ("export.py", ("--weights", file, *onnx), file),
        "no data": ("export.py", ("--weights", classifier, *onnx, "--data", tmp_path / "x"), "--data"),
        "no model": ("predict.py", ("--model", tmp_path / "x.onnx", *out, file), "x.onnx"),
        "no images": (predict[0], (*predict[1], tmp_path / "gone"), "gone"),
        "empty folder": (predict[0], (*predict[1][:-1], runs / "full"), ".npy"),
    }


def test_every_mistake_ends_with_one_line_that_names_it(runs, folder, tmp_path):
    for name, (script, arguments, named) in mistakes(runs, folder, tmp_path).items():
        process = run_script(script, *arguments, check=False)
        assert process.returncode == 2, name + process.stdout + process.stderr
        error = process.stderr.splitlines(keepends=True)[-1]  # behind a progress bar
        assert str(named) in error, name
        assert error.startswith("error: ") and error.endswith("\n"), name
        assert [path.name for path in tmp_path.glob("out/*")] == [], name


def test_an_unwritable_folder_is_named(packed, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    process = run_python("pretrain.py", "--data", packed, "--out", tmp_path / "locked" / "run", check=False,
                         before=bound_by_permissions())  # fmt: skip
    assert_user_error(process, tmp_path / "locked")
    assert len(process.stderr.splitlines()) == 1


def test_other_classes_and_sizes_work_throughout(tmp_path):
    root = write_classes(tmp_path / "data", {"bright": 60, "faint": 60}, size=48, brighter=True)
    run_script("finetune.py", "--data", root, "--pretrained", "none", "--strategy", "full",
               "--out", tmp_path / "run", "--epochs", 8, "--batch-size", 16, *TINY_NETWORK)  # fmt: skip
    path = tmp_path / "run" / CLASSIFIER
    assert weights.load_classifier(path)[1]["class_names"] == ["bright", "faint"]
    run_script("evaluate.py", "--data", root, "--weights", path, "--out", tmp_path / "e", "--resamples", 20)
    result = json.loads((tmp_path / "e" / "metrics.json").read_text())["results"]["run"]
    assert result["macro"]["value"] > 0.95
    assert "iampratyusht" not in (tmp_path / "e" / "comparison.md").read_text()
    run_script("export.py", "--weights", path, "--out", tmp_path / "two.onnx")
    run_script("predict.py", "--model", tmp_path / "two.onnx", "--out", tmp_path / "p.csv", root / "faint" / "001.npy")
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


def test_a_file_imports_only_what_stands_below_it():
    """mae.py imports torch alone, lib/ no script, and no script another; lib/ has no circle."""
    assert first_parts(imports_of(ROOT / "mae.py")) <= {"torch"} | sys.stdlib_module_names
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"mae"}
    assert scripts == set(SCRIPTS)
    for path in (*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")):
        wrong = first_parts(imports_of(path)) & (scripts | {"experiments", "docs", "tests"})
        assert not wrong, f"{path.name} imports {wrong}"
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
    process = run_code(code, tmp_path, "--model", runs / "classifier.onnx", "--out", "out.csv", "one.npy",
                       without=refused)  # fmt: skip
    assert len(read_csv(tmp_path / "out.csv")) == 1
    assert "pip install matplotlib" in process.stdout
