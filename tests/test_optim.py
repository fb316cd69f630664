"""Muon, compared with its definition and with torch's own; groups of parameters; schedule."""

import pytest
import torch

from lib import optim
from lib.device import Precision


@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 16, 64), (2, 64, 16), (1, 3, 64)])
def test_all_directions_of_an_update_are_about_equally_long(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = (u * torch.linspace(0.05, 1.0, u.shape[-1])) @ vh
    result = optim.orthogonalise(matrices)
    assert result.shape == shape
    singular = torch.linalg.svdvals(result)
    assert 0.5 < singular.min() < singular.max() < 1.3
    nearest = u @ vh
    assert ((result * nearest).sum((1, 2)) / nearest.square().sum((1, 2)) > 0.8).all()


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (1, 8, 16)])
def test_long_matrices_come_out_as_by_the_definition(shape):
    """However small their least singular values, for which the Gram matrix has few digits left."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular = torch.logspace(0, -5, u.shape[-1])
    a, b, c = optim.QUINTIC
    expected = singular / singular.norm()
    for _ in range(optim.ITERATIONS):
        expected = a * expected + b * expected**3 + c * expected**5
    result = optim.orthogonalise((u * singular) @ vh)
    assert (result - (u * expected) @ vh).abs().max() < 1e-3


def test_a_gradient_of_zeros_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    optim.Muon([{"params": [parameter]}], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_steps_are_those_of_torch(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = optim.Muon([{"params": [ours]}], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    # torch computes the directions in bfloat16.
    assert (ours - theirs).abs().max() < 0.05 * (ours - start).abs().max()


def test_query_key_and_value_are_matrices_of_their_own():
    torch.manual_seed(0)
    qkv = torch.nn.Parameter(torch.zeros(24, 8))
    qkv.grad = torch.randn(24, 8) * torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(8)[:, None]
    (group,) = optim.parameter_groups([("blocks.0.attn.qkv.weight", qkv)], 0.0)
    optim.Muon([group], lr=1.0).step()
    for part in qkv.detach().split(8):
        singular = torch.linalg.svdvals(part / (0.2 * 8**0.5))
        assert 0.5 < singular.min() < singular.max() < 1.3


def test_another_matrix_of_that_shape_is_one_matrix():
    """Such as the first of an MLP that is three times as wide as the network."""
    torch.manual_seed(0)
    fc1 = torch.nn.Parameter(torch.zeros(24, 8))
    fc1.grad = torch.randn(24, 8)
    (group,) = optim.parameter_groups([("blocks.0.mlp.fc1.weight", fc1)], 0.0)
    optim.Muon([group], lr=1.0).step()
    expected = -0.2 * 24**0.5 * optim.orthogonalise(fc1.grad[None])[0]
    assert torch.allclose(fc1.detach(), expected, atol=1e-5)


def test_every_parameter_has_one_optimiser():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = optim.parameter_groups(model.named_parameters(), 0.05)
    muon, adamw = optim.new_optimizers(groups, 1e-3, (0.9, 0.95))
    assert [p.ndim for g in muon.param_groups for p in g["params"]] == [2]
    assert [p.ndim for g in adamw.param_groups for p in g["params"]] == [1, 1, 1]
    assert [g["weight_decay"] for g in muon.param_groups + adamw.param_groups] == [0.05, 0.0]


def test_the_learning_rate_of_a_group_follows_the_names_of_its_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    groups = optim.parameter_groups(
        model.named_parameters(), 0.05, lambda name: 0.5 if name.startswith("0.") else 1.0
    )
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {name: scales[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.5, "0.bias": 0.5, "1.weight": 1.0, "1.bias": 1.0,
    }  # fmt: skip
    optimizers = optim.new_optimizers(groups, 1e-3, (0.9, 0.95))
    assert len(optimizers) == 2
    assert {g["lr_scale"] for o in optimizers for g in o.param_groups} == {0.5, 1.0}


def test_learning_rates_that_are_tensors_give_the_same_steps():
    trained = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        groups = optim.parameter_groups(
            model.named_parameters(), 0.05, lambda name: 0.5 if name.startswith("0.") else 1.0
        )
        optimizers = optim.new_optimizers(groups, 1e-3, (0.9, 0.95))
        if capturable:
            optim.make_capturable(optimizers, torch.device("cpu"))
        for lr in (0.1, 0.03):
            optim.set_learning_rate(optimizers, lr)
            loss = model(torch.ones(2, 4)).square().sum() + model[0].weight.sum()
            optim.update(loss, optimizers, Precision("float32", "fused"), torch.device("cpu"))
        rates = [float(g["lr"]) for o in optimizers for g in o.param_groups]
        trained.append(([p.detach() for p in model.parameters()], rates))
    assert trained[0][1] == pytest.approx(trained[1][1])
    assert sorted(set(trained[0][1])) == pytest.approx([0.015, 0.03])
    for one, other in zip(trained[0][0], trained[1][0], strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_tokens_and_vectors_have_no_weight_decay():
    named = [("cls_token", torch.zeros(1, 1, 4)), ("norm.weight", torch.zeros(4)),
             ("fc.weight", torch.zeros(4, 4))]  # fmt: skip
    groups = optim.parameter_groups([(n, torch.nn.Parameter(p)) for n, p in named], 0.05)
    decays = {tuple(p.shape): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {(1, 1, 4): 0.0, (4,): 0.0, (4, 4): 0.05}


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [optim.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3
