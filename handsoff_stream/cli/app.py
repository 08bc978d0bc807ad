"""The command-line application: arguments that verbs share, verbs of many options, and what becomes of errors.

A user's mistake ends in one sentence on stderr and exit code 2; a traceback is a bug of ours.
"""

import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console

from handsoff_stream.errors import StreamError
from handsoff_stream.precision import Precision

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Endless labelled images from a StyleGAN2 and at most 50 labelled ones, synthesized while you train.",
)
console = Console()

CheckpointArgument = Annotated[str, typer.Argument(help="A name that ships (faces) or a .safetensors file.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: CUDA if there is one.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="exact or fast; default: fast on CUDA, else exact.")]
SeedOption = Annotated[int, typer.Option(help="Which stream; in [0, 2**64).")]

# What a user can get wrong. Anything else is a defect of this program and keeps its traceback.
USER_ERRORS = (ValueError, OSError, StreamError, ImportError)


Arguments = TypeVar("Arguments")


def arguments_of(kind: type[Arguments]) -> Callable[[Callable[[Arguments], None]], Callable[..., None]]:
    """Let a verb of many options take them as one object.

    The fields of the dataclass become the verb's arguments and options on the command line, in their order; their
    annotations say which, as those of parameters do elsewhere.
    """
    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)  # type: ignore[arg-type]
    ]

    def decorate(verb: Callable[[Arguments], None]) -> Callable[..., None]:
        @wraps(verb)
        def run(**given: Any) -> None:
            verb(kind(**given))

        # Typer reads the command line off these two.
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


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
