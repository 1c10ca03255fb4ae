"""Tables of what `make gpu` measured; a sentence in their place where nothing was."""

from __future__ import annotations

import json
from pathlib import Path

from ..bench import gpu
from ..bench import tables as bench_tables
from .exports import markdown

NOTHING = "Not measured yet: run `make gpu` on a machine with a GPU.\n"
SELECTING = ("model", "batch", "method", "selection", "first token", "share of the first token", "later tokens, each")


def tables(results: Path, what: str) -> str:
    """One of the blocks of docs/gpu.md.

    Args:
        results: folder of the rows.
        what: "pieces", "kernels", "sweeps", "selection" or "threads".
    """
    return {"pieces": pieces, "kernels": kernels, "sweeps": sweeps, "selection": selection, "threads": threads}[what](
        results
    )


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _where(row: dict) -> str:
    return f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}.\n\n"


def pieces(results: Path) -> str:
    """How every piece ended."""
    rows = _read(results / gpu.PIECES)
    lines = [[r["name"], r["state"], f"{r['seconds']:.0f} s", r["said"]] for r in rows]
    return _where(rows[-1]) + markdown(("piece", "ended", "after", "last line"), lines) if rows else NOTHING


def kernels(results: Path) -> str:
    """Milliseconds with the torch code and with the kernels."""
    rows = _read(results / gpu.TIMES)
    lines = []
    for r in rows:
        own, plain = r["kernel_ms"], r["torch_ms"]
        ratio = ["not run", ""] if own is None else [f"{own:.3g} ms", f"x {plain / own:.2g}"]
        kept = "" if r["n_kept"] is None else str(r["n_kept"])
        lines.append([f"`{r['what']}`", str(r["n_visual"]), kept, str(r["batch"]), f"{plain:.3g} ms", *ratio])
    head = ("what", "tokens", "kept", "pictures", "torch", "kernel", "torch / kernel")
    return _where(rows[-1]) + markdown(head, lines) if rows else NOTHING


def _sweeps(results: Path) -> list[list[bench_tables.Row]]:
    """The rows of every sweep that has some, steps bound by launches last."""
    found = ([bench_tables.Row(**r) for r in _read(results / f"gpu-{n}.jsonl")] for n in (*gpu.SHAPES, "short-steps"))
    return [rows for rows in found if rows]


def sweeps(results: Path) -> str:
    """What pruning changes, a table a model."""
    parts = []
    for rows in _sweeps(results):
        title, header, lines = bench_tables.matrix(rows)
        columns = [column.replace("\n", " ") for column in header]
        parts.append(f"{bench_tables.conditions_line(rows[0])}\n\n**{title}**\n\n" + markdown(columns, lines))
    return "\n".join(parts) if parts else NOTHING


def selection(results: Path) -> str:
    """The share of selecting tokens in the time to the first token, and the later tokens."""
    lines = []
    for row in (row for rows in _sweeps(results) for row in rows):
        chosen, first, later = row.selection_ms[1], row.first_token_ms[1], row.token_ms
        cells = [f"{chosen:.3g} ms", f"{first:.3g} ms", f"{100 * chosen / first:.2g} %"]
        lines.append([row.model, str(row.batch_size), row.name, *cells, f"{later[1]:.3g} ms" if later else ""])
    return markdown(SELECTING, lines) if lines else NOTHING


def threads(results: Path) -> str:
    """Requests a second."""
    rows = _read(results / gpu.THREADS)
    lines = [[r["model"], r["method"], str(r["threads"]), f"{r['requests'] / r['seconds']:.3g}"] for r in rows]
    return _where(rows[-1]) + markdown(("model", "method", "threads", "requests/s"), lines) if rows else NOTHING
