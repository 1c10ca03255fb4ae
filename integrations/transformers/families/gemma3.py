"""Gemma 3 (model_type "gemma3"): 256 averaged tokens a picture, which see each other; most layers have a window."""

from __future__ import annotations

from typing import Any, ClassVar

from .siglip import SiglipFamily
from .sizes import Sizes


class Gemma3(SiglipFamily):
    """Gemma3ForConditionalGeneration. The sliding window of a layer counts the tokens that are kept."""

    model_type = "gemma3"
    ready_masks: ClassVar[bool] = True
    column_types: ClassVar[str] = "token_type_ids"
    sliding_caches: ClassVar[bool] = True

    @classmethod
    def block_of(cls, config: Any) -> int:
        """The kernel of the averaging."""
        vision = config.vision_config
        return vision.image_size // vision.patch_size // round(config.mm_tokens_per_image**0.5)

    @classmethod
    def projector_of(cls, config: Any) -> tuple[tuple[int, ...], int]:
        """One matrix, on averaged tokens."""
        return (config.vision_config.hidden_size, config.text_config.hidden_size), 1

    @classmethod
    def text_config(cls, sizes: Sizes) -> Any:
        """Every other layer with a window."""
        kinds = ["sliding_attention", "full_attention"] * sizes.text.n_layers
        more = {"sliding_window": 4096, "layer_types": kinds[: sizes.text.n_layers], "head_dim": sizes.text.head_dim}
        return {"query_pre_attn_scalar": sizes.text.head_dim, **sizes.text_arguments, **more}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token."""
        ids = {"boi_token_index": sizes.image_id - 2, "eoi_token_index": sizes.image_id - 1}
        return {**super().options(sizes), **ids, "mm_tokens_per_image": sizes.n_patches // 4}
