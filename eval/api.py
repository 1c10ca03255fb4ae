"""Comparisons, drawings and benchmarks from Python: what `tokprune.compare`, `.explain` and `.bench` are."""

from __future__ import annotations

import contextlib
import html
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tokprune.integrations.vllm import refuse_without_vllm
from transformers.utils import logging

from tokprune.core.errors import AlarmError, RunError
from tokprune.prune.videos import N_FRAMES, Clip

from . import compare as comparing
from .bench.cells import Row as BenchRow
from .bench.settings import Settings
from .bench.sweep import Bench
from .models import DEFAULT, EMBEDDED
from .report import pareto
from .report.explained import Explained, asked, usual_method, with_ratios
from .report.exports import frame_of, markdown_tables
from .report.findings import named_alarms
from .report.latex import latex_table
from .report.rankings import rankings
from .report.stored import Run
from .report.tables import body, caption
from .run.folder import RunFolder
from .run.plan import planned
from .run.processes import Processes
from .run.rows import TRANSFORMERS, VLLM, Row
from .run.runner import Runner
from .tasks import Sample, Task, load_task
from .tasks.grading import Grading

SHOWN_ROWS = 8  # in a console


@dataclass(repr=False)
class ComparisonResult:
    """What `compare` returns: a table that is also a folder.

    Args:
        rows: one for each configuration and task, seeds apart.
        floors: accuracy of the most frequent answer to each question, by task; None where it is not known.
        folder: report.html, table.md, table.csv, rows.jsonl, samples.jsonl and accuracy.png.
    """

    rows: list[Row]
    floors: dict[str, float | None]
    folder: Path
    _kept: Any = field(default=None, compare=False)  # a temporary folder lives as long as this does

    @property
    def alarms(self) -> list[str]:
        """What makes figures doubtful: methods that changed no answer although tokens left, or made answers alike."""
        return named_alarms(self.rows)

    def to_pandas(self) -> pd.DataFrame:
        """One line for each configuration and task, with every figure; seeds have a line each."""
        return frame_of(self.rows, self.floors)

    def to_markdown(self) -> str:
        """One table for each task with its conditions."""
        return markdown_tables(self.rows, self.floors, text=str)

    def to_latex(self) -> str:
        r"""One `tabular` for each task; needs \\usepackage{booktabs}. The best of each budget is bold."""
        return latex_table(self.rows, self.floors)

    def to_csv(self) -> str:
        """`to_pandas` as CSV."""
        return (self.folder / "table.csv").read_text(encoding="utf-8")

    def answers(self) -> pd.DataFrame:
        """One line for each answer: question, configuration, what was expected and what was said."""
        return pd.DataFrame([vars(row) for row in Run.read(self.folder).samples])

    def figure(self) -> Figure | None:
        """Accuracy against what it costs; None where nothing can be drawn."""
        return pareto.figure_of(self.rows, self.floors)

    def _repr_html_(self) -> str:
        tasks = {task: [r for r in self.rows if r.task == task] for task in dict.fromkeys(r.task for r in self.rows)}
        shown = [_html(f"{t}: {caption(own[0])}", *body(own, self.floors.get(t))) for t, own in tasks.items()]
        return "\n".join([*shown, *(_html(g.title, g.header, g.lines, g.notes) for g in rankings(self.rows))])

    def __repr__(self) -> str:
        tasks = dict.fromkeys(r.task for r in self.rows)
        folder = "" if self._kept else f", {str(self.folder)!r}"  # a temporary one is nobody's to know
        head = f"ComparisonResult({len(self.rows)} rows, {', '.join(tasks)}{folder})"
        return "\n  ".join([head, *map(repr, self.rows[:SHOWN_ROWS]), *(["..."] if self.rows[SHOWN_ROWS:] else [])])


def compare(
    model: str | torch.nn.Module,
    processor: Any = None,
    task: str | Task | Sequence[str | Task] | None = None,
    methods: Sequence[str] | None = None,
    keep: Sequence[float] = (),
    *,
    keep_tokens: Sequence[int] = (),
    match: str = "tokens",
    limit: int | None = None,
    full: bool = False,
    batch_size: int = 32,
    frames: int = N_FRAMES,
    suffix: str = "",
    suffixes: Sequence[str] = (),
    max_new_tokens: int = 8,
    metric: str = "",
    baseline: bool = True,
    controls: bool = True,
    strict: bool = False,
    device_map: str | None = None,
    dtype: str = "",
    attn: str = "",
    device: str = "",
    backend: str = TRANSFORMERS,
    out: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> ComparisonResult:
    """Compare methods and budgets on questions, as `tokprune compare` does.

    Args:
        model: a loaded model, or an embedded model's name, a local folder or a hub id.
        processor: of a loaded model.
        task: one or more of: a task's name, a folder of questions, "./file.py:Class", or a task object. None for those
            of the embedded model.
        methods: names or specifications; the unpruned model ("none") is added. None for the usual ones that run.
        keep: fractions of the visual tokens; 0.5, 0.25 and 0.11, or those of the embedded model, if none is given.
        keep_tokens: numbers of visual tokens, in addition to the fractions.
        match: what a fraction is of: "tokens", or "flops" of the language model's prefill.
        limit: number of questions for each task, for a quick look.
        full: all questions instead of the fixed 800.
        batch_size: questions at a time.
        frames: frames to take of a video in a folder.
        suffix: added to every question.
        suffixes: several of them instead: every question is asked with each, and methods are ranked under each.
        max_new_tokens: where an answer is cut.
        metric: how answers are graded; empty for what each question asks for, else exact.
        baseline: whether the unpruned model answers, too.
        controls: whether it also answers about smaller pictures, and about fewer frames of videos, at every budget.
        strict: raise where the result has alarms, once everything is written.
        device_map: as in transformers, where the model is loaded here; as are
        dtype: such as "bfloat16";
        attn: such as "sdpa" or "flash_attention_2";
        device: "cpu" or "cuda".
        backend: what runs the model: "transformers" or "vllm".
        out: the folder to write; a run that it holds is resumed, and gets what is new. None for a temporary one.
        overwrite: start over.
        console: where progress and tables are printed; None for nowhere.

    Raises:
        AlarmError: `strict`, and the result has alarms.
        TokPruneError: something that was asked for does not exist or cannot run here.
    """
    if strict and not baseline:
        raise RunError("strict compares answers with the unpruned run's: leave --no-baseline (baseline=False) out")
    if match not in ("tokens", "flops"):
        raise RunError(f"invalid match {match!r}: use tokens or flops")
    check_backend(backend, model)
    suffix, suffixes = _prompts(suffix, suffixes)
    usual = EMBEDDED.get(model if isinstance(model, str) else "", EMBEDDED[DEFAULT])
    named = usual.methods if methods is None else methods
    names = list(dict.fromkeys(["none", *named])) if baseline else [m for m in named if m != "none"]
    ratios = keep or (() if keep_tokens else usual.ratios)
    configs = comparing.configurations(names, ratios, tokens=keep_tokens)
    tasks = usual.tasks if task is None else task if isinstance(task, (list, tuple)) else [task]
    chosen = comparing.chosen_tasks(tasks, limit, full, frames)
    if controls and any(c.budget for c in configs):
        less = comparing.configurations(comparing.controls(chosen), ratios, tokens=keep_tokens)
        configs = list(dict.fromkeys([*configs, *less]))
    chosen = comparing.prompted(chosen, suffixes) if suffixes else chosen
    grading = Grading.load(metric)
    grading.check(chosen)
    options = {"max_new_tokens": max_new_tokens, "suffix": suffix, "grading": grading}
    kept = tempfile.TemporaryDirectory(prefix="tokprune-") if out is None else None
    folder, processes = Path(out if kept is None else kept.name), Processes.started()
    console = console if console and processes.is_main else Console(quiet=True)
    loading = {"device_map": device_map, "dtype": dtype, "attn": attn, "device": device}
    with answering(model, processor, loading, options, backend) as (runner, name):
        configs = comparing.runnable(runner, chosen, configs, match == "flops", methods is not None, console)
        plan = planned(chosen, configs, batch_size, None if overwrite else folder)
        more: dict[str, Any] = {} if frames == N_FRAMES else {"frames": frames}
        more |= {"suffixes": suffixes} if suffixes else {}
        more |= {"backend": backend} if backend != TRANSFORMERS else {}
        settings = comparing.settings(runner, name, plan, batch_size=batch_size, **more)
        with contextlib.closing(RunFolder(folder, settings, overwrite, processes, plan.questions)) as results:
            done = comparing.Comparison(runner, name, results, plan)
            done.run(console)
    processes.end()
    result = ComparisonResult(done.rows, done.floors, folder, kept)
    if strict and result.alarms:
        raise AlarmError("; ".join(result.alarms))
    return result


def _prompts(suffix: str, suffixes: Sequence[str]) -> tuple[str, list[str]]:
    """The one text that is added to every question, or the several ones that are compared."""
    if suffix and suffixes:
        raise RunError("give suffix or suffixes, not both")
    several = list(dict.fromkeys(suffixes))
    return (several[0], []) if len(several) == 1 else (suffix, several)


@contextlib.contextmanager
def answering(
    model: str | torch.nn.Module,
    processor: Any,
    loading: dict[str, Any],
    options: dict[str, Any],
    backend: str = TRANSFORMERS,
) -> Iterator[tuple[Runner, str]]:
    """A runner and a name for its model; a model that was handed over is left as it was."""
    if isinstance(model, str):
        if model in EMBEDDED:
            logging.disable_progress_bar()
        with contextlib.closing(_runner(backend).load(model, **loading, **options)) as runner:
            yield runner, model
        return
    if processor is None:
        raise RunError("a loaded model needs its processor: compare(model, processor, ...)")
    training, side = model.training, processor.tokenizer.padding_side
    try:
        processor.tokenizer.padding_side = "left"
        yield Runner(model.eval(), processor, **options), model.name_or_path or type(model).__name__
    finally:
        model.train(training)
        processor.tokenizer.padding_side = side


def _runner(backend: str) -> type[Runner]:
    """The class of runners of a backend."""
    if backend != VLLM:
        return Runner
    from .run.served import ServedRunner

    return ServedRunner


def check_backend(backend: str, model: str | torch.nn.Module) -> None:
    """Raise RunError for a backend that there is not, or that cannot ask here."""
    if backend not in (TRANSFORMERS, VLLM):
        raise RunError(f"invalid backend {backend!r}: use transformers or vllm")
    if backend == TRANSFORMERS:
        return
    if not isinstance(model, str):
        raise RunError(
            "vLLM loads the model itself: give its name, a folder or a hub id, or use backend='transformers'"
        )
    if Processes.started().n > 1:
        raise RunError("vLLM has processes of its own: start the command without torchrun or accelerate")
    refuse_without_vllm()


def explain(
    model: str | torch.nn.Module,
    processor: Any = None,
    picture: Image.Image | Clip | None = None,
    question: str = "what is in the image?",
    methods: Sequence[str] = (),
    keep: float | Sequence[float] = 0.25,
    scores: bool = False,
    max_new_tokens: int = 8,
) -> Explained:
    """Draw which visual tokens methods keep, as `tokprune explain` does; a notebook shows the drawing.

    Args:
        model: a loaded model, or an embedded model's name, a local folder or a hub id.
        processor: of a loaded model.
        picture: the picture, or a video as `tokprune.prune.videos.open_clip` gives it.
        question: asked about it.
        methods: names or specifications; vtc_cls, or fopru where the vision tower has no [CLS] token, if none is given.
        keep: fractions of the visual tokens, one or several, for methods that take a budget.
        scores: whether the scores of methods that rank single tokens are drawn, too.
        max_new_tokens: where an answer is cut.

    Raises:
        TokPruneError: a fraction is invalid, or a method does not exist or cannot run here.
    """
    if picture is None:
        raise RunError("name a picture: explain(model, processor, picture=Image.open('a.png'))")
    each = [keep] if isinstance(keep, (int, float)) else keep
    if not each:
        raise RunError("there is nothing to draw: name fractions, such as keep=[0.5, 0.25]")
    configurations = with_ratios(methods, each)
    with answering(model, processor, {}, {"max_new_tokens": max_new_tokens}) as (runner, _):
        chosen = configurations or with_ratios([usual_method(runner.model)], each)
        return asked(runner, picture, question, chosen, answers=True, scores=scores)


@dataclass(repr=False)
class BenchmarkResult:
    """What `bench` returns: one row for each configuration, batch, resolution and output length."""

    rows: list[BenchRow]

    def to_pandas(self) -> pd.DataFrame:
        """One line a row."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def to_markdown(self) -> str:
        """The table that `_repr_html_` shows."""
        return self._short().to_markdown(index=False) + "\n"

    def to_latex(self) -> str:
        r"""The same as a `tabular`; needs \\usepackage{booktabs}."""
        return self._short().to_latex(index=False, escape=True)

    def _short(self) -> pd.DataFrame:
        frame = self.to_pandas()
        middle = [c for c in ("first_ratio", "token_ratio", "total_ratio") if c in frame]
        for name in middle:
            frame[name] = [None if value is None else value[1] for value in frame[name]]
        names = ("method", "keep_ratio", "batch_size", "resolution", "new_tokens", *middle, "kv_bytes_ratio")
        return frame[[n for n in names if n in frame]]

    def _repr_html_(self) -> str:
        return self._short().to_html(index=False)

    def __repr__(self) -> str:
        return f"BenchmarkResult({len(self.rows)} rows, {', '.join(dict.fromkeys(r.model for r in self.rows))})"


def bench(*, out: str | Path | None = None, console: Console | None = None, **settings: Any) -> BenchmarkResult:
    """Measure time and memory that pruning saves, as `tokprune bench` does.

    Args:
        out: the JSONL file to write; None for none.
        console: where progress is printed; None for nowhere.
        **settings: fields of `tokprune.eval.bench.settings.Settings`: model="tiny-llava" or shape="llava-1.5-7b",
            methods, keep, batch_sizes, new_tokens, rounds ...

    Raises:
        TokPruneError: something cannot be measured here.
    """
    with tempfile.TemporaryDirectory(prefix="tokprune-") as folder:
        file = Path(folder) / "bench.jsonl" if out is None else Path(out)
        return BenchmarkResult(
            Bench(Settings(**settings), file, console or Console(quiet=True, force_jupyter=False)).run()
        )


def _html(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A plain table for notebooks."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<p>{html.escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


__all__ = ["BenchmarkResult", "ComparisonResult", "Explained", "Sample", "bench", "compare", "explain", "load_task"]
