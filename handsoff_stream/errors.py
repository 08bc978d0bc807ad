"""Errors that callers may want to distinguish, and the text that error messages may show.

All other errors are a `ValueError` or `TypeError` raised where they occur. Knows text. Does not know files or networks.
"""

MAX_LINE = 300  # characters in a message


def printable(text: str, limit: int = MAX_LINE) -> str:
    """The text as one line of at most `limit` printable characters; the middle of a longer text is left out.

    Messages and terminals show names, paths and values of untrusted files. Line breaks become spaces; control
    characters, terminal escapes, direction marks and lone surrogates are replaced by escape sequences.
    """
    if len(text) > 4 * limit:
        text = f"{text[: 2 * limit]} ... {text[-2 * limit :]}"
    line = " ".join(text.split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(escaped) <= limit:
        return escaped
    tail = (limit - 5) * 2 // 5  # messages end with the remedy
    return f"{escaped[: limit - 5 - tail]} ... {escaped[-tail:]}"


class CheckpointError(ValueError):
    """A file cannot be used: it is missing, damaged, unsupported, or not what was asked for.

    The message is one printable line, whatever the file contains.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OutputError(OSError):
    """A file or folder cannot be written at its path. What was there before is unchanged."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StreamError(RuntimeError):
    """A stream cannot continue: a missing device, NaN from a network, or nearly all samples rejected."""
