"""The command-line application: arguments that verbs share, and what becomes of errors.

A user's mistake ends in one sentence on stderr and exit code 2; a traceback is a bug of ours.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console

from handsoff_stream.errors import StreamError
from handsoff_stream.precision import Precision

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Endless labelled images from a StyleGAN2 and at most 50 labelled ones, synthesised while you train.",
)
console = Console()

CheckpointArgument = Annotated[str, typer.Argument(help="A name that ships (faces) or a .safetensors file.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: CUDA if there is one.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="exact or fast; default: fast on CUDA, else exact.")]
SeedOption = Annotated[int, typer.Option(help="Which stream; in [0, 2**64).")]

# What a user can get wrong. Anything else is a defect of this program and keeps its traceback.
USER_ERRORS = (ValueError, OSError, StreamError, ImportError)


def plain_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn expected errors into one sentence and exit code 2."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except USER_ERRORS as error:
            if isinstance(error, ImportError):
                error = ImportError(f"{error}; install the optional parts with pip install 'handsoff_stream[all]'")
            print(f"handsoff-stream: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run
