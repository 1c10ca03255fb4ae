"""What a pruned model must compute, built by hand from the bare model."""

from __future__ import annotations

import contextlib

import torch
from tiny import IMAGE, SUPPRESSED
from torch import Tensor


def language_model(model):
    """The decoder of the bare model."""
    return getattr(model.model, "text_model", None) or model.model.language_model


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
    out = language_model(model)(
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


def run_lengths(single: dict[str, Tensor]) -> list[int]:
    """Placeholders of every image of one row; images have text between them."""
    places = (single["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    starts = [i for i, p in enumerate(places) if i == 0 or places[i - 1] != p - 1]
    return [b - a for a, b in zip(starts, [*starts[1:], len(places)], strict=True)]


@torch.no_grad()
def masked_logits(model, embeds: Tensor, gone: dict[int, Tensor], offset: int = 0) -> Tensor:
    """Logits of the bare model, (1, L, V); no layer from `layer` on sees the columns of gone[layer], (L,) bool.

    Layer 0 stands for columns that never reach the language model. All keep their positions. A column that is gone
    sees itself, so that nothing is undefined; what it becomes does not matter.
    """
    n, eager = embeds.shape[1], language_model(model).config._attn_implementation == "eager"
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    hooks = []
    for i, layer in enumerate(language_model(model).layers):
        hidden = torch.zeros(n, dtype=torch.bool)
        for first, columns in gone.items():
            hidden |= columns if first <= i else False
        mask = (causal & ~hidden | torch.eye(n, dtype=torch.bool))[None, None]
        if eager:
            mask = torch.zeros(mask.shape, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
            )
        )
    try:
        out = language_model(model)(
            inputs_embeds=embeds,
            position_ids=torch.arange(n)[None] + offset,
            attention_mask=torch.ones(1, n, dtype=torch.long),
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return model.lm_head(out.last_hidden_state)


def masked_greedy(model, embeds: Tensor, gone: dict[int, Tensor], n_new: int = 8) -> list[int]:
    """Tokens of a greedy generation that recomputes everything at every step."""
    tokens = []
    for _ in range(n_new):
        logits = masked_logits(model, embeds, gone)[0, -1]
        logits[SUPPRESSED] = -torch.inf
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
        gone = {layer: torch.cat([columns, torch.zeros(1, dtype=torch.bool)]) for layer, columns in gone.items()}
    return tokens


FLASH = "emulated_flash"


@contextlib.contextmanager
def emulated_flash(monkeypatch):
    """Registers attention that keeps flash attention's contract; yields what its calls saw.

    The mask is two-dimensional over all keys, or None; the last query belongs to the last key; positions with gaps
    would be taken for several packed sequences, so layers must not be given them.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    seen = []

    def attend(module, query, key, value, attention_mask=None, scaling=None, position_ids=None, **ignored):
        seen.append(None if attention_mask is None else attention_mask.shape)
        assert attention_mask is None or (attention_mask.ndim == 2 and attention_mask.shape[1] == key.shape[2])
        if position_ids is not None and attention_mask is None and position_ids.shape[1] > 1:
            assert (position_ids.diff(dim=1) == 1).all()
        n_query, n_key = query.shape[2], key.shape[2]
        mask = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        mask = mask | ~mask.any(-1, keepdim=True)  # a padding row sees something
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(FLASH, attend)
    AttentionMaskInterface.register(FLASH, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    try:
        yield seen
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(FLASH, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(FLASH, None)
