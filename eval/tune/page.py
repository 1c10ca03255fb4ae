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
    from .tune import Tuned, Wanted

N_PICTURES = 12
WORDS = {"latency": "time of an answer", "flops": "FLOPs of the prefill", "memory": "bytes of the KV cache"}


def percent(share: float) -> str:
    """As "4.2 %"."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def sentences(wanted: Wanted, found: Tuned) -> list[str]:
    """The result in words, the most important first."""
    confidence, most = percent(1 - wanted.rule.error), percent(wanted.rule.tolerance)
    what = "answers that change" if wanted.agree else "loss of accuracy"
    if found.config is None:
        return [
            "No configuration that saves anything is likely to stay within the tolerance. Nothing was tested or saved.",
            f"{len(found.finish.entries)} configurations raced; leave the model unpruned, or use a larger --max-loss.",
        ]
    seen = found.seen
    test = f"{seen.n} questions that the choice had not seen: {seen.lost} lost, {seen.won} won"
    said = [f"{found.config.label}: {what} at most {percent(found.bound)}, with {confidence} confidence ({test})."]
    if not found.promised:
        said = [
            f"{found.config.label} was the best of the race, and {most} cannot be promised for it: {what} may be up to "
            f"{percent(found.bound)} ({test}). Nothing was saved."
        ]
        if found.more:
            said.append(f"If other questions go alike, a test of about {found.more} would be enough.")
        else:
            said.append("More questions alone would not help: what was seen is not within the tolerance.")
    said.append(
        "It saves " + ", ".join(f"{percent(1 - cost)} of {WORDS[goal]}" for goal, cost in found.saves.items()) + "."
    )
    return [*said, timing(wanted, found)]


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
        f"{parts.test}."
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
        winner=found.finish.winner,
        cards=cards,
        n_lost=len(found.lost),
        saved=found.promised,
    )
    write_text(path, page, "replace")
