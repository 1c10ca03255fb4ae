"""A task asked with a text added to every question: under several of them, rankings of methods may differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from tokprune.prune.videos import Clip

from . import TASKS, load_task
from .base import Sample, Task


@dataclass(frozen=True)
class Prompted:
    """A task under one of several prompts; its name says which.

    Args:
        task: any.
        suffix: added to every question; may be empty.
    """

    task: Task
    suffix: str

    @property
    def name(self) -> str:
        return f"{self.task.name}{_added(self.suffix)}"

    @property
    def split(self) -> str:
        """As the task has it."""
        return getattr(self.task, "split", "")

    @property
    def checksum(self) -> Callable[[str], int] | None:
        """Of a picture; None for a task whose pictures cannot change."""
        return getattr(self.task, "checksum", None)

    @property
    def where(self) -> Callable[[Sample], str] | None:
        """Where a question was read; None for a task that does not know."""
        return getattr(self.task, "where", None)

    def samples(self) -> list[Sample]:
        return self.asked(self.task.samples())

    def image(self, image_id: str) -> Image.Image | Clip:
        return self.task.image(image_id)

    def train_samples(self) -> list[Sample] | None:
        train = self.task.train_samples()
        return None if train is None else self.asked(train)

    def asked(self, samples: Sequence[Sample]) -> list[Sample]:
        """Questions of the task with the text."""
        return [replace(s, question=s.question + self.suffix) for s in samples]


def _added(suffix: str) -> str:
    """What the name of a task gets."""
    return f" ({prompt_name(suffix)})"


def prompt_name(suffix: str) -> str:
    """What tables call a prompt."""
    return f"suffix {suffix!r}" if suffix else "no suffix"


def name_of(task: str, suffix: str) -> str:
    """The name of the task itself, from that of one under a prompt."""
    return task.removesuffix(_added(suffix))


def embedded_task(name: str, suffixes: Sequence[str] = ()) -> Task | None:
    """A task that is known by its name, also under one of these prompts; None for others, as a folder."""
    if name in TASKS.names():
        return load_task(name)
    for suffix in suffixes:
        if (own := name_of(name, suffix)) in TASKS.names():
            return Prompted(load_task(own), suffix)
    return None
