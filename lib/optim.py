"""Muon for matrices, AdamW for vectors; parameter groups and the learning-rate schedule.

torch has a Muon of its own, but it always computes in bfloat16, which is hundreds of times slower
on a CPU without the units, and it takes one matrix at a time.
"""

import math
import warnings

import torch

# Odd quintic a·x + b·x³ + c·x⁵ that takes singular values in (0, 1] close to one: Jordan et al.
# 2024, "Muon: An optimizer for hidden layers in neural networks".
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
WARMUP = 0.05  # of the steps


def orthogonalise(matrices):
    """The nearest matrices (L, m, n) whose singular values are all about one (0.7 to 1.2).

    A Newton-Schulz iteration needs matrix products only; they run in bfloat16 under autocast.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)
    # The Gram matrix is cheaper if matrices are much longer than wide; squaring loses half the digits.
    is_float32 = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    x = _by_gram(x) if is_float32 and x.shape[2] >= 2 * x.shape[1] else _directly(x)
    return x.mT if tall else x


def _directly(x):
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _by_gram(x):
    """The same, with products of the Gram matrix's size; makes a Muon step 1.35 times faster on a CPU."""
    a, b, c = QUINTIC
    gram, product = torch.bmm(x, x.mT), None
    for iteration in range(ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if iteration < ITERATIONS - 1:
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    return torch.bmm(product, x)


class Muon(torch.optim.Optimizer):
    """Momentum whose every update has all directions of a matrix equally long.

    The update has the size of AdamW's, 0.2 an entry (Liu et al. 2025, arXiv:2502.16982, equation
    4), so both take one learning rate. A group's `parts` is the number of matrices that a parameter
    holds one above the other (default 1). A convolution is a matrix with one row a filter.
    """

    def __init__(self, groups, lr, momentum=0.95, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self):
        by_shape = {}  # equal shapes go through the iteration together
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov's
                matrices = update.view(group["parts"], -1, update.shape[1])
                by_shape.setdefault(matrices.shape[1:], []).append((parameter, group, matrices))

        for shape, entries in by_shape.items():
            updates = orthogonalise(torch.cat([matrices for _, _, matrices in entries]))
            updates = updates.float().split([len(matrices) for _, _, matrices in entries])
            for (parameter, group, _), update in zip(entries, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update.reshape(parameter.shape)
                length = group["lr"] * (0.2 * max(shape) ** 0.5)
                if torch.is_tensor(length):  # see make_capturable
                    parameter.sub_(update * length)
                else:
                    parameter.add_(update, alpha=-length)


def parameter_groups(named_parameters, weight_decay, lr_scale=lambda name: 1.0):
    """Groups of parameters: matrices with weight decay, everything else without.

    `lr_scale(name)` multiplies the learning rate of a parameter. `qkv` holds the matrices of query,
    key and value.
    """
    groups = {}
    for name, parameter in named_parameters:
        is_matrix = parameter.ndim > 1 and not name.endswith("_token")
        parts = 3 if name.endswith("qkv.weight") else 1
        key = (lr_scale(name), is_matrix, parts)
        group = {"params": [], "lr_scale": key[0], "matrix": is_matrix, "parts": parts,
                 "weight_decay": weight_decay if is_matrix else 0.0}  # fmt: skip
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def new_optimizers(groups, lr, betas):
    """Muon for the matrices of `groups` and AdamW for the rest, a list without empty ones."""
    matrices = [group for group in groups if group["matrix"]]
    others = [group for group in groups if not group["matrix"]]
    optimizers = [Muon(matrices, lr)] if matrices else []
    return optimizers + ([torch.optim.AdamW(others, lr, betas, fused=True)] if others else [])


def make_capturable(optimizers, device):
    """Let the steps of optimizers be part of a CUDA graph, whose learning rates are tensors."""
    # torch warns of the first steps, which no graph records.
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    for group in _groups_of(optimizers):
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = True  # what AdamW calls it


def set_learning_rate(optimizers, lr):
    """Let every group of parameters learn with `lr` times its own factor."""
    for group in _groups_of(optimizers):
        rate = lr * group["lr_scale"]
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def update(loss, optimizers, precision, device):
    """Let the parameters take a step down the gradient of `loss`."""
    loss.backward()
    with precision.autocast(device):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def learning_rate(step, steps, peak):
    """Linear warm-up over the first steps, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
