"""What pruning breaks: questions that the unpruned model answers right and a method answers wrong."""

from __future__ import annotations

import base64
import io
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from tokprune.core.errors import RunError, TokPruneError

from ..run.rows import BARE, NONE, Config, Row, SampleRow, pooled
from ..run.runner import Runner
from ..tasks import Sample, Task
from ..tasks.prompted import embedded_task
from .explained import asked
from .tables import FLOORS

MAX_PICTURES, MAX_A_METHOD = 24, 3
MAX_BYTES = 4_500_000  # for all pictures in base64; the page leaves out those that exceed it
_WIDTH, _HEIGHT = 280, 560


@dataclass
class Change:
    """A configuration against the unpruned run: the questions that only it gets wrong, how many only it gets right."""

    lost: list[SampleRow] = field(default_factory=list)
    n_won: int = 0


Key = tuple[str, str]  # task, configuration


def changes(samples: Sequence[SampleRow]) -> dict[Key, Change]:
    """Changes by task and configuration; none for a task that was not run unpruned."""
    bare = {(s.task, s.sample): s.right for s in samples if s.config == NONE}
    found: dict[Key, Change] = defaultdict(Change)
    for s in samples:
        was_right = bare.get((s.task, s.sample))
        if was_right is None or s.config == NONE:
            continue
        change = found[s.task, s.config]
        change.n_won += s.right and not was_right
        if was_right and not s.right:
            change.lost.append(s)
    return dict(found)


def shown(rows: Sequence[Row], found: Mapping[Key, Change]) -> list[tuple[Row, list[SampleRow]]]:
    """Each method at its smallest budget, with a few of the questions that it loses, at most `MAX_PICTURES` in all.

    Seeds of `random` count as one method, shown by its first seed. A checksum of the questions' names decides which are
    shown: they are the same every time, and methods that lose the same questions show the same ones.

    Args:
        rows: of all tasks.
        found: `changes`.
    """
    least: dict[tuple[str, str], Row] = {}
    for row in pooled(rows):
        if row.method in (*BARE, *FLOORS) or (row.task, row.config) not in found:
            continue
        other = least.setdefault((row.task, row.method), row)
        if _budget(row) < _budget(other):
            least[row.task, row.method] = row
    if not least:
        return []
    each = max(1, min(MAX_A_METHOD, MAX_PICTURES // len(least)))
    chosen, left = [], MAX_PICTURES
    for row in least.values():
        lost = sorted(found[row.task, row.config].lost, key=lambda s: (zlib.crc32(_bytes(s.sample)), s.sample))
        chosen.append((row, lost[: min(each, left)]))
        left -= len(chosen[-1][1])
    return chosen


def _budget(row: Row) -> float:
    return row.keep_ratio or row.flops_ratio or row.n_visual_after / max(row.n_visual_before, 1)


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")


# ---- pictures


@dataclass
class Picture:
    """A question, its picture as the model sees it, and the same picture with the kept tokens, both PNG in base64.

    Args:
        task, config, sample: the answer that it belongs to.
        question: as asked; empty if it is not known any more.
        seen, kept: the two pictures; empty if they were not drawn.
        tokens: visual tokens before and after.
        why: the reason if there is no picture.
    """

    task: str
    config: str
    sample: str
    question: str = ""
    seen: str = ""
    kept: str = ""
    tokens: str = ""
    why: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, configuration and sample."""
        return self.task, self.config, self.sample


class Artist:
    """Draws what was kept in a run, with its model and the pictures of its tasks.

    Args:
        runner: the model of the run.
        tasks: those of the run with their questions.
        flops_text: the number of text tokens that budgets in FLOPs were solved with.
    """

    def __init__(self, runner: Runner, tasks: Sequence[tuple[Task, Sequence[Sample]]], flops_text: int = 0):
        self.runner, self.flops_text = runner, flops_text
        self.tasks = {task.name: task for task, _ in tasks}
        self.samples = {(task.name, s.id): s for task, samples in tasks for s in samples}

    @classmethod
    def of_settings(cls, runner: Runner, settings: Mapping) -> Artist:
        """For a stored run.

        Raises:
            RunError: the model has changed since the run, or a task was a folder, whose path is not stored.
        """
        for name, now in (("weights", runner.fingerprint()), ("prompt", runner.prompt_fingerprint())):
            if settings.get(name) != now:
                raise RunError(
                    f"the {name} of {settings.get('model')} changed since the run: checksum {now}, was "
                    f"{settings.get(name)}; leave --pictures out, or compare again"
                )
        found = {name: embedded_task(name, settings.get("suffixes", ())) for name in settings.get("tasks", {})}
        unknown = [name for name, task in found.items() if task is None]
        if unknown:
            raise RunError(
                f"the run does not store the path of the task {unknown[0]!r}; type the same tokprune compare again to "
                "draw its pictures (answered questions are not asked again), or leave --pictures out"
            )
        tasks = [task for task in found.values() if task is not None]
        return cls(runner, [(task, task.samples()) for task in tasks], settings.get("flops_text", 0))

    def draw(self, row: SampleRow) -> Picture:
        """Draw the tokens that were kept for this answer, or say why that is not possible."""
        picture = Picture(row.task, row.config, row.sample)
        sample = self.samples.get((row.task, row.sample))
        if sample is None or sample.expected != row.expected:
            picture.why = "the task does not have this question any more"
            return picture
        picture.question = sample.question
        config = Config(
            row.method,
            row.keep_ratio,
            flops_ratio=row.flops_ratio,
            flops_text=self.flops_text,
            keep_tokens=row.keep_tokens,
        )
        salt = zlib.crc32(sample.id.encode())  # as when it was answered
        try:
            image = self.tasks[row.task].image(sample.image_id)
            panels = asked(self.runner, image, sample.question, [(config.method, config.budget)], salt).panels()
        except TokPruneError as error:
            picture.why = f"it could not be drawn: {error}"
            return picture
        (_, seen), (title, kept) = panels
        picture.seen, picture.kept, picture.tokens = _png(seen), _png(kept), title.rpartition(": ")[2]
        return picture


def pictures(
    chosen: Sequence[SampleRow], stored: Sequence[Picture], artist: Artist | None = None
) -> dict[tuple[str, str, str], Picture]:
    """A picture for each answer that is shown: the stored one, or one that `artist` draws."""
    found = {p.key: p for p in stored if p.seen}
    for row in chosen:
        key = (row.task, row.config, row.sample)
        if key not in found:
            absent = Picture(*key, why="this page was written without the model")
            found[key] = artist.draw(row) if artist else next((p for p in stored if p.key == key), absent)
    return {(r.task, r.config, r.sample): found[r.task, r.config, r.sample] for r in chosen}


def _png(picture: Image.Image) -> str:
    """A PNG in base64, small enough for a page with many."""
    scale = min(1, _WIDTH / picture.width, _HEIGHT / picture.height)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
