"""Tiny random models, built from shrunk configs, and batches for them as a processor would make them."""

from __future__ import annotations

import functools
import math

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE, PAD, EOS, VOCAB = 90, 0, 2, 99
SUPPRESSED = [IMAGE, EOS]  # a random model must not emit placeholders, and runs are compared at full length
SIDE, PATCH = 24, 4
N_VISUAL = (SIDE // PATCH) ** 2  # 36
TOWERS = ("clip", "siglip")


def _vision(tower: str):
    common = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    if tower == "clip":
        return CLIPVisionConfig(**common, projection_dim=32)
    return SiglipVisionConfig(**common, vision_use_head=False)


def config(tower: str = "clip") -> LlavaConfig:
    """LLaVA 1.5 in small: real values are 1024 wide and 24 deep, 4096 wide and 32 deep."""
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=_vision(tower),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=N_VISUAL,
        vision_feature_layer=-2 if tower == "clip" else -1,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )


def fresh_model(tower="clip", attn="sdpa", dtype=torch.float32) -> LlavaForConditionalGeneration:
    """A model of one's own, to break or to change."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config(tower)).eval()
    sharpen(model)
    model.to(dtype)
    model.set_attn_implementation(attn)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@functools.cache
def model(tower="clip", attn="sdpa", dtype=torch.float32) -> LlavaForConditionalGeneration:
    """A shared model; leave it as you find it."""
    return fresh_model(tower, attn, dtype)


@torch.no_grad()
def sharpen(module: torch.nn.Module) -> None:
    """Weights far from uniform attention: with the usual initialisation nothing that is dropped matters."""
    generator = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        if p.ndim < 2 and "class_embedding" not in name:
            continue
        fan_in = 1 if p.ndim == 1 or "embed_tokens" in name else p[0].numel()
        p.copy_(torch.randn(p.shape, generator=generator) * (1.2 / math.sqrt(fan_in) if fan_in > 1 else 1.0))


def pictures(n: int, seed: int = 3) -> torch.Tensor:
    """(n, 3, 24, 24)."""
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


MIXED = ((0,), (1, 2), ())  # one image; two images; text alone


def batch(layout=MIXED, dtype=torch.float32, seed=7, lead=True) -> dict[str, torch.Tensor]:
    """A left-padded batch; row r shows the pictures layout[r] and has 3 + r or so tokens of text.

    Without `lead` no text comes before the first picture, not even a beginning-of-sequence token.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(3, 80, (n,), generator=generator).tolist()

    rows, order = [], []
    for r, images in enumerate(layout):
        ids = [1, *words(2 + r)] if lead else []
        for image in images:
            ids += [IMAGE] * N_VISUAL + words(2)
            order.append(image)
        rows.append(ids + words(4 + 2 * r))
    return collate(rows, order, dtype)


def collate(rows: list[list[int]], order: list[int], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask, and the pictures in the order of the prompt."""
    length = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows]),
    }
    if order:
        inputs["pixel_values"] = pictures(max(order) + 1)[order].to(dtype)
    return inputs


def row(inputs: dict[str, torch.Tensor], r: int, layout=MIXED) -> dict[str, torch.Tensor]:
    """Row r alone, without padding."""
    mask = inputs["attention_mask"][r].bool()
    start = sum(len(images) for images in layout[:r])
    single = {"input_ids": inputs["input_ids"][r][mask][None], "attention_mask": mask[mask][None].long()}
    if layout[r]:
        single["pixel_values"] = inputs["pixel_values"][start : start + len(layout[r])]
    return single


def generate(model, inputs, **options) -> torch.Tensor:
    """New tokens of a generation, greedy unless told otherwise."""
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    out = model.generate(**inputs, suppress_tokens=SUPPRESSED, **options)
    return out[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else out
