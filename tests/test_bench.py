"""experiments/bench.py: rows are what they say, with peers and without."""

import json
import math
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_user_error, run_script

from experiments import bench
from mae import MAE, Classifier, set_attention_form

TINY = {
    "SIZE": {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "DECODER": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "BATCHES": (4,), "HEAD_IMAGES": 64, "HEAD_EPOCHS": 2, "AUC_PATIENCE": 5,
    "OUR_RECIPE": ("--epochs", "1", "--patch-size", "16", "--embed-dim", "32", "--depth", "1"),
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(bench, name, value)
    # As on a machine without the peers.
    monkeypatch.setattr(bench, "installed", lambda package: False)
    monkeypatch.setattr(bench, "PARTS", (("images", "dataset.json"),))


def test_every_row_is_there_without_peers(tiny, tmp_path):
    bench.main(["--out", str(tmp_path), "--repeats", "1", "--files", "30", "--auc-per-class", "30",
                "--per-class", "30", "--device", "cpu"])  # fmt: skip
    kept = json.loads((tmp_path / "bench.json").read_text())
    whats = " ".join(row["what"] for row in kept["rows"])
    for part in ("pre-training step", "fine-tuning step", "inference, batch 256", "int8", "no_sub",
                 "axion", "head strategy", ".npy files", "time to macro AUC",
                 "make reproduce: images"):  # fmt: skip
        assert part in whats
    for row in kept["rows"]:
        of_peer = "Hugging Face" in row["against"] or row["against"] == "lenstronomy"
        assert (row["ratio"] is None) == (of_peer or not row["against"]), row
    assert (tmp_path / "bench.md").read_text().count("\n| ") >= len(kept["rows"])


def test_on_a_gpu_a_step_is_compared_with_the_fastest_peer(tiny, monkeypatch):
    monkeypatch.setattr(bench, "GPU_BATCHES", (4,))
    monkeypatch.setattr(bench, "installed", lambda package: True)
    monkeypatch.setattr(bench, "hugging_face", lambda *_, compiled: None)
    monkeypatch.setattr(bench, "ours", lambda *_: None)
    took = {"Muon": 0.02, "AdamW": 0.01, None: 0.2, "default": 0.03, "reduce-overhead": 0.1}
    monkeypatch.setattr(
        bench, "seconds_in_turn", lambda functions, *_: {n: bench.GPU_STEPS * took[n] for n in functions}
    )
    machine = SimpleNamespace(device=torch.device("cpu"), repeats=1, peak=lambda dtype: 1e12)
    rows = list(bench.steps_on_gpu(machine, "pretraining", "pre-training step"))
    assert [row["note"] for row in rows] == ["bfloat16, Muon", "bfloat16, AdamW"]
    assert all("torch.compile default" in row["against"] for row in rows)
    assert [row["ratio"] for row in rows] == pytest.approx([1.5, 3.0])
    assert rows[0]["images/s"] == pytest.approx(4 / 0.02)


def test_the_parts_of_a_reproduction_are_targets_of_make_and_reach_its_end():
    targets = [f"r/{file}" for _, file in bench.PARTS]
    listed = ["make", "-n", "RUNS=r", "PER_CLASS=10"]
    done = subprocess.run([*listed, *targets], cwd=bench.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = subprocess.run([*listed, "reproduce"], cwd=bench.ROOT, capture_output=True, text=True)
    scripts = [line.split()[1] for line in whole.stdout.splitlines() if " --out r/" in line]
    assert {"pretrain.py", "evaluate.py", "predict.py"} <= set(scripts)
    for line in whole.stdout.splitlines():
        if " --out r/" in line:
            assert line in done.stdout


def test_a_reproduction_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PARTS", (("images", "nothing"),))
    process = run_script("experiments/bench.py", "--out", tmp_path, "--rows", "reproduction",
                         check=False)  # fmt: skip
    assert_user_error(process, "make nothing failed")


def test_a_peer_that_is_given_up_gives_a_lower_bound(tiny, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(bench, "installed", lambda package: True)
    monkeypatch.setattr(bench, "WANTED_AUC", 0.0)
    monkeypatch.setattr(bench, "BATCHES", (4, 8))

    def peer(dataset, test, batch, bench, limit):
        limits.append(limit)
        return seconds[batch]

    monkeypatch.setattr(bench, "peer_seconds_to_auc", peer)
    for seconds in ({4: math.inf, 8: math.inf}, {4: 1e-3, 8: math.inf}):
        bench.main(["--out", str(tmp_path), "--rows", "time_to_auc", "--auc-per-class", "30",
                    "--device", "cpu"])  # fmt: skip
        (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
        if seconds[4] == math.inf:
            assert row["ratio"] == pytest.approx(bench.AUC_PATIENCE)
            assert "≥ 5.00×" in (tmp_path / "bench.md").read_text()
        else:
            assert row["ratio"] < bench.AUC_PATIENCE
            assert "≥" not in (tmp_path / "bench.md").read_text()
    assert limits[0] == limits[1]
    assert limits[3] == 1e-3  # the other batch size need not be worse for long


def test_functions_run_in_turn_after_one_that_warms_up():
    ran = []
    functions = {"a": lambda: ran.append("a"), "b": lambda: (ran.append("b"), time.sleep(0.01))}
    seconds = bench.seconds_in_turn(functions, 3)
    assert ran == ["a", "b"] * 4
    assert seconds["a"] < 0.01 <= seconds["b"]


@pytest.mark.parametrize("kept", [16, None])
def test_operations_are_those_of_the_network(kept):
    """Against torch's own counter, which does not count the fused attention of CPUs."""
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.rand(2, 1, 64, 64)
    model = MAE(**bench.SIZE, **bench.DECODER) if kept else Classifier(**bench.SIZE)
    set_attention_form(model, "plain")
    with FlopCounterMode(display=False) as counter:
        loss = model(images, 0.75)[0] if kept else model(images).sum()
        loss.backward()
    assert bench.step_operations(kept) == pytest.approx(counter.get_total_flops() / 2, rel=0.03)
