"""Methods that each break one law, so that the law can be seen to fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokprune.core import ops
from tokprune.core.signals import Kind, Signal
from tokprune.core.tokens import VisualTokens
from tokprune.methods.base import Method, ScoreMethod


def norms(tokens: VisualTokens) -> torch.Tensor:
    return tokens.features.float().norm(dim=-1)


@dataclass(frozen=True)
class Honest(ScoreMethod):
    """Breaks nothing."""

    def score(self, tokens):
        return norms(tokens)


@dataclass(frozen=True)
class DoubleScores(ScoreMethod):
    def score(self, tokens):
        return norms(tokens).double()


@dataclass(frozen=True)
class InfiniteScores(ScoreMethod):
    def score(self, tokens):
        return norms(tokens) / 0


@dataclass(frozen=True)
class WritesToItsInput(ScoreMethod):
    def score(self, tokens):
        return norms(replace(tokens, features=tokens.features.mul_(2)))


@dataclass(frozen=True)
class OneTooMany(ScoreMethod):
    def select(self, tokens, n_keep):
        return tokens.keeping(ops.keep_top(norms(tokens), min(n_keep + 1, tokens.n_visual)))


@dataclass(frozen=True)
class LastAmongEquals(ScoreMethod):
    def score(self, tokens):
        return norms(tokens)

    def select(self, tokens, n_keep):
        index = ops.keep_top(self.score(tokens).flip(1), n_keep)
        return tokens.keeping(tokens.n_visual - 1 - index)


@dataclass(frozen=True)
class LooksAtItsNeighbours(ScoreMethod):
    """Scores relative to the whole group: another batch, another result."""

    def score(self, tokens):
        return (norms(tokens) - norms(tokens).mean(0)).abs()


@dataclass(frozen=True)
class HalfScores(ScoreMethod):
    def score(self, tokens):
        return tokens.features.norm(dim=-1)


@dataclass(frozen=True)
class ReadsTheDevice(ScoreMethod):
    def score(self, tokens):
        return norms(tokens) * (norms(tokens).max().item() + 1)


@dataclass(frozen=True)
class TakesWhatItDidNotAskFor(Method):
    def needs(self, tower):
        return frozenset({Signal(Kind.CLS_ROW, (tower.layer(-2),))})

    def select(self, tokens, n_keep):
        kind = Kind.RECEIVED if tokens.has(Kind.RECEIVED) else Kind.CLS_ROW
        return tokens.keeping(ops.keep_top(tokens.signal(kind)[:, 0], n_keep))


@dataclass(frozen=True)
class KeepsTheWorst(ScoreMethod):
    def score(self, tokens):
        return norms(tokens)

    def select(self, tokens, n_keep):
        return tokens.keeping(ops.keep_top(-self.score(tokens), n_keep))
