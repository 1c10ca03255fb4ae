"""The page of a tuned configuration: what was found, what it saves, what it risks, and which questions it loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.core.files import write_text

from ..report.losses import Artist
from ..report.pages import template
from ..run.runner import Runner
from ..tasks import Sample, Task
from .race import LOOKS, Parts

if TYPE_CHECKING:
    from .tune import Tested, Tuned, Wanted

N_PICTURES = 12
WORDS = {"latency": "time of an answer in the test", "flops": "FLOPs of the prefill", "memory": "bytes of the KV cache"}


def percent(share: float) -> str:
    """As "4.2 %"."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def sentences(wanted: Wanted, found: Tuned) -> list[str]:
    """The result in words, the most important first."""
    confidence, most = percent(1 - wanted.rule.error), percent(wanted.rule.tolerance)
    what = "answers that change" if wanted.agree else "loss of accuracy"
    test = found.test
    if test is None:
        return [
            "No configuration that saves anything is likely to stay within the tolerance. Nothing was tested or saved.",
            f"{len(found.finish.entries)} configurations raced; leave the model unpruned, or use a larger --max-loss.",
        ]
    if test.promised:
        alone = f"{_answered(test)}; by this test alone at most {percent(test.bound)}"
        said = [f"{test.config}: {what} at most {most}, with {confidence} confidence ({alone})."]
        said += _cheaper(found, test)
    else:
        said = [
            f"{test.config} is the safest that the race found, and {most} cannot be promised for it: {what} may be up "
            f"to {percent(test.bound)} ({_answered(test)}). Nothing was saved.",
            _needed(test),
        ]
    return [*said, *_saved(wanted, found), timing(wanted, found)]


def _saved(wanted: Wanted, found: Tuned) -> list[str]:
    """What was counted, and the time of the test where that decided; `timing` measured it side by side."""
    shown = [goal for goal in found.saves if goal in ("flops", "memory", wanted.goal)]
    saved = [f"{percent(1 - found.saves[goal])} of {WORDS[goal]}" for goal in shown]
    return [f"It saves {', '.join(saved)}."] if saved else []


def _answered(test: Tested) -> str:
    return f"of {test.seen.n} questions that the race did not see {test.seen.lost} lost, {test.seen.won} won"


def _needed(test: Tested) -> str:
    if test.more:
        return f"If other questions go alike, a test of about {test.more:,} would be enough."
    return "More questions alone would not help: what was seen is not within the tolerance."


def _cheaper(found: Tuned, test: Tested) -> list[str]:
    """How many passed, and which one that costs less did not."""
    passed = [other.config for other in found.tests if other.promised]
    said = [f"{len(passed)} configurations passed their tests, and it is the cheapest."] if len(passed) > 1 else []
    failed = next((other for other in found.tests if not other.promised), None)
    if failed is None:
        return said
    bound = f"its loss may be up to {percent(failed.bound)} ({_answered(failed)})"
    return [*said, f"The next one, {failed.config}, cannot be promised: {bound}. {_needed(failed)}"]


def timing(wanted: Wanted, found: Tuned) -> str:
    """Times on this machine, and from which length of an answer on they are shorter."""
    first, total = (f"x {middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in (found.first, found.total))
    n = wanted.new_tokens
    ranges = [f"{start} to {n if end is None else end}" for start, end in found.gains]
    gains = f"Time is saved at answers of {', '.join(ranges)} tokens." if ranges else "No time is surely saved."
    return f"Measured here: first token {first}, answers of {n} tokens {total}, relative to the unpruned model. {gains}"


def effort(parts: Parts, found: Tuned) -> str:
    """How many answers were asked for, and who left the race when."""
    n = [len(names) for names in found.finish.left]
    shares = ", ".join(f"{k} at {share:g}" for k, share in zip(n, LOOKS, strict=False))
    return (
        f"{found.asked:,} answers, {percent(found.asked / max(found.grid, 1))} of the {found.grid:,} of a full "
        f"comparison. The race had {sum(parts.looks)} questions (configurations asked: {shares} of them), the test "
        f"{parts.test} (configurations asked: {len(found.tests)} of {len(found.finish.sequence)} in order)."
    )


def write(
    path: Path,
    runner: Runner,
    model_name: str,
    task: Task,
    samples: Sequence[Sample],
    parts: Parts,
    wanted: Wanted,
    found: Tuned,
) -> None:
    """Write the page, with pictures of some of the questions that the test lost."""
    artist = Artist(runner, [(task, samples)])
    cards = [{"row": row, "picture": artist.draw(row)} for row in found.lost[:N_PICTURES]]
    race = sorted(found.finish.entries.items(), key=lambda pair: (-pair[1].seen.n, pair[1].cost))
    page = template("tune.html.jinja").render(
        model=model_name,
        task=task.name,
        sentences=sentences(wanted, found),
        effort=effort(parts, found),
        goal=WORDS[wanted.goal],
        agree=wanted.agree,
        race=[(name, e.seen.n, e.seen.lost, e.seen.won, f"{e.cost:.3f}") for name, e in race],
        tests=found.tests,
        percent=percent,
        chosen=found.config.label if found.config else "",
        cards=cards,
        n_lost=len(found.lost),
        saved=found.promised,
    )
    write_text(path, page, "replace")
