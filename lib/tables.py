"""Names of classes and runs in text: whatever they hold, they stay names."""


def shown(name):
    """`name` in one line that every file and terminal can take: what is not printable, escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name
    )


def markdown(rows):
    """A Markdown table of rows of text, the header first."""
    header, *body = [[shown(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
