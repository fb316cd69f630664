"""Whatever stands behind an option, a script ends with an exit code and a line, not a traceback."""

import importlib
import math
import os
import shutil
import signal

import pytest
from conftest import CLASSIFIER, PRETRAINED, TINY_DECODER, TINY_NETWORK, run_script, sigterm_at, write_classes
from test_options import parsers_of
from test_scripts import SCRIPTS

from lib import options

HOSTILE = ("", "-1", "0", "1", "nan", "inf", "1e-300", "9" * 20, "é\n$\"'", "\udcff", "FIFO", "a" * 300)
SMALL = ("--patch-size", "8", *TINY_NETWORK[2:])


def commands(root, out):
    """{script: arguments of a valid call}; those that write do so into `out`."""
    data = ("--data", root / "data")
    run = (*data, "--epochs", 1, "--batch-size", 8, "--quiet", "--out", out)
    mae, classifier = root / "mae" / PRETRAINED, root / "full" / CLASSIFIER
    return {"simulate": ("--per-class", 1, "--out", out), "data": data, "pretrain": (*run, *SMALL, *TINY_DECODER),
            "finetune": (*run, "--pretrained", mae, "--strategy", "full"),
            "evaluate": (*data, "--weights", classifier, "--out", out, "--resamples", 2),
            "reconstruct": (*data, "--weights", mae, "--out", out, "--resamples", 2),
            "export": (*data, "--weights", classifier, "--out", out),
            "predict": (root / "one.npy", "--model", root / "c.onnx", "--out", out)}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a pre-training, a classifier and exported files of 16×16 images."""
    root = tmp_path_factory.mktemp("hostile")
    write_classes(root / "data", {"axion": 16, "no_sub": 16}, brighter=True)
    shutil.copy(root / "data" / "axion" / "000.npy", root / "one.npy")
    os.mkfifo(root / "fifo")  # nothing ever comes out of it
    for script, out in (("pretrain", "mae"), ("finetune", "full"), ("export", "c.onnx")):
        run_script(f"{script}.py", *commands(root, root / out)[script])
    return root


def may_be_accepted(action, value):
    """Whether a value makes sense for an option: a number within its limits, or one of its choices."""
    if action.choices is not None:
        return value in action.choices
    if action.type not in (int, float):
        return True  # text or a path, which the script looks at itself
    try:
        number = action.type(value)
    except ValueError:
        return False
    limits = [is_valid for names, is_valid, _ in options.LIMITS if action.dest in names]
    return math.isfinite(number) and all(is_valid(number) for is_valid in limits)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_value_of_any_option_ends_in_a_traceback(script, place, monkeypatch, tmp_path):
    module = importlib.import_module(script)
    if hasattr(module, "plots"):  # pictures are drawn elsewhere
        for name in [n for n, f in vars(module.plots).items() if callable(f) and n[0] != "_"]:
            if name not in ("PatchCollection", "atomic_write"):
                monkeypatch.setattr(module.plots, name, lambda *_, **__: None)
    if script == "export":  # the exporter takes seconds a call
        content = (place / "c.onnx").read_bytes()
        monkeypatch.setattr(module, "write_onnx", lambda _, path, __: path.write_bytes(content))
    command = commands(place, place / "out")[script]
    actions = [a for a in parsers_of(script, monkeypatch)[0]._actions if a.option_strings and a.nargs != 0]
    assert actions
    before = sorted(os.listdir(place))
    for action in actions:
        option = action.option_strings[0]
        signal.signal(signal.SIGALRM, lambda *_, option=option: pytest.fail(f"{option}: hangs"))
        for value in HOSTILE:
            value = str(place / "fifo") if value == "FIFO" else value
            folder = tmp_path / "working"  # a new one: relative paths of one call are no input of the next
            folder.mkdir()
            signal.alarm(60)  # whoever opens a FIFO waits forever
            try:
                with sigterm_at(3):  # so that no number of epochs lasts
                    process = run_script(f"{script}.py", *command, f"{option}={value}", check=False, folder=folder)
            finally:
                signal.alarm(0)
            what = f"{option}={value!r}: {process.returncode} {process.stdout} {process.stderr}"
            assert process.returncode in (0, 1, 2, 143), what
            if process.returncode == 2:
                assert "error: " in process.stderr, what
                assert may_be_accepted(action, value) or option in process.stderr.splitlines()[-1], what
            else:
                assert may_be_accepted(action, value), what
            for path in (folder, *(place / name for name in os.listdir(place) if name not in before)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sorted(os.listdir(place)) == before
