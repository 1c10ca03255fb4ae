"""The embedded models, and what each of them is compared on where nothing else is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTROLS = ("none", "blind", "downsample", "uniform", "pool", "random")
PRE_LLM = (
    "globalcom2",
    "globalcom2:allocate=even",
    "vtc_cls",
    "fastervlm",
    "fopru",
    "hired",
    "visionzip",
    "prumerge:adaptive=false",
    "prumerge_plus:adaptive=false",
    "divprune",
    "cdpruner",
    "tome",
    "damro_filter+vtc_cls",
    "prumerge",
    "prumerge_plus",
    "tokencorr",
    "scope",
    "vispruner",
    "hiprune",
    "holov",
    "mmtok",
)
OF_VIDEOS = ("evs", "vidcom2", "fastvid", "dycoke:k=none", "framefusion")


@dataclass(frozen=True)
class Embedded:
    """A model that ships: its tasks, and the methods and ratios of its table."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: tuple[float, ...]


EMBEDDED = {
    "tiny-llava": Embedded(
        ("easyvqa", "findit"), ("none", "blind", "vtc_cls", "fopru", "uniform", "pool", "random"), (0.5, 0.25, 0.11)
    ),
    "tiny-llava-next": Embedded(
        ("findit_hd",),
        (*CONTROLS[:3], *PRE_LLM, *CONTROLS[3:], "random:split=even", "uniform:split=even"),
        (0.5, 0.25, 0.1),
    ),
    "tiny-qwen": Embedded(
        ("findit", "watchit"),
        (
            *CONTROLS[:3],
            *("frames", "fopru", "vtc_cls:without_cls=received", "divprune", "scope", *OF_VIDEOS),
            *CONTROLS[3:],
        ),
        (0.5, 0.25, 0.1),
    ),
}
DEFAULT = "tiny-llava"


def path_of(model: str) -> str:
    """The folder of an embedded model; anything else as it is."""
    return str(Path(__file__).parent / model) if model in EMBEDDED else model
