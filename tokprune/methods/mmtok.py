"""MMTok: keep tokens that together cover the text and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.budget import REFERENCE_TEXT
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split
from .coverage import CHUNK, Cosines, greedy, is_held, n_cosine_rows
from .crops import crop_by_crop

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-5  # of a row's weight: gains up to here are rounding, everything is covered


@dataclass(frozen=True)
class MMTok(Method):
    """Choose one token after the other, each the one that adds most to what text and picture get.

    A token of text gives visual tokens weights that sum to 1: the softmax of its cosines to them over
    `text_temperature`. So does every visual token, by cosines of the tower's states over `vision_temperature`. What a
    chosen set is worth is the largest weight in it, mean over the text, plus alpha times its mean over visual tokens.

    Source:   "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", arXiv:2508.18264;
              code: Ironieser/MMTok@d1522cd.
    Faithful: kept sets and order agree with the authors' code, given its embeddings (golden cases mmtok).
    Differs:  the text is all text of the prompt, where the paper takes the question; so tokens are selected when
              the language model runs. Tokens of padding are not told apart. After a choice, sums are corrected
              for the tokens whose best grew most, more of them than usually change, not for all. The code's
              text_temperature on Qwen-VL is 0.01.
    Needs:    TEXT_EMBEDS, TOWER_STATES. Cost: O(N^2 D + N^2 log K + K T N); O(N^2 D log K) beyond 16,384 tokens,
              where no N x N matrix is held. FLOPs are counted with 64 tokens of text.

    Args:
        alpha: weight of the picture beside the text, from 0.
        text_temperature, vision_temperature: of the softmax over cosines, above 0.
        split: "joint" covers all tokens of an image together, "even" gives every crop the same share.
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    split: Split = "joint"

    limits: ClassVar = {"alpha": (0, 1e6), "text_temperature": (1e-3, 1e3), "vision_temperature": (1e-3, 1e3)}
    source: ClassVar[str] = "arXiv:2508.18264"
    cpu_rate: ClassVar[float] = 6e9  # its greedy steps are no products

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({Signal(Kind.TEXT_EMBEDS), Signal(Kind.TOWER_STATES)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """All cosines to the text and among the states; of many tokens, the rows as often as they are made."""
        sizes = layout.crop_sizes if self.split == "even" else (layout.n_visual,)
        spent = 0
        for n, k in zip(sizes, ops.shares(sizes, n_keep, even=True), strict=True):
            n_rows = n_cosine_rows(n, k) + (0 if is_held(n) else n)  # once more for the sums of the softmax
            spent += n * (n_rows * widths.states + REFERENCE_TEXT * widths.rows) if k else 0
        return Ops(spent)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.split == "even" and len(tokens.layout.crops) > 1:
            shares = ops.shares(tokens.layout.crop_sizes, n_keep, even=True)
            return crop_by_crop(tokens, shares, lambda crop, n: crop.keeping(self.order(crop, n)))
        return tokens.keeping(self.order(tokens, n_keep))

    def order(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """Indices in the order they are chosen, (G, n_keep)."""
        n, heat = tokens.n_visual, self.vision_temperature
        cosines = Cosines(tokens.signal(Kind.TOWER_STATES)[:, 0])
        places = torch.arange(n, device=tokens.keep.device).expand_as(tokens.keep)
        total = torch.cat([(cosines.rows(part) / heat).logsumexp(2) for part in places.split(CHUNK, 1)], 1)

        def rows(index: Tensor) -> Tensor:
            """What visual tokens give to all, (G, c, N)."""
            return self.alpha / n * (cosines.rows(index) / heat - total.gather(1, index)[..., None]).exp()

        def column(newest: Tensor) -> Tensor:
            """What all visual tokens give to one, (G, N)."""
            return self.alpha / n * (cosines.rows(newest[:, None])[:, 0] / heat - total).exp()

        def rank(gain: Tensor) -> Tensor:
            return torch.where(gain > LEAST / n, gain, 0.0)

        return greedy(rows, column, tokens.keep, n_keep, rank, self._of_text(tokens))

    def _of_text(self, tokens: VisualTokens) -> Tensor:
        """What tokens of text give to visual tokens, (G, T, N); zeros where there is no text."""
        text = tokens.signal(Kind.TEXT_EMBEDS).float()
        is_text = (text != 0).any(2, keepdim=True)
        near = F.normalize(text, dim=-1) @ F.normalize(tokens.features.float(), dim=-1).transpose(1, 2)
        return (near / self.text_temperature).softmax(2) * is_text / is_text.sum(1, keepdim=True).clamp(min=1)
