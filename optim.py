"""Muon, the optimiser of every weight matrix; vectors are left to torch's AdamW.

torch has a Muon of its own, but it computes in bfloat16 whatever the machine, hundreds of times
slower where a CPU lacks the units, and one matrix at a time.
"""

import torch

# Odd quintic a·x + b·x³ + c·x⁵ that takes singular values in (0, 1] close to one: Jordan et al.
# 2024, "Muon: An optimizer for hidden layers in neural networks".
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices):
    """The nearest matrices (L, m, n) whose singular values are all about one (0.7 to 1.2).

    Newton-Schulz iteration, hence matrix products alone; in bfloat16 inside such an autocast.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)
    x = _by_gram(x) if _is_cheaper_by_gram(x) else _directly(x)
    return x.mT if tall else x


def _directly(x):
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _by_gram(x):
    """The same, but x is multiplied once, by the product of all polynomials of its Gram matrix."""
    a, b, c = QUINTIC
    gram, product = torch.bmm(x, x.mT), None
    for iteration in range(ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if iteration < ITERATIONS - 1:
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    return torch.bmm(product, x)


def _is_cheaper_by_gram(x):
    """Matrices much longer than wide; in full float32 only, as squares lose half of the digits."""
    full_precision = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return full_precision and x.shape[2] >= 2 * x.shape[1]


class Muon(torch.optim.Optimizer):
    """Momentum whose every update has all directions of a matrix equally long.

    The update has the size of AdamW's, 0.2 an entry (Liu et al. 2025, arXiv:2502.16982, equation
    4), so both take one learning rate. Query, key and value matrices, which `qkv` holds one above
    the other, count as three. Convolutions are taken as matrices of one row a filter.
    """

    def __init__(self, groups, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

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
                rows, columns = update.shape
                matrices = update.view(3 if rows == 3 * columns else 1, -1, columns)
                by_shape.setdefault(matrices.shape[1:], []).append((parameter, group, matrices))

        for shape, entries in by_shape.items():
            updates = orthogonalise(torch.cat([matrices for _, _, matrices in entries]))
            updates = updates.float().split([len(matrices) for _, _, matrices in entries])
            for (parameter, group, _), update in zip(entries, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(shape) ** 0.5
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)
