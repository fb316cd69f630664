"""The training loop: it learns, it survives, and it gives the same weights again."""

import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HUNG, ROOT, TINY_DECODER, TINY_NETWORK, assert_user_error, run_script

import data
import evaluate
import files
import finetune
import pretrain
import simulate
import train
import weights
from mae import Classifier

KILLS = int(os.environ.get("KILLS", "3"))
# As a script, but with a checkpoint after every step.
DRIVER = (
    "import sys, train, files, {0}; train.CHECKPOINT_SECONDS = 0; files.run(lambda: {0}.main())"
)


def pretrain_command(packed, out, *more):
    return ["--data", packed, "--out", out, "--epochs", 3, "--batch-size", 8, "--precision",
            "float32", *TINY_NETWORK, *TINY_DECODER, *more]  # fmt: skip


def start(script, arguments):
    command = [sys.executable, "-c", DRIVER.format(script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def weights_in(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def last_change(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # between two renames
        return None


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_killed_training_resumes_to_bit_identical_weights(script, packed, tmp_path, runs):
    epochs = 2 * KILLS  # of 10 or 15 steps, each with a checkpoint: long enough for all kills

    def arguments(out):
        if script == "pretrain":
            return pretrain_command(packed, out, "--epochs", epochs)
        return ["--data", packed, "--out", out, "--strategy", "full", "--epochs", epochs,
                "--batch-size", 16, "--pretrained", runs / "pretrain" / "vit-mae-wt.pth",
                "--precision", "float32"]  # fmt: skip

    name = "vit-mae-wt.pth" if script == "pretrain" else "vit-mae-classifier-wt.pth"
    run_script(f"{script}.py", *arguments(tmp_path / "whole"))
    rng = random.Random(0)
    out = tmp_path / "killed"
    for _ in range(KILLS):
        before = last_change(out / "checkpoint.pth")
        process = start(script, [*arguments(out), "--resume"])
        while last_change(out / "checkpoint.pth") in (before, None) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))  # then it steps, writes a checkpoint or validates
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    process = start(script, [*arguments(out), "--resume"])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "goes on at step" in output
    assert same(weights_in(tmp_path / "whole" / name), weights_in(out / name))
    lines = [(r / "metrics.jsonl").read_text().splitlines() for r in (tmp_path / "whole", out)]
    whole, resumed = ([json.loads(line) for line in part] for part in lines)
    for line in whole + resumed:
        line.pop("seconds")
    assert whole == resumed
    assert not list(out.glob("*checkpoint*"))


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_a_checkpoint_and_the_usual_exit_code(kind, code, packed, tmp_path):
    process = start("pretrain", pretrain_command(packed, tmp_path / "run", "--epochs", "100"))
    wait_for(tmp_path / "run" / "checkpoint.pth", process)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=HUNG)
    assert process.returncode == code, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "vit-mae-wt.pth").exists()
    checkpoint = weights.load_checkpoint(tmp_path / "run")
    assert checkpoint["step"] > 0


def test_a_terminal_shows_a_live_line_and_a_file_plain_lines(packed, runs, tmp_path):
    arguments = ["--data", packed, "--strategy", "full", "--epochs", 20, "--batch-size", 16,
                 "--pretrained", runs / "pretrain" / "vit-mae-wt.pth"]  # fmt: skip
    terminal, seen_by_script = os.openpty()
    termios.tcsetwinsize(terminal, (40, 150))
    process = subprocess.Popen(
        [sys.executable, "finetune.py", *map(str, arguments), "--out", str(tmp_path / "one")],
        cwd=ROOT, stdout=seen_by_script, stderr=seen_by_script,
    )  # fmt: skip
    os.close(seen_by_script)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert process.wait() == 0, shown.decode()
    for part in ("img/s", "epoch=", "loss=", "validation macro_auc=", "<"):
        assert part in shown.decode(), part
    plain = run_script("finetune.py", *arguments, "--out", tmp_path / "two")
    assert "epoch 20/20: train loss" in plain.stdout
    assert "img/s" not in plain.stdout + plain.stderr


def test_a_full_disk_is_a_clear_error_and_old_weights_stay(packed, tmp_path):
    out = tmp_path / "run"
    run_script("pretrain.py", *pretrain_command(packed, out))
    before = (out / "vit-mae-wt.pth").read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    arguments = map(str, pretrain_command(packed, out))
    process = subprocess.run(
        [sys.executable, "-c", limit + DRIVER.format("pretrain"), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=HUNG,
    )  # fmt: skip
    assert_user_error(process, "checkpoint")
    assert (out / "vit-mae-wt.pth").read_bytes() == before
    assert not list(out.glob("*.tmp*"))


def test_a_broken_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    weights.save_checkpoint(tmp_path, {"step": 1})
    weights.save_checkpoint(tmp_path, {"step": 2})
    current, _ = weights.checkpoint_paths(tmp_path)
    current.write_bytes(current.read_bytes()[:100])
    assert weights.load_checkpoint(tmp_path) == {"step": 1}
    assert str(current) in capsys.readouterr().out


def test_resume_with_other_settings_names_the_setting(packed, tmp_path):
    process = start("pretrain", pretrain_command(packed, tmp_path / "run", "--epochs", "100"))
    wait_for(tmp_path / "run" / "checkpoint.pth", process)
    process.terminate()
    process.communicate()
    other = pretrain_command(packed, tmp_path / "run", "--epochs", 100, "--lr", "0.5", "--resume")
    before = (tmp_path / "run" / "config.json").read_text()
    process = run_script("pretrain.py", *other, check=False)
    assert_user_error(process, "lr = 0.002", "0.5", "--resume")
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_second_run_into_the_same_folder_is_refused(packed, tmp_path):
    process = start("pretrain", pretrain_command(packed, tmp_path / "run", "--epochs", "100"))
    wait_for(tmp_path / "run" / "checkpoint.pth", process)
    second = run_script("pretrain.py", *pretrain_command(packed, tmp_path / "run"), check=False)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert_user_error(second, tmp_path / "run")


@pytest.mark.parametrize("batch_size", [8, 240])  # in the middle of an epoch, and at its end
@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_a_loss_that_is_not_finite_stops_the_run(script, batch_size, packed, tmp_path, capsys):
    arguments = ["--data", packed, "--out", tmp_path / "run", "--lr", "1e30", "--epochs", 1,
                 "--batch-size", batch_size, "--precision", "float32", *TINY_NETWORK]  # fmt: skip
    if script == "finetune":
        arguments += ["--pretrained", "none", "--strategy", "full"]
    main = {"pretrain": pretrain.main, "finetune": finetune.main}[script]
    with pytest.raises(SystemExit) as ended:
        files.run(lambda: main(list(map(str, arguments))))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert "not finite at step" in error
    assert "learning rate 1e+30: lower --lr" in error
    assert "checkpoint: none yet" in error
    assert not list((tmp_path / "run").glob("*.pth"))


def spy_on_rows(monkeypatch):
    """The set of rows that any training reads from now on."""
    seen, read = set(), train.batch_reader

    def spying(images, device):
        function = read(images, device)

        def remember(rows):
            seen.update(np.asarray(rows).tolist())
            return function(rows)

        return remember

    monkeypatch.setattr(train, "batch_reader", spying)
    return seen


def test_pretraining_learns_and_sees_one_class_of_training_and_validation(
    packed, tmp_path, monkeypatch
):
    seen, rows_trained_on = spy_on_rows(monkeypatch), set()
    pictures = pretrain.held_out_reconstructions

    def draw(*arguments):
        rows_trained_on.update(seen)  # the pictures, which come last, show every class
        return pictures(*arguments)

    monkeypatch.setattr(pretrain, "held_out_reconstructions", draw)
    pretrain.main([str(a) for a in pretrain_command(packed, tmp_path / "run", "--epochs", "20")])
    dataset = data.load(packed)
    parts = data.split(dataset)
    allowed = np.concatenate([parts["train"], parts["validation"]])
    allowed = allowed[dataset.labels[allowed] == dataset.class_names.index("no_sub")]
    assert rows_trained_on == set(allowed.tolist())
    assert not seen & set(parts["test"].tolist())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["validation_loss"] for line in lines]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("strategy", finetune.STRATEGIES)
def test_fine_tuning_never_reads_a_test_image(strategy, packed, runs, tmp_path, monkeypatch):
    seen = spy_on_rows(monkeypatch)
    finetune.main([str(a) for a in (
        "--data", packed, "--pretrained", runs / "pretrain" / "vit-mae-wt.pth", "--strategy",
        strategy, "--epochs", 2, "--out", tmp_path / "run", "--precision", "float32")])  # fmt: skip
    parts = data.split(data.load(packed))
    assert seen == set(np.concatenate([parts["train"], parts["validation"]]).tolist())


def test_the_weights_with_the_best_validation_are_kept(runs):
    for strategy in finetune.STRATEGIES:
        lines = (runs / strategy / "metrics.jsonl").read_text().splitlines()
        best = max((json.loads(line) for line in lines), key=lambda x: x["validation_macro_auc"])
        path = runs / strategy / "vit-mae-classifier-wt.pth"
        model, content = weights.load_classifier(path)
        assert content["run"]["best"] == best
        model.temperature.fill_(1.0)  # fitted afterwards; it reorders images a little
        dataset = data.load(runs.parent.parent / content["run"]["data"], runs / "cache")
        rows = data.split(dataset)["validation"]
        probabilities = evaluate.predict_probabilities(
            model, dataset.images, rows, torch.device("cpu")
        )
        auc = np.mean(evaluate.auc_by_class(probabilities, dataset.labels[rows]))
        assert auc == pytest.approx(best["validation_macro_auc"], abs=0.02)


@pytest.mark.parametrize("unit", [1e-3, 255.0])
def test_the_unit_of_the_data_changes_nothing(unit, tmp_path, monkeypatch):
    rows = np.random.default_rng(0).permutation(120)
    parts = {"train": rows[:96], "validation": rows[96:108], "test": rows[108:]}
    monkeypatch.setattr(data, "split", lambda dataset: parts)  # other content is split otherwise
    results = []
    for scale in (1.0, unit):
        out = tmp_path / f"unit-{scale}"
        images = [
            (name, np.float32(scale) * batch, mass)
            for name, batch, mass in simulate.simulate("Model_II", 40, seed=4, progress=False)
        ]
        simulate.write_packed(out, images, 40, "Model_II", "scaled")
        pretrain.main([str(a) for a in pretrain_command(out, out / "mae")])
        pretrained = out / "mae" / "vit-mae-wt.pth"
        finetune.main([str(a) for a in (
            "--data", out, "--pretrained", pretrained, "--strategy", "full", "--epochs", 2,
            "--out", out / "full", "--batch-size", 16, "--precision", "float32")])  # fmt: skip
        model, _ = weights.load_classifier(out / "full" / "vit-mae-classifier-wt.pth")
        dataset = data.load(out)
        results.append(evaluate.predict_probabilities(
            model, dataset.images, data.split(dataset)["test"], torch.device("cpu")
        ))  # fmt: skip
    assert np.abs(results[0] - results[1]).max() < 2e-3


def test_transform_constants_come_from_the_training_rows_alone(packed):
    dataset = data.load(packed)
    rows = data.split(dataset)["train"]
    images = np.array(dataset.images)
    before = train.fit_transform(images, rows, "log")
    others = np.setdiff1d(np.arange(len(images)), rows)
    images[others] = 1e6
    assert train.fit_transform(images, rows, "log") == before
    images[rows] *= 2
    assert train.fit_transform(images, rows, "log") != before


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_transform_constants_withstand_hot_pixels_and_bad_images(kind, packed):
    dataset = data.load(packed)
    rows = data.split(dataset)["train"]
    images = np.array(dataset.images)
    before = train.fit_transform(images, rows, kind)
    assert before.pop("kind") == kind
    images[rows[::50], :6] = -99.0  # a sentinel border
    images[rows[100], 3, 3] = 1e9
    images[rows, 5, 5] = 1e4  # a hot pixel of the camera
    after = train.fit_transform(images, rows, kind)
    assert after.pop("kind") == kind
    assert after == pytest.approx(before, rel=0.05, abs=0.01 * before["softening"])


@pytest.mark.parametrize("strategy", finetune.STRATEGIES)
def test_a_strategy_changes_what_it_says_and_nothing_else(strategy, runs):
    before = weights_in(runs / "pretrain" / "vit-mae-wt.pth")
    after = weights_in(runs / strategy / "vit-mae-classifier-wt.pth")
    shared = [name for name in after if name in before]
    changed = {name for name in shared if not torch.equal(before[name], after[name])}
    norms = {name for name in shared if "norm" in name}
    expected = {
        "head": set(),
        "layernorm": norms,
        "full": set(shared) - {"pos_embed"},
    }
    unused = {"cls_token"}  # mean pooling: its gradient only flows through attention
    assert changed - unused == expected[strategy] - unused


def test_layers_near_the_input_learn_more_slowly():
    model = Classifier(depth=3)
    depth = len(model.blocks)
    layers = [
        finetune.layer_of(name, depth)
        for name in ("patch_embed.proj.weight", "blocks.0.norm1.bias", "blocks.2.mlp.fc1.weight",
                     "norm.weight", "fc.0.weight")
    ]  # fmt: skip
    assert layers == [0, 1, 3, 4, 4]
    groups = train.parameter_groups(
        finetune.learns_in_full(model), 0.05, lambda name: 0.5 ** (4 - finetune.layer_of(name, 3))
    )
    assert {group["lr_scale"] for group in groups} == {0.5**k for k in range(5)}
    decayed = [p for g in groups if g["weight_decay"] for p in g["params"]]
    assert all(p.ndim > 1 for p in decayed)
    assert sum(len(g["params"]) for g in groups) == len(finetune.learns_in_full(model))


def test_batchnorm_statistics_are_those_of_the_training_images():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.4)
    )
    inputs = torch.randn(512, 5) * 3 + 1
    inputs[256:] += 20  # rows come sorted by class, and classes differ
    model[1].running_mean.fill_(100.0)
    random_state = torch.get_rng_state()
    train.reestimate_batchnorm(model, lambda rows: model(inputs[rows]), np.arange(512))
    outputs = model[0](inputs)
    assert torch.allclose(model[1].running_mean, outputs.mean(0), atol=1e-4)
    assert torch.allclose(model[1].running_var, outputs.var(0), rtol=0.02)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[1].momentum == 0.1


def test_rows_in_blocks_are_all_there_and_read_together():
    rows = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.8)
    order = train.shuffled(rows, np.random.default_rng(1), in_blocks=True)
    assert np.array_equal(np.sort(order), rows)
    assert np.array_equal(order, train.shuffled(rows, np.random.default_rng(1), in_blocks=True))
    together = train.READ_BLOCK * train.BLOCKS_TOGETHER
    position = np.searchsorted(rows, order)
    first = position[:together] // train.READ_BLOCK
    assert len(np.unique(first)) == train.BLOCKS_TOGETHER
    # Mixed: neighbours in the order come from different blocks, and classes from all over.
    assert (np.diff(first) == 0).mean() < 0.05
    assert abs(position[:together].mean() - len(rows) / 2) < len(rows) / 10


@pytest.mark.parametrize("script", [pretrain, finetune])
def test_images_that_do_not_fit_into_memory_are_trained_on_all_the_same(
    script, packed, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "larger_than_memory", lambda _: True)
    monkeypatch.setattr(train, "READ_BLOCK", 4)
    monkeypatch.setattr(train, "BLOCKS_TOGETHER", 2)
    monkeypatch.setattr(train, "FORGET_AFTER", 10)
    seen = spy_on_rows(monkeypatch)
    arguments = pretrain_command(packed, tmp_path / "run")
    if script is finetune:
        arguments = ["--data", packed, "--out", tmp_path / "run", "--strategy", "full", "--epochs",
                     1, "--pretrained", runs / "pretrain" / "vit-mae-wt.pth"]  # fmt: skip
    script.main([str(a) for a in arguments])
    rows = data.split(data.load(packed))["train"]
    assert set(rows[rows >= 200]) <= seen  # no_sub, which pre-training takes


def batches_that_give_back(images, monkeypatch):
    """Of a pass over 2000 rows, 64 at a time: after how many batches pages were given back."""
    batches, given_back = 0, []
    monkeypatch.setattr(train, "forget_pages", lambda _: given_back.append(batches))
    read = train.batch_reader(images, torch.device("cpu"))
    for start in range(0, 2000, 64):
        batches += 1
        read(np.arange(start, min(start + 64, 2000)))
    return given_back


def test_rows_from_everywhere_do_not_keep_a_whole_file_mapped(monkeypatch):
    # Where a kernel maps 2 MB for each row, 64 rows a batch are a gigabyte after eight batches.
    images = np.broadcast_to(np.float32(0), (10**8, 2, 2))
    given_back = batches_that_give_back(images, monkeypatch)
    assert given_back[0] <= 8
    assert np.diff(given_back).max() <= 8


def test_a_file_that_is_small_as_a_whole_stays_mapped(monkeypatch):
    assert batches_that_give_back(np.zeros((2000, 2, 2), np.float32), monkeypatch) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults of Linux")
def test_memory_of_freed_tensors_is_used_again():
    train.resolve_device("cpu")
    size, before = 100 * 2**20, 0
    for repeat in range(30):
        if repeat == 10:  # until then more may be asked for
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 10 * size / resource.getpagesize()  # twice that if all is new to the kernel


def test_a_data_set_kept_on_the_device_gives_the_same_batches(packed):
    images, device = data.load(packed).images, torch.device("cpu")
    rows = np.array([250, 3, 299, 3])
    batch = train.reader_of_stored(images, device)(rows)
    assert torch.equal(batch, train.batch_reader(images, device)(rows))


def test_few_images_are_passed_over_more_often():
    assert train.enough_epochs(2, 1000, 72_000, 64) == 2
    assert train.enough_epochs(2, 1000, 640, 64) == 100
    assert train.enough_epochs(2, 1000, 10, 64) == 1000


def test_the_steps_of_a_run_on_few_images_are_enough(packed, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(finetune.DEFAULTS["head"], "epochs", 2)
    monkeypatch.setitem(finetune.DEFAULTS["head"], "fewest_steps", 30)
    finetune.main([
        "--data", str(packed), "--pretrained", str(runs / "pretrain" / "vit-mae-wt.pth"),
        "--strategy", "head", "--out", str(tmp_path / "head"), "--quiet",
    ])  # fmt: skip
    lines = (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(lines[-1])["epoch"], json.loads(lines[-1])["step"]) == (30, 30)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3


def test_choosing_the_precision_leaves_weights_and_random_numbers(packed):
    model = Classifier(patch_size=16, embed_dim=32, depth=1, num_heads=2).train()
    images = torch.rand(8, 1, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()

    def loss():
        return model(images).square().mean()

    chosen, seconds = train.choose_precision("auto", model, loss, torch.device("cpu"))
    assert same(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert chosen in seconds
    assert math.isfinite(seconds[chosen])


@pytest.mark.parametrize(
    ("level", "in_bfloat16", "chosen"),
    [(1.0, 2.0, "float32"), (1.0, 1.001, "bfloat16"), (0.02, 1.05, "bfloat16"), (0.02, 1.9, "float32")],
)  # the third: rounding is a large part of the small loss of a trained network
def test_a_faster_precision_is_taken_if_its_loss_agrees(level, in_bfloat16, chosen, monkeypatch):
    model = Classifier(patch_size=16, embed_dim=32, depth=1, num_heads=2)
    images = torch.rand(4, 1, 64, 64)
    took = []
    monkeypatch.setattr(train, "bfloat16_is_fast", lambda device: True)
    monkeypatch.setattr(train, "seconds_of", lambda function, device: (function(), took[-1])[1])

    def loss():
        fast = torch.is_autocast_enabled("cpu")
        took.append(1e-6 if fast else 1.0)
        return level * (in_bfloat16 if fast else 1.0) + 0 * model(images).sum()

    precision, _ = train.choose_precision("auto", model, loss, torch.device("cpu"))
    assert precision.name == chosen


def test_the_share_of_labels_is_the_same_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    rows = finetune.share_of_each_class(labels, np.arange(160), 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 2]


def test_auc_and_intervals_are_right_for_a_known_case():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    score = rng.normal(labels * 1.0)
    probabilities = np.stack([1 - score, score], axis=1)
    # Two unit normals one apart: AUC = Φ(1/√2).
    expected = 0.5 * (1 + math.erf(0.5))
    low, high = evaluate.bootstrap(
        lambda rows: evaluate.measures(probabilities[rows], labels[rows]), labels, 200, 0,
        progress=False,
    )[1]  # fmt: skip
    assert low < expected < high
    assert 0.03 < high - low < 0.09
    perfect = np.eye(3)[np.repeat([0, 1, 2], 5)]
    assert evaluate.measures(perfect, np.repeat([0, 1, 2], 5)).tolist() == [1.0] * 5


def test_looking_at_images_from_everywhere_leaves_no_pages_behind(tmp_path):
    """Mapped pages of a file count as the process's memory until they are given back."""

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) * 1024

    images = np.lib.format.open_memmap(
        tmp_path / "images.npy", "w+", dtype=np.float32, shape=(4000, 64, 64)
    )
    images[:] = np.random.default_rng(0).random((4000, 1, 1))
    images.flush()
    del images
    mapped = files.read_npy(tmp_path / "images.npy")
    before = resident()
    train.fit_transform(mapped, np.arange(4000), "log")
    assert resident() - before < 16e6  # of 66 MB
