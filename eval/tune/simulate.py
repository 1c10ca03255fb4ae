"""How often a configuration is promised whose loss is beyond the tolerance, on simulated tasks whose truth is known.

python -m tokprune.eval.tune.simulate --out eval/results/promises.jsonl

A task has 50 to 400 questions and 40 configurations: ten methods at four budgets. Some questions are hard for all of
them. In the tasks "mixed" losses are spread from none to a third of the questions; in "just beyond" every configuration
loses a tenth more than the tolerance, so every promise is false. "the best seen" is what reading a table does: of all
configurations on all questions, the cheapest whose loss is not above the tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer

from tokprune.core.files import write_text

from .promise import Outcome, holds
from .race import Entry, Rule, chosen, fewest, in_order, parts_of, race

METHODS, BUDGETS = 10, (0.75, 0.5, 0.25, 0.11)
WORLDS = ("mixed", "just beyond")
TOLERANCES = (0.01, 0.02, 0.05, 0.1)
LEAST, MOST = 50, 400  # questions


class World:
    """A simulated task: for every configuration what is lost and won, and its cost."""

    def __init__(self, kind: str, tolerance: float, rng: np.random.Generator, n: int):
        self.n, self.labels, self.families, self.costs = n, [], [], []
        lost, won = [], []
        for method in range(METHODS):
            sensitive, spread = rng.uniform(0, 0.4) ** 1.5, rng.uniform(0, 0.5)
            for budget in BUDGETS:
                loss = sensitive * (1 - budget) ** 2 if kind == "mixed" else 1.1 * tolerance
                back = spread * (loss + 0.005)
                self.labels.append(f"{method}@{budget}")
                self.families.append(str(method))
                self.costs.append(0.3 + 0.7 * budget + rng.uniform(0, 0.02))
                lost.append(loss + back)
                won.append(back)
        self.truth = np.array(lost) - np.array(won)
        hard = rng.random(n)
        shared = rng.random((len(lost), n)) < 0.5
        luck = np.where(shared, hard, rng.random((len(lost), n)))
        self.lost = luck < np.array(lost)[:, None]
        self.won = luck > 1 - np.array(won)[:, None]

    def seen(self, i: int, start: int, end: int) -> Outcome:
        """Of some of the questions."""
        return Outcome(end - start, int(self.lost[i, start:end].sum()), int(self.won[i, start:end].sum()))


def tuned(world: World, rule: Rule) -> tuple[int | None, list[int], int]:
    """The choice, if any, all configurations that passed their test, and how many questions were asked."""
    parts = parts_of(world.n)
    place, asked = {name: i for i, name in enumerate(world.labels)}, 0

    def ask(look: int, names: list[str]) -> dict[str, Entry]:
        nonlocal asked
        end = sum(parts.looks[: look + 1])
        asked += parts.looks[look] * (len(names) + 1)
        return {n: Entry(world.seen(i := place[n], 0, end), world.costs[i], world.families[i]) for n in names}

    found = race(world.labels, parts, rule, ask)
    seen = in_order(found.sequence, rule, lambda name: world.seen(place[name], world.n - parts.test, world.n))
    choice = chosen(seen, rule, lambda name: world.costs[place[name]])
    passed = [place[name] for name, of in seen.items() if holds(of, rule.tolerance, rule.error)]
    asked += parts.test * (len(seen) + 1) if seen else 0
    return (None if choice is None else place[choice]), passed, asked


def best_seen(world: World, rule: Rule) -> int | None:
    """What a table of all configurations on all questions seems to say."""
    within = [i for i in range(len(world.costs)) if world.seen(i, 0, world.n).loss <= rule.tolerance]
    return min(within, key=world.costs.__getitem__, default=None)


def simulated(kind: str, tolerance: float, tasks: int, error: float, seed: int) -> dict[str, Any]:
    """A row: of `tasks` tasks with enough questions for the tolerance, how many promises were made and were false.

    A promise counts as false where anything that passed its test is beyond the tolerance, chosen or not.
    """
    rng = np.random.default_rng([seed, WORLDS.index(kind), round(1e4 * tolerance)])
    rule, promised, seemed, shares = Rule(tolerance, error), [], [], []
    saved, possible = [], []
    for _ in range(tasks):
        world = World(kind, tolerance, rng, int(rng.integers(max(LEAST, fewest(rule)), MOST + 1)))
        choice, passed, asked = tuned(world, rule)
        seeming = best_seen(world, rule)
        shares.append(asked / (world.n * (len(world.labels) + 1)))
        promised += [] if choice is None else [max(world.truth[i] for i in passed) > tolerance]
        seemed += [] if seeming is None else [world.truth[seeming] > tolerance]
        saved.append(0.0 if choice is None else 1 - world.costs[choice])
        possible.append(
            max((1 - c for c, t in zip(world.costs, world.truth, strict=True) if t <= tolerance), default=0)
        )
    return {
        "tasks": kind,
        "n_tasks": tasks,
        "tolerance": tolerance,
        "confidence": 1 - error,
        "seed": seed,
        "promises": len(promised),
        "false_promises": int(sum(promised)),
        "best_seen": len(seemed),
        "best_seen_false": int(sum(seemed)),
        "questions_of_grid": mean(shares),
        "questions_of_grid_most": max(shares),
        "saved": float(mean(saved)),
        "possible": float(mean(possible)),
    }


def main(
    tasks: Annotated[int, typer.Option(help="Tasks for each tolerance.")] = 200,
    error: Annotated[float, typer.Option(help="1 less the confidence.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A file to write rows to.")] = None,
) -> None:
    """Print a row for each kind of tasks and tolerance."""
    rows = [simulated(kind, tolerance, tasks, error, seed) for kind in WORLDS for tolerance in TOLERANCES]
    for row in rows:
        typer.echo(
            f"{row['tasks']}, {100 * row['tolerance']:g} %: {row['promises']} promises, {row['false_promises']} false "
            f"of {tasks} tasks; best seen: {row['best_seen']}, {row['best_seen_false']} false; "
            f"{100 * row['questions_of_grid']:.0f} % of the grid, at most {100 * row['questions_of_grid_most']:.0f} %; "
            f"saved {row['saved']:.2f} of {row['possible']:.2f}"
        )
    if out is not None:
        write_text(out, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
