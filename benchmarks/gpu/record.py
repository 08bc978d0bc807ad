"""The file of a part: the outcome of every step so far as JSON, with a plot beside it. Written after each step.

Each result names the machine that it was measured on. This process does not ask for the GPU: its forks could not use it
any more. Knows results and how their kinds are shown. Does not know how they are measured.
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import command
from benchmarks.gpu.steps import Outcome, Step
from benchmarks.report.bar_chart import Chart, svg
from benchmarks.report.rows import Presentation, Row
from handsoff_stream.files.atomic import whole_file

NOT_RUN = "not run"


class Record:
    """What a part has found; `part<N>.json` and `part<N>.svg` in a folder.

    Args:
        part: its number.
        steps: all of its steps.
        device: where they compute.
        folder: of the files. What its `part<N>.json` holds of steps that are done is kept.
    """

    def __init__(self, part: int, steps: Sequence[Step], device: str, folder: Path):
        self.path = folder / f"part{part}.json"
        self._head = {"part": part, "device": device}
        # Imported before the first step is: each is a fork of this process, and need not import them again.
        self._shown_as = {step.name: _presentation(step) for step in steps}
        before = json.loads(self.path.read_text())["steps"] if self.path.exists() else {}
        self._steps: dict[str, dict[str, Any]] = {
            step.name: before.get(step.name, {"state": NOT_RUN, "seconds": 0.0, "result": None, "note": ""})
            for step in steps
        }

    def is_done(self, step: Step) -> bool:
        """Whether the step is done, in this run or an earlier one."""
        return bool(self._steps[step.name]["state"] == "done")

    def add(self, step: Step, outcome: Outcome) -> None:
        """Take the outcome of a step, and write the files."""
        self._steps[step.name] = asdict(outcome)
        self.write()

    def write(self) -> None:
        """Write the JSON file, and the plot if there is something to draw; each is whole or not there."""
        whole = {**self._head, "command": command(), "summary": self.summary(), "steps": self._steps}
        _write_whole(self.path, json.dumps(whole, indent=1) + "\n")
        charts = [chart for name, result in self._results() for chart in _charts(self._shown_as[name], result)]
        if charts:
            _write_whole(self.path.with_suffix(".svg"), svg(charts))

    def finished(self) -> bool:
        """Whether every step is done."""
        return all(step["state"] == "done" for step in self._steps.values())

    def summary(self) -> str:
        """One line: how many steps are done, the first row of each result, and why the others are not."""
        states = [step["state"] for step in self._steps.values()]
        seconds = sum(step["seconds"] for step in self._steps.values())
        found = [_line(self._shown_as[name].rows(result)[0]) for name, result in self._results()]
        missing = [f"{name} {step['state']}" for name, step in self._steps.items() if step["state"] != "done"]
        counted = f"part {self._head['part']}: {states.count('done')} of {len(states)} steps done in {seconds:.0f} s"
        return "; ".join([counted, *found, *missing])

    def _results(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, step["result"]) for name, step in self._steps.items() if step["result"] is not None]


def copy_results(part: Path, folder: Path) -> list[Path]:
    """Write each result of a part's file to a file of its own, as if its benchmark had been run alone; the paths."""
    steps = json.loads(part.read_text())["steps"]
    written = []
    for name, step in steps.items():
        if step["state"] == "done":
            path = folder / f"{name}.json"
            _write_whole(path, json.dumps(step["result"], indent=1) + "\n")
            written.append(path)
    return written


def _presentation(step: Step) -> Presentation:
    shown: Presentation = importlib.import_module(step.module).PRESENTATION
    return shown


def _charts(presentation: Presentation, result: dict[str, Any]) -> Sequence[Chart]:
    return presentation.charts(result) if presentation.charts else ()


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f" ({row.ratio:.3g}x)"
    return f"{row.what}: {row.ours}, against {row.other}{ratio}"


def _write_whole(path: Path, content: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(content)
