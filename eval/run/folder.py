"""The folder of a run: what is written when, so that a run that was cut off goes on where it stopped.

`run.json` holds the settings. `samples.jsonl` gets the answers of a batch, then `times.jsonl` one line for that
batch: a batch counts as done when both are there. Going on drops what belongs to no done batch, damaged lines among it,
and a folder of other settings is refused.

Of several processes every one but the first writes to files of its own, `samples.1.jsonl` and so on; they are put into
`samples.jsonl` at the end, or when a run that was cut off goes on, with any number of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from .lines import Damaged, rows_of, settings_of, typed
from .locks import hold
from .plan import INSTEAD
from .processes import Processes
from .rows import BatchTime, SampleRow

Part = TypeVar("Part", BatchTime, SampleRow)
Key = tuple[str, str, int]  # task, configuration, batch
REPORT = ("report.html", "table.md", "table.csv", "pictures.jsonl")
ALONE = Processes()
DERIVED = ("flops_text",)  # said by the configurations
CHECKSUMS = {
    "weights": "the model has other weights",
    "prompt": "the processor, its chat template or the suffix makes other prompts",
    "code": "the file of a method has changed",
    "tasks": "questions have changed, or are in other batches",
    "configurations": "a configuration is no longer the same",
}
_ANSWERS = ("samples.jsonl", "times.jsonl")
FILES = ("run.json", "rows.jsonl", *_ANSWERS, "accuracy.png", "table.md", "table.csv", "pictures.jsonl", ".lock")
_PART = re.compile(r"(samples|times)\.[1-9][0-9]*\.jsonl")  # a copy that somebody made is none


class RunFolder:
    """Answers and times of a run, on disk.

    Args:
        path: created where it does not exist.
        settings: everything that an answer depends on, as JSON values; `tasks` and `configurations` are in order.
        overwrite: start over, whatever is there.
        processes: those that share the run; all open the folder at the same time.
        questions: by task and batch the questions of a batch; None where they are not known.
        instead: what to do where the folder holds a run with other settings, for its error.

    Attributes:
        damaged: lines that were left out when the folder was opened, by file.

    Raises:
        RunError: it cannot be written, another process is at it, or it holds a run with other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        overwrite: bool = False,
        processes: Processes = ALONE,
        questions: Mapping[tuple[str, int], Collection[str]] | None = None,
        instead: str = INSTEAD,
    ):
        self.path, self.processes, self.questions, self._instead = path, processes, questions, instead
        self.settings = json.loads(json.dumps(settings))  # as they read back
        self.answers: dict[Key, list[SampleRow]] = {}
        self.times: dict[Key, BatchTime] = {}
        self.damaged: dict[Path, int] = {}
        self._lock = FileLock(path / ".lock")
        self._part = "" if processes.is_main else f".{processes.index}"
        refused: RunError | None = None
        if processes.is_main:
            try:
                self._open(overwrite)
            except RunError as error:
                refused = error
        refused = processes.told(refused)
        if refused:
            raise refused if processes.is_main else SystemExit(2)  # said once
        if not processes.is_main:
            with self.writing():
                self._read()
                for name in _ANSWERS:
                    (path / self._own(name)).touch()
        processes.wait()  # nobody writes before all have read

    def _open(self, overwrite: bool) -> None:
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            hold(self._lock, self.path)
            with contextlib.ExitStack() as stack:
                stack.callback(self.close)
                if overwrite:
                    self.clear()
                self._check(self.settings)
                self._clean()
                self.damaged = dict(self._read())
                self._write("run.json", [json.dumps(self.settings, indent=1)])
                self._rewrite()
                stack.pop_all()

    def add(self, key: Key, rows: Sequence[SampleRow], time: BatchTime) -> None:
        """Append a batch; the line of its time makes it count."""
        with self.writing():
            self._append(self._own("samples.jsonl"), [asdict(row) for row in rows])
            self._append(self._own("times.jsonl"), [asdict(time)])
        self.answers[key], self.times[key] = list(rows), time

    def gather(self) -> None:
        """Put the files of all processes together, in the order of the settings; all processes call it."""
        self.processes.wait()
        if self.processes.is_main:
            with self.writing():
                self._read()
                self._rewrite()

    def write_jsonl(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """A whole file at once: it is there complete, or not at all."""
        with self.writing():
            self._write(name, [json.dumps(row) for row in rows])

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        names = ("run.json", "rows.jsonl", "accuracy.png", *REPORT, *_ANSWERS)
        for path in (*(self.path / name for name in names), *self._parts()):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process at the folder."""
        self._lock.release()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What cannot be written inside becomes one clear error."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error.strerror or error}. Nothing that was answered is lost: make "
                "room and type the same command again, or name another folder with --out"
            ) from error

    def _clean(self) -> None:
        """Remove what a kill left of files that were just being written."""
        for name in ("run.json", "rows.jsonl", *_ANSWERS):
            for path in self.path.glob(f".{name}.*.writing"):
                path.unlink()

    def _own(self, name: str) -> str:
        stem, _, suffix = name.partition(".")
        return f"{stem}{self._part}.{suffix}"

    def _parts(self) -> list[Path]:
        """Files of processes other than the first."""
        return sorted(path for path in self.path.glob("*.*.jsonl") if _PART.fullmatch(path.name))

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.path / "run.json"
        if not path.exists():
            if (self.path / "samples.jsonl").exists():
                raise RunError(f"{self.path} holds answers without their settings; {INSTEAD}")
            return
        there = settings_of(path, "start over with --overwrite")
        for name in {"backend": None, **there, **settings}:  # what changes the others comes first
            if name not in DERIVED and not _extends(there.get(name), settings.get(name)):
                found = _differs(name, there, settings)
                raise RunError(f"{self.path} holds a run with other settings ({found}); {self._instead}")

    def _read(self) -> Counter[Path]:
        """Take what is done from the files; lines that are damaged by file."""
        damaged: Counter[Path] = Counter()
        times = {_key(t): t for t in self._lines("times.jsonl", BatchTime, damaged)}
        found: dict[Key, dict[str, SampleRow]] = {}  # a kill may leave a batch both in a part and in the whole
        for row in self._lines("samples.jsonl", SampleRow, damaged):
            found.setdefault(_key(row), {})[row.sample] = row
        done = [key for key, time in times.items() if self._is_whole(key, found.get(key, {}), time)]
        self.answers = {key: list(found[key].values()) for key in sorted(done, key=self._place)}
        self.times = {key: times[key] for key in self.answers}
        return damaged

    def _is_whole(self, key: Key, found: Collection[str], time: BatchTime) -> bool:
        own = self._own_questions(key)
        return len(found) == time.size and (own is None or set(found) == set(own))

    def _own_questions(self, key: Key) -> Collection[str] | None:
        """Questions of a batch; None where they are not known, or the task is of another run."""
        if self.questions is None or key[0] not in self.settings["tasks"]:
            return None
        return self.questions.get((key[0], key[2]), ())

    def _place(self, key: Key) -> tuple[int, int, int]:
        """Where a batch stands in the files, whoever answered it."""
        task, config, batch = key
        try:
            return list(self.settings["tasks"]).index(task), batch, list(self.settings["configurations"]).index(config)
        except ValueError as error:
            raise RunError(f"{self.path} holds answers of another run; start over with --overwrite") from error

    def _lines(self, name: str, kind: type[Part], damaged: Counter[Path]) -> Iterator[Part]:
        """What the whole lines of a file and of its parts hold; the last one of each may have been cut off."""
        stem = name.partition(".")[0]
        for path in (self.path / name, *(part for part in self._parts() if part.name.startswith(f"{stem}."))):
            for row in rows_of(path, lambda line: self._placed(typed(kind, line)), torn=True):
                if isinstance(row, Damaged):
                    damaged[path] += 1
                else:
                    yield row

    def _placed(self, row: Part) -> Part:
        """The row, if it is about a question of its batch."""
        own = self._own_questions(_key(row))
        if own is not None and (row.sample if isinstance(row, SampleRow) else next(iter(own), None)) not in own:
            raise Damaged("is about no question of its batch")
        return row

    def _rewrite(self) -> None:
        """Keep what belongs to done batches, in files without parts."""
        self._write("samples.jsonl", [json.dumps(asdict(r)) for rows in self.answers.values() for r in rows])
        self._write("times.jsonl", [json.dumps(asdict(t)) for t in self.times.values()])
        for path in self._parts():
            path.unlink()

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0  # `gather` removes parts
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError:
            os.truncate(path, size)
            raise

    def _write(self, name: str, lines: Iterable[str]) -> None:
        write_text(self.path / name, "".join(line + "\n" for line in lines))


def _key(part: BatchTime | SampleRow) -> Key:
    return part.task, part.config, part.batch


def _extends(there: Any, now: Any) -> bool:
    """Whether a setting is as it was, or has more methods, budgets or questions behind what was there."""
    if isinstance(there, dict) and isinstance(now, dict):
        return all(name in now and _extends(value, now[name]) for name, value in there.items())
    if isinstance(there, list) and isinstance(now, list):
        return now[: len(there)] == there
    return there == now


def _differs(name: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What another setting means, in words."""
    said = CHECKSUMS.get(name)
    return f"{name}: {said or f'{_short(there.get(name))} there, {_short(now.get(name))} now'}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
