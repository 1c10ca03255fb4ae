"""The metric of a run: one of tokprune's by its name, a function of the user's own, or what each question asks for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import numbers
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

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
        place, colon, attribute = name.rpartition(":")
        if not colon:
            near = nearest(name, METRICS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UnknownNameError(f"no metric named {name!r}.{hint} Use {', '.join(METRICS)}, or {OWN}")
        module = _module(place, name)
        function = getattr(module, attribute, None)
        if not callable(function):
            own = (n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
            there = [n for n in own if inspect.isfunction(getattr(module, n)) and not n.startswith("_")]
            raise PluginError(
                f"metric {name!r}: {place} has no function {attribute!r}; it has {', '.join(there) or 'none'}"
            )
        file = getattr(module, "__file__", None)
        return cls(name, function, f"{zlib.crc32(Path(file).read_bytes()):08x}" if file else "")

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


def _module(place: str, name: str) -> ModuleType:
    """A module by its name, or by the path of its file.

    Raises:
        PluginError: it cannot be imported.
    """
    path = Path(place).expanduser()
    is_file = path.suffix == ".py" or len(path.parts) > 1
    if is_file and not path.is_file():
        raise PluginError(f"metric {name!r}: there is no file {place}; use {OWN}")
    try:
        if not is_file:
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"tokprune_metric_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{place} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(f"metric {name!r}: {place} cannot be imported: {said}; use {OWN}") from error
    return module
