"""Tiny models with random weights and genuine processors, saved where vLLM and transformers load them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from tokprune.eval.models import path_of
from tokprune.integrations.transformers.families.sizes import Sizes
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tokprune.cost.flops import Stack

SIZES = Sizes(
    text=Stack(n_layers=4, width=128, mlp_width=192, n_heads=4, n_kv_heads=2, head_dim=32),
    tower=Stack(n_layers=4, width=64, mlp_width=96, n_heads=4, n_kv_heads=4, head_dim=16, gated=False),
    text_type="qwen2",
    tower_type="siglip_vision_model",
    vocabulary=96,
    side=48,
    patch=8,
    image_id=0,
    video_id=0,
    text_options=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False),
    tower_options=dict(vision_use_head=False),
)
MOSAICS = ((48, 96), (96, 48), (96, 96), (48, 144), (192, 192))  # the last one is made smaller
# Gemma's configuration counts on the order of the first three.
SPECIAL = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<image>", "<video>", "<img>", "</img>")
SPECIAL += ("<IMG_CONTEXT>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "\n", "\n\n", "\n\n\n", "\n\n\n\n")


@dataclass(frozen=True)
class Kind:
    """How a model is made.

    Args:
        family: its name in tests/tiny.py.
        architecture: its class.
        processor: (tokenizer, configuration) to its processor.
        tokens: by the names that its processor has for them; "image_token" is the placeholder.
        sizes: that differ from `SIZES`.
        text: fields of the language model's configuration.
    """

    family: str
    architecture: str
    processor: Callable[[Any, Any], Any]
    tokens: Mapping[str, str]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)


def onevision(words, config):
    """LLaVA-OneVision's processor."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": SIZES.side, "width": SIZES.side}
    pictures = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints)
    options = dict(num_image_tokens=SIZES.n_patches, vision_feature_select_strategy="full")
    return LlavaOnevisionProcessor(pictures, words, LlavaOnevisionVideoProcessor(size=size), **options)


def internvl(words, config):
    """InternVL's processor, with up to six tiles."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    height, width = config.vision_config.image_size
    size = {"height": height, "width": width}
    pictures = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6)
    return InternVLProcessor(
        pictures, words, InternVLVideoProcessor(size=size), image_seq_length=config.image_seq_length
    )


def gemma3(words, config):
    """Gemma 3's processor."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    side = config.vision_config.image_size
    pictures = Gemma3ImageProcessor(size={"height": side, "width": side})
    return Gemma3Processor(pictures, words, image_seq_length=config.mm_tokens_per_image)


def mistral3(words, config):
    """Mistral 3's processor."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    patch, merged = config.vision_config.patch_size, config.spatial_merge_size
    pictures = PixtralImageProcessor(
        patch_size={"height": patch * merged, "width": patch * merged},
        size={"longest_edge": config.vision_config.image_size},
    )
    return PixtralProcessor(pictures, words, patch_size=patch, spatial_merge_size=merged)


def qwen3(words, config):
    """Qwen3-VL's processor."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    vision = config.vision_config
    sizes = dict(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 1024, "longest_edge": 65536}, **sizes)
    return Qwen3VLProcessor(pictures, words, Qwen3VLVideoProcessor(**sizes))


KINDS = {
    "random-onevision": Kind(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        onevision,
        {"image_token": "<image>", "video_token": "<video>"},
        {"grids": MOSAICS},
    ),
    "random-internvl": Kind(
        "internvl",
        "InternVLForConditionalGeneration",
        internvl,
        {
            **{"image_token": "<IMG_CONTEXT>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
        },
        {"side": 64, "tower_type": "internvl_vision", "tower_options": dict(use_qk_norm=True)},
    ),
    "random-gemma3": Kind(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        gemma3,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        {"side": 96, "text_type": "gemma3_text"},
        {"sliding_window": 32},
    ),
    "random-mistral3": Kind(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        mistral3,
        {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        {"side": 192, "tower_type": "pixtral", "tower_options": {}, "text_type": "mistral"},
    ),
    "random-qwen3": Kind(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        qwen3,
        {
            **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
            **{"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
        },
        {"tower_options": {}},
    ),
}


def tokenizer(kind: Kind):
    """That of an embedded model, with special tokens of all kinds, and names for some."""
    made = AutoTokenizer.from_pretrained(path_of("tiny-llava"), extra_special_tokens=dict(kind.tokens))
    made.add_tokens([token for token in SPECIAL if token not in made.get_vocab()], special_tokens=True)
    return made


def config_of(name: str):
    """The configuration of a model of a name in `KINDS`."""
    kind = KINDS[name]
    ids = tokenizer(kind).convert_tokens_to_ids
    sizes = replace(SIZES, image_id=ids(kind.tokens["image_token"]), video_id=ids("<video>"), **kind.sizes)
    made = tiny.family(kind.family).config_of(sizes)
    for field_, value in kind.text.items():
        setattr(made.text_config, field_, value)
    for name_, token in kind.tokens.items():
        if hasattr(made, f"{name_}_id"):
            setattr(made, f"{name_}_id", ids(token))
    made.architectures = [kind.architecture]
    return made


def make(name: str, folder: Path) -> Path:
    """A model of a name in `KINDS`, in a folder of that name."""
    place = folder / name
    if place.exists():
        return place
    torch.manual_seed(0)
    words, config = tokenizer(KINDS[name]), config_of(name)
    model = AutoModelForImageTextToText.from_config(config).eval()
    tiny.sharpen(model)
    silence(model, list(words.get_added_vocab().values()))
    model.save_pretrained(place)
    as_released(place / "model.safetensors")
    KINDS[name].processor(words, config).save_pretrained(place)
    return place


def as_released(file: Path) -> None:
    """Give the weights of a SigLIP tower the names that released models have, which vLLM looks for."""
    weights = load_file(file)
    if any("vision_tower.encoder.layers." in name for name in weights):
        weights = {name.replace("vision_tower.", "vision_tower.vision_model."): v for name, v in weights.items()}
        save_file(weights, file, metadata={"format": "pt"})


@torch.no_grad()
def silence(model, ids: list[int]) -> None:
    """Let an answer have no special tokens, placeholders among them: all others decide about it."""
    model.lm_head.weight[ids] = 0
