"""What a pruned model must compute, built by hand from the bare model."""

from __future__ import annotations

import torch
from tiny import IMAGE, SUPPRESSED
from torch import Tensor


def features_of(model, single: dict[str, Tensor]) -> Tensor:
    """(N, D) of all pictures of a row from the bare model, whatever its release returns."""
    out = model.model.get_image_features(
        **{k: v for k, v in single.items() if k not in ("input_ids", "attention_mask")}
    )
    return torch.cat(list(getattr(out, "pooler_output", out)))


@torch.no_grad()
def full_embeds(model, single: dict[str, Tensor]) -> Tensor:
    """Embeddings of one unpadded row with every visual token in place."""
    embeds = model.get_input_embeddings()(single["input_ids"]).clone()
    if "pixel_values" in single:
        embeds[single["input_ids"] == IMAGE] = features_of(model, single).to(embeds.dtype)
    return embeds


def kept_columns(single: dict[str, Tensor], kept: list[Tensor]) -> Tensor:
    """Which columns of one row stay, (L,) bool; kept is one index tensor an image, images have text between them."""
    columns = single["input_ids"][0] != IMAGE
    places = (~columns).nonzero()[:, 0].tolist()
    starts = [i for i, p in enumerate(places) if i == 0 or places[i - 1] != p - 1]
    for start, index in zip(starts, kept, strict=True):
        columns[[places[start] + i for i in index.tolist()]] = True
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
