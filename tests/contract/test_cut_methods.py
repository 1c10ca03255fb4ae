"""Laws of methods between decoder layers, for every name in the registry; a new method gets them for free."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from specs import CUTTING, DECODER, LAYER, build, cut_tokens_for
from torch._subclasses.fake_tensor import FakeTensorMode

from tokprune.core.errors import OptionError
from tokprune.core.layout import grid_layout
from tokprune.core.schedules import Cosine, Explicit, Pyramid, Schedule, Sigmoid, Single
from tokprune.core.signals import Decoder
from tokprune.core.tokens import Count, VisualTokens
from tokprune.methods.decoder import DecoderMethod, spread_order

RANKING = [s for s in CUTTING if build(s).takes_budget]
SCORING = [s for s in RANKING if not s.startswith("dart")]  # that one ranks nothing
KEEPS = (1, 2, 9, 20, 35)
# Decoder layers without which a named layer does not exist.
NEEDED = {
    "fastv:schedule=pyramid/1/3": 4,
    "fastv:schedule=single/3": 4,
    "fastv:layer=-2": 3,
    "pyramiddrop:schedule=single/2": 3,
}


def select(spec: str, tokens: VisualTokens, n_keep: int) -> VisualTokens:
    return build(spec).select(tokens, n_keep)


@pytest.mark.parametrize("spec", SCORING)
def test_scores_are_finite_float32_and_leave_inputs_alone(spec):
    tokens = cut_tokens_for(spec)
    before = copy.deepcopy(tokens)
    method = build(spec)
    scores = getattr(method, "method", method).score(tokens)
    assert scores.shape == (3, 36)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(tokens.features, before.features)
    assert all(torch.equal(tokens.signals[s], before.signals[s]) for s in tokens.signals)


@pytest.mark.parametrize("n_keep", KEEPS)
@pytest.mark.parametrize("spec", RANKING)
def test_select_keeps_exactly_what_it_is_told(spec, n_keep):
    keep = select(spec, cut_tokens_for(spec), n_keep).keep
    assert keep.shape == (3, 36)
    assert keep.sum(1).tolist() == [n_keep] * 3


@pytest.mark.parametrize("n_keep", KEEPS)
@pytest.mark.parametrize("spec", CUTTING)
def test_a_group_equals_its_images_one_by_one(spec, n_keep):
    tokens = cut_tokens_for(spec)
    together = select(spec, tokens, n_keep)
    for i in range(3):
        signals = {s: t[i : i + 1] for s, t in tokens.signals.items()}
        own = VisualTokens.of(tokens.features[i : i + 1], tokens.layout, signals)
        alone = select(spec, replace(own, index=tokens.index[i : i + 1]), n_keep)
        assert torch.equal(together.keep[i : i + 1], alone.keep)
        torch.testing.assert_close(together.features[i : i + 1], alone.features)


@pytest.mark.parametrize("spec", [s for s in SCORING if build(s).keeps_features and "uniform" not in s])
def test_equal_scores_go_to_the_lower_index(spec):
    tokens = cut_tokens_for(spec)
    tokens.features.fill_(1.0)
    for signal in tokens.signals.values():
        signal.fill_(0.5)
    keep = select(spec, tokens, 12).keep
    assert keep[:, :12].all()
    assert not keep[:, 12:].any()


@pytest.mark.parametrize("spec", CUTTING)
def test_runs_without_values(spec):
    """Under FakeTensorMode a read from the device, or a shape that depends on values, raises."""
    tokens = cut_tokens_for(spec)
    with FakeTensorMode() as mode:
        signals = {s: mode.from_tensor(t) for s, t in tokens.signals.items()}
        fake = VisualTokens.of(mode.from_tensor(tokens.features), tokens.layout, signals)
        fake = replace(fake, index=mode.from_tensor(tokens.index))
        assert select(spec, fake, 12).keep.shape == (3, 36)


@pytest.mark.parametrize("spec", CUTTING)
def test_reads_is_honest(spec):
    alone, crowded = cut_tokens_for(spec), cut_tokens_for(spec, extra=True)
    assert len(crowded.signals) > len(alone.signals)
    assert torch.equal(select(spec, alone, 12).keep, select(spec, crowded, 12).keep)


@pytest.mark.parametrize("spec", CUTTING)
def test_what_is_read_is_of_the_layer_before_or_of_the_one_behind(spec):
    for signal in build(spec).reads(LAYER):
        assert signal.kind.is_decoder
        assert all(0 <= layer <= LAYER for layer in signal.layers)


@pytest.mark.parametrize("spec", [s for s in RANKING if build(s).count is Count.EXACT])
@pytest.mark.parametrize("n_layers", [2, 3, 5, 8, 28, 32, 80])
def test_schedules_fall_and_end_at_the_budget(spec, n_layers):
    decoder = Decoder(n_layers)
    if n_layers < NEEDED.get(spec, 2):
        with pytest.raises(OptionError, match="use an index"):
            build(spec).layers(decoder)
        return
    for n_visual in (1, 7, 576):
        for n_keep in sorted({1, max(1, n_visual // 9), max(1, n_visual // 2), n_visual}):
            cuts = build(spec).cuts(decoder, n_visual, n_keep)
            if n_keep == n_visual:
                assert not cuts
                continue
            layers, counts = list(cuts), list(cuts.values())
            assert counts[-1] == n_keep
            assert layers == sorted(layers)
            assert set(layers) <= set(build(spec).layers(decoder))
            assert all(1 <= layer < n_layers for layer in layers)
            assert all(a > b for a, b in zip([n_visual, *counts], counts, strict=False))


# ---- schedules against figures of the papers


def test_pyramid_is_the_papers():
    assert Pyramid().counts(DECODER, 576, 72) == {8: 288, 16: 144, 24: 72}


def test_single_is_fastv():
    assert Single().counts(DECODER, 576, 288) == {2: 288}
    assert Single(layer=-1).counts(DECODER, 576, 288) == {31: 288}


def test_cosine_is_the_progressive_ratio_decay():
    """Figures of the method's description: 32 layers, floor 0.15."""
    ratios = Cosine().ratios(DECODER, 0.15)
    assert min(ratios) == 8
    assert [round(ratios[layer], 3) for layer in (8, 12, 16, 20, 24, 31)] == [0.844, 0.674, 0.475, 0.280, 0.15, 0.15]
    mean = (8 + sum(ratios.values())) / 32
    assert round(mean, 4) == 0.5375


def test_steep_sigmoid_is_a_single_cut():
    ratios = Sigmoid(steepness=100, middle=1.5).ratios(DECODER, 0.25)
    assert abs(ratios[1] - 1) < 1e-9
    assert all(abs(r - 0.25) < 1e-9 for layer, r in ratios.items() if layer >= 2)


def test_sparsevlm_counts_are_the_tables():
    cuts = build("sparsevlm").cuts(DECODER, 576, 110)
    assert cuts == {3: 300, 7: 200, 16: 110}
    assert build("sparsevlm").cuts(DECODER, 576, 17) == {3: 66, 7: 30, 16: 17}


def test_explicit_counts_and_fractions():
    assert Explicit.of({2: 288, 8: 144}).counts(DECODER, 576, 0) == {2: 288, 8: 144}
    assert Explicit.of({2: 288, 8: 144}).counts(DECODER, 200, 0) == {8: 144}
    assert Explicit.of({2: 0.5, 8: 0.25}).counts(DECODER, 575, 0) == {2: 288, 8: 144}
    assert build("fastv:schedule=layers/2x288/8x144").cuts(DECODER, 576, 0) == {2: 288, 8: 144}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linear",
        "single/x",
        "single/2/3",
        "pyramid/",
        "sigmoid/a",
        "layers",
        "layers/2",
        "layers/2x3x4",
        "layers/2x-1",
    ],
)
def test_text_that_is_no_schedule_says_what_to_type(text):
    with pytest.raises(Exception, match="single/2|falling"):
        Schedule.parse(text)


@pytest.mark.parametrize("steps", [{}, {2: 5, 8: 9}, {2: 0.5, 8: 3}, {2: 1.5}, {2: True}, {"2": 5}, {2: float("nan")}])
def test_steps_that_are_no_schedule_say_what_to_type(steps):
    with pytest.raises(Exception, match="falling"):
        Explicit.of(steps)


@pytest.mark.parametrize("layer", [0, 32, -32, 99])
def test_layer_that_does_not_exist_says_what_to_type(layer):
    with pytest.raises(Exception, match="from 1 to 31|layer=2"):
        build(f"fastv:layer={layer}").check(DECODER)


# ---- the even spread beside the score


@pytest.mark.parametrize(("height", "width"), [(24, 24), (7, 5), (1, 9)])
def test_first_turns_lie_apart(height, width):
    layout = grid_layout(height, width)
    turns = spread_order(layout)
    assert sorted(turns) == list(range(height * width))
    first = [i for i, turn in enumerate(turns) if turn < 4]
    if height == width == 24:
        cells = {(layout.row[i] // 16, layout.column[i] // 16) for i in first}
        assert len(cells) == 4


def test_uniform_part_is_spread_and_the_rest_ranked():
    tokens = cut_tokens_for("fastv")
    tokens.index.copy_(torch.arange(36).expand(3, -1))
    plain, mixed = (select(s, tokens, 12).keep for s in ("fastv", "fastv:uniform=0.5"))
    turns = torch.tensor(spread_order(tokens.layout))[:36]
    even = turns.argsort()[:6]
    assert mixed[:, even].all()
    best = build("fastv").score(tokens).masked_fill(torch.zeros(36).index_fill(0, even, 1).bool(), -1).argsort(1)
    assert mixed.gather(1, best[:, -6:]).all()
    assert not torch.equal(plain, mixed)
    assert select("fastv:uniform=1.0", tokens, 12).keep.equal(select("fastv:uniform=1.0", tokens, 12).keep[[1, 2, 0]])


def test_uniform_samples_are_nested_in_the_budget():
    tokens = cut_tokens_for("fastv")
    small, large = (select("fastv:uniform=1.0", tokens, n).keep for n in (6, 20))
    assert (large | ~small).all()


def test_every_ranking_method_is_a_decoder_method():
    for spec in RANKING:
        built = build(spec)
        assert isinstance(getattr(built, "method", built), DecoderMethod)
