"""What the unpruned model answered wrong, and what may be wrong with how it was asked or graded."""

from __future__ import annotations

from collections.abc import Sequence

from ..run.rows import SampleRow
from ..tasks import Sample
from ..tasks.metrics import contains, names_a_choice
from .terminal import Grid

N_WRONG = 5
SUFFIX = "--suffix ' Answer with one word.'"
LETTER = "--suffix ' Answer with the letter of the right choice.'"
_WHOLE = ("exact", "normalized")  # metrics that compare whole answers


def hint(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> str:
    """What to type where most answers are sentences around the expected words, or were cut off; else empty.

    Args:
        samples: of the task.
        rows: answers of the unpruned model.
    """
    asked = {s.id: s for s in samples}
    graded = [r for r in rows if r.sample in asked and r.metric in _WHOLE]
    around = sum(not r.right and contains(r.answer, asked[r.sample].answers) > 0 for r in graded)
    cut = sum(not r.right and not r.stopped for r in graded)
    chosen = [r for r in rows if r.sample in asked and r.metric == "choice"]
    astray = sum(not r.right and not names_a_choice(r.answer) for r in chosen)
    if 2 * astray > len(chosen):
        return (
            f"{astray} of {len(chosen)} answers of the unpruned model are no letter of a choice nor its text: "
            f"use {LETTER}"
        )
    if 2 * around > len(graded):
        return (
            f"{around} of {len(graded)} answers of the unpruned model contain the expected answer and are not equal to "
            f"it: use {SUFFIX} or --metric contains"
        )
    if 2 * cut > len(graded):
        return (
            f"{cut} of {len(graded)} answers of the unpruned model are wrong and were cut off before their end: use "
            f"{SUFFIX}, or --metric contains with a larger --max-new-tokens"
        )
    return ""


def wrong(rows: Sequence[SampleRow]) -> Grid | None:
    """The first wrong answers of the unpruned model; None where there is none.

    Args:
        rows: answers of the unpruned model.
    """
    lost = [r for r in rows if not r.right]
    if not lost:
        return None
    first = min(len(lost), N_WRONG)
    header = ["question", "expected", "answer"]
    lines = [[row.question or row.sample, row.expected, row.answer] for row in lost[:first]]
    return Grid(header, lines, f"Wrong answers of the unpruned model, {first} of {len(lost)}:", text=header)
