"""The command-line application: shared options, commands with many options, error messages and terminal output.

A user's mistake ends in one sentence on stderr and exit code 2, Ctrl-C in one that says how to go on and exit code 130;
a traceback is a bug of this package. Names and values that come from files are escaped before they are printed, and are
never interpreted as rich's markup.

Knows typer and the terminal. Does not know what the commands do.
"""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import torch
import typer
from rich.console import Console
from rich.text import Text

from handsoff_stream import __version__
from handsoff_stream.errors import StreamError, printable
from handsoff_stream.precision import Precision

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Endless labelled images from a StyleGAN2 and at most 50 labelled ones, synthesized while you train.",
)
console = Console()

CheckpointArgument = Annotated[
    str, typer.Argument(help="Name of an included checkpoint (faces), or a .safetensors file.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; default: CUDA if available.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="exact or fast; default: fast on CUDA, else exact.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the random numbers, in [0, 2**64).")]

# Errors that a user can cause. Any other error is a defect of this program and keeps its traceback.
USER_ERRORS = (ValueError, OSError, StreamError, ImportError, FloatingPointError)
INTERRUPTED = 130  # as shells give it: 128 and the number of SIGINT
NOTHING_WRITTEN = "nothing was written; repeat the command to begin again"
REPEAT = "what is finished is kept; repeat the command to go on"
MAX_CELL = 2000  # characters in a table cell or a printed line


def tell(text: str) -> None:
    """Print one line, with unprintable characters escaped; nothing in it is interpreted as markup."""
    console.print(Text(printable(text, MAX_CELL)), soft_wrap=True)


def cell(text: str) -> Text:
    """A table cell with text from a file, escaped and never interpreted as markup."""
    return Text(printable(text, MAX_CELL))


def _print_version(wanted: bool) -> None:
    if wanted:
        tell(f"handsoff-stream {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command."""


Arguments = TypeVar("Arguments")


def arguments_of(kind: type[Arguments]) -> Callable[[Callable[[Arguments], None]], Callable[..., None]]:
    """A decorator for a command that takes its many options as one object.

    The fields of the dataclass `kind` become the command's arguments and options on the command line, in their order.
    Their annotations are typer's, as for the parameters of other commands.
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

        # Typer derives the command line from these two.
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def plain_errors(go_on: str = NOTHING_WRITTEN) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that turns expected errors and interruptions of a command into one printable sentence.

    Args:
        go_on: what an interrupted command leaves, and how to go on.

    Raises:
        typer.Exit: by the decorated command, with code 2 after a user's mistake or for lack of memory, and with code
            130 after an interruption (Ctrl-C).
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @wraps(verb)
        def run(*args: Any, **kwargs: Any) -> None:
            interruptions: list[int] = []
            try:
                with _noted(interruptions):
                    verb(*args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                if interruptions or isinstance(error, KeyboardInterrupt):
                    _end(f"interrupted; {go_on}", INTERRUPTED)
                if isinstance(error, USER_ERRORS):
                    _end(_sentence(error), 2)
                if _is_about_memory(error):
                    _end(f"not enough memory ({printable(str(error), 120)})", 2)
                raise

        return run

    return decorate


@contextmanager
def _noted(interruptions: list[int]) -> Iterator[None]:
    """Note each SIGINT beside raising KeyboardInterrupt, which some compiled code turns into an error of its own."""

    def note(number: int, _: FrameType | None) -> None:
        interruptions.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(sentence: str, code: int) -> NoReturn:
    print(f"handsoff-stream: {sentence}", file=sys.stderr)
    raise typer.Exit(code) from None


def show_warnings_in_one_line() -> None:
    """From now on print warnings as one sentence, without the line of code that issued them."""

    def one_line(message: Warning | str, *_: Any) -> str:
        return f"handsoff-stream: {printable(str(message))}\n"

    warnings.formatwarning = one_line  # type: ignore[assignment]


def _sentence(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return printable(f"{error}; install the optional packages with pip install 'handsoff_stream[all]'")
    if hasattr(error, "problems"):  # labelled images, whose problems are listed together, one per line
        return str(error)
    return printable(str(error) or type(error).__name__)


def _is_about_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
