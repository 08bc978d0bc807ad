"""Errors that callers may want to tell apart, and what a message may show. Everything else is a ValueError or TypeError
where it arose."""

MAX_LINE = 300  # characters of a message


def printable(text: str, limit: int = MAX_LINE) -> str:
    """One line of printable characters, at most `limit` of them; the middle of a longer text is left out.

    Names, paths and values of foreign files end in messages and on terminals: line breaks become spaces, and control
    characters, terminal escapes, direction marks and lone surrogates their escape sequences.
    """
    if len(text) > 4 * limit:
        text = f"{text[: 2 * limit]} ... {text[-2 * limit :]}"
    line = " ".join(text.split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(escaped) <= limit:
        return escaped
    tail = (limit - 5) * 2 // 5  # remedies stand at the end
    return f"{escaped[: limit - 5 - tail]} ... {escaped[-tail:]}"


class CheckpointError(ValueError):
    """A checkpoint file cannot be used: missing, damaged, unsupported, or not what was asked for.

    The message is one printable line, whatever the file holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OutputError(OSError):
    """A file or folder cannot be written, or not there: what stood there before is untouched."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StreamError(RuntimeError):
    """A stream cannot go on: no such device here, NaN from a network, or nearly every sample rejected."""
