"""The progress bar of commands that take long: what runs now, how much is done, time elapsed and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


class Elapsed(TimeElapsedColumn):
    """The time since the start, with its name."""

    def render(self, task: Task) -> Text:
        return Text("elapsed ") + super().render(task)


class Left(TimeRemainingColumn):
    """The time that is probably left, with its name."""

    def render(self, task: Task) -> Text:
        return Text("left ") + super().render(task)


class Now(ProgressColumn):
    """What runs, cut where it is longer than its place: it alone shrinks."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def progress(console: Console) -> Progress:
    """Bars of one line each, in 80 columns, too."""
    others = BarColumn(bar_width=12), MofNCompleteColumn(), Elapsed(), Left()
    for column in others:
        column._table_column = Column(no_wrap=True)
    return Progress(Now(Column()), *others, console=console)


def following(bars: Progress, bar: TaskID, what: str, turns: Iterable[str]) -> Callable[[int], None]:
    """Called after each turn with how much of the bar it was; shows which one runs next.

    Args:
        bars: of the command.
        bar: its number.
        what: the whole.
        turns: names of its parts, in the order in which they run.
    """
    left = iter(turns)

    def show() -> None:
        now = next(left, "")
        bars.update(bar, description=f"{what}: {now}" if now else what)

    def advance(n: int = 1) -> None:
        bars.advance(bar, n)
        show()

    show()
    return advance
