"""What a new method may get wrong is said by its class's name and by what to write, before torch stumbles over it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tokprune
from tokprune.core import Count, Kind, Signal, VisualTokens, grid_layout, ops
from tokprune.core.errors import MethodError
from tokprune.methods.base import Method, ScoreMethod
from tokprune.methods.decoder import DecoderMethod
from tokprune.prune import Picture


class NoScore(ScoreMethod):
    """Forgets to write it."""


class OneAnImage(ScoreMethod):
    def score(self, tokens):
        return tokens.features.float().norm(dim=(1, 2))


class TrailingAxis(ScoreMethod):
    def score(self, tokens):
        return tokens.features.float().norm(dim=-1, keepdim=True)


class WholeNumbers(ScoreMethod):
    def score(self, tokens):
        return tokens.features.float().norm(dim=-1).long()


class AList(ScoreMethod):
    def score(self, tokens):
        return tokens.features.float().norm(dim=-1).tolist()


def highest(tokens, n):
    return ops.keep_top(tokens.features.float().norm(dim=-1), n)


class AMask(Method):
    def select(self, tokens, n_keep):
        return tokens.keeping(highest(tokens, n_keep)).keep


class Scores(Method):
    def select(self, tokens, n_keep):
        return replace(tokens, keep=tokens.features.float().norm(dim=-1))


class Shorter(Method):
    def select(self, tokens, n_keep):
        return replace(tokens, features=tokens.features[:, :n_keep])


class OneTooFew(Method):
    def select(self, tokens, n_keep):
        return tokens.keeping(highest(tokens, n_keep - 1))


class OneTooMany(Method):
    def select(self, tokens, n_keep):
        return tokens.keeping(highest(tokens, n_keep + 1))


class MoreThanAtMost(OneTooMany):
    @property
    def count(self):
        return Count.AT_MOST


class AsThePictureSays(OneTooMany):
    @property
    def count(self):
        return Count.CONTENT


@dataclass(frozen=True)
class CutNoReads(DecoderMethod):
    """Forgets what it reads."""


@dataclass(frozen=True)
class CutTrailingAxis(DecoderMethod):
    def reads(self, layer):
        return frozenset()

    def score(self, tokens):
        return tokens.features.float().norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class CutOneTooMany(DecoderMethod):
    def reads(self, layer):
        return frozenset()

    def select(self, tokens, n_keep):
        return tokens.keeping(highest(tokens, n_keep + 1))


class Undefined(ScoreMethod):
    """0 / 0 in one picture alone."""

    def score(self, tokens):
        score = tokens.features.float().norm(dim=-1)
        return score.index_fill(1, torch.zeros(1, dtype=torch.long, device=score.device), torch.nan)


class Endless(ScoreMethod):
    def score(self, tokens):
        return tokens.features.float().norm(dim=-1) / 0


class AName(NoScore):
    def needs(self, tower):
        return "cls_row"


class OneSignal(NoScore):
    def needs(self, tower):
        return Signal(Kind.CLS_ROW, (0,))


class ATuple(NoScore):
    def needs(self, tower):
        return (Signal(Kind.CLS_ROW, (0,)),)


class Nothing(NoScore):
    def needs(self, tower):
        pass


class OfTheLanguageModel(NoScore):
    def needs(self, tower):
        return frozenset({Signal(Kind.LM_ROW, (0,))})


@dataclass(frozen=True)
class CutUndefined(DecoderMethod):
    def reads(self, layer):
        return frozenset()

    def score(self, tokens):
        return tokens.features.float().norm(dim=-1) * torch.nan


@dataclass(frozen=True)
class CutAName(CutUndefined):
    def reads(self, layer):
        return "lm_row"


@dataclass(frozen=True)
class CutOfTheTower(CutUndefined):
    def reads(self, layer):
        return frozenset({Signal(Kind.CLS_ROW, (0,))})


@dataclass(frozen=True)
class CutMissing(CutUndefined):
    reads = DecoderMethod.reads


SCORE = r"score must return \(images, tokens\)"
MISTAKES = [
    (NoScore, r"score\(self, tokens"),
    (OneAnImage, SCORE),
    (TrailingAxis, rf"{SCORE}, here \(\d, 36\); it returned \(\d, 36, 1\)"),
    (WholeNumbers, rf"{SCORE} as float32.*scores\.float\(\)"),
    (AList, f"{SCORE}.*not list"),
    (AMask, r"select must return .*not Tensor: use tokens\.keeping\(index\)"),
    (Scores, r"select must return .* as bool .*use tokens\.keeping\(index\)"),
    (Shorter, "features became .*rows that are kept"),
]
COUNTS = [(OneTooFew, "exactly n_keep"), (OneTooMany, "exactly n_keep"), (MoreThanAtMost, r"n_keep.*Count\.CONTENT")]
FINITE = [(Undefined, "NaN or infinity"), (Endless, "NaN or infinity")]
NEEDS = [
    (AName, r"needs must return a frozenset of signals, not 'cls_row': return frozenset\(\{Signal\(Kind\.CLS_ROW"),
    (OneSignal, r"needs must return .* not Signal\("),
    (ATuple, r"needs must return .* not \(Signal\("),
    (Nothing, "needs must return .* not None"),
    (OfTheLanguageModel, "needs must return .*LM_ROW is measured in the language model"),
    (CutUndefined, "NaN or infinity"),
    (CutAName, r"reads must return .* not 'lm_row': return frozenset\(\{Signal\(Kind\.LM_ROW, \(layer - 1,"),
    (CutOfTheTower, "reads must return .*CLS_ROW is measured in a vision tower"),
    (CutMissing, r"reads\(self"),
]
CUTS = [(CutNoReads, r"reads\(self"), (CutTrailingAxis, SCORE), (CutOneTooMany, "exactly n_keep")]


@pytest.mark.parametrize(
    ("method", "use"), MISTAKES + COUNTS + FINITE + NEEDS + CUTS, ids=lambda v: getattr(v, "__name__", "")
)
@torch.no_grad()
def test_a_mistake_names_the_class_and_what_to_write(method, use):
    model, inputs = tiny.model(), tiny.batch()
    before = model(**inputs).logits
    with pytest.raises(MethodError, match=f"^{method.__name__}.*{use}"):
        with tokprune.attach(model, method(), keep_ratio=0.3):
            model(**inputs)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(("method", "use"), MISTAKES + COUNTS + FINITE, ids=lambda v: getattr(v, "__name__", ""))
def test_so_does_selection_without_a_model(method, use):
    pictures = [Picture(torch.randn(36, 8), grid_layout(6, 6)) for _ in range(2)]
    with pytest.raises(MethodError, match=f"^{method.__name__}.*{use}"):
        tokprune.select(pictures, method(), keep_tokens=9)


@torch.no_grad()
def test_what_depends_on_the_picture_may_keep_any_number():
    with tokprune.attach(tiny.model(), AsThePictureSays(), keep_tokens=9) as attachment:
        tiny.model()(**tiny.batch())
        assert attachment.report.to_dict()["n_kept"] == [10, 10, 10]


@pytest.mark.parametrize("method", [OneAnImage, TrailingAxis, WholeNumbers, AMask, Scores, Shorter])
def test_mistakes_are_seen_without_reading_the_device(method):
    """Under FakeTensorMode a read from the device raises something else."""
    from tokprune.methods.base import checked_selection

    with FakeTensorMode() as mode, pytest.raises(MethodError):
        tokens = VisualTokens.of(mode.from_tensor(torch.randn(2, 36, 8)), grid_layout(6, 6))
        checked_selection(method(), method().select(tokens, 9), tokens)
