"""The command-line application: arguments that verbs share, verbs of many options, what becomes of errors, and what
reaches the terminal.

A user's mistake ends in one sentence on stderr and exit code 2; a traceback is a bug of ours. Names and values that
come from files are escaped before they are printed, and are never read as rich's markup.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar, get_type_hints

import torch
import typer
from rich.console import Console
from rich.text import Text

from handsoff_stream.errors import StreamError, printable
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
USER_ERRORS = (ValueError, OSError, StreamError, ImportError, FloatingPointError)
MAX_CELL = 2000  # characters of a table's cell


def tell(text: str) -> None:
    """Print one line; what it holds of files and names is shown as it is, escaped, and never as markup."""
    console.print(Text(printable(text, MAX_CELL)), soft_wrap=True)


def cell(text: str) -> Text:
    """A table's cell that shows what a file says."""
    return Text(printable(text, MAX_CELL))


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
    """Turn expected errors into one printable sentence and exit code 2."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except USER_ERRORS as error:
            print(f"handsoff-stream: {_sentence(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_about_memory(error):
                raise
            print(f"handsoff-stream: not enough memory ({printable(str(error), 120)})", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def show_warnings_in_one_line() -> None:
    """Warnings as a sentence, without the line of code that gave them."""

    def one_line(message: Warning | str, *_: Any) -> str:
        return f"handsoff-stream: {printable(str(message))}\n"

    warnings.formatwarning = one_line  # type: ignore[assignment]


def _sentence(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return printable(f"{error}; install the optional parts with pip install 'handsoff_stream[all]'")
    if hasattr(error, "problems"):  # a set of labelled images, whose problems are listed together, a line each
        return str(error)
    return printable(str(error) or type(error).__name__)


def _is_about_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
