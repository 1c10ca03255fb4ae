"""The bias of attention that a calibrated method asks for, as a mask of numbers for the language model.

What it needs to know of every column that is stored travels with what `caches.Columns` says of it, so that prefill,
later turns and every step of decoding add the same. Independent of methods; the formula is in `methods/restore.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.core.errors import UnsupportedCacheError, UnsupportedModelError

from . import compat
from .families.base import ModelFamily

TAKE_NUMBERS = ("", "eager", "sdpa")  # attention implementations


@dataclass(frozen=True)
class Keys:
    """Columns as the bias sees them.

    Args:
        sizes: (B, K) float32, how many tokens a visual column stands for; 0 for text and padding.
        turns: (B, K, 2 d) float32 of length 1, cosines and sines of the rotary position.
    """

    sizes: Tensor
    turns: Tensor

    def then(self, other: Keys) -> Keys:
        """These columns and others after them."""
        return Keys(torch.cat([self.sizes, other.sizes], 1), torch.cat([self.turns, other.turns], 1))

    def first(self, n: int) -> Keys:
        """The first n columns."""
        return Keys(self.sizes[:, :n], self.turns[:, :n])


class Calibrator:
    """Makes masks for one language model.

    Args:
        family: of the model.
        bias: `methods.restore.Bias`.

    Raises:
        UnsupportedModelError: its attention takes no numbers, or its layers do not share one mask.
    """

    def __init__(self, family: ModelFamily, bias: Any):
        self.family, self.bias = family, bias
        self._check_attention()
        why = _unshared_mask(family)
        if why:
            raise UnsupportedModelError(
                f"calibrate is not possible on {family.model_type!r} models here: {why}; use calibrate=positions or "
                "calibrate=merge, or leave it out"
            )

    def _check_attention(self) -> None:
        name = compat.attention_implementation(self.family.language_model)
        if name not in TAKE_NUMBERS:
            raise UnsupportedModelError(
                f"calibrate adds numbers to attention scores, which {name!r} does not take; load the model with "
                "attn_implementation='sdpa' (or 'eager'), or use calibrate=positions or calibrate=merge"
            )

    def keys(self, before: Keys | None, past: int, positions: Tensor, sizes: Tensor | None, n_rows: int) -> Keys:
        """All columns of a pass: those that the cache holds, then those that enter.

        Args:
            before: of the cache, at least `past` columns where it was pruned under a calibration; else None.
            past: columns in the cache.
            positions: (B or 1, n), or (3 or 4, B, n) under M-RoPE, of those that enter.
            sizes: (B, n), or None where all are text.
            n_rows: B.

        Raises:
            UnsupportedCacheError: text was cached before the first picture, and the bias is for all keys.
        """
        turns = compat.turns(self.family.language_model, positions, self.family.m_rope).expand(n_rows, -1, -1)
        sizes = turns.new_zeros(turns.shape[:2]) if sizes is None else sizes.to(turns)
        new = Keys(sizes, turns)
        if before is not None:
            return before.first(past).then(new)
        if past and self.bias.all_keys:
            raise UnsupportedCacheError(
                "the cache holds text that was read before the first picture, without the bias of calibrate=bias_all; "
                "pass the prompt in one piece (without prefill_chunk_size), or use calibrate=bias"
            )
        return Keys(sizes.new_zeros(n_rows, past), turns.new_zeros(n_rows, past, turns.shape[2])).then(new)

    def mask(self, keys: Keys, valid: Tensor, pruned: Tensor, n_new: int, cache: Any, dtype: torch.dtype) -> Tensor:
        """(B, 1, n_new, K), added to the scores of every layer.

        Args:
            keys: K columns.
            valid: (B, K), 0 for padding.
            pruned: (B, 1) bool, False for rows that get no bias.
            n_new: how many of the last columns ask.
            cache: of the pass.
            dtype: of the mask.
        """
        self._check_attention()
        if compat.is_static(cache):
            raise UnsupportedCacheError(
                "calibrate is not possible with a static cache, whose empty columns it knows nothing of; leave "
                "cache_implementation out (DynamicCache), or use calibrate=positions or calibrate=merge"
            )
        sizes = keys.sizes.clamp(min=1)[:, None]
        if self.bias.distance:
            sizes = sizes * (2 - keys.turns[:, -n_new:] @ keys.turns.transpose(1, 2))
        biased = pruned.to(sizes.device) & ((keys.sizes > 0) | self.bias.all_keys)
        added = sizes.log().expand(-1, n_new, -1).masked_fill(~biased[:, None], 0)
        valid = valid.to(added.device).bool()
        past = valid.shape[1] - n_new
        seen = torch.ones(n_new, valid.shape[1], dtype=torch.bool, device=added.device).tril(past)
        # Padding sees everything: a query that sees nothing is NaN in some kernels, and NaN spreads through products.
        seen = (seen & valid[:, None]) | ~valid[:, past:, None]
        return added.to(dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _unshared_mask(family: ModelFamily) -> str:
    """Why one mask does not do for all layers of a language model; empty where it does."""
    config = family.language_model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if family.ready_masks:
        return "its language model is handed masks of several kinds"
    if kinds or family.sliding_caches or family.recurrent_caches:
        return f"it has layers of other kinds ({', '.join(sorted(kinds)) or 'sliding windows'})"
    if getattr(config, "sliding_window", None):
        return "its layers have a sliding window"
    if not hasattr(family.language_model, "rotary_emb"):
        return "its language model has no rotary positions"
    return ""
