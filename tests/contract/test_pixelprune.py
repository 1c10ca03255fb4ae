"""PixelPrune: what repeats its neighbours leaves before the vision tower, which runs on the rest."""

from __future__ import annotations

import contextlib
import math
import sys

import pytest
import tiny
import torch
from counter import counted
from m_rope import batch, captured, columns_kept, masked, masked_greedy, model_of, pictures_of, row
from specs import LAYOUTS, build, mosaic_layout
from tokprune.integrations.transformers import family_of

import tokprune
from tokprune.core.errors import BudgetError, MissingSignalError, TokPruneError
from tokprune.core.layout import frames_layout, grid_layout
from tokprune.core.signals import Kind, Signal
from tokprune.core.tokens import VisualTokens
from tokprune.methods.pixelprune import PixelPrune
from tokprune.prune.select import Picture

CELLS = (*tiny.QWEN, "qwen3_5")
kinds = pytest.mark.parametrize("kind", tiny.served(CELLS))
pictures = pytest.mark.parametrize("kind", tiny.served([k for k in CELLS if k != "qwen3_5"]))


# ---- which cells stay


def alike(a, b, tau):
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tau


def predicted(left, above, corner, tau):
    """Of the neighbours that are there; None stands for one that is not."""
    if left is None or above is None:
        return left or above
    return above if alike(corner, left, tau) and not alike(corner, above, tau) else left


def encoded(cells, tau, anchored):
    """Which cells of a list of rows of tuples stay, one after the other as the formula has it."""
    height, width = len(cells), len(cells[0])
    seen = [[None] * width for _ in range(height)]
    keep = [[True] * width for _ in range(height)]
    for r in range(height):
        for c in range(width):
            known = seen if anchored else cells
            left, above = known[r][c - 1] if c else None, known[r - 1][c] if r else None
            guess = predicted(left, above, known[r - 1][c - 1] if r and c else None, tau)
            keep[r][c] = guess is None or not alike(cells[r][c], guess, tau)
            seen[r][c] = cells[r][c] if keep[r][c] else guess
    return keep


def decoded(kept, keep, tau):
    """The picture from the kept cells in their order and where they are."""
    height, width, left_over = len(keep), len(keep[0]), iter(kept)
    seen = [[None] * width for _ in range(height)]
    for r in range(height):
        for c in range(width):
            left, above = seen[r][c - 1] if c else None, seen[r - 1][c] if r else None
            guess = predicted(left, above, seen[r - 1][c - 1] if r and c else None, tau)
            seen[r][c] = next(left_over) if keep[r][c] else guess
    return seen


def drawn(height, width, seed, n_images=2, n_values=3, depth=2):
    """(G, H * W, values) of a few levels 0.25 apart, so that many neighbours are alike and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, depth + 1, (n_images, height * width, n_values), generator=generator) / 4


def kept_of(pixels, layout, **options):
    tokens = VisualTokens.of(pixels[..., :0], layout, {Signal(Kind.PIXELS): pixels[:, None]})
    return PixelPrune(**options).select(tokens, 0).keep


def rows_of(pixels, height, width):
    return [[tuple(v) for v in row_] for row_ in pixels.view(height, width, -1).tolist()]


SIZES = ((1, 1), (1, 7), (6, 1), (2, 2), (5, 4), (4, 9))


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kept_cells_are_those_of_the_formula(size, tau, anchored):
    for seed in range(20):
        pixels = drawn(*size, seed, depth=1 if tau == 0 else 4, n_values=1 + seed % 3)
        keep = kept_of(pixels, grid_layout(*size), tau=tau, anchored=anchored)
        for image, own in zip(pixels, keep, strict=True):
            assert own.view(size).tolist() == encoded(rows_of(image, *size), tau, anchored), seed


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_picture_follows_bit_for_bit_from_kept_cells(size):
    for seed in range(20):
        pixels = drawn(*size, seed, depth=1)
        for image, own in zip(pixels, kept_of(pixels, grid_layout(*size)), strict=True):
            found = decoded(map(tuple, image[own].tolist()), own.view(size).tolist(), 0)
            assert torch.equal(torch.tensor(found).view_as(image), image)


def test_anchored_pixels_are_never_further_off_than_tau():
    """A slow ramp, which a chain of true neighbours would leave behind."""
    ramp = (torch.arange(40) / 64).view(1, 40, 1).expand(1, 40, 3)
    far = {}
    for anchored in (True, False):
        keep = kept_of(ramp, grid_layout(4, 10), tau=0.05, anchored=anchored)[0]
        found = decoded(map(tuple, ramp[0][keep].tolist()), keep.view(4, 10).tolist(), 0.05)
        far[anchored] = (torch.tensor(found).view_as(ramp[0]) - ramp[0]).abs().max()
    assert far[True] <= 0.05 < far[False]


@pytest.mark.parametrize("tau", [0.0, 0.25])
@pytest.mark.parametrize("name", ["thumbnail and 2x2", "wide", "frames"])
def test_crops_and_frames_are_pictures_of_their_own(name, tau):
    layout = frames_layout(3, 2, 4) if name == "frames" else LAYOUTS[name]
    pixels = drawn(1, layout.n_visual, 5, depth=3)
    keep = kept_of(pixels, layout, tau=tau)
    for crop in layout.crops:
        own = [i for i in range(layout.n_visual) if layout.crop[i] == crop]
        height = len({layout.row[i] for i in own})
        alone = kept_of(pixels[:, own], grid_layout(height, len(own) // height), tau=tau)
        assert torch.equal(keep[:, own], alone)


# ---- the tower on the rest


def repeating(inputs):
    """The same with cells that repeat those before them, in every picture and frame."""
    inputs = dict(inputs)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            cells = inputs[name].clone().unflatten(0, (-1, tiny.MERGED))
            cells[torch.arange(len(cells)) % 5 > 1] = 0.5
            inputs[name] = cells.flatten(0, 1)
    return inputs


def repeating_batch(kind, rows=None):
    inputs, singles = batch(kind, rows)
    inputs = repeating(inputs)
    done = dict.fromkeys(("pixel_values", "pixel_values_videos"), 0)
    for single in singles:  # cells of a batch repeat where they are, so rows alone are cut out of it
        for name, start in done.items():
            if name in single:
                done[name] = start + len(single[name])
                single[name] = inputs[name][start : done[name]]
    return inputs, singles


@contextlib.contextmanager
def blind_tower(model, monkeypatch, dropped):
    """The bare tower, whole, in which no patch attends to those of dropped tokens.

    Args:
        dropped: (tokens,) bool of every call of the tower, in turn.
    """
    tower, state = model.model.visual, {}
    module = sys.modules[type(tower).__module__]

    def entered(_, args, kwargs):
        gone, grids = dropped.pop(0), kwargs["grid_thw"]
        if hasattr(module, "get_vision_window_index"):
            sizes = {"window_size": tower.config.window_size, "patch_size": tower.config.patch_size}
            gone = gone[module.get_vision_window_index(grids, spatial_merge_size=2, **sizes)[0]]
        state.update(gone=gone.repeat_interleave(tiny.MERGED), at=0)

    def attend(attention, query, key, value, *args, scaling, **kwargs):
        n = key.shape[2]
        gone = state["gone"][state["at"] : state["at"] + n]
        state["at"] = (state["at"] + n) % len(state["gone"])
        hidden = gone & ~torch.eye(n, dtype=torch.bool)  # what is gone sees itself; what it becomes does not matter
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    before = tower.config._attn_implementation
    handle = tower.register_forward_pre_hook(entered, with_kwargs=True)
    monkeypatch.setattr(module, "eager_attention_forward", attend)
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)
        monkeypatch.undo()
        handle.remove()


def dropped_of(inputs, kept):
    """(tokens,) bool of the pictures, and of the videos."""
    found, kept = [], list(kept)
    for name in ("image_grid_thw", "video_grid_thw"):
        sizes = [math.prod(grid) // tiny.MERGED for grid in inputs[name].tolist()] if name in inputs else []
        gone = [torch.ones(n, dtype=torch.bool).index_fill(0, kept.pop(0), False) for n in sizes]
        found += [torch.cat(gone)] if gone else []
    return found


@pictures
@torch.no_grad()
def test_pruned_equals_the_bare_model_that_does_not_see_what_was_dropped(kind, monkeypatch):
    """Neither in the tower nor in the language model: its own places, segments and windows, and added features."""
    model, rows, (inputs, _) = model_of(kind), pictures_of(kind), repeating_batch(kind)
    positions, bare = captured(model, inputs), model(**inputs, use_cache=False).logits
    with tokprune.attach(model, "pixelprune") as attachment:
        pruned, kept = model(**inputs).logits, attachment.kept
        tokens = tiny.generate(model, inputs, max_new_tokens=4)
    keep = columns_kept(kind, inputs, kept, rows)
    with blind_tower(model, monkeypatch, dropped_of(inputs, kept)):
        want = masked(model, inputs, keep, positions)
    with blind_tower(model, monkeypatch, dropped_of(inputs, kept) * 4):
        answer = masked_greedy(model, inputs, keep, positions, 4)
    assert all(len(k) < n for k, n in zip(kept, (6, 15, 4, 4, 16), strict=True))
    assert (pruned - want)[keep].abs().max() < 1e-9
    assert torch.equal(tokens, answer)
    assert (pruned - bare)[:3][keep[:3]].abs().max() > 1e-2  # the rest of the picture is seen differently
    # One dropped cell that the tower sees after all: the answer is another one.
    gone = dropped_of(inputs, kept)
    gone[0][int(gone[0].nonzero()[0])] = False
    with blind_tower(model, monkeypatch, gone):
        assert (pruned[0, -1] - masked(model, inputs, keep, positions)[0, -1]).abs().max() > 1e-4


@kinds
@torch.no_grad()
def test_a_picture_that_repeats_nothing_is_bit_identical(kind):
    model, (inputs, _) = model_of(kind), batch(kind)
    logits, tokens = model(**inputs).logits, tiny.generate(model, inputs, max_new_tokens=3)
    with tokprune.attach(model, "pixelprune") as attachment:
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(tiny.generate(model, inputs, max_new_tokens=3), tokens)
        assert attachment.report.layers == [inputs["input_ids"].shape[1]] * 5


@kinds
@torch.no_grad()
def test_what_enters_the_tower_is_what_would_have(kind):
    """Before any attention kept patches are bit for bit what they are in the whole picture, places included."""
    model, (inputs, _) = model_of(kind), repeating_batch(kind, ((("image", 1),),))
    seen = []
    block = model.model.visual.blocks[0]
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], *kwargs["position_embeddings"])), with_kwargs=True
    )
    model(**inputs)
    with tokprune.attach(model, "pixelprune") as attachment:
        model(**inputs)
        kept = attachment.kept[0]
    handle.remove()
    order = family_of(model).token_order(inputs["image_grid_thw"])
    for whole, part in zip(*seen, strict=True):
        cells = whole.unflatten(0, (-1, tiny.MERGED))
        if order is not None:
            at = order[kept]
            cells, kept_cells = cells[at.sort().values], part.unflatten(0, (-1, tiny.MERGED))
            assert torch.equal(kept_cells, cells)
        else:
            assert torch.equal(part.unflatten(0, (-1, tiny.MERGED)), cells[kept])


@kinds
@torch.no_grad()
def test_batches_beams_and_replays_equal_rows_alone(kind):
    model, (inputs, singles) = model_of(kind), repeating_batch(kind)
    with tokprune.attach(model, "pixelprune") as attachment:
        together = tiny.generate(model, inputs, max_new_tokens=3)
        logits, kept = model(**inputs).logits, attachment.kept
        uncached = tiny.generate(model, inputs, max_new_tokens=3, use_cache=False)
        alone = torch.cat([tiny.generate(model, single, max_new_tokens=3) for single in singles])
        beams = tiny.generate(model, singles[0], max_new_tokens=3, num_beams=3)
        n_images = len(attachment.report.images)
        rows = tiny.generate(model, singles[0], max_new_tokens=3, num_beams=3)
    assert n_images == 1
    assert torch.equal(together, uncached)
    assert torch.equal(together, alone)
    assert torch.equal(beams, rows)
    with tokprune.attach(model, "pixelprune", replay=kept) as attachment:
        assert torch.equal(model(**inputs).logits, logits)
        assert attachment.report.to_dict()["n_encoded"] == [len(k) for k in kept]


@pictures
@torch.no_grad()
def test_a_method_between_layers_gets_what_is_left(kind):
    model, (inputs, singles) = model_of(kind), repeating_batch(kind)
    with tokprune.attach(model, "pixelprune+fastv", keep_ratio=0.5) as attachment:
        logits, report = model(**inputs).logits, attachment.report
        for r, single in enumerate(singles):
            assert (model(**single).logits[0, -1] - logits[r, -1]).abs().max() < 1e-9
    for image in report.images:
        assert image.n_kept == math.floor(image.n_encoded / 2 + 0.5) < image.n_encoded < image.n_visual


@pytest.mark.parametrize("kind", tiny.served(["qwen2_5_vl"]))
@torch.no_grad()
def test_what_is_loaded_prunes_as_what_was_saved(kind, tmp_path):
    model, inputs = tiny.model(kind), repeating(row(kind, (("image", 1),), dtype=torch.float32))
    with tokprune.attach(model, "pixelprune:tau=0.1:anchored=false") as first:
        logits = model(**inputs).logits
        first.save(tmp_path)
    with tokprune.load(model, tmp_path) as again:
        assert torch.equal(model(**inputs).logits, logits)
        assert (again.method, again.label) == (first.method, first.label)
        assert len(again.kept[0]) < 15


# ---- what is said of it


@kinds
@torch.no_grad()
def test_the_report_counts_the_tower_that_ran(kind):
    """Against torch's counter: pictures of two sizes and a video, whose frames keep different numbers."""
    model = tiny.fresh_model(kind)
    if kind.endswith("moe"):
        model.set_experts_implementation("eager")
    inputs = repeating(row(kind, (("image", 1), ("video", 0)), dtype=torch.float32))
    n = {}
    with tokprune.attach(model, "pixelprune") as attachment:
        n["after"] = counted(lambda: model(**inputs, logits_to_keep=1), ("visual",))["visual"]
        report = attachment.report
        with attachment.paused():
            n["before"] = counted(lambda: model(**inputs, logits_to_keep=1), ("visual",))["visual"]
    before, after = report.ledger_unpruned, report.ledger
    # Windows count as full in the ledger, and few of these are.
    allowed = 0.15 if kind == "qwen2_5_vl" else 0.01
    for ledger, counts in ((before, n["before"]), (after, n["after"])):
        assert counts <= ledger.before_llm.flops * 1.01
        assert abs(ledger.before_llm.flops - counts) < allowed * counts
    told = report.to_dict()
    assert told["n_encoded"] == told["n_kept"]
    assert told["tower_flops"] == [before.vision.flops, after.vision.flops]
    cells = f"vision tower {sum(told['n_visual'])} -> {sum(told['n_kept'])} cells"
    assert cells in str(report)
    assert "vision tower and projector" in str(report)
    assert "cannot be saved" not in str(report)


@torch.no_grad()
def test_other_families_refuse_it_by_name():
    for kind in ("clip", "siglip", "glm4v", "paddleocr_vl"):
        if kind in tiny.M_ROPE and tiny.RELEASE.release < (5, 18):
            continue
        with pytest.raises(MissingSignalError, match=r"needs PIXELS.*whole pictures.*work here: .*divprune") as error:
            tokprune.attach(tiny.model(kind), "pixelprune")
        assert "\n" not in str(error.value)
    answers = {p.model: p.answer for p in tokprune.list_support() if p.method == "pixelprune"}
    assert {model for model, answer in answers.items() if answer == "yes"} == {*CELLS}
    assert set(answers.values()) == {"yes", "no"}


def test_a_budget_and_a_second_method_before_the_language_model_are_refused():
    model = tiny.model("clip")
    with pytest.raises(BudgetError, match="takes no budget"):
        tokprune.attach(model, "pixelprune", keep_ratio=0.5)
    with pytest.raises(TokPruneError, match=r"exactly one method that acts before the language model"):
        tokprune.attach(model, ["pixelprune", "divprune"], keep_ratio=0.5)


@pytest.mark.parametrize("kind", tiny.served(["qwen2_vl"]))
@torch.no_grad()
def test_a_tower_that_does_not_run_is_noticed(kind):
    """A forward of one's own that goes round the hooks."""
    model, inputs = tiny.fresh_model(kind), row(kind, (("image", 0),), dtype=torch.float32)
    encode, tower = model.model.get_image_features, model.model.visual
    rows = encode(**{k: inputs[k] for k in ("pixel_values", "image_grid_thw")})
    model.model.get_image_features = lambda pixel_values, image_grid_thw, **kwargs: rows
    with tokprune.attach(model, "pixelprune"), pytest.raises(TokPruneError, match="tower was not called"):
        model(**inputs)
    assert tower is model.model.visual


@pytest.mark.parametrize("kind", tiny.served(["qwen2_vl"]))
@torch.no_grad()
def test_what_was_kept_of_nothing_is_refused(kind):
    model, inputs = tiny.model(kind), row(kind, (("image", 0),), dtype=torch.float32)
    nothing = [torch.zeros(0, dtype=torch.int64)]
    with tokprune.attach(model, "pixelprune", replay=nothing), pytest.raises(TokPruneError, match="keep one token"):
        model(**inputs)


@kinds
def test_the_tower_learns_from_what_is_kept(kind):
    model, inputs = tiny.fresh_model(kind), repeating(row(kind, (("image", 1),), dtype=torch.float32))
    with tokprune.attach(model, "pixelprune"):
        model(**inputs).logits.square().mean().backward()
    gradients = [p.grad for p in model.model.visual.blocks.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(g.any() for g in gradients if g.ndim > 1)


@kinds
@torch.no_grad()
def test_detaching_gives_everything_back(kind):
    model, inputs = tiny.fresh_model(kind), repeating(row(kind, (("image", 0),), dtype=torch.float32))
    before, logits = {name: set(vars(module)) for name, module in model.named_modules()}, model(**inputs).logits
    with tokprune.attach(model, "pixelprune"):
        assert not torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)
    tower = model.model.visual
    assert not tower._forward_hooks
    assert not tower._forward_pre_hooks
    assert set(vars(tower)) == before["model.visual"]


@pytest.mark.parametrize("kind", tiny.served(["qwen2_5_vl"]))
@torch.no_grad()
def test_a_method_after_the_tower_may_read_pixels(kind, monkeypatch):
    """Every token of a picture gets its own, whatever order the tower has them in."""
    from tokprune.methods.base import ScoreMethod

    class Bright(ScoreMethod):
        def needs(self, tower):
            return frozenset({Signal(Kind.PIXELS)})

        def score(self, tokens):
            return tokens.signal(Kind.PIXELS)[:, 0].mean(-1)

    model, inputs = tiny.model(kind), row(kind, (("image", 1), ("video", 0)), dtype=torch.float32)
    with tokprune.attach(model, Bright(), keep_tokens=3) as attachment:
        model(**inputs)
        kept = attachment.kept
    for name, own in zip(("pixel_values", "pixel_values_videos"), kept, strict=True):
        means = inputs[name].view(-1, tiny.MERGED * inputs[name].shape[1]).mean(1)
        assert set(own.tolist()) == set(means.topk(3).indices.tolist())


def test_pictures_are_selected_from_without_a_model():
    pixels = drawn(3, 5, 4, depth=1)[0]
    signals = {Signal(Kind.PIXELS): pixels[None]}
    (kept,) = tokprune.select([Picture(torch.randn(15, 8), grid_layout(3, 5), signals)], "pixelprune")
    assert kept.index.tolist() == kept_of(pixels[None], grid_layout(3, 5))[0].nonzero()[:, 0].tolist()


def test_mosaics_of_one_row_work():
    layout = mosaic_layout(2, (3, 1), height=1)
    assert kept_of(drawn(1, layout.n_visual, 0), layout).any(1).all()
    assert str(build("pixelprune")) == "PixelPrune()"
