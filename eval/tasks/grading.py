"""The metric of a run: one of tokprune's by its name, a function of the user's own, or what each question asks for."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.core import own_code
from tokprune.core.errors import PluginError, TaskError, UnknownNameError, shown
from tokprune.core.registry import nearest

from .base import EXACT, RIGHT, Sample, Task
from .metrics import FEWEST_ANSWERS, METRICS, Function

OWN = "file.py:function or module:function"


@dataclass(frozen=True)
class Grading:
    """How the answers of a run are graded.

    Args:
        name: of the metric; empty for what each question asks for.
        function: of a metric that is the user's own.
        code: a checksum of its file: answers of one run are graded by the same code.
    """

    name: str = ""
    function: Function | None = None
    code: str = ""

    @classmethod
    def load(cls, name: str) -> Grading:
        """By a name in `METRICS`, `file.py:function` or `module:function`; empty for the questions' own.

        Raises:
            UnknownNameError: there is no such metric.
            PluginError: the file or module cannot be imported, or does not have the function.
        """
        name = name.strip()
        if not name or name in METRICS:
            return cls(name)
        if not own_code.is_reference(name):
            near = nearest(name, METRICS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UnknownNameError(f"no metric named {name!r}.{hint} Use {', '.join(METRICS)}, or {OWN}")
        return cls(name, own_code.load_function(name, "metric"), f"{own_code.checksum(name):08x}")

    def name_of(self, sample: Sample) -> str:
        """The metric that a question is graded by."""
        return self.name or sample.rule

    def value(self, sample: Sample, answer: str) -> float:
        """What an answer is worth, 0..1.

        Raises:
            PluginError: the user's own function raised, or returned something else than a number from 0 to 1.
        """
        if self.function is None:
            return METRICS[self.name_of(sample)](answer, list(sample.answers))
        head = f"metric {self.name!r}"
        about = f"for the answer {shown(answer)} to {shown(sample.question)}"
        try:
            value = self.function(answer, list(sample.answers))
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(
                f"{head} raised {said} {about}; it is called as metric(answer: str, expected: list[str]) -> float"
            ) from error
        if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise PluginError(f"{head} returned {shown(value)} {about}; return a number from 0 to 1")
        return float(value)

    def is_right(self, value: float) -> bool:
        """Whether a value is shown as a right answer."""
        return value >= RIGHT

    def check(self, tasks: Sequence[tuple[Task, Sequence[Sample]]]) -> None:
        """Raise before a model is loaded if questions cannot be graded; a function of the user's own is tried.

        Raises:
            TaskError: a question has too few answers for the metric vqa.
            PluginError: `value` says why.
        """
        for task, samples in tasks:
            for sample in samples:
                if self.name_of(sample) == "vqa" and len(sample.answers) < FEWEST_ANSWERS:
                    where = getattr(task, "where", None)
                    place = where(sample) if where else f"question {sample.id} of {task.name}"
                    raise TaskError(f"{place} {too_few(len(sample.answers))}")
            if samples and self.function is not None:
                self.value(samples[0], samples[0].answer)

    def settings(self, tasks: Sequence[tuple[Task, Sequence[Sample]]]) -> dict[str, Any]:
        """What a run stores about it; nothing where every answer is graded as exact."""
        names = sorted({self.name_of(s) for _, samples in tasks for s in samples})
        if names in ([], [EXACT]):
            return {}
        return {"metric": " and ".join(names) + (f" (checksum {self.code})" if self.code else "")}


AS_ASKED = Grading()


def too_few(n: int) -> str:
    """What is wrong with a question that has so few answers for vqa; goes on after its place."""
    return (
        f"has {n} answer{'' if n == 1 else 's'}, too few for the metric vqa: give all ten, alike or not, at least "
        f"{FEWEST_ANSWERS}; or use another metric, as normalized"
    )
