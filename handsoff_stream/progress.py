"""A progress bar on the terminal. Knows the terminal. Does not know what is being done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(
    description: str, total: int, *, show: bool = True, console: Console | None = None
) -> Iterator[Callable[[int, str], None]]:
    """Yield `update(done, note)`, which sets the number of finished steps and a short note beside the bar.

    Args:
        description: text in front of the bar.
        total: number of steps.
        show: whether to draw a bar; if not, `update` does nothing.
        console: where to draw; None means standard output.
    """
    if not show:
        yield lambda done, note: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
