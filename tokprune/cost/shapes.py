"""Shapes for the ledger: known models by name, and parts of a shape from the configurations of transformers."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from ..core.errors import UnknownNameError, UnsupportedModelError
from .flops import LinearAttention, Shape, Stack, Vision

# model_type of a language model -> whether its MLP has three matrices
TEXT_FAMILIES = {
    "cohere2": True,
    "gemma": True,
    "gemma2": True,
    "gemma3_text": True,
    "glm4v_text": True,
    "llama": True,
    "mistral": True,
    "opt": False,
    "paddleocr_vl_text": True,
    "phi": False,
    "phi3": True,
    "qwen2": True,
    "qwen2_5_vl_text": True,
    "qwen2_vl_text": True,
    "qwen3": True,
    "qwen3_5_text": True,
    "qwen3_vl_moe_text": True,
    "qwen3_vl_text": True,
}
GATED_ATTENTION = ("qwen3_5_text",)  # whose queries come with a gate
# model_type of a vision tower -> its special tokens ([CLS])
VISION_FAMILIES = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "internvl_vision": 1,
    "smolvlm_vision": 0,
    "idefics3_vision": 0,
}


def text_of(config: Any) -> Stack:
    """Decoder layers of a language model.

    Raises:
        UnsupportedModelError: the cost of this model type is not known.
    """
    if config.model_type not in TEXT_FAMILIES:
        raise UnsupportedModelError(
            f"cannot count the FLOPs of a language model of type {config.model_type!r}; "
            f"known: {', '.join(TEXT_FAMILIES)}"
        )
    heads = config.num_attention_heads
    return Stack(
        n_layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp_width=_mlp_width(config),
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=TEXT_FAMILIES[config.model_type],
        linear=_linear(config),
        gated_attention=config.model_type in GATED_ATTENTION,
    )


def _linear(config: Any) -> LinearAttention | None:
    """Layers with linear attention."""
    kinds = getattr(config, "layer_types", None) or ()
    layers = frozenset(i for i, kind in enumerate(kinds) if kind == "linear_attention")
    if not layers:
        return None
    return LinearAttention(
        layers,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )


def _mlp_width(config: Any) -> int:
    """Of the MLP, or of the experts that a token goes through together."""
    if getattr(config, "num_experts_per_tok", None):
        return config.num_experts_per_tok * config.moe_intermediate_size
    return getattr(config, "intermediate_size", None) or config.ffn_dim


def vision_of(config: Any) -> Vision:
    """A vision tower.

    Raises:
        UnsupportedModelError: the cost of this model type is not known.
    """
    if config.model_type not in VISION_FAMILIES:
        raise UnsupportedModelError(
            f"cannot count the FLOPs of a vision tower of type {config.model_type!r}; "
            f"known: {', '.join(VISION_FAMILIES)}"
        )
    (height, width), (patch_height, patch_width) = _pair(config.image_size), _pair(config.patch_size)
    heads = config.num_attention_heads
    stack = Stack(
        n_layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=config.hidden_size // heads,
        gated=False,
    )
    return Vision(
        stack=stack,
        n_patches=(height // patch_height) * (width // patch_width),
        n_special=VISION_FAMILIES[config.model_type],
        patch_values=config.num_channels * patch_height * patch_width,
        pooling_head=bool(getattr(config, "vision_use_head", config.model_type.startswith("siglip"))),
    )


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def llava_shape(config: Any) -> Shape:
    """A model of the LLaVA family: a two-layer MLP on every row of the tower that is read.

    Raises:
        UnsupportedModelError: the cost of its tower or its language model is not known.
    """
    vision, text = vision_of(config.vision_config), text_of(config.text_config)
    layers = config.vision_feature_layer
    n_read = 1 if isinstance(layers, int) else len(layers)
    n_rows = vision.n_patches + (vision.n_special if config.vision_feature_select_strategy == "full" else 0)
    widths = (vision.stack.width * n_read, text.width, text.width)
    return Shape(config.model_type, vision, widths, n_rows, n_rows, text, config.text_config.vocab_size)


def gemma3_shape(config: Any) -> Shape:
    """A Gemma 3: averages of k x k patches, then one matrix.

    Raises:
        UnsupportedModelError: the cost of its tower or its language model is not known.
    """
    vision, text = vision_of(config.vision_config), text_of(config.text_config)
    n_rows, widths = config.mm_tokens_per_image, (vision.stack.width, text.width)
    return Shape(config.model_type, vision, widths, n_rows, n_rows, text, config.text_config.vocab_size)


def internvl_shape(config: Any) -> Shape:
    """An InternVL: pixel shuffle, then a two-layer MLP.

    Raises:
        UnsupportedModelError: the cost of its tower or its language model is not known.
    """
    vision, text = vision_of(config.vision_config), text_of(config.text_config)
    folds = round(1 / config.downsample_ratio) ** 2
    widths = (vision.stack.width * folds, text.width, text.width)
    n_rows = vision.n_patches // folds
    return Shape(config.model_type, vision, widths, n_rows, n_rows, text, config.text_config.vocab_size)


# ------------------------------------------------------------------------------------------ by name

_CLIP_L_336 = Vision(Stack(24, 1024, 4096, 16, 16, 64, gated=False), 576, 1, 3 * 14 * 14)
_SIGLIP_SO400M_384 = Vision(Stack(26, 1152, 4304, 16, 16, 72, gated=False), 729, 0, 3 * 14 * 14)
_INTERNVIT_300M_448 = Vision(Stack(24, 1024, 4096, 16, 16, 64, gated=False), 1024, 1, 3 * 14 * 14)
# One picture of 1008 x 1008; four of the 32 layers see all of it, the others windows of 8 x 8 patches.
_QWEN2_5_VIT_1008 = Vision(
    Stack(32, 1280, 3420, 16, 16, 80, gated=True, n_windowed=28, window=64), 5184, 0, 2 * 3 * 14 * 14
)
_QWEN3_VIT_300M = Vision(Stack(24, 1024, 4096, 16, 16, 64, gated=False), 3844, 0, 2 * 3 * 16 * 16)  # 992 x 992
_QWEN3_VIT_400M = Vision(Stack(27, 1152, 4304, 16, 16, 72, gated=False), 3844, 0, 2 * 3 * 16 * 16)
_GLM_VIT_1008 = Vision(Stack(24, 1536, 4096, 12, 12, 128), 5184, 0, 2 * 3 * 14 * 14)
_PIXTRAL_1008 = Vision(Stack(24, 1024, 4096, 16, 16, 64), 5184, 0, 3 * 14 * 14)
_SIGLIP_B_512 = Vision(Stack(12, 768, 3072, 12, 12, 64, gated=False), 1024, 0, 3 * 16 * 16)
_SIGLIP_27_384 = Vision(Stack(27, 1152, 4304, 16, 16, 72, gated=False), 729, 0, 3 * 14 * 14)
_SIGLIP_27_896 = Vision(Stack(27, 1152, 4304, 16, 16, 72, gated=False), 4096, 0, 3 * 14 * 14)
_VICUNA_7B = Stack(32, 4096, 11008, 32, 32, 128)
_VICUNA_13B = Stack(40, 5120, 13824, 40, 40, 128)
_MISTRAL_7B = Stack(32, 4096, 14336, 32, 8, 128)
_QWEN2_HALF_B = Stack(24, 896, 4864, 14, 2, 64)
_QWEN2_1_5B = Stack(28, 1536, 8960, 12, 2, 128)
_QWEN2_7B = Stack(28, 3584, 18944, 28, 4, 128)


def _clip_llava(name: str, text: Stack) -> Shape:
    return Shape(name, _CLIP_L_336, (1024, text.width, text.width), 576, 576, text, 32064)


def _onevision(name: str, text: Stack) -> Shape:
    return Shape(name, _SIGLIP_SO400M_384, (1152, text.width, text.width), 729, 729, text, 152000)


def _any_size(
    name: str, tower: Vision, widths: tuple[int, ...], text: Stack, vocabulary: int, side: int = 28, **more: Any
) -> Shape:
    """Four patches a token, two frames a step of time."""
    n = tower.n_patches // 4
    shape = Shape(name, tower, (*widths, text.width), n, n, text, vocabulary, any_size=True, token_side=side)
    return replace(shape, **{"frames_a_step": 2, "takes_cells": name.startswith("qwen"), **more})


def _smolvlm2(name: str, tower: Vision, folded: int, text: Stack) -> Shape:
    n = tower.n_patches * tower.stack.width // folded
    return Shape(name, tower, (folded, text.width), n, n, text, 49280)


def _internvl3(name: str, text: Stack) -> Shape:
    return Shape(name, _INTERNVIT_300M_448, (4096, text.width, text.width), 256, 256, text, 151674)


KNOWN: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _clip_llava("llava-1.5-7b", _VICUNA_7B),
        _clip_llava("llava-1.5-13b", _VICUNA_13B),
        _clip_llava("llava-next-7b", _VICUNA_7B),
        _clip_llava("llava-next-mistral-7b", _MISTRAL_7B),
        _clip_llava("llava-next-13b", _VICUNA_13B),
        _onevision("onevision-0.5b", _QWEN2_HALF_B),
        _onevision("onevision-7b", _QWEN2_7B),
        _internvl3("internvl3-1b", _QWEN2_HALF_B),
        _internvl3("internvl3-2b", _QWEN2_1_5B),
        _internvl3("internvl3-8b", _QWEN2_7B),
        _any_size("qwen2.5-vl-3b", _QWEN2_5_VIT_1008, (5120, 5120), Stack(36, 2048, 11008, 16, 2, 128), 151936),
        _any_size("qwen2.5-vl-7b", _QWEN2_5_VIT_1008, (5120, 5120), _QWEN2_7B, 152064),
        _any_size(
            "qwen3-vl-2b", _QWEN3_VIT_300M, (4096, 4096), Stack(28, 2048, 6144, 16, 8, 128), 151936, 32, n_projectors=4
        ),
        _any_size(
            "qwen3-vl-8b", _QWEN3_VIT_400M, (4608, 4608), Stack(36, 4096, 12288, 32, 8, 128), 151936, 32, n_projectors=4
        ),
        _any_size(
            "glm4v-9b",
            _GLM_VIT_1008,
            (6144, 4096, 4096, 27392),
            Stack(40, 4096, 13696, 32, 2, 128),
            151552,
            gated_projector=True,
        ),
        _any_size(
            "mistral3-24b",
            _PIXTRAL_1008,
            (4096, 1024, 5120),
            Stack(40, 5120, 32768, 32, 8, 128),
            131072,
            frames_a_step=1,
        ),
        Shape("gemma3-4b", _SIGLIP_27_896, (1152, 2560), 256, 256, Stack(34, 2560, 10240, 8, 4, 256), 262208),
        _smolvlm2("smolvlm2-500m", _SIGLIP_B_512, 12288, Stack(32, 960, 2560, 15, 5, 64)),
        _smolvlm2("smolvlm2-2.2b", _SIGLIP_27_384, 10368, Stack(24, 2048, 8192, 32, 32, 64)),
    )
}


def known_shape(name: str) -> Shape:
    """A shape by name, such as "llava-1.5-7b".

    Raises:
        UnknownNameError: no such shape.
    """
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"no shape named {name!r}.{hint} Known: {', '.join(KNOWN)}")
    return KNOWN[name]
