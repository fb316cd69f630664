"""From rows of a packed data set to tensors on the device."""

import contextlib
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from lib import distributed
from lib.augment import augment, disturbances
from lib.npy import forget_pages

EVALUATION_BATCH = 256
READ_BLOCK, BLOCKS_TOGETHER = 256, 64  # images, where not all of them fit into memory
MAPPED_BYTES = 2**21  # pages that a kernel may map per image read
FORGET_AFTER = 2**30  # bytes that may stay mapped
SAMPLED_PIXELS, FEWEST_SAMPLED = 8e7, 50  # of images that statistics come from; 2,000 images of 200 pixels a side


def batch_reader(images, device, once=False):
    """Function from rows (numpy) to a batch of raw images (b, 1, H, W) on the device.

    A GPU keeps the whole data set if that leaves half of its free memory, unless rows are read `once`.
    Otherwise batches are copied while it computes, and the rows must be numpy's.
    """
    if device.type == "cuda" and not once and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return StoredImages(images, device)
    mapped = 0

    def read(rows):
        nonlocal mapped
        batch = torch.from_numpy(np.ascontiguousarray(images[rows])).unsqueeze(1)
        mapped += batch.nbytes + MAPPED_BYTES * len(rows)
        if min(mapped, images.nbytes) > FORGET_AFTER:
            forget_pages(images)
            mapped = 0
        if device.type == "cuda":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch

    return read


class StoredImages:
    """A `batch_reader` of images that are copied to the device once; rows may be a tensor there."""

    def __init__(self, images, device):
        dtype = torch.from_numpy(np.empty(0, images.dtype)).dtype
        self.stored = torch.empty(images.shape, dtype=dtype, device=device)
        for start in range(0, len(images), READ_BLOCK):
            part = np.array(images[start : start + READ_BLOCK])
            self.stored[start : start + READ_BLOCK] = torch.from_numpy(part)
        forget_pages(images)

    def __call__(self, rows):
        return self.stored[torch.as_tensor(rows, device=self.stored.device)].unsqueeze(1)


def are_on_device(*readers):
    """Whether what these `batch_reader`s give is on the device, so that they take rows from there."""
    return all(isinstance(read, StoredImages) for read in readers)


def some_of(rows, count, images):
    """At most `count` of the `rows` of `images` (N, H, W), evenly spread.

    Of large images there are fewer, so that their pixels fit into memory several times over.
    """
    count = min(len(rows), count, max(FEWEST_SAMPLED, int(SAMPLED_PIXELS / math.prod(images.shape[1:]))))
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


@torch.no_grad()
def in_batches(function, rows, bar=None):
    """Concatenate the results of `function` over batches of rows (float32, on the CPU).

    Several processes share the batches, and each gets the whole result. `bar` is the text of a
    live bar on a terminal; None for none.
    """
    starts = range(0, len(rows), EVALUATION_BATCH)
    parts = [rows[i : i + EVALUATION_BATCH] for i in starts]
    mine = parts[distributed.rank() :: distributed.world_size()]
    hidden = True if bar is None or not distributed.is_main() else None
    shown = tqdm(mine, desc=bar, unit="batch", leave=False, disable=hidden)
    results = [function(part).float().cpu() for part in shown]
    return torch.cat(distributed.gather_list(results))


def larger_than_memory(images):
    """Whether this machine cannot keep all `images` in memory while it trains."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return images.nbytes > memory / 2


def shuffled(rows, rng, in_blocks=False):
    """Rows in random order.

    `in_blocks` reads neighbours together: blocks of READ_BLOCK rows come in random order, and the
    rows of BLOCKS_TOGETHER blocks at a time are mixed.
    """
    if not in_blocks:
        return rng.permutation(rows)
    blocks = np.split(np.sort(rows), np.arange(READ_BLOCK, len(rows), READ_BLOCK))
    order = rng.permutation(len(blocks))
    mixed = []
    for start in range(0, len(order), BLOCKS_TOGETHER):
        together = [blocks[i] for i in order[start : start + BLOCKS_TOGETHER]]
        mixed.append(rng.permutation(np.concatenate(together)))
    return np.concatenate(mixed)


@contextlib.contextmanager
def fixed_random_numbers(seed=0):
    """In this block torch draws the same numbers every time; its state is restored.

    That goes for the CPU and for the GPU in use.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed all GPUs
        if gpus:
            torch.cuda.manual_seed(seed)
        yield


def read_disturbed(read, batch, kinds):
    """Images of a batch of rows as training sees them, without what `augment.SYMMETRIES` do.

    The disturbances of a batch are the same at every call, whichever process makes it.
    """
    with fixed_random_numbers(int(batch[0])):
        return augment(read(batch), disturbances(kinds))
