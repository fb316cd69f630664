"""Export: any unit of the images, pixels that are no numbers, and options at their limits."""

import numpy as np
import pytest
import torch
from conftest import CLASSIFIER, PRETRAINED, assert_user_error, run_script

import export
from lib import onnxwrite
from mae import MAE, Classifier, IntensityTransform, ResidualClassifier

SIZE = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_num_heads": 2}
NETWORK = ("--embed-dim", 32, "--depth", 1, "--num-heads", 2)
PRECISIONS = ("float32", "float16", "int8")
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "int8": 5e-2}


def images(unit, count=64):
    pixels = np.random.default_rng(0).random((count, 1, 32, 32)) + 0.1
    return (pixels * unit).astype(np.float32)


def constants(unit, kind="log"):
    softening = (0.01 if kind in ("log", "asinh") else 0.5) * unit
    return {"kind": kind, "offset": 0.1 * unit, "softening": softening, "mean": 1.0, "std": 0.7}


def classifier(unit, kind="log"):
    torch.manual_seed(0)
    return Classifier(**SIZE, pool="stats", transform=constants(unit, kind)).eval()


def residuals(unit):
    torch.manual_seed(0)
    transform = IntensityTransform(**constants(unit))
    return onnxwrite.Residuals(MAE(**SIZE, **DECODER), transform, 0.75).eval()


def exported(model, path, precision="float32", calibration=None):
    onnxwrite.write_onnx(model, path, {})
    if precision != "float32":
        onnxwrite.reduce_precision(path, precision, calibration, {})
    return path


@pytest.mark.parametrize("unit", [1e-37, 1e-10, 1.0, 1e36])
def test_the_unit_of_the_images_survives_the_export(unit, tmp_path):
    model = onnxwrite.Probabilities(classifier(unit)).eval()
    path = exported(model, tmp_path / "model.onnx")
    export.require_agreement(export.worst_differences(model, path, images(unit)), path)


def test_a_small_unit_survives_the_export_of_residual_maps(tmp_path):
    model = residuals(1e-30)
    path = exported(model, tmp_path / "maps.onnx")
    export.require_agreement(export.worst_differences(model, path, images(1e-30)), path)


@pytest.mark.parametrize("kind", ["log", "asinh", "sqrt", "linear"])
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_the_scaled_transform_is_the_transform_bit_for_bit(unit, kind):
    transform, pixels = IntensityTransform(**constants(unit, kind)), torch.tensor(images(unit, 8))
    assert torch.equal(onnxwrite.ScaledTransform(transform)(pixels), transform(pixels))


def test_images_far_above_their_contrast_are_exported(tmp_path):
    """The offset is subtracted before anything is rounded."""
    transform = {"kind": "linear", "offset": 1e6, "softening": 1.0, "mean": 0.5, "std": 0.3}
    network = Classifier(**SIZE, transform=transform).eval()
    model = onnxwrite.Probabilities(network).eval()
    pixels = (1e6 + images(1.0)).astype(np.float32)
    path = exported(model, tmp_path / "model.onnx")
    export.require_agreement(export.worst_differences(model, path, pixels), path)


@pytest.mark.parametrize(("unit", "kind"),
                         [(1e-20, "log"), (1e6, "log"), (1e6, "asinh"), (1e6, "linear"), (1e20, "sqrt")])  # fmt: skip
def test_pixels_beyond_float16_are_classified_in_float16(unit, kind, tmp_path):
    model, pixels = onnxwrite.Probabilities(classifier(unit, kind)).eval(), images(unit)
    path = exported(model, tmp_path / "model.onnx", "float16")
    difference = export.worst_differences(model, path, pixels)["probabilities"]
    assert difference <= TOLERANCES["float16"]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("more", [{}, {"map_pool": 2}, {"with_image": True, "orientations": 8}])
def test_classifiers_of_residual_maps_are_exported(more, precision, tmp_path):
    """onnxruntime crashed on a ScatterND in float16."""
    torch.manual_seed(0)
    network = ResidualClassifier({**SIZE, **DECODER}, constants(1.0), **more)
    model, pixels = onnxwrite.Probabilities(network).eval(), images(1.0)
    path = exported(model, tmp_path / "model.onnx", precision)
    assert export.worst_differences(model, path, pixels)["probabilities"] <= TOLERANCES[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pixel_that_is_no_number_gives_no_probability(precision, tmp_path):
    model, pixels = onnxwrite.Probabilities(classifier(1.0)).eval(), images(1.0)
    path = exported(model, tmp_path / "model.onnx", precision, pixels)
    right = export.run_session(path, pixels[:8])[0]
    bad = pixels[:8].copy()
    bad[2, 0, 3, 3], bad[5, 0, 0, 0], bad[6, 0, 31, 31] = np.nan, np.inf, -np.inf
    got = export.run_session(path, bad)[0]
    assert np.isnan(got[[2, 5, 6]]).all()
    others = [0, 1, 3, 4, 7]
    assert np.array_equal(got[others], right[others])


def test_a_pixel_that_is_no_number_gives_no_residual(tmp_path):
    path = exported(residuals(1.0), tmp_path / "maps.onnx")
    bad = images(1.0, 4)
    right = export.run_session(path, bad)
    bad[1, 0, 3, 3], bad[2, 0, 0, 0] = np.nan, -np.inf
    for got, expected in zip(export.run_session(path, bad), right, strict=True):
        assert np.isnan(got[[1, 2]]).all()
        assert np.array_equal(got[[0, 3]], expected[[0, 3]])


def rings(out, unit):
    """Two classes of noisy rings, 60 each, in any unit."""
    y, x = np.mgrid[:32, :32] - 15.5
    for k in range(2):
        rng, folder = np.random.default_rng(k), out / f"c{k}"
        folder.mkdir(parents=True)
        for i in range(60):
            ring = np.exp(-((np.hypot(x, y) - 5 - 3 * k) ** 2) / 4) * (1 + rng.random())
            np.save(folder / f"{i}.npy", unit * (ring + 0.05 * rng.normal(size=x.shape)))
    return out


@pytest.fixture(scope="module", params=[1e-10, 1e6])
def trained(request, tmp_path_factory):
    """(data, classifier, MAE) of images in tiny and in large units."""
    out = tmp_path_factory.mktemp("units")
    data = rings(out / "data", request.param)
    common = ("--data", data, *NETWORK, "--batch-size", 16, "--precision", "float32", "--quiet")
    run_script("finetune.py", *common, "--pretrained", "none", "--strategy", "full", "--epochs", 15,
               "--validations", 2, "--out", out / "full")  # fmt: skip
    run_script("pretrain.py", *common, "--classes", "all", "--epochs", 1, "--decoder-embed-dim", 16,
               "--decoder-num-heads", 2, "--out", out / "mae")  # fmt: skip
    return data, out / "full" / CLASSIFIER, out / "mae" / PRETRAINED


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_classifier_is_exported_in_every_unit(precision, trained, tmp_path):
    data, network, _ = trained
    process = run_script("export.py", "--data", data, "--weights", network, "--precision",
                         precision, "--out", tmp_path / "model.onnx")  # fmt: skip
    difference = float(process.stdout.split("within ")[-1].split()[0])
    assert difference < TOLERANCES[precision]


def test_residual_maps_are_exported_in_every_unit(trained, tmp_path):
    data, _, network = trained
    run_script("export.py", "--what", "reconstruction", "--data", data, "--weights", network,
               "--out", tmp_path / "maps.onnx")  # fmt: skip
    assert (tmp_path / "maps.onnx").exists()


def test_an_export_does_not_overwrite_what_it_reads(trained, tmp_path):
    data, network, _ = trained
    image = next(data.glob("c0/*.npy"))
    link = tmp_path / "link.onnx"
    link.symlink_to(network)
    for out in (network, network.parent / ".." / "full" / network.name, link, image):
        before = out.read_bytes()
        process = run_script("export.py", "--data", data, "--weights", network, "--out", out, check=False)
        assert_user_error(process, "--out")
        assert out.read_bytes() == before
