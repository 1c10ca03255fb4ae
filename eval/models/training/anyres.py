"""How the language model of the any-resolution model learns: packed crops, newlines, and dropped tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tasks import findit_hd
from .language import LanguageTrainer, pack, tally
from .recipe import GRID, N_VISUAL

N_CROPS = 5  # every picture of the task becomes a thumbnail and 2 x 2 crops
CROPS = ("thumbnail", "crops")


def pack_rows(model: nn.Module, crops: Tensor, size: tuple[int, int], newline: Tensor) -> Tensor:
    """(B, 5, 144, C) -> (B, N, C) through the model's own packing; all pictures are of one size."""
    sizes = torch.tensor([size] * len(crops))
    packed, _ = model.pack_image_features(
        list(crops), sizes, vision_feature_select_strategy="default", image_newline=newline
    )
    return torch.stack(packed)


def places(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """(N, 3): crop, row and column in its mosaic of every packed row; -1 for newlines."""
    inside = torch.arange(GRID).float()
    row, column = (t.flatten() for t in torch.meshgrid(inside, inside, indexing="ij"))
    crops = [torch.stack([torch.zeros(N_VISUAL), row, column], -1)]
    for i in range(1, N_CROPS):
        down, right = divmod(i - 1, 2)
        crops.append(torch.stack([torch.full((N_VISUAL,), float(i)), row + down * GRID, column + right * GRID], -1))
    return pack_rows(model, torch.stack(crops)[None], size, torch.full((3,), -1.0))[0].long()


class AnyResTrainer(LanguageTrainer):
    """Projector, newline and language model on features of the frozen tower."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.image_newline = model.model.image_newline
        self.pack = [model.model]  # in a list: its tower takes no part in training

    def forward(
        self, x: Tensor, size: tuple[int, int], kept: Tensor, valid: Tensor, contiguous: bool, text: dict[str, Tensor]
    ) -> Tensor:
        """Logits at the answered positions; x is (B, 5, 144, D), kept and valid are (B, K) over packed rows."""
        visual = pack_rows(self.pack[0], self.projector(x), size, self.image_newline)
        return self.answers(visual, kept, valid, contiguous, text)


def draw_kept(rng: np.random.Generator, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Which packed rows stay, (B, K) and valid (B, K), and whether positions become contiguous.

    x is (B, N, D), packed; where is `places`. A quarter of the steps keep all. Else K is log-uniform, the subset is
    uniform, a smooth blob or the top of a random direction in feature space, and half of the time crops differ in
    their share: no method's own choice. Newlines mostly stay on rows that keep a token.
    """
    batch, n = x.shape[:2]
    if rng.random() < 0.25:
        every = torch.arange(n).expand(batch, -1)
        return every, torch.ones_like(every, dtype=torch.bool), False
    is_visual = where[:, 0] >= 0
    n_visual = int(is_visual.sum())
    n_keep = 0 if rng.random() < 0.03 else round(math.exp(rng.uniform(math.log(4), math.log(n_visual))))
    kind = rng.integers(3)
    if kind == 0:
        score = torch.rand(batch, n)
    elif kind == 1:
        score = _blobs(batch, where)
    else:
        score = torch.einsum("bnd,bd->bn", x - x.mean(1, keepdim=True), torch.randn(batch, x.shape[-1]))
    if rng.random() < 0.5:
        score = score + score.std() * torch.randn(batch, N_CROPS).gather(1, where[:, 0].clamp(min=0).expand(batch, -1))
    score = score.masked_fill(~is_visual, -torch.inf)
    keep = torch.zeros(batch, n, dtype=torch.bool).scatter(1, score.topk(n_keep, 1).indices, True)
    policy = rng.choice(["rows", "all", "none"], p=[0.7, 0.15, 0.15])
    if policy == "all":
        keep |= ~is_visual
    elif policy == "rows":
        keep |= newlines_of_rows(keep, where)
    return *ragged(keep), bool(rng.random() < 0.6)


def newlines_of_rows(keep: Tensor, where: Tensor) -> Tensor:
    """(B, N): newlines at the end of mosaic rows that keep a token."""
    ends = (where[:, 0] < 0).nonzero()[:, 0]
    marks = torch.zeros_like(keep)
    start = N_VISUAL
    for end in ends.tolist():
        marks[:, end] = keep[:, start:end].any(1)
        start = end + 1
    return marks


def ragged(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool -> indices (B, K) ascending and valid (B, K), padded at the end."""
    longest = max(1, int(keep.sum(1).max()))
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :longest]
    return order, keep.gather(1, order)


def _blobs(batch: int, where: Tensor) -> Tensor:
    """A smooth random map over the thumbnail and another over the mosaic, (B, N)."""
    side = 2 * GRID
    maps = F.interpolate(torch.rand(batch, 2, 7, 7), size=(side, side), mode="bicubic").flatten(2)
    row, column = where[:, 1].clamp(min=0), where[:, 2].clamp(min=0)
    scale = torch.where(where[:, 0] == 0, 2, 1)
    index = (row * side + column) * scale
    is_crop = (where[:, 0] > 0).long()
    return maps[:, is_crop, index]


@torch.no_grad()
def accuracy(trainer: AnyResTrainer, sets: list[tuple[tuple[int, int], np.ndarray, list]], part: str, n_keep: int = 0):
    """Whole answers right under teacher forcing, by kind: from all tokens, `n_keep` random ones, or one part."""
    right: dict[str, list[bool]] = {}
    generator = torch.Generator().manual_seed(0)
    for size, x, questions in sets:
        where = places(trainer.pack[0], size)
        for i in range(0, len(x), 25):
            some, text = torch.from_numpy(x[i : i + 25]).float(), pack(questions[i : i + 25])
            keep = torch.ones(len(some), len(where), dtype=torch.bool)
            if part == "random":
                score = torch.rand(keep.shape, generator=generator).masked_fill(where[:, 0] < 0, -1)
                keep = torch.zeros_like(keep).scatter(1, score.topk(n_keep, 1).indices, True)
                keep |= newlines_of_rows(keep, where)
            elif part == "thumbnail":
                keep &= where[:, 0] == 0
            elif part == "crops":
                keep &= where[:, 0] != 0
            kept, valid = ragged(keep)
            tally(right, trainer(some, size, kept, valid, part == "random", text), text, questions[i : i + 25])
    mean = np.mean([np.mean(right[k]) for k in findit_hd.KINDS])
    return f"{part} {mean:.3f} (" + " ".join(f"{np.mean(right[k]):.3f}" for k in findit_hd.KINDS) + ")"
