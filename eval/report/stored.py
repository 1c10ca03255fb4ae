"""What the folder of a comparison holds, read for a report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokprune.core.errors import RunError

from ..run.lines import Damaged, counted, rows_of, settings_of, typed
from ..run.rows import Row, SampleRow
from .losses import Picture
from .tables import QUESTION_ONLY

Part = TypeVar("Part")


@dataclass
class Floor:
    """The line of a question-only floor in rows.jsonl: how often the most frequent training answer is right."""

    task: str
    method: str
    value: float


@dataclass
class Settings:
    """What a report reads from run.json. Every field may be absent."""

    model: str = ""
    weights: Any = None
    prompt: str = ""
    suffix: str = ""
    suffixes: list[str] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    configurations: dict[str, Any] = field(default_factory=dict)
    flops_text: int = 0
    max_new_tokens: int | None = None


@dataclass
class Run:
    """What the folder of a comparison holds."""

    settings: dict[str, Any]
    rows: list[Row]
    question_only: dict[str, float | None]
    samples: list[SampleRow]
    pictures: list[Picture]
    path: Path = Path()
    damaged: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder that `tokprune compare` wrote. Damaged lines are left out and counted in `damaged`.

        Raises:
            RunError: it holds no run, an unfinished run, or settings or rows that cannot be read.
        """
        if not (path / "run.json").is_file():
            raise RunError(
                f"{path} holds no run; name the folder that tokprune compare --out wrote, or one with JSONL files of "
                "tokprune reproduce"
            )
        if not (path / "rows.jsonl").is_file():
            raise RunError(f"the run in {path} is not finished; type the same tokprune compare again to resume it")
        settings = _settings(path)
        damaged: dict[Path, int] = {}
        lines = undamaged(path / "rows.jsonl", _floor_or_row, damaged)
        rows = [line for line in lines if isinstance(line, Row)]
        if not rows:
            raise RunError(f"{path / 'rows.jsonl'} holds no configuration that can be read; {_again(path)}")
        floors: dict[str, float | None] = {line.task: line.value for line in lines if isinstance(line, Floor)}
        samples = undamaged(path / "samples.jsonl", functools.partial(typed, SampleRow), damaged)
        stored = undamaged(path / "pictures.jsonl", functools.partial(typed, Picture), damaged)
        return cls(settings, rows, floors, samples, stored, path, damaged)

    @property
    def remarks(self) -> list[str]:
        """How many lines of each file were left out, and the command that repairs them."""
        return [counted(n, path, f"left out; {_again(self.path)}") for path, n in self.damaged.items()]


def undamaged(path: Path, make: Callable[[dict[str, Any]], Part], damaged: dict[Path, int]) -> list[Part]:
    """The rows of a file. The number of lines that hold no row goes to `damaged`, by file."""
    read = list(rows_of(path, make))
    rows = [row for row in read if not isinstance(row, Damaged)]
    if len(rows) < len(read):
        damaged[path] = len(read) - len(rows)
    return rows


def _floor_or_row(line: dict[str, Any]) -> Floor | Row:
    return typed(Floor, line) if line.get("method") == QUESTION_ONLY else Row.read(line)


def _again(path: Path) -> str:
    """How to repair the files of a run."""
    return f"type the same {_command(path)} again to repair it; answered questions are not asked again"


def _command(path: Path) -> str:
    """The command that wrote the folder of a run."""
    return f"tokprune {'eval' if (path / 'lmms-eval').is_dir() else 'compare'} --out {path}"


def _settings(path: Path) -> dict[str, Any]:
    file, again = path / "run.json", f"start over with the same {_command(path)} --overwrite"
    found = settings_of(file, again)
    try:
        typed(Settings, found, others=True)
    except Damaged as damaged:
        raise RunError(f"{file} {damaged}; {again}") from damaged
    return found
