"""Greedy selection in one launch: a program an image chooses all of its tokens, one after the other.

The torch loops launch some 5 and 12 kernels a kept token. Here the state of all N tokens stays in registers, and a step
reads one row of the N x N matrix. Both choose the same tokens in the same order; of equals the lowest index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a picture: more would not fit the registers of a block, and places in a matrix have to fit 32 bits.
MOST_FARTHEST, MOST_DETERMINANT = 16384, 4096
# Tokens times kept ones: an image is one block, which reads the whole basis at every step. Beyond this, by an estimate,
# the torch loop is faster, which spreads every step over the device.
MOST_READ = 2**21


def farthest(distance: Tensor, first: Tensor, n_keep: int) -> Tensor | None:
    """See `kernels.farthest`."""
    n_images, n, _ = distance.shape
    if n > MOST_FARTHEST or distance.dtype != torch.float32:
        return None
    chosen = torch.empty(n_images, n_keep, dtype=torch.int64, device=distance.device)
    distance, block = distance.contiguous(), triton.next_power_of_2(n)
    _farthest[(n_images,)](distance, first.contiguous(), chosen, n, n_keep, BLOCK=block, num_warps=_warps(block))
    return chosen


def determinant(kernel: Tensor, relevance: Tensor, n_keep: int, least: float) -> Tensor | None:
    """See `kernels.determinant`."""
    n_images, n, _ = kernel.shape
    if n > MOST_DETERMINANT or n * n_keep > MOST_READ or kernel.dtype != torch.float32:
        return None
    chosen = torch.empty(n_images, n_keep, dtype=torch.int64, device=kernel.device)
    basis = torch.empty(n_images, n_keep, n, dtype=torch.float32, device=kernel.device)
    kernel, relevance, block = kernel.contiguous(), relevance.contiguous(), triton.next_power_of_2(n)
    _determinant[(n_images,)](
        kernel, relevance, basis, chosen, n, n_keep, LEAST=least, BLOCK=block, num_warps=_warps(block)
    )
    return chosen


def _warps(block: int) -> int:
    """Threads for some eight tokens each."""
    return min(32, max(1, block // 256))


@triton.jit
def _lowest_of_highest(values, places, BLOCK: tl.constexpr):
    return tl.min(tl.where(values == tl.max(values, 0), places, BLOCK), 0)


@triton.jit
def _farthest(distance, first, chosen, n, n_keep, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    exists = places < n
    newest = tl.load(first + image).to(tl.int32)
    nearest = tl.where(exists, float("inf"), float("-inf"))
    tl.store(chosen + image * n_keep, newest.to(tl.int64))
    for step in range(1, n_keep):
        row = tl.load(distance + (image * n + newest) * n + places, mask=exists, other=0.0)
        nearest = tl.where(places == newest, float("-inf"), tl.minimum(nearest, row))
        newest = _lowest_of_highest(nearest, places, BLOCK)
        tl.store(chosen + image * n_keep + step, newest.to(tl.int64))


@triton.jit
def _determinant(kernel, relevance, basis, chosen, n, n_keep, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    exists = places < n
    kernel += image * n * n
    basis += image * n_keep * n
    own_relevance = tl.minimum(tl.load(relevance + image * n + places, mask=exists, other=0.0), 1.0)
    residual = tl.load(kernel + places * (n + 1), mask=exists, other=0.0)
    free = exists
    for step in range(n_keep):
        rank = tl.where(residual > LEAST, 2.0 + residual, own_relevance)
        newest = _lowest_of_highest(tl.where(free, rank, float("-inf")), places, BLOCK)
        own = tl.sum(tl.where(places == newest, residual, 0.0), 0)
        row = tl.load(kernel + newest * n + places, mask=exists, other=0.0)
        for i in range(0, step, 4):  # four rows of the basis are on their way at a time
            for j in tl.static_range(4):
                at = basis + (i + j) * n
                weight = tl.load(at + newest, mask=i + j < step, other=0.0)
                row -= weight * tl.load(at + places, mask=exists & (i + j < step), other=0.0)
        new = tl.div_rn(row, tl.sqrt_rn(tl.maximum(own, LEAST)))
        new = tl.where(own > LEAST, new, 0.0)
        tl.store(basis + step * n + places, new, mask=exists)
        tl.debug_barrier()  # the next step reads what other threads have written
        residual = tl.maximum(residual - new * new, 0.0)
        free = free & (places != newest)
        tl.store(chosen + image * n_keep + step, newest.to(tl.int64))
