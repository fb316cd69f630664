"""From rows of a packed data set to tensors on the device, and the constants of their transform."""

import contextlib
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from lib import distributed
from lib.augment import augment, disturbances
from lib.images import forget_pages
from mae import IntensityTransform

EVALUATION_BATCH = 256
TRANSFORM_IMAGES = 2000  # training images that the transform's constants are computed from
OUTLYING_PIXELS = 0.001  # of an image, at either end, that its statistics leave out
SOFTENING = 0.01  # of the mean intensity: where the logarithm becomes linear, unless noise does
READ_BLOCK, BLOCKS_TOGETHER = 256, 64  # images, where not all of them fit into memory
MAPPED_BYTES = 2**21  # pages that a kernel may map per image read
FORGET_AFTER = 2**30  # bytes that may stay mapped


def batch_reader(images, device):
    """Function from rows (numpy) to a batch of raw images (b, 1, H, W) on the device.

    A GPU keeps the whole data set if that leaves half of its free memory. Otherwise batches are
    copied while it computes, and the rows must be numpy's.
    """
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
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


@torch.no_grad()
def in_batches(function, rows, bar=None):
    """Concatenate the results of `function` over batches of rows (float32, on the CPU).

    Several processes share the batches, and each gets the whole result. `bar` is the text of a
    live bar on a terminal; None for none.
    """
    starts = range(0, len(rows), EVALUATION_BATCH)
    parts = [rows[i : i + EVALUATION_BATCH] for i in starts]
    own = parts[distributed.rank() :: distributed.world_size()]
    hidden = True if bar is None or not distributed.is_main() else None
    shown = tqdm(own, desc=bar, unit="batch", leave=False, disable=hidden)
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


# Constants of the intensity transform


def fit_transform(images, rows, kind, augmentations=()):
    """Constants of `mae.IntensityTransform` from training images (rows of `images`), as a dict.

    They scale with the unit of the data. The offset is the 0.1 % quantile of an image; the softening is
    a fixed fraction of the mean above it, or the noise if that is larger; mean and std are those of
    the transformed pixels. Each is computed image by image, without the image's 0.1 % faintest and
    brightest pixels, and the median over images is taken: hot pixels and a few bad images change
    nothing. `augmentations` are those of the training.
    """
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), TRANSFORM_IMAGES)).astype(int)]
    # Scattered rows map many pages; read a few rows at a time.
    pixels = in_batches(batch_reader(images, torch.device("cpu")), chosen).double()
    forget_pages(images)
    with fixed_random_numbers():
        pixels = augment(pixels, augmentations).flatten(1).numpy()
    lowest, highest = np.quantile(pixels, [OUTLYING_PIXELS, 1 - OUTLYING_PIXELS], axis=1)
    clipped = pixels.clip(lowest[:, None], highest[:, None])
    smallest = np.finfo(np.float32).tiny
    offset = np.median(lowest)
    above = np.median((clipped - offset).clip(0).mean(axis=1))
    noise = noise_level(pixels.reshape(-1, *images.shape[1:]))
    softening = above if kind in ("sqrt", "linear") else max(SOFTENING * above, noise)
    softening = max(softening, smallest)
    z = IntensityTransform(kind, offset, softening).double()(torch.from_numpy(clipped)).numpy()
    mean = np.median(z.mean(axis=1))
    std = np.median(((z - mean) ** 2).mean(axis=1)) ** 0.5
    constants = {"offset": offset, "softening": softening, "mean": mean, "std": std or 1.0}
    return {"kind": kind, **{name: float(value) for name, value in constants.items()}}


def noise_level(images):
    """Standard deviation of the background noise of images (n, H, W); the median over images.

    It comes from second differences, which are small in smooth images, and from their 10 %
    quantile, which sources hardly change; the factor is that of Gaussian noise.
    """
    inner = images[:, 1:-1, 1:-1]
    vertical = images[:, :-2, 1:-1] + images[:, 2:, 1:-1]
    horizontal = images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    difference = np.abs(inner - (vertical + horizontal) / 4).reshape(len(images), -1)
    if difference.shape[1] == 0:
        return 0.0
    quantile = np.median(np.quantile(difference, 0.1, axis=1))
    return float(quantile / (0.12566 * math.sqrt(1.25)))
