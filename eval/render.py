"""Renders the tables of the README from the committed rows in `eval/results/`.

python -m tokprune.eval.render            # rewrite README.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import typer

from .compare import COLUMNS, Row, cells, order, pooled

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def read_rows(name: str) -> list[dict]:
    """The rows of a file in the results folder."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def comparison_tables(rows: list[dict]) -> str:
    """One table a task, floors first."""
    parts = []
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        floors = [r for r in mine if r["method"] == "question only"]
        shown = [Row(**r) for r in mine if r["method"] != "question only"]
        first = shown[0]
        parts.append(
            f"**{task}**: {first.n_samples} questions, {first.model}, {first.device}, {first.dtype}, "
            f"{first.attn_implementation}, batch {first.batch_size}, transformers {first.transformers}, "
            f"{first.date}\n\n"
        )
        body = [["question only", "", f"{f['accuracy']:.3f}", *[""] * (len(COLUMNS) - 3)] for f in floors]
        body += [list(cells(r)) for r in sorted(pooled(shown), key=order)]
        parts.append(markdown(COLUMNS, body) + "\n")
    return "".join(parts)


def signal_table(rows: list[dict]) -> str:
    """Share of the tower's time by signal."""
    first = rows[0]
    head = (
        f"{first['n_layers']} layers, {first['n_tokens']} tokens, batch {first['batch_size']}, {first['device']}, "
        f"{first['dtype']}, median of {first['rounds']}\n\n"
    )
    body = [
        [r["selector"], f"{r['tower_s_p50']:.2f} s", f"{1000 * r['signals_s_p50']:.1f} ms", f"{100 * r['share']:.2f} %"]
        for r in rows
    ]
    return head + markdown(("signals", "tower", "signals alone", "share"), body)


def rendered(text: str) -> str:
    """A text with its result blocks filled in."""

    def fill(match: re.Match) -> str:
        rows = read_rows(match[2])
        body = signal_table(rows) if "selector" in rows[0] else comparison_tables(rows)
        return f"{match[1]}\n{body}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main(readme: Path = Path("README.md")) -> None:
    """Rewrite the tables of a file in place."""
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
