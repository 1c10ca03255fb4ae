"""Laws of attaching: all checks first, everything undone, nothing silent."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import tokprune
from tokprune.core import errors
from tokprune.methods.base import Method, ScoreMethod

METHOD = {"clip": "vtc_cls", "siglip": "fopru"}
HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_state_dict_hooks",
]


def snapshot(model) -> dict:
    """Everything an attachment could leave behind."""
    return {
        "hooks": {n: [dict(getattr(m, h)) for h in HOOKS] for n, m in model.named_modules()},
        "attributes": {n: {k: id(v) for k, v in vars(m).items() if k not in HOOKS} for n, m in model.named_modules()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "config": model.config.to_json_string(),
        "attention": {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")},
        "state": {n: (t.data_ptr(), t.sum().item()) for n, t in model.state_dict().items()},
    }


@pytest.fixture
def warm():
    """A model that has run once: transformers installs hooks of its own on first use."""
    model = tiny.fresh_model()
    with torch.no_grad():
        tiny.generate(model, tiny.batch(), max_new_tokens=2)
    return model


@pytest.mark.parametrize(
    ("kind", "method"),
    [*METHOD.items(), *((k, m) for k in tiny.KINDS[2:] for m in ("visionzip", "cdpruner", "globalcom2"))],
)
@torch.no_grad()
def test_detach_restores_everything(kind, method):
    model = tiny.fresh_model(kind)
    tiny.generate(model, tiny.batch(kind=kind), max_new_tokens=2)
    before, logits = snapshot(model), model(**tiny.batch(kind=kind)).logits
    with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
        during = snapshot(model)
        tiny.generate(model, tiny.batch(kind=kind), max_new_tokens=2)
    assert snapshot(model) == before
    assert torch.equal(model(**tiny.batch(kind=kind)).logits, logits)
    attachment.detach()  # a second time does nothing
    assert snapshot(model) == before
    changed = {n for n in before["hooks"] if before["hooks"][n] != during["hooks"][n]}
    # The witness sees hooks where they are: model, language model, and the tower where a method asks it.
    assert len(changed) >= 2 + (method in (*METHOD.values(), "visionzip"))


@torch.no_grad()
def test_snapshot_sees_a_hook_left_behind(warm):
    before = snapshot(warm)
    warm.model.language_model.register_forward_pre_hook(lambda module, args: None)
    assert snapshot(warm) != before


@torch.no_grad()
def test_exception_inside_the_block_restores_everything(warm):
    before = snapshot(warm)
    with pytest.raises(ZeroDivisionError), tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        warm(**tiny.batch())
        raise ZeroDivisionError
    assert snapshot(warm) == before


@torch.no_grad()
def test_exception_inside_the_model_leaves_it_usable(warm):
    inputs = tiny.batch()
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        want = warm(**inputs).logits
        breaks = warm.model.language_model.layers[2].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            warm(**inputs)
        breaks.remove()
        breaks = warm.model.vision_tower.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            warm(**inputs)
        breaks.remove()
        assert torch.equal(warm(**inputs).logits, want)
        assert len(attachment.report.images) == 3


REFUSED = {
    "unknown method": (dict(method="vtc_csl", keep_ratio=0.3), errors.UnknownNameError, "Did you mean 'vtc_cls'"),
    "unknown option": (
        dict(method="vtc_cls", keep_ratio=0.3, layer=2),
        errors.OptionError,
        "Options: split, start_layer",
    ),
    "option value": (dict(method="fopru:form=softmx", keep_ratio=0.3), errors.OptionError, "'softmax', 'logits'"),
    "option type": (
        dict(method="vtc_cls", keep_ratio=0.3, start_layer="2"),
        errors.OptionError,
        "a whole number or None",
    ),
    "no equals sign": (dict(method="fopru:row", keep_ratio=0.3), errors.OptionError, "name:option=value"),
    "layer": (dict(method="vtc_cls:start_layer=9", keep_ratio=0.3), errors.OptionError, "from -4 to 3"),
    "late layer": (dict(method="vtc_cls:start_layer=3", keep_ratio=0.3), errors.OptionError, "start_layer=2"),
    "no budget": (dict(method="vtc_cls"), errors.BudgetError, "keep_ratio=0.25"),
    "two budgets": (dict(method="vtc_cls", keep_ratio=0.3, keep_tokens=3), errors.BudgetError, "exactly one"),
    "percent": (dict(method="vtc_cls", keep_ratio=25), errors.BudgetError, "keep_ratio=0.25"),
    "zero": (dict(method="vtc_cls", keep_ratio=0), errors.BudgetError, "fraction in"),
    "not a number": (dict(method="vtc_cls", keep_ratio=float("nan")), errors.BudgetError, "fraction in"),
    "fraction of tokens": (dict(method="vtc_cls", keep_tokens=0.5), errors.BudgetError, "keep_ratio="),
    "no tokens": (dict(method="vtc_cls", keep_tokens=0), errors.BudgetError, "blind"),
    "blind with budget": (dict(method="blind", keep_ratio=0.3), errors.BudgetError, "leave keep_ratio"),
    "positions": (dict(method="vtc_cls", keep_ratio=0.3, positions="gaps"), errors.OptionError, "'original'"),
    "two methods": (dict(method=["vtc_cls", "fopru"], keep_ratio=0.3), errors.TokPruneError, "exactly one method"),
    "options with a list": (
        dict(method=["fopru"], keep_ratio=0.3, strategy="row"),
        errors.OptionError,
        "use '",
    ),
    "options with an object": (
        dict(method=tokprune.get_method("fopru"), keep_ratio=0.3, strategy="row"),
        errors.OptionError,
        "method object itself",
    ),
    "not a method": (dict(method=3, keep_ratio=0.3), errors.OptionError, "not int"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_attach_refuses_before_it_touches_the_model(warm, what):
    arguments, error, fix = REFUSED[what]
    before = snapshot(warm)
    with pytest.raises(error, match=fix):
        tokprune.attach(warm, **arguments)
    assert snapshot(warm) == before


def test_missing_signal_names_what_works_here():
    with pytest.raises(errors.MissingSignalError, match="no .CLS. token.*fopru.*vtc_cls:without_cls=received"):
        tokprune.attach(tiny.model("siglip"), "vtc_cls", keep_ratio=0.3)


@torch.no_grad()
def test_option_in_the_message_works():
    model = tiny.model("siglip")
    with tokprune.attach(model, "vtc_cls:without_cls=received", keep_ratio=0.25) as attachment:
        model(**tiny.batch())
        assert attachment.report.to_dict()["n_kept"] == [9, 9, 9]
        assert "received" in str(attachment.report)


@torch.no_grad()
def test_budget_below_a_methods_least_is_refused(warm):
    with tokprune.attach(warm, "fopru:strategy=row", keep_tokens=5):
        with pytest.raises(errors.BudgetError, match="keep_tokens=6"):
            warm(**tiny.batch())


def test_second_attach_is_refused(warm):
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        with pytest.raises(errors.AlreadyAttachedError, match=r"detach\(\) first") as caught:
            tokprune.attach(warm, "fopru", keep_ratio=0.3)
        assert isinstance(caught.value, RuntimeError)
    tokprune.attach(warm, "fopru", keep_ratio=0.3).detach()


@torch.no_grad()
def test_method_objects_lists_and_strings_are_the_same(warm):
    logits = []
    row = tokprune.get_method("fopru", strategy="row")
    for method in ("fopru:strategy=row", ["fopru:strategy=row"], row, [row]):
        with tokprune.attach(warm, method, keep_ratio=0.5):
            logits.append(warm(**tiny.batch()).logits)
    with tokprune.attach(warm, "fopru", keep_ratio=0.5, strategy="row"):
        logits.append(warm(**tiny.batch()).logits)
    assert all(torch.equal(logits[0], other) for other in logits)


def test_copy_and_pickle_of_an_attached_model_raise(warm):
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        for copied in (warm, attachment):
            with pytest.raises(errors.NotCopyableError, match=r"detach\(\) first"):
                copy.deepcopy(copied)
            with pytest.raises(errors.NotCopyableError, match=r"detach\(\) first"):
                pickle.dumps(copied)
    copy.deepcopy(warm)


# ---- models that are refused


class Plain(torch.nn.Module):
    pass


def wrapped_in_parallel():
    return torch.nn.DataParallel(tiny.fresh_model())


def text_only():
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config)


def flex():
    model = tiny.fresh_model()
    model.model.language_model.config._attn_implementation = "flex_attention"
    return model


def unknown_tower():
    model = tiny.fresh_model()
    model.config.vision_config.model_type = "dinov2"
    return model


def pipeline():
    """A real one, of the embedded model."""
    from tokprune.eval.run.runner import Runner

    runner = Runner.load("tiny-llava")
    parts = {"tokenizer": runner.processor.tokenizer, "image_processor": runner.processor.image_processor}
    return transformers.pipeline("image-text-to-text", model=runner.model, processor=runner.processor, **parts)


REFUSED_MODELS = {
    wrapped_in_parallel: "model.module",
    text_only: "Supported: .*internvl, llava",
    Plain: "not a transformers model",
    dict: "takes a transformers model",
    pipeline: "not ImageTextToTextPipeline: pass the model that it holds, as in attach\\(pipe.model",
    flex: "attn_implementation='sdpa'",
    unknown_tower: "clip_vision_model, siglip_vision_model",
}


@pytest.mark.parametrize("make", REFUSED_MODELS, ids=lambda make: make.__name__)
def test_model_is_refused_with_what_to_do_instead(make):
    with pytest.raises(errors.UnsupportedModelError, match=REFUSED_MODELS[make]):
        tokprune.attach(make(), "uniform", keep_ratio=0.3)


def test_fsdp_is_refused():
    class FullyShardedDataParallel(torch.nn.Module):  # the real one needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(errors.UnsupportedModelError, match="FSDP"):
        tokprune.attach(FullyShardedDataParallel(tiny.fresh_model()), "uniform", keep_ratio=0.3)


def test_flash_attention_with_gapped_positions_is_refused():
    model = tiny.fresh_model()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(errors.UnsupportedModelError, match="positions='contiguous'"):
        tokprune.attach(model, "uniform", keep_ratio=0.3, positions="original")
    tokprune.attach(model, "uniform", keep_ratio=0.3).detach()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a deprecated attribute of transformers
@torch.no_grad()
def test_peft_model_is_unwrapped():
    import peft

    model = peft.get_peft_model(tiny.fresh_model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.25) as attachment:
        tiny.generate(model, tiny.batch(), max_new_tokens=2)
        assert attachment.report.to_dict()["n_kept"] == [9, 9, 9]


@torch.no_grad()
def test_model_without_head_works():
    model = tiny.fresh_model().model
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.25) as attachment:
        out = model(**tiny.batch())
        assert out.last_hidden_state.shape[1] == tiny.batch()["input_ids"].shape[1]
        assert attachment.report.to_dict()["n_kept"] == [9, 9, 9]


# ---- never a silent no-op


@torch.no_grad()
def test_features_encoded_elsewhere_raise(warm):
    """Features from before the attachment carry no mark: nothing would be pruned."""
    inputs = tiny.row(tiny.batch(), 0)
    original = type(warm.model).get_image_features
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        warm(**inputs)  # a good call before does not excuse the next
        mine = warm.model.get_image_features
        warm.model.get_image_features = original.__get__(warm.model)
        with pytest.raises(errors.NothingPrunedError, match="not encoded under this attachment"):
            warm(**inputs)
        with attachment.paused():
            warm(**inputs)
        warm.model.get_image_features = mine
        warm(**inputs)


@tiny.pictures_in_chunks
@pytest.mark.parametrize("chunk", [20, 30])
@torch.no_grad()
def test_chunked_prefill_equals_prefill(warm, chunk):
    inputs = tiny.row(tiny.batch(), 1)
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        want = tiny.generate(warm, inputs)
        assert torch.equal(tiny.generate(warm, inputs, prefill_chunk_size=chunk), want)
        with pytest.raises(errors.TokPruneError, match="prefill_chunk_size"):
            tiny.generate(warm, inputs, prefill_chunk_size=5)  # some parts hold dropped tokens alone


@torch.no_grad()
def test_method_that_drops_nothing_raises(warm):
    @dataclass(frozen=True)
    class Lazy(Method):
        def select(self, tokens, n_keep):
            return tokens

    with tokprune.attach(warm, Lazy(), keep_ratio=0.3), pytest.raises(errors.MethodError, match="Lazy"):
        warm(**tiny.batch())


@torch.no_grad()
def test_text_alone_is_no_silent_no_op(warm):
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4).long()}
    bare = warm(**text).logits
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        warm(**tiny.batch())
        assert torch.equal(warm(**text).logits, bare)
        assert attachment.report.images == []
        assert "no image" in str(attachment.report)


@torch.no_grad()
@pytest.mark.parametrize("where", ["vision_tower", "multi_modal_projector"])
def test_nan_from_the_tower_raises(where):
    model = tiny.fresh_model()
    next(getattr(model.model, where).parameters()).fill_(float("nan"))
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        with pytest.raises(errors.BadFeaturesError, match="float32 or bfloat16"):
            model(**tiny.batch())


@torch.no_grad()
def test_nan_row_among_dropped_ones_raises():
    """A single NaN row that the method happens to drop must not pass for a mark."""
    model = tiny.fresh_model()

    def poison(module, args, out):
        out[:, 1] = float("nan")
        return out

    model.model.multi_modal_projector.register_forward_hook(poison)
    with tokprune.attach(model, "uniform", keep_tokens=1) as attachment, pytest.raises(errors.BadFeaturesError):
        model(**tiny.batch())
    assert attachment.label == "uniform"


@torch.no_grad()
def test_cache_that_cannot_be_shortened_is_refused(warm):
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        with pytest.raises(errors.UnsupportedCacheError, match="cache"):
            tiny.generate(warm, tiny.row(tiny.batch(), 0), cache_implementation="offloaded")
    tiny.generate(warm, tiny.row(tiny.batch(), 0), max_new_tokens=2)


@torch.no_grad()
def test_sliding_window_cache_is_refused(warm):
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(5)]
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        with pytest.raises(errors.UnsupportedCacheError, match="sliding_window"):
            warm(**tiny.row(tiny.batch(), 0), **tiny.cached(cache))


@torch.no_grad()
def test_ready_made_mask_is_refused(warm):
    inputs = tiny.row(tiny.batch(), 0)
    n = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        with pytest.raises(errors.UnsupportedCacheError, match="2-D attention_mask"):
            warm(**inputs)


# ---- paused, threads, several models


@torch.no_grad()
def test_paused_is_the_bare_model(warm):
    inputs = tiny.batch()
    logits, tokens = warm(**inputs).logits, tiny.generate(warm, inputs)
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        pruned = warm(**inputs).logits
        with attachment.paused():
            assert torch.equal(warm(**inputs).logits, logits)
            with attachment.paused():
                assert torch.equal(tiny.generate(warm, inputs), tokens)
            assert torch.equal(warm(**inputs).logits, logits)
        with pytest.raises(ZeroDivisionError), attachment.paused():
            raise ZeroDivisionError
        assert torch.equal(warm(**inputs).logits, pruned)
    assert not torch.equal(pruned, logits)


@torch.no_grad()
def test_paused_serves_pruned_caches_and_refuses_marks(warm):
    inputs, new = tiny.row(tiny.batch(), 0), torch.tensor([[5, 6]])
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 2).long()
        cache = warm(**inputs, use_cache=True).past_key_values
        spare = copy.deepcopy(cache)
        want = warm(input_ids=new, **tiny.cached(cache), attention_mask=mask).logits
        with attachment.paused():
            got = warm(input_ids=new, **tiny.cached(spare), attention_mask=mask).logits
        features = warm.model.get_image_features(inputs["pixel_values"])
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        embeds = warm.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == tiny.IMAGE] = features
        with attachment.paused(), pytest.raises(errors.TokPruneError, match="inside paused"):
            warm(inputs_embeds=embeds)
    assert torch.equal(got, want)


@torch.no_grad()
def test_two_attached_models_do_not_talk():
    a, b, inputs = tiny.fresh_model(), tiny.fresh_model("siglip"), tiny.batch()
    with tokprune.attach(a, "vtc_cls", keep_ratio=0.3) as first:
        alone = a(**inputs).logits
        with tokprune.attach(b, "fopru", keep_ratio=0.5) as second:
            b(**inputs)
            assert torch.equal(a(**inputs).logits, alone)
            assert first.report.to_dict()["n_kept"] == [11] * 3
            assert second.report.to_dict()["n_kept"] == [18] * 3
        assert torch.equal(a(**inputs).logits, alone)


@torch.no_grad()
def test_threads_do_not_share_a_call(warm):
    batches = [tiny.batch(seed=s, layout=layout) for s, layout in ((1, ((0,),)), (2, ((1, 2), ())))]
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3) as attachment:
        want = [tiny.generate(warm, b) for b in batches]
        got, counts = [None, None], [None, None]

        def work(i):
            with torch.no_grad():
                for _ in range(5):
                    got[i] = tiny.generate(warm, batches[i])
                    counts[i] = len(attachment.report.images)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert counts == [1, 2]


# ---- seeded randomness


@torch.no_grad()
def test_salts_follow_their_images(warm):
    inputs = tiny.batch(((0,), (1,), (2,)))
    with tokprune.attach(warm, "random", keep_ratio=0.3) as attachment:
        attachment.salts = [7, 8, 9]
        warm(**inputs)
        together = attachment.kept
        for i, salt in enumerate((7, 8, 9)):
            attachment.salts = [salt]
            warm(**tiny.row(inputs, i, ((0,), (1,), (2,))))
            assert torch.equal(attachment.kept[0], together[i])
        attachment.salts = [7, 8]
        with pytest.raises(errors.OptionError, match="one an image"):
            warm(**inputs)
    assert not torch.equal(together[0], together[1])


# ---- methods of other people


@dataclass(frozen=True)
class Norm(ScoreMethod):
    """A method from outside: the longest features."""

    def score(self, tokens):
        return tokens.features.float().norm(dim=-1)


@torch.no_grad()
def test_method_from_outside_works(warm):
    with tokprune.attach(warm, Norm(), keep_ratio=0.25) as attachment:
        warm(**tiny.batch())
        assert attachment.report.to_dict()["n_kept"] == [9, 9, 9]
        assert str(attachment.report).startswith("Norm() keep_ratio=0.25")


def test_entry_point_adds_a_method(tmp_path):
    """A package of someone else's, found through its entry point in a fresh process."""
    (tmp_path / "norms.py").write_text(
        "from dataclasses import dataclass\nfrom tokprune.methods.base import ScoreMethod\n"
        "@dataclass(frozen=True)\nclass Norm(ScoreMethod):\n    power: int = 2\n"
    )
    info = tmp_path / "norms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokprune.methods]\nnorm = norms:Norm\n")
    code = (
        f"import sys, json; sys.path.insert(0, {str(tmp_path)!r}); import tokprune; "
        "print(json.dumps([tokprune.list_methods(), str(tokprune.get_method('norm:power=3'))]))"
    )
    names, label = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "norm" in names
    assert label == "Norm(power=3)"


# ---- found by review, kept from coming back


@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"keep_tokens": 100}])
@torch.no_grad()
def test_keep_all_generates_without_cache(warm, budget):
    want = tiny.generate(warm, tiny.batch(), use_cache=False)
    with tokprune.attach(warm, "vtc_cls", **budget):
        assert torch.equal(tiny.generate(warm, tiny.batch(), use_cache=False), want)


@torch.no_grad()
def test_nan_picture_does_not_spoil_later_calls(warm):
    good, text = tiny.batch(), {"input_ids": torch.tensor([[1, 5, 6]])}
    bad = {**good, "pixel_values": good["pixel_values"] * float("nan")}
    with tokprune.attach(warm, "uniform", keep_ratio=0.3) as attachment:
        want = warm(**good).logits
        for _ in range(2):
            with pytest.raises(errors.BadFeaturesError):
                warm(**bad)
            warm(**text)
            with attachment.paused():
                warm(**good)
            assert torch.equal(warm(**good).logits, want)


@torch.no_grad()
def test_report_is_of_the_last_active_call(warm):
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.25) as attachment:
        with attachment.paused():
            tiny.generate(warm, tiny.batch())
        assert "no call yet" in str(attachment.report)
        tiny.generate(warm, tiny.batch())
        before = attachment.report.to_dict()
        with attachment.paused():
            tiny.generate(warm, tiny.batch(((0,),)))
        assert attachment.report.to_dict() == before


def test_tower_without_cls_and_a_cut_patch_is_refused():
    model = tiny.fresh_model("siglip")
    model.config.vision_feature_select_strategy = "default"
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        with pytest.raises(errors.UnsupportedModelError, match="select_strategy='full'"):
            model(
                **{
                    **tiny.batch(((0,),)),
                    "input_ids": torch.tensor([[1, *[tiny.IMAGE] * 35, 5]]),
                    "attention_mask": None,
                }
            )


@torch.no_grad()
def test_autocast_leaves_scores_alone(warm):
    kept = []
    for enabled in (False, True):
        with tokprune.attach(warm, "vtc_cls", keep_ratio=0.25) as attachment:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                rows = attachment._observer._tap.collect(lambda: warm.model.vision_tower(tiny.pictures(2)))[1]
            kept.append(next(iter(rows.values())))
    assert kept[1].dtype == torch.float32
    assert torch.allclose(kept[0], kept[1], atol=0.05)  # the tower itself ran in half precision


def test_method_object_is_checked_like_a_specification():
    from tokprune.methods.fopru import FoPru

    with pytest.raises(errors.OptionError, match="'rank', 'row'"):
        FoPru(strategy="rnak")


@torch.no_grad()
def test_tuples_carry_no_mark(warm):
    with tokprune.attach(warm, "vtc_cls", keep_ratio=0.3):
        out = warm.model(**tiny.batch(), return_dict=False)
        tensors = [t for part in out for t in (part if isinstance(part, (list, tuple)) else [part])]
        assert not any(t.isnan().any() for t in tensors if isinstance(t, torch.Tensor))
        with pytest.raises(errors.OptionError, match="paused"):
            warm.model.get_image_features(tiny.pictures(1), return_dict=False)


def test_any_real_number_is_a_ratio(warm):
    from fractions import Fraction

    with torch.no_grad(), tokprune.attach(warm, "vtc_cls", keep_ratio=Fraction(1, 4)) as attachment:
        warm(**tiny.batch())
        assert attachment.report.to_dict()["n_kept"] == [9, 9, 9]


def test_the_handle_shows_only_what_is_for_users():
    with tokprune.attach(tiny.fresh_model(), "uniform", keep_ratio=0.5) as attachment:
        shown = {name for name in dir(attachment) if not name.startswith("_")}
    assert shown == {
        *("budget", "detach", "kept", "label", "method", "newlines", "on_call", "paused", "positions", "report"),
        *("salts", "save", "using"),
    }
