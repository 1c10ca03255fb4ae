"""Scores out of what lmms-eval wrote about every document: their intervals, and differences on the same documents.

The score of a benchmark is a mean over documents, an F1 score, or the points of MME. A mean has the intervals of
`stats`; the others are resampled over documents (scipy's percentile bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from ..stats import difference, mean_interval

N_RESAMPLES = 999
Lines = Mapping[int, Mapping[str, Any]]  # by document
Units = dict[Any, tuple[float, ...]]  # by what is drawn: a document, or a picture with two questions


@dataclass(frozen=True)
class Rule:
    """How a score comes out of documents.

    Args:
        units: what is drawn, with its figures.
        score: of an array (units, figures).
        is_mean: of the only figure, which is in 0..1.
    """

    units: Callable[[Lines], Units]
    score: Callable[[np.ndarray], float]
    is_mean: bool = False

    def read(self, lines: Lines) -> Units | None:
        """What is drawn; None where documents lack what the rule reads."""
        try:
            own = self.units(lines)
        except (KeyError, TypeError, ValueError, StopIteration):
            return None
        return None if self.is_mean and not all(0 <= value <= 1 for (value,) in own.values()) else own

    def of(self, own: Units) -> float:
        """The score."""
        return self.score(np.array(list(own.values())))

    def interval(self, own: Units) -> tuple[float, float]:
        """The ends of the 95 % interval of a score."""
        figures = np.array(list(own.values()))
        if self.is_mean:
            return mean_interval(figures[:, 0].tolist())[:2]
        return self._resampled(len(figures), lambda drawn: self.score(figures[drawn]))

    def difference(self, own: Units, other: Units) -> tuple[float, float, float] | None:
        """How much a score is above another one of the same documents, and the ends of its 95 % interval.

        None where the documents are not the same.
        """
        if own.keys() != other.keys():
            return None
        a, b = (np.array([units[key] for key in own]) for units in (own, other))
        if self.is_mean:
            found = difference(a[:, 0].tolist(), b[:, 0].tolist())
            return found.value, found.low, found.high
        value = self.score(a) - self.score(b)
        return value, *self._resampled(len(a), lambda drawn: self.score(a[drawn]) - self.score(b[drawn]))

    @staticmethod
    def _resampled(n: int, score: Callable[[np.ndarray], float]) -> tuple[float, float]:
        """The ends of the interval of a score of drawn units, numbered from 0."""
        found = bootstrap(
            (np.arange(n),), score, vectorized=False, n_resamples=N_RESAMPLES, method="percentile",
            random_state=np.random.default_rng(0),
        )  # fmt: skip
        return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _value(metric: str) -> Callable[[Lines], Units]:
    def units(lines: Lines) -> Units:
        return {doc: (float(line[metric]),) for doc, line in lines.items()}

    return units


def _mean(figures: np.ndarray) -> float:
    return float(figures[:, 0].mean())


def _yes_or_no(lines: Lines) -> Units:
    """Whether "yes" is right, was answered, and "no" was answered."""
    found = {}
    for doc, line in lines.items():
        right, said = line["pope_f1_score"]["ground_truth"], line["pope_f1_score"]["prediction"]
        found[doc] = float(right == "yes"), float(said == "yes"), float(said == "no")
    return found


def _f1(figures: np.ndarray) -> float:
    is_yes, yes, no = figures.T
    hits = 2 * (is_yes * yes).sum()
    missed = ((1 - is_yes) * yes).sum() + (is_yes * no).sum()
    return float(hits / (hits + missed)) if hits else 0.0


def _pictures(lines: Lines) -> Units:
    """Of every picture of MME the number of its category and its points: one for each answer, one for both."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines.values():
        own = next(line[name] for name in ("mme_perception_score", "mme_cognition_score") if name in line)
        found.setdefault((own["category"], own["question_id"]), []).append(own["score"])
    numbers = {category: i for i, category in enumerate(sorted({category for category, _ in found}))}
    return {key: (numbers[key[0]], 100 * (sum(right) / len(right) + (sum(right) == 2))) for key, right in found.items()}


def _points(figures: np.ndarray) -> float:
    """The sum over categories of the mean over pictures."""
    category = figures[:, 0].astype(int)
    n = np.bincount(category)
    return float((np.bincount(category, figures[:, 1])[n > 0] / n[n > 0]).sum())


RULES = {
    ("pope_f1_score",): Rule(_yes_or_no, _f1),
    ("mme_perception_score", "mme_cognition_score"): Rule(_pictures, _points),
}


def rule_of(metrics: tuple[str, ...]) -> Rule:
    """Of a benchmark whose score is the sum of these metrics; a single other metric is a mean in 0..1."""
    return RULES.get(metrics) or Rule(_value(metrics[0]), _mean, is_mean=True)
