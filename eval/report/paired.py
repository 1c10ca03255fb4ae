"""Two configurations on the same questions: the difference of their accuracies, with its interval.

python -m tokprune.eval.report.paired runs/compare globalcom2@0.1 globalcom2:allocate=even@0.1
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from ..run.lines import counted, typed
from ..run.rows import SampleRow
from ..stats import difference
from .stored import undamaged
from .tables import in_points


@dataclass
class Difference:
    """By how much the accuracy of `first` exceeds that of `second` on the same questions, with a 95 % interval.

    All of it is shares of the questions.

    The interval is Bonett and Price's (2012) for paired proportions, the p-value of McNemar's exact test. Where answers
    are worth something in between, `only_first` is the share of questions that `first` answers better, the interval is
    that of `stats.difference`, and there is no p-value.
    """

    task: str
    first: str
    second: str
    n_samples: int
    only_first: float
    only_second: float
    difference: float
    low: float
    high: float
    p_value: float | None


def differences(
    folder: Path, first: str, second: str, say: Callable[[str], None] = lambda text: None
) -> list[Difference]:
    """One difference for each task. Labels are those of the run's rows, such as globalcom2@0.1.

    Args:
        folder: of the run.
        first: a label.
        second: another.
        say: called with a line about damaged lines, if there are any.

    Raises:
        RunError: there is no such run, it is not finished, it lacks a configuration, or no question was answered by
            both.
    """
    if (folder / "samples.jsonl").exists() and not (folder / "rows.jsonl").exists():
        raise RunError(f"the run in {folder} is not finished; type its tokprune compare again to resume it")
    path, again = folder / "samples.jsonl", f"type the same tokprune compare --out {folder} again to repair it"
    if not path.is_file():
        raise RunError(f"no run of tokprune compare in {folder}: it has no samples.jsonl")
    damaged: dict[Path, int] = {}
    rows = undamaged(path, functools.partial(typed, SampleRow), damaged)
    for file, n in damaged.items():
        say(counted(n, file, f"left out; {again}"))
    if not rows:
        raise RunError(f"{path} holds no answer that can be read; {again}")
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        scores.setdefault((row.task, row.config), {})[row.sample] = row.score
    found = []
    for task in sorted({task for task, _ in scores}):
        try:
            a, b = scores[task, first], scores[task, second]
        except KeyError as error:
            labels = ", ".join(sorted(label for name, label in scores if name == task))
            raise RunError(f"no configuration {error.args[0][1]!r} in {folder}; there are: {labels}") from None
        both = sorted(a.keys() & b.keys())
        if not both:
            raise RunError(f"no question of {task} has an answer of both {first} and {second} in {path}; {again}")
        apart, n = difference([a[s] for s in both], [b[s] for s in both]), len(both)
        better = sum(a[s] > b[s] for s in both) / n, sum(a[s] < b[s] for s in both) / n
        ends = apart.value, apart.low, apart.high
        found.append(Difference(task, first, second, n, *better, *ends, apart.p_value))
    return found


def main(
    folder: Path,
    pairs: Annotated[list[str], typer.Argument(help="Labels in pairs: first second.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the rows as JSONL.")] = None,
) -> None:
    """Differences between configurations of a run."""
    found: list[Difference] = []
    try:
        for first, second in _two_by_two(pairs):
            found += differences(folder, first, second, lambda text: typer.echo(f"tokprune: {text}", err=True))
    except RunError as error:
        typer.echo(f"tokprune: {error}", err=True)
        raise typer.Exit(2) from None
    for d in found:
        p_value = "" if d.p_value is None else f"p = {d.p_value:.2g}, "
        points = in_points(d.difference, d.low, d.high)
        typer.echo(f"{d.task}: {d.first} - {d.second}: {points} points, {p_value}n = {d.n_samples}")
    if out:
        write_text(out, "".join(json.dumps(asdict(d)) + "\n" for d in found))


def _two_by_two(labels: Sequence[str]) -> list[tuple[str, str]]:
    if len(labels) % 2:
        raise RunError("use an even number of labels: first second [first second ...]")
    return list(zip(labels[::2], labels[1::2], strict=True))


if __name__ == "__main__":
    typer.run(main)
