"""The trials file of a search: every schedule that was evaluated, so that a search that was cut off goes on.

The first line holds the settings, every other one a point. A search asks for the same points in the same order whenever
it is begun, so what stands here is looked up instead of evaluated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from ..run.lines import Damaged, rows_of, typed
from ..run.locks import hold

Counts = Mapping[int, int]  # visual tokens left from a layer on, of the largest picture; empty is the bare model


@dataclass(frozen=True)
class Point:
    """One evaluated schedule.

    Args:
        key: what `key_of` makes of it.
        right: answers that were right.
        n: questions.
        tokens: visual tokens in every decoder layer, mean over the questions.
    """

    key: str
    right: int
    n: int
    tokens: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Of 1."""
        return self.right / self.n


def key_of(counts: Counts) -> str:
    """A schedule as text, "2x72/5x18"."""
    return "/".join(f"{layer}x{n}" for layer, n in sorted(counts.items()))


class Trials:
    """Points of a search, on disk beside the schedule file.

    Args:
        out: the schedule file.
        settings: everything that a point depends on, and what is searched for, as JSON values.
        overwrite: start over, whatever is there.

    Attributes:
        damaged: lines that are no points; they are left out, so that their schedules are evaluated again.

    Raises:
        RunError: it cannot be written, another process is at it, it is of a search with other settings or none can be
            read, or there is a schedule file of no search.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], overwrite: bool = False):
        self.path, self.points = out.with_name(f"{out.name}.trials.jsonl"), {}
        settings = json.loads(json.dumps(settings))  # as they read back
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{self.path}.lock")
            hold(self._lock, self.path)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if not overwrite:
                self._read(out, settings)
            self._write([{"settings": settings}, *map(asdict, self.points.values())])
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except RunError:
            self.close()
            raise

    points: dict[str, Point]
    damaged = 0

    def add(self, point: Point) -> None:
        """Append a point."""
        try:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(point)) + "\n")
            except OSError:
                os.truncate(self.path, size)
                raise
        except OSError as error:
            raise self._unwritable(error) from error
        self.points[point.key] = point

    def close(self) -> None:
        """Let another process at the file."""
        self._lock.release()

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write {self.path}: {error.strerror or error}. Nothing that was evaluated is lost: make room and "
            "type the same command again, or name another file with --out"
        )

    def _read(self, out: Path, settings: dict[str, Any]) -> None:
        """What the whole lines hold; the last one may have been cut off."""
        if not self.path.exists():
            if out.exists():
                raise RunError(f"{out} is there already; name another file with --out, or type --overwrite")
            return
        first, *points = [*rows_of(self.path, _line, torn=True)] or [settings]  # cut off before anything was evaluated
        if not isinstance(first, dict):
            raise RunError(f"{self.path} line 1 cannot be read as settings of a search; start over with --overwrite")
        there = first
        self.points = {p.key: p for p in points if isinstance(p, Point)}
        self.damaged = sum(not isinstance(p, Point) for p in points)
        for name in {**there, **settings}:
            if there.get(name) != settings.get(name):
                raise RunError(
                    f"{self.path} is of a search with other settings ({name}: {_short(there.get(name))} there, "
                    f"{_short(settings.get(name))} now); name another file with --out, or start over with --overwrite"
                )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def _line(values: dict[str, Any]) -> dict[str, Any] | Point:
    """The settings of a search, or a point."""
    if isinstance(values.get("settings"), dict):
        return values["settings"]
    point = typed(Point, values)
    if point.right > point.n or not point.tokens:
        raise Damaged("is no point: it has more right answers than questions, or no layers")
    return point


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
