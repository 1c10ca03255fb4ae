"""Benchmarks and models of published tables, as `tokprune reproduce` runs them through lmms-eval."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokprune.core.errors import RunError


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is run in lmms-eval.

    Args:
        name: as in published tables.
        metrics: whose sum is the score that is published.
        scale: from lmms-eval's value to the published one.
        documents: how many questions it has; 0 where it is not known.
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


@dataclass(frozen=True)
class Usual:
    """How published tables measure a model.

    Args:
        checkpoint: hub id.
        n_visual: visual tokens of a picture; where its size decides, those of a usual one.
        budgets: of the tables.
        tasks: of the tables, by their names in lmms-eval.
        prompts: options of a task's prompt that differ from lmms-eval's default. LLaVA-1.5's own script for TextVQA
            names the words that an OCR system read.
    """

    checkpoint: str
    n_visual: int
    budgets: tuple[str, ...]
    tasks: tuple[str, ...]
    prompts: dict[str, dict[str, bool]] = field(default_factory=dict)


USUAL = {
    "llava-1.5-7b": Usual(
        "llava-hf/llava-1.5-7b-hf",
        576,
        ("128", "64"),
        ("pope", "gqa", "textvqa_val", "mme"),
        {"textvqa_val": {"ocr": True}},
    ),
    "llava-next-7b": Usual("llava-hf/llava-v1.6-vicuna-7b-hf", 2880, ("320", "160"), ("pope", "gqa", "textvqa_val")),
    "qwen2.5-vl-7b": Usual("Qwen/Qwen2.5-VL-7B-Instruct", 1296, ("25%", "10%"), ("pope", "textvqa_val", "mme")),
}

_BUDGET = re.compile(r"(\d+|\d+\.\d+(?=%))(%?)")


def budgets(texts: Sequence[str]) -> tuple[list[float], list[int]]:
    """Fractions and numbers of visual tokens to keep, from texts such as "25%" and "64".

    Raises:
        RunError: a text is neither.
    """
    found = [_BUDGET.fullmatch(text) for text in texts]
    for text, match in zip(texts, found, strict=True):
        if match is None or not 0 < float(match[1]) <= (100 if match[2] else 10**9):
            raise RunError(
                f"invalid budget {text!r}: use numbers of tokens or percentages, as --budgets 128,64 or 25%,10%"
            )
    shares = [float(text[:-1]) / 100 for text in texts if text.endswith("%")]
    return shares, [int(text) for text in texts if not text.endswith("%")]
