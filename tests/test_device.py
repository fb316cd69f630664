"""Where and how a step is computed: device, number format, attention kernel, memory."""


import pytest
import torch

from lib import device
from lib.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:77", "cpu:x", "", "meta"])
def test_a_device_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match=f"--device {name} is not available"):
        device.resolve_device(name)


def test_products_of_float32_numbers_are_not_rounded_on_a_gpu(monkeypatch):
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds], torch.backends.cudnn.deterministic
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    try:
        for kind in kinds:
            kind.allow_tf32 = True
        assert device.resolve_device("cuda").type == "cuda"
        assert not any(kind.allow_tf32 for kind in kinds)
    finally:
        for kind, value in zip(kinds, before[0], strict=True):
            kind.allow_tf32 = value
        torch.backends.cudnn.deterministic = before[1]


# Precision


@pytest.mark.parametrize(("in_bfloat16", "chosen"),
                         [(500.0, "float32"), (0.9, "float32"), (0.6, "bfloat16"), (0.2, "bfloat16")])  # fmt: skip
def test_bfloat16_is_taken_only_where_a_product_is_much_faster(in_bfloat16, chosen, monkeypatch):
    """A slow first product and disturbances do not decide."""
    measured = {torch.float32: 0, torch.bfloat16: 0}

    def seconds_of(function, _):
        dtype = function().dtype
        measured[dtype] += 1
        if measured[dtype] == 1:
            return 0.0 if dtype == torch.float32 else 1000.0  # the first warms up
        disturbed = 50.0 * (measured[dtype] % 3 == 0)
        return disturbed + (in_bfloat16 if dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(device, "seconds_of", seconds_of)
    assert device.choose_precision("auto", CPU).name == chosen


def test_choosing_the_precision_leaves_the_random_numbers():
    random_state = torch.get_rng_state()
    device.choose_precision("auto", CPU)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_products_have_the_chosen_format_and_attention_the_kernel_that_is_fast_on_the_device():
    a, gpu = torch.ones(4, 4), torch.device("cuda")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        precision = device.choose_precision(name, CPU)
        assert precision.attention == "plain"
        with precision.autocast(CPU):
            assert (a @ a).dtype == dtype
    assert device.choose_precision("bfloat16", gpu).attention == "fused"
    assert device.choose_precision("float32", CPU, tokens=901).attention == "fused"  # needs less memory
