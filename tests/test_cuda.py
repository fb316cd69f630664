"""What a GPU computes: the same as a CPU, and the same again after a resume."""

import json

import numpy as np
import pytest
import torch
from conftest import (assert_same_tensors, finetuning, history_of, pretraining, run_script, sigterm_at, tensors_in)
from test_familiarity import LOG, dataset_of, fitted_images

import export
import finetune
from lib import class_evaluation, cuda_graphs, datasets, familiarity, loader, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU, CPU = torch.device("cuda"), torch.device("cpu")
CLASSIFIER, PRETRAINED = "vit-mae-classifier-wt.pth", "vit-mae-wt.pth"
ON_GPU = ("--device", "cuda")


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory):
    """Folder of an MAE and of a classifier of each strategy, trained on the GPU."""
    out = tmp_path_factory.mktemp("cuda")
    run_script("pretrain.py", *pretraining(packed, out / "pretrain", *ON_GPU))
    for strategy in finetune.STRATEGIES:
        start = out / "pretrain" / PRETRAINED
        run_script("finetune.py", *finetuning(packed, out / strategy, start, strategy, *ON_GPU))
    return out


@pytest.mark.parametrize("strategy", finetune.STRATEGIES)
def test_a_classifier_answers_on_both_devices_and_in_onnxruntime_alike(strategy, trained, packed, tmp_path):
    dataset, rows = datasets.load(packed), np.arange(300)
    answers = []
    for device in (CPU, GPU):
        model, _ = weights.load_classifier(trained / strategy / CLASSIFIER)
        answers.append(class_evaluation.predict_probabilities(model, dataset.images, rows, device))
    assert np.abs(answers[0] - answers[1]).max() < 1e-4
    run_script("export.py", "--data", packed, "--weights", trained / strategy / CLASSIFIER, "--out",
               tmp_path / "c.onnx")  # fmt: skip
    exported, *_ = export.run_session(tmp_path / "c.onnx", dataset.images[rows][:, None])
    assert np.abs(exported - answers[1]).max() < 1e-4


def test_training_on_a_gpu_learns_what_training_on_a_cpu_does(trained, packed, tmp_path):
    run_script("pretrain.py", *pretraining(packed, tmp_path / "cpu", "--device", "cpu"))
    on_cpu, on_gpu = history_of(tmp_path / "cpu"), history_of(trained / "pretrain")
    assert on_gpu[-1]["validation_loss"] < on_gpu[0]["validation_loss"]
    assert on_gpu[-1]["validation_loss"] == pytest.approx(on_cpu[-1]["validation_loss"], rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["pretrain", *finetune.STRATEGIES])
def test_a_run_on_a_gpu_resumes_to_bit_identical_weights(what, precision, trained, packed, tmp_path, no_pictures):
    more = (*ON_GPU, "--precision", precision)
    script, file = ("pretrain", PRETRAINED) if what == "pretrain" else ("finetune", CLASSIFIER)

    def arguments(out):
        if what == "pretrain":
            return pretraining(packed, out, *more)
        return finetuning(packed, out, trained / "pretrain" / PRETRAINED, what, *more)

    run_script(f"{script}.py", *arguments(tmp_path / "whole"))
    with sigterm_at(7):
        run_script(f"{script}.py", *arguments(tmp_path / "cut"), check=False)
    run_script(f"{script}.py", *arguments(tmp_path / "cut"), "--resume")
    assert_same_tensors(tensors_in(tmp_path / "whole" / file), tensors_in(tmp_path / "cut" / file))


def test_a_gpu_refuses_the_images_that_a_cpu_refuses():
    images, rows = fitted_images(), np.arange(3000)
    known, _ = familiarity.fit(dataset_of(images), rows[:1800], rows[1800:2400], LOG, quiet=True)
    strangenesses = [class_evaluation.strangeness_of(known, images, rows[2400:], device) for device in (CPU, GPU)]
    predicted = torch.zeros(600, dtype=torch.int64)
    values = [class_evaluation.ranked(known.cpu(), strangeness, predicted) for strangeness in strangenesses]
    assert np.abs(values[0] - values[1]).max() < 0.05
    assert (values[1] < 0.01).mean() < 0.05


def test_the_steps_of_a_graph_learn_what_single_steps_do(packed, tmp_path, monkeypatch):
    run_script("pretrain.py", *pretraining(packed, tmp_path / "graph", *ON_GPU))
    monkeypatch.setattr(cuda_graphs, "WARM_UP", 10**9)
    run_script("pretrain.py", *pretraining(packed, tmp_path / "single", *ON_GPU))
    assert_same_tensors(*(tensors_in(tmp_path / n / PRETRAINED) for n in ("graph", "single")))


def test_validation_on_a_gpu_draws_the_same_numbers_each_time_and_leaves_the_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3, device=GPU)
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        with loader.fixed_random_numbers():
            drawn.append(torch.rand(3, device=GPU))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(3, device=GPU), expected)


def test_a_checkpoint_of_a_gpu_is_resumed_on_a_cpu(packed, tmp_path, no_pictures):
    with sigterm_at(7):
        run_script("pretrain.py", *pretraining(packed, tmp_path, *ON_GPU), check=False)
    run_script("pretrain.py", *pretraining(packed, tmp_path, "--device", "cpu"), "--resume")
    assert np.isfinite(history_of(tmp_path)[-1]["validation_loss"])


def test_images_on_the_device_and_images_that_do_not_fit_are_read_alike(packed, monkeypatch):
    images, rows = datasets.load(packed).images, np.array([7, 299, 0])
    kept = loader.batch_reader(images, GPU)(rows)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    copied = loader.batch_reader(images, GPU)(rows)
    assert kept.device.type == copied.device.type == "cuda"
    assert torch.equal(kept, copied)


def test_residuals_without_labels_are_those_of_a_cpu(trained, packed, tmp_path):
    scores = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        run_script("reconstruct.py", "--data", packed, "--weights",
                   trained / "pretrain" / PRETRAINED, "--out", out, "--device", device,
                   "--resamples", 10)  # fmt: skip
        scores.append(json.loads((out / "metrics.json").read_text())["auc"]["all"]["value"])
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
