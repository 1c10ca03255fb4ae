"""Published scores measured anew: one resumable run through lmms-eval, its scores beside those that others print."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

import tokprune
from tokprune.core.errors import RunError
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import known_shape
from tokprune.prune.estimate import costs, kept

from .compare import configurations
from .report.reported import Reported, Reproduced, lines_of, read_reported
from .report.terminal import Grid
from .run.rows import NONE, Config, Row
from .suites import lmms

MANY = 10**9
N_TEXT = 64  # text tokens of a prompt, as the plan assumes
ACCEPTED = 0.8  # points: sources that did not copy from each other agree within this on the yardstick


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is run in lmms-eval.

    Args:
        name: as in published tables.
        metrics: whose sum is the score that is published.
        scale: from lmms-eval's value to the published one.
        documents: how many questions it has.
    """

    name: str
    metrics: tuple[str, ...] = ("exact_match",)
    scale: float = 100.0
    documents: int = 0


BENCHMARKS = {
    "pope": Benchmark("POPE", ("pope_f1_score",), documents=9000),
    "gqa": Benchmark("GQA", documents=12578),
    "textvqa_val": Benchmark("TextVQA", documents=5000),
    "mme": Benchmark("MME", ("mme_perception_score", "mme_cognition_score"), 1.0, 2374),
    "scienceqa_img": Benchmark("SQA-I", documents=2017),
}
CHECKPOINTS = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Args:
        model: as in published tables.
        methods: names or specifications.
        tasks: of lmms-eval, or tokprune's own.
        budgets: visual tokens to keep of an image.
        checkpoint: an embedded model's name, a folder or a hub id; empty for the usual one of the model.
        limit: questions a task; a run with a limit reproduces nothing, and its scores are not to be sent back.
    """

    model: str
    methods: Sequence[str]
    tasks: Sequence[str]
    budgets: Sequence[int]
    checkpoint: str = ""
    limit: int | None = None
    configs: list[Config] = field(init=False)

    def __post_init__(self):
        if not self.checkpoint and self.model not in CHECKPOINTS:
            raise RunError(
                f"no published scores of {self.model!r}: use one of {', '.join(CHECKPOINTS)}, or name its weights with "
                "--checkpoint"
            )
        configs = [c for c in configurations([NONE, *self.methods], (), tokens=self.budgets) if not c.shuffled]
        object.__setattr__(self, "configs", configs)

    @property
    def weights(self) -> str:
        """Folder, hub id or name of the weights."""
        return self.checkpoint or CHECKPOINTS[self.model]


def plan(wanted: Wanted, console: Console, shape: Shape | None = None) -> None:
    """Show what would run, what it costs, and at least how long it takes on this machine.

    Args:
        wanted: what to measure.
        console: where it is shown.
        shape: of the model; None for the known one of its name.
    """
    shape = shape or known_shape(wanted.model)
    lines, total = [], 0.0
    for task in wanted.tasks:
        known = BENCHMARKS.get(task, Benchmark(task))
        n = min(known.documents or MANY, wanted.limit or MANY) % MANY  # 0 where it is not known
        for config in wanted.configs:
            spent = n * _prefill_flops(shape, config)
            total += spent
            budget = "" if config.keep_tokens is None else str(config.keep_tokens)
            lines.append([known.name, config.method, budget, f"{n:,}" if n else "?", f"{spent / 1e15:,.1f}"])
    title = f"{wanted.weights}: {len(wanted.configs)} configurations of {len(wanted.tasks)} tasks through lmms-eval"
    console.print(Grid(["benchmark", "method", "tokens", "questions", "prefill PFLOPs"], lines, title, names=3))
    speed = _matmul_flops()
    console.print(
        f"In all {total / 1e15:,.1f} PFLOPs of prefill, counted with {N_TEXT} text tokens. A matrix product runs at "
        f"{speed / 1e12:.2f} TFLOP/s here, so it takes at least {_duration(total / speed)}.",
        soft_wrap=True,
    )


def _prefill_flops(shape: Shape, config: Config) -> int:
    """Of one question."""
    n = shape.n_visual
    method = "" if config.method == NONE else config.method
    ratio = 1.0 if config.keep_tokens is None else min(config.keep_tokens / n, 1.0)
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


def run(wanted: Wanted, suite: lmms.Suite, out: Path, console: Console, overwrite: bool = False) -> list[Reproduced]:
    """Run what is not there yet, show it beside published scores, and write `reproduced.jsonl`.

    Raises:
        RunError: lmms-eval is not installed, or a run failed; what ran before is kept.
    """
    lmms.run(suite, out, console, overwrite)
    rows = [Row.read(json.loads(line)) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    found = measured(wanted, rows)
    file = out / "reproduced.jsonl"
    file.write_text(lines_of(found), encoding="utf-8")
    console.print(beside(found, [r for r in read_reported() if r.model == wanted.model]))
    console.print(
        f"{file} has these scores. "
        + (
            "They are of some of the questions (--limit), so do not send them back."
            if wanted.limit
            else "To have them in docs/reported.md, add the file to eval/results/reproduced/."
        ),
        soft_wrap=True,
    )
    return found


def measured(wanted: Wanted, rows: Sequence[Row]) -> list[Reproduced]:
    """Scores as they are published, from rows of lmms-eval; what a benchmark lacks is left out."""
    found = []
    for task in wanted.tasks:
        name = Path(task).name
        known = BENCHMARKS.get(task, Benchmark(name))
        for config in wanted.configs:
            own = [r for r in rows if r.config == config.label and r.task.partition(",")[0] == name]
            parts = [r for metric in known.metrics for r in own if r.metric == metric]
            if len(parts) == len(known.metrics):
                found.append(_score(wanted, known, task, config, parts))
    return found


def _score(wanted: Wanted, known: Benchmark, task: str, config: Config, parts: Sequence[Row]) -> Reproduced:
    first, one = parts[0], len(parts) == 1
    budget = round(first.n_visual_before) if config.keep_tokens is None else config.keep_tokens
    versions = {"tokprune": first.tokprune, "torch": first.torch, "transformers": first.transformers}
    return Reproduced(
        model=wanted.model,
        benchmark=known.name,
        method=config.method,
        budget=str(budget),
        score=known.scale * sum(r.value for r in parts),
        n=first.n_samples,
        low=known.scale * first.low if one and first.low is not None else None,
        high=known.scale * first.high if one and first.high is not None else None,
        task=task,
        checkpoint=wanted.weights,
        versions={**versions, "device": first.gpu or first.device, "dtype": first.dtype},
        date=datetime.date.fromisoformat(first.date[:10]).isoformat(),
    )


def beside(found: Sequence[Reproduced], published: Sequence[Reported]) -> Grid:
    """Ours beside the range that others print; scores that are struck out do not count."""
    lines = []
    for row in found:
        same = [
            r.score
            for r in published
            if (r.benchmark, r.method, r.budget) == (row.benchmark, row.method, row.budget) and not r.wrong
        ]
        ends = "" if row.low is None else f" [{row.low:.1f}, {row.high:.1f}]"
        lines.append([row.benchmark, row.method, row.budget, f"{row.score:.1f}{ends}", *_range(row.score, same)])
    header = ["benchmark", "method", "tokens", "ours [95 %]", "published", "away"]
    title = f"tokprune {tokprune.__version__}, of all questions of each benchmark"
    return Grid(header, lines, title, names=3)


def _range(score: float, published: Sequence[float]) -> list[str]:
    """The range of published scores, and how far a score is outside of it."""
    if not published:
        return ["", ""]
    low, high = min(published), max(published)
    away = max(low - score, score - high, 0.0)
    verdict = "inside" if not away else f"{away:.1f}" + (" (accepted)" if away <= ACCEPTED else "")
    return [f"{low:g} to {high:g} ({len(published)})" if high > low else f"{low:g}", verdict]
