"""Column sums of softmax attention: no map of queries by keys is ever written.

The first kernel takes the log-sum-exp of every query, the second adds up exp(q k - lse) by key. Half precision is
multiplied as it is and summed in float32: the sums of the torch code, without its float32 copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

TILE = 64  # queries, keys and channels at a time
EXACT_TILE = 32  # of float32, which is multiplied without tensor cores: larger tiles spill registers


def column_sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `kernels.column_sums`."""
    q, k = (x.float() if _has_no_product(x.dtype) else x for x in (q, k))
    (n_rows, heads, n_queries, width), n_keys = q.shape, k.shape[2]
    lse = torch.empty(n_rows, heads, n_queries, dtype=torch.float32, device=q.device)
    sums = torch.empty(n_rows, heads, n_keys, dtype=torch.float32, device=q.device)
    shapes = (heads, n_queries, n_keys, width, *q.stride(), *k.stride())
    tile = EXACT_TILE if q.dtype == torch.float32 else TILE
    blocks = {"ROWS": tile, "COLUMNS": tile, "WIDTH": tile, "num_warps": 4}
    _log_sum_exp[(triton.cdiv(n_queries, tile), n_rows * heads)](q, k, lse, scale, *shapes, **blocks)
    _columns[(triton.cdiv(n_keys, tile), n_rows * heads)](q, k, lse, sums, scale, *shapes, **blocks)
    return sums.sum(1), lse


def _has_no_product(dtype: torch.dtype) -> bool:
    """Whether Triton cannot multiply it; its interpreter takes bfloat16 for integers."""
    return dtype == torch.float64 or (dtype == torch.bfloat16 and isinstance(_columns, InterpretedFunction))


@triton.jit
def _logits(
    q, k, rows, columns, n_queries, n_keys, width, step_q, step_qd, step_k, step_kd, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) logits of some queries and keys; -inf beyond the last key."""
    channels = tl.arange(0, WIDTH)
    found = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, width, WIDTH):
        channel = begin + channels
        at_q = q + rows[:, None].to(tl.int64) * step_q + channel[None, :] * step_qd
        at_k = k + columns[None, :].to(tl.int64) * step_k + channel[:, None] * step_kd
        a = tl.load(at_q, mask=(rows[:, None] < n_queries) & (channel[None, :] < width), other=0.0)
        b = tl.load(at_k, mask=(columns[None, :] < n_keys) & (channel[:, None] < width), other=0.0)
        found += tl.dot(a, b, input_precision="ieee")
    return tl.where(columns[None, :] < n_keys, found * scale, float("-inf"))


@triton.jit
def _log_sum_exp(
    q, k, lse, scale, heads, n_queries, n_keys, width,
    q_image, q_head, q_row, q_channel, k_image, k_head, k_row, k_channel,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    q += head // heads * q_image + head % heads * q_head
    k += head // heads * k_image + head % heads * k_head
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for begin in range(0, n_keys, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        logits = _logits(
            q, k, rows, columns, n_queries, n_keys, width, q_row, q_channel, k_row, k_channel, scale,
            ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
    tl.store(lse + head * n_queries + rows, highest + tl.log(total), mask=rows < n_queries)


@triton.jit
def _columns(
    q, k, lse, sums, scale, heads, n_queries, n_keys, width,
    q_image, q_head, q_row, q_channel, k_image, k_head, k_row, k_channel,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1).to(tl.int64)
    q += head // heads * q_image + head % heads * q_head
    k += head // heads * k_image + head % heads * k_head
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for begin in range(0, n_queries, ROWS):
        rows = begin + tl.arange(0, ROWS)
        logits = _logits(
            q, k, rows, columns, n_queries, n_keys, width, q_row, q_channel, k_row, k_channel, scale,
            ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        own = tl.load(lse + head * n_queries + rows, mask=rows < n_queries, other=float("inf"))
        total += tl.sum(tl.exp(logits - own[:, None]), 0)
    tl.store(sums + head * n_keys + columns, total, mask=columns < n_keys)
