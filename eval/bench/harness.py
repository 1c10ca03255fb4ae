"""What the harness costs: its time for an answer, relative to a loop that a user would write for the same batches.

python -m tokprune.eval.bench.harness --out eval/results/harness-tiny-llava.jsonl

Both answer the same questions in the same batches with the same calls of processor and model. The harness also writes a
row for every answer and the times of every batch; the report that it draws at the end of a run is not in it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tokprune

from ..run.folder import RunFolder
from ..run.processes import Processes
from ..run.rows import BARE, Config, conditions
from ..run.runner import Runner
from ..tasks import Sample, Task, load_task, stratified

CONFIGS = (Config("none"), Config("vtc_cls", 0.25))


@torch.no_grad()
def by_hand(runner: Runner, task: Task, samples: Sequence[Sample], config: Config, batch_size: int) -> int:
    """Attach, processor, generate, decode, compare; the number of right answers."""
    right = 0
    with nullcontext() if config.method in BARE else tokprune.attach(runner.model, config.method, **config.budget):
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            text = [runner.prompt(sample.question) for sample in part]
            images = [[task.image(sample.image_id)] for sample in part]
            inputs = runner.processor(images=images, text=text, padding=True, return_tensors="pt")
            out = runner.model.generate(**inputs, max_new_tokens=runner.max_new_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers = runner.processor.batch_decode(new, skip_special_tokens=True)
            right += sum(sample.is_right(answer) for sample, answer in zip(part, answers, strict=True))
    return right


def by_harness(runner: Runner, task: Task, samples: Sequence[Sample], config: Config, batch_size: int) -> int:
    """The same as `tokprune compare` does it, with its rows written to a folder."""
    vars(runner).pop("_crops", None)  # a user's run does not know the pictures of an earlier one
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(RunFolder(Path(folder), {}, True, Processes.started(), {})) as results,
    ):
        right = 0
        for found, rows, batch_time in runner.run(task, samples, [config], batch_size):
            results.add((task.name, found.label, batch_time.batch), rows, batch_time)
            right += sum(row.right for row in rows)
        return right


def main(
    rounds: Annotated[int, typer.Option(help="Measurements of each, in turn.")] = 5,
    questions: Annotated[int, typer.Option(help="Of every task.")] = 160,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    out: Annotated[Path | None, typer.Option(help="A file to write rows to.")] = None,
) -> None:
    """Print milliseconds an answer of both, and the median of their ratios."""
    runner, lines = Runner.load("tiny-llava"), []
    for name in ("findit", "easyvqa"):
        task = load_task(name)
        samples = stratified(task.samples(), questions)
        for config in CONFIGS:
            line = _measured(runner, task, samples, config, batch_size, rounds)
            typer.echo(
                f"{name}, {config.label}: {line['hand_ms']:.2f} ms by hand, {line['harness_ms']:.2f} ms in all: "
                f"x {line['ratio']:.2f} [{line['ratios'][0]:.2f}, {line['ratios'][-1]:.2f}]"
            )
            lines.append({**line, "threads": torch.get_num_threads(), **conditions(runner.model)})
    if out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _measured(
    runner: Runner, task: Task, samples: Sequence[Sample], config: Config, batch_size: int, rounds: int
) -> dict[str, Any]:
    ways = (by_hand, by_harness)
    seconds: list[list[float]] = []
    for turn in range(rounds + 1):  # the first one warms up
        found, right = {}, set()
        for way in ways if turn % 2 else reversed(ways):
            found[way.__name__], answers = _timed(lambda way=way: way(runner, task, samples, config, batch_size))
            right.add(answers)
        if len(right) > 1:
            raise RuntimeError(f"answers differ: {right} of {len(samples)} are right")
        seconds += [[found[way.__name__] for way in ways]] if turn else []
    ratios = sorted(harness / hand for hand, harness in seconds)
    hand, harness = (1000 * statistics.median(times) / len(samples) for times in zip(*seconds, strict=True))
    return {
        "task": task.name,
        "config": config.label,
        "questions": len(samples),
        "batch_size": batch_size,
        "rounds": rounds,
        "hand_ms": hand,
        "harness_ms": harness,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _timed(run: Callable[[], int]) -> tuple[float, int]:
    since = time.perf_counter()
    answers = run()
    return time.perf_counter() - since, answers


if __name__ == "__main__":
    typer.run(main)
