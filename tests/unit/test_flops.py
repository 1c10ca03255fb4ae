"""The ledger against torch's flop counter, against figures worked out by hand, and as a budget."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
import transformers
from counter import counted
from specs import (
    BUDGETED,
    HEAD_DIM,
    HEADS,
    SPECS,
    TOWER,
    TOWER_WIDTH,
    build,
    mosaic_layout,
    most_kept,
    n_keeps,
    scaled,
    tokens_for,
)
from tokprune.integrations.transformers import shape_from_config

import tokprune
from tokprune.core.errors import BudgetError, UnknownNameError, UnsupportedModelError
from tokprune.core.layout import grid_layout
from tokprune.core.signals import Kind, Signal, Tower
from tokprune.cost import shapes
from tokprune.cost.flops import COMPAT, Ops, Stack, fastv_macs, sparsevlm_macs
from tokprune.cost.selection import Widths
from tokprune.cost.shapes import KNOWN, TEXT_FAMILIES, known_shape

PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


def within_a_percent(expected: int):
    return pytest.approx(expected, rel=0.01)


def prefill(model, inputs):
    """One pass as generate runs it: the LM head on the last position."""
    return model(**inputs, logits_to_keep=1)


# ---- against the counter


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("keep", [1.0, 0.25])
@pytest.mark.parametrize("method", ["fopru", "uniform", "fopru:form=logits", "vtc_cls"])
def test_report_ledger_equals_the_counter_part_by_part(method, keep, tower, attn):
    if method == "vtc_cls" and tower == "siglip":
        method = "vtc_cls:without_cls=received"
    model, inputs = tiny.model(tower, attn), tiny.batch(((0,), (1, 2), (3,)))
    bare = counted(lambda: prefill(model, inputs), PARTS)
    with tokprune.attach(model, method, keep_ratio=keep) as attachment:
        seen = counted(lambda: prefill(model, inputs), PARTS)
        report = attachment.report
    for ledger, flops in ((report.ledger_unpruned, bare), (report.ledger, seen)):
        selector = seen["model.vision_tower"] - bare["model.vision_tower"] if ledger is report.ledger else 0
        assert ledger.vision.flops == within_a_percent(bare["model.vision_tower"])
        assert ledger.projector.flops == within_a_percent(flops["model.multi_modal_projector"])
        assert ledger.selector.flops == within_a_percent(selector)
        assert ledger.decoder.flops == within_a_percent(flops["model.language_model"])
        assert ledger.lm_head.flops == within_a_percent(flops["lm_head"])
        assert ledger.prefill.flops == within_a_percent(flops["all"])
    assert (report.ledger.selector.flops > 0) == (keep < 1 and method != "uniform")


def test_decoder_layers_equal_the_counter_layer_by_layer():
    model, inputs = tiny.model(), tiny.batch()
    names = tuple(f"layers.{i}" for i in range(5))
    with tokprune.attach(model, "uniform", keep_ratio=0.25) as attachment:
        seen = counted(lambda: prefill(model, inputs), tuple(f"language_model.{n}" for n in names))
        layers = attachment.report.ledger.layers
    assert [ops.flops for ops in layers] == [within_a_percent(seen[f"language_model.{n}"]) for n in names]


def test_decoded_token_equals_the_counter():
    model, inputs = tiny.model(), tiny.batch(((0,), (1,)))
    shape = shape_from_config(model.config)
    with tokprune.attach(model, "uniform", keep_ratio=0.25) as attachment:
        out = model(**inputs, use_cache=True)
        kept = attachment.report.n_prompt_kept
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        step = {"input_ids": torch.tensor([[5], [6]]), **tiny.cached(out.past_key_values), "attention_mask": mask}
        seen = counted(lambda: model(**step))
    assert shape.decode(kept, rows=2).flops == within_a_percent(seen["all"])


def test_second_turn_and_chunks_count_the_cache_they_read():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    with tokprune.attach(model, "uniform", keep_ratio=0.25) as attachment:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        turn = tiny.batch(((1,),), seed=9)
        turn["attention_mask"] = torch.cat([inputs["attention_mask"], turn["attention_mask"]], 1)
        seen = counted(lambda: prefill(model, {**turn, **tiny.cached(out.past_key_values)}))
        assert attachment.report.ledger.prefill.flops == within_a_percent(seen["all"])


def small_text(family: str) -> transformers.PretrainedConfig:
    """A config of a text family, with fewer key and value heads where it can."""
    common = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    if family == "opt":
        return transformers.OPTConfig(**common, ffn_dim=96, word_embed_proj_dim=64)
    config = transformers.AutoConfig.for_model(family, **common, num_key_value_heads=2, intermediate_size=96)
    if hasattr(config, "head_dim"):
        config.head_dim = 16
    return config


WITH_M_ROPE = ("_vl_", "glm4v", "qwen3_5")  # these are in contract/test_m_rope.py


@pytest.mark.parametrize("family", [f for f in TEXT_FAMILIES if not any(name in f for name in WITH_M_ROPE)])
def test_text_families_equal_the_counter(family):
    from tokprune.cost.shapes import text_of

    config = small_text(family)
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.arange(4, 24)[None].repeat(2, 1)
    seen = counted(lambda: model(input_ids=ids, use_cache=False))
    assert 2 * text_of(config).all_layers(20).flops == within_a_percent(seen["all"])


def small_vision(family: str):
    common = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    if family == "internvl":
        return transformers.InternVLVisionConfig(**common, image_size=[24, 24], patch_size=[4, 4])
    config = transformers.SiglipVisionConfig if family == "llava_onevision" else transformers.CLIPVisionConfig
    return config(**common, image_size=24, patch_size=4)


def small_model(family: str):
    """A model of a family with pictures of one crop or several, and its inputs' number of crops."""
    text = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = {
        "llava": transformers.LlavaConfig,
        "llava_next": transformers.LlavaNextConfig,
        "llava_onevision": transformers.LlavaOnevisionConfig,
        "internvl": transformers.InternVLConfig,
    }[family]
    options = {} if family != "internvl" else {"downsample_ratio": 0.5}
    if family == "llava_onevision":
        options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    if family.startswith("llava_"):
        options["image_grid_pinpoints"] = [[24, 48], [48, 24], [48, 48]]
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(
        config(vision_config=small_vision(family), text_config=text, image_token_id=90, **options)
    ).eval()


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_families_encode_what_the_counter_sees(family):
    model = small_model(family)
    shape = shape_from_config(model.config)
    arguments, crops = {"pixel_values": torch.randn(2, 3, 24, 24)}, 2
    if family.startswith("llava_"):
        arguments = {"pixel_values": torch.randn(1, 5, 3, 24, 24), "image_sizes": torch.tensor([[48, 48]])}
        crops = 5
    tower, projector = (type(m).__name__ for m in (model.model.vision_tower, model.model.multi_modal_projector))
    seen = counted(lambda: model.model.get_image_features(**arguments), (tower, projector))
    ledger = shape.encode(crops)
    assert ledger.vision.flops == within_a_percent(seen[tower])
    assert ledger.projector.flops == within_a_percent(seen[projector])


def test_signals_cost_what_the_counter_sees():
    from tokprune.core.attention import signal_rows

    n_heads, n_tokens, width = 4, 37, 8
    q, k = torch.randn(2, 3, n_heads, n_tokens, width)
    vision = shape_from_config(tiny.model().config).vision
    kinds = [{Kind.CLS_ROW}, {Kind.RECEIVED}, {Kind.GIVEN}, {Kind.RECEIVED, Kind.GIVEN}, {Kind.CLS_ROW, Kind.KEYS}]
    for form, heads in itertools.product(("softmax", "logits"), ("mean", "single")):
        for asked, special in itertools.product(kinds, ("keys", "both", "none")):
            signals = [Signal(kind, (0,), form, heads, special=special) for kind in sorted(asked, key=str)]
            seen = counted(lambda signals=signals: list(signal_rows(signals, q, k, 1.0, 1)))
            assert (vision.signals(signals) * 3).flops == within_a_percent(seen["all"])


DECIDED = ("prumerge", "prumerge_plus", "prumerge_plus:n_top=5:step=6")  # the declared cost is of a usual picture
OF_TEXT = tuple(s for s in SPECS if s.startswith("mmtok"))  # and that of usual text


@pytest.mark.parametrize("layout", [grid_layout(6, 6), mosaic_layout(6, (2, 2), height=9)], ids=["6x6", "padded"])
@pytest.mark.parametrize("spec", [s for s in SPECS if s not in (*DECIDED, *OF_TEXT)])
def test_methods_declare_their_matrix_products(spec, layout):
    method = build(spec)
    tokens = tokens_for(spec, n_images=3, layout=layout)
    n_keep = n_keeps(spec, layout)[len(n_keeps(spec, layout)) // 2]
    has_cls_state = any(s.kind is Kind.CLS_STATE for s in tokens.signals)
    widths = Widths(16, HEADS * HEAD_DIM, HEAD_DIM, TOWER_WIDTH, has_cls_state)
    seen = counted(lambda: method.select(tokens, n_keep))
    assert 3 * method.cost(layout, n_keep, widths).flops == within_a_percent(seen["all"])


# ---- against figures worked out by hand

TABLE = [  # visual tokens; FastV's and SparseVLM's formula; LLM FLOPs in T; % of the LLM's, of all; KV MiB
    (576, 3.33, 4.25, 8.50, 100, 100, 320),
    (192, 1.31, 1.68, 3.35, 39.4, 42.2, 128),
    (128, 0.98, 1.25, 2.51, 29.5, 32.7, 96),
    (64, 0.65, 0.83, 1.67, 19.6, 23.3, 64),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} tokens")
def test_llava_7b_costs_what_the_arithmetic_says(row):
    visual, fastv, sparsevlm, llm, llm_share, share, kv = row
    shape = known_shape("llava-1.5-7b")
    full, ledger = shape.prefill(576 + 64), shape.prefill(visual + 64)
    assert fastv_macs(shape.text, visual + 64).macs / 1e12 == pytest.approx(fastv, abs=0.006)
    assert sparsevlm_macs(shape.text, visual + 64).macs / 1e12 == pytest.approx(sparsevlm, abs=0.006)
    assert ledger.llm.flops / 1e12 == pytest.approx(llm, abs=0.006)
    assert 100 * ledger.llm.flops / full.llm.flops == pytest.approx(llm_share, abs=0.06)
    assert 100 * ledger.prefill.flops / full.prefill.flops == pytest.approx(share, abs=0.06)
    assert ledger.kv_bytes == kv * 2**20


def test_figures_that_papers_print():
    shape = known_shape("llava-1.5-7b")
    assert sparsevlm_macs(shape.text, 576).macs / 1e12 == pytest.approx(3.82, abs=0.005)
    assert sparsevlm_macs(shape.text, 2880).macs / 1e12 == pytest.approx(20.83, abs=0.006)
    assert shape.vision.crop().flops / 1e12 == pytest.approx(0.38, abs=0.005)
    assert shape.project(576).flops / 1e12 == pytest.approx(0.02, abs=0.005)
    assert {f(shape.text, 576).macs for f in COMPAT.values()} == {
        sparsevlm_macs(shape.text, 576).macs,
        fastv_macs(shape.text, 576).macs,
    }


@pytest.mark.parametrize(
    ("visual", "llm_share", "share"), [(640, 22.0, 25.5), (320, 11.8, 15.8), (160, 6.9, 11.1)], ids=str
)
def test_llava_next_costs_five_crops(visual, llm_share, share):
    shape = known_shape("llava-next-7b")
    full, ledger = shape.prefill(2880 + 64, crops=5), shape.prefill(visual + 64, crops=5)
    assert full.llm.flops / 1e12 == pytest.approx(42.7, abs=0.06)
    assert 100 * ledger.llm.flops / full.llm.flops == pytest.approx(llm_share, abs=0.06)
    assert 100 * ledger.prefill.flops / full.prefill.flops == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(
    ("visual", "llm", "llm_share", "share", "kv"),
    [(1296, 18.15, 100, 100, 73.1), (512, 7.33, 40.4, 57.4, 30.2), (256, 3.90, 21.5, 43.9, 16.2)]
    + [(128, 2.20, 12.1, 37.2, 9.2)],
    ids=str,
)
def test_qwen_7b_is_limited_by_its_tower(visual, llm, llm_share, share, kv):
    shape = known_shape("qwen2.5-vl-7b")
    full, ledger = shape.prefill(1296 + 40), shape.prefill(visual + 40)
    assert ledger.llm.flops / 1e12 == pytest.approx(llm, abs=0.006)
    assert 100 * ledger.llm.flops / full.llm.flops == pytest.approx(llm_share, abs=0.06)
    assert 100 * ledger.prefill.flops / full.prefill.flops == pytest.approx(share, abs=0.06)
    assert ledger.kv_bytes / 2**20 == pytest.approx(kv, abs=0.06)
    assert shape.vision.crop().flops / 1e12 == pytest.approx(7.2, abs=0.06)


def test_grouped_queries_gates_and_dtypes_by_hand():
    stack = Stack(n_layers=1, width=8, mlp_width=16, n_heads=4, n_kv_heads=2, head_dim=2)
    # q and o 8 x 8, k and v 8 x 4, three matrices of 8 x 16; scores and values 4 heads of 2 over 5 keys
    assert stack.layer(3, 5).macs == 3 * (2 * 64 + 2 * 32 + 3 * 128) + 2 * 3 * 5 * 8
    assert stack.layer(3, 5).flops == 2 * stack.layer(3, 5).macs
    assert Stack(1, 8, 16, 4, 2, 2, gated=False).layer(1, 0).macs == 2 * 64 + 2 * 32 + 2 * 128
    assert (stack.kv_bytes(2), stack.kv_bytes(4)) == (16, 32)


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_have_the_parameters_of_their_name(name):
    """Names count the language model alone or everything; the weights multiplied by lie around the number."""
    shape = known_shape(name)
    text = shape.text.n_layers * shape.text.layer(1, 0).macs
    whole = text + 2 * shape.lm_head.macs + shape.vision.stack.n_layers * shape.vision.stack.layer(1, 0).macs
    number = name.split("-")[-1]
    size = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
    assert text <= 1.05 * size
    assert size <= 1.1 * whole


# ---- as a budget


@pytest.mark.parametrize("scope", ["llm", "prefill"])
@pytest.mark.parametrize("spec", BUDGETED)
def test_flops_ratio_keeps_the_most_that_it_pays_for(spec, scope):
    model = tiny.model()
    layout, shape = grid_layout(6, 6), shape_from_config(model.config)
    method = build(scaled(spec))
    signals = method.needs(Tower(4, True))

    def cost(n_keep: int) -> int:
        ledger = shape.prefill(64 + n_keep, signals=signals if n_keep < 36 else ())
        if scope == "prefill" and n_keep < 36:
            in_tower = method.space == "tower"
            widths = Widths(32 if in_tower else 64, 32, 8, 32, any(s.kind is Kind.CLS_STATE for s in signals))
            more = method.cost(layout, n_keep, widths) + (shape.project(n_keep) if in_tower else Ops())
            return ledger.prefill.flops + more.flops
        return getattr(ledger, scope).flops

    with tokprune.attach(model, method, flops_ratio=0.8, flops_scope=scope) as attachment:
        model(**tiny.batch(((0,), (1,))))
        kept = [i.n_kept for i in attachment.report.images]
    wanted = max(k for k in range(method.min_keep(layout), 37) if cost(k) <= 0.8 * cost(36))
    if method.count.value == "exact":
        assert kept == [wanted, wanted]
    assert max(kept) <= most_kept(spec, wanted, layout)


def test_flops_ratio_is_solved_beside_the_text_it_is_told():
    """Less text leaves more of the same share for visual tokens: by hand from the ledger."""
    model = tiny.model()
    shape = shape_from_config(model.config)
    for n_text in (4, 64, 100):
        with tokprune.attach(model, "uniform", flops_ratio=0.8, flops_text=n_text) as attachment:
            model(**tiny.batch())
            (n_kept,) = {image.n_kept for image in attachment.report.images}
        whole = shape.read(tiny.N_VISUAL + n_text).llm.flops
        pays = [n for n in range(1, tiny.N_VISUAL + 1) if shape.read(n + n_text).llm.flops <= 0.8 * whole]
        assert n_kept == max(pays)
    for wrong in (-1, 2.5, True):
        with pytest.raises(BudgetError, match="flops_text=64"):
            tokprune.attach(model, "uniform", flops_ratio=0.8, flops_text=wrong)


def test_flops_ratio_of_one_keeps_all():
    model, inputs = tiny.model(), tiny.batch()
    bare = model(**inputs).logits
    for scope in ("llm", "prefill"):
        with tokprune.attach(model, "fopru", flops_ratio=1, flops_scope=scope) as attachment:
            assert torch.equal(model(**inputs).logits, bare)
            assert attachment.report.ledger == attachment.report.ledger_unpruned


def test_flops_ratio_out_of_reach_names_the_least():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    with tokprune.attach(model, "vtc_cls", flops_ratio=0.1), pytest.raises(BudgetError) as error:
        model(**inputs)
    least = float(str(error.value).split("use flops_ratio=")[1].split()[0])
    with tokprune.attach(model, "vtc_cls", flops_ratio=least) as attachment:
        model(**inputs)
        assert [i.n_kept for i in attachment.report.images] == [1]
    with tokprune.attach(model, "vtc_cls", flops_ratio=least - 0.002), pytest.raises(BudgetError):
        model(**inputs)


@pytest.mark.parametrize(
    ("budget", "fix"),
    [
        ({"flops_ratio": 30}, "Did you mean flops_ratio=0.3"),
        ({"flops_ratio": 0}, "not a fraction"),
        ({"flops_ratio": 0.5, "keep_ratio": 0.5}, "exactly one budget"),
        ({"flops_ratio": 0.5, "flops_scope": "all"}, "'llm', 'prefill'"),
        ({}, "flops_ratio=0.3"),
    ],
    ids=str,
)
def test_bad_flops_budgets_say_what_to_type(budget, fix):
    with pytest.raises(BudgetError, match=fix):
        tokprune.attach(tiny.model(), "vtc_cls", **budget)
    with pytest.raises(BudgetError, match="leave"):
        tokprune.attach(tiny.model(), "blind", flops_ratio=0.5)


def test_models_without_a_known_cost_are_said_to_be_so(monkeypatch):
    import tokprune.cost.shapes

    monkeypatch.setitem(shapes.TEXT_FAMILIES, "llama", True)
    monkeypatch.delitem(shapes.TEXT_FAMILIES, "llama")
    model = tiny.fresh_model()
    with pytest.raises(BudgetError, match="not known"):
        tokprune.attach(model, "vtc_cls", flops_ratio=0.5)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.5) as attachment:
        model(**tiny.batch())
        assert attachment.report.ledger is None
        assert "FLOPs" not in str(attachment.report)
        assert "llm_flops" not in attachment.report.to_dict()
    with pytest.raises(UnsupportedModelError, match="llama"):
        shape_from_config(model.config)
    with pytest.raises(UnsupportedModelError, match="llava_next"):
        shape_from_config(transformers.BertConfig())
    with pytest.raises(UnknownNameError, match="Did you mean 'llava-1.5-7b'"):
        known_shape("llava-1.5-7")


# ---- in the report


def test_report_shows_costs_and_the_limit_of_the_tower():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.25) as attachment:
        assert attachment.report.ledger is None  # no call yet
        model(**inputs)
        report = attachment.report
    numbers = report.to_dict()
    assert numbers["llm_flops"] == [report.ledger_unpruned.llm.flops, report.ledger.llm.flops]
    assert numbers["kv_bytes"] == [n * 2 * 2 * 16 * 4 * 5 for n in (report.n_prompt, report.n_prompt_kept)]
    share = 100 * report.ledger.before_llm.flops / report.ledger_unpruned.prefill.flops
    assert share == pytest.approx(100 - 100 * report.ledger_unpruned.llm.flops / report.ledger_unpruned.prefill.flops)
    assert ("vision tower and projector are" in str(report)) == (share >= 10)
    assert "LLM" in str(report)
    assert "KV cache" in str(report)


def test_kv_bytes_equal_the_cache():
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.25) as attachment:
        cache = model(**inputs, use_cache=True).past_key_values
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert attachment.report.ledger.kv_bytes == held


def test_kv_bytes_are_those_of_the_language_model():
    model = tiny.fresh_model()
    model.model.language_model.to(torch.bfloat16)
    model.model.multi_modal_projector.to(torch.bfloat16)
    shape = shape_from_config(model.config)
    with tokprune.attach(model, "uniform", keep_ratio=0.25) as attachment:
        assert attachment.report.bytes_per_value == 2
    assert shape.read(3, bytes_per_value=2).kv_bytes == 3 * 5 * 2 * 2 * 16 * 2


def test_beams_and_batches_count_as_they_ran():
    model, inputs = tiny.model(), tiny.batch(((0,), (1,)))
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        seen = counted(lambda: tiny.generate(model, inputs, num_beams=3, max_new_tokens=1))
        assert attachment.report.ledger.prefill.flops == within_a_percent(seen["all"])
    assert Ops(3) * 2 + Ops(1) == Ops(7)
    assert TOWER.n_layers == 24
