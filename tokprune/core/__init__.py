"""The shared language. Read `layout`, `signals` and `tokens` first: where rows lie, what methods read, what travels.

`budget` and `schedules` say how many tokens stay, `ops` and `attention` are the tensor work, `registry` turns names
into objects, `files` reads and writes files of ours, `clock` times parts of a pass, `errors` is what we raise.
"""

from . import interrupts  # first: Ctrl-C while a command is still importing

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
