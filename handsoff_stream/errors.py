"""Errors that callers may want to tell apart. Everything else is a ValueError or TypeError where it arose."""


class CheckpointError(ValueError):
    """A checkpoint file cannot be used: missing, damaged, unsupported, or not what was asked for."""


class StreamError(RuntimeError):
    """A stream cannot go on: no such device here, NaN from a network, or nearly every sample rejected."""
