"""What the tests share: the scripts on the path, small data sets, and ways to run a script."""

import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import onnx
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import export
import finetune
import pretrain
import simulate
from lib import errors, lenses, loader, loop, packing, plots, residuals, simulated, strategies

# Seconds after which a process hangs for sure, however slow the machine and whatever runs beside.
HUNG = 900
TINY_NETWORK = ["--patch-size", "16", "--embed-dim", "32", "--depth", "2", "--num-heads", "2"]
TINY_DECODER = ["--decoder-embed-dim", "16", "--decoder-num-heads", "2"]
PICTURES = ("curves", "reconstructions")  # of lib/plots.py, in training
# Weights files of the scripts.
PRETRAINED, CLASSIFIER, MASS = "vit-mae-wt.pth", "vit-mae-classifier-wt.pth", "vit-mae-mass-wt.pth"
SHARPENER = "vit-mae-sharpen-wt.pth"
# Scripts that read options, as paths from the root without the suffix.
WITH_OPTIONS = [
    str(path.relative_to(ROOT).with_suffix("")) for folder in (".", "experiments", "docs")
    for path in sorted((ROOT / folder).glob("*.py")) if "new_parser(" in path.read_text()
]  # fmt: skip


def run_script(name, *arguments, check=True, folder=ROOT):
    """Run a script's `main` as `errors.run_main` does, in this process, which has torch loaded already.

    `name` is a path from the root, such as "experiments/study.py"; `folder` is the working
    directory. Returns what `run_python` does.
    """
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    argv = [str(a) for a in arguments]
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder),
          mock.patch.object(sys, "argv", [name, *argv]), pytest.raises(SystemExit) as ended):  # fmt: skip
        errors.run_main(lambda: module.main(argv))
    process = subprocess.CompletedProcess([name, *argv], ended.value.code or 0)
    process.stdout, process.stderr = out.getvalue(), err.getvalue()
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


def run_code(code, *arguments, check=True, without=()):
    """Run Python code beside the scripts; importing anything of `without` fails there."""
    refusing = (
        "import sys, importlib.abc\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] in {tuple(without)}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    return run_python("-c", refusing + code, *arguments, check=check)


def run_python(*arguments, check=True, before=()):
    """Run a new interpreter in the root; returns the finished process with its text."""
    command = [*before, sys.executable, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG)
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


def bound_by_permissions():
    """What to put before a command so that file permissions bind it, even under root."""
    if os.geteuid():
        return ()
    if not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and there is no setpriv to give that up")
    return ("setpriv", "--inh-caps=-all", "--bounding-set=-all")


def assert_user_error(process, *named):
    """The process ended with code 2 and one line that names what is wrong."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    for text in named:
        assert str(text) in errors[0]


def assert_refused(script, arguments, *named):
    """The script ends with code 2 and one line that names what is wrong."""
    assert_user_error(run_script(script, *arguments, check=False), *named)


def write_classes(root, counts, size=16, brighter=False, seed=0):
    """Class folders of random images, {name: count}; with `brighter` each class is 1 above the one before."""
    rng = np.random.default_rng(seed)
    for level, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            np.save(root / name / f"{i:03d}.npy", rng.random((size, size)) + level * brighter)
    return root


def write_packed(folder, images, labels, class_names, masses=np.nan):
    """Pack images (n, H, H) with their labels (n,), or the one label of all, into a new folder; returns it."""
    folder.mkdir()
    writer = packing.PackedWriter(folder, images.shape, class_names, "made here")
    writer.append(images, labels, masses=masses)
    writer.close()
    return folder


def with_defaults(more, defaults):
    """Arguments: those of `more`, and the pairs of flags and values in `defaults` that it does not give."""
    more = [str(part) for part in more]
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [str(part) for pair in pairs if pair[0] not in more for part in pair] + more


def replacing(words, more):
    """The words of a command with the options `more`, in place of what it says of these options."""
    words, more = [str(word) for word in words], [str(word) for word in more]
    flags, kept, is_replaced = {word.split("=")[0] for word in more}, [], False
    for word in words:
        if word.startswith("--") and " " not in word:  # with a space it is a value
            is_replaced = word in flags
        kept += [] if is_replaced else [word]
    return [*kept, *more]


def pretraining(data, out, *more):
    """Arguments of pretrain.py: a tiny network, three epochs of about ten steps."""
    defaults = ("--epochs", 3, "--batch-size", 8, "--precision", "float32", *TINY_NETWORK, *TINY_DECODER)
    return with_defaults(("--data", data, "--out", out, *more), defaults)


def finetuning(data, out, pretrained, strategy, *more):
    """Arguments of finetune.py: two epochs of about fifteen steps."""
    given = ("--data", data, "--out", out, "--pretrained", pretrained, "--strategy", strategy)
    return with_defaults((*given, *more), ("--epochs", 2, "--batch-size", 16, "--precision", "float32"))


def pretrain_on(data, out, *more, check=True):
    """Run pretrain.py with the arguments of `pretraining`."""
    return run_script("pretrain.py", *pretraining(data, out, *more), check=check)


def finetune_on(data, out, pretrained, strategy, *more, check=True):
    """Run finetune.py with the arguments of `finetuning`."""
    return run_script("finetune.py", *finetuning(data, out, pretrained, strategy, *more), check=check)


def sharpen_on(data, out, pretrained, *more, check=True):
    """Run finetune.py --task sharpen for an epoch."""
    given = ("--data", data, "--out", out, "--pretrained", pretrained, "--task", "sharpen", "--epochs", 1)
    return run_script("finetune.py", *given, "--strategy", "full", "--precision", "float32", *more, check=check)


def history_of(out):
    """The lines of a run's metrics.jsonl, but for the seconds it took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def read_csv(path):
    """The rows of a table, as dicts."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_metadata(path, out, **changed):
    """A copy of an exported file with other metadata; None removes a key."""
    proto = onnx.load(path)
    metadata = {p.key: p.value for p in proto.metadata_props} | changed
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {k: v for k, v in metadata.items() if v is not None})
    onnx.save(proto, out)
    return out


def tensors_in(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def images_of(dataset, rows):
    """Raw images (n, 1, H, W) of a data set, as a tensor."""
    return torch.from_numpy(np.array(dataset.images[rows]))[:, None]


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@contextlib.contextmanager
def sigterm_at(step):
    """In this block a training of this process gets SIGTERM once it has made `step` steps."""
    take_step = loop.Training.take_step

    def stepping(training, *arguments):
        loss = take_step(training, *arguments)
        if training.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with mock.patch.object(loop.Training, "take_step", stepping):
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Trainings draw nothing, which takes longer than a small training itself."""
    for name in PICTURES:
        monkeypatch.setattr(plots, name, lambda *_: None)


@pytest.fixture
def drawn(monkeypatch):
    """{path: figure} of what is drawn, in place of files."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path: figure}))
    yield figures
    plt.close("all")


class Terminal(io.StringIO):
    """What a script writes to a terminal, for `contextlib.redirect_stderr`."""

    def isatty(self):
        return True


@pytest.fixture
def rows_read(monkeypatch):
    """The set of rows that any training or computation of residuals reads from now on."""
    seen, whole = set(), loader.batch_reader

    def spying(images, device, **more):
        read = whole(images, device, **more)
        if images.dtype == np.float16:  # residual maps, of rows that were read for them
            return read

        def remember(rows):
            seen.update(np.asarray(rows).tolist())
            return read(rows)

        return remember

    for module in (loader, pretrain, finetune, residuals, strategies):
        monkeypatch.setattr(module, "batch_reader", spying)
    return seen


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Packed data set of 100 Model_II images a class."""
    out = tmp_path_factory.mktemp("data") / "packed"
    batches = lenses.simulate("Model_II", 100, seed=3, progress=False)
    origin = simulated.origin_of("Model_II", 100, 3, False)
    simulate.write_packed(out, batches, 100, "Model_II", origin)
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The same images in the public folder layout."""
    out = tmp_path_factory.mktemp("data") / "folder"
    simulate.write_folder(out, lenses.simulate("Model_II", 100, seed=3, progress=False))
    return out


@pytest.fixture(scope="session")
def unseen(tmp_path_factory):
    """Sixty packed images of another seed, which no training here sees."""
    out = tmp_path_factory.mktemp("unseen") / "packed"
    batches = lenses.simulate("Model_II", 20, seed=5, progress=False)
    simulate.write_packed(out, batches, 20, "Model_II", "unseen")
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory, folder):
    """Folder of runs on the folder data set: pretrain, each strategy, scratch, mass, and ONNX files."""
    out = tmp_path_factory.mktemp("runs")
    cache = ("--data", folder, "--cache-dir", out / "cache")

    def start(script, *arguments):
        script.main([str(a) for a in (*cache, *arguments)])

    network = (*TINY_NETWORK, *TINY_DECODER)
    start(pretrain, "--out", out / "pretrain", "--epochs", 2, "--batch-size", 16, *network)
    pretrained = out / "pretrain" / PRETRAINED
    for strategy in finetune.STRATEGIES:
        start(finetune, "--pretrained", pretrained, "--strategy", strategy, "--out", out / strategy, "--epochs", 2)
    start(finetune, "--pretrained", "none", "--strategy", "full", "--out", out / "scratch",
          "--epochs", 1, "--pool", "mean", *TINY_NETWORK)  # fmt: skip
    files = [out / s / CLASSIFIER for s in ("head", "layernorm", "full")]
    start(export, "--weights", *files, "--out", out / "classifier.onnx")
    maps = out / "reconstruction.onnx"
    start(export, "--what", "reconstruction", "--weights", pretrained, "--out", maps)
    start(finetune, "--pretrained", pretrained, "--task", "mass", "--strategy", "residual", "--out", out / "mass",
          "--epochs", 2)  # fmt: skip
    start(export, "--what", "mass", "--weights", out / "mass" / MASS, "--out", out / "mass.onnx")
    return out


@pytest.fixture(scope="session")
def public(tmp_path_factory):
    """Sixty simulated pairs in the public layout."""
    out = tmp_path_factory.mktemp("pairs") / "public"
    run_script("simulate.py", "--model", "Pairs", "--per-class", 60, "--layout", "folder", "--out", out)
    return out


@pytest.fixture(scope="session")
def sharp_runs(tmp_path_factory):
    """Folder with sixty packed pairs, an MAE of the coarse images, a sharpener and its ONNX file."""
    out = tmp_path_factory.mktemp("sharp")
    run_script("simulate.py", "--model", "Pairs", "--per-class", 60, "--out", out / "pairs")
    network = ("--patch-size", 15, "--embed-dim", 32, "--depth", 1, "--num-heads", 2, *TINY_DECODER)
    pretrain_on(out / "pairs", out / "sharpen-pretrain", "--coarse", "--classes", "all", "--epochs", 1, *network,
                "--transform", "sqrt")  # fmt: skip
    sharpen_on(out / "pairs", out / "sharpen", out / "sharpen-pretrain" / PRETRAINED)
    sharpener = out / "sharpen" / SHARPENER
    run_script("export.py", "--what", "sharpen", "--weights", sharpener, "--out", out / "sharpen.onnx")
    return out


@pytest.fixture(scope="session")
def pretrained(runs):
    """The weights file of the MAE of `runs`."""
    return runs / "pretrain" / PRETRAINED


@pytest.fixture
def lens_image():
    """One raw Model_II image (64, 64)."""
    images = next(lenses.simulate("Model_II", 1, seed=9, progress=False))[1]
    return np.array(images[0])
