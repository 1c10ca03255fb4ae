"""A cell of a sweep: all configurations in turn at one resolution and batch size, and the rows of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokprune.core.clock import PARTS

from ..run.rows import Config, conditions
from ..stats import percentile
from . import shaped
from .break_even import Ranges, by_output_length, ratio
from .settings import Settings
from .timing import Measured, measured

PHASES = ("vision", "selection", "prefill", "rest")
Spread = list[float]  # p20, p50 and p80 in milliseconds
Interval = list[float]  # of a ratio to the unpruned model: low end, median, high end


@dataclass
class Row:
    """One configuration in one cell at one output length.

    Args:
        model: its name.
        weights: "random" or "real".
        n_layers, n_vision_layers: as built.
        n_visual, n_kept: visual tokens of a picture, and those that the last layer sees.
        n_mean: visual tokens, mean over the layers.
        columns: columns of the KV cache after the prompt, by decoder layer.
        new_tokens: the output length.
        vision_ms, selection_ms, prefill_ms, rest_ms: phases; they add up to the first token in every round.
        selection_parts_ms: medians of the parts of the selection.
        first_token_ms, total_ms: end to end.
        token_ms: each token after the first, mean of a run.
        first_token_ratio, token_ratio, total_ratio: to the unpruned model, paired by round.
        prefill_flops_ratio, token_flops_ratio, kv_bytes_ratio: predicted by the ledger.
        kv_bytes, kv_bytes_ledger: keys and values of the prompt, measured and predicted.
        peak_bytes, above_bytes: highest of all rounds; `above_bytes` were not in use before the run.
        gains, losses: ranges [first, last] of output lengths at which pruning saves or costs time, up to the longest
            measured; last is None where the range reaches the longest.
        first_s, token_s, total_s: every round.
    """

    model: str
    weights: str
    n_layers: int
    n_vision_layers: int
    method: str
    keep_ratio: float | None
    batch_size: int
    resolution: int
    n_visual: int
    n_kept: float
    n_mean: float
    n_text: int
    columns: list[int]
    new_tokens: int
    rounds: int
    warmup: int
    vision_ms: Spread
    selection_ms: Spread
    selection_parts_ms: dict[str, float]
    prefill_ms: Spread
    rest_ms: Spread
    first_token_ms: Spread
    token_ms: Spread | None
    total_ms: Spread
    first_token_ratio: Interval
    token_ratio: Interval | None
    total_ratio: Interval
    prefill_flops_ratio: float | None
    token_flops_ratio: float | None
    kv_bytes_ratio: float | None
    kv_bytes: int
    kv_bytes_ledger: int | None
    peak_bytes: int | None
    above_bytes: int | None
    gains: Ranges
    losses: Ranges
    first_s: list[float]
    token_s: list[float]
    total_s: list[float]
    device: str
    dtype: str
    attn_implementation: str
    torch: str
    transformers: str
    tokprune: str
    commit: str | None
    date: str
    picture: str = ""  # name and size of a picture of the user's own

    @property
    def config(self) -> Config:
        """Method and ratio."""
        return Config(self.method, self.keep_ratio)

    @property
    def name(self) -> str:
        """Method and ratio as text."""
        return self.method + ("" if self.keep_ratio is None else f" {self.keep_ratio:g}")


@dataclass
class Subject:
    """A model at one resolution.

    Args:
        config: the model's configuration.
        side: width and height of the picture in pixels.
        image_processor: cuts the picture.
        n_placeholders: rows of the picture in the language model, newlines included.
        model: None until it is built.
    """

    config: Any
    side: int
    image_processor: Any
    n_placeholders: int
    model: Any = None


def _depth(vision: Any) -> int:
    """Layers of a vision tower; Qwen calls them its depth."""
    return vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers


@dataclass
class Cell:
    """All configurations on one batch.

    Args:
        settings: of the sweep.
        subject: the model at a resolution.
        batch_size: prompts at a time.
        configs: the unpruned model first.
        rounds: what was measured so far, in whole rounds.
    """

    settings: Settings
    subject: Subject
    batch_size: int
    configs: list[Config]
    rounds: list[dict[Config, Measured]] = field(default_factory=list)

    def measure(self, advance: Callable[[], None] = lambda: None) -> None:
        """Run all rounds, each beginning with another configuration; warm-up rounds are not kept."""
        s, model, inputs = self.settings, self.subject.model, self.inputs()
        for i in range(s.warmup + s.rounds):
            found = {}
            for config in self.order(i):
                found[config] = measured(model, inputs, config, max(s.new_tokens))
                advance()
            self.rounds += [found] if i >= s.warmup else []

    def order(self, number: int) -> list[Config]:
        """Of the configurations in a round."""
        turn = number % len(self.configs)
        return [*self.configs[turn:], *self.configs[:turn]]

    def inputs(self) -> dict[str, torch.Tensor]:
        """The batch on the model's device."""
        subject, model = self.subject, self.subject.model
        images = shaped.pictures(subject.side, self.batch_size, self.settings.picture)
        pixels = shaped.encoded(subject.image_processor, images)
        made = shaped.prompt(model.config, subject.n_placeholders, self.settings.n_text, pixels, self.batch_size)
        made["pixel_values"] = made["pixel_values"].to(model.dtype)
        return {name: value.to(model.device) for name, value in made.items()}

    def rows(self) -> list[Row]:
        """One per configuration and output length; none before the first round is complete."""
        lengths = sorted(set(self.settings.new_tokens)) if self.rounds else []
        seen = conditions(self.subject.model) if lengths else {}
        return [self._row(config, n, seen) for config in self.configs for n in lengths]

    def _row(self, config: Config, n_new: int, seen: dict[str, Any]) -> Row:
        runs, bare = ([r[c] for r in self.rounds] for c in (config, self.configs[0]))
        s, model_config = self.settings, self.subject.config
        fixed = ("device", "dtype", "torch", "transformers", "tokprune", "commit", "date")
        last = runs[-1]
        return Row(
            model=s.shape or s.model,
            weights="random" if s.shape else "real",
            n_layers=model_config.text_config.num_hidden_layers,
            n_vision_layers=_depth(model_config.vision_config),
            method=config.method,
            keep_ratio=config.keep_ratio,
            batch_size=self.batch_size,
            resolution=self.subject.side,
            picture=_size(s.picture),
            n_text=s.n_text,
            columns=last.cache.columns,
            new_tokens=n_new,
            rounds=len(runs),
            warmup=s.warmup,
            **_phases(runs),
            **_compared(runs, bare, n_new),
            **self._predicted(last, n_new),
            kv_bytes=last.cache.n_bytes,
            peak_bytes=_highest([m.peak_bytes for m in runs]),
            above_bytes=_highest([m.above_bytes for m in runs]),
            attn_implementation=last.attn,
            **{name: seen[name] for name in fixed},
        )

    def _predicted(self, run: Measured, n_new: int) -> dict[str, Any]:
        """Counts and predictions of the report; for the unpruned model, from the report of another configuration."""
        report = run.report or next(m.report for m in self.rounds[-1].values() if m.report)
        image = report.images[0]
        bare = run.report is None
        found: dict[str, Any] = dict.fromkeys(
            ("prefill_flops_ratio", "token_flops_ratio", "kv_bytes_ratio", "kv_bytes_ledger")
        )
        found["n_visual"] = image.n_visual
        found["n_kept"] = image.n_visual if bare else sum(i.n_kept for i in report.images) / len(report.images)
        n_mean = sum(map(report.n_mean, report.images)) / len(report.images)
        found["n_mean"] = image.n_visual if bare else n_mean
        before, after, shape = report.ledger_unpruned, report.ledger, report.shape
        if before is None or after is None or shape is None:
            return found
        after = before if bare else after
        whole = [report.n_prompt] * report.n_layers
        columns = whole if bare else report.layers
        steps = [
            sum(shape.decode([c + i for c in cached]).flops for i in range(n_new - 1)) for cached in (columns, whole)
        ]
        return found | {
            "prefill_flops_ratio": after.prefill.flops / before.prefill.flops,
            "token_flops_ratio": steps[0] / steps[1] if n_new > 1 else None,
            "kv_bytes_ratio": after.kv_bytes / before.kv_bytes,
            "kv_bytes_ledger": after.kv_bytes,
        }


def _phases(runs: Sequence[Measured]) -> dict[str, Any]:
    """Columns for the time to the first token, by phase."""
    parts = {p: [m.phases.seconds.get(p, 0.0) for m in runs] for p in PARTS}
    return {
        **{f"{p}_ms": spread([getattr(m.phases, f"{p}_s") for m in runs]) for p in PHASES},
        "selection_parts_ms": {p: 1000 * median(v) for p, v in parts.items() if any(v)},
    }


def _compared(runs: Sequence[Measured], bare: Sequence[Measured], n_new: int) -> dict[str, Any]:
    """Columns for the time end to end, and relative to the unpruned model."""
    longest = len(runs[0].ticks)
    firsts, tokens, totals = (
        [[value(m) for m in each] for each in (runs, bare)]
        for value in (lambda m: m.ticks[0], lambda m: m.token_s or 0.0, lambda m: m.until(n_new))
    )
    more = list(zip(*([p - b for p, b in zip(*each, strict=True)] for each in (firsts, tokens)), strict=True))
    return {
        "first_token_ms": spread(firsts[0]),
        "token_ms": spread(tokens[0]) if longest > 1 else None,
        "total_ms": spread(totals[0]),
        "first_token_ratio": ratio(*firsts),
        "token_ratio": ratio(*tokens) if longest > 1 else None,
        "total_ratio": ratio(*totals),
        **by_output_length(more, longest),
        "first_s": firsts[0],
        "token_s": tokens[0] if longest > 1 else [],
        "total_s": totals[0],
    }


def _size(picture: Path | None) -> str:
    """Name and size of a picture: "page.png, 756 x 1008 pixels"."""
    if picture is None:
        return ""
    width, height = shaped.pictures(0, 1, picture)[0].size
    return f"{picture.name}, {width} x {height} pixels"


def spread(seconds: Sequence[float]) -> Spread:
    """Percentiles in milliseconds."""
    ordered = sorted(1000 * s for s in seconds)
    return [percentile(ordered, 0.2), median(ordered), percentile(ordered, 0.8)]


def _highest(values: Sequence[int | None]) -> int | None:
    known = [v for v in values if v is not None]
    return max(known) if known else None
