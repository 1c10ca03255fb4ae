"""Times of selecting: every method has one, and what meets a limit says which."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import typer
from tokprune.eval.bench import selection_times
from tokprune.eval.report import render

from tokprune.core.layout import frames_layout, grid_layout
from tokprune.core.signals import Kind
from tokprune.core.tokens import Stage
from tokprune.methods import METHODS, build_method
from tokprune.prune import slow

NAMES = selection_times.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_without_a_trained_file_can_be_timed(name):
    layout = frames_layout(6, 4, 4) if name in selection_times.VIDEO else grid_layout(8, 12)
    run = selection_times.selection(selection_times.BUDGETED.get(name, name), layout)
    assert run() is not None


def test_methods_that_need_a_file_are_the_only_ones_left_out():
    left_out = set(METHODS.own_names()) - set(NAMES) - set(METHODS.aliases)
    assert all(METHODS.load(name).needs_file for name in left_out)


def test_limits_end_a_measurement_and_are_shown(tmp_path, monkeypatch):
    layout = grid_layout(24, 24)
    endless = lambda: lambda: selection_times.time.sleep(60)  # noqa: E731
    assert selection_times.seconds_of(endless, 0.2, 64) == ([], "time")

    def large():
        return lambda: selection_times.torch.ones(2**33)

    assert selection_times.seconds_of(large, 60, 4) == ([], "memory")
    common = {"limit_s": 60, "limit_gib": 4, **selection_times.conditions_of_machine()}
    rows = [
        selection_times._row("selection", "a", layout, [0.5, 0.25, 1.0], "", common),
        selection_times._row("selection", "b", layout, [], "time", common),
        selection_times._row("selection", "c", layout, [], "memory", common),
        selection_times._row("prefill", "shape", layout, [50.0], "", common),
        selection_times._row("share", "a", layout, [0.5], "", common),
    ]
    (tmp_path / "times.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in rows))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = render.selection_times("times.jsonl")
    assert [shown in text for shown in ("0.5 s", "> 60 s", "> 4 GiB", "50 s", "1 %")] == [True] * 5


def test_rows_of_other_methods_stay_in_the_file(tmp_path):
    out = tmp_path / "times.jsonl"
    selection_times.main(out, "random", "576", 60, 8)
    selection_times.main(out, "uniform", "576", 60, 8)
    selection_times.main(out, "random", "576", 60, 8)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(r["method"] for r in rows) == ["random", "uniform"]
    assert all(r["seconds"] > 0 for r in rows)
    with pytest.raises(typer.BadParameter, match="uniform"):
        selection_times.main(out, "unifrom")


STORED = [
    selection_times.Timed(**json.loads(line))
    for line in (render.RESULTS / "selection-times.jsonl").read_text(encoding="utf-8").splitlines()
]


def estimated(row):
    """Seconds that the warning goes by, for what was measured."""
    method = build_method(row.method)[0]
    between = method.stage is Stage.DECODER
    needs = method.reads(selection_times.LAYER) if between else method.needs(selection_times.TOWER)
    kinds, width = {s.kind for s in needs}, selection_times.WIDTH
    has_keys = Kind.KEYS in kinds
    widths = slow.Widths(
        rows=width,
        keys=selection_times.HEADS * selection_times.HEAD_DIM if has_keys else width,
        head=selection_times.HEAD_DIM if has_keys else width,
        states=selection_times.TOWER_WIDTH if Kind.TOWER_STATES in kinds else width,
        has_cls_state=Kind.CLS_STATE in kinds,
    )
    clip = frames_layout(*selection_times.CLIP)
    layout = clip if row.what == "share" else selection_times.layout_of(row.method.split(":")[0], row.n_visual)
    return slow.seconds_of(method, layout, [row.n_kept], widths)


@pytest.mark.parametrize("row", [r for r in STORED if r.what != "prefill"], ids=lambda r: f"{r.method}-{r.n_visual}")
def test_selections_that_took_long_are_warned_of(row):
    """What was measured on one thread: over 4 s, or ended by a limit, warns; under 0.5 s does not."""
    said = estimated(row)
    if row.seconds is None or row.seconds > 4:
        assert said >= slow.LONG
    elif row.seconds < 0.5:
        assert said < slow.LONG
    if row.seconds is not None and said >= slow.LONG:
        assert said / 3 < row.seconds < 3 * said


def test_long_and_short_selections_are_stored():
    seconds = [float("inf") if r.seconds is None else r.seconds for r in STORED]
    assert sum(s > 4 for s in seconds) > 10
    assert sum(s < 0.5 for s in seconds) > 10
