"""Muon, compared with its definition and with torch's own; groups of parameters; schedule."""

import pytest
import torch

from lib import optim
from lib.device import Precision


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
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = optim.Muon([{"params": [ours]}], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    # torch computes the directions in bfloat16.
    assert (ours - theirs).abs().max() < 0.05 * (ours - start).abs().max()


def test_query_key_and_value_are_matrices_of_their_own_and_another_of_that_shape_is_one():
    """Such as the first of an MLP that is three times as wide as the network."""
    torch.manual_seed(0)
    gradient = torch.randn(24, 8) * torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(8)[:, None]
    taken = {}
    for name in ("attn.qkv.weight", "mlp.fc1.weight"):
        parameter = torch.nn.Parameter(torch.zeros(24, 8))
        parameter.grad = gradient.clone()
        (group,) = optim.parameter_groups([(f"blocks.0.{name}", parameter)], 0.0)
        optim.Muon([group], lr=1.0).step()
        taken[name] = parameter.detach()
    for part in taken["attn.qkv.weight"].split(8):
        singular = torch.linalg.svdvals(part / (0.2 * 8**0.5))
        assert 0.5 < singular.min() < singular.max() < 1.3
    expected = -0.2 * 24**0.5 * optim.orthogonalise(gradient[None])[0]
    assert torch.allclose(taken["mlp.fc1.weight"], expected, atol=1e-5)


def test_every_parameter_has_one_optimiser_its_weight_decay_and_its_learning_rate():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    named = [*model.named_parameters(), ("cls_token", torch.nn.Parameter(torch.zeros(1, 1, 4)))]
    groups = optim.parameter_groups(named, 0.05, lambda name: 0.5 if name.startswith("0.") else 1.0)
    names = {id(parameter): name for name, parameter in named}
    found = {
        names[id(p)]: (type(optimizer).__name__, group["weight_decay"], group["lr_scale"])
        for optimizer in optim.new_optimizers(groups, 1e-3, (0.9, 0.95))
        for group in optimizer.param_groups for p in group["params"]
    }  # fmt: skip
    assert found == {"0.weight": ("Muon", 0.05, 0.5), "0.bias": ("AdamW", 0.0, 0.5), "1.weight": ("AdamW", 0.0, 1.0),
                     "1.bias": ("AdamW", 0.0, 1.0), "cls_token": ("AdamW", 0.0, 1.0)}  # fmt: skip


def test_learning_rates_that_are_tensors_give_the_same_steps():
    trained = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        groups = optim.parameter_groups(model.named_parameters(), 0.05,
                                        lambda name: 0.5 if name.startswith("0.") else 1.0)  # fmt: skip
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


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [optim.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3
