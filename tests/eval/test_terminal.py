"""Tables for the terminal: at every width each row has its whole name, and no line is too long."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType
from tokprune.eval.bench import tables as bench_tables
from tokprune.eval.report.exports import markdown_tables
from tokprune.eval.report.findings import task_table, unequal, verdict
from tokprune.eval.report.render import read_rows
from tokprune.eval.report.tables import QUESTION_ONLY, budget, table
from tokprune.eval.report.terminal import Grid
from tokprune.eval.run.rows import Row, pooled

from tokprune.cli import tables as cli_tables

WIDTHS = (60, 80, 100, 120, 200)
RUNS = ("compare-tiny-llava.jsonl", "compare-tiny-qwen-findit.jsonl", "cuts-tiny-llava-next.jsonl")


def printed(what: RenderableType, width: int) -> list[str]:
    """Lines as a terminal of that width shows them; markup is on, as it is in a console of somebody else."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def rows_of(name: str) -> tuple[list[Row], float | None]:
    """The rows of the first task, and its question-only floor."""
    lines = read_rows(name)
    rows = [Row.read(line) for line in lines if line["method"] != QUESTION_ONLY]
    own = [r for r in rows if r.task == rows[0].task]
    floors = [x["value"] for x in lines if x["method"] == QUESTION_ONLY and x["task"] == own[0].task]
    return own, floors[0] if floors else None


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("run", RUNS)
def test_every_row_of_a_comparison_keeps_its_name_at_every_width(run, width):
    rows, floor = rows_of(run)
    shown = printed(table("t", rows, floor), width)
    assert max(map(len, shown)) <= width
    for row in pooled(rows):
        keep = budget(row)
        whole = rf"{re.escape(row.method)}(, keep|\s)?\s*{re.escape(keep)}(\s|$)"
        found = [line for line in shown if re.match(whole, line)]
        assert len(found) == 1, (row.method, keep, found)
        own = " ".join(shown[(at := shown.index(found[0])) : at + 2])  # a block has it on the line after the name
        assert f" {row.value:.3f} " in f"{own} "
    assert not any("…" in line for line in shown)


def test_columns_leave_in_the_order_that_is_declared():
    rows, floor = rows_of("compare-tiny-llava.jsonl")
    seen = {width: " ".join(printed(table("t", rows, floor), width)) for width in WIDTHS}
    assert "Not shown" not in seen[200]
    gone = re.search(r"Not shown in 80 columns: (.+?) \(they need (\d+)\)", seen[80])
    assert gone[1] == "visual tokens, LLM FLOPs, KV bytes, prefill time"
    assert "Not shown in 100 columns: visual tokens, LLM FLOPs (" in seen[100]
    needed = int(gone[2])
    assert "Not shown" not in " ".join(printed(table("t", rows, floor), needed))
    assert "Not shown" in " ".join(printed(table("t", rows, floor), needed - 1))


def test_below_80_a_row_is_a_block():
    rows, floor = rows_of("compare-tiny-llava.jsonl")
    assert "vtc_cls, keep 0.25" in printed(table("t", rows, floor), 79)  # though fewer columns would fit
    assert "vtc_cls, keep 0.25" not in printed(table("t", rows, floor), 80)
    shown = printed(table("t", rows, floor), 60)
    start = shown.index("vtc_cls, keep 0.25")
    row = next(r for r in rows if r.config == "vtc_cls@0.25")
    assert shown[start + 1] == f"  accuracy [95 %]: {row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
    assert shown[start + 2].startswith("  against unpruned [95 %]: no loss seen; at most ")
    end = next(i for i, line in enumerate(shown[start + 1 :], start + 1) if not line.startswith("  "))
    assert "  prefill FLOPs: x 0.48" in shown[start:end]


def test_a_small_table_stays_one_below_80():
    small = Grid(["layer", "tokens left"], [["0", "144"], ["1", "36"]])
    assert printed(small, 40)[2:] == ["0              144", "1               36"]


def test_without_columns_that_may_leave_a_wide_table_becomes_blocks():
    wide = Grid(["method", *"abc"], [["x", *["1" * 40] * 3], ["y:" + "z" * 120, *["2"] * 3]])
    shown = printed(wide, 100)
    assert shown[:4] == ["x", *(f"  {name}: {'1' * 40}" for name in "abc")]
    assert max(map(len, shown)) <= 100
    assert "".join(shown[4:6]) == "y:" + "z" * 120  # folded, not cut


def test_running_text_wraps_before_columns_leave():
    header, line = ["method", "what it does", "n"], ["a", "one two three four five six seven eight nine ten", "7"]
    shown = printed(Grid(header, [line], text=["what it does"], leaving=["n"]), 40)
    assert "n" in shown[0].split()
    assert len(shown) == 4
    assert max(map(len, shown)) <= 40


def test_notes_stand_below_at_every_width():
    rows, floor = rows_of("compare-tiny-qwen-findit.jsonl")
    for width in WIDTHS:
        shown = printed(task_table("t", rows, floor), width)
        assert max(map(len, shown)) <= width
        notes = unequal(rows), verdict(rows, floor)
        assert all(notes)
        assert " ".join(shown).endswith(" ".join(notes))


def test_brackets_of_a_name_are_no_markup():
    assert "[bold]x[/bold]" in printed(Grid(["method", "n"], [["[bold]x[/bold]", "[red]"]]), 80)[2]


BENCHES = ("bench-tiny-llava.jsonl", "bench-llava-1.5-7b.jsonl")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("run", BENCHES)
def test_every_row_of_a_benchmark_keeps_its_name_at_every_width(run, width):
    rows = [bench_tables.Row(**line) for line in read_rows(run)]
    for made in bench_tables.tables(rows):
        shown = printed(made.grid(), width)
        assert max(map(len, shown)) <= width
        for row in rows:
            keep = "" if row.keep_ratio is None else f"{row.keep_ratio:g}"
            found = [line for line in shown if re.match(rf"{row.method}(, keep)?\s*{keep}(\s|$)", line)]
            assert len(found) == 1, (row.method, found)


def test_columns_of_all_batches_leave_together():
    rows = [bench_tables.Row(**line) for line in read_rows(BENCHES[0])]
    shown = " ".join(printed(bench_tables.matrix(rows).grid(), 100))
    assert "Not shown in 100 columns: memory MiB, KV MiB, later FLOPs, later tokens, slower at, " in shown


def test_other_tables_fit_too():
    for width in WIDTHS:
        for made in (cli_tables.methods_table(), cli_tables.support_table(), cli_tables.model_table("qwen2_5_vl")):
            shown = printed(made, width)
            assert max(map(len, shown)) <= width
            for line in made.lines:
                assert sum(re.match(rf"{re.escape(line[0])}(,|\s|$)", x) is not None for x in shown) >= 1, line[0]


def test_the_table_of_the_terminal_has_the_figures_of_the_one_in_markdown():
    rows, floor = rows_of("compare-tiny-llava.jsonl")
    markdown = markdown_tables(rows, {rows[0].task: floor}, text=str)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("| ")]
    grid = table("t", rows, floor)
    assert [list(map(str, line)) for line in grid.lines] == cells[1:]
