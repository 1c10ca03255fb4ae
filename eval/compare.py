"""Methods and ratios side by side: accuracy with its interval beside what the language model really saw."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean, median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import tokprune
from tokprune.budget import Budget
from tokprune.errors import RunError

from .run import NONE, SHUFFLED, Config, Runner, SampleRow
from .tasks import Sample, Task, stratified
from .tasks.subset import SUBSET_SIZE

METHODS = ("none", "blind", "vtc_cls", "fopru", "uniform", "pool", "random")
RATIOS = (0.5, 0.25, 0.11)
RANDOM_SEEDS = 3
Z95 = NormalDist().inv_cdf(0.975)


def configurations(methods: Sequence[str], ratios: Sequence[float], seeds: int = RANDOM_SEEDS) -> list[Config]:
    """The grid: methods with a budget at every ratio, `random` once a seed, shuffled pictures beside "none".

    Raises:
        TokPruneError: an unknown method or option, or a ratio that is none.
    """
    for ratio in ratios:
        Budget(keep_ratio=ratio)
    grid = []
    for spec in methods:
        if spec == NONE:
            grid += [Config(NONE), Config(NONE, shuffled=True)]
            continue
        specs = [f"random:seed={seed}" for seed in range(seeds)] if spec == "random" else [spec]
        budgeted = [tokprune.get_method(s).takes_budget for s in specs]
        grid += [Config(s, ratio) for s, b in zip(specs, budgeted, strict=True) if b for ratio in ratios]
        grid += [Config(s) for s, b in zip(specs, budgeted, strict=True) if not b]
    return list(dict.fromkeys(grid))


@dataclass
class Row:
    """One configuration on one task, as it is written to rows.jsonl."""

    model: str
    task: str
    method: str
    config: str
    keep_ratio: float | None
    n_samples: int
    accuracy: float
    low: float
    high: float
    stderr: float
    words_accuracy: float
    stop_rate: float
    by_kind: dict[str, float]
    n_visual: float
    n_visual_kept: float
    llm_columns: float
    llm_columns_kept: float
    prefill_s_p20: float
    prefill_s_p50: float
    prefill_s_p80: float
    prefill_ratio: float | None
    batch_size: int
    device: str
    dtype: str
    attn_implementation: str
    positions: str
    torch: str
    transformers: str
    tokprune: str
    date: str


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z95 * Z95
    middle, half = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def question_only(task: Task, samples: Sequence[Sample]) -> float | None:
    """Accuracy of the answer that training questions of the same words have most often; None without training."""
    train = task.train_samples()
    if train is None:
        return None
    answers: dict[str, Counter] = defaultdict(Counter)
    for s in train:
        answers[s.question][s.answer] += 1
        answers[f"kind {s.kind}"][s.answer] += 1
    guesses = [(answers.get(s.question) or answers[f"kind {s.kind}"]).most_common(1)[0][0] for s in samples]
    return mean(guess == s.answer for guess, s in zip(guesses, samples, strict=True))


class Comparison:
    """A run of `tokprune compare`: samples.jsonl grows while it runs, rows.jsonl and the plot follow.

    Args:
        runner: model and processor.
        model_name: as the user typed it.
        out: folder for the files; created.
        configs: what to compare.
        batch_size: questions at a time.

    Raises:
        RunError: the folder cannot be written.
    """

    def __init__(self, runner: Runner, model_name: str, out: Path, configs: Sequence[Config], batch_size: int = 32):
        self.runner, self.model_name, self.out = runner, model_name, out
        self.configs, self.batch_size = list(configs), batch_size
        self.rows: list[Row] = []
        self.floors: dict[str, float | None] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "samples.jsonl").write_text("")
        except OSError as error:
            raise RunError(f"cannot write to {out}: {error.strerror}; name another folder with --out") from error

    def run(self, tasks: Sequence[tuple[Task, list[Sample]]], console: Console) -> None:
        """Answer every question under every configuration, with a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bars = [
                progress.add_task(f"{task.name}, {len(samples)} questions", total=len(samples) * len(self.configs))
                for task, samples in tasks
            ]
            for name in ("rows.jsonl", "accuracy.png"):
                (self.out / name).unlink(missing_ok=True)  # an earlier run's
            for bar, (task, samples) in zip(bars, tasks, strict=True):
                done = self._run_task(task, samples, lambda n, bar=bar: progress.advance(bar, n))
                self.floors[task.name] = question_only(task, samples)
                self.rows += self._summaries(task.name, done)
        floors = [
            {"task": name, "method": "question only", "accuracy": floor}
            for name, floor in self.floors.items()
            if floor is not None
        ]
        write_jsonl(self.out / "rows.jsonl", [*floors, *(asdict(row) for row in self.rows)])

    def _run_task(self, task: Task, samples: list[Sample], advance) -> dict[Config, list[SampleRow]]:
        done: dict[Config, list[SampleRow]] = {config: [] for config in self.configs}
        with (self.out / "samples.jsonl").open("a", encoding="utf-8") as file:
            for config, rows in self.runner.run(task, samples, self.configs, self.batch_size):
                done[config] += rows
                file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
                file.flush()
                advance(len(rows))
        return done

    def _summaries(self, task: str, done: dict[Config, list[SampleRow]]) -> list[Row]:
        times = {c: self._times(task, c) for c in done}
        bare = next((times[c] for c in done if c.method == NONE and not c.shuffled), None)
        return [self._summary(task, c, rows, times[c], bare) for c, rows in done.items() if rows]

    def _times(self, task: str, config: Config) -> dict[int, float]:
        mine = [t for t in self.runner.times if (t.task, t.config) == (task, config.label)]
        return {t.batch: t.prefill_s for t in mine if t.size == self._full(task)}

    def _full(self, task: str) -> int:
        """The size of a full batch of a task; a last smaller one is not timed."""
        return max(t.size for t in self.runner.times if t.task == task)

    def _summary(self, task: str, config: Config, rows: list[SampleRow], times: dict, bare: dict | None) -> Row:
        right, n = sum(r.right for r in rows), len(rows)
        low, high = wilson(right, n)
        kinds: dict[str, list[bool]] = defaultdict(list)
        for r in rows:
            kinds[r.kind].append(r.right)
        model = self.runner.model
        ordered = sorted(times.values())
        ratio = median(times[b] / bare[b] for b in times) if bare else None
        return Row(
            model=self.model_name,
            task=task,
            method=SHUFFLED if config.shuffled else config.method,
            config=config.label,
            keep_ratio=config.keep_ratio,
            n_samples=n,
            accuracy=right / n,
            low=low,
            high=high,
            stderr=math.sqrt(right / n * (1 - right / n) / n),
            words_accuracy=mean(r.words_right for r in rows),
            stop_rate=mean(r.stopped for r in rows),
            by_kind={kind: mean(values) for kind, values in sorted(kinds.items())},
            n_visual=mean(r.n_visual for r in rows),
            n_visual_kept=mean(r.n_visual_kept for r in rows),
            llm_columns=mean(r.llm_columns for r in rows),
            llm_columns_kept=mean(r.llm_columns_kept for r in rows),
            prefill_s_p20=percentile(ordered, 0.2),
            prefill_s_p50=percentile(ordered, 0.5),
            prefill_s_p80=percentile(ordered, 0.8),
            prefill_ratio=ratio,
            batch_size=self._full(task),
            device=device_name(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            attn_implementation=model.config._attn_implementation,
            positions="auto",
            torch=torch.__version__,
            transformers=transformers.__version__,
            tokprune=tokprune.__version__,
            date=datetime.date.today().isoformat(),
        )


def percentile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank percentile of an ascending list."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chosen_samples(task: Task, limit: int | None = None, full: bool = False) -> list[Sample]:
    """The published subset of 800 questions; all with `full`; `limit` of them for a quick look."""
    samples = task.samples()
    if not full:
        samples = stratified(samples, SUBSET_SIZE)
    return samples if limit is None else stratified(samples, limit)


# -------------------------------------------------------------------------------------------- shown


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows with the seeds of `random` put together: means, with the interval of one seed's number of questions.

    Seeds answer the same questions, so their answers are not independent: three seeds are not three times the data.
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        name = row.method.split(":")[0] if row.method.startswith("random:") else row.method
        groups[row.task, name, row.keep_ratio].append(row)
    out = []
    for (_, name, _), group in groups.items():
        if len(group) == 1:
            out.append(group[0])
            continue
        low, high = wilson(mean(r.accuracy for r in group) * group[0].n_samples, group[0].n_samples)
        fields = asdict(group[0])
        fields |= {
            key: mean(getattr(r, key) for r in group)
            for key in ("accuracy", "words_accuracy", "stop_rate", "n_visual_kept", "llm_columns_kept")
        }
        ratios = [r.prefill_ratio for r in group if r.prefill_ratio is not None]
        fields |= {
            "method": f"{name}, {len(group)} seeds",
            "prefill_ratio": mean(ratios) if ratios else None,
            "low": low,
            "high": high,
            "by_kind": {k: mean(r.by_kind[k] for r in group) for k in group[0].by_kind},
        }
        out.append(Row(**fields))
    return out


COLUMNS = ("method", "keep", "accuracy [95 %]", "words", "stop", "visual tokens", "LLM columns", "prefill time")


def cells(row: Row) -> tuple[str, ...]:
    """A row as shown in the terminal and in Markdown."""
    return (
        row.method,
        "" if row.keep_ratio is None else f"{row.keep_ratio:g}",
        f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]",
        f"{row.words_accuracy:.3f}",
        f"{row.stop_rate:.3f}",
        f"{row.n_visual:g} -> {row.n_visual_kept:g}",
        f"{row.llm_columns:.1f} -> {row.llm_columns_kept:.1f}",
        "" if row.prefill_ratio is None else f"x {row.prefill_ratio:.2f}",
    )


def table(task: str, rows: Sequence[Row], floor: float | None) -> Table:
    """One task's table, floors first."""
    first = rows[0]
    out = Table(
        title=f"{task}: {first.n_samples} questions, {first.model}, {first.device}, {first.dtype}, "
        f"batch {first.batch_size}",
        title_justify="left",
    )
    for i, name in enumerate(COLUMNS):
        out.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    if floor is not None:
        out.add_row("question only", "", f"{floor:.3f}", *[""] * (len(COLUMNS) - 3))
    for row in sorted(pooled(rows), key=order):
        out.add_row(*cells(row))
    return out


def order(row: Row) -> tuple:
    """Floors first, then by budget."""
    floors = [SHUFFLED, "blind", NONE]
    return (floors.index(row.method) if row.method in floors else len(floors), -(row.keep_ratio or 0))


def plot(rows: Sequence[Row], floors: dict[str, float | None], path: Path) -> None:
    """Accuracy against the visual tokens that were really kept, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(r.task for r in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        shown = [r for r in pooled(rows) if r.task == task]
        _plot_task(axis, shown, floors.get(task))
        axis.set(
            title=f"{task} ({shown[0].n_samples} questions)", xlabel="visual tokens kept an image", ylabel="accuracy"
        )
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_task(axis, rows: Sequence[Row], floor: float | None) -> None:
    flat = {r.method: r.accuracy for r in rows if r.keep_ratio is None}
    if floor is not None:
        flat["question only"] = floor
    for style, (name, value) in zip(("-", "--", ":", "-.") * 2, flat.items(), strict=False):
        axis.axhline(value, color="0.6", linestyle=style, linewidth=1, label=name)
    curves: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r.keep_ratio is not None:
            curves[r.method].append(r)
    for name, points in curves.items():
        points.sort(key=lambda r: r.n_visual_kept)
        spread = [[r.accuracy - r.low for r in points], [r.high - r.accuracy for r in points]]
        axis.errorbar(
            [r.n_visual_kept for r in points],
            [r.accuracy for r in points],
            spread,
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
