"""Finished and stopped work is never overwritten unasked."""

import json
import shutil

import numpy as np
import pytest
from conftest import (CLASSIFIER, PRETRAINED, TINY_NETWORK, assert_refused, assert_user_error, finetune_on, finetuning,
                      pretrain_on, pretraining, run_script)  # fmt: skip


def pretrain(packed, out, *more, check=True):
    return pretrain_on(packed, out, "--epochs", 1, *more, check=check)


def finetune(packed, out, *more, check=True):
    return finetune_on(packed, out, "none", "full", "--epochs", 1, *TINY_NETWORK, *more, check=check)


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module", params=[pretrain, finetune])
def finished(request, packed, tmp_path_factory):
    """(the function that runs a script, the folder of its finished run, its content).

    The folder of the pre-training holds a picture of the user, too.
    """
    out = tmp_path_factory.mktemp("finished")
    request.param(packed, out)
    if request.param is pretrain:
        (out / "mine.png").write_bytes(b"a picture of the user")
    return request.param, out, content(out)


@pytest.mark.parametrize("flag", ["--resume", "--update"])
def test_a_finished_run_is_not_trained_again(finished, packed, monkeypatch, flag):
    script, out, before = finished
    for module in ("pretrain", "finetune"):
        monkeypatch.setattr(f"{module}.fit", None)  # not reached
    assert "already finished" in script(packed, out, flag).stdout
    assert content(out) == before


def test_resume_of_a_finished_run_with_other_settings_is_refused(finished, packed):
    script, out, before = finished
    process = script(packed, out, "--resume", "--lr", 0.5, check=False)
    assert_user_error(process, "lr = ", "0.5", "--overwrite")
    assert content(out) == before


def test_a_run_does_not_write_into_that_of_the_other_script(finished, packed):
    script, out, before = finished
    other, file = (finetune, PRETRAINED) if script is pretrain else (pretrain, CLASSIFIER)
    for more in ((), ("--resume",), ("--overwrite",), ("--update",)):
        assert_user_error(other(packed, out, *more, check=False), out, file, "--out")
    assert content(out) == before


def test_a_finished_run_is_replaced_only_when_asked(finished, packed):
    script, out, before = finished
    assert_user_error(script(packed, out, "--seed", 1, check=False), out, "--resume", "--overwrite")
    assert content(out) == before
    for seed, flag in ((1, "--overwrite"), (2, "--update")):
        script(packed, out, "--seed", seed, flag)
        assert json.loads((out / "config.json").read_text())["options"]["seed"] == seed
    assert content(out).keys() == before.keys()
    assert content(out).get("mine.png") == before.get("mine.png")


def test_a_stopped_run_is_replaced_only_with_overwrite(packed, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"hours of work")
    assert_refused("pretrain.py", pretraining(packed, tmp_path), tmp_path, "--resume", "--overwrite")
    arguments = pretraining(packed, tmp_path, "--resume")
    assert_refused("pretrain.py", arguments, tmp_path / "checkpoint.pth", "--overwrite")
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"hours of work"
    pretrain(packed, tmp_path, "--overwrite")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_fine_tuning_does_not_replace_the_weights_that_it_starts_from(packed, tmp_path):
    finetune(packed, tmp_path)
    before = content(tmp_path)
    arguments = finetuning(packed, tmp_path, tmp_path / CLASSIFIER, "head", "--overwrite")
    assert_refused("finetune.py", arguments, "--out", "start from")
    assert content(tmp_path) == before


def outputs_of_scripts(runs, packed, out, picture):
    """(script, arguments, name of an output): every kind of file that a script writes where it is told to."""
    own = ("--data", packed, "--out", out)
    mae, classifier = runs / "pretrain" / PRETRAINED, runs / "full" / CLASSIFIER
    predict = ("--model", runs / "classifier.onnx", picture)
    evaluate = ("evaluate.py", (*own, "--weights", classifier, "--resamples", 2))
    reconstruct = ("reconstruct.py", (*own, "--weights", mae, "--resamples", 2))
    return [
        ("predict.py", (*predict, "--out", out / "notes.md"), "notes.md"),
        ("predict.py", (*predict, "--out", out / "p.csv"), "p.csv.errors.csv"),
        ("predict.py", (*predict, "--out", out / "p.csv", "--sheet", out / "figure.png"), "figure.png"),
        ("export.py", ("--weights", classifier, "--out", out / "m.onnx"), "m.onnx"),
        ("export.py", ("--what", "huggingface", "--weights", mae, "--out", out), "config.json"),
        ("simulate.py", ("--per-class", 1, "--out", out), "mine.npy"),
        *((*evaluate, name) for name in ("metrics.json", "comparison.md", "roc.png", "report.html", "mistakes.png")),
        ("evaluate.py", (*evaluate[1], "--save-predictions"), "predictions.csv"),
        *((*reconstruct, name) for name in ("metrics.json", "maps.png", "scores.png")),
        *(("pretrain.py", pretraining(packed, out), name) for name in ("config.json", "loss.png", "metrics.jsonl")),
        ("finetune.py", finetuning(packed, out, "none", "full", *TINY_NETWORK), "curves.png"),
        ("experiments/bench.py", ("--out", out), "bench.json"),
        ("docs/figures.py", (*own, "--mae", mae, "--classifier", classifier), "overview.png"),
        ("experiments/real_images.py", ("classify", "--images", picture, "--weights", classifier, "--out",
                                        out / "a.csv"), "a.csv"),
    ]  # fmt: skip


def test_no_script_writes_over_a_file_that_it_did_not_write(runs, packed, lens_image, tmp_path):
    np.save(tmp_path / "one.npy", lens_image)
    cases = outputs_of_scripts(runs, packed, tmp_path / "out", tmp_path / "one.npy")
    for script, arguments, name in cases:
        (tmp_path / "out").mkdir()
        mine = tmp_path / "out" / name
        mine.write_bytes(b'{"mine": 1}')
        process = run_script(script, *arguments, check=False)
        assert_user_error(process, mine.name if mine.suffix == ".jsonl" else tmp_path / "out")
        assert content(tmp_path / "out") == {name: b'{"mine": 1}'}, (script, name)
        shutil.rmtree(tmp_path / "out")


def test_an_earlier_output_and_an_empty_file_are_replaced(runs, packed, lens_image, tmp_path):
    np.save(tmp_path / "one.npy", lens_image)
    for suffix in ("png", "pdf", "svg"):
        csv, sheet = tmp_path / "p.csv", tmp_path / f"sheet.{suffix}"
        sheet.touch()
        for _ in range(2):
            run_script("predict.py", "--model", runs / "classifier.onnx", "--out", csv, "--sheet", sheet,
                       "--least-familiarity", 0, tmp_path / "one.npy")  # fmt: skip
            assert b"lenses" in sheet.read_bytes()
    command = ("--data", packed, "--weights", runs / "full" / CLASSIFIER, "--out", tmp_path / "e")
    for seed in (0, 1):
        run_script("evaluate.py", *command, "--resamples", 2, "--seed", seed)
        (tmp_path / "e" / "metrics.json").unlink()  # as in an evaluation that was stopped
