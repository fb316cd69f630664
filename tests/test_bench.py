"""experiments/bench.py: rows are what they say, with peers and without."""

import json


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
