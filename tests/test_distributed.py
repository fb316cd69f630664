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
from conftest import HUNG, ROOT, TINY_DECODER, TINY_NETWORK, run_script

import distributed


def torchrun(script, arguments, processes=2):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}", ROOT / script, *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=ROOT,
    )  # fmt: skip


def pretraining(packed, out, epochs):
    return ["--data", packed, "--out", out, "--epochs", epochs, "--batch-size", 8, "--precision",
            "float32", *TINY_NETWORK, *TINY_DECODER]  # fmt: skip


def lines_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_two_processes_train_as_one_does(script, packed, runs, tmp_path):
    def arguments(out):
        if script == "pretrain.py":
            return pretraining(packed, out, 3)
        return ["--data", packed, "--out", out, "--strategy", "full", "--epochs", 2, "--pretrained",
                runs / "pretrain" / "vit-mae-wt.pth", "--batch-size", 16, "--augment", "shift",
                "--precision", "float32"]  # fmt: skip

    run_script(script, *arguments(tmp_path / "one"))
    process = torchrun(script, arguments(tmp_path / "two"))
    output, _ = process.communicate(timeout=HUNG)
    assert process.returncode == 0, output
    assert output.count("weights in") == 1
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert len(one) == len(two)
    for single, double in zip(one, two, strict=True):
        for key, value in single.items():
            # Augmented validation images depend on how they are shared.
            loose = script == "finetune.py" and key.startswith("validation")
            assert double[key] == pytest.approx(value, rel=0.1 if loose else 1e-5), key
    names = [sorted(p.name for p in (tmp_path / n).iterdir() if p.name != ".lock")
             for n in ("one", "two")]  # fmt: skip
    assert names[0] == names[1]


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
    arguments = [*pretraining(packed, out, 20_000), "--validations", 20_000]
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
    assert not (out / "vit-mae-wt.pth").exists()


LATE_FIRST = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import distributed
written = Path(__file__).with_name("written")
with distributed.processes("cpu"):
    if distributed.is_first():
        time.sleep(2)
        written.touch()
assert written.exists(), "left before the first had written"
"""


def test_no_process_leaves_before_the_first_has_written(tmp_path):
    script = tmp_path / "late_first.py"
    script.write_text(LATE_FIRST)
    process = torchrun(script, [ROOT])
    output, _ = process.communicate(timeout=HUNG)
    assert process.returncode == 0, output


def test_a_batch_that_cannot_be_shared_is_named(packed, tmp_path):
    arguments = [*pretraining(packed, tmp_path / "run", 1), "--batch-size", 7]
    output, _ = torchrun("pretrain.py", arguments).communicate(timeout=HUNG)
    assert "error: --batch-size 7 cannot be shared by 2 processes" in output


def test_one_process_computes_everything():
    assert distributed.share(7) == slice(0, 7)
    images = torch.ones(3, requires_grad=True)
    assert distributed.gather(images) is images
    assert distributed.mean([1.5]) == [1.5]
    assert distributed.gathered_list([1, 2]) == [1, 2]
