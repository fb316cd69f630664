"""The training loop: it learns, it survives, and it gives the same weights again."""

import argparse
import contextlib
import importlib
import multiprocessing.forkserver
import os
import random
import resource
import signal
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (CLASSIFIER, HUNG, PICTURES, PRETRAINED, ROOT, TINY_NETWORK, assert_refused, assert_same_tensors,
                      finetuning, history_of, pretrain_on, pretraining, run_script, sigterm_at, tensors_in)  # fmt: skip
from torch import nn

from lib import errors, loader, loop, optim, plots, recipe
from lib.errors import UserError
from lib.run import open_run

KILLS = int(os.environ.get("KILLS", "3"))
WEIGHTS = {"pretrain": PRETRAINED, "finetune": CLASSIFIER}


# The loop with a model of its own: a line through points.


def fit_line(out, validate=None, score=None, spoil=lambda rows, loss: loss, rows=40, **changed):
    """Fit a line to 40 points.

    `spoil(rows, loss)` gives the loss that the loop gets. Returns what `loop.fit` returns, and the
    calls of the loss: [(rows, progress, whether the model was in training mode)].
    """
    options = {"out": out, "epochs": 3, "batch_size": 8, "validations": None, "lr": 0.1, "seed": 0,
               "precision": "float32", "quiet": True, "resume": False, "overwrite": True,
               "update": False, "data": "points", "weight_decay": 0.0}  # fmt: skip
    args = argparse.Namespace(**options | changed)
    dataset = SimpleNamespace(fingerprint="f", origin="", class_names=(), labels=[])
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.5
    model, calls = nn.Linear(2, 1), []

    def batch_loss(batch, progress):
        calls.append((batch.tolist(), progress, model.training))
        return {"loss": spoil(batch, F.mse_loss(model(x[batch])[:, 0], y[batch]))}

    def whole_loss():
        assert not model.training
        with torch.no_grad():
            return {"loss": F.mse_loss(model(x)[:, 0], y).item()}

    learner = loop.Learner(model, list(model.named_parameters()))
    chosen, cpu = recipe.Defaults(3, 0, 8, 0.1).recipe(args, rows), torch.device("cpu")
    with open_run(args, dataset, "w.pth", chosen) as run:
        objective = loop.Objective(batch_loss, validate or whole_loss, score)
        result = loop.fit(learner, objective, np.arange(rows), run, cpu, loop.precision_of(run, cpu))
    return *result[:2], calls


def test_the_loss_falls_and_the_history_says_so(tmp_path):
    state, history, _ = fit_line(tmp_path, epochs=40, lr=0.3)
    losses = [line["validation_loss"] for line in history]
    assert losses[-1] < 0.01 * losses[0]
    assert torch.allclose(state["weight"], torch.tensor([[1.0, -2.0]]), atol=0.1)
    expected = [{k: v for k, v in line.items() if k != "seconds"} for line in history]
    assert history_of(tmp_path) == expected
    assert (history[-1]["epoch"], history[-1]["step"]) == (40, 200)


def test_every_row_is_seen_once_an_epoch_in_another_order(tmp_path):
    *_, calls = fit_line(tmp_path)
    assert all(training for *_, training in calls)
    assert [progress for _, progress, _ in calls] == pytest.approx([i / 15 for i in range(15)])
    epochs = [sum((rows for rows, *_ in calls[i : i + 5]), []) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_rows_that_fill_no_batch_wait_for_another_epoch(tmp_path):
    *_, calls = fit_line(tmp_path / "one", rows=15, epochs=20)
    assert len(calls) == 20
    assert {len(rows) for rows, *_ in calls} == {8}
    assert {row for rows, *_ in calls for row in rows} == set(range(15))
    *_, calls = fit_line(tmp_path / "two", rows=5)  # fewer than --batch-size
    assert [sorted(rows) for rows, *_ in calls] == [list(range(5))] * 3


@pytest.mark.parametrize(("epochs", "validations", "expected"),
                         [(3, None, [5, 10, 15]), (1, 2, [3, 5]), (3, 1, [15]), (1, 100, [1, 2, 3, 4, 5])])  # fmt: skip
def test_validations_are_spread_over_the_steps(epochs, validations, expected, tmp_path):
    _, history, *_ = fit_line(tmp_path, epochs=epochs, validations=validations)
    assert [line["step"] for line in history] == expected


def test_training_figures_are_means_since_the_last_validation(tmp_path):
    numbers = iter(range(15))
    _, history, *_ = fit_line(tmp_path, spoil=lambda _, loss: 0 * loss + next(numbers))
    assert [line["train_loss"] for line in history] == [2.0, 7.0, 12.0]


def test_the_best_weights_are_returned_if_there_is_a_score_and_else_the_last(tmp_path, monkeypatch):
    seen, validate = [], loop.Training.validate

    def spying(training, *arguments):
        seen.append({k: v.clone() for k, v in training.model.state_dict().items()})
        return validate(training, *arguments)

    monkeypatch.setattr(loop.Training, "validate", spying)
    given = [0.1, 0.9, 0.3, 0.9, 0.2]
    for score, best in (("auc", 3), (None, 4)):  # of equals the last
        seen.clear()
        scores = iter(given)
        state, history, *_ = fit_line(tmp_path / str(score), epochs=5, score=score,
                                      validate=lambda s=scores: {"loss": 0.0, "auc": next(s)})  # fmt: skip
        assert [line["validation_auc"] for line in history] == given
        assert_same_tensors(state, seen[best])
        assert [torch.equal(state["weight"], other["weight"]) for other in seen].count(True) == 1


def test_the_learning_rate_of_a_step_reaches_the_optimisers(tmp_path, monkeypatch):
    used = []

    def spying(loss, optimizers, *_):
        loss.backward()
        used.append([group["lr"] for o in optimizers for group in o.param_groups])

    monkeypatch.setattr(loop, "update", spying)
    _, history, *_ = fit_line(tmp_path)
    expected = [optim.learning_rate(step, 15, 0.1) for step in range(15)]
    assert used == [[lr, lr] for lr in expected]
    assert [line["lr"] for line in history] == [expected[4], expected[9], expected[14]]


def test_batches_that_cannot_be_trained_on_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="fewer than two training images"):
        fit_line(tmp_path, rows=1)
    monkeypatch.setattr(loop.distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match="batch of 8 images cannot be split over 3 processes.*--batch-size"):
        fit_line(tmp_path)


@pytest.mark.parametrize("what", ["training loss", "validation loss", "largest weight"])
def test_figures_that_are_not_finite_are_named_and_never_kept(what, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    more = {}
    if what == "validation loss":
        more["validate"] = lambda: {"loss": float("inf")}
    elif what == "training loss":
        losses = iter([1.0, 1.0, float("nan")])
        more["spoil"] = lambda _, loss: loss * next(losses)
    else:
        # The gradient of a good loss may be infinite.
        monkeypatch.setattr(loop, "update", lambda *_: None)
        save = loop.Training.save_checkpoint

        def spoiled(training):
            if training.step == 3:
                with torch.no_grad():
                    training.model.weight.fill_(float("inf"))
            save(training)

        monkeypatch.setattr(loop.Training, "save_checkpoint", spoiled)
    with pytest.raises(UserError, match=f"the {what} is not finite at step [235]") as error:
        fit_line(tmp_path, **more)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert str(tmp_path / "checkpoint.pth") in str(error.value)
    assert torch.isfinite(checkpoint["model"]["weight"]).all()


@pytest.mark.parametrize(
    ("script", "batch_size", "more"),
    [("pretrain", 8, ()), ("finetune", 240, ("--pretrained", "none", "--strategy", "full"))],
)  # in the middle of an epoch, and at its end
def test_a_loss_that_is_not_finite_stops_the_run(script, batch_size, more, packed, tmp_path):
    arguments = ("--data", packed, "--out", tmp_path / "run", "--lr", "1e30", "--epochs", 1,
                 "--batch-size", batch_size, "--precision", "float32", *TINY_NETWORK, *more)  # fmt: skip
    assert_refused(f"{script}.py", arguments, "not finite at step",
                   "learning rate 1e+30: lower --lr", "checkpoint: none yet")  # fmt: skip
    assert not list((tmp_path / "run").glob("*.pth"))


# Resuming


# Full fine-tuning of an MAE is killed below.
@pytest.mark.parametrize("what", ["pretrain", "head", "layernorm", "residual", "continuing"])
def test_an_interrupted_run_resumes_to_bit_identical_weights(what, packed, runs, tmp_path, no_pictures):
    script = "pretrain" if what == "pretrain" else "finetune"

    def arguments(out, *more):
        if what == "pretrain":
            return pretraining(packed, out, "--augment", "halfturn,noise,shift,rotate", *more)
        if what == "continuing":
            start = runs / "head" / CLASSIFIER
            return finetuning(packed, out, start, "full", "--patch-dropout", 0.5, *more)
        start = runs / "pretrain" / PRETRAINED
        return finetuning(packed, out, start, what, "--validations", 5, *more)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_script(f"{script}.py", *arguments(whole))
    for step in (5, 17):  # in the first epoch, and in the second
        with sigterm_at(step):
            stopped = run_script(f"{script}.py", *arguments(cut, "--resume"), check=False)
        assert stopped.returncode == 143
        assert f"stopped at step {step} of" in stopped.stderr
    process = run_script(f"{script}.py", *arguments(cut, "--resume"))
    assert "resumes at step 17 of" in process.stdout
    assert ": train loss" in process.stdout and "img/s" not in process.stdout + process.stderr
    assert_same_tensors(tensors_in(whole / WEIGHTS[script]), tensors_in(cut / WEIGHTS[script]))
    assert history_of(whole) == history_of(cut)


def test_a_run_resumes_in_the_order_that_it_began_with(packed, tmp_path, no_pictures, monkeypatch):
    """Another machine may have more memory, where rows would not be shuffled in blocks."""
    monkeypatch.setattr(loader, "READ_BLOCK", 16)
    monkeypatch.setattr(loop, "larger_than_memory", lambda images: True)
    in_blocks, shuffled = [], loader.shuffled

    def spying(rows, rng, blocks):
        in_blocks.append(blocks)
        return shuffled(rows, rng, blocks)

    monkeypatch.setattr(loop, "shuffled", spying)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain_on(packed, whole)
    with sigterm_at(5):
        pretrain_on(packed, cut, check=False)
    monkeypatch.setattr(loop, "larger_than_memory", lambda images: False)
    checkpoint = torch.load(cut / "checkpoint.pth", weights_only=True)
    torch.save(checkpoint | {"device": "cuda"}, cut / "checkpoint.pth")
    process = pretrain_on(packed, cut, "--resume")
    assert "continues on another device than cuda" in process.stdout
    assert_same_tensors(tensors_in(whole / PRETRAINED), tensors_in(cut / PRETRAINED))
    assert in_blocks == [True] * (3 + 1 + 3)  # epochs of the whole run, the stopped and the resumed one


# Processes that are killed, interrupted or out of disk. They are forked from one process that has
# the scripts loaded, so that each starts at once.

FORKED = multiprocessing.get_context("forkserver")
LOADED = ["pretrain", "finetune", "export", "simulate", "pytest"]  # all that conftest imports


def run_forked(script, arguments, output, checkpoint_seconds, largest_file):
    """Run a script in a process of its own; it draws no pictures."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    loop.CHECKPOINT_SECONDS = checkpoint_seconds
    for name in PICTURES:
        setattr(plots, name, lambda *_: None)
    module = importlib.import_module(script)
    errors.run_main(lambda: module.main(arguments))


@pytest.fixture
def start():
    """Function that starts a script in a new process, which writes what it says to a file.

    By default it leaves a checkpoint after every step.
    """
    with contextlib.chdir(ROOT):
        FORKED.set_forkserver_preload(LOADED)
        multiprocessing.forkserver.ensure_running()
    started = []

    def starting(script, arguments, output, checkpoint_seconds=0, largest_file=None):
        given = script, arguments, str(output), checkpoint_seconds, largest_file
        process = FORKED.Process(target=run_forked, args=given)
        process.start()
        started.append(process)
        return process

    yield starting
    for process in started:
        process.kill()
        process.join()


def code_of(process):
    process.join(HUNG)
    return process.exitcode


def last_change(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def wait_for_change(path, process, before=None):
    while last_change(path) in (before, None) and process.is_alive():
        time.sleep(0.001)


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_killed_training_resumes_to_bit_identical_weights(script, packed, tmp_path, pretrained, start, no_pictures):
    epochs = 2 * KILLS  # of 10 or 15 steps, each with a checkpoint: long enough for all kills

    def arguments(out, *more):
        if script == "pretrain":
            return pretraining(packed, out, "--epochs", epochs, *more)
        return finetuning(packed, out, pretrained, "full", "--epochs", epochs, *more)

    run_script(f"{script}.py", *arguments(tmp_path / "whole"))
    rng = random.Random(0)
    out, output = tmp_path / "killed", tmp_path / "output"
    for _ in range(KILLS):
        before = last_change(out / "checkpoint.pth")
        process = start(script, arguments(out, "--resume"), output)
        wait_for_change(out / "checkpoint.pth", process, before)
        time.sleep(rng.uniform(0, 0.1))  # then it steps, writes a checkpoint or validates
        process.kill()
        assert code_of(process) == -signal.SIGKILL, output.read_text()
    process = start(script, arguments(out, "--resume"), output, checkpoint_seconds=30)
    assert code_of(process) == 0, output.read_text()
    assert "resumes at step" in output.read_text()
    assert_same_tensors(*(tensors_in(tmp_path / n / WEIGHTS[script]) for n in ("whole", "killed")))
    assert history_of(tmp_path / "whole") == history_of(out)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_a_checkpoint_and_the_usual_exit_code(kind, code, packed, tmp_path, start):
    out, output = tmp_path / "run", tmp_path / "output"
    process = start("pretrain", pretraining(packed, out, "--epochs", 1000), output)
    wait_for_change(out / "checkpoint.pth", process)
    os.kill(process.pid, kind)
    assert code_of(process) == code, output.read_text()
    assert "--resume" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert not (out / PRETRAINED).exists()
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] > 0


def test_a_full_disk_is_a_clear_error_and_leaves_no_part(packed, tmp_path, start, no_pictures):
    out, output = tmp_path / "run", tmp_path / "output"
    pretrain_on(packed, out)
    process = start("pretrain", pretraining(packed, out, "--overwrite"), output, largest_file=50_000)
    assert code_of(process) == 2, output.read_text()
    assert "Traceback" not in output.read_text()
    (error,) = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert "checkpoint" in error
    # The replaced run is gone as a whole: no weights stand beside the settings of others.
    assert not [path.name for path in out.iterdir() if path.suffix == ".pth" or ".tmp" in path.name]


def test_a_terminal_shows_a_live_line(packed, pretrained, tmp_path, start):
    arguments = finetuning(packed, tmp_path / "run", pretrained, "full", "--epochs", 8)
    terminal, seen_by_script = os.openpty()
    termios.tcsetwinsize(terminal, (40, 150))
    process = start("finetune", arguments, os.ttyname(seen_by_script), checkpoint_seconds=30)
    shown = b""
    os.set_blocking(terminal, False)
    while process.is_alive():
        with contextlib.suppress(BlockingIOError):
            shown += os.read(terminal, 4096)
            continue
        time.sleep(0.01)
    os.close(seen_by_script)
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert code_of(process) == 0, shown.decode()
    for part in ("img/s", "epoch=", "loss=", "validation macro_auc=", "<"):
        assert part in shown.decode(), part
