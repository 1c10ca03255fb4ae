"""The same comparison under several prompts: accuracies and ranks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from ..run.rows import NONE, Row, pooled
from ..tasks.prompted import name_of, prompt_name
from .tables import FLOORS, budget, order
from .terminal import Grid

Key = tuple[str, str]  # method, budget


def rankings(rows: Sequence[Row]) -> list[Grid]:
    """One table for each task that was asked under several prompts.

    A method's rank is 1 more than the number of methods that answer more questions right at the same budget. Floors,
    the unpruned run and methods without a budget have none.

    Args:
        rows: of all tasks.
    """
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.suffix is not None:
            tasks.setdefault(name_of(row.task, row.suffix), {}).setdefault(row.suffix, []).append(row)
    return [_ranked(task, by_prompt) for task, by_prompt in tasks.items() if len(by_prompt) > 1]


def _ranked(task: str, by_prompt: Mapping[str, Sequence[Row]]) -> Grid:
    found = [{(r.method, budget(r)): r for r in sorted(pooled(rows), key=order)} for rows in by_prompt.values()]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    numbered = [f"prompt {i}" for i in range(1, len(found) + 1)]
    named = "; ".join(f"{n}: {prompt_name(s)}" for n, s in zip(numbered, by_prompt, strict=True))
    lines = [[*key, *(_cell(rows, key) for rows in found)] for key in keys]
    notes = (f"{named[0].upper()}{named[1:]}.", *_moved(found))
    return Grid(["method", "keep", *numbered], lines, f"{task}: accuracy (rank) by prompt", names=2, notes=notes)


def _cell(rows: Mapping[Key, Row], key: Key) -> str:
    """As "0.865 (2)"; empty where the prompt has no such row."""
    if key not in rows:
        return ""
    rivals = _rivals(rows, key[1])
    rank = f" ({1 + sum(r.value > rows[key].value for r in rivals.values())})" if key in rivals else ""
    return f"{rows[key].value:.3f}{rank}"


def _rivals(rows: Mapping[Key, Row], keep: str) -> dict[Key, Row]:
    """What is ranked at one budget."""
    ranked = {key: row for key, row in rows.items() if key[1] == keep and key[0] not in (NONE, *FLOORS)}
    return ranked if keep else {}


def _moved(found: Sequence[Mapping[Key, Row]]) -> list[str]:
    """How many pairs of methods change places between prompts."""
    budgets = dict.fromkeys(keep for rows in found for _, keep in rows)
    pairs = [pair for keep in budgets for pair in combinations(_rivals(found[0], keep), 2)]
    pairs = [pair for pair in pairs if all(key in rows for rows in found for key in pair)]
    apart = [[rows[a].value - rows[b].value for rows in found] for a, b in pairs]
    moved = sum(min(values) < 0 < max(values) for values in apart)
    if not pairs:
        return []
    return [f"{moved} of {len(pairs)} pairs of methods at one budget change places; see the intervals above."]
