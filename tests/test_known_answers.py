"""lib/known_answers.py: an exported file notices that its answers have changed."""

import base64
import json
import zlib
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import assert_user_error, run_script, with_metadata

import export
from lib import known_answers, onnxfile
from lib.errors import UserError


def stored_in(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}[known_answers.KEY]


@pytest.mark.parametrize(
    ("file", "output", "by"),
    [("classifier", 0, 0.01), ("classifier", 0, np.nan), ("reconstruction", 0, 0.01),
     ("reconstruction", 1, -0.01)],
)  # fmt: skip
def test_a_runtime_that_gives_other_answers_is_refused(file, output, by, runs, monkeypatch):
    run_model = onnxfile.run_model

    def disturbed(*arguments):
        outputs = run_model(*arguments)
        outputs[output] = outputs[output] + np.float32(by)
        return outputs

    path = runs / f"{file}.onnx"
    onnxfile.open_session(path, "cpu")
    monkeypatch.setattr(onnxfile, "run_model", disturbed)
    with pytest.raises(UserError, match=rf"{file}\.onnx: its .* from PyTorch's.*--device cpu"):
        onnxfile.open_session(path, "cpu")


def test_a_damaged_file_ends_in_one_line(runs, lens_image, tmp_path):
    proto = onnx.load(runs / "classifier.onnx")
    largest = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    damaged = np.frombuffer(largest.raw_data, np.float32).copy()
    damaged[: len(damaged) // 2] *= -1
    largest.raw_data = damaged.tobytes()
    onnx.save(proto, tmp_path / "damaged.onnx")
    np.save(tmp_path / "lens.npy", lens_image)
    process = run_script("predict.py", "--model", tmp_path / "damaged.onnx", "--out",
                         tmp_path / "p.csv", tmp_path / "lens.npy", check=False)  # fmt: skip
    assert_user_error(process, tmp_path / "damaged.onnx", "export it again")
    assert not (tmp_path / "p.csv").exists()


def test_a_file_of_an_older_version_is_opened(runs, tmp_path):
    path = with_metadata(runs / "classifier.onnx", tmp_path / "old.onnx", known_answers=None)
    assert onnxfile.open_classifier(path, "cpu")[1] == ["axion", "cdm", "no_sub"]


def bomb(text):
    content = json.loads(text)
    return json.dumps(content | {"images": base64.b64encode(zlib.compress(bytes(10**8))).decode()})


@pytest.mark.parametrize("change", [
    bomb, lambda _: "[" * 50_000, lambda _: "{}", lambda text: text + " " * 10**6,
    lambda text: text.replace('"count": 3', '"count": 1000000000'),
    lambda text: json.dumps(json.loads(text) | {"unit": float("inf")}),
    lambda text: json.dumps(json.loads(text) | {"answers": {"probabilities": "AAAA"}}),
    lambda text: json.dumps(json.loads(text) | {"answers": {"another": json.loads(text)["images"]}}),
])  # fmt: skip
def test_hostile_known_answers_are_named(change, runs, tmp_path):
    path = runs / "classifier.onnx"
    changed = with_metadata(path, tmp_path / "x.onnx", known_answers=change(stored_in(path)))
    with pytest.raises(UserError, match=r"x\.onnx"):
        onnxfile.open_classifier(changed, "cpu")


def test_an_unknown_precision_is_named(runs, tmp_path):
    path = with_metadata(runs / "classifier.onnx", tmp_path / "x.onnx", precision="int3")
    with pytest.raises(UserError, match=r"x\.onnx"):
        onnxfile.open_classifier(path, "cpu")


@pytest.mark.parametrize("unit", [1e-37, 1.0, 1e37])
@pytest.mark.parametrize("side", [16, 150, 401])
def test_what_is_read_is_what_was_stored(side, unit):
    rng = np.random.default_rng(0)
    raw = (unit * rng.normal(size=(9, 1, side, side))).astype(np.float32)
    images = known_answers.storable(raw)
    answers = {"probabilities": rng.random((9, 3)).astype(np.float32),
               "residual": rng.random((9, 1, side, side)).astype(np.float32)}  # fmt: skip
    text = known_answers.text_of(images, answers)
    assert len(text) < 1.3 * known_answers.MOST_CHARACTERS
    got, kept = known_answers.read(text, side)
    assert 1 <= len(got) <= known_answers.MOST_IMAGES
    assert np.array_equal(got, images[: len(got)])
    assert got.dtype == np.float32
    if side <= known_answers.LARGEST_SIDE:
        assert np.allclose(got, raw[: len(got)], rtol=1e-3, atol=1e-7 * np.abs(raw).max())
    outputs = known_answers.thinned({name: answer[: len(got)] for name, answer in answers.items()})
    assert known_answers.differences(kept, outputs) == {"probabilities": 0, "residual": 0}
    outputs["residual"] = outputs["residual"] + 1
    assert known_answers.differences(kept, outputs) == {"probabilities": 0, "residual": pytest.approx(1)}


def test_a_familiarity_is_compared_where_the_predicted_classes_agree():
    """Rounding changes the class of an image that is on the edge of two, and with it the rank."""
    right = {"probabilities": np.array([[0.5, 0.49], [1, 0]]), "familiarity": np.array([0.9, 0.5])}
    got = {"probabilities": np.array([[0.49, 0.5], [1, 0]]), "familiarity": np.array([0.1, 0.4])}
    found = known_answers.differences(right, got)
    assert found == {"probabilities": pytest.approx(0.01), "familiarity": pytest.approx(0.1)}
    alone = [{name: answer[:1] for name, answer in answers.items()} for answers in (right, got)]
    assert known_answers.differences(*alone)["familiarity"] == 0


@pytest.fixture
def ranked(monkeypatch):
    """(model, images, metadata that are stored) of a file whose familiarity is one rank from PyTorch's.

    The classifier was calibrated on 199 images of one class and 4 of another.
    """
    seen = torch.tensor([0] * 199 + [1] * 4)
    model = SimpleNamespace(familiarity=SimpleNamespace(class_seen=seen), outputs=("probabilities", "familiarity"))
    predicted = np.arange(256) % 2
    right = {"probabilities": np.eye(2, dtype="f4")[predicted], "familiarity": np.full(256, 0.2, "f4")}
    got = [right["probabilities"], right["familiarity"] + np.where(predicted, 1 / 5, 1 / 200).astype("f4")]
    stored = {}
    monkeypatch.setattr(export, "answers_of", lambda *_: dict(right))
    monkeypatch.setattr(export, "run_session", lambda _, images, *__: [answer[: len(images)] for answer in got])
    monkeypatch.setattr(export, "save_proto", lambda _, __, metadata: stored.update(metadata))
    for module, name in ((onnx, "load"), (export, "open_session")):
        monkeypatch.setattr(module, name, lambda *_: None)
    return model, np.random.default_rng(0).random((256, 1, 16, 16)).astype("f4"), stored


def test_one_rank_in_a_small_class_is_rounding(ranked):
    """It is 0.2 of the familiarity among 4 images: such a classifier was not exported."""
    model, images, _ = ranked
    found = export.worst_differences(model, None, images)
    export.require_agreement(found, "x.onnx")
    model.familiarity.class_seen = torch.tensor([0] * 199 + [1] * 99)
    with pytest.raises(UserError, match="its familiarity is 1"):
        export.require_agreement(export.worst_differences(model, None, images), "x.onnx")


@pytest.mark.parametrize("large", [True, False])
def test_no_familiarity_is_stored_that_another_machine_may_change(large, ranked):
    model, images, stored = ranked
    if not large:
        model.familiarity.class_seen = torch.tensor([0] * 9 + [1] * 4)
    export.store_known_answers(None, SimpleNamespace(precision="float32", out="x"), model, images, {})
    _, answers = known_answers.read(stored[known_answers.KEY], 16)
    assert ("familiarity" in answers) == large
    assert {row.argmax() for row in answers["probabilities"]} == ({0} if large else {0, 1})


def test_a_gpu_multiplies_in_full_float32(runs, monkeypatch):
    asked = []

    def session(content, options, providers):
        asked.extend(providers)
        return opened(content, options, providers=["CPUExecutionProvider"])

    opened = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    onnxfile.open_classifier(runs / "classifier.onnx", "auto")
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
