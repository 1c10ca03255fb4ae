"""Published scores measured anew: one resumable run through lmms-eval, its scores beside those that others print."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

import tokprune
from tokprune.core.errors import RunError
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import known_shape
from tokprune.prune.estimate import costs, kept

from .compare import chosen_samples, configurations
from .report import leaderboard
from .report.benchmarks import BENCHMARKS, USUAL, Benchmark, Usual, budgets
from .report.reported import Reported, Reproduced, lines_of, read_reported
from .report.terminal import Grid
from .run.rows import NONE, Config, Row
from .suites import lmms, units
from .suites.scores import documents
from .tasks import TASKS, load_task

MANY = 10**9
N_TEXT = 64  # text tokens of a prompt, as the plan assumes
FAST = 2e14  # FLOPs a second that a plan names for comparison: a large GPU in bfloat16
ACCEPTED = 0.8  # points: sources that did not copy from each other agree within this on the yardstick


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Args:
        model: as in published tables.
        methods: names or specifications.
        tasks: of lmms-eval, or tokprune's own; those of the tables of the model, if none is given.
        budgets: visual tokens of an image to keep, as "64", or their share, as "25%"; those of the tables, if none is
            given.
        checkpoint: an embedded model's name, a folder or a hub id; empty for the usual one of the model.
        limit: questions a task; a run with a limit reproduces nothing, and its scores are not to be sent back.

    Raises:
        RunError: no such model or budget.
        TokPruneError: no such method.
    """

    model: str
    methods: Sequence[str]
    tasks: Sequence[str] = ()
    budgets: Sequence[str] = ()
    checkpoint: str = ""
    limit: int | None = None
    configs: list[Config] = field(init=False)

    def __post_init__(self):
        if self.model not in USUAL and not (self.checkpoint and self.tasks and self.budgets):
            raise RunError(
                f"no published scores of {self.model!r}: use one of {', '.join(USUAL)}, or name its weights, tasks and "
                "budgets with --checkpoint, --tasks and --budgets"
            )
        usual = USUAL.get(self.model, Usual("", 0, (), ()))
        object.__setattr__(self, "tasks", list(self.tasks or usual.tasks))
        object.__setattr__(self, "budgets", list(self.budgets or usual.budgets))
        ratios, tokens = budgets(self.budgets)
        configs = [c for c in configurations([NONE, *self.methods], ratios, tokens=tokens) if not c.shuffled]
        object.__setattr__(self, "configs", configs)

    @property
    def weights(self) -> str:
        """Folder, hub id or name of the weights."""
        return self.checkpoint or USUAL[self.model].checkpoint

    @property
    def prompts(self) -> dict[str, dict[str, bool]]:
        """Options of prompts that published tables have, by task."""
        known = USUAL[self.model].prompts if self.model in USUAL else {}
        return {task: options for task, options in known.items() if task in self.tasks}

    @property
    def in_percent(self) -> bool:
        """Whether budgets are shares of the visual tokens."""
        return all(budget.endswith("%") for budget in self.budgets)

    def budget_of(self, config: Config, before: float, after: float) -> str:
        """As published tables have it, from the visual tokens of a picture before and after."""
        if config.keep_tokens is not None:
            return str(config.keep_tokens)
        if config.keep_ratio is not None:
            return f"{100 * config.keep_ratio:g}%"
        return f"{100 * after / before:.3g}%" if self.in_percent else str(round(after))


# ---- the plan


def plan(wanted: Wanted, console: Console, shape: Shape | None = None) -> None:
    """Show what would run, what it costs, what it will be compared with, and how long it takes at least.

    Args:
        wanted: what to measure.
        console: where it is shown.
        shape: of the model; None for the known one of its name.
    """
    n_visual = USUAL[wanted.model].n_visual if shape is None and wanted.model in USUAL else 0
    shape = shape or known_shape(wanted.model)
    n_visual = n_visual or shape.n_visual
    published = [r for r in read_reported() if r.model == wanted.model]
    lines, total, unknown = [], 0.0, []
    for task in wanted.tasks:
        known = BENCHMARKS.get(task, Benchmark(Path(task).name))
        n = min(_documents(task, known, wanted.limit), wanted.limit or MANY) % MANY  # 0 where it is not known
        unknown += [] if n else [known.name]
        for config in wanted.configs:
            spent = n * _prefill_flops(shape, config, n_visual)
            total += spent
            budget = wanted.budget_of(config, n_visual, n_visual)
            cells = [known.name, config.method, budget, f"{n:,}" if n else "?", _flops(spent) if n else "?"]
            same = [r.score for r in published if _key(r) == (known.name, config.method, budget) and not r.wrong]
            lines.append([*cells, _range(0.0, same)[0]])
    header = ["benchmark", "method", "tokens", "questions", "prefill FLOPs", "published"]
    title = f"{wanted.weights}: {len(wanted.configs)} configurations of {len(wanted.tasks)} tasks through lmms-eval"
    console.print(Grid(header, lines, title, names=3))
    console.print(_in_all(total, n_visual, unknown), soft_wrap=True)


def _in_all(total: float, n_visual: int, unknown: Sequence[str]) -> str:
    """What a plan costs, in sentences."""
    speed = _matmul_flops()
    left_out = f" Not counted: {', '.join(unknown)}, with an unknown number of questions." if unknown else ""
    if not total:
        return left_out.strip()
    return (
        f"In all {_flops(total)}FLOPs of prefill, counted with {n_visual:,} visual and {N_TEXT} text tokens. A matrix "
        f"product runs at {_flops(speed)}FLOP/s here, so it takes at least {_duration(total / speed)}; at "
        f"{_flops(FAST)}FLOP/s, {_duration(total / FAST)}.{left_out}"
    )


def _documents(task: str, known: Benchmark, limit: int | None) -> int:
    """How many questions a task has; `MANY` where that is not known."""
    if task in TASKS.names() or lmms.is_folder(task):
        return len(chosen_samples(load_task(task), limit))
    return known.documents or MANY


def _flops(n: float) -> str:
    """As "80.2 P"."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1e6:,.1f} M"


def _prefill_flops(shape: Shape, config: Config, n: int) -> int:
    """Of one question with `n` visual tokens."""
    method = "" if config.method == NONE else config.method
    ratio = min(config.keep_tokens / n, 1.0) if config.keep_tokens is not None else config.keep_ratio or 1.0
    return costs(shape, kept(shape, method, ratio, n, N_TEXT), n, N_TEXT, None)[1].prefill.flops


def _matmul_flops(n: int = 2048, seconds: float = 0.5) -> float:
    """FLOPs a second of a matrix product, in bfloat16 on a GPU and float32 on a CPU."""
    gpu = torch.cuda.is_available()
    a = torch.randn(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)
    done, start = 0, time.perf_counter()
    while done < 3 or time.perf_counter() - start < seconds:
        float((a @ a)[0, 0])  # reading it waits for the device
        done += 1
    return 2 * n**3 * done / (time.perf_counter() - start)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---- the run


def suite_of(wanted: Wanted, batch_size: int = 8, arguments: str = "", processes: int = 1) -> lmms.Suite:
    """What lmms-eval is asked to run.

    Args:
        wanted: what to measure.
        batch_size: documents at a time.
        arguments: more ones of the plug-in, such as dtype=bfloat16.
        processes: on this machine, which share the documents.
    """
    return lmms.Suite(
        wanted.weights,
        wanted.tasks,
        wanted.configs,
        wanted.limit,
        batch_size,
        model_args=arguments,
        processes=processes,
        prompts=wanted.prompts,
    )


def run(wanted: Wanted, suite: lmms.Suite, out: Path, console: Console, overwrite: bool = False) -> list[Reproduced]:
    """Run what is not there yet, show it beside published scores, and write `reproduced.jsonl` and a page.

    Raises:
        RunError: lmms-eval is not installed, or a run failed; what ran before is kept.
    """
    lmms.run(suite, out, console, overwrite)
    rows = [Row.read(json.loads(line)) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    found = compared(measured(wanted, rows), rows, suite, out)
    file = out / "reproduced.jsonl"
    file.write_text(lines_of(found), encoding="utf-8")
    page = leaderboard.write(found, out / "leaderboard.html")
    console.print(beside(found, [r for r in read_reported() if r.model == wanted.model]))
    console.print(
        f"{file} has these scores, {page.name} next to it ranks them. "
        + (
            "They are of some of the questions (--limit), so do not send them back."
            if wanted.limit
            else "To have them in docs/reported.md, add the JSONL file to eval/results/reproduced/."
        ),
        soft_wrap=True,
    )
    return found


Key = tuple[str, Config]  # task, configuration


def measured(wanted: Wanted, rows: Sequence[Row]) -> dict[Key, Reproduced]:
    """Scores as they are published, from rows of lmms-eval; what a benchmark lacks is left out."""
    found = {}
    for task in wanted.tasks:
        known, of_task = _known(task, rows), _of_task(task, rows)
        for config in wanted.configs:
            parts = [r for m in known.metrics for r in of_task if r.config == config.label and r.metric == m]
            if len(parts) == len(known.metrics):
                found[task, config] = _score(wanted, known, task, config, parts)
    return found


def _of_task(task: str, rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.task.partition(",")[0] == Path(task).name]


def _known(task: str, rows: Sequence[Row]) -> Benchmark:
    """The benchmark of a task; of one that no table has its first metric, in percent where it is a share."""
    own = _of_task(task, rows)
    if task in BENCHMARKS or not own:
        return BENCHMARKS.get(task, Benchmark(Path(task).name))
    is_share = all(0 <= r.value <= 1 for r in own if r.metric == own[0].metric)
    return Benchmark(Path(task).name, (own[0].metric,), 100.0 if is_share else 1.0)


def _score(wanted: Wanted, known: Benchmark, task: str, config: Config, parts: Sequence[Row]) -> Reproduced:
    first, one = parts[0], len(parts) == 1
    versions = {"tokprune": first.tokprune, "torch": first.torch, "transformers": first.transformers}
    return Reproduced(
        model=wanted.model,
        benchmark=known.name,
        method=config.method,
        budget=wanted.budget_of(config, first.n_visual_before, first.n_visual_after),
        score=known.scale * sum(r.value for r in parts),
        n=first.n_samples,
        low=known.scale * first.low if one and first.low is not None else None,
        high=known.scale * first.high if one and first.high is not None else None,
        task=task,
        checkpoint=wanted.weights,
        versions={**versions, "device": first.gpu or first.device, "dtype": first.dtype},
        date=datetime.date.fromisoformat(first.date[:10]).isoformat(),
    )


@dataclass(frozen=True)
class Drawn:
    """What a score comes from: the rule, its units, and the scale of what is published."""

    rule: units.Rule
    own: units.Units
    scale: float

    def scaled(self, values: Sequence[float]) -> list[float]:
        """As published."""
        return [self.scale * value for value in values]


def compared(found: Mapping[Key, Reproduced], rows: Sequence[Row], suite: lmms.Suite, out: Path) -> list[Reproduced]:
    """Scores with intervals, and with their differences from others of the same budget on the same questions.

    Args:
        found: as `measured` gives them.
        rows: of lmms-eval.
        suite: that was run.
        out: its folder.
    """
    drawn = {key: _drawn(_known(key[0], rows), row, key, suite, out) for key, row in found.items()}
    return [_with_differences(key, found, drawn) for key in found]


def _drawn(known: Benchmark, row: Reproduced, key: Key, suite: lmms.Suite, out: Path) -> Drawn | None:
    """What a score comes from; None where that is not known, or comes to another score."""
    task, config = key
    rule = units.rule_of(known.metrics)
    lines = documents(out / "lmms-eval" / lmms.folder_name(config), suite.name_of(task))
    own = rule.read(lines)
    if own is None or not math.isclose(known.scale * rule.of(own), row.score, rel_tol=1e-6, abs_tol=1e-6):
        return None
    return Drawn(rule, own, known.scale)


def _with_differences(key: Key, found: Mapping[Key, Reproduced], drawn: Mapping[Key, Drawn | None]) -> Reproduced:
    row, mine = found[key], drawn[key]
    if mine is None:
        return row
    rivals = {
        theirs.method: drawn[other]
        for other, theirs in found.items()
        if other != key and other[0] == key[0] and (theirs.method == NONE or theirs.budget == row.budget)
    }
    apart = {name: mine.rule.difference(mine.own, there.own) for name, there in rivals.items() if there is not None}
    pairs = {name: mine.scaled(values) for name, values in apart.items() if values is not None}
    low, high = mine.scaled(mine.rule.interval(mine.own))
    return replace(row, low=low, high=high, paired=pairs)


# ---- beside what is published


def _key(row: Reported | Reproduced) -> tuple[str, str, str]:
    return row.benchmark, row.method, row.budget


def beside(found: Sequence[Reproduced], published: Sequence[Reported]) -> Grid:
    """Ours beside the range that others print; scores that are struck out do not count."""
    lines = []
    for row in found:
        same = [r.score for r in published if _key(r) == _key(row) and not r.wrong]
        ends = "" if row.low is None else f" [{row.low:.1f}, {row.high:.1f}]"
        questions = f"{row.n:,}"
        ours = f"{row.score:.1f}{ends}"
        lines.append([row.benchmark, row.method, row.budget, questions, ours, *_range(row.score, same)])
    header = ["benchmark", "method", "tokens", "questions", "ours [95 %]", "published", "away"]
    notes = [] if any(line[-1] for line in lines) else ["Nobody published scores of these benchmarks and budgets."]
    return Grid(header, lines, f"tokprune {tokprune.__version__}", names=3, notes=notes)


def _range(score: float, published: Sequence[float]) -> list[str]:
    """The range of published scores, and how far a score is outside of it."""
    if not published:
        return ["", ""]
    low, high = min(published), max(published)
    away = max(low - score, score - high, 0.0)
    verdict = "inside" if not away else f"{away:.1f}" + (" (accepted)" if away <= ACCEPTED else "")
    return [f"{low:g} to {high:g} ({len(published)})" if high > low else f"{low:g}", verdict]
