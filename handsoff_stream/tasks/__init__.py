"""Label types, one per file. `TASKS` maps the name in a checkpoint to its class; a new type adds one line to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handsoff_stream.tasks.base import Task
from handsoff_stream.tasks.depth import Depth
from handsoff_stream.tasks.keypoints import Keypoints, decode_heatmaps
from handsoff_stream.tasks.segmentation import Segmentation

__all__ = ["TASKS", "Depth", "Keypoints", "Segmentation", "Task", "decode_heatmaps", "task_from_config"]

TASKS: dict[str, type[Task]] = {"depth": Depth, "keypoints": Keypoints, "segmentation": Segmentation}


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The task that a description from `Task.config()` stands for.

    Raises:
        ValueError: an unknown name, or other entries than `Task.config()` writes.
    """
    name = config.get("name")
    if name not in TASKS:
        raise ValueError(
            f"task {name!r} is unknown to this version, which knows {sorted(TASKS)}; update it, or correct the name"
        )
    return TASKS[name].from_config(config)
