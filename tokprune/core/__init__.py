"""Shared types and helpers, independent of methods and model families.

Read `layout`, `signals` and `tokens` first: where tokens are in a picture, what methods read, what they return.
`budget` and `schedules` say how many tokens are kept, `ops` and `attention` are tensor functions, `registry` turns
names into objects, `files` writes files atomically, `clock` times parts of a pass, `errors` holds the exceptions.
"""

from . import interrupts  # first: it handles Ctrl-C during imports

# isort: split
from .budget import Budget
from .errors import TokPruneError
from .layout import Layout, grid_layout
from .signals import Decoder, Kind, Signal, Tower
from .tokens import Count, Stage, VisualTokens

__all__ = [
    "Budget",
    "Count",
    "Decoder",
    "Kind",
    "Layout",
    "Signal",
    "Stage",
    "TokPruneError",
    "Tower",
    "VisualTokens",
    "grid_layout",
    "interrupts",
]
