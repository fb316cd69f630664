"""One training in several processes, started by torchrun.

Every process holds the whole network, draws the random numbers of the whole batch and computes its
own part of the images, so the result does not depend on the number of processes. The main process
(rank 0) writes. Without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lib.errors import UserError, one_line

# A run ends with an error if a process is silent for longer; packing a large folder takes hours.
TIMEOUT = timedelta(hours=12)
# Schedulers set some of these, too; a process that nobody joins would wait for the timeout.
BY_TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """Whether this is the process that writes."""
    return rank() == 0


def say(line):
    """Print a line on standard output, once for all processes."""
    if is_main():
        print(one_line(line))


def local_device():
    """Name of the GPU that belongs to this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


@contextlib.contextmanager
def process_group(device_name):
    """Join the processes that torchrun started; leave the group when the block ends.

    If another process ends early, this one raises UserError.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if any(not os.environ.get(name) for name in BY_TORCHRUN):
        raise UserError("WORLD_SIZE is set, but torchrun has not started this process: unset WORLD_SIZE, or "
                        "start with torchrun")  # fmt: skip
    on_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    if on_gpu:
        name = local_device() if device_name in ("auto", "cuda") else device_name
        try:
            torch.cuda.set_device(name)
        except (RuntimeError, AssertionError, ValueError, AttributeError):  # the last without CUDA
            raise UserError(
                f"{name} is not available here: start as many processes as there are GPUs, or give --device cpu"
            ) from None
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
        # Leave together: torchrun stops all processes if one fails before the main one has written.
        wait()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(
                "another process of this run has ended: its message says why; resume with --resume"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


def wait():
    """Wait until every process gets here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """Run the block in the main process first, then in the others, which find what it left."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def local_slice(batch_size):
    """Slice of a batch that this process computes; ValueError if the batch does not divide."""
    if batch_size % world_size():
        raise ValueError(f"a batch of {batch_size} cannot be split over {world_size()} processes")
    size = batch_size // world_size()
    return slice(rank() * size, (rank() + 1) * size)


def gather(part):
    """The whole batch from each process's part (b, ...); gradients flow to the part of this process.

    Downstream, every process computes the same gradients from the whole batch. Upstream, each has
    the gradients of its part, which DDP averages over the processes; they are multiplied by
    world_size here, to get their sum.
    """
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    if part.requires_grad:
        part.register_hook(lambda gradient: gradient * world_size())
    parts[rank()] = part
    return torch.cat(parts)


def gather_list(part):
    """One list from the processes' lists; process p holds elements p, p + world_size(), ..."""
    if world_size() == 1:
        return part
    lists = [None] * world_size()
    dist.all_gather_object(lists, part)
    return [lists[i % world_size()][i // world_size()] for i in range(sum(map(len, lists)))]


def mean(values):
    """Numbers, averaged over the processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def from_main(compute):
    """What `compute()` returns in the main process, in every process."""
    if world_size() == 1:
        return compute()
    result = [compute() if is_main() else None]
    dist.broadcast_object_list(result)
    return result[0]


class _Loss(nn.Module):
    def __init__(self, model, batch_loss):
        super().__init__()
        self.model, self.batch_loss = model, batch_loss

    def forward(self, *arguments):
        return self.batch_loss(*arguments)


def averaged(model, batch_loss):
    """`batch_loss` whose backward pass averages the gradients of `model` over the processes."""
    if world_size() == 1:
        return batch_loss
    # The patch embedding's gradient has a different memory layout from its weights; harmless.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(_Loss(model, batch_loss), forward_sync_buffers=False)
