"""Laws over whole calls: who merged the features, what runs inside of a call, in which thread, on which modules."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tokprune.integrations.transformers import compat
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

import tokprune
from tokprune.core import errors

SAMPLE = ("uniform", "vtc_cls:without_cls=received", "cdpruner", "tome", "fastv")


def attach(model, spec: str, ratio: float = 0.3):
    return tokprune.attach(model, spec, keep_ratio=ratio)


# ---- who merges the features


def merged_by_hand(model, inputs: dict, kind: str) -> dict:
    """The caller encodes pictures and puts them into the embeddings itself."""
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    rows = torch.cat(list(compat.features_of(model.model.get_image_features(**images))))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[inputs["input_ids"] == tiny.IMAGE] = rows.to(embeds.dtype)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("spec", SAMPLE)
@torch.no_grad()
def test_features_merged_by_hand_are_pruned_the_same_or_refused(kind, spec):
    model, inputs = tiny.model(kind), tiny.batch(((0,), (1,)), kind=kind)
    with attach(model, spec) as attachment:
        want, kept = model(**inputs).logits, attachment.kept
        by_hand = merged_by_hand(model, inputs, kind)
        if spec == "fastv" and kind != "internvl":
            with pytest.raises(errors.NothingPrunedError, match="input_ids"):
                model(**by_hand)
            return
        assert torch.equal(model(**by_hand).logits, want)
        assert str(attachment.kept) == str(kept)


@pytest.mark.parametrize(("kind", "spec"), [("clip", "cdpruner"), ("internvl", "uniform"), ("internvl", "tome")])
@torch.no_grad()
def test_features_changed_by_hand_are_refused(kind, spec):
    model, inputs = tiny.model(kind), tiny.batch(((0,),), kind=kind)
    with attach(model, spec):
        by_hand = merged_by_hand(model, inputs, kind)
        with pytest.raises(errors.NothingPrunedError, match=r"paused\(\)"):
            model(**{**by_hand, "inputs_embeds": by_hand["inputs_embeds"] * 1.5})


@pytest.mark.parametrize("spec", ["cdpruner", "uniform"])
@torch.no_grad()
def test_text_between_encoding_and_use_is_no_picture(spec):
    model, inputs = tiny.model(), tiny.batch(((0,),))
    text = torch.tensor([[5, 6, 7]])
    bare = model(input_ids=text).logits
    with tokprune.attach(model, spec, keep_ratio=0.3) as attachment:
        want, kept = model(**inputs).logits, str(attachment.kept)
        by_hand = merged_by_hand(model, inputs, "clip")
        assert torch.equal(model(input_ids=text).logits, bare)
        assert attachment.kept == []
        assert torch.equal(model(**by_hand).logits, want)
        assert str(attachment.kept) == kept


# ---- scoring calls and drafts

ASKS = [0, 1, 5, torch.tensor([-1, -2])]


@pytest.mark.parametrize("asks", ASKS, ids=str)
@pytest.mark.parametrize("spec", SAMPLE)
@pytest.mark.parametrize("with_cache", [False, True])
@torch.no_grad()
def test_a_scoring_call_keeps_what_any_other_call_keeps(spec, asks, with_cache):
    model, inputs = tiny.model(), tiny.batch(((0,), (1, 2)))
    with attach(model, spec) as attachment:
        full = model(**inputs).logits
        kept = attachment.kept
        cache = tiny.cached(DynamicCache()) if with_cache else {}
        asked = model(**inputs, **cache, logits_to_keep=asks, use_cache=with_cache).logits
        assert str(attachment.kept) == str(kept)
    wanted = full[:, slice(-asks, None) if isinstance(asks, int) else asks]
    torch.testing.assert_close(asked, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["cdpruner", "fastv", "sparsevlm:recycle=false"])
@torch.no_grad()
def test_drafts_of_generate_are_no_prompt(spec):
    """Prompt lookup proposes tokens in its first pass; a number of logits that the user asks for is no draft."""
    model = tiny.model(dtype=torch.float64)
    ids = [1, 5, 6, 7, *[tiny.IMAGE] * 36, 5, 6, 7, 8, 5, 6]
    inputs = tiny.collate([ids], [0], torch.float64)
    with attach(model, spec) as attachment:
        want, kept = tiny.generate(model, inputs), str(attachment.kept)
        assert torch.equal(tiny.generate(model, inputs, prompt_lookup_num_tokens=3), want)
        assert str(attachment.kept) == kept
        assert torch.equal(tiny.generate(model, inputs, logits_to_keep=4), want)
        assert str(attachment.kept) == kept


# ---- modules that were replaced


def add_lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))


def replaced_layer(model):
    model.model.language_model.layers[2] = torch.nn.Identity()


def replaced_decoder(model):
    model.model.language_model = tiny.fresh_model().model.language_model


def cleared_hooks(model):
    model.model.language_model._forward_pre_hooks.clear()


def one_layer_more(model):
    model.model.language_model.layers.append(model.model.language_model.layers[0])


CHANGES = {
    "lora": (add_lora, ("vtc_cls", "fastv")),
    "a layer": (replaced_layer, ("fastv",)),
    "a layer more": (one_layer_more, ("fastv",)),
    "language model": (replaced_decoder, ("uniform", "vtc_cls", "fastv")),
    "hooks": (cleared_hooks, ("uniform", "vtc_cls", "fastv")),
}


@pytest.mark.parametrize(("change", "spec"), [(c, s) for c, (_, specs) in CHANGES.items() for s in specs])
@torch.no_grad()
def test_modules_replaced_after_attach_are_refused(change, spec):
    model = tiny.fresh_model()
    with tokprune.attach(model, spec, keep_ratio=0.3):
        model(**tiny.batch())
        CHANGES[change][0](model)
        with pytest.raises(errors.ModelChangedError, match=r"detach\(\)"):
            model(**tiny.batch())


@torch.no_grad()
def test_merged_lora_is_refused_and_attaching_again_works():
    model = add_lora(tiny.fresh_model()).eval()
    attachment = tokprune.attach(model, "vtc_cls", keep_ratio=0.3)
    want = model(**tiny.batch()).logits
    merged = model.merge_and_unload()
    with pytest.raises(errors.ModelChangedError, match=r"detach\(\)"):
        merged(**tiny.batch())
    attachment.detach()
    with tokprune.attach(merged, "vtc_cls", keep_ratio=0.3):
        torch.testing.assert_close(merged(**tiny.batch()).logits, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_a_method_does_not_hook_may_be_replaced():
    model = tiny.fresh_model()
    with tokprune.attach(model, "uniform", keep_ratio=0.3) as attachment:
        adapted = add_lora(model).eval()
        adapted(**tiny.batch())
        assert [len(k) for k in attachment.kept] == [11] * 3


# ---- calls inside of calls

PLACES = {
    "a decoder layer": lambda model: model.model.language_model.layers[2],
    "the language model": lambda model: model.model.language_model,
    "the vision tower": lambda model: model.model.vision_tower,
    "the head": lambda model: model.lm_head,
}


def called_within(model, place: str, call, when: str = "before"):
    """Runs `call` once at a place of the next pass."""
    module, ran = PLACES[place](model), []

    def hook(*_):
        if not ran:
            ran.append(True)
            call()

    register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    return register(hook), ran


def ways_to_call(model):
    other = tiny.batch(((3,), ()), seed=11)
    return {
        "forward": lambda: model(**other),
        "text": lambda: model(input_ids=torch.tensor([[5, 6]])),
        "generate": lambda: tiny.generate(model, other, max_new_tokens=3),
        "encode": lambda: model.model.get_image_features(other["pixel_values"]),
        "language model": lambda: model.model.language_model(inputs_embeds=torch.zeros(1, 4, 64)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["uniform", "vtc_cls", "cdpruner", "visionzip", "fastv", "vtc_cls+fastv"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["forward", "text", "generate", "encode", "language model"])
@torch.no_grad()
def test_a_nested_call_changes_nothing_for_the_outer_one(spec, place, way):
    model, inputs = tiny.fresh_model(), tiny.batch()
    with attach(model, spec) as attachment:
        want, tokens = model(**inputs).logits, tiny.generate(model, inputs)
        kept, report = str(attachment.kept), str(attachment.report)
        for when in ("before", "after"):
            handle, ran = called_within(model, place, ways_to_call(model)[way], when)
            assert torch.equal(model(**inputs).logits, want)
            assert ran
            assert (str(attachment.kept), str(attachment.report)) == (kept, report)
            ran.clear()
            assert torch.equal(tiny.generate(model, inputs), tokens)
            assert ran
            assert str(attachment.kept) == kept
            handle.remove()


@torch.no_grad()
def test_a_nested_call_is_pruned_itself():
    model, inputs, other = tiny.fresh_model(), tiny.batch(), tiny.batch(((3,), ()), seed=11)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        want, got = model(**other).logits, []
        handle, _ = called_within(model, "a decoder layer", lambda: got.append(model(**other).logits))
        model(**inputs)
        handle.remove()
        assert torch.equal(got[0], want)


class Stop(BaseException):
    """What Ctrl-C raises is no Exception, either."""


@pytest.mark.parametrize("error", [ZeroDivisionError, Stop])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spec", ["vtc_cls", "cdpruner", "fastv"])
@torch.no_grad()
def test_a_call_that_was_broken_off_leaves_no_trace(spec, place, error):
    def fail():
        raise error

    model, inputs = tiny.fresh_model(), tiny.batch()
    with attach(model, spec) as attachment:
        want, report = model(**inputs).logits, str(attachment.report)
        handle, _ = called_within(model, place, fail)
        with pytest.raises(error):
            tiny.generate(model, inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, want)
        assert str(attachment.report) == report
        text = torch.tensor([[5, 6]])
        model(input_ids=text)
        assert attachment.report.images == []


# ---- whose call it is


class Probe(LogitsProcessor):
    """Asks the model something else at every step, as guidance does."""

    def __init__(self, ask):
        self.ask = ask

    def __call__(self, input_ids, scores):
        self.ask()
        return scores


@pytest.mark.parametrize("spec", ["vtc_cls", "cdpruner", "fastv"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_guidance_does_not_overwrite_the_report(spec, use_cache):
    """guidance_scale runs the model on text alone between the steps of generate."""
    model, inputs = tiny.model(), tiny.batch(((0,),))
    with attach(model, spec) as attachment:
        tiny.generate(model, inputs, max_new_tokens=3, use_cache=use_cache)
        kept = str(attachment.kept)
        columns = attachment.report.prefills[0].n_inner
        tiny.generate(model, inputs, max_new_tokens=3, guidance_scale=1.5, use_cache=use_cache)
        assert str(attachment.kept) == kept
        assert attachment.report.images
        assert attachment.report.prefills[0].n_inner >= columns


@pytest.mark.parametrize("way", ["forward", "text", "generate"])
@torch.no_grad()
def test_probes_between_steps_do_not_overwrite_the_report(way):
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        want, report = tiny.generate(model, inputs), str(attachment.report)
        probe = LogitsProcessorList([Probe(ways_to_call(model)[way])])
        assert torch.equal(tiny.generate(model, inputs, logits_processor=probe), want)
        assert str(attachment.report) == report
        tiny.generate(model, tiny.batch(((0,),)))
        assert len(attachment.report.images) == 1


@torch.no_grad()
def test_text_alone_after_pictures_has_a_report_of_its_own():
    model, text = tiny.model(), {"input_ids": torch.tensor([[1, 5, 6]])}
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        for run in (lambda x: model(**x), lambda x: tiny.generate(model, x)):
            run(tiny.batch())
            assert len(attachment.report.images) == 3
            run(text)
            assert attachment.report.images == []


class Words:
    """A tokenizer as far as a streamer asks for one."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("spec", ["vtc_cls", "fastv"])
def test_a_streaming_thread_is_seen_from_the_holder(spec):
    model, inputs = tiny.model(), tiny.batch(((0,),))
    with attach(model, spec) as attachment:
        with torch.no_grad():
            tiny.generate(model, inputs, max_new_tokens=4)
            report, kept = str(attachment.report), str(attachment.kept)
            tiny.generate(model, tiny.batch(((1, 2),)))

        def stream() -> str:
            streamer = TextIteratorStreamer(Words())
            options = dict(max_new_tokens=4, do_sample=False, streamer=streamer, suppress_tokens=tiny.SUPPRESSED)
            thread = threading.Thread(target=model.generate, kwargs=inputs | options)
            thread.start()
            said = "".join(streamer)
            thread.join()
            return said

        pruned = stream()
        assert (str(attachment.report), str(attachment.kept)) == (report, kept)
        with attachment.paused():
            bare = stream()
    assert bare == stream()
    assert bare != pruned


def in_new_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@torch.no_grad()
def test_which_threads_a_pause_counts_for():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    bare = model(**inputs).logits

    def is_bare() -> bool:
        with torch.no_grad():
            return torch.equal(model(**inputs).logits, bare)

    go, done, seen = threading.Event(), threading.Event(), []

    def older():
        go.wait(60)
        seen.append(is_bare())
        done.set()

    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        thread = threading.Thread(target=older)
        thread.start()
        with attachment.paused():
            assert in_new_thread(is_bare)
            assert asyncio.run(asyncio.to_thread(is_bare))
            go.set()
            assert done.wait(60)
        thread.join()
        assert seen == [False]  # it was there before, and serves somebody else
        assert not in_new_thread(is_bare)

        def elsewhere() -> list[bool]:
            with attachment.paused():
                return [is_bare(), in_new_thread(is_bare)]

        assert in_new_thread(elsewhere) == [True, False]
        assert not is_bare()


# ---- padding in a plain forward


PADDED = ["uniform", "vtc_cls", "cdpruner", "visionzip", "tome", "fastv", "dart", "dart:text=all", "sparsevlm"]
PADDED += ["pyramiddrop", "vtc_cls+dart", "vtc_cls+fastv", "visual_exit:threshold=0.9:patience=1"]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", PADDED)
@torch.no_grad()
def test_rows_of_a_padded_forward_equal_the_rows_alone(spec, side, attn):
    """Without position_ids, as a plain forward is called; also in float64 with eager attention."""
    model = tiny.model(attn=attn, dtype=torch.float64)
    left = tiny.batch(dtype=torch.float64)
    rows, inputs = [tiny.row(left, r) for r in range(3)], left
    if side == "right":
        n = left["input_ids"].shape[1]
        pad = {k: [torch.nn.functional.pad(r[k], (0, n - r[k].shape[1])) for r in rows] for k in ("input_ids",)}
        inputs = left | {"input_ids": torch.cat(pad["input_ids"])}
        lengths = torch.tensor([r["input_ids"].shape[1] for r in rows])
        inputs["attention_mask"] = (torch.arange(n) < lengths[:, None]).long()
    budget = {} if "visual_exit" in spec else {"keep_ratio": 0.3}
    with tokprune.attach(model, spec, **budget) as attachment:
        together, kept = model(**inputs).logits, attachment.kept
        alone = []
        for r, row in enumerate(rows):
            logits = model(**row).logits[0]
            alone += attachment.kept
            valid = inputs["attention_mask"][r].bool()
            assert (together[r, valid] - logits).abs().max() < 1e-4, r
    assert str(kept) == str(alone)


@pytest.mark.parametrize("spec", ["dart", "fastv", "vtc_cls"])
@torch.no_grad()
def test_second_turns_of_a_padded_forward_equal_the_rows_alone(spec):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.batch(((0,), (1, 2)), dtype=torch.float64)
    picture = tiny.pictures(1, seed=5).double()
    ids = torch.tensor([[8] + [tiny.IMAGE] * 36 + [9, 10]])
    with attach(model, spec) as attachment:

        def turns(first: dict, n_rows: int):
            cache = compat.cache_of(model(**first, use_cache=True))
            mask = torch.cat([first["attention_mask"], torch.ones(n_rows, 39).long()], 1)
            again = ids.repeat(n_rows, 1)
            out = model(
                input_ids=again, pixel_values=picture.repeat(n_rows, 1, 1, 1), attention_mask=mask, **tiny.cached(cache)
            )
            return out.logits, attachment.kept

        together, kept = turns(inputs, 2)
        for r in range(2):
            alone, own = turns(tiny.row(inputs, r, ((0,), (1, 2))), 1)
            assert (together[r] - alone[0]).abs().max() < 1e-4
            assert str(kept[r]) == str(own[0])


# ---- second turns of generate

# generate() of transformers 4 takes a later turn whole, or fails on the bare model, too.
WAYS = ("all ids", "all ids and a mask", "new ids", "last token and new ids")[: 4 if tiny.RELEASE.major > 4 else 2]


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", ["uniform", "vtc_cls", "cdpruner", "fastv", "vtc_cls+fastv", "none"])
@torch.no_grad()
def test_a_second_turn_by_every_way_that_the_bare_model_takes(spec, way, batched, positions):
    model = tiny.model(dtype=torch.float64)
    layout = ((0,), (1, 2)) if batched else ((0,),)
    first = tiny.batch(layout, dtype=torch.float64)
    options = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[*tiny.SUPPRESSED, tiny.PAD])
    new = torch.tensor([[5, 6, 7, 8]]).repeat(len(layout), 1)
    whole = {k: v for k, v in first.items() if k not in ("input_ids", "attention_mask")} | options
    with attach(model, spec) if spec != "none" else contextlib.nullcontext() as attachment:
        out = model.generate(**first, **options, return_dict_in_generate=True)
        kept = attachment and attachment.kept
        ids = torch.cat([out.sequences, new], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(len(layout), ids.shape[1]).long()], 1)[:, : ids.shape[1]]
        given = {"input_ids": ids}
        if way != "all ids" or batched:
            given["attention_mask"] = mask
        if "new" in way:
            held = out.sequences.shape[1] - 1 if "last" in way else out.sequences.shape[1]
            given["input_ids"] = ids[:, held:]
        cache = compat.cache_of(out)
        if way == "new ids":  # the last token is fed by hand, as chat loops do
            last = out.sequences.shape[1]
            place = mask[:, :last].sum(1, keepdim=True) - 1
            token = {"input_ids": out.sequences[:, -1:], "attention_mask": mask[:, :last], "position_ids": place}
            step = model(**token, **tiny.cached(cache))
            cache = compat.cache_of(step)
        got = model.generate(**given, **tiny.cached(cache), **options)
    # Text-guided methods choose by the text that was there in the first turn.
    with tokprune.attach(model, spec, replay=kept) if spec != "none" else contextlib.nullcontext():
        want = model.generate(input_ids=ids, attention_mask=mask, **whole)
    assert torch.equal(got[:, given["input_ids"].shape[1] :], want[:, ids.shape[1] :])


@tiny.later_pictures
@pytest.mark.parametrize("kind", ["clip", "internvl"])
@pytest.mark.parametrize("spec", ["uniform", "cdpruner", "fastv"])
@torch.no_grad()
def test_a_second_turn_with_another_picture_may_pass_all_ids(kind, spec):
    """The processor makes the whole conversation anew; only the new picture's pixels come with it."""
    model = tiny.model(kind, dtype=torch.float64)
    first = tiny.batch(((0,),), dtype=torch.float64, kind=kind)
    options = dict(max_new_tokens=4, do_sample=False, suppress_tokens=tiny.SUPPRESSED)
    picture = tiny.pixels(kind, [[1]], torch.float64)
    new = torch.tensor([[5, *[tiny.IMAGE] * tiny.n_rows(kind, 1), 6, 7]])
    with attach(model, spec) as attachment:
        out = model.generate(**first, **options, return_dict_in_generate=True)
        kept = attachment.kept
        ids = torch.cat([out.sequences, new], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = model.generate(**given, **picture, **tiny.cached(compat.cache_of(out)), **options)
        kept += attachment.kept
    both = torch.cat([first["pixel_values"], picture["pixel_values"]])
    with tokprune.attach(model, spec, replay=kept):
        assert torch.equal(got, model.generate(**given, pixel_values=both, **options))


@torch.no_grad()
def test_logits_of_a_prompt_that_is_fed_again_have_the_users_length():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.row(tiny.batch(dtype=torch.float64), 0)
    more = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        whole = model(**{**inputs, "input_ids": more, "attention_mask": torch.ones_like(more)}).logits
        cache = compat.cache_of(model(**inputs, use_cache=True))
        n = cache.get_seq_length()
        out = model(input_ids=more[:, n:], attention_mask=torch.ones_like(more), **tiny.cached(cache))
        assert out.logits.shape[1] == more.shape[1] - n
        assert (out.logits[:, -3:] - whole[:, -3:]).abs().max() < 1e-9
        assert out.logits[:, :-3].isnan().all()
        assert cache.get_seq_length() == n + 3


@torch.no_grad()
def test_a_prompt_fed_again_in_part_is_refused_and_the_advice_works():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.row(tiny.batch(dtype=torch.float64), 0)
    new = torch.tensor([[5, 6, 7]])
    more = torch.cat([inputs["input_ids"], new], 1)
    mask = torch.ones_like(more)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        want = model(**{**inputs, "input_ids": more, "attention_mask": mask}).logits[:, -3:]
        cache = compat.cache_of(model(**inputs, use_cache=True))
        with pytest.raises(tokprune.TokPruneError, match="only the new input_ids"):
            model(input_ids=more[:, 4:], attention_mask=mask, **tiny.cached(cache))
        got = model(input_ids=new, attention_mask=mask, **tiny.cached(cache)).logits
    assert (got - want).abs().max() < 1e-9


# ---- caches that are refused

CACHES = {
    "static": ({"cache_implementation": "static"}, "static"),
    "offloaded": ({"cache_implementation": "offloaded"}, "offloaded"),
    "offloaded_static": ({"cache_implementation": "offloaded_static"}, "static|offloaded"),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("spec", ["vtc_cls", "cdpruner", "fastv"])
@torch.no_grad()
def test_caches_that_cannot_be_pruned_are_refused_by_their_cause(spec, cache):
    options, word = CACHES[cache]
    if cache == "static" and spec != "fastv" and compat.is_at_least(compat.STATIC_SINCE):
        pytest.skip("served: tests/contract/test_static.py")
    model, inputs = tiny.fresh_model(), tiny.row(tiny.batch(), 0)
    if "offloaded" in cache and not torch.cuda.is_available():
        options = {}
        made = DynamicCache()
        made.offloading = True
        options = tiny.cached(made)
        word = "offloaded"
    with attach(model, spec):
        with pytest.raises(errors.UnsupportedCacheError, match=word) as refused:
            tiny.generate(model, inputs, **options)
        assert "leave cache_implementation" in str(refused.value)
        assert "cache_implementation='offloaded'" not in str(refused.value) or "offloaded" in word
        tiny.generate(model, inputs)
