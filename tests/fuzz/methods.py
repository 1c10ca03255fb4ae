"""Draws methods with options, and says what each promises. What runs where is written down here, not asked."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from random import Random

import tiny
import torch

import tokprune
from tokprune.core.schedules import ScheduleFile, write_schedule
from tokprune.methods import METHODS
from tokprune.methods.gates import Gates, write_gates

CLS_KINDS = ("clip", "llava_next", "internvl")  # towers with a [CLS] token
N_TOWER, N_DECODER = 4, 5
TOWER = (-4, -3, -2, -1, 0, 1, 2, 3)
FILTERS, CUT_FILTERS = ("damro_filter",), ("sink_filter",)
CUTTING = ("dart", "dyvte", "fastv", "pyramiddrop", "schedule", "sparsevlm", "visual_exit")
BEFORE_THE_TOWER = ("pixelprune",)  # of Qwen-VL, which is not drawn
# Everything else that is registered acts before the language model.
FILTERABLE = ("evs", "fopru", "vidcom2", "vtc_cls", "random", "hired", "globalcom2")
# And sparsevlm unless recycle=false.
MERGING = ("fastvid", "framefusion", "pool", "prumerge", "prumerge_plus", "tome", "visionzip")
LATE = ("cdpruner", "mmtok")  # reads the text, so it selects when the language model runs; so does split=query
NEEDS_CLS = ("damro_filter", "fastervlm", "hired", "prumerge", "prumerge_plus", "tokencorr", "vispruner", "vtc_cls")


def names() -> list[str]:
    """Methods before the language model."""
    return [n for n in METHODS.own_names() if n not in (*CUTTING, *FILTERS, *CUT_FILTERS, *BEFORE_THE_TOWER)]


def sometimes(random: Random, chance: float = 0.35) -> bool:
    return random.random() < chance


BOOL, SPLIT, TEXT = ("true", "false"), ("joint", "even"), ("after", "all")
RANK_SPLIT = (*SPLIT, "query")
SCHEDULES = (
    "single/1 single/4 pyramid/1/3 pyramid/2/3/4 pyramid/1/2/3/4 cosine cosine/0.4/0.9 sigmoid/0.5/2 sigmoid/2/2 "
    "sigmoid/1 layers/1x9/3x4 layers/2x20 layers/2x0.5/4x0.2 layers/3x0 layers/1x1 layers/1x30/2x12/4x0"
).split()

# Every option of every method: the texts that are drawn for it.
OPTIONS: dict[str, dict[str, tuple]] = {
    "blind": {},
    "cdpruner": {"split": SPLIT, "invert": BOOL},
    "damro_filter": {"n_outliers": (0, 1, 3, 50), "layer": TOWER, "without_cls": ()},
    "dart": {
        "schedule": SCHEDULES,
        "uniform": (),
        "pivots": (1, 2, 9),
        "text_pivots": (0, 1, 9),
        "text": TEXT,
        "faithful": BOOL,
    },
    "divprune": {"split": SPLIT},
    "dycoke": {"k": ("none", 0, 0.5, 0.7, 1), "faithful": BOOL},
    "dyvte": {"gate": ()},
    "evs": {"split": RANK_SPLIT},
    "fastervlm": {"start_layer": (), "split": (), "without_cls": ()},
    "fastv": {"schedule": SCHEDULES, "uniform": (0, 0.25, 0.5, 1), "layer": (1, 2, 3, 4, -1, -2, -4)},
    "fastvid": {
        "rule": ("exact", "llava_onevision", "llava_video", "qwen2_5_vl"),
        "segments": (1, 2, 9),
        "tau": (-1, 0.5, 1),
        "contextual": (0, 0.3, 1),
        "every": (1, 2, 5),
        "beta": (0, 0.6, 1),
        "ignore": (0, 0.9),
        "layer": TOWER,
        "ratio": (),
    },
    "fopru": {
        "split": RANK_SPLIT,
        "strategy": ("rank", "row"),
        "form": ("softmax", "logits"),
        "gate": ("variance", "received"),
        "layer": TOWER,
    },
    "framefusion": {"similarity": (-1, 0.3, 0.9), "layer": TOWER, "faithful": BOOL},
    "globalcom2": {
        "form": ("softmax", "logits"),
        "layer": TOWER,
        "temperature": (0.1, 1, 10, 100),
        "alpha": (0, 0.3, 1),
        "allocate": ("richness", "even"),
        "renormalise": BOOL,
        "faithful": BOOL,
        "ratio": (),
    },
    "hiprune": {
        "alpha": (0, 0.1, 0.5, 1),
        "variant": ("authors", "angelslim"),
        "layer": (0, 1, -4, -3),
        "late": (1, 2, 3, -2, -1),
        "split": SPLIT,
        "faithful": BOOL,
    },
    "hired": {
        "alpha": (0, 0.2, 1),
        "budget_layer": (0, 1),
        "layer": (1, 2, 3, -1),
        "faithful": BOOL,
        "without_cls": (),
    },
    "holov": {
        "stripes": (1, 3, 16, 1000),
        "power": (0, 0.5, 1, 2),
        "layer": TOWER,
        "faithful": BOOL,
    },
    "mmtok": {
        "alpha": (0.2, 0.5, 2),
        "text_temperature": (0.01, 0.02, 1),
        "vision_temperature": (0.1, 0.2, 1),
        "split": SPLIT,
    },
    "pixelprune": {"tau": (), "anchored": ()},
    "pool": {},
    "prumerge": {"adaptive": BOOL, "layer": TOWER, "without_cls": ()},
    "prumerge_plus": {
        "adaptive": BOOL,
        "n_top": (1, 5, 30),
        "step": (1, 4, 50),
        "layer": TOWER,
        "without_cls": (),
    },
    "pyramiddrop": {"schedule": SCHEDULES, "uniform": (0, 0.25, 1)},
    "random": {"split": RANK_SPLIT, "seed": (0, 1, -5, 12345)},
    "schedule": {"schedule": (), "uniform": (), "file": ()},
    "scope": {
        "alpha": (0.5, 1, 3),  # with 0, two tokens that cover each other tie but for rounding
        "combine": ("multiply", "add"),
        "layer": TOWER,
        "split": SPLIT,
    },
    "sink_filter": {"threshold": (0.5, 2, 20), "dims": ("3", "0/5")},
    "sparsevlm": {"schedule": SCHEDULES, "uniform": (0, 0.25), "recycle": BOOL, "faithful": BOOL},
    "tokencorr": {
        "similar": (-1, 0.5, 0.99),
        "repeats": (0, 0.5, 1),
        "sample": ("seeded", "top"),
        "seed": (0, 7),
        "early": (0, 1),
        "late": (1, 2, 3),
        "thumbnail": BOOL,
        "without_cls": (),
    },
    "tome": {},
    "uniform": {"split": SPLIT},
    "vidcom2": {"faithful": BOOL, "ratio": ()},
    "visionzip": {"contextual": (0, 1, 3, 100), "layer": TOWER},
    "vispruner": {
        "important": (0, 0.3, 0.5, 1),
        "variant": ("authors", "angelslim"),
        "layer": TOWER,
        "split": SPLIT,
        "without_cls": (),
    },
    "visual_exit": {
        "threshold": (0, 0.3, 0.7, 0.95, 1),
        "patience": (1, 2, 4),
        "first": (1, 3, -1),
        "layer": (1, 3, -1),
    },
    "vtc_cls": {"split": RANK_SPLIT, "start_layer": (0, 1, 2, -2, -3, -4), "without_cls": ()},
}


def with_options(random: Random, name: str, kind: str) -> str:
    """A specification with options that exist together."""
    drawn = {key: random.choice(values) for key, values in OPTIONS[name].items() if values and sometimes(random)}
    if name == "fopru" and drawn.get("strategy") == "row":
        drawn.pop("split", None)
    if name == "fastv" and "schedule" in drawn:
        drawn.pop("layer", None)
    if name == "sparsevlm" and drawn.get("recycle") == "false":
        drawn.pop("faithful", None)
    if name == "visual_exit" and "layer" in drawn:
        drawn = {"layer": drawn["layer"]}
    if name == "prumerge_plus" and drawn.get("adaptive") == "false":
        drawn = {key: drawn[key] for key in drawn if key not in ("n_top", "step")}
    if name in NEEDS_CLS and kind not in CLS_KINDS:
        drawn["without_cls"] = "received"
    if name == "dycoke" and drawn.get("k") == "none":
        drawn.pop("faithful", None)
    if name in ("dyvte", "schedule"):
        drawn = {OPTIONS_OF_FILES[name]: file_of(name, kind, random.randrange(4))}
    return ":".join([name, *(f"{key}={value}" for key, value in drawn.items())])


OPTIONS_OF_FILES = {"dyvte": "gate", "schedule": "file"}
FOUND = (
    ("fastv", {1: 0.5, 3: 0.2}),
    ("pyramiddrop", {2: 0.3, 4: 0.0}),
    ("dart", {1: 0.9, 2: 0.4, 4: 0.1}),
    ("sparsevlm:recycle=false", {3: 0.25}),
)


@functools.cache
def file_of(name: str, kind: str, number: int) -> str:
    """A schedule or gate file for the language model of a kind; the same whenever it is asked for."""
    with tokprune.attach(tiny.model(kind), "visual_exit:layer=1") as attachment:
        decoder = attachment._family.decoder
    path = Path(tempfile.gettempdir()) / f"tokprune-fuzz-{tiny.VOCAB}" / f"{kind}-{name}-{number}"
    path.parent.mkdir(exist_ok=True)
    if name == "schedule":
        score, layers = FOUND[number]
        write_schedule(path, ScheduleFile(score, layers, decoder.n_layers, decoder.fingerprint))
    else:
        generator = torch.Generator().manual_seed(number)
        layers = [layer for layer in range(N_DECODER - 1) if (number + 1) >> layer & 1 or layer == number]
        gates = {i: (torch.randn(3, 128, generator=generator), torch.randn(2, 3, generator=generator)) for i in layers}
        write_gates(path, Gates(decoder, gates))
    return str(path)


def draw_method(random: Random, kind: str) -> str:
    """A specification: one method, a filter before it, or a method of either stage."""
    stage = random.choices(("before", "between", "both"), (55, 30, 15))[0]
    parts = []
    if stage != "between":
        name = random.choice(names())
        if name in FILTERABLE and sometimes(random, 0.15):
            parts.append(with_options(random, "damro_filter", kind))
        part = with_options(random, name, kind)
        if "strategy=row" in part or "faithful=true" in part:
            parts.clear()
        parts.append(part)
    if stage != "before":
        part = with_options(random, random.choice(CUTTING), kind)
        if part.split(":")[0] in ("fastv", "pyramiddrop") and sometimes(random, 0.15):
            parts.append(with_options(random, "sink_filter", kind))
        parts.append(part)
    return "+".join(parts)


def parts_of(spec: str) -> tuple[str | None, str | None]:
    """The method before the language model and the one between its layers, filters left out."""
    parts = [p for p in spec.split("+") if p.split(":")[0] not in (*FILTERS, *CUT_FILTERS)]
    before = [p for p in parts if p.split(":")[0] not in CUTTING]
    between = [p for p in parts if p.split(":")[0] in CUTTING]
    return (before or [None])[0], (between or [None])[0]


def options_of(part: str) -> dict[str, str]:
    return dict(p.split("=", 1) for p in part.split(":")[1:])


def takes_budget(part: str | None) -> bool:
    """As the README has it: exits, blind, adaptive merges, counts of one's own and files decide by themselves."""
    if part is None:
        return False
    name, options = part.split(":")[0], options_of(part)
    if name in ("prumerge", "prumerge_plus"):
        return options.get("adaptive") == "false"
    if options.get("schedule", "").startswith("layers/"):
        return False
    if name == "dycoke":
        return options.get("k") == "none"
    return name not in ("blind", "tokencorr", "dyvte", "visual_exit", "schedule")


def promises(part: str) -> str:
    """ "exact", "at most" or "content": what is promised about the number that a budget leaves."""
    name, options = part.split(":")[0], options_of(part)
    if name in ("dyvte", "visual_exit", "tokencorr") or (name.startswith("prumerge") and not takes_budget(part)):
        return "content"
    if name == "fastvid" and options.get("rule", "exact") != "exact":
        return "content"
    if name == "pool" or options.get("strategy") == "row":
        return "at most"
    if name == "dycoke" and not takes_budget(part):
        return "content"
    of_the_code = name in ("framefusion", "globalcom2", "hired", "holov", "sparsevlm", "dart", "vidcom2")
    if of_the_code and options.get("faithful") == "true":
        return "content"
    return "exact"


def keeps_features(spec: str) -> bool:
    """Whether kept tokens stay as they are, so that indices tell everything."""
    before, between = parts_of(spec)
    if before and before.split(":")[0] in MERGING:
        return False
    if before and before.startswith(("dycoke", "globalcom2", "holov")) and "faithful=true" in before:
        return False  # faithfully, these put tokens in another order
    return not (between and between.split(":")[0] == "sparsevlm" and options_of(between).get("recycle") != "false")


def needs_whole_prompt(spec: str, kind: str) -> bool:
    """Whether tokens are selected when the prompt is known, so that it has to come in one pass."""
    before, between = parts_of(spec)
    late = before is not None and (before.split(":")[0] in LATE or options_of(before).get("split") == "query")
    return between is not None or kind == "internvl" or late


def registered_options() -> dict[str, set[str]]:
    """What the registry has, for the test that nothing is left out here."""
    from dataclasses import fields

    return {name: {f.name for f in fields(METHODS.build(name)) if f.init} for name in METHODS.own_names()}
