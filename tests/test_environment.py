"""Whatever the environment holds, a script works, or ends with one line."""

import os
import subprocess
import sys

import pytest
from conftest import HUNG, ROOT, WITH_OPTIONS, assert_user_error, run_script

from lib import distributed, errors
from lib.errors import UserError, path_argument


def run_in(environment, *command, folder=ROOT):
    """A new process of Python with more in its environment."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=HUNG)  # fmt: skip


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_scripts_work_without_their_folder_on_the_path_and_with_an_unknown_backend(script, tmp_path):
    process = run_in({"MPLBACKEND": "nonsense"}, "-P", ROOT / f"{script}.py", "--help", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "options:" in process.stdout


@pytest.mark.parametrize("flags", [("-I",), ("-OO",), ("-E", "-W", "error")])
def test_flags_of_python_change_nothing(flags, tmp_path):
    process = run_in({}, *flags, ROOT / "predict.py", "--help", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


@pytest.mark.parametrize(("script", "name", "value"), [
    *(("predict.py", errors.THREADS[0], value) for value in ("abc", "0", "-1", "1.5", "4,", "99999999", "$N")),
    *(("pretrain.py", name, "abc") for name in errors.THREADS),
])  # fmt: skip
def test_a_number_of_threads_that_is_none_is_one_line(name, value, script):
    process = run_in({name: value}, script, "--help")
    assert_user_error(process, f"{name}={value} ", "unset it")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("threads", ["", "1", "2,1"])
def test_variables_that_change_results_are_without_effect(threads):
    """The libraries read them when they are loaded."""
    ours = {"OMP_NUM_THREADS": threads, "NVIDIA_TF32_OVERRIDE": "1", **dict.fromkeys(errors.OVERRIDING, "1")}
    code = "import os; from lib.errors import starting; starting('__main__'); os.execvp('env', ['env'])"
    left = dict(line.split("=", 1) for line in run_in(ours, "-c", code).stdout.splitlines() if "=" in line)
    assert left["NVIDIA_TF32_OVERRIDE"] == "0"
    assert left.keys().isdisjoint(errors.OVERRIDING)
    assert left["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "many"}, {"WORLD_SIZE": "", "RANK": "0"},
     {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}],
)  # fmt: skip
def test_what_a_scheduler_leaves_is_no_torchrun(environment, monkeypatch):
    for name in distributed.BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun"), distributed.process_group("cpu"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("path", ["data/*.npy", "~/x", "~nobody/x", "$RUNS/x", "${RUNS}", "a/$(pwd)", ""])
@pytest.mark.parametrize("option", ["--data", "--out"])
def test_what_no_shell_has_expanded_is_said(option, path, tmp_path):
    given = {"--data": "d", "--out": "o"} | {option: path}
    words = [f"{name}={value}" for name, value in given.items()]
    process = run_script("evaluate.py", "--weights", "w", *words, check=False, folder=tmp_path)
    assert process.returncode == 2
    last = process.stderr.splitlines()[-1]
    assert f"argument {option}: the " in last
    assert "shell" in last
    assert not os.listdir(tmp_path)


def test_a_file_with_such_a_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~a", "*.npy", "$x"):
        (tmp_path / name).touch()
        assert path_argument(name).exists()


@pytest.mark.parametrize(("script", "package", "install"), [
    ("predict.py", "onnxruntime", "onnxruntime=="), ("pretrain.py", "torch", "torch=="),
    ("evaluate.py", "sklearn", "scikit-learn=="), ("predict.py", "numpy", "numpy=="),
])  # fmt: skip
def test_a_package_that_is_not_installed_is_named(script, package, install, tmp_path):
    (tmp_path / "x.npy").touch()
    # As if the package were not there.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    without = {"PYTHONPATH": str(tmp_path)}
    helped = run_in(without, script, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "Traceback" not in helped.stderr
    assert len(helped.stdout) > 100
    given = {"predict.py": ("--model", tmp_path / "x.onnx", tmp_path / "x.npy", "--out", tmp_path / "o"),
             "pretrain.py": (), "evaluate.py": ()}[script]  # fmt: skip
    run = run_in(without, script, *given)
    assert_user_error(run, "python -m pip install", install)
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(("script", "package"), [("pretrain.py", "numpy"), ("pretrain.py", "torch"),
                                                 ("predict.py", "numpy"), ("predict.py", "onnxruntime"),
                                                 ("examples/classify.py", "numpy"), ("experiments/study.py", "torch"),
                                                 ("experiments/study.py", "sklearn")])  # fmt: skip
def test_an_interrupt_during_the_imports_is_one_line(script, package, tmp_path):
    """It comes when the package is about to be imported, not after some seconds, which a busy machine makes longer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    process = run_in({"PYTHONPATH": str(tmp_path)}, script, "--help")
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")
