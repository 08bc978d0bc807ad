"""handsoff-stream: each verb is a few lines over a function that scripts can call as well."""

from handsoff_stream.cli import offline, online  # noqa: F401  (they register their verbs)
from handsoff_stream.cli.app import app, show_warnings_in_one_line

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `handsoff-stream` command."""
    show_warnings_in_one_line()
    app()
