"""The scripts as users run them: what they leave, and what they say of mistakes."""

import csv
import html
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import (
    HUNG,
    ROOT,
    TINY_NETWORK,
    assert_user_error,
    bound_by_permissions,
    run_code,
    run_script,
)

import data
import evaluate
import export
import finetune
import mae
import plots
import predict
import reconstruct
import report
import weights

SCRIPTS = ("simulate", "data", "pretrain", "finetune", "evaluate", "reconstruct", "export",
           "predict", "study", "results")  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(runs, folder):
    out = runs / "evaluation"
    files = [runs / n / "vit-mae-classifier-wt.pth" for n in ("head", "full", "scratch")]
    process = run_script(
        "evaluate.py", "--data", folder, "--cache-dir", runs / "cache", "--weights", *files,
        "--out", out, "--resamples", 50,
    )  # fmt: skip
    return out, process.stdout


def test_pretraining_leaves_what_it_promises(runs):
    out = runs / "pretrain"
    assert sorted(os.listdir(out)) == [
        ".lock", "config.json", "loss.png", "metrics.jsonl", "reconstructions.png",
        "vit-mae-wt.pth",
    ]  # fmt: skip
    content = torch.load(out / "vit-mae-wt.pth", weights_only=True)
    arguments = {k: v for k, v in content["config"].items() if k != "transform"}
    mae.MAE(**arguments).load_state_dict(content["model"])
    mae.IntensityTransform(**content["config"]["transform"])
    assert content["config"]["embed_dim"] == 32
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert json.loads((out / "config.json").read_text())["options"]["mask_ratio"] == 0.75


@pytest.mark.parametrize("strategy", ["head", "layernorm", "full", "scratch"])
def test_fine_tuning_leaves_what_it_promises(strategy, runs):
    out = runs / strategy
    assert sorted(os.listdir(out)) == [
        ".lock", "config.json", "curves.png", "metrics.jsonl", "vit-mae-classifier-wt.pth",
    ]  # fmt: skip
    model, content = weights.load_classifier(out / "vit-mae-classifier-wt.pth")
    assert content["class_names"] == ["axion", "cdm", "no_sub"]
    pretrained = weights.load_mae(runs / "pretrain" / "vit-mae-wt.pth")[0]
    taken = torch.equal(model.blocks[0].attn.qkv.weight, pretrained.blocks[0].attn.qkv.weight)
    assert taken == (strategy in ("head", "layernorm"))


def test_evaluation_is_of_the_test_part_alone(evaluation, runs, folder):
    out, printed = evaluation
    metrics = json.loads((out / "metrics.json").read_text())
    dataset = data.load(folder, runs / "cache")
    rows = data.split(dataset)["test"]
    model, _ = weights.load_classifier(runs / "full" / "vit-mae-classifier-wt.pth")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(dataset.images[rows])[:, None])
    probabilities, labels = logits.softmax(1).numpy(), dataset.labels[rows]
    result = metrics["results"]["full"]
    assert result["images"] == len(rows)
    expected = evaluate.auc_by_class(probabilities, labels)
    for name, auc in zip(dataset.class_names, expected, strict=True):
        assert result[name]["value"] == pytest.approx(auc, abs=0.02)
        assert result[name]["low"] <= result[name]["value"] <= result[name]["high"]
    assert result["accuracy"]["value"] == pytest.approx(
        (probabilities.argmax(1) == labels).mean(), abs=0.04
    )
    assert np.sum(metrics["confusion"]["full"]) == len(rows)
    for name in ("roc.png", "confusion_matrix.png", "reliability.png", "mistakes.png"):
        assert (out / name).stat().st_size > 5000
    assert (out / "comparison.md").read_text().strip() in printed
    assert "iampratyusht/Deeplense-task, head | 0.92 | 0.92 | 0.99" in printed


def test_the_report_is_one_file_that_loads_nothing(evaluation, runs):
    out, _ = evaluation
    page = (out / "report.html").read_text()
    figures = json.loads((out / "metrics.json").read_text())["results"]
    for name, result in figures.items():
        assert f"<td>{name}</td>" in page
        assert f"{result['macro']['value']:.4f}" in page
    # ROC, confusion, reliability, mistakes; loss and reconstructions; curves of each run.
    assert page.count("data:image/png;base64,") == 4 + 2 + len(figures)
    config = json.loads((runs / "full" / "config.json").read_text())
    assert html.escape(config["command"]) in page
    for outside in ("http:", "https:", 'src="/', "<script", "<link"):
        assert outside not in page
    assert 'name="viewport"' in page


def test_the_report_follows_a_classifier_that_went_on_to_its_pretraining(tmp_path):
    for name, start in (("pretrain", None), ("head", "pretrain"), ("norms", "head")):
        (tmp_path / name).mkdir()
        options = {"pretrained": str(tmp_path / start / "w.pth")} if start else {"mask_ratio": 0.75}
        (tmp_path / name / "config.json").write_text(json.dumps({"options": options}))
    configs = [report.config_beside(tmp_path / name / "w.pth") for name in ("head", "norms")]
    assert report.pretrainings(configs) == {tmp_path / "pretrain"}
    (tmp_path / "pretrain" / "config.json").write_text(json.dumps(configs[1]))  # in a circle
    assert report.pretrainings(configs) == set()


def test_calibration_error_is_that_of_a_known_case():
    confident = np.array([[0.9, 0.1]] * 10)
    labels = np.array([0] * 6 + [1] * 4)
    error, table = evaluate.calibration(confident, labels)
    assert error == pytest.approx(0.3)
    assert [(round(c, 6), a, n) for c, a, n in table] == [(0.9, 0.6, 10)]


def test_the_fitted_temperature_makes_probabilities_calibrated():
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=rng)
    target = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    assert finetune.fit_temperature(logits, target) == pytest.approx(1.0, abs=0.05)
    assert finetune.fit_temperature(4 * logits, target) == pytest.approx(4.0, abs=0.2)
    assert finetune.fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(0.1, abs=0.01)


def test_the_temperature_is_fitted_on_validation_and_part_of_the_weights(runs, folder):
    model, _ = weights.load_classifier(runs / "full" / "vit-mae-classifier-wt.pth")
    dataset = data.load(folder, runs / "cache")
    rows = data.split(dataset)["validation"]
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(dataset.images[rows][:, None]))
    target = torch.from_numpy(dataset.labels[rows])
    assert model.temperature != 1
    assert finetune.fit_temperature(logits, target) == pytest.approx(1.0, abs=0.02)


def test_fine_tuning_may_start_from_a_classifier(runs, folder, tmp_path):
    common = ("--data", folder, "--cache-dir", runs / "cache", "--out", tmp_path / "run",
              "--pretrained", runs / "head" / "vit-mae-classifier-wt.pth")  # fmt: skip
    refused = run_script("finetune.py", *common, "--strategy", "full", "--pool", "cls", check=False)
    assert_user_error(refused, "--pool")
    run_script("finetune.py", *common, "--strategy", "layernorm", "--epochs", 1, "--lr", 1e-9)
    before, after = (
        weights.load_classifier(r / "vit-mae-classifier-wt.pth")[0].state_dict()
        for r in (runs / "head", tmp_path / "run")
    )
    for name in ("fc.0.weight", "fc.4.bias", "blocks.0.norm1.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-6), name


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_less_precision_gives_a_smaller_file_that_agrees(precision, runs, folder, tmp_path):
    out = tmp_path / "small.onnx"
    process = run_script(
        "export.py", "--weights", runs / "full" / "vit-mae-classifier-wt.pth", "--data", folder,
        "--cache-dir", runs / "cache", "--precision", precision, "--out", out,
        "--allowed-fall", 0.1,
    )  # fmt: skip
    assert "macro AUC" in process.stdout
    assert list(tmp_path.iterdir()) == [out]
    metadata = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert metadata["precision"] == precision
    assert json.loads(metadata["class_names"]) == ["axion", "cdm", "no_sub"]
    images = np.array(data.load(folder, runs / "cache").images[::10, None])
    whole, reduced = (
        export.run_session(path, images)[0] for path in (runs / "classifier.onnx", out)
    )
    assert reduced.dtype == np.float32
    assert np.allclose(reduced.sum(1), 1, atol=1e-2)
    model, _ = weights.load_classifier(runs / "full" / "vit-mae-classifier-wt.pth")
    with torch.no_grad():
        expected = export.Probabilities(model).eval()(torch.from_numpy(images)).numpy()
    assert 0 < np.abs(reduced - expected).mean() < 0.05
    assert whole.shape == reduced.shape


def test_int8_multiplies_in_eight_bits_and_hands_on_floats(runs, folder, tmp_path):
    out = tmp_path / "int8.onnx"
    shutil.copy(runs / "classifier.onnx", out)
    images = np.array(data.load(folder, runs / "cache").images[:16, None])
    export.reduce_precision(out, "int8", images, {})
    proto = onnx.load(out)
    made_by = {name: node for node in proto.graph.node for name in node.output}
    gemms = [node for node in proto.graph.node if node.op_type == "Gemm"]
    depth = json.loads((runs / "full" / "config.json").read_text())["model"]["depth"]
    assert len(gemms) == 4 * depth + 2  # of attention, MLP and head
    for node in gemms:
        assert (
            made_by[node.input[0]].op_type == made_by[node.input[1]].op_type == "DequantizeLinear"
        )
    quantised = {n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    assert not any(node.output[0] in quantised for node in gemms)


def test_an_export_that_loses_auc_is_not_left(runs, folder, tmp_path, monkeypatch):
    values = iter((0.99, 0.98))
    monkeypatch.setattr(export, "macro_auc", lambda *_: next(values))
    with pytest.raises(export.UserError, match="--allowed-fall"):
        export.main([
            "--weights", str(runs / "head" / "vit-mae-classifier-wt.pth"), "--data", str(folder),
            "--cache-dir", str(runs / "cache"), "--out", str(tmp_path / "x.onnx"),
            "--precision", "float16",
        ])  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_exported_maps_are_those_of_pytorch(runs, folder):
    dataset = data.load(folder, runs / "cache")
    images = np.array(dataset.images[:5, None])
    residual, score = export.run_session(runs / "reconstruction.onnx", images, batch=2)
    network, transform, _ = weights.load_mae(runs / "pretrain" / "vit-mae-wt.pth")
    masks = mae.complementary_masks(network.num_patches, 0.75, export.ROUNDS)
    with torch.no_grad():
        expected, squared = network.eval().residual(transform(torch.from_numpy(images)), masks)
    assert np.allclose(residual, expected.numpy(), atol=1e-4)
    assert np.allclose(score, squared.mean((1, 2, 3)).numpy(), rtol=1e-3)


def test_prediction_draws_a_sheet_with_maps(runs, folder, tmp_path):
    maps = runs / "reconstruction.onnx"
    process = run_script(
        "predict.py", "--model", runs / "classifier.onnx", "--maps", maps, "--out",
        tmp_path / "p.csv", "--sheet", tmp_path / "sheet.png", "--sheet-images", 5, folder / "cdm",
    )  # fmt: skip
    assert "the 5 most confident" in process.stdout
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    rows = read_csv(tmp_path / "p.csv")
    assert list(rows[0]) == ["file", "axion", "cdm", "no_sub", "prediction", "residual"]
    assert all(float(row["residual"]) > 0 for row in rows)
    refused = run_script(
        "predict.py", "--model", runs / "classifier.onnx", "--maps", runs / "classifier.onnx",
        "--out", tmp_path / "q.csv", folder / "cdm", check=False,
    )  # fmt: skip
    assert_user_error(refused, "--what reconstruction")


def test_prediction_reads_npz_and_crops_when_asked(runs, tmp_path, lens_image):
    np.savez_compressed(tmp_path / "two.npz", first=lens_image, second=np.stack([lens_image] * 2))
    np.save(tmp_path / "large.npy", np.pad(lens_image, ((3, 3), (5, 5))))
    command = ("predict.py", "--model", runs / "classifier.onnx", "--out", tmp_path / "p.csv")
    process = run_script(*command, tmp_path, check=False)
    assert process.returncode == 1
    assert "--crop" in process.stderr
    names = [row["file"] for row in read_csv(tmp_path / "p.csv")]
    assert names == [f"{tmp_path}/two.npz:{n}" for n in ("first", "second[0]", "second[1]")]
    run_script(*command, "--crop", tmp_path)
    rows = read_csv(tmp_path / "p.csv")
    assert len(rows) == 4
    same = [float(row["axion"]) for row in rows]  # all are the same image
    assert max(same) - min(same) < 1e-5


def test_prediction_reads_fits(runs, tmp_path, lens_image):
    fits = pytest.importorskip("astropy.io.fits")
    table = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.zeros(3))])
    units = [fits.PrimaryHDU(), table, fits.ImageHDU(lens_image.astype(">f4"))]
    for name in ("one.fits", "two.fits.gz"):
        fits.HDUList(units).writeto(tmp_path / name)
    fits.PrimaryHDU(np.zeros((2, 3, 4))).writeto(tmp_path / "cube.fits")
    (tmp_path / "text.fits").write_text("no FITS")
    np.save(tmp_path / "z.npy", lens_image)
    process = run_script("predict.py", "--model", runs / "classifier.onnx", "--out",
                         tmp_path / "p.csv", tmp_path, check=False)  # fmt: skip
    assert process.returncode == 1, process.stderr
    rows = read_csv(tmp_path / "p.csv")
    assert [row["file"] for row in rows] == [
        str(tmp_path / n) for n in ("one.fits", "two.fits.gz", "z.npy")
    ]
    assert len({row["axion"] for row in rows}) == 1
    errors = (tmp_path / "p.csv.errors.csv").read_text()
    assert "cube.fits: not a usable FITS image" in errors
    assert "text.fits: not a usable FITS image" in errors


def test_fits_without_astropy_says_what_to_install(runs, tmp_path):
    (tmp_path / "one.fits").write_bytes(b"SIMPLE")
    process = run_code(
        f"import sys; sys.argv = ['predict.py', '--model', {str(runs / 'classifier.onnx')!r}, "
        f"'--out', {str(tmp_path / 'p.csv')!r}, {str(tmp_path / 'one.fits')!r}]\n"
        "import predict, files; files.run(predict.main)",
        without=("astropy",), check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "pip install astropy" in process.stderr


def test_exported_file_equals_pytorch_and_carries_its_identity(runs, folder):
    path = runs / "classifier.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(metadata["class_names"]) == ["axion", "cdm", "no_sub"]
    proto = onnx.load(path)
    assert (proto.ir_version, proto.opset_import[0].version) == (10, 20)
    assert (ROOT / "LICENSE").read_text().startswith(metadata["licence"])
    strategies = ("head", "layernorm", "full")
    digests = {export.sha256_of(runs / s / "vit-mae-classifier-wt.pth"): s for s in strategies}
    strategy = digests[metadata["weights_sha256"]]
    files = [runs / s / "vit-mae-classifier-wt.pth" for s in strategies]
    aucs = [weights.load_classifier(f)[1]["run"]["best"]["validation_macro_auc"] for f in files]
    assert aucs[strategies.index(strategy)] == max(aucs)
    model, _ = weights.load_classifier(runs / strategy / "vit-mae-classifier-wt.pth")
    images = np.array(data.load(folder, runs / "cache").images[:21, None])
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for count in (1, 7, 21):
        (got,) = session.run(None, {"images": images[:count]})
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(images[:count])).softmax(1).numpy()
        assert got.shape == (count, 3)
        assert np.abs(got - expected).max() < 1e-4


def test_exporting_leaves_the_network_as_it_was(tmp_path):
    network = mae.Classifier(patch_size=16, embed_dim=32, depth=2, num_heads=2).eval()
    export.write_onnx(export.Probabilities(network).eval(), tmp_path / "x.onnx", {})
    assert {block.attn.form for block in network.blocks} == {"fused"}


def test_a_differing_export_is_not_left(runs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "largest_difference", lambda *_: 2e-4)
    out = tmp_path / "bad.onnx"
    with pytest.raises(export.UserError, match=r"2\.0e-04"):
        export.main([
            "--weights", str(runs / "head" / "vit-mae-classifier-wt.pth"), "--data", str(folder),
            "--cache-dir", str(runs / "cache"), "--out", str(out),
        ])  # fmt: skip
    assert not list(tmp_path.iterdir())


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_prediction_reads_every_kind_and_lists_what_it_cannot(runs, folder, tmp_path, lens_image):
    cutouts = tmp_path / "cutouts" / "night" / "field"
    cutouts.mkdir(parents=True)
    np.save(cutouts / "plain.npy", lens_image)
    shutil.copy(next((folder / "axion").glob("*.npy")), cutouts / "axion.npy")
    np.save(cutouts / "stack.npy", np.stack([lens_image] * 3))
    np.save(cutouts / "channel.npy", np.stack([lens_image] * 2)[:, None])
    np.save(cutouts / "nan.npy", np.full((64, 64), np.nan))
    np.save(cutouts / "small.npy", lens_image[:32, :32])
    (cutouts / "broken.npy").write_bytes(b"no image")
    out = tmp_path / "predictions.csv"
    arguments = ("--model", runs / "classifier.onnx", "--out", out, "--batch-size", 3)
    process = run_script("predict.py", *arguments, tmp_path / "cutouts", check=False)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    rows = read_csv(out)
    assert list(rows[0]) == ["file", "axion", "cdm", "no_sub", "prediction"]
    names = [os.path.basename(row["file"]) for row in rows]
    assert sorted(names) == sorted(
        ["axion.npy", "channel.npy[0]", "channel.npy[1]", "plain.npy", "stack.npy[0]",
         "stack.npy[1]", "stack.npy[2]"]
    )  # fmt: skip
    for row in rows:
        probabilities = {name: float(row[name]) for name in ("axion", "cdm", "no_sub")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.get)
    by_name = dict(zip(names, rows, strict=True))
    assert float(by_name["plain.npy"]["cdm"]) == pytest.approx(
        float(by_name["stack.npy[2]"]["cdm"]), abs=1e-5
    )
    errors = read_csv(tmp_path / "predictions.csv.errors.csv")
    assert sorted(os.path.basename(row["file"]) for row in errors) == [
        "broken.npy", "nan.npy", "small.npy",
    ]  # fmt: skip

    good = run_script("predict.py", *arguments, cutouts / "plain.npy")
    assert good.returncode == 0
    assert not (tmp_path / "predictions.csv.errors.csv").exists()


def test_prediction_needs_numpy_and_onnxruntime_alone(runs, lens_image, tmp_path):
    np.save(tmp_path / "one.npy", lens_image)
    run_code(
        "import files, predict\nfiles.run(predict.main)\n",
        "--model", runs / "classifier.onnx", "--out", tmp_path / "out.csv", tmp_path / "one.npy",
        without=("torch", "onnx", "sklearn", "matplotlib", "tqdm", "scipy"),
    )  # fmt: skip
    assert len(read_csv(tmp_path / "out.csv")) == 1


def test_prediction_of_a_large_stack_stays_small(runs, tmp_path):
    count = int(os.environ.get("PREDICT_IMAGES", "20000"))
    stack = np.lib.format.open_memmap(
        tmp_path / "stack.npy", mode="w+", dtype=np.float32, shape=(count, 64, 64)
    )  # a sparse file: zeros that take no disk
    stack[-1] = np.nan
    del stack
    code = (
        "import resource, predict\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "code = predict.main()\n"
        "print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "raise SystemExit(code)\n"
    )
    process = run_code(
        code, "--model", runs / "classifier.onnx", "--out", tmp_path / "out.csv",
        tmp_path / "stack.npy", check=False,
    )  # fmt: skip
    assert process.returncode == 1  # the last image
    grew = int(process.stdout.split("grew")[1])  # KiB
    assert grew < 250 * 1024, "the stack should not be held in memory"
    with (tmp_path / "out.csv").open() as file:
        assert sum(1 for _ in file) == count


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x08\x07" * 50])
def test_a_model_that_is_none_is_named(content, tmp_path, lens_image):
    np.save(tmp_path / "one.npy", lens_image)
    model = tmp_path / "model.onnx"
    model.write_bytes(content)
    process = run_script(
        "predict.py", "--model", model, "--out", tmp_path / "x.csv", tmp_path / "one.npy",
        check=False,
    )  # fmt: skip
    assert_user_error(process, model)
    assert not (tmp_path / "x.csv").exists()


def test_a_model_with_weights_in_another_file_is_refused(runs, tmp_path):
    proto = onnx.load(runs / "classifier.onnx")
    path = tmp_path / "outside.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(predict.UserError, match=r"outside\.onnx"):
        predict.open_model(path)


def mistakes(runs, folder, tmp_path):
    """name: (script, arguments, what the error names)."""
    cache = ("--data", folder, "--cache-dir", runs / "cache")
    out = ("--out", tmp_path / "out")
    pretrained = runs / "pretrain" / "vit-mae-wt.pth"
    classifier = runs / "full" / "vit-mae-classifier-wt.pth"
    file = tmp_path / "file"
    file.write_text("a file, not a folder")
    small = tmp_path / "small"
    for name in ("axion", "cdm", "no_sub"):
        (small / name).mkdir(parents=True)
        for i in range(60):
            np.save(
                small / name / f"{i}.npy", np.random.default_rng([i, len(name)]).random((32, 32))
            )
    two = tmp_path / "two"
    for name in ("axion", "cdm"):
        (two / name).mkdir(parents=True)
        for i in range(60):
            np.save(two / name / f"{i}.npy", np.random.default_rng([i, len(name)]).random((64, 64)))
    full = ("--strategy", "full")
    return {
        "no such class": ("pretrain.py", (*cache, *out, "--classes", "wdm"), "wdm"),
        "no no_sub": ("pretrain.py", ("--data", two, *out), "no_sub"),
        "patch size": ("pretrain.py", (*cache, *out, "--patch-size", 7), "--patch-size 7"),
        "heads": ("pretrain.py", (*cache, *out, "--num-heads", 5), "5 heads"),
        "mask ratio": ("pretrain.py", (*cache, *out, "--mask-ratio", 1), "--mask-ratio"),
        "epochs": ("pretrain.py", (*cache, *out, "--epochs", 0), "--epochs"),
        "mlp ratio": ("pretrain.py", (*cache, *out, "--mlp-ratio", 0), "--mlp-ratio"),
        "lr": ("pretrain.py", (*cache, *out, "--lr", -1), "--lr"),
        "device": ("pretrain.py", (*cache, *out, "--device", "cuda:77"), "--device"),
        "no device": ("pretrain.py", (*cache, *out, "--device", "abacus"), "--device"),
        "out is a file": ("pretrain.py", (*cache, "--out", file), file),
        "no weights": (
            "finetune.py", (*cache, *out, *full, "--pretrained", tmp_path / "no.pth"), "no.pth",
        ),
        "head of a classifier": (
            "finetune.py", (*cache, *out, *full, "--pretrained", classifier, "--pool", "cls"),
            "--pool",
        ),
        "other size": (
            "finetune.py", ("--data", small, *out, *full, "--pretrained", pretrained), "64 pixels",
        ),
        "head of nothing": (
            "finetune.py", (*cache, *out, "--pretrained", "none", "--strategy", "head"),
            "--pretrained none",
        ),
        "labels": (
            "finetune.py", (*cache, *out, *full, "--pretrained", "none", "--labels", 2), "--labels",
        ),
        "weights of an encoder": ("evaluate.py", (*cache, *out, "--weights", pretrained),
                                  pretrained),
        "size": ("evaluate.py", ("--data", small, *out, "--weights", classifier), "64 pixels"),
        "missing class": ("evaluate.py", ("--data", two, *out, "--weights", classifier), "no_sub"),
        "all of the training data": (
            "evaluate.py", (*cache, *out, "--weights", classifier, "--split", "all"),
            "--split all",
        ),
        "residuals of a classifier": ("reconstruct.py", (*cache, *out, "--weights", classifier),
                                      classifier),
        "residuals of another size": ("reconstruct.py", ("--data", small, *out, "--weights",
                                                         pretrained), "64 pixels"),
        "rounds": ("reconstruct.py", (*cache, *out, "--weights", pretrained, "--rounds", 0),
                   "--rounds"),
        "no results": ("results.py", (runs, *out), runs),
        "seeds": ("study.py", (*cache, *out, "--seeds", -1), "--seeds"),
        "nothing to export": ("export.py", ("--weights", file, *out), file),
        "no data to check with": (
            "export.py", ("--weights", classifier, *out, "--data", tmp_path / "x"), "--data",
        ),
        "no model": ("predict.py", ("--model", tmp_path / "x.onnx", *out, file), "x.onnx"),
        "no images": (
            "predict.py", ("--model", runs / "classifier.onnx", *out, tmp_path / "gone"), "gone",
        ),
        "empty folder": (
            "predict.py", ("--model", runs / "classifier.onnx", *out, runs / "full"), ".npy",
        ),
    }  # fmt: skip


def test_every_mistake_ends_with_one_line_that_names_it(runs, folder, tmp_path, capsys):
    modules = {f"{name}.py": __import__(name) for name in SCRIPTS}
    for name, (script, arguments, named) in mistakes(runs, folder, tmp_path).items():
        main = modules[script].main
        with pytest.raises(SystemExit) as ended:
            export.run(lambda m=main, a=arguments: m(list(map(str, a))))
        captured = capsys.readouterr()
        assert ended.value.code == 2, name + captured.out + captured.err
        error = captured.err.splitlines(keepends=True)[-1]  # behind a progress bar
        assert str(named) in error, name
        assert error.startswith("error: "), name
        assert error.endswith("\n"), name
        left = (
            [p.name for p in (tmp_path / "out").rglob("*")] if (tmp_path / "out").is_dir() else []
        )
        assert left == [], name


def test_residuals_are_scored_mapped_and_compared_without_labels(runs, folder, tmp_path):
    process = run_script(
        "reconstruct.py", "--data", folder, "--cache-dir", runs / "cache", "--weights",
        runs / "pretrain" / "vit-mae-wt.pth", "--out", tmp_path / "out", "--resamples", 20,
    )  # fmt: skip
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    dataset = data.load(folder, runs / "cache")
    test_rows = data.split(dataset)["test"]
    assert [int(row["row"]) for row in rows] == test_rows.tolist()
    assert all(float(row["score"]) > 0 for row in rows)
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(result["auc"]) == {"all", "axion", "cdm"}
    strange = np.array([row["class"] != "no_sub" for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    expected = evaluate.roc_auc_score(strange, scores)
    assert result["auc"]["all"]["value"] == pytest.approx(expected, abs=1e-3)
    assert f"{result['auc']['all']['value']:.4f}" in process.stdout
    for name in ("maps.png", "scores.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000


def test_true_masses_are_marked_on_the_maps(runs, packed, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "residual_maps", lambda *arguments: drawn.append(arguments))
    reconstruct.main([
        "--data", str(packed), "--out", str(tmp_path / "out"), "--resamples", "20",
        "--weights", str(runs / "pretrain" / "vit-mae-wt.pth"),
    ])  # fmt: skip
    _, images, residuals, titles, marks = drawn[0]
    assert images.shape == residuals.shape == (9, 64, 64)
    for title, circles in zip(titles, marks, strict=True):
        assert len(circles) == {"axion": 100, "cdm": 25, "no_sub": 0}[title.split(",")[0]]
    # A pixel is 0.101", and the ring of the subhalos 0.25" to 2" away from the centre (31.5, 31.5).
    cdm = np.concatenate([m for t, m in zip(titles, marks, strict=True) if t.startswith("cdm")])
    distance = 0.101 * np.hypot(cdm[:, 0] - 31.5, cdm[:, 1] - 31.5)
    assert 0.25 <= distance.min() < distance.max() <= 2.0


def test_an_unwritable_folder_is_named(runs, folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    process = run_script(
        "pretrain.py", "--data", folder, "--cache-dir", runs / "cache",
        "--out", tmp_path / "locked" / "run", check=False, before=bound_by_permissions(),
    )  # fmt: skip
    assert_user_error(process, tmp_path / "locked")


def test_a_read_only_data_folder_works_with_the_cache_elsewhere(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "data")
    for path in (root, *root.iterdir()):
        path.chmod(0o500)
    try:
        refused = run_script("data.py", "--data", root, check=False, before=bound_by_permissions())
        assert_user_error(refused, root, "--cache-dir")
        run_script(
            "data.py", "--data", root, "--cache-dir", tmp_path / "cache",
            before=bound_by_permissions(),
        )  # fmt: skip
    finally:
        for path in (root, *root.iterdir()):
            path.chmod(0o700)
    assert {path.name for path in root.iterdir()} == {"axion", "cdm", "no_sub"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_an_example(script):
    process = run_script(f"{script}.py", "--help")
    assert f"python {script}.py" in process.stdout
    assert "default" in process.stdout


def test_scripts_do_nothing_when_imported():
    code = "import " + ", ".join([*SCRIPTS, "train", "weights", "files", "plots"])
    process = run_code(code)
    assert process.stdout == process.stderr == ""


def test_other_classes_and_sizes_work_throughout(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for level, name in enumerate(("faint", "bright")):
        (root / name).mkdir(parents=True)
        for i in range(60):
            np.save(root / name / f"{i}.npy", rng.random((48, 48)) + level)
    run_script("finetune.py", "--data", root, "--pretrained", "none", "--strategy", "full",
               "--out", tmp_path / "run", "--epochs", 8, "--batch-size", 16,
               *TINY_NETWORK)  # fmt: skip
    path = tmp_path / "run" / "vit-mae-classifier-wt.pth"
    assert weights.load_classifier(path)[1]["class_names"] == ["bright", "faint"]
    run_script("evaluate.py", "--data", root, "--weights", path, "--out", tmp_path / "e",
               "--resamples", 20)  # fmt: skip
    result = json.loads((tmp_path / "e" / "metrics.json").read_text())["results"]["run"]
    assert result["macro"]["value"] > 0.95
    assert "iampratyusht" not in (tmp_path / "e" / "comparison.md").read_text()
    run_script("export.py", "--weights", path, "--out", tmp_path / "two.onnx")
    run_script("predict.py", "--model", tmp_path / "two.onnx", "--out", tmp_path / "p.csv",
               root / "faint" / "1.npy")  # fmt: skip
    assert list(read_csv(tmp_path / "p.csv")[0]) == ["file", "bright", "faint", "prediction"]


def test_make_reproduce_runs_on_a_folder_and_does_nothing_twice(folder, tmp_path):
    ready = tmp_path / "ready"
    ready.touch()
    command = ["make", "reproduce", f"PY={sys.executable}", f"READY={ready}", f"DATA={folder}",
               f"RUNS={tmp_path / 'runs'}", "BASELINE=1", "PRETRAINING=--epochs 8",
               "FINETUNING=--epochs 2"]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "runs"
    for run in ("head", "layernorm", "full", "scratch"):
        assert (out / run / "vit-mae-classifier-wt.pth").exists()
    assert (out / "classifier.onnx").exists()
    assert len(read_csv(out / "predictions.csv")) == 15
    assert "| macro AUC |" in first.stdout
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG)
    assert second.returncode == 0, second.stderr
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_strategies_are_those_of_the_command_line():
    assert tuple(finetune.STRATEGIES) == ("head", "layernorm", "full")
