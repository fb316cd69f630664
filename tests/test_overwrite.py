"""Finished and stopped work is never overwritten unasked."""

import json

import pytest
from conftest import TINY_DECODER, TINY_NETWORK, assert_user_error, run_script

FAST = ("--epochs", 1, "--batch-size", 16, "--precision", "float32", "--quiet")


def pretrain(packed, out, *more, check=True):
    return run_script("pretrain.py", "--data", packed, "--out", out, *FAST, *TINY_NETWORK,
                      *TINY_DECODER, *more, check=check)  # fmt: skip


def finetune(packed, out, *more, check=True):
    return run_script("finetune.py", "--data", packed, "--out", out, "--pretrained", "none",
                      "--strategy", "full", *FAST, *TINY_NETWORK, *more, check=check)  # fmt: skip


@pytest.fixture(scope="module", params=[pretrain, finetune])
def finished(request, packed, tmp_path_factory):
    """(the function that runs a script, the folder of its finished run)."""
    out = tmp_path_factory.mktemp("finished")
    request.param(packed, out)
    return request.param, out


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("flag", ["--resume", "--update"])
def test_a_finished_run_is_not_trained_again(finished, packed, monkeypatch, flag):
    script, out = finished
    before = content(out)
    for module in ("pretrain", "finetune"):
        monkeypatch.setattr(f"{module}.fit", None)  # not reached
    process = script(packed, out, flag)
    assert "already finished" in process.stdout
    assert content(out) == before


def test_resume_of_a_finished_run_with_other_settings_is_refused(finished, packed):
    script, out = finished
    before = content(out)
    process = script(packed, out, "--resume", "--lr", 0.5, check=False)
    assert_user_error(process, "lr = ", "0.5", "--overwrite")
    assert content(out) == before


def test_a_finished_run_is_replaced_only_with_overwrite(finished, packed):
    script, out = finished
    before = content(out)
    assert_user_error(script(packed, out, "--seed", 1, check=False), out, "--resume", "--overwrite")
    assert content(out) == before
    script(packed, out, "--seed", 1, "--overwrite")
    assert json.loads((out / "config.json").read_text())["options"]["seed"] == 1
    script(packed, out, "--update", "--seed", 2)
    assert json.loads((out / "config.json").read_text())["options"]["seed"] == 2
    script(packed, out, "--overwrite")


def test_a_stopped_run_is_replaced_only_with_overwrite(packed, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"hours of work")
    assert_user_error(pretrain(packed, tmp_path, check=False), tmp_path, "--resume", "--overwrite")
    broken = pretrain(packed, tmp_path, "--resume", check=False)
    assert_user_error(broken, "checkpoint.pth", "--overwrite")
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"hours of work"
    pretrain(packed, tmp_path, "--overwrite")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_fine_tuning_does_not_write_into_a_pretraining(packed, tmp_path):
    pretrain(packed, tmp_path)
    before = content(tmp_path)
    for more in ((), ("--resume",), ("--overwrite",)):
        process = finetune(packed, tmp_path, *more, check=False)
        assert_user_error(process, tmp_path, "vit-mae-wt.pth", "--out")
    assert content(tmp_path) == before


def test_a_fine_tuning_does_not_replace_the_weights_that_it_starts_from(packed, tmp_path):
    finetune(packed, tmp_path / "run")
    before = content(tmp_path / "run")
    process = run_script(
        "finetune.py", "--data", packed, "--out", tmp_path / "run", "--strategy", "head",
        "--pretrained", tmp_path / "run" / "vit-mae-classifier-wt.pth", *FAST, "--overwrite",
        check=False,
    )  # fmt: skip
    assert_user_error(process, "--out", "start from")
    assert content(tmp_path / "run") == before


def test_overwrite_removes_what_the_run_left_and_nothing_else(packed, tmp_path):
    pretrain(packed, tmp_path)
    (tmp_path / "mine.png").write_bytes(b"a picture of the user")
    pretrain(packed, tmp_path, "--overwrite")
    assert (tmp_path / "mine.png").read_bytes() == b"a picture of the user"
