"""Tables of docs/tune.md: simulated promises, and choices on validation questions beside a full comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .exports import markdown

RESULTS = Path(__file__).parents[1] / "results"


def _lines(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def promises(name: str) -> str:
    """Of `eval.tune.simulate`."""
    lines = [
        [
            r["tasks"],
            f"{100 * r['tolerance']:g} %",
            str(r["n_tasks"]),
            str(r["promises"]),
            f"{r['false_promises']} ({100 * r['false_promises'] / r['n_tasks']:.1f} %)",
            f"{r['best_seen_false']} ({100 * r['best_seen_false'] / r['n_tasks']:.0f} %)",
            f"{100 * r['questions_of_grid']:.0f} %",
            f"{r['saved']:.2f} of {r['possible']:.2f}" if r["possible"] else "",
        ]
        for r in _lines(name)
    ]
    header = ("tasks", "tolerance", "tasks played", "promises", "false", "best seen, false", "of the grid asked")
    return markdown((*header, "saved, of what could be"), lines)


def _held(r: dict[str, Any]) -> str:
    """What the choice lost on test questions, with its interval where there is one."""
    ends = ", ".join(map(_percent, r["test_loss_interval"] or ()))
    return f"{_percent(r['test_loss'])} %" + (f" [{ends}]" if ends else "")


def _percent(share: float) -> str:
    """With one digit, and no minus before a zero."""
    return f"{round(100 * share, 1) + 0.0:.1f}"


def tuned(name: str) -> str:
    """Of `eval.tune.validate`: tolerance, choice, what held on test questions."""
    lines = []
    for r in _lines(name):
        n, lost, won = r["tested"] or (0, 0, 0)
        passed = [is_promised for _, is_promised in r["tests"]]
        lines.append(
            [
                f"{r['model']}, {r['task']}",
                f"{100 * r['tolerance']:g} %",
                f"{r['choice']}, x {r['cost']:.2f}" if r["choice"] else "none",
                f"yes ({lost} lost, {won} won of {n})" if r["promised"] else "no",
                f"{sum(passed)} of {len(passed)}",
                _held(r) if r["choice"] else "",
                f"{r['best']}, x {r['best_cost']:.2f}, {_percent(r['best_loss'])} %" if r["best"] else "none",
                f"{100 * r['asked'] / r['grid']:.0f} %",
            ]
        )
    header = (
        "model, task",
        "tolerance",
        "choice, FLOPs",
        "promised",
        "tests passed",
        "its loss on test questions [95 %]",
    )
    return markdown((*header, "cheapest within it on test questions", "of the grid asked"), lines)
