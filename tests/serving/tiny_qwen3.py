"""A tiny random Qwen3-VL with the processor and the words of tiny-qwen: `tiny_qwen3.py FOLDER`."""

from __future__ import annotations

import sys

import torch
from tokprune.eval.models import path_of
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
WIDTH, HEADS, LAYERS = 64, 2, 4


def config() -> Qwen3VLConfig:
    """Features of two layers of the tower are added in the language model."""
    words = AutoConfig.from_pretrained(path_of("tiny-qwen"))
    text = words.text_config
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
            **{name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "intermediate_size": 2 * WIDTH,
            "out_hidden_size": WIDTH,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
        tie_word_embeddings=False,
        architectures=["Qwen3VLForConditionalGeneration"],
        **{name: getattr(words, name) for name in IDS},
    )


def main(folder: str) -> None:
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config()).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # larger than usual: attention is far from uniform, and every token counts
            std = 0.5 if "embed_tokens" in name or "lm_head" in name else 1.2 / weight[0].numel() ** 0.5
            torch.nn.init.normal_(weight, std=std)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.save_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(path_of("tiny-qwen"))
    clips = Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(path_of("tiny-qwen"))
    for name in IDS[2:]:
        setattr(tokenizer, name, getattr(model.config, name))
    processor = Qwen3VLProcessor(pixels, tokenizer, clips, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
