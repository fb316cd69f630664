"""Errors that a user can fix, how a script ends, and text that any terminal can show."""

import argparse
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Variables with which torch and its libraries round float32 products, choose other kernels, or load files
# otherwise than the scripts ask for.
OVERRIDING = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
              "PYTORCH_TUNABLEOP_ENABLED", "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
              "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # fmt: skip


class UserError(Exception):
    """A mistake that the user can fix: its text names the file or flag and the remedy."""


def starting(name):
    """Let the script of this `__name__` end in one line if its imports are interrupted or miss a package.

    SIGINT ends it at once: half-imported packages would turn KeyboardInterrupt into other exceptions.
    What the environment asks of numerical libraries must make sense, and does not change results.
    """
    if name == "__main__":
        _settle_environment()
        sys.excepthook = _tell_what_is_missing
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as after nohup
            signal.signal(signal.SIGINT, _stop_at_once)


def _settle_environment():
    """End the script at a number of threads that is none: torch would take another one without a word."""
    for name in THREADS:
        value = os.environ.get(name, "")
        if value and not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", value):
            warn(
                f"error: {name}={value} in the environment is no number of threads: unset it, or give one from 1"
            )
            sys.exit(2)
    for name in OVERRIDING:
        os.environ.pop(name, None)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # of cuBLAS and cuDNN: no products of 11 bits, see device.py


def _stop_at_once(*_):
    warn("interrupted")
    os._exit(130)


def _tell_what_is_missing(kind, error, trace):
    """One line on a package that is not installed, after the description that --help asks for."""
    if not isinstance(error, ImportError) or (error.name or "").split(".")[0] in ("lib", "mae"):
        sys.__excepthook__(kind, error, trace)
        return
    asks_for_help = not {"-h", "--help"}.isdisjoint(sys.argv[1:])
    if asks_for_help:
        print(sys.modules["__main__"].__doc__ or "")  # python -OO keeps none
    warn(f"error: {about_missing(error)}")
    sys.exit(0 if asks_for_help else 2)


def about_missing(error):
    """One line on an ImportError of a package: what to install."""
    module = (error.name or str(error)).split(".")[0]
    package, pinned = {"sklearn": "scikit-learn"}.get(module, module), ROOT / "requirements.txt"
    lines = pinned.read_text().split() if pinned.is_file() else []  # predict.py may have been copied without it
    version = next((line for line in lines if line.startswith(f"{package}==")), package)
    if isinstance(error, ModuleNotFoundError):
        return f"{package} is not installed: python -m pip install {version}"
    return f"{package} cannot be imported ({reason_of(error)}): python -m pip install --force-reinstall {version}"


def run_main(main):
    """Run a script's `main` and exit: 0, or one line on stderr and 2 for a user's mistake.

    Any text can be printed: characters that the terminal lacks become backslash escapes, and a
    closed pipe ends the script silently.
    """
    _accept_any_output()
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        with contextlib.suppress(BrokenPipeError):  # the work is done, even if nobody reads the output
            sys.stdout.flush()
    except UserError as error:
        warn(f"error: {error}")
        code = 2
    except BrokenPipeError:
        code = 141  # as the shell reports SIGPIPE
    except OSError as error:  # full disk, missing permission
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        warn(f"error: {where}{error.strerror or error}")
        code = 2
    except KeyboardInterrupt:
        warn("interrupted")
        code = 130
    _discard_unwritten_output()
    sys.exit(code)


def path_argument(text):
    """A path from the command line. An empty one, mostly an unset variable, is refused.

    So is one that no shell has expanded: as the name of an output it would make a folder of that name.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: is a variable of the shell unset?")
    path = Path(text)
    if re.search(r"^~|\*|\$[A-Za-z_{(]", text) and not os.path.lexists(path):
        raise argparse.ArgumentTypeError(
            f"the shell has not expanded {one_line(text)}: leave the quotes out, or no file matches"
        )
    return path


def _accept_any_output():
    """Let stdout and stderr take any text, and swallow it if they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # a stream that is read and written
                stream.reconfigure(errors="backslashreplace")


def warn(text):
    """Print one line on stderr, if anything still reads it."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=sys.stderr, flush=True)


def _discard_unwritten_output():
    """Keep Python from failing at exit because stdout or stderr cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


@contextlib.contextmanager
def named_errors(path, kind):
    """Turn any error that a parser raises on arbitrary bytes into a UserError naming the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # the system's, not a parser's
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        raise UserError(f"{path}: not a usable {kind}: {reason_of(error)}") from None


# Text


def readable(text):
    """`text` as valid Unicode: bytes of a file name that are not UTF-8 become escapes (\\xff)."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", lambda match: ascii(match[0])[1:-1], text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def reason_of(error):
    """The first line of an exception's text, or its type if it has none."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def one_line(text):
    """`readable`, with unprintable characters, such as a newline in a file name, become escapes (\\n)."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in readable(text))
