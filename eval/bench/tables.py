"""Tables of a sweep: phases, ratios and break-even of every cell, and totals over batch sizes and resolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.table import Table as RichTable

from ..run.rows import NONE
from .break_even import FEWEST, NOISE, Ranges, rank, state
from .cells import PHASES, Interval, Row


class Table(NamedTuple):
    """A title, a header, in which newlines may break names, and lines."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


def conditions_line(row: Row) -> str:
    """Model, machine and versions of a sweep."""
    layers = f"{row.n_layers} decoder and {row.n_vision_layers} vision layers"
    return (
        f"{row.model} ({row.weights} weights, {layers}), {row.device}, {row.dtype}, {row.attn_implementation}, "
        f"{row.n_text} text tokens, {row.rounds} rounds ({row.warmup} to warm up), torch {row.torch}, "
        f"transformers {row.transformers}, {row.date}"
    )


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Times and ratios of every cell, then totals by batch size and by resolution where there are several."""
    for _, group in groupby(rows, key=lambda r: (r.resolution, r.batch_size)):
        by_config = [list(each) for _, each in groupby(group, key=lambda r: r.config)]
        row = by_config[0][0]
        picture = f"{row.resolution} x {row.resolution} pixels, {row.n_visual} visual tokens per picture"
        title = f"batch {row.batch_size}, {picture}"
        yield _times(f"{title}: milliseconds, p50 [p20, p80]", by_config)
        yield _ratios(f"{title}: relative to the unpruned model", by_config)
    yield from _over_sizes(rows, "batch_size", "batch", "resolution")
    yield from _over_sizes(rows, "resolution", "pixels", "batch_size")


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
    content = "Weights are random" if row.weights == "random" else "Pictures and text are random"
    yield f"{content}: methods that choose the number of tokens by content (exits, prumerge, tokencorr) see noise."
    if row.rounds < FEWEST:
        yield f"{row.rounds} rounds show no differences; use at least {FEWEST} (--rounds {FEWEST})."
    elif not any(r.gains for r in rows):
        yield "No configuration gains time."


def rich_table(table: Table) -> RichTable:
    """For a terminal."""
    made = RichTable(title=table.title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for i, column in enumerate(table.header):
        made.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    for line in table.lines:
        made.add_row(*line)
    return made


def _times(title: str, by_config: Sequence[Sequence[Row]]) -> Table:
    """Milliseconds of every phase."""
    lines = []
    for *_, row in by_config:
        spreads = [*(getattr(row, f"{phase}_ms") for phase in PHASES), row.first_token_ms, row.token_ms]
        shown = ("" if s is None else f"{_ms(s[1])} [{_ms(s[0])}, {_ms(s[2])}]" for s in spreads)
        lines.append([row.name, *shown])
    return Table(title, ["method", *PHASES, "first token", "later tokens, each"], lines)


def _ratios(title: str, by_config: Sequence[Sequence[Row]]) -> Table:
    """Measured ratios next to predicted ones, and break-even."""
    totals = [f"total,\n{r.new_tokens} token{'s' * (r.new_tokens > 1)}" for r in by_config[0]]
    header = ["method", "visual\ntokens", "first\ntoken", "FLOPs", "later\ntokens", "FLOPs", *totals]
    header += ["gains\nat", "slower\nat", "KV\nMiB", "KV", "memory\nMiB"]
    return Table(title, header, [_ratio_line(each) for each in by_config])


def _ratio_line(of_lengths: Sequence[Row]) -> list[str]:
    """One configuration; with more than two output lengths, only the longest has its interval."""
    row = of_lengths[-1]
    mean = "" if abs(row.n_mean - row.n_kept) < 0.05 else f" ({row.n_mean:.0f})"
    return [
        row.name,
        f"{row.n_visual} -> {row.n_kept:.4g}{mean}",
        _ratio(row.first_token_ratio, row),
        _predicted(row.prefill_flops_ratio),
        _ratio(row.token_ratio, row),
        _predicted(row.token_flops_ratio),
        *(_ratio(r.total_ratio, r, interval=r is row or len(of_lengths) < 3) for r in of_lengths),
        _lengths(row.gains),
        _lengths(row.losses),
        f"{row.kv_bytes / 2**20:.1f}",
        _predicted(row.kv_bytes_ratio),
        "" if row.above_bytes is None else f"{row.above_bytes / 2**20:.0f}",
    ]


def _over_sizes(rows: Sequence[Row], field: str, what: str, other: str) -> Iterator[Table]:
    """Ratios of the total time by batch size or by resolution, if several were measured."""
    sizes = sorted({getattr(r, field) for r in rows})
    if len(sizes) < 2:
        return
    found: dict[tuple, dict[int, str]] = {}
    for row in rows:
        if row.method != NONE:
            line = found.setdefault((row.name, row.new_tokens, getattr(row, other)), {})
            line[getattr(row, field)] = _ratio(row.total_ratio, row)
    header = ["method", "output\ntokens", other.replace("_", " "), *(f"{what} {size}" for size in sizes)]
    lines = [[name, str(n), str(held), *(x.get(s, "") for s in sizes)] for (name, n, held), x in found.items()]
    yield Table(f"total time by {field.replace('_', ' ')}, relative to the unpruned model", header, lines)


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
