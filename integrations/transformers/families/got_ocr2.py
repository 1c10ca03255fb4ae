"""GOT-OCR 2 (model_type "got_ocr2"): SAM's tower, whose windows and relative positions hide its attention from us."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.lazy import nn
from tokprune.core.signals import Signal
from tokprune.cost.flops import Ops, Shape, Stack, Vision
from tokprune.cost.shapes import text_of

from .base import TowerKind
from .siglip import SiglipFamily
from .sizes import Sizes, pil_image_processor

STRIDE = 4  # patches along a side from a token to the next
WHY = "adds relative positions to its attention scores"
GLOBAL_EVERY = 3  # layers of SAM's base tower: two with windows, then one that sees the whole picture


@dataclass(frozen=True)
class SamVision(Vision):
    """SAM's tower, by crop.

    Args:
        window: patches along a side of a window; windows at the edges are filled up with zeros.
        relative: whether every query is also multiplied with a vector for each row and each column of its keys.
        neck: multiply-accumulates a patch of the convolutions behind the layers.
    """

    window: int = 0
    relative: bool = True
    neck: int = 0

    def crop(self, n_patches: int | None = None) -> Ops:
        """One crop, of `n_patches` patches if given."""
        n, stack = self.n_patches if n_patches is None else n_patches, self.stack
        side = round(n**0.5)
        n_padded = (-(-side // self.window) * self.window) ** 2 if stack.n_windowed else n
        windowed = stack.layer(n_padded, self._keys(self.window)).macs - (n_padded - n) * stack.mlp
        whole = stack.layer(n, self._keys(side)).macs
        layers = stack.n_windowed * windowed + (stack.n_layers - stack.n_windowed) * whole
        return Ops(layers + n * (self.patch_values * stack.width + self.neck))

    def signals(self, signals: Iterable[Signal], n_patches: int | None = None) -> Ops:
        """Nothing, of a method that reads nothing from the tower.

        Raises:
            UnsupportedModelError: a method that does.
        """
        if any(s.layers for s in signals):
            raise UnsupportedModelError(f"nothing is read from this vision tower, which {WHY}; use 'divprune'")
        return Ops()

    def _keys(self, side: int) -> int:
        """Keys of a query in a square, with half a product for each of its rows and columns."""
        return side * side + self.relative * side


class GotOcr2(SiglipFamily):
    """GotOcr2ForConditionalGeneration. A visual token is what strided convolutions see around every fourth patch."""

    model_type = "got_ocr2"
    # Releases before the newest ones give the tower's configuration no name.
    towers: ClassVar = {"got_ocr2_vision": TowerKind("SAM", False), "": TowerKind("SAM", False)}
    no_layer_cuts: ClassVar[str] = ""
    no_tower_signals: ClassVar[str] = WHY

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Windows, a neck of two convolutions, and a projector of two more and a linear layer."""
        vision, text = config.vision_config, text_of(config.text_config)
        n_layers, width, heads = vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads
        n_windowed = len(set(range(n_layers)) - set(vision.global_attn_indexes)) if vision.window_size else 0
        stack = Stack(n_layers, width, vision.mlp_dim, heads, heads, width // heads, gated=False, n_windowed=n_windowed)
        side, channels = vision.image_size // vision.patch_size, vision.output_channels
        tower = SamVision(
            stack,
            n_patches=side**2,
            n_special=0,
            patch_values=vision.num_channels * vision.patch_size**2,
            window=vision.window_size,
            relative=vision.use_rel_pos,
            neck=width * channels + 9 * channels**2,
        )
        # A convolution reads 3 x 3 states. Four states of the first one, of twice the channels, are one of the second.
        widths = (4 * channels, 9 * 2 * channels, text.width, text.width)
        n_rows = (-(-side // STRIDE)) ** 2
        return Shape(config.model_type, tower, widths, n_rows, n_rows, text, config.text_config.vocab_size)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        return self.base.vision_tower.layers

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """With SAM's pattern of windows."""
        stack = sizes.tower
        return {
            "hidden_size": stack.width,
            "mlp_dim": stack.mlp_width,
            "num_hidden_layers": stack.n_layers,
            "num_attention_heads": stack.n_heads,
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "global_attn_indexes": list(range(GLOBAL_EVERY - 1, stack.n_layers, GLOBAL_EVERY)),
            **sizes.tower_options,
        }

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """The placeholder, and an LM head of its own where the language model is told to have one."""
        tied = sizes.text_options.get("tie_word_embeddings", True)
        return {"image_token_index": sizes.image_id, "tie_word_embeddings": tied}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """GOT-OCR 2's, which cuts a picture into up to 12 crops where it is asked to."""
        side = config.vision_config.image_size
        return pil_image_processor("got_ocr2", "GotOcr2ImageProcessor")(size={"height": side, "width": side})
