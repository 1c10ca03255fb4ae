"""Who is asked how much: successive halving on one part of the questions, one test of the winner on the other.

The race only chooses. Its questions are not used again, and the promise is made by the others, on which a single
configuration is tested a single time. So the promise holds however many configurations were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .promise import Outcome, best_share, chance, least_loss, least_tolerance, most_loss, questions_needed

LEAST_QUESTIONS = 20  # fewer cannot be divided
RACE_SHARE, MOST_RACE = 0.25, 400  # of the questions; the others test the winner
LOOKS = (0.25, 0.5, 1.0)  # shares of the race after which configurations leave
RACE_ERROR = 0.05  # for one that is within the tolerance to be sent away as surely beyond it; over all and all looks
LEAST_CHANCE = 0.05  # below, the winner is not worth testing


@dataclass(frozen=True)
class Rule:
    """What is promised.

    Args:
        tolerance: loss of accuracy, 0..1.
        error: 1 less the confidence.
    """

    tolerance: float
    error: float = 0.05


@dataclass(frozen=True)
class Entry:
    """A configuration in the race: its answers so far, and what it costs relative to the unpruned model."""

    seen: Outcome
    cost: float


@dataclass
class Finish:
    """How a race ended.

    Args:
        entries: what was last seen of every configuration.
        left: configurations that were asked at every look.
        winner: None where nothing that saves anything is likely to be within the tolerance.
        chance: how probably the test succeeds.
        share: of the error that the test spends on lost questions; see `promise.most_loss`.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    left: list[list[str]] = field(default_factory=list)
    winner: str | None = None
    chance: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Parts:
    """How many questions every look adds, and how many the test has."""

    looks: tuple[int, ...]
    test: int


def parts_of(n: int) -> Parts:
    """The parts of n questions."""
    race = min(round(RACE_SHARE * n), MOST_RACE)
    ends = [round(share * race) for share in LOOKS]
    return Parts(tuple(b - a for a, b in zip([0, *ends], ends, strict=False)), n - race)


def fewest(rule: Rule) -> int:
    """The fewest questions in all with which the test can succeed."""
    needed = questions_needed(rule.tolerance, rule.error)
    n = max(needed, LEAST_QUESTIONS)
    while parts_of(n).test < needed:
        n += needed - parts_of(n).test
    return n


def smallest(n: int, error: float) -> float:
    """The smallest tolerance that n questions in all can promise."""
    return least_tolerance(parts_of(n).test, error)


def race(
    labels: Sequence[str], parts: Parts, rule: Rule, ask: Callable[[int, list[str]], Mapping[str, Entry]]
) -> Finish:
    """Let configurations race, and choose the one with the largest expected saving.

    The expected saving is what a configuration saves times the probability that its test will succeed. After every look
    those leave that are surely beyond the tolerance (exact bounds, the error divided by configurations and looks), and
    of the others the half that is expected to save least.

    Args:
        labels: of the configurations.
        parts: of the questions.
        rule: what is to be promised.
        ask: given the number of a look and labels, asks its questions and returns what was seen so far.
    """
    found, left = Finish(), list(labels)
    each = RACE_ERROR / max(len(labels) * len(parts.looks), 1)
    for look in range(len(parts.looks)):
        found.left.append(list(left))
        entries = ask(look, left)
        found.entries.update(entries)
        stay = [name for name in left if least_loss(entries[name].seen, each) <= rule.tolerance]
        stay.sort(key=lambda name: (-expected(entries[name], parts.test, rule), entries[name].cost))
        is_last = look + 1 == len(parts.looks)
        left = stay[: 1 if is_last else max(1, -(-len(left) // 2))]
        if not left:
            return found
    entry = found.entries[left[0]]
    found.chance = chance(entry.seen, parts.test, rule.tolerance, rule.error)
    if entry.cost < 1 and found.chance >= LEAST_CHANCE:
        found.winner = left[0]
        found.share = best_share(entry.seen, parts.test, rule.error)
    return found


def expected(entry: Entry, n: int, rule: Rule) -> float:
    """Of the cost of the unpruned model, what is saved in the mean if the winner is used only after its test."""
    return max(1 - entry.cost, 0.0) * chance(entry.seen, n, rule.tolerance, rule.error)


def holds(seen: Outcome, rule: Rule, share: float) -> bool:
    """Whether the answers of the test promise the tolerance."""
    return most_loss(seen, rule.error, share) <= rule.tolerance
