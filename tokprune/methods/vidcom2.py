"""VidCom²: keep the tokens of a video that are unlike it; frames that are unlike it may keep more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.scores import heard
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import ScoreMethod
from .frames import top_by_frame

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the kernels that are added
TEMPERATURE = 0.01  # of the softmax over frames: nearly one frame takes all


@dataclass(frozen=True)
class VidCom2(ScoreMethod):
    """Keep what differs from the mean of the video and from that of the frame; unusual frames get a larger share.

    On the half of the channels that vary least, unit length: S = g(x, m) + g(x, m_t) with m and m_t the means of video
    and frame, and g a sum of five Gaussian kernels. Every frame keeps its tokens of lowest S. With u_t minus the mean
    of g(x, m) over a frame and p = softmax(100 u), a frame weighs 1 + p_t - 1/T.

    Source:   "Video Compression Commander", arXiv:2505.14454; code: xuyang-liu16/VidCom2@944a17d.
    Faithful: channels, scores, budgets and kept sets agree with the authors' code (golden cases vidcom2), with
              faithful=True.
    Differs:  the exact budget by largest remainder, at least one token a frame where it allows that and at most all of
              a frame, whose surplus goes to the others; the code rounds every frame by itself, so its total is a few
              tokens off, and loses what is over a full frame. With faithful=True as the code, and all newlines stay;
              `paper_sequence` tells where the code for LLaVA-Video puts them. A picture is one frame.
    Needs:    nothing. Text-agnostic. Cost: O(N D).

    Args:
        faithful: count as the authors' code does.
        ratio: with faithful, the ratio to keep as the paper takes it; None is the budget's.
    """

    faithful: bool = False
    ratio: float | None = None

    limits: ClassVar = {"ratio": (0, 1)}
    source: ClassVar[str] = "arXiv:2505.14454"

    @property
    def count(self) -> Count:
        """The code rounds every frame by itself."""
        return Count.CONTENT if self.faithful else Count.EXACT

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "keep"]:
        """The authors' code leaves them all."""
        return "keep" if self.faithful else "keep_rows_with_tokens"

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Products with the mean of the video and with those of frames, on half of the channels."""
        return Ops(2 * layout.n_visual * (widths.rows // 2))

    def channels(self, tokens: VisualTokens) -> Tensor:
        """(G, D // 2): the channels of lowest variance over all tokens, ascending."""
        variance = tokens.features.float().var(1, correction=0)
        return ops.keep_top(-variance, variance.shape[1] // 2)

    def similarity(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """(G, T, n): of every token to the mean of the video, and to that of its frame."""
        n_tokens = tokens.n_visual
        at = self.channels(tokens)[:, None].expand(-1, n_tokens, -1)
        x = F.normalize(tokens.features.gather(2, at).float(), dim=-1).unflatten(1, tokens.layout.frames)
        return _kernel(x, x.mean((1, 2))[:, None]), _kernel(x, x.mean(2))

    def score(self, tokens: VisualTokens) -> Tensor:
        """Minus S: what is like the video and its frame is low."""
        to_video, to_frame = self.similarity(tokens)
        return -(to_video + to_frame).flatten(1)

    def retention(self, to_video: Tensor, ratio: float) -> Tensor:
        """(G, T): the share of its tokens that every frame keeps as the paper says, before any limit."""
        weight = (-to_video.mean(2) / TEMPERATURE).softmax(1)
        return ratio * (1 + weight - 1 / weight.shape[1])

    def counts(self, to_video: Tensor, n_keep: int) -> Tensor:
        """(G, T): tokens that every frame keeps."""
        _, n_frames, n = to_video.shape
        ratio = n_keep / (n_frames * n) if self.ratio is None or not self.faithful else self.ratio
        share = self.retention(to_video, ratio) * n
        if self.faithful:
            return share.clamp(max=n).round().clamp(min=1).long()
        least = int(n_keep >= n_frames)
        return least + ops.allocate(share - least, (n - least,) * n_frames, n_keep - least * n_frames)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        to_video, to_frame = self.similarity(tokens)
        scores = -(to_video + to_frame).flatten(1)
        heard(scores, tokens.index)
        ranked = scores.masked_fill(~tokens.keep, -torch.inf).view_as(to_video)
        return replace(tokens, keep=top_by_frame(ranked, self.counts(to_video, n_keep)).flatten(1), scores=scores)

    def paper_sequence(self, keep: Tensor, n_frames: int, height: int, width: int) -> Tensor:
        """The code's order for LLaVA-Video, whose rows end with a newline: indices into (n_frames, height, width + 1).

        A frame's kept tokens come first, then all of its newlines. `keep` is (n_frames * height * width,) bool.
        """
        places = torch.arange(n_frames * height * (width + 1), device=keep.device).view(n_frames, height, width + 1)
        kept = keep.view(n_frames, height, width)
        return torch.cat([torch.cat([p[:, :-1][k], p[:, -1]]) for p, k in zip(places, kept, strict=True)])


def _kernel(x: Tensor, centres: Tensor) -> Tensor:
    """(G, T, n): the sum of Gaussian kernels of unit rows (G, T, n, D) and centres (G, T or 1, D)."""
    apart = 1 + centres.square().sum(-1)[..., None] - 2 * (x @ centres[..., None])[..., 0]
    return torch.stack([(-apart.clamp(min=0) / (2 * width)).exp() for width in WIDTHS]).sum(0)
