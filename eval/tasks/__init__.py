"""Tasks: samples and pictures. The embedded ones need no network."""

from __future__ import annotations

from pathlib import Path

from tokprune.core import own_code
from tokprune.core.errors import PluginError, UnknownNameError
from tokprune.core.registry import Registry, nearest
from tokprune.prune.videos import N_FRAMES

from .base import Sample, Task, lettered
from .metrics import normalise
from .subset import stratified

TASKS = Registry(
    what="task",
    table={
        "easyvqa": "tokprune.eval.tasks.easyvqa:EasyVQA",
        "findit": "tokprune.eval.tasks.findit:FindIt",
        "findit_hd": "tokprune.eval.tasks.findit_hd:FindItHD",
        "findone": "tokprune.eval.tasks.findone:FindOne",
        "watchit": "tokprune.eval.tasks.watchit:WatchIt",
    },
    group="tokprune.tasks",
)


def load_task(name: str, n_frames: int = N_FRAMES) -> Task:
    """A task by its name, from another package too, a local folder, or a class of one's own ("./file.py:Class").

    A folder holds pictures or videos, and questions in `metadata.jsonl` or `metadata.csv`. Of a video in a folder up
    to `n_frames` frames are taken, evenly spaced.

    Raises:
        UnknownNameError: neither a name nor a folder.
        TaskError: the folder is no task.
        PluginError: another package's task cannot be imported, built or used.
    """
    if name in TASKS.table:
        return TASKS.load(name)()
    is_folder = bool(name.strip()) and Path(name).is_dir()
    if name in TASKS.names() or (own_code.is_reference(name) and not is_folder):
        return _built(name)
    if is_folder:
        from .imagefolder import ImageFolder

        return ImageFolder(Path(name), n_frames)
    near = nearest(name, TASKS.names())
    hint = f" Did you mean {near!r}?" if near else ""
    raise UnknownNameError(
        f"no task named {name!r} and no such folder.{hint} Type {', '.join(TASKS.names())}, a folder with pictures or "
        "videos and a metadata.jsonl or metadata.csv, or ./file.py:Class"
    )


def _built(name: str) -> Task:
    """A task of another package or of a user's own, checked."""
    cls = TASKS.load(name)
    try:
        task = cls()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise PluginError(f"task {name!r} ({cls.__module__}) cannot be built: {said}") from error
    missing = [part for part in ("name", "samples", "image", "train_samples") if not hasattr(task, part)]
    if missing:
        raise PluginError(
            f"task {name!r} ({cls.__module__}.{cls.__name__}) has no {', '.join(missing)}; write what "
            "tokprune.eval.tasks.base.Task lists"
        )
    if task.name != name and ":" not in name:
        raise PluginError(f"task {name!r} calls itself {task.name!r}; use name = {name!r}, by which results go")
    return task


__all__ = ["TASKS", "Sample", "Task", "lettered", "load_task", "normalise", "stratified"]
