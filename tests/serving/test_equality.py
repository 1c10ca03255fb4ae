"""vLLM with the plug-in answers as transformers with `tokprune.attach`: tokens, log-probabilities, kept rows."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

N = 24
VTC = {"method": "vtc_cls", "keep_ratio": 0.25, "newlines": "keep"}
SETTINGS = [
    {},
    VTC,
    {"method": "vtc_cls", "keep_ratio": 0.11, "newlines": "drop"},
    {"method": "fopru", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "visionzip", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "random", "keep_tokens": 20, "newlines": "keep"},
    {"method": "divprune", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "hired", "flops_ratio": 0.5, "newlines": "keep"},
]
OF_NEXT = (0, 1, 2, 4)
WITHOUT_SIGNALS = [  # Qwen's
    {},
    {"method": "divprune", "keep_ratio": 0.25},
    {"method": "divprune", "keep_ratio": 0.1},
    {"method": "random", "keep_tokens": 6},
    {"method": "tome", "keep_ratio": 0.5},
]
CHUNKS = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "max_num_seqs": 8, "block_size": 32}
CLOSE = 2e-4


def engine(answers, model: str, setting: dict, **more) -> dict:
    options = {"mm_processor_kwargs": {"tokprune": setting}} if setting else {}
    return answers("engine.py", model, N, {**options, **more})


def reference(answers, model: str, setting: dict) -> list[dict]:
    settings = WITHOUT_SIGNALS if "qwen" in model else SETTINGS
    return answers("reference.py", model, N, settings)[settings.index(setting)]


def farthest(rows: list[dict], others: list[dict]) -> float:
    """The largest difference of log-probabilities of first tokens."""
    pairs = [
        (a["logprobs"][int(token)], value)
        for a, b in zip(rows, others, strict=True)
        for token, value in b["logprobs"].items()
    ]
    return max(abs(a - b) for a, b in pairs if b > -20)


def same(rows: list[dict], others: list[dict], field: str) -> int:
    """How many are equal, of those that are known on both sides."""
    pairs = [(a[field], b[field]) for a, b in zip(rows, others, strict=True)]
    return sum(a == b for a, b in pairs if b is not None)


@pytest.mark.parametrize(
    ("model", "setting"),
    [("tiny-llava", s) for s in SETTINGS]
    + [("tiny-llava-next", SETTINGS[i]) for i in OF_NEXT]
    + [("tiny-qwen", s) for s in WITHOUT_SIGNALS],
    ids=lambda value: value if isinstance(value, str) else value.get("method", "none"),
)
def test_answers_are_those_of_transformers(answers, model, setting):
    want, got = reference(answers, model, setting), engine(answers, model, setting)
    for rows in (got["singles"], got["together"]):
        assert same(want, rows, "ids") == N
        assert farthest(want, rows) < CLOSE
    if setting:
        n_new = sum(row["kept"] is not None for row in got["singles"])
        assert n_new > N / 3  # of other questions about a picture its features are cached
        assert same(want, got["singles"], "kept") == n_new
        whole = engine(answers, model, {})["singles"]
        assert all(row["prompt"] < other["prompt"] for row, other in zip(got["singles"], whole, strict=True))


@pytest.mark.parametrize(("model", "setting"), [("tiny-llava", VTC), ("tiny-qwen", WITHOUT_SIGNALS[1])])
def test_pictures_that_are_split_over_chunks_answer_alike(answers, model, setting):
    want, got = reference(answers, model, setting), engine(answers, model, setting, **CHUNKS)
    for rows in (got["singles"], got["together"]):
        assert same(want, rows, "ids") == N
        assert farthest(want, rows) < CLOSE


@pytest.mark.parametrize(
    ("model", "asked", "other"),
    [(model, SETTINGS[5], VTC) for model in ("tiny-llava", "tiny-llava-next")]
    + [("tiny-qwen", WITHOUT_SIGNALS[3], WITHOUT_SIGNALS[1])],
)
def test_another_method_is_seen_to_differ(answers, model, asked, other):
    """The comparison can fail: here are two methods, of which each answers as itself."""
    want, got = reference(answers, model, asked), engine(answers, model, other)
    assert same(want, got["singles"], "kept") == 0
    assert farthest(want, got["singles"]) > 100 * CLOSE
