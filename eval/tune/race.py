"""Who is asked how much: successive halving on one part of the questions, tests in a fixed order on the other.

The race only chooses, and puts what may be tested in an order. Its questions are not used again, and the promise is
made by the others. So the promise holds however many configurations were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .promise import Outcome, chance, holds, least_loss, least_tolerance, questions_needed

LEAST_QUESTIONS = 20  # fewer cannot be divided
RACE_SHARE, MOST_RACE = 0.25, 400  # of the questions; the others test
LOOKS = (0.25, 0.5, 1.0)  # shares of the race after which configurations leave
RACE_ERROR = 0.05  # for one that is within the tolerance to be sent away as surely beyond it; over all and all looks
LEAST_CHANCE = 0.05  # below, a configuration is not worth testing
MOST_ASKED = 0.25  # of the answers of a full comparison, race and tests together
MOST_WEIGHT = 4.0  # of a question under a cheaper configuration of the same family


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
    """A configuration in the race.

    Args:
        seen: its answers so far.
        cost: relative to the unpruned model.
        family: its method; of one family, what costs more loses less.
    """

    seen: Outcome
    cost: float
    family: str = ""


@dataclass
class Finish:
    """How a race ended.

    Args:
        entries: what was last seen of every configuration.
        left: configurations that were asked at every look.
        sequence: what is to be tested, from the safest to the cheapest; empty where nothing that saves anything is
            likely to be within the tolerance.
        chances: how probably each of these tests succeeds.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    left: list[list[str]] = field(default_factory=list)
    sequence: list[str] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """How many questions every look adds, and how many the test has."""

    looks: tuple[int, ...]
    test: int


class Step(NamedTuple):
    """A test that may be made: how probably it succeeds, and what of the unpruned cost is saved then."""

    chance: float
    saving: float
    name: str


def parts_of(n: int) -> Parts:
    """The parts of n questions."""
    race = min(round(RACE_SHARE * n), MOST_RACE)
    ends = [round(share * race) for share in LOOKS]
    return Parts(tuple(b - a for a, b in zip([0, *ends], ends, strict=False)), n - race)


def fewest(rule: Rule) -> int:
    """The fewest questions in all with which a test can succeed."""
    needed = questions_needed(rule.tolerance, rule.error)
    n = max(needed, LEAST_QUESTIONS)
    while parts_of(n).test < needed:
        n += needed - parts_of(n).test
    return n


def smallest(n: int, error: float) -> float:
    """The smallest tolerance that n questions in all can promise."""
    return least_tolerance(parts_of(n).test, error)


# ---- the race


def race(
    labels: Sequence[str], parts: Parts, rule: Rule, ask: Callable[[int, list[str]], Mapping[str, Entry]]
) -> Finish:
    """Let configurations race, and put those that are worth it in the order in which they are to be tested.

    After every look those leave that are surely beyond the tolerance (exact bounds, the error divided by configurations
    and looks), and of the others the half with the smallest expected saving: what a configuration saves times the
    probability that its test will succeed.

    Args:
        labels: of the configurations.
        parts: of the questions.
        rule: what is to be promised.
        ask: given the number of a look and labels, asks its questions and returns what was seen so far.
    """
    found, left, beyond = Finish(), list(labels), set[str]()
    each = RACE_ERROR / max(len(labels) * len(parts.looks), 1)
    for look in range(len(parts.looks)):
        found.left.append(list(left))
        entries = ask(look, left)
        found.entries.update(entries)
        beyond |= {name for name in left if least_loss(entries[name].seen, each) > rule.tolerance}
        steps = [step_of(name, found.entries, parts.test, rule) for name in left if name not in beyond]
        steps.sort(key=lambda step: (-step.chance * step.saving, -step.saving))
        left = [step.name for step in steps[: max(1, -(-len(left) // 2))]]
        if not left:
            break
    within = [step_of(name, found.entries, parts.test, rule) for name in labels if name not in beyond]
    steps = sequence(within, most_tests(len(labels), parts, found.left))
    found.sequence, found.chances = [step.name for step in steps], [step.chance for step in steps]
    return found


def most_tests(n_configs: int, parts: Parts, left: Sequence[Sequence[str]]) -> int:
    """How many tests keep the answers within a quarter of a full comparison's; at least one."""
    asked = sum(n * (len(names) + 1) for n, names in zip(parts.looks, left, strict=False))
    grid = (sum(parts.looks) + parts.test) * (n_configs + 1)
    return max(int((MOST_ASKED * grid - asked) / parts.test) - 1, 1)  # the unpruned model answers, too


def step_of(name: str, entries: Mapping[str, Entry], n: int, rule: Rule) -> Step:
    """What testing a configuration on n questions offers.

    What its family lost at a lower cost counts, too, where it makes the test likelier. A question that is not lost
    there counts as more than one here, as the loss grows at least as what is saved.
    """
    own = entries[name]
    saving = max(1 - own.cost, 0.0)
    cheaper = [e for e in entries.values() if own.family and e.family == own.family and e.cost < own.cost]
    lost, of, best = own.seen.lost, float(own.seen.n), 0.0
    won = own.seen.won / max(own.seen.n, 1)
    for entry in (None, *sorted(cheaper, key=lambda e: -e.cost)):
        if entry is not None:
            lost += entry.seen.lost
            of += entry.seen.n * min((1 - entry.cost) / max(saving, 1e-9), MOST_WEIGHT)
        best = max(best, chance(lost, round(won * of), round(of), n, rule.tolerance, rule.error))
    return Step(best, saving, name)


def sequence(steps: Sequence[Step], most: int) -> list[Step]:
    """At most `most` of these tests from the safest to the cheapest, each of which saves more than those before it.

    The first one taken has the largest expected saving, and then each that adds most to it, if a test only succeeds
    where the safer ones do.
    """
    rest: list[Step] = []
    for step in sorted(steps, key=lambda step: (-step.chance, -step.saving)):
        if step.chance >= LEAST_CHANCE and step.saving > max((safer.saving for safer in rest), default=0.0):
            rest.append(step)
    found: list[Step] = []
    while rest and len(found) < most:
        best = max(rest, key=lambda step: expected_saving([*found, step]))
        rest.remove(best)
        found.append(best)
    return sorted(found, key=lambda step: step.saving)


def expected_saving(steps: Sequence[Step]) -> float:
    """What is saved in the mean by the cheapest that passes, if a test only succeeds where the safer ones do."""
    total = before = 0.0
    for step in sorted(steps, key=lambda step: step.saving):
        total += step.chance * (step.saving - before)
        before = step.saving
    return total


# ---- the tests


def in_order(names: Sequence[str], rule: Rule, ask: Callable[[str], Outcome]) -> dict[str, Outcome]:
    """Test configurations in this order, each at the whole error, until one fails: what was seen of those tested.

    This is fixed-sequence testing: where the order does not depend on the answers of the tests, and nothing is tested
    after a failure, the probability that anything beyond the tolerance passes is at most the error of one test. For
    such a thing to pass, the first of the order that is beyond the tolerance must pass, and that is a single test
    (Maurer, Hothorn and Lehmacher 1995, in Biometrie in der chemisch-pharmazeutischen Industrie 6:3-18; Westfall and
    Krishen 2001, Journal of Statistical Planning and Inference 99(1):25-40). So the error is not divided.

    Args:
        names: in an order that does not depend on what `ask` returns.
        rule: what is to be promised.
        ask: asks a configuration the questions of the test.
    """
    found: dict[str, Outcome] = {}
    for name in names:
        found[name] = ask(name)
        if not holds(found[name], rule.tolerance, rule.error):
            break
    return found


def chosen(found: Mapping[str, Outcome], rule: Rule, cost: Callable[[str], float]) -> str | None:
    """The cheapest of those that passed; None where none did. All of them are promised, so any may be chosen."""
    passed = [name for name, seen in found.items() if holds(seen, rule.tolerance, rule.error)]
    return min(passed, key=cost, default=None)
