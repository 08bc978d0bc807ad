"""The command `handsoff-stream`. Each subcommand calls one function of the package, which scripts can call as well."""

from handsoff_stream.cli import offline, online  # noqa: F401  (importing them registers their commands)
from handsoff_stream.cli.app import app, show_warnings_in_one_line

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `handsoff-stream` command."""
    show_warnings_in_one_line()
    app()
