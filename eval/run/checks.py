"""What accuracy alone hides: questions that a small picture cannot answer, and answers that pruning changed or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, Protocol

from ..stats import mean_interval


class Answer(Protocol):
    """What is read here of the row of an answer."""

    sample: str
    right: bool

    @property
    def score(self) -> float: ...


def hard(answers: Sequence[Answer], small: Sequence[Answer]) -> dict[str, Any]:
    """Columns of a row over the questions that the model answers wrong about a smaller picture; no value without any.

    Args:
        answers: of the row.
        small: of the control `downsample` at the same budget.
    """
    lost = {a.sample for a in small if not a.right}
    scores = [a.score for a in answers if a.sample in lost]
    if not scores:
        return {"hard_n": 0}
    low, high, _ = mean_interval(scores)
    return {"hard_n": len(scores), "hard_value": mean(scores), "hard_low": low, "hard_high": high}


def changed(answers: Mapping[str, str], bare: Mapping[str, str]) -> dict[str, Any]:
    """Columns of a row about its answers as texts; none where no question was answered by both.

    Args:
        answers: of the row, by question.
        bare: of the unpruned run.
    """
    both = answers.keys() & bare.keys()
    if not both:
        return {}
    return {
        "n_changed": sum(answers[q] != bare[q] for q in both),
        "commonest": _commonest([answers[q] for q in both]),
        "commonest_bare": _commonest([bare[q] for q in both]),
    }


def _commonest(texts: Sequence[str]) -> float:
    """The share of the text that is there most often."""
    return Counter(texts).most_common(1)[0][1] / len(texts)
