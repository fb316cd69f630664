"""Several processes of torchrun as one training.

Every process holds the whole network, draws the random numbers of the whole batch and computes its
own share of the images, so that the result does not depend on how many there are. The first one
writes. Without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from files import UserError

SILENCE = timedelta(minutes=10)  # of another process, after which a run ends with an error


def count():
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this process is the one that writes."""
    return rank() == 0


def local_device():
    """Name of the GPU that belongs to this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


@contextlib.contextmanager
def processes(device_name):
    """In this block the processes that torchrun started belong together, and leave it together.

    A process that dies takes the others along: they end with a UserError.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(local_device() if device_name in ("auto", "cuda") else device_name)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=SILENCE)
    try:
        yield
        # None leaves before the first has written: if one fails as it leaves, torchrun ends all.
        wait()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(
                "another process of this run has ended: its message says why; go on with --resume"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


def wait():
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_goes_first():
    """The first process runs the block before the others do: what it leaves behind, they find."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def share(batch_size):
    """Slice of a batch that this process computes. ValueError if it cannot be shared evenly."""
    if batch_size % count():
        raise ValueError(f"a batch of {batch_size} cannot be shared by {count()} processes")
    own = batch_size // count()
    return slice(rank() * own, (rank() + 1) * own)


def gather(own):
    """Shares of a batch (b, ...) of all processes, put together, with gradients to one's own.

    Every process goes on with the whole batch and gets the same gradients behind this point. Those
    in front of it come from one share each: averaging them over the processes, as is done with
    parameters, needs them that much larger.
    """
    if count() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(parts, own.detach().contiguous())
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * count())
    parts[rank()] = own
    return torch.cat(parts)


def gathered_list(own):
    """Lists of all processes, of which process p has the elements p, p + count(), ..., as one."""
    if count() == 1:
        return own
    lists = [None] * count()
    dist.all_gather_object(lists, own)
    return [lists[i % count()][i // count()] for i in range(sum(map(len, lists)))]


def mean(values):
    """Numbers, averaged over the processes."""
    if count() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return (total / count()).tolist()


def decision_of_first(decide):
    """What `decide()` gives in the first process."""
    if count() == 1:
        return decide()
    decision = [decide() if is_first() else None]
    dist.broadcast_object_list(decision)
    return decision[0]


class _Loss(nn.Module):
    def __init__(self, model, batch_loss):
        super().__init__()
        self.model, self.batch_loss = model, batch_loss

    def forward(self, *arguments):
        return self.batch_loss(*arguments)


def averaging(model, batch_loss):
    """`batch_loss`, after whose backward the gradients of `model` are the processes' average."""
    if count() == 1:
        return batch_loss
    # A patch embedding's gradient is laid out in another order than its weights: that may be.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(_Loss(model, batch_loss), forward_sync_buffers=False)
