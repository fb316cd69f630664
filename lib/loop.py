"""The one training loop.

`fit` knows nothing of masks or classes: it gets a `Learner`, the `Objective` that it learns for, and a
`Run` with its `Recipe`.
"""

import math
import signal
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lib import distributed
from lib.cuda_graphs import GraphedStep
from lib.device import Precision, choose_precision
from lib.errors import UserError, warn
from lib.loader import are_on_device, larger_than_memory, shuffled
from lib.optim import (
    learning_rate, make_capturable, new_optimizers, parameter_groups, set_learning_rate, update,
)  # fmt: skip

CHECKPOINT_SECONDS = 30.0
# What a checkpoint holds of a `Training` beside its network, optimizers and random numbers.
PROGRESS = ("step", "history", "best", "sums", "steps_since_validation", "in_blocks")


class Learner(NamedTuple):
    """What a training trains.

    model : module whose state is trained and checkpointed.
    learning : its parameters that learn, (name, parameter) pairs; all others are frozen.
    on_device : whether a step needs nothing but what the device holds. Then a GPU gets its rows as a
        tensor there, and a whole step as a CUDA graph.
    in_blocks : see `loader.shuffled`; a resumed run keeps its own.
    changes_at : fractions of the steps from which a step does something else.
    lr_scale : function from a parameter's name to the factor of its learning rate.
    """

    model: nn.Module
    learning: list
    on_device: bool = False
    in_blocks: bool = False
    changes_at: tuple = ()
    lr_scale: callable = lambda name: 1.0


def learner_of(model, learning, dataset, *readers):
    """The `Learner` of a model, and of what of it learns; its steps read what `readers` give of a data set."""
    return Learner(model, learning, are_on_device(*readers), larger_than_memory(dataset.images))


class Objective(NamedTuple):
    """What a training learns for.

    batch_loss : (rows (b,), fraction of the steps done) -> dict of scalar tensors, "loss" among
        them; of several processes each computes its part of the rows.
    validate : () -> dict of numbers; must not draw from torch's global random numbers.
    score : the number of `validate` whose largest value is the best; None: the last weights are kept.
    is_trained : whether the weights that it starts from are one of the states to choose the best from.
    """

    batch_loss: callable
    validate: callable
    score: str | None = None
    is_trained: bool = False


def fit(learner, objective, rows, run, device, precision):
    """Train `learner` on `rows` (n,) by the run's recipe; leaves checkpoints and `metrics.jsonl` in the run.

    Returns (state dict, history: a list of dicts, the lines of metrics.jsonl, line of the state). The
    state is that of the best validation, or the last one without a score.
    Raises UserError if a number is not finite; SystemExit 130 or 143 after SIGINT or SIGTERM, with
    a checkpoint left behind.
    """
    recipe, batch_size = run.recipe, check_batch(run.recipe, rows)
    steps_per_epoch = len(rows) // batch_size
    steps = recipe.epochs * steps_per_epoch
    training = Training(learner, objective, run, device, precision)
    distributed.say(f"{device}: {precision.name}, {precision.attention} attention")
    if training.step:
        distributed.say(f"resumes at step {training.step} of {steps}")
    elif objective.is_trained and objective.score:
        training.validate(0.0)
    # A live line on a terminal, nothing elsewhere.
    hidden = True if run.quiet or not distributed.is_main() else None
    bar = tqdm(total=steps * batch_size, initial=training.step * batch_size, unit="img", unit_scale=True,
               desc=run.out.name, disable=hidden)  # fmt: skip
    judged_by, shown = objective.score or "loss", {}
    with bar, Interruption() as interruption:
        for batch in batches_from(training.step, rows, batch_size, recipe, training.in_blocks):
            lr = learning_rate(training.step, steps, recipe.lr)
            loss = training.take_step(batch, training.step / steps, lr)
            epoch = training.step / steps_per_epoch
            shown |= {"epoch": f"{epoch:.1f}/{recipe.epochs}", "loss": f"{loss:.5f}"}

            # The validations are spread evenly over the steps.
            if training.step * recipe.validations // steps > (training.step - 1) * recipe.validations // steps:
                line = training.validate(round(epoch, 4))
                run.write_metrics(training.history)
                shown[f"validation {judged_by}"] = f"{line[f'validation_{judged_by}']:.5f}"
                if distributed.is_main():
                    left = line["seconds"] * (steps - training.step) / training.step
                    bar.write(f"{as_text(line, recipe.epochs)}; {left:.0f} s left")
            bar.set_postfix(shown, refresh=False)
            bar.update(batch_size)
            is_due = time.perf_counter() - training.saved_at > CHECKPOINT_SECONDS
            if is_due or interruption.signal or training.step == steps:
                training.save_checkpoint()
            if interruption.signal:
                warn(f"stopped at step {training.step} of {steps}: resume with --resume")
                raise SystemExit(128 + interruption.signal)
    run.write_metrics(training.history)
    if objective.is_trained and training.best and training.best["line"]["step"] == 0:
        distributed.say("no later weights are better on validation: those that it started from are kept")
    if training.best:
        return training.best["model"], training.history, training.best["line"]
    return learner.model.state_dict(), training.history, training.history[-1]


def precision_of(run, device, tokens=0):
    """The `Precision` that a run's recipe asks for, see `choose_precision`; a resumed training keeps its own."""
    if run.checkpoint:
        return Precision(*run.checkpoint["precision"])
    return choose_precision(run.recipe.precision, device, tokens)


class Training:
    """The state of a training between two steps: what a checkpoint holds, and how it changes."""

    def __init__(self, learner, objective, run, device, precision):
        self.model, self.objective = learner.model, objective
        self.run, self.device, self.precision = run, device, precision
        groups = parameter_groups(learner.learning, run.recipe.weight_decay, learner.lr_scale)
        self.optimizers = new_optimizers(groups, run.recipe.lr, (0.9, run.recipe.beta2))
        self.loss_of = distributed.averaged(learner.model, objective.batch_loss)
        self.names = []  # of what `loss_of` gives
        self.step, self.history, self.best = 0, [], None
        self.sums, self.steps_since_validation, elapsed = {}, 0, 0.0
        self.in_blocks, self.lr = learner.in_blocks, None
        if run.checkpoint:
            elapsed = self._restore(run.checkpoint)
        self.compute = self.learn
        if learner.on_device and device.type == "cuda" and distributed.world_size() == 1:
            make_capturable(self.optimizers, device)
            self.compute = GraphedStep(self.learn, device, learner.changes_at)
        self.begun, self.saved_at = time.perf_counter() - elapsed, time.perf_counter()

    def _restore(self, checkpoint):
        """Take over a checkpoint's state; returns the seconds that the run has taken so far."""
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # depend on options and device
            optimizer.load_state_dict({**state, "param_groups": groups})
        for name in PROGRESS:
            setattr(self, name, checkpoint[name])
        if checkpoint["device"] != self.device.type:
            distributed.say(f"continues on another device than {checkpoint['device']}: the weights will not "
                            "be those of an uninterrupted run")  # fmt: skip
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)
        return checkpoint["elapsed"]

    def save_checkpoint(self):
        largest = max(p.detach().abs().max().item() for p in self.model.parameters())
        self.require_finite("largest weight", largest)
        on_gpu = self.device.type == "cuda"
        self.run.save_checkpoint({
            **{name: getattr(self, name) for name in PROGRESS},
            "precision": tuple(self.precision),
            "device": self.device.type,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "elapsed": time.perf_counter() - self.begun,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        })  # fmt: skip
        self.saved_at = time.perf_counter()

    def take_step(self, batch, progress, lr):
        """One step on a batch of rows; returns its loss."""
        self.lr = lr
        set_learning_rate(self.optimizers, lr)
        if not self.model.training:
            self.model.train()
        # Every process keeps the same sums, so that a checkpoint of one is a checkpoint of all.
        values = distributed.mean(self.compute(batch, progress).tolist())
        losses = dict(zip(self.names, values, strict=True))
        self.require_finite("training loss", losses["loss"])
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps_since_validation += 1
        self.step += 1
        return losses["loss"]

    def learn(self, batch, progress):
        """Learn from a batch of rows; returns what `batch_loss` gives as one tensor."""
        with self.precision.autocast(self.device):
            losses = self.loss_of(batch, progress)
        update(losses["loss"], self.optimizers, self.precision, self.device)
        self.names = list(losses)
        return torch.stack([value.detach().float() for value in losses.values()])

    def validate(self, epoch):
        """Validate, keep the weights if their score is the best; returns the line of the history."""
        self.model.eval()
        measured, score = self.objective.validate(), self.objective.score
        for name, value in measured.items():
            self.require_finite(f"validation {name}", value)
        line = {
            "epoch": epoch,
            "step": self.step,
            "lr": self.lr,
            **{f"train_{name}": total / self.steps_since_validation for name, total in self.sums.items()},
            **{f"validation_{name}": value for name, value in measured.items()},
            "seconds": round(time.perf_counter() - self.begun, 2),
        }
        self.history.append(line)
        self.sums, self.steps_since_validation = {}, 0
        # Of equals the last: few validation images soon give several epochs the same AUC.
        if score and (self.best is None or measured[score] >= self.best["score"]):
            state = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.best = {"score": measured[score], "model": state, "line": line}
        return line

    def require_finite(self, what, value):
        if not math.isfinite(value):
            path = self.run.checkpoint_path
            raise UserError(
                f"the {what} is not finite at step {self.step} with learning rate {self.lr:.3g}: "
                f"lower --lr or --weight-decay; last good checkpoint: {path if path.exists() else 'none yet'}"
            )


def check_batch(recipe, rows):
    """The images of a batch; UserError unless there are enough rows, and the processes can share it."""
    batch_size = min(recipe.batch_size, len(rows))
    if len(rows) < 2:
        raise UserError("fewer than two training images: give a larger data set")
    if batch_size % distributed.world_size():
        raise UserError(f"a batch of {batch_size} images cannot be split over {distributed.world_size()} "
                        "processes: choose another --batch-size")  # fmt: skip
    return batch_size


def batches_from(first_step, rows, batch_size, recipe, in_blocks):
    """Yield the rows (batch_size,) of every step from `first_step` on; each epoch has its order."""
    steps_per_epoch = len(rows) // batch_size
    first_epoch, position = divmod(first_step, steps_per_epoch)
    for epoch in range(first_epoch, recipe.epochs):
        order = shuffled(rows, np.random.default_rng([recipe.seed, epoch]), in_blocks)
        for place in range(position, steps_per_epoch):
            yield order[place * batch_size : (place + 1) * batch_size]
        position = 0


def as_text(line, epochs):
    """A line of the history as text."""
    values = [f"{name.replace('_', ' ')} {value:.5f}" for name, value in line.items()
              if name.startswith(("train", "validation"))]  # fmt: skip
    return f"epoch {line['epoch']:g}/{epochs}: {', '.join(values)}"


class Interruption:
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

