"""vLLM with the plug-in answers as transformers with `tokprune.attach`: tokens, log-probabilities, kept rows."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

N = 24
VTC = {"method": "vtc_cls", "keep_ratio": 0.25, "newlines": "keep"}
RANDOM = {"method": "random", "keep_tokens": 20, "newlines": "keep"}
DIVPRUNE = {"method": "divprune", "keep_ratio": 0.25}
FEWER = {"method": "random", "keep_tokens": 6}
OF_LLAVA = [
    {},
    VTC,
    {"method": "vtc_cls", "keep_ratio": 0.11, "newlines": "drop"},
    {"method": "fopru", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "visionzip", "keep_ratio": 0.25, "newlines": "keep"},
    RANDOM,
    {"method": "divprune", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "hired", "flops_ratio": 0.5, "newlines": "keep"},
]
OF_QWEN = [  # nothing is read from its tower
    {},
    DIVPRUNE,
    {"method": "divprune", "keep_ratio": 0.1},
    FEWER,
    *({"method": name, "keep_ratio": 0.25} for name in ("uniform", "globalcom2", "evs", "vidcom2")),
]
TOME = {"method": "tome", "keep_ratio": 0.5}
WITHOUT_CLS = [  # of a SigLIP tower
    {},
    {"method": "fopru", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "vtc_cls:without_cls=received", "keep_ratio": 0.25, "newlines": "drop"},
    {"method": "visionzip", "keep_ratio": 0.25, "newlines": "keep"},
    RANDOM,
    {"method": "divprune", "keep_ratio": 0.25, "newlines": "keep"},
    {"method": "fopru", "flops_ratio": 0.5, "newlines": "keep"},
]
OF_TILES = [  # of a tower with [CLS] whose projector takes several patches
    {},
    {"method": "fopru", "keep_ratio": 0.25},
    {"method": "vtc_cls", "keep_ratio": 0.11},
    {"method": "visionzip", "keep_ratio": 0.25},
    {"method": "vispruner", "keep_tokens": 12},
    FEWER,
    DIVPRUNE,
    {"method": "hired", "flops_ratio": 0.9},
]
OF_BLOCKS = [  # of towers without [CLS] whose projector takes several patches
    {},
    {"method": "fopru", "keep_ratio": 0.25},
    {"method": "vtc_cls:without_cls=received", "keep_ratio": 0.25},
    {"method": "visionzip", "keep_ratio": 0.11},
    FEWER,
    DIVPRUNE,
]
SETTINGS = {
    "tiny-llava": OF_LLAVA,
    "tiny-llava-next": [*OF_LLAVA[:3], OF_LLAVA[4], RANDOM],
    "tiny-qwen": [*OF_QWEN, TOME],
    "tiny-qwen:clips": OF_QWEN,
    "random-qwen3": [*OF_QWEN, TOME],
    "random-onevision": WITHOUT_CLS,
    "random-internvl": OF_TILES,
    "random-gemma3": [*OF_BLOCKS, {"method": "fopru", "flops_ratio": 0.8}],
    "random-mistral3": OF_BLOCKS,
}
CHUNKS = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "max_num_seqs": 8, "block_size": 32}
PARALLEL = {"tensor_parallel_size": 2}  # of models with an even number of heads
DIFFERENTLY = [
    ("tiny-llava", VTC, CHUNKS),
    ("tiny-qwen", DIVPRUNE, CHUNKS),
    ("tiny-qwen:clips", DIVPRUNE, CHUNKS),
    *((model, SETTINGS[model][1], CHUNKS) for model in SETTINGS if model.startswith("random-")),
    ("random-onevision", WITHOUT_CLS[1], PARALLEL),
    ("random-internvl", OF_TILES[2], PARALLEL),
    ("random-qwen3", DIVPRUNE, PARALLEL),
]
CLOSE = 2e-4


def engine(answers, model: str, setting: dict, more: dict | None = None) -> dict:
    """All engines of a model run in one process."""
    asked = [options_of(s) for s in SETTINGS[model]] + [options_of(s, m) for name, s, m in DIFFERENTLY if name == model]
    return answers("engine.py", model, N, asked)[asked.index(options_of(setting, more))]


def options_of(setting: dict, more: dict | None = None) -> dict:
    key = {"mm_processor_kwargs": {"tokprune": setting}} if setting else {}
    return key | (more or {})


def reference(answers, model: str, setting: dict) -> list[dict]:
    settings = SETTINGS[model]
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
    [(model, setting) for model, settings in SETTINGS.items() for setting in settings],
    ids=lambda value: value if isinstance(value, str) else value.get("method", "none"),
)
def test_answers_are_those_of_transformers(answers, note, model, setting):
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
    note(**figures(answers, model, setting))


def figures(answers, model, setting):
    """What the two sides have in common, for the documentation."""
    want, got = reference(answers, model, setting), engine(answers, model, setting)
    whole, singles = engine(answers, model, {})["singles"], got["singles"]
    known = [row for row in singles if row["kept"] is not None] if setting else []
    return {
        "model": model,
        "setting": {name: value for name, value in setting.items() if name != "newlines"},
        "questions": N,
        "same_singles": same(want, singles, "ids"),
        "same_together": same(want, got["together"], "ids"),
        "kept_known": len(known),
        "kept_same": same(want, singles, "kept") if setting else 0,
        "farthest": max(farthest(want, singles), farthest(want, got["together"])),
        "columns_before": sum(row["prompt"] for row in whole) / N,
        "columns": sum(row["prompt"] for row in singles) / N,
    }


@pytest.mark.parametrize(
    ("model", "setting", "more"), DIFFERENTLY, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_pictures_in_chunks_and_models_on_two_workers_answer_alike(answers, model, setting, more):
    want, got = reference(answers, model, setting), engine(answers, model, setting, more)
    for rows in (got["singles"], got["together"]):
        assert same(want, rows, "ids") == N
        assert farthest(want, rows) < CLOSE


@pytest.mark.parametrize("model", SETTINGS)
def test_another_method_is_seen_to_differ(answers, model):
    """The comparison can fail: here are two methods, of which each answers as itself."""
    asked = next(s for s in SETTINGS[model] if s.get("method") == "random")
    other = SETTINGS[model][1]
    want, got = reference(answers, model, asked), engine(answers, model, other)
    assert same(want, got["singles"], "kept") == 0
    assert farthest(want, got["singles"]) > 100 * CLOSE
