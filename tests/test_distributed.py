"""Several processes: the same training as one, one writer, and an end when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (HUNG, PRETRAINED, ROOT, assert_same_tensors, finetuning, history_of, pretraining, run_script,
                      tensors_in)  # fmt: skip

from lib import distributed, loader, strategies
from lib.augment import KINDS
from lib.errors import UserError

STRATEGIES = ("head", "layernorm", "full", "residual")


def torchrun(script, arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               ROOT / script, *arguments]  # fmt: skip
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=ROOT)  # fmt: skip


def assert_same_history(one, two):
    one, two = history_of(one), history_of(two)
    assert len(one) == len(two)
    for single, double in zip(one, two, strict=True):
        # The sums of two processes are rounded otherwise, and steps enlarge the difference: 1.5e-5 has been seen.
        allowed = {key: 1e-4 if key == "validation_loss" else 1e-5 for key in single}
        assert single == {key: pytest.approx(double[key], rel=allowed[key]) for key in single}


# Seldom torch aborts a process as the interpreter exits; what it computed is written by then.
ABORTED = "terminate called without an active exception"


# Several trainings in one group of processes: starting a group takes longer than they do. Each process
# writes the batch of every step and the rows that it read for it, and gradients. A training
# named "resumed" is stopped by SIGTERM in the middle of an epoch first. The main process
# enters late what it enters first, and leaves late.
TRAININGS = """
import contextlib, json, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch
import finetune, pretrain
from conftest import sigterm_at
from lib import distributed, loader, loop, strategies

loader.EVALUATION_BATCH = strategies.EVALUATION_BATCH = 8  # validation takes several batches

def gradients():
    # Of two layers, one in front of the gathering and one behind it.
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))

    def loss_of(own):
        return model[1](distributed.gather(model[0](x[own]))).square().mean()

    averaged = distributed.averaged(model, loss_of)  # it must live until the backward pass
    averaged(distributed.local_slice(4)).backward()
    return [p.grad.flatten().tolist() for p in model.parameters()]

def train(name, script, arguments):
    main = {"pretrain": pretrain, "finetune": finetune}[script].main
    if name == "resumed":
        with sigterm_at(7), contextlib.suppress(SystemExit):
            main(arguments)
        arguments = [*arguments, "--resume"]
    steps.clear()
    main(arguments)

steps, reading = [], []
whole_reader, whole_step = pretrain.batch_reader, loop.Training.take_step

def batch_reader(images, device):
    read = whole_reader(images, device)
    def reader(rows):
        reading.extend(rows.tolist())
        return read(rows)
    return reader

def take_step(training, batch, *arguments):
    reading.clear()
    loss = whole_step(training, batch, *arguments)
    steps.append([batch.tolist(), list(reading)])
    return loss

pretrain.batch_reader = strategies.batch_reader = batch_reader
loop.Training.take_step = take_step
given = Path(sys.argv[2])
entered, written = given.with_name("entered"), given.with_name("written")
seen = {}
with distributed.process_group("cpu"):
    if distributed.is_main():
        time.sleep(1)
    with distributed.main_process_first():
        assert distributed.is_main() or entered.exists(), "entered before the main process"
        entered.touch()
    assert distributed.gather_list([[0, 2], [1]][distributed.rank()]) == [0, 1, 2]
    assert distributed.from_main(lambda: 7 + distributed.rank()) == 7
    assert distributed.mean([1.0 + distributed.rank()]) == [1.5]
    distributed.process_group = lambda name: contextlib.nullcontext()
    for name, (script, arguments) in json.loads(given.read_text()).items():
        train(name, script, arguments)
        seen[name] = list(steps)
    result = json.dumps([seen, gradients()])
    given.with_name(f"seen-{distributed.rank()}.json").write_text(result)
    if distributed.is_main():
        time.sleep(1)
        written.touch()
assert written.exists(), "left before the main process had written"
"""


def trainings(packed, runs, out):
    """{name: (script, arguments)}: every strategy, and every kind of augmentation."""
    kinds = ("--augment", ",".join(KINDS))
    more = {"pretrain": kinds, "full": kinds}
    start = runs / "pretrain" / PRETRAINED
    return {"pretrain": ("pretrain", pretraining(packed, out / "pretrain", *kinds))} | {
        name: ("finetune", finetuning(packed, out / name, start, name, *more.get(name, ())))
        for name in STRATEGIES
    }


@pytest.fixture(scope="module")
def in_two_processes(packed, runs, tmp_path_factory):
    """Folder of the trainings by two processes, {name: steps} of each, and gradients."""
    out = tmp_path_factory.mktemp("two")
    wanted = trainings(packed, runs, out)
    wanted["resumed"] = trainings(packed, runs, out / "again")["pretrain"]
    (out / "trainings.json").write_text(json.dumps(wanted))
    script = out / "trainings.py"
    script.write_text(TRAININGS)
    process = torchrun(script, [ROOT, out / "trainings.json"])
    output, _ = process.communicate(timeout=HUNG)
    assert process.returncode == 0 or ABORTED in output, output
    results = [json.loads((out / f"seen-{rank}.json").read_text()) for rank in range(2)]
    return out, *zip(*results, strict=True)


@pytest.mark.parametrize("name", ["pretrain", *STRATEGIES])
def test_two_processes_train_as_one_does(name, packed, runs, in_two_processes, tmp_path, no_pictures, monkeypatch):
    for module in (loader, strategies):
        monkeypatch.setattr(module, "EVALUATION_BATCH", 8)
    script, arguments = trainings(packed, runs, tmp_path)[name]
    run_script(f"{script}.py", *arguments)
    assert_same_history(tmp_path / name, in_two_processes[0] / name)


def test_two_processes_that_were_stopped_resume_to_bit_identical_weights(in_two_processes):
    out, seen, _ = in_two_processes
    for of_process in seen:
        assert of_process["resumed"] == of_process["pretrain"][7:] != []
    whole, resumed = out / "pretrain", out / "again" / "pretrain"
    assert_same_tensors(tensors_in(whole / PRETRAINED), tensors_in(resumed / PRETRAINED))
    assert history_of(whole) == history_of(resumed)


@pytest.mark.parametrize("name", ["pretrain", "layernorm", "full"])
def test_each_process_reads_only_its_own_part_of_a_training_batch(name, in_two_processes):
    _, seen, _ = in_two_processes
    assert len(seen[0][name]) == len(seen[1][name]) > 0
    for one, two in zip(seen[0][name], seen[1][name], strict=True):
        batch, own = one
        half = len(batch) // 2
        assert own == batch[:half]
        assert two == [batch, batch[half:]]


def test_gradients_are_those_of_the_whole_batch(in_two_processes):
    # Losses alone would not show their size: the steps of both optimisers do not depend on it.
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model(x).square().mean().backward()
    _, _, gradients = in_two_processes
    for of_process in gradients:
        for parameter, gradient in zip(model.parameters(), of_process, strict=True):
            assert gradient == pytest.approx(parameter.grad.flatten().tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["cuda", "cuda:77"])
def test_a_gpu_that_does_not_exist_is_named(name, monkeypatch):
    for variable in (*distributed.BY_TORCHRUN, "WORLD_SIZE"):
        monkeypatch.setenv(variable, "77")
    with pytest.raises(UserError, match="cuda:77 is not available here"):
        with distributed.process_group(name):
            pass


def workers_of(launcher):
    """{rank: process number} of the processes that a torchrun has started."""
    workers = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [int(v[5:]) for v in environment if v.startswith(b"RANK=")]
        if parent == launcher.pid and ranks:
            workers[ranks[0]] = int(folder.name)
    return workers


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_run(packed, tmp_path):
    out = tmp_path / "run"
    arguments = pretraining(packed, out, "--epochs", 20_000, "--validations", 20_000)
    process = torchrun("pretrain.py", arguments)
    try:
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=HUNG)
    finally:
        process.kill()
    assert process.returncode != 0, output
    assert "error: another process of this run has ended" in output
    assert not (out / PRETRAINED).exists()
