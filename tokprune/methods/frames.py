"""Helpers for methods that look at the frames of a video; a picture is a video of one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import ops
from ..core.lazy import F, torch
from ..core.tokens import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


def by_frame(tokens: VisualTokens) -> Tensor:
    """The features, (G, T, n, D), without a copy."""
    return tokens.features.unflatten(1, tokens.layout.frames)


def frame_means(tokens: VisualTokens) -> Tensor:
    """Mean of the tokens of every frame, (G, T, D) float32."""
    return by_frame(tokens).mean(2, dtype=torch.float32)


def unlike_mean(frames: Tensor) -> Tensor:
    """Minus the cosine of every token (G, T, n, D) to the mean of its frame, (G, T, n) float32."""
    mean = frames.mean(2, keepdim=True, dtype=torch.float32)
    return -ops.paired_cosine(frames, mean.expand_as(frames))


def unlike_previous(tokens: VisualTokens) -> Tensor:
    """1 - cosine of every token to that of its place in the frame before, (G, T - 1, n) float32."""
    frames = by_frame(tokens)
    if frames.shape[1] == 1:
        return frames.new_zeros(len(frames), 0, frames.shape[2], dtype=torch.float32)
    return 1 - ops.paired_cosine(frames[:, 1:], frames[:, :-1])


def top_by_frame(scores: Tensor, counts: Tensor) -> Tensor:
    """(G, T, n) bool: the `counts` (G, T) highest scores (G, T, n) of every frame; equal ones go to the lower index."""
    rank = scores.sort(dim=2, descending=True, stable=True).indices.argsort(2)
    return rank < counts[..., None]


def frame_similarity(descriptors: Tensor) -> Tensor:
    """Cosine of the descriptors (G, T, D) of every frame and the next, (G, T - 1)."""
    unit = F.normalize(descriptors.float(), dim=-1)
    return (unit[:, 1:] * unit[:, :-1]).sum(-1)
