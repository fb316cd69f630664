"""Which names classes may have; the standard library alone.

Class names are options of scripts, and columns and cells of tables: a name must not mean something else there.
"""

from lib.errors import UserError
from lib.guard import UNFAMILIAR

TAKEN = {
    "all", "none",  # what an option says
    # Columns and cells of tables.
    UNFAMILIAR, "file", "prediction", "familiarity", "residual", "row", "class", "label", "labels", "score",
    "cluster", "image", "exact", "selection", "source", "error", "run", "log10_mass", "low", "high",
    "nan", "na", "null", "inf",  # what readers of tables take for a number, or for nothing
}  # fmt: skip
SEPARATORS = ",/\\"  # of tables and paths
FIRST_LETTERS = "=+-@"  # of formulas in spreadsheets, and of options


def check_class_names(names, where, remedy="rename its folder"):
    """UserError if a class has a name that would be taken for something else, or for another class."""
    before = {}
    for name in names:
        reason = _objection_to(name)
        if name.casefold() in before:
            reason = f"it differs from {before[name.casefold()]!r} in upper and lower case at most"
        if reason:
            raise UserError(f"{where}: a class is called {name!r}, but {reason}: {remedy}")
        before[name.casefold()] = name


def _objection_to(name):
    """Why no class should have this name; None if one may."""
    if name.casefold() in TAKEN and name != "all":  # `--classes all` is then this class
        return "the scripts and their tables use this word otherwise"
    if name != name.strip() or not name:
        return "a name must not be empty, or begin or end with a space"
    if name[0] in FIRST_LETTERS:
        return f"a name that begins with {name[0]} is taken for a formula or an option"
    if not name.isprintable():
        return "a name must not have characters that cannot be printed"
    for separator in SEPARATORS:
        if separator in name:
            return f"{separator} separates names in tables and paths"
    return None
