"""Tables as text."""

from lib.errors import one_line


def markdown(rows):
    """A Markdown table of rows of text, the header first; names of classes and runs stay names."""
    header, *body = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
