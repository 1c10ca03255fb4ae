"""What a sweep found, as people read it: phases, ratios beside the ledger's, and when pruning pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.table import Table

from ..run.rows import NONE
from .break_even import FEWEST, GAIN, LOSS, NOISE, Interval, by_size
from .cells import PHASES, Row

NOTES = (
    "Phases add up to the first token in every round (on a GPU of a run of their own, since reading them waits for the "
    'device); "rest" is what is none of them. "~": the interval holds 1, or '
    "there are fewer than six rounds: no difference to the bare model is measurable.",
    "KV MiB are measured in the cache; the ratios under FLOPs and KV are the ledger's, and FLOPs say little about "
    "decoding, which reads all weights for every token. Memory is the peak above what was in use before a run.",
)
RANDOM = (
    "Weights are random, which changes no time; but what a method decides by content (exits, prumerge, tokencorr), it "
    "decides about random content."
)
REAL = "Pictures and text are random: what a method decides by content, it decides about random content."


def conditions_line(row: Row) -> str:
    """Where and with what everything ran."""
    layers = f"{row.n_layers} decoder and {row.n_vision_layers} vision layers"
    return (
        f"{row.model} ({row.weights} weights, {layers}), {row.device}, {row.dtype}, {row.attn_implementation}, "
        f"{row.n_text} text tokens, {row.rounds} rounds ({row.warmup} to warm up), torch {row.torch}, "
        f"transformers {row.transformers}, {row.date}"
    )


def cells(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows by resolution and batch size."""
    for _, group in groupby(rows, key=lambda r: (r.resolution, r.batch_size)):
        yield list(group)


def title(row: Row) -> str:
    """Of a cell."""
    return f"batch {row.batch_size}, {row.resolution} x {row.resolution} pixels, {row.n_visual} visual tokens a picture"


def name(row: Row) -> str:
    """Method and ratio."""
    return row.method + ("" if row.keep_ratio is None else f" {row.keep_ratio:g}")


PHASE_COLUMNS = (*PHASES, "first token", "each token behind")


def phase_cells(row: Row) -> list[str]:
    """Milliseconds of every phase: p50 [p20, p80]."""
    spreads = [getattr(row, f"{phase}_ms") for phase in PHASES] + [row.first_token_ms, row.token_ms]
    return [name(row), *("" if s is None else f"{_ms(s['p50'])} [{_ms(s['p20'])}, {_ms(s['p80'])}]" for s in spreads)]


def ratio_columns(lengths: Sequence[int]) -> list[str]:
    """Headers of the ratios."""
    totals = [f"total,\n{n} tokens" for n in lengths]
    return ["visual tokens", "first\ntoken", "FLOPs", "each\nbehind", "FLOPs", *totals, "KV\nMiB", "KV", "memory\nMiB"]


def ratio_cells(of_lengths: Sequence[Row]) -> list[str]:
    """Ratios to the bare model, of one configuration at every output length; of many, the last has its interval."""
    row = of_lengths[-1]
    mean = "" if abs(row.n_mean - row.n_kept) < 0.05 else f" ({row.n_mean:.0f})"
    return [
        name(row),
        f"{row.n_visual} -> {row.n_kept:.4g}{mean}",
        _ratio(row.first_token_ratio),
        _times(row.prefill_flops_ratio),
        _ratio(row.token_ratio),
        _times(row.token_flops_ratio),
        *(_ratio(r.total_ratio, interval=r is row or len(of_lengths) < 3) for r in of_lengths),
        f"{row.kv_bytes / 2**20:.1f}",
        _times(row.kv_bytes_ratio),
        "" if row.above_bytes is None else f"{row.above_bytes / 2**20:.0f}",
    ]


def summary(cell: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of one table for a cell: medians of phases, and ratios."""
    ratios = [c.replace("\n", " ") for c in ratio_columns(sorted({r.new_tokens for r in cell}))]
    names = [f"{phase}, ms" for phase in (*PHASES[:3], *PHASE_COLUMNS[4:])]
    names = ["method", *names, *(f"{c}, ratio" if c in ("first token", "each behind") else c for c in ratios)]
    lines = []
    for each in _by_config(cell):
        row = each[-1]
        spreads = [row.vision_ms, row.selection_ms, row.prefill_ms, row.first_token_ms, row.token_ms]
        shown = ["" if s is None else _ms(s["p50"]) for s in spreads]
        lines.append([f"`{name(row)}`", *shown, *ratio_cells(each)[1:]])
    return names, lines


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Two a cell: milliseconds, and ratios."""
    for cell in cells(rows):
        lengths = sorted({r.new_tokens for r in cell})
        by_config = _by_config(cell)
        yield _table(
            f"{title(cell[0])}: milliseconds, p50 [p20, p80]",
            PHASE_COLUMNS,
            [phase_cells(each[-1]) for each in by_config],
        )
        coverage = 100 * cell[0].total_ratio["coverage"]
        yield _table(
            f"{title(cell[0])}: x of the bare model, [{coverage:.0f} % interval]; (n): mean over decoder layers",
            ratio_columns(lengths),
            [ratio_cells(each) for each in by_config],
        )


def _table(title_: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table("method", title=title_, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _by_config(cell: Sequence[Row]) -> list[list[Row]]:
    """Rows of every configuration, by output length."""
    return [list(group) for _, group in groupby(cell, key=lambda r: r.config)]


# ------------------------------------------------------------------------------------------ sentences


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """When pruning pays: by output length in every cell, then by batch size and by resolution."""
    for cell in cells(rows):
        bare, *pruned = _by_config(cell)
        for each in pruned:
            row = each[-1]
            paid = _paid(row, bare[-1])
            verdict = row.breakeven or _at_one_length(row)
            yield f"{name(row)}, batch {row.batch_size}, {row.resolution} pixels: {verdict}. {paid}"
    yield from _over_sizes(rows, "batch_size", "batch size")
    yield from _over_sizes(rows, "resolution", "resolution")
    if rows and rows[0].rounds < FEWEST:
        yield f"Rounds are {rows[0].rounds}; {FEWEST} are the fewest that tell a difference from noise (--rounds)."
    elif not any(Interval(**r.total_ratio).state == GAIN or r.breakeven.startswith("gains") for r in rows):
        yield "Nothing is gained by any of these configurations."


def _over_sizes(rows: Sequence[Row], field: str, what: str) -> Iterator[str]:
    """Where a method gains over the measured batches or pictures, the other one held."""
    other = "resolution" if field == "batch_size" else "batch_size"
    found: dict[tuple, dict[int, str]] = {}
    for row in rows:
        if row.method != NONE:
            key = name(row), row.new_tokens, getattr(row, other)
            found.setdefault(key, {})[getattr(row, field)] = Interval(**row.total_ratio).state
    several = len({getattr(r, other) for r in rows}) > 1
    for (method, n_new, held), states in found.items():
        if len(states) > 1:
            at = f", {other.replace('_', ' ')} {held}" if several else ""
            yield f"{method}, output length {n_new}{at}: {by_size(dict(sorted(states.items())), what)}."


def _at_one_length(row: Row) -> str:
    """Of a run of one token, which tells nothing of longer ones."""
    state = Interval(**row.total_ratio).state
    says = {GAIN: "gains at one token", LOSS: "nothing is gained: it costs time"}
    return says.get(state, "nothing is gained: no difference measurable")


def _paid(row: Row, bare: Row) -> str:
    """What the selection costs, against what fewer columns save."""
    selection = row.selection_ms["p50"] - bare.selection_ms["p50"]
    text = f"Selection costs {_ms(selection)} ms; prefill is {_saved(bare.prefill_ms['p50'] - row.prefill_ms['p50'])}"
    if row.token_ms is None or bare.token_ms is None:
        return text + "."
    if row.token_ratio is None or Interval(**row.token_ratio).state == NOISE:
        return f"{text}, of the tokens behind it no difference is measurable."
    return f"{text}, each token behind it {_saved(bare.token_ms['p50'] - row.token_ms['p50'])}."


def _saved(milliseconds: float) -> str:
    return f"{_ms(abs(milliseconds))} ms {'shorter' if milliseconds >= 0 else 'longer'}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.1f}" if abs(value) >= 0.95 else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"x {value:.2f}"


def _ratio(found: dict[str, float] | None, interval: bool = False) -> str:
    """A paired ratio; with its interval, or with a mark where that holds 1."""
    if found is None:
        return ""
    is_itself = found["low"] == found["high"] == 1  # the bare model
    text, noise = f"x {found['median']:.2f}", Interval(**found).state == NOISE and not is_itself
    if interval and found["low"] < found["high"]:
        text += f" [{found['low']:.2f}, {found['high']:.2f}]"
    return text + (" ~" if noise else "")
