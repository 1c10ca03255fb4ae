"""Qwen3.5 (model_type "qwen3_5"): linear attention in three layers of four, M-RoPE, frames between timestamps."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import compat
from .base import TowerKind
from .qwen3_vl import Qwen3VL
from .sizes import Sizes


class Qwen35(Qwen3VL):
    """Qwen3_5ForConditionalGeneration: the tower of Qwen3-VL, without features that are added later.

    A layer with linear attention has one state for all that it has read, so its cache cannot be cut back, and a dropped
    token is one that it never read.
    """

    model_type = "qwen3_5"
    visual_inputs: ClassVar = ()
    visual_mask: ClassVar[str] = ""
    recurrent_caches: ClassVar[bool] = True
    no_layer_cuts: ClassVar[str] = "layers with linear attention keep one state of all that they have read, not columns"
    towers: ClassVar = {"qwen3_5_vision": TowerKind("Qwen3-ViT", False)}
    partial_rotary: ClassVar[float] = 0.5  # a quarter in released models, whose heads are wider

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Qwen3-VL's."""
        found = super().tower_config(sizes)
        del found["deepstack_visual_indexes"]
        return found

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Every fourth layer with full attention."""
        head, text = sizes.text.head_dim, sizes.text
        half = int(head * cls.partial_rotary) // 2
        rotary = compat.m_rope([half - 2 * (half // 3), half // 3, half // 3], interleaved=True)
        rotary["rope_parameters"]["partial_rotary_factor"] = cls.partial_rotary
        linear = {"linear_key_head_dim": head, "linear_value_head_dim": head}
        linear |= {"linear_num_key_heads": text.n_kv_heads, "linear_num_value_heads": text.n_heads}
        return {**sizes.text_arguments, "head_dim": head, **linear, **rotary}
