"""Tuning from Python: what `tokprune.tune` is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokprune.prune.videos import N_FRAMES

from ..api import answering
from ..run.processes import Processes
from ..tasks import Task
from ..tasks.grading import Grading
from . import page
from . import tune as tuning
from .race import Parts, Rule


@dataclass(repr=False)
class TuneResult:
    """What `tune` returns.

    Args:
        found: the choice, what it saves and risks, the tests, and the lost questions.
        folder: tune.html and tune.json; where a promise can be made, tokprune.json for `tokprune.load`, too.
    """

    found: tuning.Tuned
    folder: Path
    _wanted: tuning.Wanted
    _parts: Parts

    @property
    def promised(self) -> bool:
        """Whether a configuration within the tolerance was found, with the confidence asked for, and saved."""
        return self.found.promised

    @property
    def sentences(self) -> list[str]:
        """The result in words, the most important first."""
        return [*page.sentences(self._wanted, self.found), page.effort(self._parts, self.found)]

    def __repr__(self) -> str:
        return "\n".join(self.sentences)


def tune(
    model: str | torch.nn.Module,
    processor: Any = None,
    task: str | Task = "findit",
    max_loss: float = 0.01,
    *,
    confidence: float = 0.95,
    goal: str = "latency",
    agree: bool = False,
    methods: Sequence[str] = (),
    keep: Sequence[float] = (),
    keep_tokens: Sequence[int] = (),
    limit: int | None = None,
    frames: int = N_FRAMES,
    suffix: str = "",
    max_new_tokens: int = 8,
    metric: str = "",
    batch_size: int = 32,
    device_map: str | None = None,
    dtype: str = "",
    attn: str = "",
    device: str = "",
    out: str | Path = "deploy",
    overwrite: bool = False,
    console: Console | None = None,
) -> TuneResult:
    """Find the cheapest method and budget whose loss on your questions is within a tolerance, as `tokprune tune` does.

    Args:
        model: a loaded model, or an embedded model's name, a local folder or a hub id.
        processor: of a loaded model.
        task: a folder of questions, a task's name, "./file.py:Class", or a task object.
        max_loss: the accuracy that may be lost, a share above 0 and below 1.
        confidence: how sure the promise is, between 0 and 1.
        goal: what is saved: "latency", measured here, "flops" or "memory".
        agree: compare with the unpruned model's answers; the questions need no labels.
        methods: names or specifications; those that take a budget and run on the model, if none is given.
        keep: fractions of the visual tokens; 0.75, 0.5, 0.25 and 0.11, if none is given.
        keep_tokens: numbers of visual tokens.
        limit: number of questions.
        frames: frames to take of a video in a folder.
        suffix: added to every question.
        max_new_tokens: where an answer is cut.
        metric: how answers are graded; empty for what each question asks for, else exact.
        batch_size: questions at a time.
        device_map: as in transformers, where the model is loaded here; as are
        dtype: such as "bfloat16";
        attn: such as "sdpa" or "flash_attention_2";
        device: "cpu" or "cuda".
        out: the folder to write; a run that it holds is resumed.
        overwrite: start over.
        console: where progress is printed; None for nowhere.

    Raises:
        TokPruneError: something that was asked for does not exist or cannot run here, or the questions are too few to
            promise the tolerance.
    """
    wanted = tuning.Wanted(Rule(max_loss, 1 - confidence), goal, max_new_tokens, agree, batch_size)
    questions = tuning.questions_of(task, agree, frames) if isinstance(task, str) else task
    samples, parts = tuning.ordered(questions.samples(), limit, wanted.rule)
    grading = Grading.load(metric)
    grading.check([(questions, samples)])
    console = console if console and Processes.started().is_main else Console(quiet=True)
    loading = {"device_map": device_map, "dtype": dtype, "attn": attn, "device": device}
    options = {"max_new_tokens": max_new_tokens, "suffix": suffix, "grading": grading}
    with answering(model, processor, loading, options) as (runner, name):
        configs = tuning.candidates(runner, questions, samples, methods, keep, keep_tokens, console)
        found = tuning.tune(runner, name, questions, configs, (samples, parts), wanted, Path(out), overwrite, console)
    return TuneResult(found, Path(out), wanted, parts)
