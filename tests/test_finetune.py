"""Fine-tuning: what each strategy changes, what it reads, and what its shortcuts leave equal."""

import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (CLASSIFIER, PRETRAINED, ROOT, TINY_NETWORK, assert_refused, assert_same_tensors, finetune_on,
                      finetuning, history_of, images_of, pretraining, sigterm_at, tensors_in, write_classes,
                      write_packed)  # fmt: skip
from torch import nn

import finetune
import mae
import pretrain
import simulate
from lib import class_evaluation, datasets, intensity, lenses, loader, metrics, optim, strategies, weights
from lib.augment import augment
from mae import Classifier

CPU = torch.device("cpu")


# What learns


@pytest.mark.parametrize("strategy", finetune.STRATEGIES)
def test_a_strategy_changes_what_it_says_and_nothing_else(strategy, runs):
    before = tensors_in(runs / "pretrain" / PRETRAINED)
    after = tensors_in(runs / strategy / CLASSIFIER)
    if strategy == "residual":  # it keeps the MAE whole
        after = {name.removeprefix("mae."): t for name, t in after.items() if "mae." in name}
        assert after.keys() == before.keys()
    shared = [name for name in after if name in before]
    changed = {name for name in shared if not torch.equal(before[name], after[name])}
    expected = {"head": set(), "layernorm": {name for name in shared if "norm" in name},
                "full": set(shared) - {"pos_embed"}, "residual": set()}  # fmt: skip
    assert changed == expected[strategy]


def test_layers_near_the_input_learn_more_slowly(packed, pretrained, tmp_path, monkeypatch):
    used, update = [], optim.update

    def spying(loss, optimizers, *more):
        used.append([(g["lr"], g["lr_scale"]) for o in optimizers for g in o.param_groups])
        return update(loss, optimizers, *more)

    monkeypatch.setattr("lib.loop.update", spying)
    finetune_on(packed, tmp_path, pretrained, "full", "--epochs", 1, "--layer-decay", 0.5)
    assert used
    for step in used:
        assert {scale for _, scale in step} == {1.0, 0.5, 0.25, 0.125}  # of two blocks
        largest = max(lr for lr, _ in step)
        assert all(lr == pytest.approx(scale * largest) for lr, scale in step)
    factor = strategies.layer_scale(0.5, 3)
    names = ("patch_embed.proj.weight", "blocks.0.norm1.bias", "blocks.2.mlp.fc1.weight", "norm.weight")
    assert [factor(name) for name in names] == [0.5**4, 0.5**3, 0.5, 1]


def test_batchnorm_statistics_are_those_of_the_training_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.4))
    inputs = torch.randn(512, 5) * 3 + 1
    inputs[256:] += 20  # rows come sorted by class, and classes differ
    model[1].running_mean.fill_(100.0)
    model[1].num_batches_tracked.fill_(10)
    random_state = torch.get_rng_state()
    strategies.reestimate_batchnorm(model, lambda rows: model(inputs[rows]), np.arange(512))
    outputs = model[0](inputs)
    assert torch.allclose(model[1].running_mean, outputs.mean(0), atol=1e-4)
    assert torch.allclose(model[1].running_var, outputs.var(0), rtol=0.02)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[1].momentum == 0.1


# What is read


@pytest.mark.parametrize("strategy", finetune.STRATEGIES)
def test_test_images_and_images_without_their_labels_are_never_read(
    strategy, packed, pretrained, tmp_path, rows_read, no_pictures, monkeypatch
):
    opened, load = [], torch.load

    def spying(file, **options):
        opened.append(Path(getattr(file, "name", file)))
        return load(file, **options)

    monkeypatch.setattr(torch, "load", spying)
    finetune_on(packed, tmp_path / "run", pretrained, strategy, "--labels", 0.2)
    dataset = datasets.load(packed)
    parts = datasets.split(dataset)
    rows = datasets.fraction_of_each_class(dataset.labels, parts["train"], 0.2, seed=0)
    assert len(rows) == pytest.approx(0.2 * len(parts["train"]), abs=2)
    assert rows_read == set(np.concatenate([rows, parts["validation"]]).tolist())
    assert opened == [pretrained]  # once: between two reads another file may take its place


# Shortcuts


@pytest.mark.parametrize("pool", mae.POOLINGS)
def test_stored_features_are_those_of_the_whole_network(pool, packed):
    dataset = datasets.load(packed)
    rows = np.array([7, 299, 150, 3])
    torch.manual_seed(0)
    transform = intensity.fit_transform(dataset.images, np.arange(300), "log")
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = Classifier(**sizes, pool=pool, transform=transform).train()
    model.temperature.fill_(2.0)
    read = loader.batch_reader(dataset.images, CPU)
    stored = strategies.stored_features(model, read, rows, 300)
    with torch.no_grad():
        images = images_of(dataset, rows)
        assert torch.allclose(stored[rows], model.eval().features(images), atol=1e-5)
        assert torch.allclose(model.fc(stored[rows]) / 2.0, model(images), atol=1e-5)
    others = np.setdiff1d(np.arange(300), rows)
    assert not stored[others].any()  # they are not computed


@pytest.mark.parametrize("strategy", ["layernorm", "full"])
def test_the_first_half_of_the_steps_sees_fewer_tokens_and_validation_sees_all(
    strategy, packed, pretrained, tmp_path, monkeypatch, no_pictures
):
    """Steps and validations have the chosen precision, and the temperature is fitted in float32."""
    calls, forward = {True: [], False: []}, mae.Block.forward

    def spying(block, x, context=0):
        calls[block.training].append((x.shape[1], torch.is_autocast_enabled("cpu")))
        return forward(block, x, context)

    monkeypatch.setattr(mae.Block, "forward", spying)
    finetune_on(packed, tmp_path, pretrained, strategy, "--patch-dropout", 0.75, "--precision", "bfloat16")
    steps = history_of(tmp_path)[-1]["step"]
    blocks, class_token = 2, 1
    half = -(-steps // 2)
    expected = [4 + class_token] * half + [16 + class_token] * (steps - half)
    assert [tokens for tokens, _ in calls[True]] == np.repeat(expected, blocks).tolist()
    assert {tokens for tokens, _ in calls[False]} == {16 + class_token}
    assert {in_bfloat16 for _, in_bfloat16 in calls[True]} == {True}
    assert calls[False][0][1] and not calls[False][-1][1]
    kept = strategies.patches_to_keep(mae.Classifier(patch_size=16), 200, 0.75, 0.0, CPU)
    assert all(len(set(row)) == 4 for row in kept.tolist())
    assert set(kept.flatten().tolist()) == set(range(16))


# What is left


def test_the_weights_with_the_best_validation_are_kept(runs, folder):
    dataset = datasets.load(folder, runs / "cache")
    rows = datasets.split(dataset)["validation"]
    for strategy in ("head", "layernorm", "full"):  # residual keeps the last ones
        lines = (runs / strategy / "metrics.jsonl").read_text().splitlines()
        best = max(map(json.loads, reversed(lines)), key=lambda line: line["validation_macro_auc"])
        model, content = weights.load_classifier(runs / strategy / CLASSIFIER)
        assert content["run"]["best"] == best
        model.temperature.fill_(1.0)  # fitted afterwards; it reorders images a little
        probabilities = class_evaluation.predict_probabilities(model, dataset.images, rows, CPU)
        auc = np.mean(metrics.auc_by_class(probabilities, dataset.labels[rows]))
        assert auc == pytest.approx(best["validation_macro_auc"], abs=0.02)


def test_the_temperature_is_fitted_on_images_disturbed_as_in_validation(packed, pretrained, tmp_path):
    finetune_on(packed, tmp_path, pretrained, "full", "--augment", "halfturn,noise", "--epochs", 8)
    model, _ = weights.load_classifier(tmp_path / CLASSIFIER)
    dataset = datasets.load(packed)
    rows = datasets.split(dataset)["validation"]
    fitted = {}
    for kinds in (("noise",), ()):
        with loader.fixed_random_numbers(int(rows[0])), torch.no_grad():
            images = augment(images_of(dataset, rows), kinds)
            logits = model.eval().fc(model.features(images)).numpy()
        fitted[kinds] = metrics.fit_temperature(logits, dataset.labels[rows])
    assert model.temperature.item() == pytest.approx(fitted["noise",], rel=1e-4)
    assert model.temperature.item() != pytest.approx(fitted[()], rel=1e-3)


# Recipes


def recipe_of(strategy, images, source, *more):
    """The recipe of a training on so many images that starts from opened `Weights` or None."""
    start = "w.pth" if source else "none"
    args = finetune.parse_args(["--data", "d", "--out", "o", "--pretrained", start, "--strategy", strategy, *more])
    return finetune.STRATEGIES[strategy].recipe(args, source, images)


def test_few_images_have_another_recipe_and_what_is_given_stands(runs):
    """72,000 images with large batches got the recipe for few images."""
    mae, classifier = (weights.read(runs / p) for p in (f"pretrain/{PRETRAINED}", f"full/{CLASSIFIER}"))
    usual = finetune.STRATEGIES["full"].defaults
    few, names = usual.few, ("augment", "patch_dropout", "layer_decay")
    default = {name: getattr(usual, name) for name in names}
    given = ("--augment", "none", "--patch-dropout", "0.25", "--layer-decay", "0.5")
    assert few.keys() == set(names) and few != default
    for name in finetune.STRATEGIES:
        assert recipe_of(name, 10**6, classifier).lr < recipe_of(name, 10**6, mae).lr
    assert (recipe_of("full", 10**6, mae).keep, recipe_of("residual", 10**6, mae).keep) == ("best", "last")
    for images, start, more, expected in (
        (10**6, mae, (), default),
        (72_000, mae, ("--batch-size", "512"), default),
        (216, mae, (), {**few, "epochs": 1000}),
        (216, mae, ("--epochs", "1"), {**few, "epochs": 1}),
        (216, mae, given, {"augment": (), "patch_dropout": 0.25, "layer_decay": 0.5}),
        (216, None, (), {"augment": few["augment"], "patch_dropout": usual.patch_dropout}),
        (216, classifier, (), {"augment": (), "layer_decay": usual.layer_decay}),
        (10**6, None, ("--lr", "0.5"), {**default, "layer_decay": 1, "lr": 0.5, "epochs": usual.epochs,
                                        "batch_size": usual.batch_size}),
    ):  # fmt: skip
        recipe = recipe_of("full", images, start, *more)._asdict()
        assert {name: recipe[name] for name in expected} == expected, (images, more)


def test_a_run_prints_and_stores_its_recipe(packed, tmp_path):
    process = finetune_on(packed, tmp_path, "none", "full", "--epochs", 1, *TINY_NETWORK)
    assert "training images (few): epochs 1, batch size 16" in process.stdout
    assert "augment flips" in process.stdout
    assert "a familiarity needs 100 validation images" in process.stdout
    assert "familiarity" not in weights.read(tmp_path / CLASSIFIER).content
    stored = json.loads((tmp_path / "config.json").read_text())["recipe"]
    assert (stored["augment"], stored["epochs"]) == (["flips"], 1)


# Starts, and options that would do nothing


@pytest.mark.parametrize("strategy", ["head", "residual"])
def test_a_classifier_that_continues_keeps_its_weights_if_none_are_better(strategy, runs, packed, tmp_path, capsys):
    start, worse = runs / strategy / CLASSIFIER, iter((0.9, 0.8))

    def measures(logits, target):
        return {"loss": 1.0, "accuracy": 0.5, "macro_auc": next(worse)}

    with mock.patch("lib.tasks.classification_measures", measures):
        finetune.main(finetuning(packed, tmp_path / "run", start, strategy, "--epochs", "1"))
    kept, before = (torch.load(path, weights_only=True)["model"] for path in (tmp_path / "run" / CLASSIFIER, start))
    moved = ("running_mean", "running_var", "num_batches_tracked", "temperature")
    assert_same_tensors(*({k: v for k, v in state.items() if not k.endswith(moved)} for state in (kept, before)))
    first, *_ = history_of(tmp_path / "run")
    assert first["step"] == 0 and "train_loss" not in first
    assert "those that it started from are kept" in capsys.readouterr().out


def test_fine_tuning_continues_a_classifier_as_it_is(runs, packed, tmp_path):
    """Its head, its pooling, and the images that it has seen; the classes of its weights stay."""
    for name, strategy, layers in (("scratch", "layernorm", ("fc.0.weight", "fc.4.bias", "blocks.0.norm1.weight")),
                                   ("residual", "residual", ("network.fc.4.bias",))):  # fmt: skip
        content = torch.load(runs / name / CLASSIFIER, weights_only=True)
        elsewhere = 7
        content["seen"] = torch.cat([content["seen"], torch.tensor([elsewhere])])
        start, out = tmp_path / f"{name}.pth", tmp_path / name
        torch.save(content, start)
        finetune_on(packed, out, start, strategy, "--epochs", 1, "--lr", 1e-9)
        after, its = tensors_in(out / CLASSIFIER), weights.read(out / CLASSIFIER).content
        for layer in layers:
            assert torch.allclose(content["model"][layer], after[layer], atol=1e-6), layer
        assert its["config"].get("pool") == content["config"].get("pool")
        assert elsewhere in its["seen"]
    assert weights.read(tmp_path / "scratch" / CLASSIFIER).content["config"]["pool"] == "mean"


def test_weights_that_are_not_there_are_named_before_the_data_are_packed(tmp_path):
    data, missing = write_classes(tmp_path / "d", {"a": 20, "b": 20}), tmp_path / "missing.pth"
    for script, weights_of in (("finetune", ("--strategy", "full", "--pretrained")), ("evaluate", ("--weights",)),
                               ("reconstruct", ("--weights",))):  # fmt: skip
        assert_refused(f"{script}.py", ("--data", data, "--out", tmp_path / "o", *weights_of, missing), "missing.pth")
    assert not list(data.glob(".*")) and not (tmp_path / "o").exists()


REFUSED = [  # start, strategy, options, what the error names
    ("pretrain", "head", ("--augment", "noise"), "--augment"),
    ("pretrain", "head", ("--layer-decay", 0.5), "--layer-decay"),
    ("pretrain", "layernorm", ("--layer-decay", 0.5), "--layer-decay"),
    ("pretrain", "residual", ("--augment", "noise"), "--augment"),
    ("pretrain", "residual", ("--pool", "cls"), "--pool"),
    ("pretrain", "residual", ("--patch-dropout", 0.5), "--patch-dropout"),
    ("none", "residual", (), "--pretrained none"),
    ("none", "head", (), "--pretrained none"),
    ("head", "residual", (), "head, layernorm or full"),
    ("residual", "full", (), "--strategy residual"),
    ("head", "full", ("--pool", "cls"), "--pool"),
    ("pretrain", "full", ("--with-image",), "--with-image: only a classifier on residual maps"),
    ("residual", "residual", ("--with-image",), "sees no image beside its map"),
    ("pretrain", "full", ("--map-pool", 2), "--map-pool: only a classifier on residual maps"),
    ("pretrain", "residual", ("--map-pool", 0), "--map-pool must be at least 1"),
    ("pretrain", "residual", ("--map-pool", 20), "give a smaller one"),
    ("residual", "residual", ("--map-pool", 2), "has --map-pool 1; start from an MAE"),
    *(("pretrain", "full", option, f"{option[0]} {option[1]}: the network of")
      for option in (("--patch-size", 8), ("--embed-dim", 64), ("--depth", 9), ("--num-heads", 1),
                     ("--transform", "asinh"))),
]  # fmt: skip


@pytest.mark.parametrize(("start", "strategy", "more", "named"), REFUSED)
def test_what_makes_no_sense_for_a_strategy_or_its_start_is_refused(
    start, strategy, more, named, packed, runs, tmp_path
):
    if start != "none":
        start = runs / start / (PRETRAINED if start == "pretrain" else CLASSIFIER)
    assert_refused("finetune.py", finetuning(packed, tmp_path / "run", start, strategy, *more), named)


def test_images_in_another_unit_than_the_weights_are_refused(packed, runs, tmp_path):
    dataset = datasets.load(packed)
    counts = write_packed(tmp_path / "counts", 1000 * dataset.images, dataset.labels, dataset.class_names)
    mae, classifier = runs / "pretrain" / PRETRAINED, runs / "full" / CLASSIFIER
    common = ("--data", counts, "--out", tmp_path / "out", "--weights")
    for script, command in (("finetune.py", finetuning(counts, tmp_path / "run", mae, "full")),
                            ("evaluate.py", (*common, classifier)), ("reconstruct.py", (*common, mae))):  # fmt: skip
        assert_refused(script, command, "another unit")


# The whole of it


def test_the_unit_of_the_data_changes_nothing(tmp_path, monkeypatch, no_pictures):
    rows = np.random.default_rng(0).permutation(120)
    parts = {"train": rows[:96], "validation": rows[96:108], "test": rows[108:]}
    monkeypatch.setattr(datasets, "split", lambda dataset: parts)  # other content is split otherwise
    results = []
    for unit in (1e-3, 255.0):
        out = tmp_path / f"unit-{unit}"
        images = [
            (name, np.float32(unit) * batch, mass)
            for name, batch, mass in lenses.simulate("Model_II", 40, seed=4, progress=False)
        ]
        simulate.write_packed(out, images, 40, "Model_II", "scaled")
        pretrain.main(pretraining(out, out / "mae"))
        finetune.main(finetuning(out, out / "full", out / "mae" / PRETRAINED, "full"))
        model, _ = weights.load_classifier(out / "full" / CLASSIFIER)
        dataset = datasets.load(out)
        results.append(class_evaluation.predict_probabilities(model, dataset.images, parts["test"], CPU))
    assert np.abs(results[0] - results[1]).max() < 2e-3


# Residual maps


def maps_in(out):
    (path,) = out.glob("maps-*.npy")
    return path


def assert_maps_of(rows, stored, packed, classifier):
    """The first of the `stored` maps are those of the images `rows`."""
    model, _ = weights.load_classifier(classifier)
    with torch.no_grad():
        maps = model.maps(images_of(datasets.load(packed), rows))
    assert np.allclose(stored[: len(rows)], maps[:, 0].numpy(), rtol=1e-3, atol=1e-4)  # float16


def test_residual_maps_are_computed_once_and_are_gone_when_the_run_is_finished(
    packed, pretrained, tmp_path, monkeypatch, no_pictures
):
    computed, whole, out = [], mae.MAE.residual, tmp_path / "run"

    def spying(network, images, masks):
        computed.append(len(images))
        return whole(network, images, masks)

    monkeypatch.setattr(mae.MAE, "residual", spying)

    def stopped_at(step):
        with sigterm_at(step):
            process = finetune_on(packed, out, pretrained, "residual", "--resume", check=False)
        assert process.returncode == 143
        return maps_in(out)

    parts = datasets.split(datasets.load(packed))
    rows = len(parts["train"]) + len(parts["validation"])
    maps = stopped_at(3)
    assert sum(computed) == rows
    stored, content = np.load(maps), maps.read_bytes()
    assert stored.shape == (rows, 64, 64)
    assert stopped_at(5) == maps
    assert sum(computed) == rows

    # A broken file is made again, what a killed run left is removed, and a user's file stays.
    maps.write_bytes(content[:1000])
    left, own = out / f".{maps.stem}-x.host-1.tmp.npy", out / "maps-mine.npy"
    left.touch()
    own.touch()
    with sigterm_at(7):
        finetune_on(packed, out, pretrained, "residual", "--resume", check=False)
    assert maps.read_bytes() == content
    assert not left.exists()
    finetune_on(packed, out, pretrained, "residual", "--resume")
    assert not maps.exists()
    assert own.exists()
    assert_maps_of(parts["train"][:9], stored, packed, out / CLASSIFIER)


def test_residual_maps_of_other_settings_are_not_taken(packed, runs, tmp_path, no_pictures):
    def train(seed):
        return finetune_on(packed, tmp_path, runs / "pretrain" / PRETRAINED, "residual", "--labels", 0.3,
                           "--seed", seed, check=False)  # fmt: skip

    # Stopped while the maps were computed, so that there is no checkpoint yet.
    with mock.patch("finetune.fit", side_effect=KeyboardInterrupt):
        train(1)
    left = maps_in(tmp_path)
    with sigterm_at(1):
        train(2)
    other = maps_in(tmp_path)
    assert other != left
    dataset = datasets.load(packed)
    rows = datasets.fraction_of_each_class(dataset.labels, datasets.split(dataset)["train"], 0.3, seed=2)
    assert_maps_of(rows, np.load(other), packed, runs / "residual" / CLASSIFIER)  # of the same MAE


def test_residual_can_see_images_beside_its_maps(packed, pretrained, tmp_path, no_pictures):
    given = (packed, tmp_path, pretrained, "residual", "--with-image", "--augment", "flips", "--resume")
    with sigterm_at(2):
        finetune_on(*given, check=False)
    parts, stored = datasets.split(datasets.load(packed)), np.load(maps_in(tmp_path))
    finetune_on(*given)
    model, _ = weights.load_classifier(tmp_path / CLASSIFIER)
    assert (model.with_image, model.orientations) == (True, 8)
    with torch.no_grad():
        seen = model.maps(images_of(datasets.load(packed), parts["train"][:5]))
    assert np.allclose(stored[:5].reshape(seen.shape), seen.numpy(), rtol=1e-3, atol=1e-4)  # float16


def test_residual_maps_can_be_averaged_over_squares(packed, pretrained, tmp_path, no_pictures):
    finetune_on(packed, tmp_path, pretrained, "residual", "--map-pool", 2, "--epochs", 1)
    model, _ = weights.load_classifier(tmp_path / CLASSIFIER)
    assert model.map_pool == 2 and model.map_shape[1] == model.img_size // 2
    finetune_on(packed, tmp_path / "continued", tmp_path / CLASSIFIER, "residual", "--epochs", 1)
    assert weights.load_classifier(tmp_path / "continued" / CLASSIFIER)[0].map_pool == 2


def test_the_strategy_of_the_documentation_trains_what_it_says(pretrained, folder, runs, tmp_path):
    text = (ROOT / "docs" / "training.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Biases" in block]
    exec(block, {})  # noqa: S102
    try:
        finetune.main(finetuning(folder, tmp_path / "run", pretrained, "biases", "--cache-dir", runs / "cache",
                                 "--epochs", 1))  # fmt: skip
    finally:
        del strategies.STRATEGIES["biases"]
    before = weights.load_mae(pretrained)[0].state_dict()
    after = weights.load_classifier(tmp_path / "run" / CLASSIFIER)[0].state_dict()
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".bias") for name in changed)
