"""experiments/bench.py: rows are what they say, with peers and without."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_user_error, run_script

from experiments import bench

TINY = {
    "SIZE": {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "DECODER": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "BATCHES": (4,), "HEAD_IMAGES": 64, "HEAD_EPOCHS": 2, "FILES": 30, "PER_CLASS": 30, "PAUSE": 0,
}  # fmt: skip


def test_every_row_is_there_without_peers(tmp_path, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    rows = [name for name in bench.ROWS if name != "reproduction"]
    bench.main(["--out", str(tmp_path), "--repeats", "1", "--device", "cpu", "--rows", *rows])
    kept = json.loads((tmp_path / "bench.json").read_text())
    whats = " ".join(row["what"] for row in kept["rows"])
    for part in ("pre-training step, batch 4", "fine-tuning step", "AdamW", "Muon", "inference, batch 256",
                 "int8", "no_sub", "axion", "head strategy", ".npy files"):  # fmt: skip
        assert part in whats
    for row in kept["rows"]:
        assert (row["ratio"] is None) == ("not installed" in row["against"])
        assert "not installed" in row["against"] or not row["against"].startswith("Hugging")
        assert ("share of peak" in row) == ("step" in row["what"])
    assert (tmp_path / "bench.md").read_text().count("\n| ") == len(kept["rows"]) + 1


def test_the_fastest_form_of_a_peer_counts(monkeypatch):
    took = {"ours": 0.2, "eager": 0.9, "fused": 0.6}
    monkeypatch.setattr(bench, "seconds_in_turn", lambda functions, *_: {n: took[n] for n in functions})
    args = SimpleNamespace(repeats=1, device=torch.device("cpu"))
    row = bench.compare(args, "step", "peer", None, {"eager": None, "fused": None}, 4, 2)
    assert row["against"] == "peer fused"
    assert row["ratio"] == pytest.approx((0.6 / 2) / (0.2 / 4))
    assert row["images/s"] == pytest.approx(20)
    assert bench.compare(args, "step", "peer", None, {}, 4)["ratio"] is None


def test_functions_run_in_turn_after_one_that_warms_up():
    ran = []
    functions = {"a": lambda: ran.append("a"), "b": lambda: (ran.append("b"), time.sleep(0.01))}
    seconds = bench.seconds_in_turn(functions, 3, torch.device("cpu"))
    assert ran == ["a", "b"] * 4
    assert seconds["a"] < 0.01 <= seconds["b"]


def test_operations_are_those_of_the_blocks_three_times():
    """Forward and twice as much backward of a network whose attention and patches count little."""
    tokens, width, depth = 65, 192, 6
    assert bench.operations_of("finetuning") == pytest.approx(3 * 24 * tokens * width**2 * depth, rel=0.15)
    assert bench.operations_of("pretraining") < bench.operations_of("finetuning") / 2


def test_a_reproduction_is_the_commands_of_make_in_their_order(tmp_path, monkeypatch):
    """Each is timed by itself, whatever it spans, and one that fails is named."""
    ran = []

    def completed(command, whole=bench.completed):
        if command[0] == "make":
            return whole(command) if "-n" in command else ""
        return ran.append(command[-1]) or ""

    monkeypatch.setattr(bench, "completed", completed)
    rows = list(bench.reproduction(None))
    assert [row["what"].split()[2] for row in rows[:-1]] == [
        "simulate.py", "pretrain.py", *4 * ["finetune.py"], "evaluate.py", "reconstruct.py",
        *2 * ["export.py"], "simulate.py", "predict.py",
    ]  # fmt: skip
    assert rows[-1]["what"] == "make reproduce"
    assert rows[-1]["seconds"] >= sum(row["seconds"] for row in rows[:-1])
    assert any("predict.py" in command and "set --" in command for command in ran)  # a recipe as a whole
    monkeypatch.undo()
    monkeypatch.setattr(bench, "WHOLE", "nothing")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "Makefile").write_text(".venv/ready:\n")
    process = run_script("experiments/bench.py", "--out", tmp_path / "o", "--rows", "reproduction", check=False)
    assert_user_error(process, "make", "nothing", "failed")
