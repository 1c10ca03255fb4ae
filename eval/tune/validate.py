"""Whether the choice on validation questions is what a full comparison says of the test questions.

python -m tokprune.eval.tune.validate tiny-qwen findit eval/results/compare-tiny-qwen-findit.jsonl --out rows.jsonl

The configurations are those of the full comparison without its controls. Tolerances share the answers; each counts what
it alone would ask. Cost is FLOPs of the prefill.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tokprune.core.files import write_text

from ..run.folder import RunFolder
from ..run.plan import Plan
from ..run.processes import Processes
from ..run.rows import LESS, NONE, SHUFFLED, Config, Row
from ..run.runner import Runner
from .race import Rule
from .tune import NEVER, Tuned, Tuning, Wanted, cut_by, ordered, questions_of

TOLERANCES = (0.01, 0.02, 0.05, 0.1)


def cost(row: Row) -> float:
    """FLOPs of the prefill relative to the unpruned model."""
    return row.costs.prefill_flops_after / row.costs.prefill_flops_before  # type: ignore[operator]


def compared(path: Path, task: str) -> list[Row]:
    """Rows of the configurations of a full comparison that could be deployed, each with its difference to no pruning.

    Rows of earlier releases have a value alone: their difference is that of two values, and has no interval.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [Row.read(line) for line in lines if "config" in line and line["task"] == task]
    never = (NONE, SHUFFLED, *LESS, *NEVER)
    (bare,) = (r.value for r in rows if r.config == NONE)
    rows = [r if r.difference is not None else replace(r, difference=r.value - bare) for r in rows]
    return [r for r in rows if r.method.partition(":")[0] not in never and r.config != SHUFFLED]


def loss(row: Row) -> float:
    """Of accuracy, on the test questions of the full comparison; what `compared` gives has one."""
    return -row.difference  # type: ignore[operator]


def interval(row: Row) -> list[float] | None:
    """Of its loss, 95 %; None where only values were stored."""
    low, high = row.difference_low, row.difference_high
    return None if low is None or high is None else [-high, -low]


def line_of(
    model: str, task: str, tolerance: float, found: Tuned, asked: int, grid: int, rows: list[Row]
) -> dict[str, Any]:
    """A row: the choice, the best of the full comparison, and what of the choice held on test questions."""
    within = [r for r in rows if loss(r) <= tolerance + 1e-9]
    best = min(within, key=cost, default=None)
    chosen = next((r for r in rows if found.config is not None and r.config == found.config.label), None)
    return {
        "model": model,
        "task": task,
        "tolerance": tolerance,
        "choice": chosen.config if chosen else None,
        "promised": found.promised,
        "bound": found.test.bound if found.test else None,
        "tested": [found.test.seen.n, found.test.seen.lost, found.test.seen.won] if found.test else None,
        "tests": [[test.config, test.promised] for test in found.tests],
        "cost": cost(chosen) if chosen else None,
        "test_loss": loss(chosen) if chosen else None,
        "test_loss_interval": interval(chosen) if chosen else None,
        "n_test": chosen.n_samples if chosen else None,
        "best": best.config if best else None,
        "best_cost": cost(best) if best else None,
        "best_loss": loss(best) if best else None,
        "asked": asked,
        "grid": grid,
        "n": grid // (len(rows) + 1),
    }


def main(
    model: Annotated[str, typer.Argument(help="An embedded model.")],
    task: Annotated[str, typer.Argument(help="A task with validation questions.")],
    comparison: Annotated[Path, typer.Argument(help="Rows of its full comparison.")],
    n: Annotated[int, typer.Option(help="Validation questions.")] = 400,
    out: Annotated[Path | None, typer.Option(help="A file to which rows are appended.")] = None,
    answers: Annotated[Path | None, typer.Option(help="A folder for answers; a run that it holds is resumed.")] = None,
) -> None:
    """Print and write a row for each tolerance."""
    rows, runner, questions = compared(comparison, task), Runner.load(model), questions_of(task, False, 8)
    samples, parts = ordered(questions.samples(), n, Rule(max(TOLERANCES)))
    cut, ends = cut_by(samples, parts, 64)
    configs = [Config(r.method, r.keep_ratio, keep_tokens=r.keep_tokens) for r in rows]
    plan, found = Plan([(questions, cut)], [Config(NONE), *configs]), []
    Tuning.rounds = 1  # times are not part of this
    settings = plan.stored()
    with (
        tempfile.TemporaryDirectory() as path,
        closing(RunFolder(answers or Path(path), settings, False, Processes(), plan.questions)) as folder,
    ):
        for tolerance in TOLERANCES:
            wanted = Wanted(Rule(tolerance), "flops")
            tuned = Tuning(runner, questions, plan, ends, parts, folder, wanted).run(Console(quiet=True))
            asked = sum(k * (len(left) + 1) for k, left in zip(parts.looks, tuned.finish.left, strict=False))
            asked += parts.test * (len(tuned.tests) + 1) if tuned.tests else 0
            found.append(line_of(model, task, tolerance, tuned, asked, tuned.grid, rows))
            typer.echo(json.dumps(found[-1]))
    if out is not None:
        before = out.read_text(encoding="utf-8") if out.exists() else ""
        write_text(out, before + "".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    typer.run(main)
