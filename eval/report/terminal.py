"""Tables for the terminal that fit its width and never lose the names of their rows.

Wide enough, a table shows all of its columns. Narrower, running text wraps, and then the columns that say least leave;
a line says which. Below 80 columns, or where even that does not fit, every row is a block: its name, then a line for
each figure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

NARROW = 80  # columns of a terminal; below, no column leaves: all of them fit, or rows are blocks
_GAP = 2  # between two columns
_LEAST_TEXT = 24  # columns that running text is left with


@dataclass(frozen=True)
class Grid:
    """A table for a rich console.

    Args:
        header: names of the columns, which newlines may break.
        lines: cells of every row.
        title: above it.
        names: how many of the first columns name a row. They never shrink or leave.
        leaving: columns that may leave, the least important first; "tokens" also stands for every column that ends in
            a line of that name.
        text: columns of running text, which may wrap.
        left: columns that are read from the left; the first one and those of text are.
        sections: numbers of the lines before which a gap is left.
        notes: sentences below it.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""
    names: int = 1
    leaving: Sequence[str] = ()
    text: Collection[str] = ()
    left: Collection[str] = ()
    sections: Collection[int] = ()
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self.title:
            yield Text(self.title, overflow="fold")
        shown, gone = self._shown(width)
        if shown:
            yield self._table(shown, width)
        else:
            yield from self._blocks()
        if gone:
            needed = self._least(range(len(self.header)))
            yield Text(f"Not shown in {width} columns: {', '.join(gone)} (they need {needed}).", overflow="fold")
        for note in self.notes:
            yield Text(note, overflow="fold")

    # ---- what fits

    def _shown(self, width: int) -> tuple[list[int], list[str]]:
        """Numbers of the columns that fit, none where rows have to be blocks; and what left."""
        shown, gone = list(range(len(self.header))), []
        leaving = list(self.leaving)
        while self._least(shown) > width:
            if width < NARROW or not leaving:
                return [], []
            name = leaving.pop(0)
            stay = [i for i in shown if not f"\n{self.header[i]}".endswith(f"\n{name}")]
            gone += [_one_line(name)] if len(stay) < len(shown) else []
            shown = stay
        return shown, gone

    def _least(self, shown: Collection[int]) -> int:
        """Columns that these take at least."""
        return self._total([self._narrowest(i) for i in shown])

    def _narrowest(self, column: int) -> int:
        whole = self._width(column)
        return min(whole, _LEAST_TEXT) if self.header[column] in self.text else whole

    def _width(self, column: int) -> int:
        """Of the widest cell."""
        parts = [*self.header[column].split("\n"), *(line[column] for line in self.lines)]
        return max(map(cell_len, parts))

    @staticmethod
    def _total(widths: Sequence[int]) -> int:
        return sum(widths) + _GAP * max(len(widths) - 1, 0)

    # ---- as a table

    def _table(self, shown: Sequence[int], width: int) -> RichTable:
        widths = self._widths(shown, width)
        table = RichTable(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for place, i in enumerate(shown):
            name = self.header[i]
            is_left = not place or name in self.text or name in self.left
            table.add_column(Text(name), justify="left" if is_left else "right", width=widths[i], overflow="fold")
        for number, line in enumerate(self.lines):
            if number in self.sections:
                table.add_section()
            table.add_row(*(Text(line[i]) for i in shown))
        return table

    def _widths(self, shown: Sequence[int], width: int) -> dict[int, int]:
        """Of every column; what is left over goes to running text, from the left."""
        widths = {i: self._narrowest(i) for i in shown}
        spare = width - self._total(list(widths.values()))
        for i in shown:
            more = min(spare, self._width(i) - widths[i])
            widths[i] += more
            spare -= more
        return widths

    # ---- as blocks

    def _blocks(self) -> Iterator[RenderableType]:
        """The name of a row, then "what: value" for each figure that it has."""
        for line in self.lines:
            first, *others = line[: self.names]
            named = [first, *(_named(*pair) for pair in zip(self.header[1:], others, strict=False) if pair[1])]
            yield Text(", ".join(part.strip() for part in named if part), overflow="fold")
            for i in range(self.names, len(self.header)):
                if line[i]:
                    yield Padding(
                        Text(f"{_one_line(self.header[i])}: {line[i]}", overflow="fold"), (0, 0, 0, 2), expand=False
                    )


def _one_line(name: str) -> str:
    return name.replace("\n", " ")


def _named(what: str, value: str) -> str:
    """As "keep 0.25"; a value that begins with a word says itself what it is, as "FLOPs 0.5"."""
    return value if value[:1].isalpha() else f"{what} {value}"
