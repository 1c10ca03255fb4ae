"""Measures one generation, pruned or not: the time of its phases, its cache and its memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from tokprune.integrations.transformers import attention_implementation, cache_of, family_of

import tokprune
from tokprune.core.clock import PARTS, Parts, listen, span
from tokprune.prune.report import Report

from ..run.rows import NONE, Config
from ..run.stopwatch import Memory, Stopwatch, now

VISION, PREFILL = "vision", "prefill"


@dataclass
class Cache:
    """The KV cache after the first pass: columns by decoder layer, and bytes of all keys and values."""

    columns: list[int] = field(default_factory=list)
    n_bytes: int = 0

    @classmethod
    def of(cls, cache: Any) -> Cache:
        """Read from its tensors."""
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return cls([layer.keys.shape[-2] for layer in cache.layers], sum(t.numel() * t.element_size() for t in tensors))


@dataclass
class Phases:
    """Seconds of one first pass, by phase.

    Args:
        first_s: to the first token.
        seconds: by phase and part of the selection: "vision", "prefill", and those of `tokprune.core.clock.PARTS`.
        counts: how often each ran.
    """

    first_s: float
    seconds: dict[str, float]
    counts: dict[str, int]

    @property
    def selection_s(self) -> float:
        """All parts of selecting tokens."""
        return sum(self.seconds.get(part, 0.0) for part in PARTS)

    @property
    def vision_s(self) -> float:
        """Vision tower, projector and packing."""
        return self.seconds.get(VISION, 0.0)

    @property
    def prefill_s(self) -> float:
        """Decoder layers and LM head."""
        return self.seconds.get(PREFILL, 0.0)

    @property
    def rest_s(self) -> float:
        """Everything else: the embeddings of the prompt, and what `generate` does around a pass."""
        return self.first_s - self.vision_s - self.selection_s - self.prefill_s


@dataclass
class Measured:
    """One generation.

    Args:
        ticks: seconds to the first token, the second, and so on.
        total_s: seconds of all of it.
        phases: of its first pass, or of another run if timing the phases would have slowed this one.
        cache: after the first pass.
        peak_bytes, above_bytes: as in `Memory`.
        n_new: number of generated tokens.
        attn: attention implementation of the language model while it ran.
        report: of the attachment; None for the unpruned model.
    """

    ticks: list[float]
    total_s: float
    phases: Phases
    cache: Cache
    peak_bytes: int | None
    above_bytes: int | None
    n_new: int
    attn: str
    report: Report | None

    @property
    def token_s(self) -> float | None:
        """Seconds for each token after the first; None if there is only one."""
        n = len(self.ticks) - 1
        return (self.ticks[-1] - self.ticks[0]) / n if n else None

    def until(self, n: int) -> float:
        """Seconds to the n-th token; for the last token, of the whole run."""
        return self.total_s if n == len(self.ticks) else self.ticks[n - 1]


def measured(model: Any, inputs: dict, config: Config, new_tokens: int) -> Measured:
    """Measure one configuration once.

    On a CPU the phases are timed in the run itself. On a GPU the start and end of a phase wait for the device, so
    phases are timed in another run, which stops at the first token.
    """
    if model.device.type == "cpu":
        return _once(model, inputs, config, new_tokens, phases=True)
    apart = _once(model, inputs, config, 1, phases=True)
    whole = _once(model, inputs, config, new_tokens, phases=False)
    whole.phases = apart.phases
    return whole


@torch.no_grad()
def _once(model: Any, inputs: dict, config: Config, new_tokens: int, phases: bool) -> Measured:
    seen: dict[str, Any] = {}
    with ExitStack() as stack:
        parts = stack.enter_context(listen(lambda: now(model.device))) if phases else Parts()
        if phases:
            _hear_vision(model, stack)
        attachment = None
        if config.method != NONE:
            budget = {} if config.keep_ratio is None else {"keep_ratio": config.keep_ratio}
            attachment = stack.enter_context(tokprune.attach(model, config.method, **budget))
        if phases:
            _hear_prefill(model, parts, stack)
        memory = stack.enter_context(Memory(model.device))
        watch = stack.enter_context(Stopwatch(model))

        def first_pass_ended(module, args, out) -> None:
            if not seen:  # after the first tick: this adds a few microseconds to the second token
                seen.update(cache=Cache.of(cache_of(out)), seconds=dict(parts.seconds), counts=dict(parts.counts))

        stack.callback(model.register_forward_hook(first_pass_ended).remove)
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        attn = attention_implementation(family_of(model).language_model)
        report = attachment.report if attachment else None
    first = Phases(watch.prefill_s, seen["seconds"], seen["counts"])
    n_new = out.shape[1] - inputs["input_ids"].shape[1]
    peaks = memory.peak_bytes, memory.above_bytes
    return Measured(watch.ticks, watch.total_s, first, seen["cache"], *peaks, n_new, attn, report)


def _hear_vision(model: Any, stack: ExitStack) -> None:
    """Time the model's own encoding, inside what an attachment wraps around it later."""
    family = family_of(model)
    for name in family.encode_functions:
        setattr(family.base, name, span(VISION)(getattr(family.base, name)))
        stack.callback(delattr, family.base, name)


def _hear_prefill(model: Any, parts: Parts, stack: ExitStack) -> None:
    """Time the decoder layers and the LM head; what an attachment does inside is subtracted."""
    for module in (family_of(model).language_model, model.get_output_embeddings()):
        begins = module.register_forward_pre_hook(lambda *ignored: parts.begin(PREFILL))
        ends = module.register_forward_hook(lambda *ignored: parts.end())
        stack.callback(begins.remove)
        stack.callback(ends.remove)
