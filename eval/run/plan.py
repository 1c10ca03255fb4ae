"""What a run asks: questions in batches, under configurations. A run can be extended: what is there stays as it is."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokprune.core.errors import RunError

from ..tasks import Sample, Task
from .lines import Damaged, settings_of, typed
from .rows import Config

INSTEAD = "name another folder with --out, or start over with --overwrite"


@dataclass(frozen=True)
class Plan:
    """Tasks with the batches of their questions, and configurations; those of an earlier run come first."""

    batches: list[tuple[Task, list[list[Sample]]]]
    configs: list[Config]

    @property
    def tasks(self) -> list[tuple[Task, list[Sample]]]:
        """Tasks with all their questions."""
        return [(task, [s for batch in batches for s in batch]) for task, batches in self.batches]

    @property
    def questions(self) -> dict[tuple[str, int], frozenset[str]]:
        """By task and batch the questions of a batch."""
        return {
            (task.name, i): frozenset(s.id for s in batch)
            for task, batches in self.batches
            for i, batch in enumerate(batches)
        }

    def of(self, task: Task) -> list[list[Sample]]:
        """The batches of a task."""
        return next(batches for other, batches in self.batches if other is task)

    def stored(self) -> dict[str, Any]:
        """As run.json holds it: questions with a checksum each, and configurations by label."""
        return {
            "tasks": {
                task.name: [[[s.id, _checksum(s)] for s in batch] for batch in batches]
                for task, batches in self.batches
            },
            "configurations": {c.label: asdict(c) for c in self.configs},
        }


def planned(
    tasks: Sequence[tuple[Task, Sequence[Sample]]], configs: Sequence[Config], batch_size: int, folder: Path | None
) -> Plan:
    """The plan of a new run, or of one that adds to what a folder holds.

    Args:
        tasks: with the questions that were asked for.
        configs: that were asked for.
        batch_size: questions at a time.
        folder: of a run that is added to; None to start over.

    Raises:
        RunError: the folder holds other tasks, or questions that have changed.
    """
    path = folder / "run.json" if folder else None
    there = settings_of(path, "start over with --overwrite") if path and path.is_file() else {}
    old_tasks, old_configs = there.get("tasks", {}), there.get("configurations", {})
    if not isinstance(old_tasks, dict) or not isinstance(old_configs, dict):
        raise RunError(f"{folder} holds a run of an earlier release of tokprune; {INSTEAD}")
    named = [task.name for task, _ in tasks]
    if old_tasks and (more := [name for name in old_tasks if name not in named]):
        every = "name all of its tasks with --task and prompts with --suffix"
        raise RunError(f"{folder} holds {', '.join(more)}, too: {every}, or {INSTEAD}")
    try:
        kept = [typed(Config, values) for values in old_configs.values()]
    except (Damaged, AttributeError, TypeError) as error:
        raise RunError(f"{path} cannot be read as the settings of a run ({error}); {INSTEAD}") from error
    labels = {c.label for c in kept}
    new = [c for c in configs if c.label not in labels]
    return Plan(
        [(task, _batches(task, samples, old_tasks.get(task.name, []), batch_size, folder)) for task, samples in tasks],
        [*kept, *new],
    )


def _batches(
    task: Task, samples: Sequence[Sample], old: Sequence[Any], batch_size: int, folder: Path | None
) -> list[list[Sample]]:
    """Earlier batches as they were, then the other questions that were asked for."""
    if not isinstance(old, list):
        raise RunError(f"{folder} holds a run of an earlier release of tokprune; {INSTEAD}")
    known = {s.id: s for s in task.samples()} if old else {}
    batches = [[_same(task, known, pair, folder) for pair in batch] for batch in old]
    there = {s.id for batch in batches for s in batch}
    others = [s for s in samples if s.id not in there]
    return [*batches, *(others[i : i + batch_size] for i in range(0, len(others), batch_size))]


def _same(task: Task, known: Mapping[str, Sample], pair: Any, folder: Path | None) -> Sample:
    """The question of an earlier run, if it is still the same."""
    try:
        name, checksum = pair
        sample = known.get(name)
    except (TypeError, ValueError) as error:
        raise RunError(f"{folder}/run.json cannot be read as the settings of a run; {INSTEAD}") from error
    if sample is None or _checksum(sample) != checksum:
        what = "is no longer there" if sample is None else "has changed"
        raise RunError(f"question {name} of {task.name} {what} since {folder} was begun; {INSTEAD}")
    return sample


def _checksum(sample: Sample) -> int:
    return zlib.crc32(repr(sample).encode())
