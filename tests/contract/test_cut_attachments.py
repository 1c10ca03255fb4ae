"""What attaching a method between decoder layers promises: it leaves nothing behind, and refuses what it cannot do."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
from contract.test_attachment import snapshot

import tokprune
from tokprune.core import errors

SPECS = ["fastv", "pyramiddrop", "sparsevlm", "dart", "sink_filter+fastv", "visual_exit:layer=2", "vtc_cls+fastv"]


def budget(spec, keep=0.3):
    return {"keep_ratio": keep} if tokprune.get_method(spec).takes_budget else {}


def warmed(kind="clip"):
    model = tiny.fresh_model(kind)
    with torch.no_grad():
        tiny.generate(model, tiny.batch(kind=kind), max_new_tokens=2)
    return model


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_detach_restores_everything(kind, spec):
    spec = spec.replace("vtc_cls", "fopru")
    model = warmed(kind)
    before, logits = snapshot(model), model(**tiny.batch(kind=kind)).logits
    with tokprune.attach(model, spec, **budget(spec)):
        during = snapshot(model)
        tiny.generate(model, tiny.batch(kind=kind), max_new_tokens=2)
    assert snapshot(model) == before
    assert torch.equal(model(**tiny.batch(kind=kind)).logits, logits)
    changed = {n for n in before["hooks"] if before["hooks"][n] != during["hooks"][n]}
    layers = {n for n in changed if "language_model.layers." in n}
    assert layers
    assert not any("layers.0" in n and "self_attn" not in n for n in layers)  # hooks from the first cut on


@pytest.mark.parametrize("where", ["layer before the cut", "layer behind the cut", "method"])
@torch.no_grad()
def test_exception_in_the_middle_leaves_the_model_usable(where, monkeypatch):
    model, inputs = warmed(), tiny.batch()
    before = snapshot(model)
    with tokprune.attach(model, "fastv:layer=2", keep_ratio=0.3) as attachment:
        want = model(**inputs).logits
        if where == "method":
            patch = monkeypatch.context()
            with patch as patched:
                patched.setattr(type(attachment.method), "score", lambda self, tokens: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(**inputs)
        else:
            layer = model.model.language_model.layers[1 if "before" in where else 3]
            breaks = layer.mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            breaks.remove()
        assert torch.equal(model(**inputs).logits, want)
        assert len(attachment.report.images) == 3
    assert snapshot(model) == before


REFUSED = {
    "layer": (dict(method="fastv:layer=5", keep_ratio=0.3), errors.OptionError, "from 1 to 4"),
    "layer of a schedule": (
        dict(method="fastv:schedule=pyramid/9", keep_ratio=0.3),
        errors.OptionError,
        "from 1 to 4",
    ),
    "first layer": (dict(method="fastv:layer=0", keep_ratio=0.3), errors.OptionError, "layer=2"),
    "no schedule": (dict(method="fastv:schedule=linear", keep_ratio=0.3), errors.OptionError, "pyramid/8/16/24"),
    "two schedules": (
        dict(method="fastv:layer=2:schedule=cosine", keep_ratio=0.3),
        errors.OptionError,
        "leave one out",
    ),
    "rising counts": (dict(method="fastv", schedule={2: 5, 3: 9}), errors.OptionError, "falling"),
    "uniform": (dict(method="fastv:uniform=2", keep_ratio=0.3), errors.OptionError, "use 0 to 1"),
    "no budget": (dict(method="fastv"), errors.BudgetError, "keep_ratio=0.25"),
    "counts and a budget": (
        dict(method="fastv", schedule={2: 5}, keep_ratio=0.3),
        errors.BudgetError,
        "takes no budget",
    ),
    "no budget for two": (dict(method="vtc_cls+fastv"), errors.BudgetError, r"keep_ratio=\[0.5, 0.5\]"),
    "three budgets for two": (
        dict(method="vtc_cls+fastv", keep_ratio=[0.5, 0.5, 0.5]),
        errors.BudgetError,
        "takes 2 budgets",
    ),
    "a count for two": (dict(method="vtc_cls+fastv", keep_tokens=9), errors.BudgetError, "keep_tokens="),
    "FLOPs for two": (dict(method="vtc_cls+fastv", flops_ratio=0.5), errors.BudgetError, "keep_ratio="),
    "two budgets for one": (dict(method="fastv", keep_ratio=[0.5, 0.5]), errors.BudgetError, ""),
    "two between layers": (dict(method="fastv+dart", keep_ratio=0.3), errors.TokPruneError, "exactly one method"),
    "wrong order": (dict(method="fastv+vtc_cls", keep_ratio=0.3), errors.TokPruneError, r"vtc_cls\+fastv"),
    "filter alone": (dict(method="sink_filter"), errors.TokPruneError, r"sink_filter\+fastv"),
    "filter behind": (
        dict(method=["fastv", "sink_filter"], keep_ratio=0.3),
        errors.TokPruneError,
        "filters come before",
    ),
    "exit with a budget": (dict(method="visual_exit", keep_ratio=0.3), errors.BudgetError, "leave keep_ratio"),
    "replay and a budget": (dict(method="fastv", keep_ratio=0.3, replay=[]), errors.BudgetError, "leave the budget"),
    "replay of a merge": (dict(method="sparsevlm", replay=[]), errors.OptionError, "cannot replay"),
    "replay of nonsense": (dict(method="fastv", replay=["x"]), errors.OptionError, "attachment.kept"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_attach_refuses_before_it_touches_the_model(what):
    model = tiny.model()
    options, error, says = REFUSED[what]
    before = snapshot(model)
    with pytest.raises(error, match=says):
        tokprune.attach(model, **options)
    assert snapshot(model) == before


@torch.no_grad()
def test_calls_that_cannot_be_cut_are_refused():
    model, inputs = tiny.fresh_model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "fastv", keep_ratio=0.3):
        with pytest.raises(tokprune.TokPruneError, match="output_attentions"):
            model(**inputs, output_attentions=True)
        with pytest.raises(tokprune.TokPruneError, match="static"):
            tiny.generate(model, inputs, cache_implementation="static")
        model.train()
        with pytest.raises(tokprune.TokPruneError, match=r"model.eval\(\)"):
            model(**inputs)
        model.eval()
        assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_placeholders_without_pictures_are_no_silent_no_op():
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with tokprune.attach(model, "fastv", keep_ratio=0.3), pytest.raises(errors.NothingPrunedError):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


@torch.no_grad()
def test_replay_of_other_pictures_is_refused():
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "fastv", keep_ratio=0.3) as attachment:
        model(**inputs)
        kept = attachment.kept
    with tokprune.attach(model, "fastv", replay=kept[:2]), pytest.raises(tokprune.TokPruneError, match="2 images"):
        model(**inputs)
    far = [{1: torch.tensor([99])}] * 3
    with tokprune.attach(model, "fastv", replay=far), pytest.raises(tokprune.TokPruneError, match="row 99"):
        model(**inputs)


@torch.no_grad()
def test_batch_of_a_cut_cache_must_not_change():
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "fastv", keep_ratio=0.3):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(tokprune.TokPruneError, match="new cache"):
            model(input_ids=torch.tensor([[5], [6]]), **tiny.cached(cache))


@torch.no_grad()
def test_copied_cache_decodes_the_same():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.row(tiny.batch(dtype=torch.float64), 1)
    token = torch.tensor([[5]])
    with tokprune.attach(model, "pyramiddrop", keep_ratio=0.3):
        cache = model(**inputs, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        one = model(input_ids=token, **tiny.cached(cache)).logits
        assert torch.equal(model(input_ids=token, **tiny.cached(again)).logits, one)


@torch.no_grad()
def test_threads_do_not_share_a_pass():
    model = warmed()
    rows = [tiny.row(tiny.batch(), r) for r in range(3)] * 3
    with tokprune.attach(model, "pyramiddrop", keep_ratio=0.3):
        alone = [tiny.generate(model, row) for row in rows]
        found = [None] * len(rows)

        def work(i):
            with torch.no_grad():
                found[i] = tiny.generate(model, rows[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@torch.no_grad()
def test_text_rows_and_text_batches_are_left_alone():
    model, inputs = tiny.model(), tiny.batch()
    text = {k: inputs[k][2:] for k in ("input_ids", "attention_mask")}
    want = model(**text).logits
    with tokprune.attach(model, "fastv", keep_ratio=0.3):
        assert torch.equal(model(**text).logits, want)


@torch.no_grad()
def test_hidden_states_are_shorter_behind_a_cut():
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "fastv:layer=2", keep_ratio=0.3) as attachment:
        out = model(**inputs, output_hidden_states=True)
        widths = attachment.report.layers
    assert out.logits.shape[1] == inputs["input_ids"].shape[1]
    # What goes into a layer, as transformers notes it: the last one may have its length back.
    assert {h.shape[1] for h in out.hidden_states} <= set(widths)


@torch.no_grad()
def test_report_says_what_every_layer_saw():
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "vtc_cls+pyramiddrop", keep_ratio=[0.5, 0.5]) as attachment:
        model(**inputs)
        report = attachment.report
    shown, numbers = str(report), report.to_dict()
    assert "decoder layers 0: " in shown
    assert "visual tokens in the mean over layers" in shown
    assert numbers["n_given"] == [18]
    assert numbers["n_kept"] == [9]
    assert numbers["layers"] == report.layers
    (kept,) = attachment.kept
    assert [len(kept[layer]) for layer in sorted(kept)] == [18, 14, 11, 9]
    assert all(
        set(kept[b].tolist()) <= set(kept[a].tolist()) for a, b in zip(sorted(kept), sorted(kept)[1:], strict=False)
    )
