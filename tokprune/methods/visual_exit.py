"""Drop all visual tokens when they get little attention, or at a fixed layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import OptionError
from ..core.lazy import torch
from ..core.signals import Decoder, Kind, Signal
from ..core.tokens import VisualTokens
from .decoder import ExitMethod, checked_layer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisualExit(ExitMethod):
    """Exit before layer l when m = mean_h sum_{j visual} A[h, last prompt token, j] is low in the layers before l.

    The attention mass m of `patience` layers, l - patience to l - 1, has to be below `threshold`. With `layer` nothing
    is measured and all prompts exit there: what YOPO calls layer drop, and VTW's rule; rows are removed, not
    masked. `tokprune fit-exit` also prints the earliest layer from which a model needs no visual tokens. Text keeps its
    positions, and a prompt with no text after its last image keeps everything.

    Source:   the training-free counterpart of DyVTE (arXiv 2411.19628), by attention mass; the fixed layer as in YOPO
              (arXiv 2410.06169) and VTW.
    Faithful: nothing to be faithful to: the mass is this package's own rule, and a fixed layer is a fixed layer.
    Differs:  YOPO zeroes attention behind the softmax, here the softmax runs over what is left.
    Needs:    LM_MASS of `patience` layers; nothing with `layer`. Text-guided. Cost: O(H S d) a layer.

    Args:
        threshold: of the mass, 0 to 1; fit it to the model. 0 never exits.
        patience: how many layers in a row are below it.
        first: it never exits before this layer, absolute or negative from the end; None is a quarter of the depth.
        layer: a fixed layer to exit before, absolute or negative from the end, instead.
    """

    threshold: float = 0.05
    patience: int = 2
    first: int | None = None
    layer: int | None = None

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"threshold": (0, 1), "patience": (1, 1000)}
    source: ClassVar[str] = "training-free exit: attention mass; fixed layer as YOPO (arXiv 2410.06169) and VTW"

    def __post_init__(self):
        super().__post_init__()
        checked_layer(self.first, "first")
        checked_layer(self.layer, "layer")
        if self.layer is not None and self.first is not None:
            raise OptionError(
                f"VisualExit: layer={self.layer} is fixed, so first={self.first} has no effect; leave one out"
            )

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        """All layers from `first` on that have `patience` layers before them."""
        if self.layer is not None:
            return (decoder.layer(self.layer),)
        if self.patience >= decoder.n_layers:
            raise OptionError(
                f"patience={self.patience} is too large for a language model of {decoder.n_layers} layers; "
                f"use patience=1 to {decoder.n_layers - 1}"
            )
        first = -(-decoder.n_layers // 4) if self.first is None else decoder.layer(self.first)
        return tuple(range(max(first, self.patience), decoder.n_layers))

    def reads(self, layer: int) -> frozenset[Signal]:
        if self.layer is not None:
            return frozenset()
        return frozenset({Signal(Kind.LM_MASS, tuple(range(layer - self.patience, layer)))})

    def exits(self, tokens: VisualTokens) -> Tensor:
        if self.layer is not None:
            return torch.ones(len(tokens.features), dtype=torch.bool, device=tokens.features.device)
        return (tokens.signal(Kind.LM_MASS) < self.threshold).all(1)
