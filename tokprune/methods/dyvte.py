"""DyVTE: fitted gates say after which decoder layer the text has seen enough of the picture."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.signals import Decoder, Kind, Signal
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .decoder import ExitMethod
from .gates import HOW, Gates, gate_features, read_gates, write_gates

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DyVTE(ExitMethod):
    """Drop all visual tokens after the first layer l whose gate says so: logit_exit > logit_keep.

    A gate is Linear(2D to H), GELU, Linear(H to 2) without biases, on [mean of the text's states after the last image,
    the last token left out; state of the last prompt token] at the output of layer l. Text keeps its positions; layers
    up to l keep what they cached. `tokprune fit-exit` fits gates to a model; a prompt with no text after its last
    image keeps everything.

    Source:   "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit", DyVTE, NeurIPS 2025,
              arXiv 2411.19628.
    Faithful: gate, features and decision follow the paper; nobody published gates to compare with.
    Differs:  every prompt of a batch by itself, any number of images; the mean over one token alone is that token.
              Gates are only for layers that have a layer behind them.
    Needs:    LM_TEXT_STATES at every gate. Text-guided. Cost: O(D H) a gate and image.

    Args:
        gate: a gate file.
    """

    gate: str = ""

    needs_file: ClassVar[str] = "gate"
    source: ClassVar[str] = "DyVTE, NeurIPS 2025, arXiv 2411.19628"

    @functools.cached_property
    def gates(self) -> Gates:
        """Read once, when first used; OptionError if the file is missing or broken."""
        if not self.gate:
            raise OptionError(f"dyvte needs a gate file, as dyvte:gate=gate.safetensors; {HOW}")
        return read_gates(self.gate)

    def check(self, decoder: Decoder) -> None:
        """Raise OptionError if the gates were fitted to another language model."""
        fitted = self.gates.decoder
        if fitted != decoder:
            raise OptionError(
                f"gate={self.gate!r} was fitted to a language model of {fitted.n_layers} layers of width "
                f"{fitted.width} ({fitted.fingerprint}), this one has {decoder.n_layers} of width {decoder.width} "
                f"({decoder.fingerprint}); {HOW}"
            )

    def write_file(self, path: Path) -> None:
        write_gates(path, self.gates)

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.gates.layers)

    def reads(self, layer: int) -> frozenset[Signal]:
        return frozenset({Signal(Kind.LM_TEXT_STATES, (layer,), text="last")})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        return Ops((2 * widths.rows + 2) * self.gates.hidden)

    def exits(self, tokens: VisualTokens) -> Tensor:
        (signal,) = (s for s in tokens.signals if s.kind is Kind.LM_TEXT_STATES)
        keep, leave = self.gates.logits(signal.layers[0] - 1, gate_features(tokens.signals[signal])).unbind(1)
        return leave > keep
