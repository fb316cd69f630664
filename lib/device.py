"""Where and how a step is computed: CPU or GPU, number format, attention kernel, memory."""

import ctypes
import time
from typing import NamedTuple

import torch

from lib import distributed
from lib.errors import UserError

# Products in bfloat16 are about 500 times slower than in float32 on a CPU without the units, and 1.8 (AMD's
# AVX-512) to 6 times (AMX) faster with them: one measurement tells which, however noisy. A gain of 1.8 makes
# steps of pre-training 1.5 to 1.7 times as fast.
BFLOAT16_GAIN = 1.2
MOST_PLAIN_TOKENS = 300
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Precision(NamedTuple):
    """How a step is computed: number format of the matrix products and attention kernel."""

    name: str  # "float32" or "bfloat16"
    attention: str  # see mae.ATTENTION_FORMS

    def autocast(self, device):
        enabled = self.name == "bfloat16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def resolve_device(name):
    """torch.device of "auto", "cpu", "cuda" or "cuda:N"; UserError if it does not exist here."""
    if name == "auto":
        name = distributed.local_device() if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        is_known = device.type in ("cpu", "cuda")  # nobody has tried another
    except (RuntimeError, AssertionError):
        is_known = False
    if not is_known:
        raise UserError(f"--device {name} is not available here: use auto or cpu")
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        # In TF32 the familiarity, which measures tiny deviations, refuses good images.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let the C library reuse the memory of freed tensors.

    By default glibc returns large blocks to the kernel, which zeroes every page again at the next
    step: up to a third of a step's time. Where there is no mallopt, this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def choose_precision(name, device, tokens=0):
    """The `Precision` of "auto", "float32" or "bfloat16"; auto takes bfloat16 where it is fast.

    `tokens` : the most that the network sees of an image.
    The answer depends on the machine alone, so the same command gives the same weights twice.
    Several processes take the main one's answer.
    """
    if name == "auto":
        is_fast = distributed.from_main(lambda: bfloat16_is_fast(device))
        name = "bfloat16" if is_fast else "float32"
    # On CPUs plain products are as fast or faster for few tokens; for many they take more memory. The backward
    # pass of the fused kernel is slow there in bfloat16.
    fused = device.type == "cuda" or (name == "float32" and tokens > MOST_PLAIN_TOKENS)
    return Precision(name, "fused" if fused else "plain")


def bfloat16_is_fast(device):
    """Whether this machine has units for bfloat16; on a CPU one matrix product is timed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    a = torch.ones(256, 256, device=device)
    b = a.bfloat16()
    # Alternate, so that both meet the same disturbances; the first product of each warms up.
    seconds = [(seconds_of(lambda: a @ a, device), seconds_of(lambda: b @ b, device))
               for _ in range(10)]  # fmt: skip
    float32, bfloat16 = (min(column) for column in zip(*seconds[1:], strict=True))
    return float32 > BFLOAT16_GAIN * bfloat16


def seconds_of(function, device):
    """Seconds that a call of `function` takes, the work that it leaves to a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
