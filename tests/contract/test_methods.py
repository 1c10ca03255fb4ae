"""Laws of methods, for every name in the registry; a new method gets them for free."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from specs import BUDGETED, CUTTING, FILTERS, LAYOUTS, PRUNING, SPECS, TOWER, build, most_kept, n_keeps, tokens_for
from tokprune.integrations.transformers.families import family_of
from torch._subclasses.fake_tensor import FakeTensorMode

from tokprune.core.layout import Layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.core.tokens import Count, VisualTokens
from tokprune.methods import METHODS
from tokprune.methods.base import ScoreMethod

SCORING = [s for s in SPECS if isinstance(build(s), ScoreMethod)]
SOME = ("6x6", "padded", "three frames", "nine frames")
NOT_EXACT = {
    "dycoke": Count.CONTENT,
    "dycoke:faithful=true": Count.CONTENT,
    "fastvid:rule=llava_onevision": Count.CONTENT,
    "fastvid:rule=llava_video": Count.CONTENT,
    "fastvid:rule=qwen2_5_vl": Count.CONTENT,
    "fopru:strategy=row": Count.AT_MOST,
    "framefusion:faithful=true": Count.CONTENT,
    "globalcom2:faithful=true": Count.CONTENT,
    "hired:faithful=true": Count.CONTENT,
    "holov:faithful=true": Count.CONTENT,
    "pixelprune": Count.CONTENT,
    "pixelprune:tau=0.5": Count.CONTENT,
    "pixelprune:tau=1:anchored=false": Count.CONTENT,
    "pool": Count.AT_MOST,
    "prumerge": Count.CONTENT,
    "prumerge_plus": Count.CONTENT,
    "prumerge_plus:n_top=5:step=6": Count.CONTENT,
    "tokencorr": Count.CONTENT,
    "tokencorr:sample=top:thumbnail=false": Count.CONTENT,
    "vidcom2:faithful=true": Count.CONTENT,
}


def select(spec: str, tokens: VisualTokens, n_keep: int) -> VisualTokens:
    return build(spec).select(tokens, n_keep)


def part(tokens: VisualTokens, i: int) -> VisualTokens:
    """Image i of a group alone."""
    signals = {s: t[i : i + 1] for s, t in tokens.signals.items()}
    return VisualTokens.of(tokens.features[i : i + 1], tokens.layout, signals, tokens.salts[i : i + 1])


@pytest.mark.parametrize("spec", SCORING)
def test_scores_are_finite_float32_and_leave_inputs_alone(spec):
    tokens = tokens_for(spec)
    before = copy.deepcopy(tokens)
    scores = build(spec).score(tokens)
    assert scores.shape == (3, 36)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(tokens.features, before.features)
    assert all(torch.equal(tokens.signals[s], before.signals[s]) for s in tokens.signals)


def test_count_classes_are_frozen():
    classes = {s: build(s).count for s in SPECS}
    assert {s: c for s, c in classes.items() if c is not Count.EXACT} == NOT_EXACT


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", BUDGETED)
def test_select_keeps_what_its_count_class_promises(spec, layout):
    tokens = tokens_for(spec, layout=layout)
    for n_keep in n_keeps(spec, layout):
        out = select(spec, tokens, n_keep)
        counts = set(out.keep.sum(1).tolist())
        assert out.keep.shape == (3, layout.n_visual)
        assert out.keep.dtype == torch.bool
        if build(spec).count is Count.EXACT:
            assert counts == {n_keep}
        elif build(spec).count is Count.AT_MOST:  # known from the layout, so the same for every picture
            assert len(counts) == 1
            assert 0 < counts.pop() <= n_keep
        else:
            assert max(counts) <= most_kept(spec, n_keep, layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", [s for s in PRUNING if s not in BUDGETED])
def test_methods_without_a_budget_decide_by_themselves(spec, layout):
    tokens = tokens_for(spec, n_images=4, layout=layout)
    keep = select(spec, tokens, 0).keep
    assert keep.any(1).all()
    assert torch.equal(keep, select(spec, tokens, 7).keep)


def test_blind_keeps_nothing():
    assert not select("blind", tokens_for("blind"), 0).keep.any()


@pytest.mark.parametrize("spec", [s for s in SCORING if not s.startswith("random")])
def test_equal_scores_go_to_the_lower_index(spec):
    tokens = tokens_for(spec)
    tokens.features.fill_(1.0)
    for signal in tokens.signals.values():
        signal.fill_(0.5)
    n_keep = 12
    keep = select(spec, tokens, n_keep).keep
    assert keep[:, :n_keep].all()
    assert not keep[:, n_keep:].any()


@pytest.mark.parametrize("layout", SOME)
@pytest.mark.parametrize("spec", PRUNING)
def test_a_group_equals_its_images_one_by_one(spec, layout):
    tokens = tokens_for(spec, layout=LAYOUTS[layout])
    together = select(spec, tokens, 12)
    for i in range(3):
        alone = select(spec, part(tokens, i), 12)
        assert torch.equal(together.keep[i : i + 1], alone.keep)
        torch.testing.assert_close(together.features[i : i + 1], alone.features)


@pytest.mark.parametrize("spec", [s for s in SCORING if s not in NOT_EXACT])  # whole rows: not token by token
def test_select_keeps_the_highest_scores(spec):
    tokens = tokens_for(spec)
    scores, keep = build(spec).score(tokens), select(spec, tokens, 9).keep
    lowest_kept = scores.masked_fill(~keep, torch.inf).amin(1)
    assert (lowest_kept >= scores.masked_fill(keep, -torch.inf).amax(1)).all()
    assert not torch.equal(keep, keep.roll(1, 1))


@pytest.mark.parametrize("spec", BUDGETED)
def test_bfloat16_features_stay_bfloat16_and_scores_float32(spec):
    tokens = tokens_for(spec, dtype=torch.bfloat16)
    out = select(spec, tokens, 12)
    assert out.features.dtype == torch.bfloat16
    assert out.scores is None or out.scores.dtype == torch.float32
    assert torch.equal(out.keep, select(spec, tokens_for(spec), 12).keep)


@pytest.mark.parametrize("spec", [s for s in BUDGETED if build(s).count is not Count.CONTENT])
@pytest.mark.parametrize("layout", SOME)
def test_runs_without_values(spec, layout):
    """Under FakeTensorMode a read from the device, or a shape that depends on values, raises."""
    tokens = tokens_for(spec, layout=LAYOUTS[layout])
    with FakeTensorMode() as mode:
        signals = {s: mode.from_tensor(t) for s, t in tokens.signals.items()}
        fake = VisualTokens.of(mode.from_tensor(tokens.features), tokens.layout, signals)
        assert select(spec, fake, 12).keep.shape == (3, tokens.n_visual)


def test_runs_without_values_sees_a_read_from_the_device():
    with FakeTensorMode() as mode, pytest.raises(Exception, match="_local_scalar_dense"):
        int(mode.from_tensor(torch.randn(3)).argmax())


@pytest.mark.parametrize("spec", BUDGETED)
def test_needs_is_honest(spec):
    alone, crowded = tokens_for(spec), tokens_for(spec, extra=True)
    assert len(crowded.signals) > len(alone.signals) or len(alone.signals) == 3
    assert torch.equal(select(spec, alone, 12).keep, select(spec, crowded, 12).keep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", BUDGETED)
def test_gpu_selects_what_the_cpu_selects(spec):
    tokens = tokens_for(spec)
    signals = {s: t.cuda() for s, t in tokens.signals.items()}
    there = select(spec, VisualTokens.of(tokens.features.cuda(), tokens.layout, signals), 12)
    assert torch.equal(there.keep.cpu(), select(spec, tokens, 12).keep)


@pytest.mark.parametrize("full", [(1, 3), (0, 2), (7, 15, 23, 31)])
@pytest.mark.parametrize("name", METHODS.own_names())
def test_default_layers_attend_to_the_whole_picture(name, full):
    """In a tower some of whose layers attend within windows, defaults move to layers that do not."""
    tower = Tower(n_layers=max(full) + 1, has_cls=False, full_layers=full)
    missing = type(METHODS.build(name)).if_missing
    method = METHODS.build(f"{name}:{missing}" if missing else name)
    layers = {i for signal in method.needs(tower) for i in signal.layers if not signal.kind.is_decoder}
    assert layers <= set(full)


@pytest.mark.parametrize("spec", SPECS)
def test_layers_are_absolute_and_in_range(spec):
    for signal in build(spec).needs(TOWER):
        assert signal.layers == tuple(sorted(signal.layers))
        assert all(0 <= layer < TOWER.n_layers for layer in signal.layers)


@pytest.mark.parametrize("spec", SPECS + FILTERS + CUTTING)
def test_docstring_has_the_agreed_parts(spec):
    method = build(spec)
    doc = inspect.getdoc(type(getattr(method, "method", method)))
    for heading in ("Source:", "Faithful:", "Differs:", "Needs:"):
        assert heading in doc


# ---- the controls have laws of their own


def test_random_is_nested_in_the_budget():
    tokens = tokens_for("random")
    small, large = select("random", tokens, 6).keep, select("random", tokens, 20).keep
    assert (large | ~small).all()


def test_random_differs_by_seed_by_salt_and_not_by_place():
    tokens = VisualTokens.of(torch.zeros(3, 36, 4), grid_layout(6, 6), salts=(5, 6, 5))
    keep = select("random", tokens, 12).keep
    assert torch.equal(keep[0], keep[2])
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep, select("random:seed=1", tokens, 12).keep)


@pytest.mark.parametrize("n_keep", range(1, 145))
def test_uniform_spreads_over_rows_and_columns(n_keep):
    """Rows that are used differ by at most one token, and no half of the picture gets much more than the other."""
    tokens = VisualTokens.of(torch.zeros(1, 144, 1), grid_layout(12, 12))
    grid = select("uniform", tokens, n_keep).keep.view(12, 12).int()
    used = [n for n in grid.sum(1).tolist() if n]
    assert max(used) - min(used) <= 1
    columns = grid.sum(0)
    assert abs(int(columns[:6].sum() - columns[6:].sum())) <= len(used)
    assert n_keep < 12 or len(used) > 1


def test_uniform_stride_of_the_raster_would_alias():
    """What the law above forbids: every 12th token of a 12 x 12 raster is one column."""
    stride = torch.zeros(144).index_fill(0, torch.arange(0, 144, 12), 1).view(12, 12)
    assert (stride.sum(0) > 0).sum() == 1


@pytest.mark.parametrize(("n_keep", "grid"), [(72, (8, 9)), (36, (6, 6)), (16, (4, 4)), (1, (1, 1)), (144, (12, 12))])
def test_pool_averages_cells(n_keep, grid):
    layout = grid_layout(12, 12)
    features = torch.randn(2, 144, 5)
    out = select("pool", VisualTokens.of(features, layout), n_keep)
    assert out.keep.sum(1).tolist() == [grid[0] * grid[1]] * 2
    got = out.features[out.keep].view(2, *grid, 5)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * 12 // grid[0], -(-(i + 1) * 12 // grid[0]))
            columns = slice(j * 12 // grid[1], -(-(j + 1) * 12 // grid[1]))
            cell = features.view(2, 12, 12, 5)[:, rows, columns].mean((1, 2))
            torch.testing.assert_close(got[:, i, j], cell)


def test_fopru_rows_are_whole():
    layout = Layout(*(tuple(x) for x in zip(*[(0, r, c) for r in range(4) for c in range(9)], strict=True)))
    keep = select("fopru:strategy=row", tokens_for("fopru:strategy=row", layout=layout), 20).keep.view(3, 4, 9)
    assert keep.all(2).sum(1).tolist() == [2, 2, 2]
    assert torch.equal(keep.all(2), keep.any(2))


# Methods that a model cannot serve as they are, with the reason. A pair enters only with one.
WHOLE = "the tower runs on whole pictures; pixelprune is for Qwen-VL, whose laws are in test_pixelprune.py"
NO_CLS = "SigLIP has no [CLS] token; the option without_cls=received is explicit"
WITHOUT_CLS = ("siglip", "llava_onevision")
UNSUPPORTED = {
    (name, kind): NO_CLS
    for kind in WITHOUT_CLS
    for name in ("damro_filter", "fastervlm", "hired", "prumerge", "prumerge_plus", "tokencorr", "vispruner", "vtc_cls")
}
UNSUPPORTED |= {("pixelprune", kind): WHOLE for kind in tiny.KINDS}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", METHODS.own_names())
def test_minimum_support_table(name, kind):
    adapter = family_of(tiny.model(kind))
    supported = adapter.supply.has_all(build(name).needs(adapter.tower))
    assert supported == ((name, kind) not in UNSUPPORTED)


@pytest.mark.parametrize("kind", WITHOUT_CLS)
@pytest.mark.parametrize("name", sorted({name for (name, _), why in UNSUPPORTED.items() if why is NO_CLS}))
def test_what_to_type_instead_runs(name, kind):
    adapter = family_of(tiny.model(kind))
    assert adapter.supply.has_all(build(f"{name}:{build(name).if_missing}").needs(adapter.tower))
