"""What a family of models declares, without vLLM."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout
from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import VISION_FAMILIES
from tokprune.prune.supply import Supply, tower_kinds


def deepest(config: Any) -> int:
    """Layers of a vision tower up to the last one that `vision_feature_layer` names."""
    n_layers, read = config.vision_config.num_hidden_layers, config.vision_feature_layer
    indices = [read] if isinstance(read, int) else read
    return max(index if index >= 0 else n_layers + 1 + index for index in indices)


class Family:
    """Facts about the models of a class.

    Args:
        config: of transformers, as vLLM loads it.

    Attributes:
        towers: kinds of vision towers that it may have; empty for any.
        modalities: that are pruned; others are refused.
        counted: whether placeholders in the prompt that ran are the visual tokens, which evaluations count.
        has_newlines: whether rows of pictures end with a newline token.
        n_leading: rows of a picture before those of patches: a [CLS] feature, or none.
        positions: of kept tokens; "contiguous" are those of the shorter prompt.
        picture: that `largest` is of, for the log.
        notes: fields that `noted` makes.
        keeps_breaks: whether tokens of text between those of a picture are rows of it, which all stay.
    """

    towers: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    counted: ClassVar[bool] = False
    has_newlines: ClassVar[bool] = False
    n_leading: int = 0
    positions: ClassVar[str] = "contiguous"
    picture: ClassVar[str] = "a picture"
    notes: ClassVar[tuple[str, ...]] = ()
    keeps_breaks: ClassVar[bool] = False

    def __init__(self, config: Any):
        self.config, kind = config, config.vision_config.model_type
        if self.towers and kind not in self.towers:
            raise UnsupportedModelError(
                f"{kind!r} towers are not pruned in vLLM, only {', '.join(self.towers)}; use tokprune.attach with "
                "transformers"
            )

    @property
    def has_cls(self) -> bool:
        """Whether the vision tower has a [CLS] token."""
        return VISION_FAMILIES.get(self.config.vision_config.model_type, 0) > 0

    @functools.cached_property
    def tower(self) -> Tower:
        """Depth of the vision tower; merged states cannot be projected where a token shows several patches."""
        return Tower(self.config.vision_config.num_hidden_layers, self.has_cls, projects_rows=False)

    @functools.cached_property
    def supply(self) -> Supply:
        """What can be collected: no text, for a picture is encoded once for all questions about it."""
        return Supply(self.tower, tower_kinds(self.tower), planned=True, n_built=self.n_built)

    @property
    def n_built(self) -> int:
        """Vision layers that vLLM builds."""
        return self.tower.n_layers

    @functools.cached_property
    def shape(self) -> Shape | None:
        """What the ledger needs, or None for a model that it cannot count."""
        try:
            return self.shape_of(self.config)
        except UnsupportedModelError:
            return None

    @classmethod
    def shape_of(cls, config: Any) -> Shape | None:
        """The ledger's view of a configuration.

        Raises:
            UnsupportedModelError: the cost of its tower or its language model is not known.
        """
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """Kind and size of the model, as saved attachments note them."""
        text = self.config.text_config
        return {
            "model_type": self.config.model_type,
            "decoder_layers": text.num_hidden_layers,
            "decoder_width": text.hidden_size,
            "tower_layers": self.tower.n_layers,
            "tower_has_cls": self.tower.has_cls,
        }

    @property
    def largest(self) -> Layout:
        """Of a picture with the most tokens."""
        raise NotImplementedError

    def merges_states(self, layout: Layout) -> bool:
        """Whether rows of this picture are projected patches one by one, so that states can be merged instead."""
        return self.tower.projects_rows

    def noted(self, items: Mapping[str, Any], info: Any) -> dict[str, Tensor]:
        """What the worker is told of pictures, in fields named in `notes`, one entry a picture.

        Args:
            items: what the processor made of the pictures.
            info: vLLM's `ProcessingInfo`, for its tokenizer and processor.
        """
        return {}

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """Where the rows of every picture lie.

        Args:
            items: what the processor made of the pictures, and `noted`.
        """
        raise NotImplementedError

    def crops_of(self, items: Mapping[str, Any]) -> list[int]:
        """Crops of every picture that the tower encodes."""
        return [1] * len(items["pixel_values"])

    def segments(self, items: Mapping[str, Any]) -> list[int] | None:
        """Patches of every picture, where the tower reads all pictures of a call as one sequence."""
        return None

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Values of patches, (crops, patches, C), through the model's own packing: (N, C) a picture.

        Rows that show no patch hold NaN.
        """
        raise NotImplementedError
