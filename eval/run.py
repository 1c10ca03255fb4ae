"""Runs a model over samples under several configurations, batch by batch, one JSONL row a sample.

All configurations answer a batch before the next batch is prepared: pictures are processed once, and times
are compared on the same inputs minutes, not hours, apart.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokprune
from tokprune.errors import MissingSignalError, RunError

from .tasks import Sample, Task, normalise

NONE = "none"
SHUFFLED = "shuffled pictures"
EMBEDDED_MODEL = Path(__file__).parent / "models" / "tiny-llava"


@dataclass(frozen=True)
class Config:
    """What is compared: a method specification (or "none") with its budget, on the right or on other pictures."""

    method: str
    keep_ratio: float | None = None
    shuffled: bool = False

    @property
    def label(self) -> str:
        """A name unique within a run."""
        keep = "" if self.keep_ratio is None else f"@{self.keep_ratio:g}"
        return (SHUFFLED if self.shuffled else self.method) + keep


@dataclass
class SampleRow:
    """One answer. Columns are of the prompt row alone, without padding."""

    task: str
    config: str
    method: str
    keep_ratio: float | None
    sample: str
    kind: str
    expected: str
    answer: str
    right: bool  # the whole answer, and nothing after it
    words_right: bool  # it begins with the expected words
    stopped: bool  # the stop token came
    n_visual: int
    n_visual_kept: int
    llm_columns: int
    llm_columns_kept: int


@dataclass
class BatchTime:
    """Seconds from the call of generate to the first token, one batch of one configuration."""

    task: str
    config: str
    batch: int
    size: int
    prefill_s: float


@dataclass
class Runner:
    """A model with its processor, ready to answer.

    Args:
        model: any model that `tokprune.attach` takes.
        processor: its processor.
        max_new_tokens: where an answer is cut.
        suffix: added to every question, such as " Answer with a single word or phrase."
    """

    model: torch.nn.Module
    processor: Any
    max_new_tokens: int = 8
    suffix: str = ""
    times: list[BatchTime] = field(default_factory=list)

    @classmethod
    def load(cls, path: str, **options: Any) -> Runner:
        """From a local folder or a hub id, on the first GPU where there is one.

        Raises:
            RunError: it cannot be loaded.
        """
        gpu = torch.cuda.is_available()
        try:
            processor = AutoProcessor.from_pretrained(path)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto" if gpu else torch.float32)
        except Exception as error:  # whatever a broken or foreign checkpoint makes transformers raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RunError(
                f"cannot load {path!r}: {first} Type a local folder or a hub id of: {', '.join(tokprune.list_models())}"
            ) from error
        processor.tokenizer.padding_side = "left"
        return cls(model.eval().to("cuda" if gpu else "cpu"), processor, **options)

    def missing(self, configs: Sequence[Config]) -> dict[str, str]:
        """Configurations that this model cannot run, with the reason; nothing is run for it.

        Raises:
            TokPruneError: a reason that no other model would mend, such as an option that does not exist.
        """
        reasons = {}
        for config in configs:
            if config.method == NONE:
                continue
            budget = {} if config.keep_ratio is None else {"keep_ratio": config.keep_ratio}
            try:
                tokprune.attach(self.model, config.method, **budget).detach()
            except MissingSignalError as error:
                reasons[config.method] = str(error)
        return reasons

    def prompt(self, question: str) -> str:
        """The question in the processor's chat template, or in LLaVA 1.5's where there is none."""
        question += self.suffix
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return f"USER: <image>\n{question} ASSISTANT:"

    def prepare(self, task: Task, samples: Sequence[Sample], image_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """Left-padded inputs on the model's device."""
        images = [[task.image(i)] for i in image_ids]
        text = [self.prompt(s.question) for s in samples]
        inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def answer(self, inputs, config: Config, salts: Sequence[int]) -> tuple[torch.Tensor, Any, float]:
        """New tokens, the report (None for "none"), and the seconds to the first token."""
        budget = {} if config.keep_ratio is None else {"keep_ratio": config.keep_ratio}
        bare = config.method == NONE
        with nullcontext() if bare else tokprune.attach(self.model, config.method, **budget) as attachment:
            if attachment is not None:
                attachment.salts = list(salts)
            with _FirstToken(self.model) as first:
                out = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            report = None if attachment is None else attachment.report
        return out[:, inputs["input_ids"].shape[1] :], report, first.seconds

    def rows(self, task: Task, samples: Sequence[Sample], config: Config, inputs) -> tuple[list[SampleRow], float]:
        """One row a sample of a batch, and the seconds to the first token."""
        salts = [zlib.crc32(s.id.encode()) for s in samples]
        tokens, report, seconds = self.answer(inputs, config, salts)
        before = inputs["attention_mask"].sum(1).tolist()
        after = (report.prefills[0].rows if report else None) or before
        image_id = self.model.config.image_token_id
        n_visual = (inputs["input_ids"] == image_id).sum(1).tolist()
        n_kept = [i.n_kept + i.n_special for i in report.encoded] if report else n_visual
        stops = _stop_ids(self.model)
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [
            SampleRow(
                task=task.name,
                config=config.label,
                method=config.method,
                keep_ratio=config.keep_ratio,
                sample=s.id,
                kind=s.kind,
                expected=s.answer,
                answer=text.strip(),
                right=normalise(text) == normalise(s.answer),
                words_right=_begins_with(normalise(text), normalise(s.answer)),
                stopped=bool(set(row.tolist()) & stops),
                n_visual=n_visual[i],
                n_visual_kept=n_kept[i],
                llm_columns=before[i],
                llm_columns_kept=after[i],
            )
            for i, (s, text, row) in enumerate(zip(samples, texts, tokens, strict=True))
        ], seconds

    def run(
        self, task: Task, samples: Sequence[Sample], configs: Sequence[Config], batch_size: int = 32
    ) -> Iterator[tuple[Config, list[SampleRow]]]:
        """Rows of every configuration on every batch, as they come; times gather in `times`."""
        if samples and configs:  # the first run of anything is slow, and the first configuration should not pay for it
            part = samples[:batch_size]
            self.answer(self.prepare(task, part, [s.image_id for s in part]), Config(NONE), [0])
        others = dict(zip((s.id for s in samples), _other_pictures(samples), strict=True))
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            right = self.prepare(task, part, [s.image_id for s in part])
            shuffled = None
            if any(c.shuffled for c in configs):
                shuffled = self.prepare(task, part, [others[s.id] for s in part])
            turn = (start // batch_size) % len(configs)  # no configuration is always first
            for config in [*configs[turn:], *configs[:turn]]:
                rows, seconds = self.rows(task, part, config, shuffled if config.shuffled else right)
                self.times.append(BatchTime(task.name, config.label, start // batch_size, len(part), seconds))
                yield config, rows


class _FirstToken:
    """Seconds until the first forward pass of a model ended, within a `with` block."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.seconds = model, float("nan")

    def __enter__(self) -> _FirstToken:
        self.hook = self.model.register_forward_hook(self._forward_ended)
        _synchronise(self.model)
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()

    def _forward_ended(self, *ignored) -> None:
        if self.seconds != self.seconds:  # still NaN
            _synchronise(self.model)
            self.seconds = time.perf_counter() - self.started


def _synchronise(model: torch.nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _stop_ids(model: torch.nn.Module) -> set[int]:
    stop = model.generation_config.eos_token_id
    return set(stop) if isinstance(stop, list) else {stop}


def _begins_with(text: str, expected: str) -> bool:
    return text == expected or text.startswith(expected + " ")


def _other_pictures(samples: Sequence[Sample]) -> list[str]:
    """For every sample the picture of the sample half the list further on; a neighbour where it is the same."""
    ids = [s.image_id for s in samples]
    n = len(ids)
    others = []
    for i in range(n):
        steps = (ids[(i + n // 2 + k) % n] for k in range(n))
        others.append(next((other for other in steps if other != ids[i]), ids[i]))
    return others
