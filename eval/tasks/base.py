"""What a task is: samples with a question and an answer, and the pictures or videos they ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from tokprune.core.errors import TaskError
from tokprune.prune.videos import Clip

from .metrics import LETTERS, METRICS, normalise

EXACT = "exact"
RIGHT = 0.5  # an answer with at least this value is shown as right


@dataclass(frozen=True)
class Sample:
    """One question about one picture or video.

    Args:
        id: unique within its task; resuming and pairing go by it.
        image_id: what `Task.image` takes; samples of one picture share it.
        question: as asked, without any prompt template; `lettered` adds choices.
        answer: the expected answer.
        kind: stratum of the question ("colour", "yes/no" ...), for tables by kind.
        also: other answers that are as right; for the metric vqa one for each person, alike or not.
        choices: what there is to choose from, already part of the question.
        metric: a name in `METRICS`; empty for "choice" where there are choices, else "exact".

    Raises:
        TaskError: there is no such metric.
    """

    id: str
    image_id: str
    question: str
    answer: str
    kind: str = "all"
    also: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    metric: str = ""

    def __post_init__(self):
        if self.metric and self.metric not in METRICS:
            raise TaskError(f"question {self.id} has the metric {self.metric!r}; use one of {', '.join(METRICS)}")

    @property
    def rule(self) -> str:
        """The metric that the question asks for."""
        return self.metric or ("choice" if self.choices else EXACT)

    @property
    def answers(self) -> tuple[str, ...]:
        return self.answer, *self.also

    @property
    def expected(self) -> str:
        """The answers as they are shown, each once, " | " between them."""
        return " | ".join(dict.fromkeys(self.answers))

    def value(self, text: str) -> float:
        """What a text is worth by the question's own metric, 0..1."""
        return METRICS[self.rule](text, list(self.answers))

    def is_right(self, text: str) -> bool:
        """Whether a text is one of the answers and nothing more, or what the question's metric takes for right."""
        return self.value(text) >= RIGHT

    def begins_right(self, text: str) -> bool:
        """Whether a text begins with the words of one of the answers."""
        said = f"{normalise(text)} "
        return any(said.startswith(f"{normalise(answer)} ") for answer in self.answers)


class Task(Protocol):
    """A set of samples. `train_samples` is None where a task has no training split."""

    name: str

    def samples(self) -> list[Sample]:
        """The test samples, always in the same order."""

    def image(self, image_id: str) -> Image.Image | Clip:
        """The picture of a sample, RGB, as `tokprune.prune.pictures.open_picture` gives it; or its video."""

    def train_samples(self) -> list[Sample] | None:
        """Samples for the question-only floor, or None."""


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question with its choices below it, a line each: "A. red"."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))])
