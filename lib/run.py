"""The folder of a training: lock, config.json, metrics.jsonl, checkpoint and weights."""

import contextlib
import fcntl
import json
import platform
import shlex
import sys
from pathlib import Path

import torch

from lib import data, distributed, weights
from lib.files import UserError, make_folder, write_json, write_text

# Options that do not change the weights: a run may be resumed under others.
FREE_OPTIONS = {"out", "resume", "quiet", "device", "data", "cache_dir", "pretrained"}


class Run:
    """A training's folder, to which the main process alone writes.

    args : the script's options.
    settings : what decides the weights; a checkpoint is resumed under the same settings only.
    checkpoint : state to resume from, or None.
    """

    def __init__(self, args, dataset, **settings):
        self.args, self.out = args, Path(args.out)
        options = {k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}
        described = {"data_fingerprint": dataset.fingerprint, "split": data.SPLIT}
        self.settings = {**options, **described, **settings}
        self.checkpoint_path = self.out / "checkpoint.pth"
        self.checkpoint = self._checkpoint_to_resume() if args.resume else None

    def _checkpoint_to_resume(self):
        """The run's checkpoint, or None; UserError if it is broken or of other settings."""
        if not self.checkpoint_path.exists():
            return None
        try:
            checkpoint = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            before = checkpoint["settings"]
            names = sorted(before.keys() | self.settings.keys())
        except Exception:  # torch raises many kinds for a broken file
            raise UserError(
                f"{self.checkpoint_path} cannot be read: delete it and start again"
            ) from None
        for name in names:
            if before.get(name) != self.settings.get(name):
                raise UserError(
                    f"--resume: the checkpoint in {self.out} has {name} = {before.get(name)}, now "
                    f"it is {self.settings.get(name)}: use the same settings, or start again "
                    "without --resume"
                )
        return checkpoint

    def write_config(self, dataset, **more):
        """Write `config.json`: the command, its options, the data and the versions."""
        if not distributed.is_main():
            return
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        described = {"origin": dataset.origin, "fingerprint": dataset.fingerprint}
        described |= {"class_names": dataset.class_names, "images": len(dataset.labels)}
        write_json(
            self.out / "config.json",
            {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
             "options": options, "data": described, **more, "versions": versions},
        )  # fmt: skip

    def write_metrics(self, history):
        """Write `metrics.jsonl`, a line a validation."""
        if distributed.is_main():
            lines = "".join(json.dumps(line) + "\n" for line in history)
            write_text(self.out / "metrics.jsonl", lines)

    def save_checkpoint(self, state):
        if distributed.is_main():
            weights.save_tensors(self.checkpoint_path, {"settings": self.settings, **state})

    def save_weights(self, file, state, config, class_names, **outcome):
        """Write the weights file, after which the checkpoint is not needed any more."""
        run = {**self.settings, **outcome, "data": str(self.args.data)}
        weights.save(self.out / file, state, config, class_names, run)
        self.checkpoint_path.unlink(missing_ok=True)
        print(f"weights in {self.out / file}")


@contextlib.contextmanager
def open_run(args, dataset, model, transform=None, **settings):
    """Create and lock the folder --out, resume or start in it, and yield its `Run`.

    `model` and `transform` are described in config.json; `settings` are added to `Run.settings`.
    Raises UserError if another run holds the folder, or as `Run` does.
    """
    with _locked(args.out):
        run = Run(args, dataset, **settings)
        more = {"transform": transform} if transform else {}
        run.write_config(dataset, model=model, **more)
        yield run


@contextlib.contextmanager
def _locked(out):
    """Hold a folder. The lock belongs to the process, so a killed process leaves none behind."""
    out = Path(out)
    make_folder(out)
    if not distributed.is_main():
        yield
        return
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is writing into {out}: choose another --out") from None
        yield
