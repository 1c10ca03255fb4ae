"""Ovis2 (model_type "ovis2"): patches are folded and become a mixture of visual words, the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tokprune.core.lazy import nn
from tokprune.cost.flops import Shape, Stack, Vision
from tokprune.cost.shapes import text_of

from .base import TowerKind
from .siglip import SiglipFamily
from .sizes import Sizes, pil_image_processor


class Ovis2(SiglipFamily):
    """Ovis2ForConditionalGeneration. The tokens around a picture that say how it is cut are text and stay.

    The features are embeddings that are mixed after a softmax, so methods that merge tokens merge these.
    """

    model_type = "ovis2"
    # Releases before the newest ones give the tower's configuration no name.
    towers: ClassVar = {"ovis2_vision": TowerKind("Ovis2-ViT", False), "": TowerKind("Ovis2-ViT", False)}
    no_layer_cuts: ClassVar[str] = ""

    @classmethod
    def block_of(cls, config: Any) -> int:
        """Patches folded along a side."""
        return config.vision_config.hidden_stride

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Folded patches to visual words, and words to rows."""
        vision, text = config.vision_config, text_of(config.text_config)
        width, heads, folds = vision.hidden_size, vision.num_attention_heads, vision.hidden_stride**2
        layers = vision.num_hidden_layers
        stack = Stack(layers, width, vision.intermediate_size, heads, heads, width // heads, gated=True)
        n_patches = (vision.image_size // vision.patch_size) ** 2
        tower = Vision(stack, n_patches, 0, vision.num_channels * vision.patch_size**2)
        widths = (width * folds, vision.vocab_size, text.width)
        n_rows = n_patches // folds
        return Shape(config.model_type, tower, widths, n_rows, n_rows, text, config.text_config.vocab_size)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        return self.base.vision_tower.transformer.encoder.layers

    def attention_module(self, layer: int) -> nn.Module:
        """Self-attention of a layer."""
        return self.vision_layers[layer].attention

    @property
    def projector(self) -> nn.Module:
        """From states to visual words."""
        return self.base.vision_tower.head_linear

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token; a vocabulary of visual words."""
        stack = sizes.tower
        return {
            "hidden_size": stack.width,
            "intermediate_size": stack.mlp_width,
            "num_hidden_layers": stack.n_layers,
            "num_attention_heads": stack.n_heads,
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "hidden_stride": 2,
            **sizes.tower_options,
        }

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """The placeholder, and the tokens around a picture, which are shown by the last visual words."""
        around = list(range(sizes.image_id - 5, sizes.image_id))
        tied = sizes.text_options.get("tie_word_embeddings", True)
        found = {"image_token_id": sizes.image_id, "visual_indicator_token_ids": around, "tie_word_embeddings": tied}
        return {**found, "hidden_size": sizes.text.width, "vocab_size": sizes.vocabulary}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """Ovis2's, which cuts a picture into up to 12 crops where it is asked to."""
        side = config.vision_config.image_size
        return pil_image_processor("ovis2", "Ovis2ImageProcessor")(size={"height": side, "width": side})
