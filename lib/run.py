"""The folder of a training: lock, config.json, metrics.jsonl, checkpoint and weights."""

import contextlib
import fcntl
import hashlib
import json
import shlex
import sys
from pathlib import Path

import torch

from lib import datasets, distributed, weights
from lib.errors import UserError, warn
from lib.files import is_hidden, make_folder, write_json, write_text
from lib.provenance import FREE_OPTIONS, circumstances
from lib.simulated import pixels_of

MAPS = f"maps-{16 * '[0-9a-f]'}.npy"  # residual maps of a run, see `Run`

# What a training leaves beside its weights.
LEFT = ("metrics.jsonl", "loss.png", "reconstructions.png", "curves.png")


class Run:
    """A training's folder, to which the main process alone writes.

    args : the script's options.
    file : name of the weights file that the run leaves.
    settings : what decides the weights: the options, and the recipe and `more` in their place. A
        run is resumed under the same settings only.
    maps_path : where the residual maps of these settings are kept until the run is finished.
    checkpoint : state to resume from, or None.
    is_finished : whether --resume or --update found nothing left to do.
    replaces : whether what another run left here is removed, see `write_config`.
    """

    def __init__(self, args, dataset, file, recipe, **more):
        self.args, self.out, self.dataset = args, Path(args.out), dataset
        self.recipe, self.quiet = recipe, args.quiet
        self.weights_path, self.checkpoint_path = self.out / file, self.out / "checkpoint.pth"
        options = {k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}
        described = {"data_fingerprint": dataset.fingerprint, "class_names": dataset.class_names,
                     "split": datasets.SPLIT}  # fmt: skip
        # Through JSON, as in a weights file, so that both compare equal.
        self.settings = json.loads(json.dumps({**options, **recipe._asdict(), **more, **described}))
        identity = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.maps_path = self.out / f"maps-{identity[:16]}.npy"
        checkpoint = self._read_checkpoint() if self.checkpoint_path.exists() else None
        self._refuse_to_overwrite(checkpoint)
        self.checkpoint, self.is_finished, self.replaces = None, False, args.overwrite
        if args.resume or args.update:
            self._look_for_earlier_run(checkpoint)

    def _look_for_earlier_run(self, checkpoint):
        """Find the finished or stopped run of these settings; --update replaces any other one.

        Raises UserError with --resume for a broken checkpoint and for a run of other settings.
        """
        if checkpoint is not None:
            before = checkpoint.get("settings") if "in_blocks" in checkpoint else None
        elif self.weights_path.exists():
            before = self._settings_of_weights()
        else:
            return
        difference = "its settings cannot be read"
        if isinstance(before, dict):
            names = sorted(before.keys() | self.settings.keys())
            pairs = {name: (before.get(name), self.settings.get(name)) for name in names}
            # A switch that is off is as one that an earlier version did not have.
            different = [name for name, (one, other) in pairs.items()
                         if one != other and [one, other] not in ([None, False], [False, None])]  # fmt: skip
            if not different:
                self.checkpoint, self.is_finished = checkpoint, checkpoint is None
                return
            name = different[0]
            difference = f"{name} = {before.get(name)}, now it is {self.settings.get(name)}"
        if self.args.update:
            self.replaces = True
            distributed.say(f"replaces the run in {self.out}: {difference}")
        elif isinstance(before, dict):
            raise UserError(f"--resume: the run in {self.out} has {difference}: use the same settings, or "
                            "--overwrite instead of --resume")  # fmt: skip
        else:
            raise UserError(f"{self.checkpoint_path} is broken or of another version: remove it, or give "
                            "--overwrite instead of --resume, to start again")  # fmt: skip

    def _settings_of_weights(self):
        """Those of the finished run; with --update None if its weights cannot be read."""
        try:
            kept = weights.read(self.weights_path).content["run"]  # the settings and the outcome
        except UserError:
            if not self.args.update:
                raise
            return None
        return {name: kept.get(name) for name in self.settings}

    def _refuse_to_overwrite(self, checkpoint):
        """UserError if the folder holds what this run would replace without --overwrite."""
        ours = (self.weights_path, self.checkpoint_path)
        others = [p for p in self.out.glob("*.pth") if p not in ours and not is_hidden(p.name)]
        if others:
            raise UserError(f"{self.out} holds {others[0].name} of another run: choose another --out")
        if checkpoint and checkpoint.get("weights_file", self.weights_path.name) != self.weights_path.name:
            raise UserError(f"{self.out} holds a stopped run of another script: choose another --out")
        if self.args.resume or self.args.overwrite or self.args.update:
            return
        for path, state in ((self.checkpoint_path, "stopped"), (self.weights_path, "finished")):
            if path.exists():
                raise UserError(f"{self.out} holds a {state} run: give --resume to continue it, --overwrite "
                                "to replace it, or another --out")  # fmt: skip

    def _read_checkpoint(self):
        """The content of the checkpoint; {} if it cannot be read."""
        try:
            content = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises many kinds for a broken file
            return {}
        return content if isinstance(content, dict) else {}

    def write_config(self, **more):
        """Write `config.json`: the command, its options, the data and the versions.

        From here on the folder is of this run: what it `replaces` is removed.
        """
        if not distributed.is_main():
            return
        if self.replaces:
            for path in (self.weights_path, self.checkpoint_path, *map(self.out.joinpath, LEFT)):
                path.unlink(missing_ok=True)
        # Maps of runs that were stopped or killed.
        for path in [*self.out.glob(MAPS), *self.out.glob(".maps-*.tmp.npy")]:
            if path != self.maps_path:
                path.unlink()
        dataset = self.dataset
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        described = {"origin": dataset.origin, "fingerprint": dataset.fingerprint, **pixels_of(dataset.origin)}
        described |= {"class_names": dataset.class_names, "images": len(dataset.labels)}
        write_json(
            self.out / "config.json",
            {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
             "options": options, "recipe": self.recipe._asdict(), "data": described, **more,
             **circumstances()},
        )  # fmt: skip

    def write_metrics(self, history):
        """Write `metrics.jsonl`, a line a validation."""
        if distributed.is_main():
            lines = "".join(json.dumps(line) + "\n" for line in history)
            write_text(self.out / "metrics.jsonl", lines)

    def save_checkpoint(self, state):
        if distributed.is_main():
            about = {"settings": self.settings, "weights_file": self.weights_path.name}
            weights.save_tensors(self.checkpoint_path, {**about, **state})

    def save_weights(self, state, config, seen, familiarity=None, **outcome):
        """Write the weights file and remove the checkpoint.

        `seen` are the hashes of all images that the weights were trained or validated on. For
        `familiarity` see `weights.save`.
        """
        cache_dir = self.args.cache_dir and str(self.args.cache_dir)
        run = {**self.settings, **outcome, "data": str(self.args.data), "cache_dir": cache_dir,
               "made": circumstances(), **pixels_of(self.dataset.origin)}  # fmt: skip
        class_names = self.dataset.class_names
        weights.save(self.weights_path, state, config, class_names, run, seen, familiarity)
        self.maps_path.unlink(missing_ok=True)
        self.checkpoint_path.unlink(missing_ok=True)
        print(f"weights in {self.weights_path}")


@contextlib.contextmanager
def open_run(args, dataset, file, recipe, **more):
    """Create and lock the folder --out, resume or start in it, and yield its `Run`.

    For `recipe` and `more` see `Run.settings`. Raises UserError if another run holds the folder, or
    if it holds what the run would replace without --overwrite.
    """
    folder = Path(args.data).resolve()
    if folder in args.out.resolve().parents and not (folder / "dataset.json").exists():
        raise UserError(f"--out {args.out} lies inside the data: choose a folder outside of it")
    if not any((args.out / name).exists() for name in (".lock", file, "checkpoint.pth")):
        for name in ("config.json", *LEFT):
            if (args.out / name).exists():
                raise UserError(f"{args.out} holds {name}, which no training left there: choose another --out")
    with _locked(args.out):
        run = Run(args, dataset, file, recipe, **more)
        if run.is_finished:
            distributed.say(f"already finished: weights in {run.weights_path}")
        yield run


@contextlib.contextmanager
def _locked(out):
    """Hold a folder. The lock belongs to the process, so a killed process leaves none behind."""
    out = Path(out)
    is_new = not out.exists()
    make_folder(out)
    if not distributed.is_main():
        yield
        return
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing into {out}: choose another --out") from None
        except OSError as error:  # some network file systems have no locks
            warn(f"{out} cannot be locked ({error.strerror}): let no other run write into it")
        try:
            yield
        finally:
            if [path.name for path in out.iterdir()] == [".lock"]:  # the run failed before it wrote anything
                (out / ".lock").unlink()
                if is_new:
                    out.rmdir()
