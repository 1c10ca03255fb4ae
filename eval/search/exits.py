"""Measures exits of all visual tokens on a task's test questions: at which layer, FLOPs saved and answers lost.

python -m tokprune.eval.search.exits --gate gate.safetensors --out rows.jsonl

It runs the fitted gates (`dyvte`, made by `tokprune fit-exit`), the attention-mass exit at several thresholds, every
fixed layer, and the controls. Controls with a budget keep the number of tokens whose FLOPs are nearest to the gates'.
The FLOPs of a question are counted without padding, from the columns of its row in every layer. "As run" counts the
padded batch, in which one row without an exit keeps all layers wide.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console

from tokprune.core.errors import RunError
from tokprune.core.files import write_text
from tokprune.cost.flops import Shape
from tokprune.methods.gates import read_gates
from tokprune.prune.report import ImageReport, Report

from ..compare import RANDOM_SEEDS, chosen_samples
from ..run.rows import NONE, Config, conditions
from ..run.runner import Runner
from ..stats import wilson
from ..tasks import Sample, Task, load_task
from .fit_exit import histogram

# The last ones are quantiles on training questions of the embedded model, which keeps attending to the picture.
THRESHOLDS = (0.05, 0.2, 0.5, 0.8, 0.9, 0.95)


def exit_layer(image: ImageReport, n_layers: int) -> int | None:
    """The first layer without visual tokens of an image, or None."""
    return next((i for i, n in enumerate(image.n_by_layer(n_layers)) if n == 0), None)


def columns_by_layer(report: Report | None, columns: list[int], n_layers: int) -> list[list[int]]:
    """Columns of every row by layer, without padding; `columns` are those of the whole prompts."""
    if report is None or not report.prefills:
        return [[n] * n_layers for n in columns]
    return report.row_layers(0, report.prefills[0].rows or columns)


class Exits:
    """Answers the same questions under one method after the other.

    Args:
        runner: model and processor; the FLOPs of the model have to be known.
        model_name: as the user typed it.
        task: gives the pictures.
        samples: the test questions.
        batch_size: questions at a time.
    """

    def __init__(self, runner: Runner, model_name: str, task: Task, samples: Sequence[Sample], batch_size: int = 32):
        self.runner, self.model_name, self.task, self.samples = runner, model_name, task, samples
        if runner.shape is None:
            raise RunError(f"the FLOPs of {model_name} are not known; type --model tiny-llava or another LLaVA")
        self.shape: Shape = runner.shape
        self.n_layers, self.size = self.shape.text.n_layers, batch_size

    def row(self, config: Config, **more: Any) -> dict[str, Any]:
        """One method on all questions; counts and FLOPs are means over questions, "as run" over batches."""
        right, before, after, exits, selector, ran = [], [], [], [], [], []
        for start in range(0, len(self.samples), self.size):
            part = self.samples[start : start + self.size]
            inputs = self.runner.prepare(self.task, part, [s.image_id for s in part])
            tokens, report, _ = self.runner.answer(inputs, config, [zlib.crc32(s.id.encode()) for s in part])
            texts = self.runner.processor.batch_decode(tokens, skip_special_tokens=True)
            right += [s.is_right(text) for text, s in zip(texts, part, strict=True)]
            columns = inputs["attention_mask"].sum(1).tolist()
            before += [self.shape.read(n).llm.flops for n in columns]
            layers = columns_by_layer(report, columns, self.n_layers)
            after += [self.shape.read(by_layer).llm.flops for by_layer in layers]
            images = report.encoded if report else []
            exits += [exit_layer(i, self.n_layers) for i in images] or [None] * len(part)
            selector += [i.selector.flops for i in images] or [0] * len(part)
            if report and report.ledger and report.ledger_unpruned:
                ran.append(report.ledger.llm.flops / report.ledger_unpruned.llm.flops)
        n, low_high = len(right), wilson(sum(right), len(right))
        early = sum(layer is not None and layer <= self.n_layers - self.n_layers // 4 for layer in exits)
        return {
            "model": self.model_name,
            "task": self.task.name,
            "split": getattr(self.task, "split", ""),
            "method": config.method,
            "keep_ratio": config.keep_ratio,
            "n_samples": n,
            "value": mean(right),
            "low": low_high[0],
            "high": low_high[1],
            "exit_layers": histogram(exits, self.n_layers),
            "gone_before_last_quarter": early / n,
            "llm_flops_before": mean(before),
            "llm_flops_after": mean(after),
            "selector_flops": mean(selector),
            "llm_flops_ratio_as_run": mean(ran) if ran else 1.0,
            "batch_size": self.size,
            **more,
            **conditions(self.runner.model),
        }

    def nearest_ratio(self, flops: float) -> float:
        """The ratio of visual tokens, kept from the first layer on, whose LLM FLOPs are nearest to these."""
        inputs = self.runner.prepare(self.task, self.samples[:1], [self.samples[0].image_id])
        columns = int(inputs["attention_mask"].sum())
        visual = int(self.runner.placeholders(inputs["input_ids"]).sum())
        costs = {k: self.shape.read(columns - visual + k).llm.flops for k in range(1, visual + 1)}
        return min(costs, key=lambda k: abs(costs[k] - flops)) / visual

    def rows(self, gate: Path, thresholds: Sequence[float], console: Console) -> list[dict[str, Any]]:
        """All rows; the first is that of the gates."""
        notes = read_gates(gate).notes
        found: list[dict[str, Any]] = []

        def add(config: Config, **more: Any) -> None:
            found.append(self.row(config, **more))
            console.print(line(found[-1]))

        add(Config(f"dyvte:gate={gate}"), fit=notes.get("fit"), fixed_layer=notes.get("fixed_layer"))
        ratio = self.nearest_ratio(found[0]["llm_flops_after"])
        found[0]["method"] = "dyvte"  # without the path of the file
        add(Config(NONE))
        for layer in range(1, self.n_layers):
            add(Config(f"visual_exit:layer={layer}"))
        for threshold in thresholds:
            add(Config(f"visual_exit:threshold={threshold:g}"))
        add(Config("blind"))
        for seed in range(RANDOM_SEEDS):
            add(Config(f"random:seed={seed}", ratio))
        add(Config("pool", ratio))
        return found


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    exits = " ".join(f"{layer}:{n}" for layer, n in row["exit_layers"].items() if n)
    return (
        f"{row['method']}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], LLM FLOPs x "
        f"{row['llm_flops_after'] / row['llm_flops_before']:.3f} (as run {row['llm_flops_ratio_as_run']:.3f}), "
        f"exits before layer {exits}"
    )


def main(
    gate: Annotated[Path, typer.Option(help="Made by tokprune fit-exit.")],
    out: Annotated[Path, typer.Option(help="Where to write the rows as JSONL.")],
    model: Annotated[str, typer.Option(help="The model that the gates were fitted to.")] = "tiny-llava",
    task: Annotated[str, typer.Option(help="findit, findit_hd, easyvqa, or a folder.")] = "findit",
    limit: Annotated[int | None, typer.Option(help="So many questions, for a quick look.")] = None,
    batch_size: int = 32,
) -> None:
    """Measure exits on the fixed 800 test questions that compare asks."""
    loaded = load_task(task)
    exits = Exits(Runner.load(model), model, loaded, chosen_samples(loaded, limit), batch_size)
    rows = exits.rows(gate, THRESHOLDS, Console(markup=False, width=160))
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
