"""Tables of predictions as files: CSV, or FITS and VOTable through astropy; - is standard output."""

import importlib.util
import sys
from pathlib import Path

from lib.errors import UserError, readable
from lib.files import atomic_write, require_own, write_csv, write_csv_to

STANDARD_OUTPUT = Path("-")
CSV = ("", ".csv", ".txt", ".dat")
OTHERS = {".fits": "fits", ".vot": "votable", ".xml": "votable"}  # as astropy calls them
OWN = rb"\Afile,.*\b(prediction|rms_error)\b|\A(SIMPLE|<\?xml)[\s\S]*\b(prediction|rms_error)\b"


def require_writable(path):
    """UserError if no table can be written at `path`: its kind, a package that is missing, another's file."""
    suffix = path.suffix.lower()
    if suffix not in (*CSV, *OTHERS):
        raise UserError(f"--out {path}: tables are .csv, .fits or .vot files, or - for standard output")
    if suffix in OTHERS and importlib.util.find_spec("astropy") is None:
        raise UserError(f"--out {path}: {suffix} needs astropy: pip install astropy")
    require_own(path, OWN)


def write_table(path, rows):
    """Write rows of text, the header first; columns of numbers are numbers in FITS and VOTable."""
    if path == STANDARD_OUTPUT:
        write_csv_to(sys.stdout, rows)
    elif path.suffix.lower() in CSV:
        write_csv(path, rows)
    else:
        header, *body = rows
        columns = zip(*body, strict=True) if body else [()] * len(header)
        with atomic_write(path) as temporary:
            _astropy_table(header, columns).write(temporary, format=OTHERS[path.suffix.lower()], overwrite=True)


def _astropy_table(header, columns):
    from astropy.table import Table

    table = Table()
    for name, cells in zip(header, columns, strict=True):
        try:
            table[name] = [float(cell) for cell in cells]
        except ValueError:  # FITS has no other letters
            table[name] = [readable(cell).encode("ascii", "backslashreplace").decode() for cell in cells]
    return table
