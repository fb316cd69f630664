"""experiments/bench.py: rows are what they say, with peers and without."""

import json

from conftest import assert_user_error, run_script

from experiments import bench

TINY = {"SIZE": {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "DECODER": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}, "BATCHES": (4,),
        "HEAD_IMAGES": 64, "HEAD_EPOCHS": 2, "FILES": 30, "PER_CLASS": 30, "PAUSE": 0}  # fmt: skip


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
