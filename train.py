"""The one training loop, and what pre-training and fine-tuning share around it.

`fit` knows nothing of masks or classes: it is handed the parameters that learn, a function that
gives the loss of a batch, and a function that validates.
"""

import argparse
import contextlib
import copy
import ctypes
import fcntl
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import distributed
import weights
from augment import KINDS as AUGMENTATIONS
from augment import augment
from files import UserError, forget_pages, make_folder, write_json, write_text
from mae import ATTENTION_FORMS, TRANSFORM_KINDS, IntensityTransform, set_attention_form
from optim import Muon

TRANSFORM_IMAGES = 2000  # training images that the transform's constants are taken from
OUTLYING_PIXELS = 0.001  # of an image, at either end, that its figures are taken without
SOFTENING = 0.01  # of the mean intensity: where the logarithm becomes linear, if noise does not
BATCHNORM_IMAGES = 2048  # training images that BatchNorm's statistics are taken from
EVALUATION_BATCH = 256
MOST_VALIDATIONS = 50  # unless --validations says otherwise
CHECKPOINT_SECONDS = 30.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
READ_BLOCK, BLOCKS_TOGETHER = 256, 64  # images, where not all of them fit into memory
MAPPED_BYTES = 2**21  # that a kernel may map where it is asked for a few
FORGET_AFTER = 2**30  # bytes that may be mapped, until they are given back


class Precision(NamedTuple):
    """How a step is computed: number format of the matrix products and attention kernel."""

    name: str  # "float32" or "bfloat16"
    attention: str

    def autocast(self, device):
        enabled = self.name == "bfloat16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


# Options


def add_model_arguments(parser):
    """The geometry of a network that starts from random weights."""
    group = parser.add_argument_group("network")
    group.add_argument("--patch-size", type=int, default=8, help="pixels a side of a patch")
    group.add_argument("--embed-dim", type=int, default=128, help="width of the encoder")
    group.add_argument("--depth", type=int, default=4, help="blocks of the encoder")
    group.add_argument("--num-heads", type=int, default=4, help="attention heads of the encoder")
    group.add_argument(
        "--transform", choices=TRANSFORM_KINDS, default="log",
        help="intensity scale that the network sees",
    )  # fmt: skip


def add_training_arguments(parser):
    """How the loop runs; the values differ between pre-training and fine-tuning."""
    group = parser.add_argument_group("training")
    group.add_argument("--out", type=Path, required=True, help="folder of the run")
    group.add_argument(
        "--epochs", type=int, default=None,
        help="passes over the training images (default: what suits many images; more for few)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=64, help="images a step")
    group.add_argument("--lr", type=float, default=None, help="largest learning rate")
    group.add_argument("--weight-decay", type=float, default=0.05, help="on matrices")
    group.add_argument(
        "--validations", type=int, default=None, metavar="N",
        help="how often validation is looked at in all (default: once an epoch, "
        f"{MOST_VALIDATIONS} times at most)",
    )  # fmt: skip
    group.add_argument(
        "--augment", type=_augmentations, default="halfturn", metavar="KIND,...",
        help="change training images at random, in place of the default: none, or any of "
        f"{','.join(AUGMENTATIONS)} (the lens, the shear and the source are symmetric under half "
        "a turn)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of weights, order, masks and dropout")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="number format of training; auto measures which is fastest here",
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--resume", action="store_true", help="go on from the run's checkpoint, if there is one"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _augmentations(text):
    kinds = () if text == "none" else tuple(kind for kind in text.split(",") if kind)
    for kind in kinds:
        if kind not in AUGMENTATIONS:
            raise argparse.ArgumentTypeError(f"{kind!r} is not among {', '.join(AUGMENTATIONS)}")
    return kinds


def enough_epochs(usual, fewest_steps, images, batch_size):
    """`usual` epochs, or as many as make `fewest_steps` steps where the images are few."""
    steps_per_epoch = max(1, images // batch_size)
    return max(usual, math.ceil(fewest_steps / steps_per_epoch))


def check_arguments(args):
    """UserError, naming the flag, for numbers that make no sense."""
    for name in ("epochs", "batch_size", "validations", "patch_size", "embed_dim",
                 "num_heads", "decoder_embed_dim", "decoder_num_heads"):  # fmt: skip
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("seed", "weight_decay", "depth", "decoder_depth"):
        value = getattr(args, name, None)
        if value is not None and not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    for name in ("lr", "mlp_ratio"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")


def new_network(kind, config):
    """`kind(**config)`, `MAE` or `Classifier`; UserError where options and images do not fit."""
    patch_size, img_size = config["patch_size"], config["img_size"]
    if img_size % patch_size:
        raise UserError(
            f"--patch-size {patch_size} does not divide the image size {img_size}: "
            "choose one that does"
        )
    try:
        return kind(**config)
    except ValueError as error:
        raise UserError(f"these network options do not fit together: {error}") from None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the example at the end as it was written."""


# Device and precision


def resolve_device(name):
    """torch.device of "auto", "cpu", "cuda" or "cuda:N"; UserError if it is not there."""
    if name == "auto":
        name = distributed.local_device() if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use auto or cpu") from None
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors for the next ones.

    As it comes, glibc gives large pieces back to the kernel, which clears every page of them anew,
    step after step: up to a third of a step's time. Nothing happens where there is no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def bfloat16_is_fast(device):
    """Whether this machine multiplies matrices faster in bfloat16 than in float32: measured."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for repeat in range(6):  # in turn, so that both meet the same disturbances; the first warms up
        for dtype, before in seconds.items():
            a = torch.ones(256, 256, dtype=dtype, device=device)
            took = seconds_of(lambda a=a: a @ a, device)
            seconds[dtype] = min(before, took) if repeat else math.inf
    return seconds[torch.bfloat16] < seconds[torch.float32]


def seconds_of(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def choose_precision(wanted, model, batch_loss, device):
    """Time a step in every form that the machine offers; return the fastest whose loss agrees.

    `wanted` is "auto", "float32" or "bfloat16"; `batch_loss()` gives the loss of one batch.
    Weights, gradients and random numbers are left as they were. A format that is named is taken
    unmeasured, and a measured one must be clearly faster to displace the one before: forms round
    differently, and the same command should give the same weights twice.

    Several processes decide by the first one's matrix products alone.

    Returns (`Precision`, {`Precision`: seconds}), the latter empty where nothing was measured.
    """
    if wanted == "auto" and distributed.count() > 1:
        is_fast = distributed.decision_of_first(lambda: bfloat16_is_fast(device))
        wanted = "bfloat16" if is_fast else "float32"
    if wanted != "auto":
        # In bfloat16 the backward of the fused kernel is slow on CPUs.
        fused = wanted == "float32" or device.type == "cuda"
        return Precision(wanted, "fused" if fused else "plain"), {}
    names = ["float32", "bfloat16"] if bfloat16_is_fast(device) else ["float32"]
    candidates = [Precision(name, form) for name in names for form in ATTENTION_FORMS]
    state = copy.deepcopy(model.state_dict())
    losses, seconds = {}, dict.fromkeys(candidates, math.inf)

    def step(precision):
        set_attention_form(model, precision.attention)
        with precision.autocast(device):
            loss = batch_loss()
        loss.backward()
        losses[precision] = loss.item()
        model.zero_grad(set_to_none=True)

    devices = [device] if device.type == "cuda" else []
    deadline = time.perf_counter() + 8.0
    with torch.random.fork_rng(devices):
        for repeat in range(4):  # the first warms up
            for precision in candidates:
                torch.manual_seed(0)
                took = seconds_of(lambda p=precision: step(p), device)
                if repeat:
                    seconds[precision] = min(seconds[precision], took)
            if repeat and time.perf_counter() > deadline:
                break
    model.load_state_dict(state)

    reference = losses[candidates[0]]
    chosen = candidates[0]
    for precision in candidates[1:]:
        # The second term: rounding may be a large part of a trained network's small loss.
        agrees = abs(losses[precision] - reference) <= 0.02 * abs(reference) + 0.002
        if agrees and seconds[precision] < 0.85 * seconds[chosen]:
            chosen = precision
    return chosen, seconds


# Data on its way to the network


def batch_reader(images, device):
    """Function from rows (numpy) to a batch of raw images (b, 1, H, W) on the device.

    A GPU keeps the whole data set, if that leaves half of its free memory; else batches are copied
    while it computes.
    """
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return reader_of_stored(images, device)
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


def reader_of_stored(images, device):
    """A `batch_reader` of images that are copied to the device once."""
    stored = torch.empty(images.shape, device=device)
    for start in range(0, len(images), READ_BLOCK):
        part = np.array(images[start : start + READ_BLOCK])
        stored[start : start + READ_BLOCK] = torch.from_numpy(part)
    forget_pages(images)
    return lambda rows: stored[torch.as_tensor(rows, device=device)].unsqueeze(1)


def larger_than_memory(images):
    """Whether this machine will hardly keep all `images` in its memory while it trains."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return images.nbytes > memory / 2


def shuffled(rows, rng, in_blocks=False):
    """Rows in random order.

    `in_blocks`, neighbours are drawn together, to be read together: blocks of READ_BLOCK rows come
    in random order, and BLOCKS_TOGETHER of them at a time are mixed.
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
def same_random_numbers():
    """In this block torch draws (on the CPU) what it always draws here; afterwards as before."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


def fit_transform(images, rows, kind, augmentations=()):
    """Constants of `IntensityTransform` from training images (rows of `images`), as a dict.

    They follow the unit of the data: the offset is the 0.1 % quantile of an image, the softening a
    fixed share of the mean above it or the noise if that is larger, and mean and std those of the
    transformed pixels. Each figure is taken image by image, without the image's 0.1 % faintest and
    brightest pixels, and the median over images counts: hot pixels and a few bad images change
    nothing. `augmentations` are those that training will use.
    """
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), TRANSFORM_IMAGES)).astype(int)]
    # Scattered rows map many pages; read a few rows at a time.
    pixels = in_batches(batch_reader(images, torch.device("cpu")), chosen).double()
    forget_pages(images)
    with same_random_numbers():
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
    """Standard deviation of the background noise of images (n, H, W); their median.

    From the second differences, which smooth images hardly have: their 10 % quantile, where it
    would be for Gaussian noise, so that sources do not count.
    """
    inner = images[:, 1:-1, 1:-1]
    vertical = images[:, :-2, 1:-1] + images[:, 2:, 1:-1]
    horizontal = images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    difference = np.abs(inner - (vertical + horizontal) / 4).reshape(len(images), -1)
    if difference.shape[1] == 0:
        return 0.0
    quantile = np.median(np.quantile(difference, 0.1, axis=1))
    return float(quantile / (0.12566 * math.sqrt(1.25)))


@torch.no_grad()
def in_batches(function, rows, batch_size=EVALUATION_BATCH):
    """`function` over rows, some at a time, the results (float32, on the CPU) put together.

    Several processes share the work, and each has all of the result.
    """
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    own = parts[distributed.rank() :: distributed.count()]
    results = [function(part).float().cpu() for part in own]
    return torch.cat(distributed.gathered_list(results))


@torch.no_grad()
def reestimate_batchnorm(model, forward, rows):
    """Take BatchNorm's running statistics afresh from training rows, everything else as in use.

    The bias in front of a BatchNorm has no gradient, Adam lets it wander, and running means lag
    behind it: without this, validation may look like chance while training goes well.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches
        norm.train()
    # Rows may come sorted by class: every batch must hold all of them, or variances are too small.
    chosen = np.random.default_rng(0).permutation(rows)[:BATCHNORM_IMAGES]
    batch = min(EVALUATION_BATCH, len(chosen))
    for start in range(0, len(chosen) - batch + 1, batch):
        forward(chosen[start : start + batch])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


# Optimiser


def parameter_groups(named_parameters, weight_decay, lr_scale=lambda name: 1.0):
    """Groups of parameters: matrices with weight decay, everything else without.

    `lr_scale(name)` multiplies the learning rate of a parameter.
    """
    groups = {}
    for name, parameter in named_parameters:
        is_matrix = parameter.ndim > 1 and not name.endswith("_token")
        key = (lr_scale(name), is_matrix)
        decay = weight_decay if is_matrix else 0.0
        group = {"params": [], "lr_scale": key[0], "matrix": is_matrix, "weight_decay": decay}
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def new_optimizers(groups, lr, betas):
    """Muon for the matrices of `groups` and AdamW for the rest, as far as there are any."""
    matrices = [group for group in groups if group["matrix"]]
    others = [group for group in groups if not group["matrix"]]
    optimizers = [Muon(matrices, lr)] if matrices else []
    return optimizers + ([torch.optim.AdamW(others, lr, betas, fused=True)] if others else [])


def update(loss, optimizers, precision, device):
    """Let the parameters take a step down the gradient of `loss`."""
    loss.backward()
    with precision.autocast(device):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def learning_rate(step, steps, peak, warmup_share=0.05):
    """Linear warm-up over the first share of the steps, then a cosine to zero."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# The run's folder


@contextlib.contextmanager
def run_folder(out):
    """Make a run's folder and hold it: a second run into it is refused while this one lives.

    The lock belongs to the process, so one that was killed leaves none behind. Of several processes
    of one run the first holds it.
    """
    out = Path(out)
    make_folder(out)
    if not distributed.is_first():
        yield out
        return
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is writing into {out}: choose another --out") from None
        yield out


def write_config(out, args, dataset, **more):
    """Leave `config.json`: the options, the data and the versions behind a run."""
    if not distributed.is_first():
        return
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    described = {"origin": dataset.origin, "fingerprint": dataset.fingerprint}
    described |= {"class_names": dataset.class_names, "images": len(dataset.labels)}
    write_json(
        Path(out) / "config.json",
        {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
         "options": options, "data": described, **more, "versions": versions},
    )  # fmt: skip


def settings_of(args, dataset, **more):
    """What decides a run's weights: a checkpoint goes on only under the same."""
    free = {"out", "resume", "quiet", "device", "data", "cache_dir", "pretrained"}
    settings = {k: v for k, v in vars(args).items() if k not in free}
    return {**settings, "data_fingerprint": dataset.fingerprint, "split": data.SPLIT, **more}


def checkpoint_to_resume(args, settings):
    """The checkpoint in --out, or None if there is none or --resume was not given.

    Raises UserError, naming the setting, if it is of other settings than `settings`.
    """
    checkpoint = weights.load_checkpoint(args.out) if args.resume else None
    before = checkpoint["settings"] if checkpoint else settings
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"--resume: the checkpoint in {args.out} has {name} = {before.get(name)}, now it "
                f"is {settings.get(name)}: use the same settings, or start anew without --resume"
            )
    return checkpoint


class _Interruption:
    """Remembers SIGINT or SIGTERM, so that the loop can stop between two steps."""

    def __enter__(self):
        self.signal = None
        kinds = (signal.SIGINT, signal.SIGTERM)
        self.before = {kind: signal.signal(kind, self._remember) for kind in kinds}
        return self

    def _remember(self, kind, _):
        self.signal = kind

    def __exit__(self, *_):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


# The loop


def fit(
    model,
    groups,
    batch_loss,
    validate,
    rows,
    *,
    args,
    settings,
    checkpoint,
    device,
    betas=(0.9, 0.999),
    score=None,
    in_blocks=False,
):
    """Train `model`, leaving checkpoints and `metrics.jsonl` in the run's folder.

    Parameters
    ----------
    model : module whose state is trained, checkpointed and returned.
    groups : what learns, see `parameter_groups`.
    batch_loss : (rows (b,), share of the steps done) -> dict of scalar tensors, "loss" among them;
        of several processes each computes its share of the rows.
    validate : () -> dict of numbers; must not draw from torch's global random numbers.
    rows : (n,) int, the training rows.
    args : options of `add_training_arguments`.
    settings : see `settings_of`.
    checkpoint : see `checkpoint_to_resume`.
    score : validation dict -> number; the weights with the largest are returned. None: the last.
    in_blocks : see `shuffled`.

    Returns (state dict, history: a list of dicts, the lines of metrics.jsonl, `Precision`).
    Raises UserError if the loss is not finite; SystemExit 130 or 143 after SIGINT or SIGTERM, with
    a checkpoint left behind.
    """
    out, batch_size = args.out, min(args.batch_size, len(rows))
    if len(rows) < 2:
        raise UserError("fewer than two training images: give a larger data set")
    if batch_size % distributed.count():
        raise UserError(
            f"--batch-size {batch_size} cannot be shared by {distributed.count()} processes"
        )
    steps_per_epoch = len(rows) // batch_size
    steps = args.epochs * steps_per_epoch
    validations = args.validations or min(args.epochs, MOST_VALIDATIONS)

    if checkpoint:
        precision = Precision(*checkpoint["precision"])
        how = "as in the checkpoint"
    else:
        model.train()
        sample = rows[:batch_size]
        precision, seconds = choose_precision(
            args.precision, model, lambda: batch_loss(sample, 0.0)["loss"], device
        )
        timings = [f"{p.name}/{p.attention} {1e3 * t:.0f} ms" for p, t in seconds.items()]
        how = ", ".join(timings) or "as asked"
    first = distributed.is_first()
    if first:
        print(f"{device}: {precision.name}, {precision.attention} attention ({how})")
    set_attention_form(model, precision.attention)

    optimizers = new_optimizers(groups, args.lr, betas)
    history, best, sums, since, start, elapsed = [], None, {}, 0, 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        history, best, sums = checkpoint["history"], checkpoint["best"], checkpoint["sums"]
        since, start, elapsed = checkpoint["since"], checkpoint["step"], checkpoint["elapsed"]
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
        if first:
            print(f"goes on at step {start} of {steps}")

    begun = time.perf_counter() - elapsed
    averaged_loss = distributed.averaging(model, batch_loss)

    def save_checkpoint(step):
        content = {
            "settings": settings,
            "precision": tuple(precision),
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "history": history,
            "best": best,
            "sums": sums,
            "since": since,
            "step": step,
            "elapsed": time.perf_counter() - begun,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        weights.save_checkpoint(out, content)

    bar = tqdm(
        total=steps * batch_size, initial=start * batch_size, unit="img", unit_scale=True,
        desc=Path(out).name,
        disable=True if args.quiet or not first else None,  # None: unless it is a terminal
    )  # fmt: skip
    shown = {}
    saved_at, order, order_epoch = time.perf_counter(), None, None
    with bar, _Interruption() as interruption:
        for step in range(start, steps):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng([args.seed, epoch])
                order = shuffled(rows, rng, in_blocks)
                order_epoch = epoch
            lr = learning_rate(step, steps, args.lr)
            for group in itertools.chain.from_iterable(o.param_groups for o in optimizers):
                group["lr"] = lr * group["lr_scale"]

            model.train()
            with precision.autocast(device):
                batch = order[position * batch_size : (position + 1) * batch_size]
                losses = averaged_loss(batch, step / steps)
            loss = losses["loss"].item()
            _require_finite("training loss", loss, step, lr, out)
            update(losses["loss"], optimizers, precision, device)

            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            since += 1
            bar.update(batch_size)
            if step % 10 == 0:
                shown["epoch"] = f"{step / steps_per_epoch:.1f}/{args.epochs}"
                bar.set_postfix(shown | {"loss": f"{loss:.5f}"}, refresh=False)

            done = step + 1
            if done * validations // steps > step * validations // steps:
                model.eval()
                measured = validate()
                for name, value in measured.items():
                    _require_finite(f"validation {name}", value, step, lr, out)
                means = distributed.mean([total / since for total in sums.values()])
                seconds = time.perf_counter() - begun
                line = {
                    "epoch": round(done / steps_per_epoch, 4),
                    "step": done,
                    "lr": lr,
                    **{f"train_{name}": mean for name, mean in zip(sums, means, strict=True)},
                    **{f"validation_{name}": value for name, value in measured.items()},
                    "seconds": round(seconds, 2),
                }
                history.append(line)
                sums, since = {}, 0
                if score and (best is None or score(measured) > best["score"]):
                    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                    best = {"score": score(measured), "model": state}
                key = "macro_auc" if "macro_auc" in measured else "loss"
                shown[f"validation {key}"] = f"{measured[key]:.5f}"
                if first:
                    _write_metrics(out, history)
                    _report(bar, line, args.epochs, seconds * (steps - done) / done)
            stop = interruption.signal
            due = time.perf_counter() - saved_at > CHECKPOINT_SECONDS
            if due or stop or done == steps:
                largest = max(p.detach().abs().max().item() for p in model.parameters())
                _require_finite("largest weight", largest, step, lr, out)
                if first:
                    save_checkpoint(done)
                saved_at = time.perf_counter()
            if stop:
                print(f"stopped at step {done} of {steps}: go on with --resume", file=sys.stderr)
                raise SystemExit(128 + stop)
    if first:
        _write_metrics(out, history)
    state = best["model"] if best else model.state_dict()
    return state, history, precision


def _require_finite(what, value, step, lr, out):
    if not math.isfinite(value):
        kept = next((path for path in weights.checkpoint_paths(out) if path.exists()), "none yet")
        raise UserError(
            f"the {what} is not finite at step {step} with learning rate {lr:.3g}: lower --lr; "
            f"last good checkpoint: {kept}"
        )


def _write_metrics(out, history):
    write_text(Path(out) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def _report(bar, line, epochs, seconds_left):
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value:.5f}"
        for name, value in line.items()
        if name.startswith(("train", "validation"))
    )
    bar.write(f"epoch {line['epoch']:g}/{epochs}: {shown}; {seconds_left:.0f} s left")
