"""The report of a comparison: one HTML file that needs no network, and its tables as Markdown and CSV."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup, escape

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from ..models import EMBEDDED
from ..run.folder import FILES
from ..run.lines import Damaged, counted, rows_of, settings_of, typed
from ..run.rows import NONE, Row, SampleRow, pooled
from .exports import csv_table, markdown_tables
from .findings import findings, headline, in_words
from .losses import MAX_BYTES, Artist, Change, Picture, changes, pictures, shown
from .pareto import FLOORS, QUESTION_ONLY, described, keys, plots, styles
from .tables import COLUMNS, accuracy, budget, caption, difference, order, unpruned

TEMPLATE = "report.html.jinja"
_LONG = 300  # characters of a text that others wrote
Part = TypeVar("Part")


@dataclass
class Floor:
    """The line of a floor in rows.jsonl: the accuracy of the most frequent training answers."""

    task: str
    method: str
    value: float


@dataclass
class Settings:
    """Of run.json what a report reads; all of it may be absent."""

    model: str = ""
    weights: Any = None
    prompt: str = ""
    suffix: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)
    configurations: list[str] = field(default_factory=list)
    flops_text: int = 0
    max_new_tokens: int | None = None


@dataclass
class Run:
    """What the folder of a comparison holds."""

    settings: dict[str, Any]
    rows: list[Row]
    question_only: dict[str, float | None]
    samples: list[SampleRow]
    pictures: list[Picture]
    path: Path = Path()
    damaged: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Run:
        """From a folder that `tokprune compare` wrote.

        Lines that are damaged are left out and counted in `damaged`.

        Raises:
            RunError: it holds no run, one that is not finished, or settings or rows of which nothing can be read.
        """
        if not (path / "run.json").is_file():
            raise RunError(f"{path} holds no run; name the folder that tokprune compare --out wrote")
        if not (path / "rows.jsonl").is_file():
            raise RunError(f"the run in {path} is not finished; type the same tokprune compare again to go on with it")
        settings = _settings(path)
        damaged: dict[Path, int] = {}
        lines = _undamaged(path / "rows.jsonl", _floor_or_row, damaged)
        rows = [line for line in lines if isinstance(line, Row)]
        if not rows:
            raise RunError(f"{path / 'rows.jsonl'} holds no configuration that can be read; {_again(path)}")
        floors: dict[str, float | None] = {line.task: line.value for line in lines if isinstance(line, Floor)}
        samples = _undamaged(path / "samples.jsonl", functools.partial(typed, SampleRow), damaged)
        stored = _undamaged(path / "pictures.jsonl", functools.partial(typed, Picture), damaged)
        return cls(settings, rows, floors, samples, stored, path, damaged)

    @property
    def remarks(self) -> list[str]:
        """How many lines of which file were left out, and the command that mends them."""
        return [counted(n, path, f"left out; {_again(self.path)}") for path, n in self.damaged.items()]


def write(path: Path, artist: Callable[[Run], Artist] | None = None, out: Path | None = None) -> Run:
    """Write report and tables of a finished run; pictures are drawn where they are not stored yet.

    Args:
        path: the folder of the run; without `out`, tables and pictures go there.
        artist: makes what draws pictures; None where the model is not at hand.
        out: the only file that is written, a page of HTML; `report.html` in the folder, and what lies beside it, by
            default.

    Returns:
        What was read from the folder; its `remarks` say what was left out.

    Raises:
        RunError: `Run.read` says why, or `out` is a file that the run needs.
    """
    if out is not None:
        _check_apart(path, out)
    run = Run.read(path)
    found = changes(run.samples)
    chosen = shown(run.rows, found)
    answers = [s for _, some in chosen for s in some]
    drawn = pictures(answers, run.pictures, artist(run) if artist else None)
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
    """Raise RunError where the page would be written over a file of the run."""
    for name in FILES:
        if (path / name).exists() and out.exists() and out.samefile(path / name):
            raise RunError(f"--out {out} is {name} of the run, which would be lost; name another file with --out")


def page(run: Run, found: dict, chosen: Sequence[tuple[Row, list[SampleRow]]], drawn: dict) -> str:
    """The HTML of a run.

    Args:
        run: what its folder holds.
        found: `losses.changes` of its answers.
        chosen: `losses.shown`: configurations with the questions whose pictures are shown.
        drawn: those pictures by task, configuration and sample.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=short, specification=specification)
    looks = styles(run.rows)
    lighter = _within(drawn)
    tasks = [
        _task(i, run, task, looks, found, _cards(run, task, found, chosen, lighter))
        for i, task in enumerate(dict.fromkeys(r.task for r in run.rows))
    ]
    first = run.rows[0]
    return environment.get_template(TEMPLATE).render(
        model=first.model,
        tasks=tasks,
        conditions=_conditions(run),
        is_embedded=first.model in EMBEDDED,
        has_drawn=any(p.seen for p in lighter.values()),
    )


# ---- parts of a page


def _task(i: int, run: Run, task: str, looks: dict, found: dict, cards: list[dict]) -> dict[str, Any]:
    rows, floor, name = [r for r in run.rows if r.task == task], run.question_only.get(task), f"t{i}"
    figures = plots(rows, floor, looks, name)
    return {
        "id": name,
        "name": task,
        "headline": headline(rows),
        "findings": findings(rows, floor),
        "caption": caption(rows[0]),
        "unpruned": unpruned(rows[0]),
        "plots": [{"axis": p.axis, "svg": Markup(p.svg), "front": [described(r) for r in p.front]} for p in figures],
        "unknown": _unknown({p.axis.name for p in figures}),
        "keys": [(label, Markup(svg)) for label, svg in keys(looks, rows, floor, name)],
        "table": _table(rows, floor, found),
        "kinds": _kinds(rows),
        "cards": cards,
        "n_samples": rows[0].n_samples,
        "has_bare": any(r.method == NONE for r in rows),
    }


def _unknown(known: set[str]) -> list[str]:
    names = ("prefill FLOPs", "LLM FLOPs", "prefill time", "visual tokens")
    return [name for name in names if name not in known]


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: COLUMNS[name](row).removeprefix("x ")


def _p_value(row: Row) -> str:
    if row.p_value is None:
        return ""
    return "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"


# Heading, what it says of a row, and how the cell is set.
_CELLS: tuple[tuple[str, Callable[[Row], str], str], ...] = (
    ("budget", budget, "number"),
    ("accuracy [95 %]", accuracy, "number strong"),
    ("points from unpruned [95 %]", lambda r: difference(r).removesuffix(" noise"), "number"),
    ("noise", lambda r: "noise" if r.is_noise else "", "noise"),
    ("p", _p_value, "number"),
    ("lost / won", lambda r: "", "number"),
    ("words", COLUMNS["words"], "number"),
    ("stop", COLUMNS["stop"], "number"),
    ("visual tokens", lambda r: f"{r.n_visual_before:.4g} → {r.n_visual_after:.4g}", "number"),
    ("mean over layers", lambda r: f"{r.n_visual_mean:.4g}", "number"),
    ("KV bytes", _ratio("KV bytes"), "number"),
    ("LLM FLOPs", _ratio("LLM FLOPs"), "number"),
    ("prefill FLOPs", _ratio("prefill FLOPs"), "number"),
    ("prefill time", _ratio("prefill time"), "number"),
    (
        "prefill ms",
        lambda r: "" if r.prefill_ratio or not r.prefill_ms_p50 > 0 else f"{r.prefill_ms_p50:.4g}",
        "number",
    ),
)


def _table(rows: Sequence[Row], floor: float | None, found: dict[tuple[str, str], Change]) -> dict[str, Any]:
    """Header, and lines in groups of one budget; columns that are empty everywhere are left out."""
    ordered = sorted(pooled(rows), key=order)
    whole = all(r.words_value in (None, r.value) and r.stop_rate in (None, 1) for r in ordered)
    lines = []
    for row in ordered:
        cells = {name: of(row) for name, of, _ in _CELLS}
        change = found.get((row.task, row.config)) if row.p_value is not None else None
        cells["lost / won"] = f"{len(change.lost)} / {change.n_won}" if change else ""
        lines.append((row, cells))
    used = [
        (name, css)
        for name, _, css in _CELLS
        if any(cells[name] for _, cells in lines) and not (whole and name in ("words", "stop"))
    ]
    groups: dict[tuple, list[dict]] = {}
    if floor is not None:
        cells = [(f"{floor:.3f}" if name.startswith("accuracy") else "", css) for name, css in used]
        groups[True, ""] = [{"method": QUESTION_ONLY, "cells": cells, "is_bare": False}]
    for row, values in lines:
        group = groups.setdefault(_group(row), [])
        cells = [(values[name], css) for name, css in used]
        group.append({"method": row.method, "cells": cells, "is_bare": row.method == NONE})
    return {"header": used, "groups": list(groups.values())}


def _kinds(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Accuracy by kind of question; None where there is one kind."""
    ordered = sorted(pooled(rows), key=order)
    counts = {kind: int(part["n_samples"]) for row in ordered for kind, part in row.by_kind.items()}
    if len(counts) < 2:
        return None
    lines = [
        (row, [f"{row.by_kind[kind]['value']:.3f}" if kind in row.by_kind else "" for kind in counts])
        for row in ordered
    ]
    groups: dict[tuple, list[tuple]] = {}
    for row, cells in lines:
        groups.setdefault(_group(row), []).append((row.method, budget(row), row.method == NONE, cells))
    return {"counts": counts, "groups": list(groups.values())}


def _group(row: Row) -> tuple[bool, str]:
    """What stands together: floors with the unpruned run, then each budget."""
    return row.method in (*FLOORS, NONE), budget(row)


def _cards(run: Run, task: str, found: dict, chosen: Sequence[tuple[Row, list[SampleRow]]], drawn: dict) -> list[dict]:
    """Of every configuration that is shown: how many questions it loses, and some of them."""
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
    """The pictures, without those that would make the page too heavy."""
    left, found = MAX_BYTES, {}
    for key, picture in drawn.items():
        left -= len(picture.seen) + len(picture.kept)
        why = "left out to keep this page small; pictures.jsonl has it"
        found[key] = picture if left >= 0 else dataclasses.replace(picture, seen="", kept="", why=why)
    return found


def _conditions(run: Run) -> list[tuple[str, str]]:
    """What the run was made with, from its rows and its settings."""
    first, settings = run.rows[0], run.settings

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
        "added to questions": settings.get("suffix"),
        "prompt, checksum": settings.get("prompt"),
        "configurations": len(settings.get("configurations", ())) or None,
        "torch": of_rows("torch"),
        "transformers": of_rows("transformers"),
        "tokprune": of_rows("tokprune"),
        "commit": of_rows("commit"),
        "date": of_rows("date"),
        "GPU memory, most": _most(run.rows),
        "left out": ", ".join(counted(n, Path(p.name), "not in here") for p, n in _told(run)),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _told(run: Run) -> list[tuple[Path, int]]:
    """Damaged lines by file; pictures that are not there say so themselves."""
    return [(path, n) for path, n in run.damaged.items() if path.name != "pictures.jsonl"]


def _most(rows: Sequence[Row]) -> str:
    peaks = [r.peak_gib for r in rows if r.peak_gib is not None]
    return f"{max(peaks):.2f} GiB" if peaks else ""


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def short(text: str, n: int = _LONG) -> str:
    """A text that others wrote, cut to a length, without characters that a page may not hold."""
    text = _CONTROL.sub("\ufffd", text.strip())
    return text if len(text) <= n else f"{text[:n].rstrip()} … ({len(text):,} characters)"


def specification(text: str) -> Markup:
    """A method with its options, which may be broken between them."""
    return Markup(re.sub("([:+])", r"\1<wbr>", str(escape(text))))


# ---- files


def _undamaged(path: Path, make: Callable[[dict[str, Any]], Part], damaged: dict[Path, int]) -> list[Part]:
    """The rows of a file; lines that are none are counted by file."""
    read = list(rows_of(path, make))
    rows = [row for row in read if not isinstance(row, Damaged)]
    if len(rows) < len(read):
        damaged[path] = len(read) - len(rows)
    return rows


def _floor_or_row(line: dict[str, Any]) -> Floor | Row:
    return typed(Floor, line) if line.get("method") == QUESTION_ONLY else Row.read(line)


def _again(path: Path) -> str:
    """What mends the files of a run."""
    return f"type the same {_command(path)} again to mend it; it asks nothing that is answered"


def _command(path: Path) -> str:
    """What wrote the folder of a run."""
    return f"tokprune {'eval' if (path / 'lmms-eval').is_dir() else 'compare'} --out {path}"


def _settings(path: Path) -> dict[str, Any]:
    file, again = path / "run.json", f"start over with the same {_command(path)} --overwrite"
    found = settings_of(file, again)
    try:
        typed(Settings, found, others=True)
    except Damaged as damaged:
        raise RunError(f"{file} {damaged}; {again}") from damaged
    return found
