"""Tasks: samples and pictures. The embedded ones need no network."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from tokprune.core.errors import UnknownNameError
from tokprune.prune.videos import N_FRAMES

from .base import Sample, Task, normalise
from .subset import stratified

TASKS = {
    "easyvqa": "tokprune.eval.tasks.easyvqa:EasyVQA",
    "findit": "tokprune.eval.tasks.findit:FindIt",
    "findit_hd": "tokprune.eval.tasks.findit_hd:FindItHD",
    "watchit": "tokprune.eval.tasks.watchit:WatchIt",
}


def load_task(name: str, n_frames: int = N_FRAMES) -> Task:
    """A task by its name, or a local folder with pictures or videos and a `metadata.jsonl`.

    Of a video in a folder up to `n_frames` frames are taken, evenly spaced.

    Raises:
        UnknownNameError: neither a name nor a folder.
        TaskError: the folder is no task.
    """
    if name in TASKS:
        module, _, attribute = TASKS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    if name.strip() and Path(name).is_dir():
        from .imagefolder import ImageFolder

        return ImageFolder(Path(name), n_frames)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownNameError(
        f"no task named {name!r} and no such folder.{hint} Type {', '.join(sorted(TASKS))}, "
        "or a folder with pictures or videos and a metadata.jsonl"
    )


__all__ = ["TASKS", "Sample", "Task", "load_task", "normalise", "stratified"]
