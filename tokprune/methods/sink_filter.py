"""VAR's sink test as a filter: attention sinks rank high without showing anything useful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import OptionError
from ..core.lazy import torch
from ..core.signals import Kind, Signal
from ..core.tokens import Stage, VisualTokens
from .base import Filter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SinkFilter(Filter):
    """Drop visual attention sinks before a method between layers ranks the others: ["sink_filter", "fastv"].

    A token with hidden state x is a sink where max over the sink dimensions d of |x_d| / RMS(x) is above a threshold.
    The sink dimensions belong to the language model; they are measured: those in which the first token of the prompt,
    which always is a sink, is above the threshold itself. Where it is in none, as in small models, nothing is dropped.

    Source:   "See What You Are Told: Visual Attention Sink in Large Multimodal Models", VAR, ICLR 2025,
              arXiv 2503.03321 (its sink test).
    Faithful: to the test and its threshold.
    Differs:  the paper gives the attention of sinks to other tokens and drops none; as a filter this is ours. Its
              dimensions are a table (1415 and 2533 in Llama-2 7B, 2100 and 4743 in 13B).
    Needs:    LM_FIRST_STATE, unless `dims` are given. Text-agnostic. Cost: O(n D).

    Args:
        threshold: in multiples of the root mean square of a hidden state, above 0; the paper's is 20.
        dims: sink dimensions, separated by slashes, "1415/2533"; empty measures them.
    """

    threshold: float = 20.0
    dims: str = ""

    stage: ClassVar[Stage] = Stage.DECODER
    limits: ClassVar = {"threshold": (1e-6, 1e6)}
    source: ClassVar[str] = "VAR, ICLR 2025, arXiv 2503.03321 (its sink test)"

    def __post_init__(self):
        super().__post_init__()
        if self.dims and not all(d.isdecimal() and d.isascii() for d in self.dims.split("/")):
            raise OptionError(f"SinkFilter: dims={self.dims!r} are not dimensions; use dims=1415/2533, for instance")

    def reads(self, layer: int) -> frozenset[Signal]:
        """The state of the prompt's first token, where dimensions are measured."""
        return frozenset() if self.dims else frozenset({Signal(Kind.LM_FIRST_STATE)})

    def passes(self, tokens: VisualTokens) -> Tensor:
        """All but sinks, (G, n) bool."""
        return ~(self.sizes(tokens.features) > self.threshold).logical_and(self._is_sink_dim(tokens)[:, None]).any(2)

    @staticmethod
    def sizes(states: Tensor) -> Tensor:
        """|x_d| / RMS(x) of hidden states (..., D), float32."""
        x = states.float()
        return x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)

    def _is_sink_dim(self, tokens: VisualTokens) -> Tensor:
        """(G, D) or (1, D) bool."""
        if not self.dims:
            return self.sizes(tokens.signal(Kind.LM_FIRST_STATE)) > self.threshold
        width, wanted = tokens.features.shape[-1], {int(d) for d in self.dims.split("/")}
        if max(wanted) >= width:
            raise OptionError(f"SinkFilter: dims={self.dims}: this language model has dimensions 0 to {width - 1}")
        return torch.tensor([[d in wanted for d in range(width)]]).to(tokens.features.device, non_blocking=True)
