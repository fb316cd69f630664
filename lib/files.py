"""Files that survive a crash; the standard library alone."""

import contextlib
import csv
import errno
import glob
import hashlib
import json
import mmap
import os
import platform
import re
import secrets
import shutil
from pathlib import Path
from types import SimpleNamespace

from lib.errors import UserError, readable

CREATOR = "Masked autoencoder for strong gravitational lenses"  # of pictures
PICTURE = CREATOR.encode()  # in the content of a picture, see `require_own`
MAX_JSON_BYTES = 16 * 2**20
FORMULA_STARTS = (*"=+-@＝＋－＠", "\t", "\r", "\n")  # of a cell, in a spreadsheet; some take wide signs
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # by a file system


# Writing


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary name beside `path`; when the block succeeds, flush the file and rename it.

    After a crash `path` is the old file or the new one, never a part. Raises UserError as
    `check_output` does.
    """
    path = Path(path)
    check_output(path)
    temporary = _temporary_name(path)
    try:
        with naming_full_disk(path):
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, path)
            _flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path, replaced=None, pattern=""):
    """Yield a temporary folder beside `path`; when the block succeeds, rename it to `path`.

    `replaced` names a file that `path` holds if it is complete, and allows to replace that folder;
    all paths inside must match `pattern`. Raises UserError if `path` is anything else but an
    empty folder.
    """
    path = Path(path)
    replaces = replaced and (path / replaced).is_file() and not path.is_symlink()
    if replaces:
        inside = (str(entry.relative_to(path)) for entry in path.rglob("*"))
        foreign = next((name for name in inside if not re.fullmatch(pattern, name)), None)
        if foreign:
            raise UserError(f"{path} holds {foreign}, which is not its own: choose another folder")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: remove it or choose another folder")
    make_folder(path.parent)
    temporary = _temporary_name(path)
    make_folder(temporary)
    try:
        with naming_full_disk(path):
            yield temporary
            if replaces:
                (path / replaced).unlink()  # first: half a folder must not look complete
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming_full_disk(path):
    """A UserError that names `path` if its disk fills up."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; free some space") from None


def write_csv(path, rows):
    """Write the rows of an iterator, whose cells are text; UTF-8, see `readable` and `_no_formula`."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        write_csv_to(file, rows)


def write_csv_to(file, rows):
    """`write_csv` into an open text file."""
    # csv itself ends lines with CR LF, for only then it quotes a carriage return in a name. In the
    # file they end with LF: awk would take CR for a part of the last number.
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
    csv.writer(lines).writerows([_no_formula(readable(cell)) for cell in row] for row in rows)


def _no_formula(cell):
    """The cell, with ./ in front if a spreadsheet would compute it: a path then still names its file."""
    if not cell.startswith(FORMULA_STARTS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"./{cell}"
    return cell


def check_output(path):
    """UserError unless a file can be written at `path`; creates its folder."""
    path = Path(path)
    if path.exists() and not path.is_file():  # renaming a file to it would fail or remove a device
        raise UserError(f"cannot write {path}: it is a folder or a device; name a file")
    make_folder(path.parent)


def check_outputs(outputs, inputs):
    """UserError if an output is an input or another output, or cannot be written.

    outputs : {what to call it: path}.
    """
    taken = {identity(path): "a file that is read" for path in inputs}
    for what, path in outputs.items():
        other = taken.setdefault(identity(path), what)
        if other != what:
            raise UserError(f"{what} {path} is also {other}: choose another name")
    for path in outputs.values():
        check_output(path)


def require_own(path, pattern):
    """UserError if there is a file at `path` in whose content `pattern` does not match: it is not ours."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        is_own = re.search(pattern, content)
    if not is_own:
        raise UserError(f"{path} exists, and is no earlier output of this script: remove it or name another file")


def is_own_picture(path):
    """Whether a picture says that it was drawn here."""
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            return PICTURE in file.read(4096)
    return False


def identity(path):
    """What two paths have in common if they name one file."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def make_folder(path):
    """Create a folder and its parents; UserError if that fails or the folder is not writable."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write into folder {path}: change its rights or choose another")


def write_text(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def _temporary_name(path):
    """A name of its own to write under. Removes what killed processes left under such names.

    A process is known to be dead only where its number means the same: on this boot of this machine, among the
    processes that this one sees (containers have theirs).
    """
    prefix = f".{path.stem}.{_place()}-"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp{glob.escape(path.suffix)}"):
        process = leftover.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")


def _place():
    """Names where a process number means one process: host, boot and PID namespace, where the system tells."""
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


# Reading


def is_hidden(path):
    """Whether a part of the path is a hidden name, or the folder __MACOSX that zip files bring."""
    return any(part[:1] == "." or part == "__MACOSX" for part in Path(path).parts)


def read_json(path):
    """The dict in a JSON file; UserError if it is missing, too large, broken or not a dict."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than a description should be; is it the right file?")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; create it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; create it again")
    return value


def sha256_of(path):
    """SHA-256 of a file's content, in hexadecimal; UserError if it is no file or cannot be read."""
    if Path(path).exists() and not Path(path).is_file():  # a FIFO would be waited for
        raise UserError(f"{path} is no file")
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
