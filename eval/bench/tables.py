"""Tables of a sweep: one matrix of what pruning changes, then the times of every cell by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ..report.terminal import Grid
from ..run.rows import NONE
from .break_even import FEWEST, NOISE, Ranges, rank, state
from .cells import PHASES, Interval, Row

NAMES = ("method", "keep")
# What leaves a table that is too wide, the least important first; times to the first token and in total stay.
LEAVING = (
    *("memory\nMiB", "KV\nMiB", "later\nFLOPs", "later\ntokens", "slower\nat"),
    *("visual\ntokens", "gains\nat", "prefill\nFLOPs", "KV"),
    *("rest", "later tokens,\neach", "selection", "vision"),
)


class Table(NamedTuple):
    """A title, a header, in which newlines may break names, and lines; the first two cells name a row."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def grid(self) -> Grid:
        """For the terminal."""
        return Grid(self.header, self.lines, self.title, names=len(NAMES), leaving=LEAVING)


def conditions_line(row: Row) -> str:
    """Model, machine and versions of a sweep."""
    layers = f"{row.n_layers} decoder and {row.n_vision_layers} vision layers"
    return (
        f"{row.model} ({row.weights} weights, {layers}), {row.device}, {row.dtype}, {row.attn_implementation}, "
        f"{row.n_text} text tokens, {row.rounds} rounds ({row.warmup} to warm up), torch {row.torch}, "
        f"transformers {row.transformers}, {row.date}"
    )


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The matrix of all cells, and milliseconds by phase of each."""
    cells = [list(group) for _, group in groupby(rows, key=_cell)]
    yield matrix(rows)
    for cell in cells:
        row = cell[0]
        size = row.picture or f"{row.resolution} x {row.resolution} pixels"
        picture = f"{size}, {row.n_visual} visual tokens per picture"
        yield _times(f"batch {row.batch_size}, {picture}: milliseconds, p50 [p20, p80]", _by_config(cell))


def matrix(rows: Sequence[Row]) -> Table:
    """What pruning changes: a line for each method and ratio, columns by resolution, batch size and output length."""
    cells = {key: list(group) for key, group in groupby(rows, key=_cell)}
    resolutions = {resolution for resolution, _ in cells}
    columns: dict[str, Callable[[Row], str]] = {}  # of the rows of a configuration in a cell, by the column's name
    places: dict[str, tuple[tuple[int, int], int]] = {}  # the cell and output length that a column is about
    for key, cell in cells.items():
        resolution, batch = key
        lengths = sorted({r.new_tokens for r in cell})
        where = [f"{resolution} pixels"] * (len(resolutions) > 1) + [f"batch {batch}"] * (len(cells) > 1)
        first = next(k for k in cells if k[0] == resolution) == key  # predictions are those of every batch
        for name, of in _PREDICTED.items() if first else ():
            at = "\n".join([*where[: len(resolutions) > 1], name])
            columns[at], places[at] = of, (key, lengths[-1])
        for name, length, of in _measured(lengths, spread=len(cells) == 1):
            at = "\n".join([*where, name])
            columns[at], places[at] = of, (key, length)
    lines = []
    for config in dict.fromkeys(r.config for r in rows):
        mine = {(_cell(r), r.new_tokens): r for r in rows if r.config == config}
        named = next(iter(mine.values()))
        found = [of(mine[places[name]]) if places[name] in mine else "" for name, of in columns.items()]
        lines.append([*_names(named), *found])
    return Table("Relative to the unpruned model", [*NAMES, *columns], lines)


def _cell(row: Row) -> tuple[int, int]:
    return row.resolution, row.batch_size


def _by_config(cell: Sequence[Row]) -> list[list[Row]]:
    return [list(each) for _, each in groupby(cell, key=lambda r: r.config)]


def _names(row: Row) -> list[str]:
    return [row.method, "" if row.keep_ratio is None else f"{row.keep_ratio:g}"]


def legend(rows: Sequence[Row]) -> Iterator[str]:
    """What the columns mean."""
    row = rows[0]
    yield (
        f"Ratios are to the unpruned model in the same round, [{100 * rank(row.rounds)[1]:.0f} % interval]. ~: no "
        "measurable difference. (n): mean over the decoder layers. FLOPs and KV: predicted by the ledger."
    )
    yield (
        "Gains at, slower at: output lengths at which pruning saves or costs time; 13+ is 13 to the longest measured, "
        "- is none. Between the measured lengths the mean time per token counts; nothing is said beyond the longest."
    )
    yield (
        "Vision, selection, prefill and rest add up to the first token; on a GPU they come from a run of their own. "
        "KV MiB is measured in the cache. Memory is the peak above what was in use before the run."
    )
    yield _noise(row)
    if row.rounds < FEWEST:
        yield f"{row.rounds} rounds show no differences; use at least {FEWEST} (--rounds {FEWEST})."
    elif not any(r.gains for r in rows):
        yield "No configuration gains time."


def _noise(row: Row) -> str:
    """What was random in a run, and who minds."""
    if row.weights != "random" and row.picture:
        return "The text is random: methods that read it see noise."
    content = "Weights are random" if row.weights == "random" else "Pictures and text are random"
    return f"{content}: methods that choose the number of tokens by content (exits, prumerge, tokencorr) see noise."


def _times(title: str, by_config: Sequence[Sequence[Row]]) -> Table:
    """Milliseconds of every phase."""
    lines = []
    for *_, row in by_config:
        spreads = [*(getattr(row, f"{phase}_ms") for phase in PHASES), row.first_token_ms, row.token_ms]
        shown = ("" if s is None else f"{_ms(s[1])} [{_ms(s[0])}, {_ms(s[2])}]" for s in spreads)
        lines.append([*_names(row), *shown])
    return Table(title, [*NAMES, *PHASES, "first\ntoken", "later tokens,\neach"], lines)


def _measured(lengths: Sequence[int], spread: bool) -> Iterator[tuple[str, int, Callable[[Row], str]]]:
    """Columns of one cell: their name, the output length that they are about, and what they show.

    With `spread`, the first token and the longest output have their intervals.
    """
    longest = lengths[-1]
    yield "first\ntoken", longest, lambda r: _ratio(r.first_token_ratio, r, interval=spread)
    for n in lengths:
        if n > 1:  # one token is the first
            wide = spread and n == longest
            yield f"total,\n{n} tokens", n, lambda r, wide=wide: _ratio(r.total_ratio, r, interval=wide)
    yield "gains\nat", longest, lambda r: _lengths(r.gains)
    yield "slower\nat", longest, lambda r: _lengths(r.losses)
    yield "later\ntokens", longest, lambda r: _ratio(r.token_ratio, r)
    yield "KV\nMiB", longest, lambda r: f"{r.kv_bytes / 2**20:.1f}"
    yield "memory\nMiB", longest, lambda r: "" if r.above_bytes is None else f"{r.above_bytes / 2**20:.0f}"


def _visual(row: Row) -> str:
    mean = "" if abs(row.n_mean - row.n_kept) < 0.05 else f" ({row.n_mean:.0f})"
    return f"{row.n_visual} -> {row.n_kept:.4g}{mean}"


# The same for every batch size.
_PREDICTED: dict[str, Callable[[Row], str]] = {
    "visual\ntokens": _visual,
    "prefill\nFLOPs": lambda r: _predicted(r.prefill_flops_ratio),
    "later\nFLOPs": lambda r: _predicted(r.token_flops_ratio),
    "KV": lambda r: _predicted(r.kv_bytes_ratio),
}


def _lengths(ranges: Ranges) -> str:
    """Ranges of output lengths; "13+" reaches the longest that was measured."""
    shown = (f"{low}+" if high is None else f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
    return ", ".join(shown) or "-"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.1f}" if abs(value) >= 0.95 else f"{value:.2f}"


def _predicted(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(found: Interval | None, row: Row, interval: bool = False) -> str:
    """A measured ratio, with its interval or without, and a mark where no difference is measurable."""
    if found is None:
        return ""
    low, middle, high = found
    text = f"{middle:.2f}"
    if interval and low < high:
        text += f" [{low:.2f}, {high:.2f}]"
    return text + (" ~" if row.method != NONE and state(found, row.rounds) == NOISE else "")
