"""QuoTA: crops, or frames of a video, share the budget by how relevant they are for the question (split=query).

Source:   "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
          arXiv:2503.08689. Written from the description, as a way to split a budget: no second model, no question taken
          apart. Its repository states no licence; nothing of it was read.
Faithful: shares and budgets agree with the formula (golden cases quota).
Differs:  relevance is the cosine of a frame's mean row and the mean embedding of the prompt's text, scaled to 0..1 over
          the frames, where the paper asks a second model about every frame. A frame gets at most all of its tokens,
          where the first release has no limit and makes frames larger.
Needs:    TEXT_EMBEDS, so tokens are selected when the language model runs. Cost: O(N D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core import ops
from ..core.lazy import F, torch
from ..core.signals import Kind
from ..core.tokens import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

EXPONENT = 2  # of relevance


def relevance(tokens: VisualTokens) -> Tensor:
    """(G, C) in 0..1: cosine of every crop's mean row and the mean of the text, the least 0 and the highest 1.

    All 1 where all are alike, or where there is no text.
    """
    question = F.normalize(tokens.signal(Kind.TEXT_EMBEDS).float().sum(1), dim=-1)
    near = (F.normalize(_sums(tokens), dim=-1) @ question[..., None])[..., 0]
    low, high = near.amin(1, keepdim=True), near.amax(1, keepdim=True)
    return torch.where(high > low, (near - low) / (high - low).clamp(min=1e-12), 1.0)


def budgets(relevant: Tensor, sizes: Sequence[int], n_keep: int) -> Tensor:
    """(G, C): tokens of every crop, by the square of what `relevant` (G, C) says; a crop may get none.

    Crops that would get more than their size get all of it, and the others share the rest again; largest remainder.
    """
    return ops.allocate(relevant.double() ** EXPONENT, sizes, n_keep)


def _sums(tokens: VisualTokens) -> Tensor:
    """Sum of every crop's rows, (G, C, D) float32."""
    layout, features = tokens.layout, tokens.features
    n_frames, n = layout.frames
    if n_frames == len(layout.crops):
        return features.unflatten(1, (n_frames, n)).sum(2, dtype=torch.float32)
    places = ops.on_device(layout.crop_places, features.device)
    sums = features.new_zeros(len(features), len(layout.crops), features.shape[2], dtype=torch.float32)
    return sums.index_add(1, places, features.float())
