"""The report of a comparison: one HTML file that needs no network, and its tables as Markdown and CSV."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from ..models import EMBEDDED
from ..run.folder import FILES
from ..run.lines import counted
from ..run.rows import EXACT_MATCH, NONE, Row, SampleRow, pooled
from . import answers
from .exports import csv_table, markdown_tables
from .findings import findings, headline, in_words, is_share, verdict
from .losses import MAX_BYTES, Artist, Change, Picture, changes, pictures, shown
from .pages import template
from .pareto import COSTS, plots, styles
from .rankings import rankings
from .stored import Run
from .tables import (
    CHECKS,
    COLUMNS,
    FLOORS,
    QUESTION_ONLY,
    accuracy,
    budget,
    columns,
    conditions,
    difference,
    not_seen,
    order,
)

TEMPLATE = "report.html.jinja"
_LONG = 300  # characters of a text that others wrote


def write(path: Path, artist: Callable[[Run], Artist] | None = None, out: Path | None = None) -> Run:
    """Write the report and the tables of a finished run. Pictures that are not stored yet are drawn.

    Args:
        path: the folder of the run. Without `out`, report, tables and pictures are written there.
        artist: makes the object that draws pictures; None if there is no model.
        out: write this HTML file and nothing else.

    Returns:
        What was read from the folder. Its `remarks` say what was left out.

    Raises:
        RunError: `Run.read` says why, or `out` is a file that the run needs.
    """
    if out is not None:
        _check_apart(path, out)
    run = Run.read(path)
    found = changes(run.samples)
    chosen = shown(run.rows, found)
    shown_answers = [s for _, some in chosen for s in some]
    drawn = pictures(shown_answers, run.pictures, artist(run) if artist else None)
    files = {out or path / "report.html": page(run, found, chosen, drawn)}
    if out is None and artist:
        files[path / "pictures.jsonl"] = "".join(json.dumps(asdict(p)) + "\n" for p in drawn.values())
    if out is None:
        files[path / "table.md"] = markdown_tables(run.rows, run.question_only)
        files[path / "table.csv"] = csv_table(run.rows, run.question_only)
    for file, text in files.items():
        write_text(file, text, "replace")
    return run


def _check_apart(path: Path, out: Path) -> None:
    """Raise RunError if the page would overwrite a file of the run."""
    for name in FILES:
        if (path / name).exists() and out.exists() and out.samefile(path / name):
            raise RunError(f"--out {out} is {name} of the run, which would be lost; use another file with --out")


def page(run: Run, found: dict, chosen: Sequence[tuple[Row, list[SampleRow]]], drawn: dict) -> str:
    """The HTML of a run.

    Args:
        run: what its folder holds.
        found: `losses.changes` of its answers.
        chosen: `losses.shown`: configurations with the questions whose pictures are shown.
        drawn: those pictures by task, configuration and sample.
    """
    looks = styles(run.rows)
    lighter = _within(drawn)
    tasks = [
        _task(i, run, task, looks, found, _cards(run, task, found, chosen, lighter))
        for i, task in enumerate(dict.fromkeys(r.task for r in run.rows))
    ]
    first = run.rows[0]
    filters = dict(short=short, specification=specification, data_uri="data:image/png;base64,{}".format)
    return template(TEMPLATE, **filters).render(
        model=first.model,
        tasks=tasks,
        rankings=rankings(run.rows),
        conditions=_conditions(run),
        is_embedded=first.model in EMBEDDED,
        is_exact=all(r.metric == EXACT_MATCH for r in run.rows),
        is_share=all(map(is_share, run.rows)),
    )


# ---- parts of a page


def _task(i: int, run: Run, task: str, looks: dict, found: dict, cards: list[dict]) -> dict[str, Any]:
    rows, floor = [r for r in run.rows if r.task == task], run.question_only.get(task)
    figures, legend = plots(rows, floor, looks)
    return {
        "id": f"t{i}",
        "name": task,
        "headline": headline(rows),
        "verdict": verdict(rows, floor),
        "findings": findings(rows, floor),
        "conditions": conditions(rows[0]),
        "plots": figures,
        "legend": legend,
        "unknown": [name for name in COSTS if name not in figures],
        "table": _table(rows, floor, found),
        "kinds": _kinds(rows),
        "cards": cards,
        "wrong": answers.wrong([s for s in run.samples if s.task == task and s.config == NONE]),
        "is_share": all(map(is_share, rows)),
        "n_samples": rows[0].n_samples,
        "has_bare": any(r.method == NONE for r in rows),
    }


# ---- tables


def _p_value(row: Row) -> str:
    if row.p_value is None:
        return ""
    return "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"


def _milliseconds(row: Row) -> str:
    return "" if row.prefill_ratio or not row.prefill_ms_p50 > 0 else f"{row.prefill_ms_p50:.4g}"


def _ratio(name: str, row: Row) -> str:
    return COLUMNS[name](row).removeprefix("x ")


def _lost_won(found: Mapping[tuple[str, str], Change], row: Row) -> str:
    change = found.get((row.task, row.config)) if row.p_value is not None else None
    return f"{len(change.lost)} / {change.n_won}" if change else ""


def _table(rows: Sequence[Row], floor: float | None, found: Mapping[tuple[str, str], Change]) -> dict[str, Any]:
    """All configurations of a task, in groups of one budget."""
    cells: dict[str, Callable[[Row], str]] = {
        "budget": budget,
        "accuracy [95 %]": accuracy,
        "points from unpruned [95 %]": difference,
        "that is": not_seen,
        "p": _p_value,
        "lost / won": functools.partial(_lost_won, found),
        **CHECKS,
        "words": COLUMNS["words"],
        "stop": COLUMNS["stop"],
        "visual tokens": lambda r: f"{r.n_visual_before:.4g} → {r.n_visual_after:.4g}",
        "mean over layers": lambda r: f"{r.n_visual_mean:.4g}",
        **{n: functools.partial(_ratio, n) for n in ("KV bytes", "LLM FLOPs", "prefill FLOPs", "prefill time")},
        "prefill ms": _milliseconds,
    }
    used = columns(pooled(rows), cells)
    css = {"accuracy [95 %]": "number strong", "that is": "words"}
    header = [(name, css.get(name, "number")) for name in used]
    groups = _groups(rows, [cells[name] for name in used])
    if floor is not None:
        line = [f"{floor:.3f}" if name.startswith("accuracy") else "" for name in used]
        groups.insert(0, [(QUESTION_ONLY, line)])
    return {"header": header, "groups": groups}


def _kinds(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Accuracy by kind of question; None if there is only one kind."""
    counts = {k: int(part["n_samples"]) for r in sorted(pooled(rows), key=order) for k, part in r.by_kind.items()}
    if len(counts) < 2:
        return None

    def share(kind: str, row: Row) -> str:
        return f"{row.by_kind[kind]['value']:.3f}" if kind in row.by_kind else ""

    header = [("budget", "number"), *((f"{short(kind, 40)}\nn = {n}", "number") for kind, n in counts.items())]
    return {"header": header, "groups": _groups(rows, [budget, *(functools.partial(share, kind) for kind in counts)])}


def _groups(rows: Sequence[Row], cells: Sequence[Callable[[Row], str]]) -> list[list[tuple[str, list[str]]]]:
    """Methods with their cells: floors and the unpruned run, then a group for each budget."""
    groups: dict[tuple, list] = {}
    for row in sorted(pooled(rows), key=order):
        group = groups.setdefault((row.method in (*FLOORS, NONE), budget(row)), [])
        group.append((row.method, [cell(row) for cell in cells]))
    return list(groups.values())


# ---- pictures and conditions


def _cards(run: Run, task: str, found: dict, chosen: Sequence[tuple[Row, list[SampleRow]]], drawn: dict) -> list[dict]:
    """For each configuration that is shown: how many questions it loses, and some of them."""
    bare = {s.sample: s.answer for s in run.samples if s.task == task and s.config == NONE}
    return [
        {
            "name": ", ".join(filter(None, (some[0].method if some else row.method, in_words(budget(row))))),
            "n_lost": len(found[task, row.config].lost),
            "n_won": found[task, row.config].n_won,
            "answers": [
                {"row": s, "unpruned": bare[s.sample], "picture": drawn[s.task, s.config, s.sample]} for s in some
            ],
        }
        for row, some in chosen
        if row.task == task
    ]


def _within(drawn: dict[tuple[str, str, str], Picture]) -> dict[tuple[str, str, str], Picture]:
    """The pictures, without those that would make the page too large."""
    left, found = MAX_BYTES, {}
    for key, picture in drawn.items():
        left -= len(picture.seen) + len(picture.kept)
        why = "left out to keep this page small; it is in pictures.jsonl"
        found[key] = picture if left >= 0 else dataclasses.replace(picture, seen="", kept="", why=why)
    return found


def _conditions(run: Run) -> list[tuple[str, str]]:
    """Model, machine and versions of the run, from its rows and its settings."""
    first, settings, stored = run.rows[0], run.settings, "pictures.jsonl"  # a lost picture has a note in its place
    peaks = [r.peak_gib for r in run.rows if r.peak_gib is not None]

    def of_rows(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(r, name)) for r in run.rows if getattr(r, name) is not None))

    known = {
        "model": first.model,
        "revision": of_rows("revision"),
        "weights, checksum": settings.get("weights"),
        "device": of_rows("device"),
        "dtype": of_rows("dtype"),
        "attention": of_rows("attn_implementation"),
        "positions": of_rows("positions"),
        "batch size": of_rows("batch_size"),
        "answers cut at": f"{settings['max_new_tokens']} tokens" if "max_new_tokens" in settings else None,
        "added to questions": settings.get("suffix") or ", ".join(map(repr, settings.get("suffixes", ()))),
        "prompt, checksum": settings.get("prompt"),
        "configurations": len(settings.get("configurations", ())) or None,
        "torch": of_rows("torch"),
        "transformers": of_rows("transformers"),
        "tokprune": of_rows("tokprune"),
        "commit": of_rows("commit"),
        "date": of_rows("date"),
        "GPU memory, peak": f"{max(peaks):.2f} GiB" if peaks else None,
        "left out": ", ".join(counted(n, Path(p.name), "left out") for p, n in run.damaged.items() if p.name != stored),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def short(text: str, n: int = _LONG) -> str:
    """A text that others wrote, cut to a length, without control characters."""
    text = _CONTROL.sub("\ufffd", text.strip())
    return text if len(text) <= n else f"{text[:n].rstrip()} … ({len(text):,} characters)"


def specification(text: str) -> Markup:
    """A method with its options; a line may break between them."""
    return Markup(re.sub("([:+])", r"\1<wbr>", str(escape(text))))
