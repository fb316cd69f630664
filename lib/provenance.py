"""What a result was made from, kept in the result: an identical one is not made again (--update).

Options, data, weights and code are compared by content, never by time. Trainings are not results in
this sense: they compare all but the code, see `run.Run`.
"""

import contextlib
import datetime
import hashlib
import json
import platform
import subprocess
import sys

from lib.errors import ROOT, UserError
from lib.files import read_json, sha256_of, write_json

LIBRARY = (ROOT / "mae.py", *sorted((ROOT / "lib").glob("*.py")))
# Options of trainings and of other scripts that decide nothing, or name a file whose content counts.
FREE_OPTIONS = {"out", "resume", "overwrite", "update", "quiet", "device", "data", "cache_dir", "pretrained", "weights",
                "predictions"}  # fmt: skip


def circumstances():
    """When, from which commit ("" outside of a clone) and with which versions a result was made.

    They say where a file came from; no decision depends on them.
    """
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = ""
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    versions = {"python": platform.python_version()}
    versions |= {name: sys.modules[name].__version__ for name in ("torch", "numpy", "onnx") if name in sys.modules}
    return {"commit": commit, "date": datetime.date.today().isoformat(), "versions": versions}


def made_from(args, code, **content):
    """What decides a result, as JSON gives it back.

    args : the script's options.
    code : paths of the source files whose change may change the result.
    content : identities of what the script reads, such as `identity_of(dataset)`.
    """
    options = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    digest = hashlib.sha256("".join(map(sha256_of, code)).encode()).hexdigest()
    return json.loads(json.dumps({"options": options, "code": digest, **content}))


def identity_of(dataset):
    """What decides a result of a `datasets.Dataset`."""
    more = [each if each is None else hashlib.sha256(each).hexdigest() for each in (dataset.masses, dataset.coarse)]
    return [dataset.fingerprint, dataset.class_names, dataset.origin, *more]


def is_current(path, made, *others):
    """Whether the result that a JSON file describes was made from `made`; if so, says it on a line.

    The files `others` belong to the result, too.
    """
    try:
        current = read_json(path).get("made_from") == made and all(other.exists() for other in others)
    except UserError:
        return False
    if current:
        print(f"already up to date: {path}")
    return current


def sign(path, made):
    """Add to a JSON file what its result was made from: the last step, when all of it is written."""
    write_json(path, {**(read_json(path) if path.exists() else {}), "made_from": made})


def require_origin(path, *beginnings):
    """UserError if a dataset.json has another origin than one that begins so: only such may be replaced."""
    if path.exists() and not str(read_json(path).get("origin")).startswith(beginnings):
        raise UserError(f"{path.parent} holds other images: remove it or choose another folder")
