"""What a task is: samples with a question and an answer, and the pictures or videos they ask about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from tokprune.prune.videos import Clip


@dataclass(frozen=True)
class Sample:
    """One question about one picture or video.

    Args:
        id: unique within its task; resuming and pairing go by it.
        image_id: what `Task.image` takes; samples of one picture share it.
        question: as asked, without any prompt template.
        answer: the expected answer, compared after `normalise`.
        kind: stratum of the question ("colour", "yes/no" ...), for tables by kind.
        also: other answers that are as right.
    """

    id: str
    image_id: str
    question: str
    answer: str
    kind: str = "all"
    also: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return self.answer, *self.also

    @property
    def expected(self) -> str:
        """The answers as they are shown, " | " between them."""
        return " | ".join(self.answers)

    def is_right(self, text: str) -> bool:
        """Whether a text is one of the answers, and nothing more."""
        return normalise(text) in map(normalise, self.answers)

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


def normalise(answer: str) -> str:
    """Lower case, single spaces, no closing full stop: what two answers are compared by."""
    return " ".join(answer.lower().split()).rstrip(".")
