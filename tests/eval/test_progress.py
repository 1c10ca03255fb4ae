"""The progress bar: its clocks have names, and it shows the configuration that runs."""

from __future__ import annotations

import io

from rich.console import Console
from tokprune.eval.report.progress import following, progress


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def test_clocks_have_names_and_a_line_fits_80_columns():
    for width in (80, 120):
        out = console(width)
        with progress(out) as bars:
            bars.add_task("findit: prumerge:without_cls=received:adaptive=false@0.25", total=2400, completed=1200)
        line = [x for x in out.file.getvalue().splitlines() if "elapsed" in x][-1]
        line = line.rpartition("\x1b")[2].partition("K")[2] if "\x1b" in line else line
        assert "elapsed 0:00:00 left " in line
        assert "1200/2400" in line
        assert "findit: prum" in line
        assert len(line.rstrip()) <= width


def test_what_runs_next_is_shown():
    out = console(120)
    with progress(out) as bars:
        bar = bars.add_task("findit", total=4)
        advance = following(bars, bar, "findit", ["none", "vtc_cls@0.25"])
        seen = [bars.tasks[0].description]
        for _ in range(2):
            advance(2)
            seen.append(bars.tasks[0].description)
        assert seen == ["findit: none", "findit: vtc_cls@0.25", "findit"]
        assert bars.tasks[0].completed == 4
