"""What a pruned model must compute, built by hand from the bare model."""

from __future__ import annotations

import torch
from tiny import IMAGE, SUPPRESSED
from torch import Tensor


def features_of(model, pixel_values: Tensor) -> Tensor:
    """(images, N, D) from the bare model, whatever its release returns."""
    out = model.model.get_image_features(pixel_values)
    out = getattr(out, "pooler_output", out)
    return torch.stack(list(out))


@torch.no_grad()
def full_embeds(model, single: dict[str, Tensor]) -> Tensor:
    """Embeddings of one unpadded row with every visual token in place."""
    embeds = model.get_input_embeddings()(single["input_ids"]).clone()
    if "pixel_values" in single:
        features = features_of(model, single["pixel_values"])
        embeds[single["input_ids"] == IMAGE] = features.flatten(0, 1).to(embeds.dtype)
    return embeds


def kept_columns(single: dict[str, Tensor], kept: list[Tensor], n_visual: int) -> Tensor:
    """Which columns of one row stay, (L,) bool; kept is one index tensor an image."""
    columns = single["input_ids"][0] != IMAGE
    places = (~columns).nonzero()[:, 0].view(-1, n_visual)
    for image, index in zip(places, kept, strict=True):
        columns[image[index]] = True
    return columns


@torch.no_grad()
def short_logits(model, embeds: Tensor, columns: Tensor, positions: str, offset: int = 0) -> Tensor:
    """Logits of the short sequence, (1, K, V), in one pass without cache."""
    short = embeds[:, columns]
    n = torch.arange(embeds.shape[1])
    position_ids = (n[columns] if positions == "original" else n[: int(columns.sum())])[None] + offset
    out = model.model.language_model(
        inputs_embeds=short,
        position_ids=position_ids,
        attention_mask=torch.ones(short.shape[:2], dtype=torch.long),
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)


def greedy(model, embeds: Tensor, columns: Tensor, positions: str, n_new: int = 8) -> list[int]:
    """Tokens of a greedy generation that recomputes everything at every step."""
    tokens = []
    for _ in range(n_new):
        logits = short_logits(model, embeds, columns, positions)[0, -1]
        logits[SUPPRESSED] = -torch.inf
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
        columns = torch.cat([columns, torch.ones(1, dtype=torch.bool)])
    return tokens
