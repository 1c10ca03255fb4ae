"""A page that ranks measured scores, as far as their differences are not noise.

Methods of one model, benchmark, budget and number of questions are ranked together. A method's rank is a range: 1 more
than the number of methods that are surely better, up to the number of those that are not surely worse. Two methods are
compared on the same questions where a run has both, else by their intervals, which is more careful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from ..run.rows import NONE
from ..stats import sign
from .benchmarks import BENCHMARKS
from .pages import template
from .reported import Reproduced, in_words, read_reproduced, size_of

TEMPLATE = "leaderboard.html.jinja"
NAME = "leaderboard.html"


@dataclass
class Place:
    """A method on a board.

    Args:
        row: its newest score.
        best, worst: its rank is between these.
        earlier: its other scores.
    """

    row: Reproduced
    best: int
    worst: int
    earlier: list[float] = field(default_factory=list)

    @property
    def rank(self) -> str:
        """As "2" or "1 to 3"."""
        return f"{self.best}" if self.best == self.worst else f"{self.best} to {self.worst}"

    @property
    def score(self) -> str:
        """With its 95 % interval, where that is known."""
        return f"{self.row.score:.1f}" + ("" if self.row.low is None else f" [{self.row.low:.1f}, {self.row.high:.1f}]")

    @property
    def loss(self) -> str:
        """Difference from the unpruned run on the same questions, with its 95 % interval."""
        if NONE not in self.row.paired:
            return ""
        value, low, high = self.row.paired[NONE]
        return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


@dataclass
class Board:
    """Methods that are ranked together.

    Args:
        model, benchmark, budget, n: what they share; `n` is the number of questions.
        bare: the unpruned model on these questions.
        places: by rank.
        n_apart: pairs of methods that can be told apart.
        n_pairs: all pairs.
    """

    model: str
    benchmark: str
    budget: str
    n: int
    bare: Place | None
    places: list[Place]
    n_apart: int
    n_pairs: int

    @property
    def groups(self) -> list[list[Place]]:
        """Places with the same best rank."""
        return [[p for p in self.places if p.best == best] for best in dict.fromkeys(p.best for p in self.places)]

    @property
    def verdict(self) -> str:
        """What the table tells, in a sentence."""
        if not self.n_pairs:
            return "One method alone, so there is nothing to rank."
        if not self.n_apart:
            return "No two of these methods can be told apart."
        return f"{self.n_apart} of {self.n_pairs} pairs of methods can be told apart."

    @property
    def questions(self) -> str:
        """How many there are, and of how many."""
        known = next((b.documents for b in BENCHMARKS.values() if b.name == self.benchmark), 0)
        return f"{self.n:,} of {known:,} questions, a quick look" if self.n < known else f"{self.n:,} questions"

    @property
    def tokens(self) -> str:
        """The budget in words."""
        return in_words(self.budget)


def boards(rows: Sequence[Reproduced]) -> list[Board]:
    """All boards of measured scores: by model and benchmark, the largest budget first."""
    keys = dict.fromkeys((r.model, r.benchmark, r.n, r.budget) for r in rows if r.method != NONE)
    ordered = sorted(keys, key=lambda key: (key[0], key[1], -key[2], -size_of(key[3])))
    return [_board(*key, rows) for key in ordered]


def _board(model: str, benchmark: str, n: int, budget: str, rows: Sequence[Reproduced]) -> Board:
    same = [r for r in rows if (r.model, r.benchmark, r.n) == (model, benchmark, n)]
    newest = _newest([r for r in same if r.budget == budget and r.method != NONE])
    n_pairs = len(newest) * (len(newest) - 1) // 2
    places, n_apart = [], 0
    for row, earlier in newest:
        signs = [compared(row, other, n_pairs) for other, _ in newest if other is not row]
        places.append(Place(row, 1 + signs.count(-1), len(newest) - signs.count(1), earlier))
        n_apart += signs.count(1)
    places.sort(key=lambda p: (p.best, p.worst, -p.row.score, p.row.method))
    bare = [Place(row, 0, 0, earlier) for row, earlier in _newest([r for r in same if r.method == NONE])]
    return Board(model, benchmark, budget, n, bare[0] if bare else None, places, n_apart, n_pairs)


def _newest(rows: Sequence[Reproduced]) -> list[tuple[Reproduced, list[float]]]:
    """The last score of each method, with the others."""
    found: dict[str, list[Reproduced]] = {}
    for row in sorted(rows, key=lambda r: r.date):
        found.setdefault(row.method, []).append(row)
    return [(some[-1], [r.score for r in some[:-1]]) for some in found.values()]


def compared(first: Reproduced, second: Reproduced, n: int = 1) -> int:
    """1 where the first method is surely better than the second, -1 where it is worse, 0 where that may be noise.

    Args:
        first: a score.
        second: of the same benchmark, budget and number of questions.
        n: how many pairs are compared.
    """
    if second.method in first.paired:
        return sign(*first.paired[second.method][1:], n)
    if first.method in second.paired:
        return -sign(*second.paired[first.method][1:], n)
    if None in (first.low, first.high, second.low, second.high):
        return 0
    half = math.hypot(_half(first), _half(second))
    apart = first.score - second.score
    return sign(apart - half, apart + half, n)


def _half(row: Reproduced) -> float:
    """Half of an interval's width."""
    return ((row.high or 0.0) - (row.low or 0.0)) / 2


def read(folder: Path) -> list[Reproduced]:
    """The scores of a folder of files that `tokprune reproduce` wrote.

    Raises:
        RunError: there is none, or a line breaks the form.
    """
    rows = read_reproduced(folder)
    if not rows:
        raise RunError(f"no scores in {folder}: put reproduced.jsonl files of tokprune reproduce there")
    return rows


def write(rows: Sequence[Reproduced], path: Path) -> Path:
    """Write the page and return its path."""
    found = boards(rows)
    page = template(TEMPLATE).render(
        boards=found,
        models=list(dict.fromkeys(b.model for b in found)),
        n_scores=len(rows),
    )
    write_text(path, page, "replace")
    return path
