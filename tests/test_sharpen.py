"""Sharp images from coarse ones: pairs, the noise that a coarse image shows, and files from training to prediction."""

import os
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (
    PRETRAINED, SHARPENER, assert_refused, assert_same_tensors, images_of, read_csv, run_script, sharpen_on, sigterm_at,
    tensors_in,
)  # fmt: skip

import finetune
from experiments import real_pairs
from lib import datasets, loop, pairs, plots, simulated, tasks, weights
from lib.many_lenses import simulate_pairs
from lib.onnxfile import number_in, open_sharpener
from lib.sharp_evaluation import ceiling, ssim
from mae import Sharpener, noise_from, reduction_matrices

REAL = os.environ.get("REAL_IMAGES")
TRANSFORM = {"kind": "sqrt", "offset": 0.0, "softening": 0.05, "mean": 0.6, "std": 0.9}
TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16,
        "decoder_num_heads": 2}  # fmt: skip


def psnr(images, others):
    return -10 * np.log10(np.square(np.asarray(images) - np.asarray(others)).mean(axis=(-2, -1))).mean()


@pytest.mark.parametrize("factor", pairs.FACTORS)
def test_two_matrices_are_the_reduction_and_what_undoes_it(factor):
    b, g = reduction_matrices(10, factor)
    images = torch.rand(3, 10 * factor, 10 * factor)
    assert torch.allclose(b @ images @ b.T, pairs.reduced(images, factor), atol=1e-6)
    assert torch.allclose(b @ g, torch.eye(10), atol=1e-5)


def test_the_noise_of_unequal_pixels_is_nearly_that_of_the_exact_formula():
    generator = torch.Generator().manual_seed(0)
    b, g = reduction_matrices(8, 2)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    variance = 1 + 50 * torch.exp(-((x - 7) ** 2 + (y - 9) ** 2) / 20)
    noise = variance.sqrt() * torch.randn(400, 16, 16, generator=generator)
    shown = b @ noise @ b.T
    found = noise_from(shown, variance.expand(400, -1, -1), b, g)
    assert torch.allclose(b @ found @ b.T, shown, atol=1e-4)

    whole, sigma = torch.kron(b, b), torch.diag(variance.flatten())
    exact = shown.flatten(1) @ torch.linalg.solve(whole @ sigma @ whole.T, whole @ sigma)
    white = (g @ shown @ g.T).flatten(1)
    errors = [(noise.flatten(1) - each).square().mean() for each in (exact, found.flatten(1), white)]
    assert errors[1] < 1.002 * errors[0]
    assert errors[1] - errors[0] < 0.2 * (errors[2] - errors[0])


def test_the_ceiling_is_a_quarter_of_the_noise_below_the_truth():
    sharp, coarse, truth = next(simulate_pairs(60, seed=1))
    best = ceiling(torch.from_numpy(truth), torch.from_numpy(coarse), 2).numpy()
    assert abs(psnr(best, sharp) - psnr(truth, sharp) - 10 * np.log10(4 / 3)) < 0.04
    bilinear = pairs.interpolated(torch.from_numpy(coarse)[:, None], 2, "bilinear")[:, 0]
    assert psnr(truth, sharp) < psnr(bilinear, sharp) < psnr(best, sharp) - 0.6


def test_ssim_is_that_of_scikit_image():
    # skimage.metrics.structural_similarity(a, b, data_range=1) of scikit-image 0.26.0.
    rng = np.random.default_rng(0)
    a = rng.random((40, 40))
    b = np.clip(a + 0.1 * rng.standard_normal((40, 40)), 0, 1)
    assert ssim(a, b) == pytest.approx(0.9470156867990858, abs=1e-12)


def test_public_pairs_are_sharp_images_with_coarse_ones(public, tmp_path):
    dataset = datasets.load(public, tmp_path / "cache")
    assert dataset.class_names == ("HR",) and dataset.images.shape == (60, 150, 150)
    coarse = pairs.coarse_of(dataset)
    assert np.allclose(coarse.images, pairs.reduced(torch.from_numpy(np.array(dataset.images))), atol=1e-6)
    assert (coarse.fingerprint, coarse.img_size) == (dataset.fingerprint, 75)
    names = [path.name for path in datasets.files_of(public, dataset)]
    assert np.array_equal(coarse.images[7], np.load(public / "LR" / names[7])[0])


def test_coarse_images_of_pairs_that_were_changed_are_noticed(public, tmp_path):
    datasets.load(public, tmp_path / "cache")
    (packed,) = (tmp_path / "cache").iterdir()
    np.save(packed / "coarse.npy", np.load(packed / "coarse.npy") * 2)
    assert_refused("data.py", ["--data", packed], "coarse.npy", "changed after packing")


def write_pairs(root, sides, others=None, reduction=lambda images: images):
    """Twelve pairs of two widths, in folders a and b; `others` are the names in b."""
    rng = np.random.default_rng(0)
    for folder in "ab":
        (root / folder).mkdir(parents=True)
    for i in range(12):
        image = rng.random((max(sides), max(sides)), dtype=np.float32)
        small = pairs.reduced(torch.from_numpy(image), max(sides) // min(sides)).numpy()
        by_side = {max(sides): image, min(sides): reduction(small)}
        np.save(root / "a" / f"{i:02d}.npy", by_side[sides[0]])
        np.save(root / "b" / (others or "{:02d}.npy").format(i), by_side[sides[1]])
    return root


@pytest.mark.parametrize("sides", [(24, 12), (12, 36), (48, 12)])
def test_any_two_folders_whose_sides_have_a_small_ratio_are_pairs(sides, tmp_path, no_pictures):
    data = write_pairs(tmp_path / "data", sides)
    sharpen_on(data, tmp_path / "out", "none", "--patch-size", 4, "--embed-dim", 16, "--num-heads", 2, "--depth", 1)
    model = weights.network_of(weights.read(tmp_path / "out" / SHARPENER), "sharpen")
    assert (model.img_size, model.factor, model.adds_noise) == (12, max(sides) // 12, True)


def test_folders_of_other_names_or_widths_are_classes(tmp_path):
    for name, sides, others in (("names", (24, 12), "x{}.npy"), ("widths", (24, 18), None)):
        data = write_pairs(tmp_path / name, (24, 12), others)
        if name == "widths":
            for path in (data / "b").iterdir():
                np.save(path, np.zeros((sides[1],) * 2))
        assert_refused("data.py", ["--data", data], "all images must have one size")


def test_noise_is_not_put_back_where_coarse_images_are_no_reductions(tmp_path, no_pictures):
    data = write_pairs(tmp_path / "data", (24, 12), reduction=lambda image: image**2)
    process = sharpen_on(data, tmp_path / "out", "none", "--patch-size", 4, "--embed-dim", 16, "--num-heads", 2)
    assert "not put back" in process.stderr
    model = weights.network_of(weights.read(tmp_path / "out" / SHARPENER), "sharpen")
    coarse = torch.rand(2, 1, 12, 12)
    assert not model.adds_noise and torch.equal(model(coarse)[0], model.clean(coarse))


def test_a_turned_image_is_sharpened_to_the_turned_sharp_image():
    torch.manual_seed(0)
    model = Sharpener(TINY, TRANSFORM).eval()
    torch.nn.init.normal_(model.refinement[-2].weight, std=0.1)
    images = torch.rand(3, 1, 12, 12)
    for one, other in zip(model(images), model(images.flip(2, 3)), strict=True):
        assert torch.allclose(one, other.flip(2, 3) if other.ndim == 4 else other, atol=1e-5)


def test_sharp_images_reduce_to_the_coarse_ones_and_are_better_than_interpolated_ones(sharp_runs):
    model = weights.network_of(weights.read(sharp_runs / "sharpen" / SHARPENER), "sharpen")
    dataset = datasets.load(sharp_runs / "pairs")
    coarse, rows = pairs.coarse_of(dataset), datasets.split(dataset)["validation"]
    seen, sharp = images_of(coarse, rows), images_of(dataset, rows)
    with torch.no_grad():
        found, errors = model(seen)
    assert torch.allclose(pairs.reduced(found), seen, atol=1e-4)
    assert psnr(found, sharp) > psnr(pairs.interpolated(seen, 2, "bilinear"), sharp) + 0.2
    true = (found - sharp).square().mean(dim=(1, 2, 3))
    assert errors.square().mean().item() == pytest.approx(true.mean().item(), rel=1e-3)
    every = np.arange(len(dataset.labels))
    with torch.no_grad():
        found, errors = model(images_of(coarse, every))
    true = (found - images_of(dataset, every)).square().mean(dim=(1, 2, 3)).sqrt()
    assert np.corrcoef(errors, true)[0, 1] > 0.8


def test_evaluation_has_references_and_the_ceiling_beside_each_run(sharp_runs, tmp_path):
    command = ("evaluate.py", "--data", sharp_runs / "pairs", "--weights", sharp_runs / "sharpen" / SHARPENER, "--out",
               tmp_path / "out", "--resamples", 10)  # fmt: skip
    process = run_script(*command)
    for name in ("sharpen", "bilinear", "bicubic", "noise-free truth", "ceiling"):
        assert f"| {name} |" in process.stdout
    assert (tmp_path / "out" / "sharpened.png").exists()
    assert "up to date" in run_script(*command, "--update").stdout
    run_script(*command, "--seed", 1)  # replaces what it has made
    assert_refused("evaluate.py", ["--data", sharp_runs / "pairs", "--weights", sharp_runs / "sharpen" / SHARPENER,
                                   "--out", tmp_path / "more", "--save-predictions"], "sharpen images")  # fmt: skip


def test_the_weights_of_the_best_validation_are_kept(sharp_runs, tmp_path, monkeypatch):
    """Few pairs are soon learned by heart: the last weights were worse than interpolation."""
    psnrs = iter((30.0, 32.0, 31.0))
    monkeypatch.setattr(tasks, "sharpening_measures", lambda *_: {"loss": 1.0, "psnr": next(psnrs)})
    run_script("finetune.py", "--data", sharp_runs / "pairs", "--task", "sharpen", "--strategy", "full", "--out", tmp_path,
               "--pretrained", sharp_runs / "sharpen-pretrain" / PRETRAINED, "--epochs", 3)  # fmt: skip
    assert weights.read(tmp_path / SHARPENER).content["run"]["best"]["epoch"] == 2


def test_sharp_images_that_do_not_fit_into_memory_are_read_in_blocks(sharp_runs, tmp_path, monkeypatch):
    """Also where the coarse ones, which are fewer bytes, do fit."""
    monkeypatch.setattr(finetune, "larger_than_memory", lambda images: images.shape[1] == 150)
    in_blocks, shuffled = set(), loop.shuffled
    monkeypatch.setattr(loop, "shuffled", lambda *given: in_blocks.add(given[2]) or shuffled(*given))
    sharpen_on(sharp_runs / "pairs", tmp_path / "out", sharp_runs / "sharpen-pretrain" / PRETRAINED)
    assert in_blocks == {True}


def test_an_evaluation_leaves_nothing_of_another_task(sharp_runs, tmp_path):
    plots.save(plt.figure(), tmp_path / "masses.png")
    run_script("evaluate.py", "--data", sharp_runs / "pairs", "--weights", sharp_runs / "sharpen" / SHARPENER, "--out",
               tmp_path)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.md", "metrics.json", "sharpened.png"]


def test_predicted_sharp_images_have_names_of_their_own(sharp_runs, public, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(public / "LR" / "sample1.npy", tmp_path / folder / "a b.npy")
    np.save(tmp_path / "two" / "bad.npy", np.full((75, 75), 1e30))
    command = ("predict.py", "--model", sharp_runs / "sharpen.onnx", "--sharpened", tmp_path / "sharp", "--out",
               tmp_path / "table.csv")  # fmt: skip
    process = run_script(*command, tmp_path / "one", tmp_path / "two", check=False)
    assert process.returncode == 1 and "bad.npy" in (tmp_path / "table.csv.errors.csv").read_text()
    rows = read_csv(tmp_path / "table.csv")
    assert len(rows) == len({row["sharpened"] for row in rows}) == 2
    found = [np.load(tmp_path / "sharp" / row["sharpened"]) for row in rows]
    assert found[0].shape == (150, 150) and np.array_equal(*found)
    model = weights.network_of(weights.read(sharp_runs / "sharpen" / SHARPENER), "sharpen")
    with torch.no_grad():
        right, error = model(torch.from_numpy(np.load(public / "LR" / "sample1.npy"))[None])
    assert np.abs(found[0] - right[0, 0].numpy()).max() < 1e-4
    assert float(rows[0]["rms_error"]) == pytest.approx(error.item(), rel=1e-3)

    run_script(*command, tmp_path / "one")  # replaces its own folder, and no other one
    (tmp_path / "sharp" / "mine.txt").touch()
    assert_refused("predict.py", [*command[1:], tmp_path / "one"], "mine.txt")
    assert_refused("predict.py", [*command[1:-2], "--out", tmp_path / "t.csv", "--maps", "m.onnx", tmp_path / "one"],
                   "--maps", "classifies no images")  # fmt: skip


def test_the_files_say_the_pixel_scale_of_the_coarse_images(sharp_runs):
    session, _ = open_sharpener(sharp_runs / "sharpen.onnx")
    sharp = simulated.pixels_of(datasets.load(sharp_runs / "pairs").origin)
    assert number_in(session, "pixel_scale") == 2 * sharp["pixel_scale"] == 0.1
    assert weights.read(sharp_runs / "sharpen" / SHARPENER).content["run"]["pixel_scale"] == 0.1


def test_files_of_another_task_are_refused(sharp_runs, runs, tmp_path):
    assert_refused("predict.py", ["--model", runs / "classifier.onnx", "--sharpened", tmp_path / "sharp", "--out",
                                  tmp_path / "t.csv", tmp_path], "--what sharpen")  # fmt: skip
    start = ["--data", sharp_runs / "pairs", "--task", "sharpen", "--out", tmp_path / "out"]
    for option in (("--augment", "flips"), ("--layer-decay", 0.5), ("--patch-dropout", 0.5), ("--pool", "cls"),
                   ("--map-pool", 2)):  # fmt: skip
        arguments = [*start, "--pretrained", "none", "--strategy", "full", *option]
        assert_refused("finetune.py", arguments, option[0], "leave it out")
    assert_refused("finetune.py", [*start, "--strategy", "head", "--pretrained", "none"], "--strategy full")
    assert_refused("finetune.py", [*start, "--strategy", "full", "--pretrained", sharp_runs / "sharpen" / SHARPENER],
                   "starts from an MAE")  # fmt: skip
    assert_refused("export.py", ["--weights", sharp_runs / "sharpen-pretrain" / PRETRAINED, "--what", "sharpen",
                                 "--out", tmp_path / "x.onnx"], "these weights reconstruct images")  # fmt: skip


def test_an_interrupted_training_is_resumed_to_the_same_weights(sharp_runs, tmp_path):
    arguments = (sharp_runs / "pairs", tmp_path / "out", sharp_runs / "sharpen-pretrain" / PRETRAINED)
    with sigterm_at(2):
        assert sharpen_on(*arguments, check=False).returncode == 143
    sharpen_on(*arguments, "--resume")
    assert_same_tensors(*(tensors_in(out / SHARPENER) for out in (tmp_path / "out", sharp_runs / "sharpen")))


@pytest.mark.skipif(not REAL, reason="REAL_IMAGES names no folder")
def test_real_pairs_are_reductions_and_are_sharpened(sharp_runs):
    path = Path(REAL, "testVIB_pairs.npz")
    sharp, coarse, _ = real_pairs.load_pairs(path)
    difference = pairs.reduced(torch.from_numpy(sharp)).numpy() - coarse
    assert np.abs(difference).max() < 1e-4
    figures, ratio = real_pairs.compare(sharp_runs / "sharpen.onnx", path)
    assert figures["bilinear, 24 without an unknown border"][2] == pytest.approx(41.69, abs=0.02)
    assert figures["ours"][1] > figures["bilinear"][1] + 0.3
    assert abs(ratio - 1) < 0.05
