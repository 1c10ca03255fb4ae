"""Building models of a family at any size: for tests, and for benchmarks of known shapes with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokprune.cost.flops import Stack


@dataclass(frozen=True)
class Sizes:
    """What a model is built with.

    Args:
        text: the decoder layers.
        tower: the layers of the vision tower.
        text_type, tower_type: their `model_type`.
        vocabulary: number of token ids.
        side: pixels a side of a crop.
        patch: pixels a side of a patch.
        image_id, video_id: placeholder ids.
        grids: height and width in pixels of the mosaics that a picture may be cut into.
        text_options, tower_options: more arguments of the two configurations.
    """

    text: Stack
    tower: Stack
    text_type: str
    tower_type: str
    vocabulary: int
    side: int
    patch: int
    image_id: int
    video_id: int
    grids: tuple[tuple[int, int], ...] = ()
    text_options: Mapping[str, Any] = field(default_factory=dict)
    tower_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_patches(self) -> int:
        """Patches of a crop."""
        return (self.side // self.patch) ** 2

    @property
    def text_arguments(self) -> dict[str, Any]:
        """Arguments of the configuration of a language model."""
        stack = self.text
        return {
            "hidden_size": stack.width,
            "intermediate_size": stack.mlp_width,
            "num_hidden_layers": stack.n_layers,
            "num_attention_heads": stack.n_heads,
            "num_key_value_heads": stack.n_kv_heads,
            "vocab_size": self.vocabulary,
            **self.text_options,
        }

    def tower_config(self, **options: Any) -> Any:
        """Configuration of the vision tower; `options` of the family come before those of `tower_options`."""
        stack = self.tower
        sizes: dict[str, Any] = dict(
            hidden_size=stack.width,
            intermediate_size=stack.mlp_width,
            num_hidden_layers=stack.n_layers,
            num_attention_heads=stack.n_heads,
            image_size=self.side,
            patch_size=self.patch,
        )
        from transformers import AutoConfig

        return AutoConfig.for_model(self.tower_type, **{**sizes, **options, **self.tower_options})


def pil_image_processor(module: str, name: str) -> Any:
    """The class of an image processor that needs no torchvision; transformers 4 has it by the plain name."""
    try:
        found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
        return getattr(found, f"{name}Pil")
    except ImportError:
        return getattr(importlib.import_module("transformers"), name)
