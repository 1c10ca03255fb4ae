"""Rows and column means of a vision layer's attention, from its queries and keys; no map is ever kept.

Shapes: q and k are (B, H, T, d), of which the first `n_special` tokens are special ([CLS], registers);
results are over the N = T - n_special patches, mean over heads, float32, whatever the dtype of q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import kernels
from .lazy import torch
from .signals import Form, Kind, Signal, Special

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 128  # queries at a time, fewer where B * H * CHUNK * T floats would be more than LARGEST; costs no time
LARGEST = 2**25


def cls_row(
    q: Tensor, k: Tensor, scale: float, form: Form = "softmax", n_special: int = 1, special: Special = "keys"
) -> Tensor:
    """Attention of the first token to every patch, (B, N); O(H T d), no T x T product.

    The softmax runs over all T keys, or over those of patches with special="none"; the columns of special tokens are
    dropped afterwards.
    """
    k, n_keys = _keys(k, n_special, special)
    # One picture at a time, as a product over pictures and heads would copy all keys.
    alone = zip(q.split(1), k.split(1), strict=True) if q.device.type == "cpu" and len(q) > 1 else [(q, k)]
    logits = torch.cat([(q[:, :, :1].float() @ k.float().transpose(-1, -2) * scale)[:, :, 0] for q, k in alone])
    row = logits.softmax(-1) if form == "softmax" else logits
    return row.mean(1)[:, n_keys:]


def rows(q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """Attention of some queries over all keys of a decoder layer, (G, H, R, K) float32; grouped-query heads too.

    Args:
        q: (G, H, R, d), rotated.
        k: (G, H_kv, K, d), rotated.
        scale: of the logits.
        allowed: (G, R, K) bool, keys that a query sees.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # (G, H_kv, H / H_kv, R, d)
    logits = grouped @ k.float().transpose(-1, -2)[:, :, None] * scale
    return logits.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1).flatten(1, 2)


def as_one_head(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    """The same queries and keys as a single head over the full width, and its scale."""
    q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (q, k))
    return q, k, q.shape[-1] ** -0.5


def received(
    q: Tensor, k: Tensor, scale: float, form: Form = "softmax", n_special: int = 0, special: Special = "keys"
) -> Tensor:
    """Attention every patch receives, (B, N): mean over the queries of patches, or over all with special="both"."""
    if form == "logits":
        return _mean_logits(k[:, :, n_special:], _queries(q, n_special, special), scale)
    return _received_and_given(q, k, scale, n_special, special)[0]


def given(
    q: Tensor, k: Tensor, scale: float, form: Form = "softmax", n_special: int = 0, special: Special = "keys"
) -> Tensor:
    """Attention every patch gives to all patches, mean over keys, (B, N).

    After the softmax this is (1 - attention to the special tokens) / N: nearly constant.
    """
    if form == "logits":
        return _mean_logits(q[:, :, n_special:], k[:, :, n_special:], scale)
    return _received_and_given(q, k, scale, n_special, special)[1]


def received_and_given(
    q: Tensor, k: Tensor, scale: float, form: Form = "softmax", n_special: int = 0, special: Special = "keys"
) -> tuple[Tensor, Tensor]:
    """Both at once: after the softmax they share one pass over the queries."""
    if form == "logits":
        arguments = (q, k, scale, form, n_special, special)
        return received(*arguments), given(*arguments)
    return _received_and_given(q, k, scale, n_special, special)


def signal_rows(
    signals: list[Signal], q: Tensor, k: Tensor, scale: float, n_special: int
) -> Iterator[tuple[Signal, Tensor]]:
    """(signal, (B, N, ...)) for every signal asked of one layer."""
    for s in signals:
        if s.kind is Kind.KEYS:
            yield s, k[:, :, n_special:].transpose(1, 2).float()
    ways = sorted({(s.form, s.heads, s.special) for s in signals if s.kind is not Kind.KEYS})
    for form, heads, special in ways:
        asked = {s.kind: s for s in signals if (s.form, s.heads, s.special) == (form, heads, special)}
        queries, keys, by = as_one_head(q, k) if heads == "single" else (q, k, scale)
        arguments = (queries, keys, by, form, n_special, special)
        if Kind.CLS_ROW in asked:
            yield asked[Kind.CLS_ROW], cls_row(*arguments)
        if Kind.RECEIVED in asked and Kind.GIVEN in asked:
            both = received_and_given(*arguments)
            yield asked[Kind.RECEIVED], both[0]
            yield asked[Kind.GIVEN], both[1]
        elif Kind.RECEIVED in asked:
            yield asked[Kind.RECEIVED], received(*arguments)
        elif Kind.GIVEN in asked:
            yield asked[Kind.GIVEN], given(*arguments)


def _keys(k: Tensor, n_special: int, special: Special) -> tuple[Tensor, int]:
    """The keys that the softmax runs over, and how many of them are special."""
    return (k[:, :, n_special:], 0) if special == "none" else (k, n_special)


def _queries(q: Tensor, n_special: int, special: Special) -> Tensor:
    """The queries whose attention is averaged."""
    return q if special == "both" else q[:, :, n_special:]


def _mean_logits(own: Tensor, others: Tensor, scale: float) -> Tensor:
    # The mean over the other side of a product is the product with the mean: one matrix-vector product.
    mean = others.float().mean(2)  # (B, H, d)
    return (own.float() @ mean[..., None] * scale)[..., 0].mean(1)


def _received_and_given(
    q: Tensor, k: Tensor, scale: float, n_special: int, special: Special = "keys", chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    heads, n_patches = q.shape[1], q.shape[2] - n_special
    chunk = max(1, min(chunk, LARGEST // (len(q) * heads * q.shape[2])))
    k, n_keys = _keys(k, n_special, special)
    q = _queries(q, n_special, special)
    if (found := kernels.column_sums(q, k, scale)) is not None:
        sums, lse = found
        by_query = _given(q, k[:, :, :n_keys], scale, lse, n_patches)
        return sums[:, n_keys:] / (heads * q.shape[2]), by_query
    k_t = k.float().transpose(-1, -2)
    column_sum, rows = q.new_zeros(q.shape[0], n_patches, dtype=torch.float32), []
    for queries in q.split(chunk, dim=2):
        patches = (queries.float() @ k_t * scale).softmax(-1)[..., n_keys:]  # (B, H, chunk, N)
        column_sum = column_sum + patches.sum((1, 2))
        rows.append(patches.sum((1, 3)))
    by_query = torch.cat(rows, dim=1)[:, q.shape[2] - n_patches :]
    return column_sum / (heads * q.shape[2]), by_query / (heads * n_patches)


def _given(q: Tensor, special: Tensor, scale: float, lse: Tensor, n_patches: int) -> Tensor:
    """(B, N): what the queries of patches give to patches, mean over keys: all that special keys do not get.

    Args:
        q: (B, H, Q, d), the queries of patches last.
        special: (B, H, n, d) keys, none where the softmax runs over patches alone.
        scale: of the logits.
        lse: (B, H, Q) log-sum-exp of the logits of all keys.
        n_patches: N.
    """
    q, lse = q[:, :, -n_patches:], lse[:, :, -n_patches:, None]
    lost = (q.float() @ special.float().transpose(-1, -2) * scale - lse).exp().sum((1, 3))
    return (q.shape[1] - lost) / (q.shape[1] * n_patches)
