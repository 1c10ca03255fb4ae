"""What tokprune takes from transformers without a promise; a failure says in a sentence what a release changed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import warnings

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from tokprune.integrations.transformers import compat, families
from transformers import DynamicCache

import tokprune
from tokprune.cli import doctor
from tokprune.core.errors import UnsupportedCacheError, UnsupportedModelError

RELEASE = Version(transformers.__version__)


def changed(what: str) -> str:
    return f"transformers {RELEASE} changed {what}; mend tokprune/compat.py"


def seen_keywords(module) -> tuple[list[dict], object]:
    """Keywords of every call of a module, and the hook that collects them."""
    seen: list[dict] = []
    return seen, module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)


# ---- keywords of calls


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_the_language_model_and_its_layers_get_the_keywords_that_hooks_read(kind):
    model = tiny.fresh_model(kind)
    of_model, of_layer = seen_keywords(model.model.language_model), seen_keywords(model.model.language_model.layers[0])
    tiny.generate(model, tiny.batch(kind=kind), max_new_tokens=2)
    for kwargs in of_model[0]:
        assert isinstance(compat.cache_of(kwargs), DynamicCache), changed("the keyword of the cache")
        assert {"inputs_embeds", "attention_mask", "position_ids"} <= set(kwargs), changed("the language model's call")
    for kwargs in of_layer[0]:
        assert {"attention_mask", "position_embeddings"} <= set(kwargs), changed("the keywords of decoder layers")
        cos, sin = kwargs["position_embeddings"]
        assert cos.shape == sin.shape, changed("position_embeddings")
        assert cos.ndim == 3, changed("the shape of position_embeddings")


@pytest.mark.parametrize("method", ["vtc_cls", "fastv"])
@torch.no_grad()
def test_a_cache_is_found_under_its_old_and_its_new_name(method):
    model = tiny.fresh_model()
    first = tiny.row(tiny.batch(), 0)
    mask = torch.ones(1, first["input_ids"].shape[1] + 3).long()

    def two_turns(keyword: str):
        cache = DynamicCache()
        model(**first, **{keyword: cache}, use_cache=True)
        logits = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mask, **{keyword: cache}).logits
        return logits, compat.cached_keys(cache, 4).shape[2]

    with tokprune.attach(model, method, keep_ratio=0.3), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        (want, n), (got, n_again) = two_turns("past_key_values"), two_turns(tiny.CACHE)
    assert n == n_again < mask.shape[1]
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_cache_is_cut_back_by_a_negative_number_and_holds_keys_by_layer():
    model = tiny.fresh_model()
    cache = compat.cache_of(model(**tiny.row(tiny.batch(), 0), use_cache=True))
    n = compat.past_length(cache)
    assert compat.cached_keys(cache, 0).shape[2] == n, changed("`layers[i].keys` of a cache")
    compat.crop_cache(cache, 3)
    assert compat.past_length(cache) == n - 3, changed("DynamicCache.crop with a negative number")
    compat.crop_layer(cache, 1, n - 5)
    assert compat.cached_keys(cache, 1).shape[2] == n - 5, changed("DynamicLayer.crop with a negative number")
    compat.crop_layer(cache, 1, n)
    assert compat.cached_keys(cache, 1).shape[2] == n - 5


def test_a_cache_can_carry_a_note():
    cache = DynamicCache()
    setattr(cache, compat.LAYERS_STATE, 1)
    assert getattr(cache, compat.LAYERS_STATE) == 1, changed("caches: they take no attributes")


# ---- encoded pictures


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_encode_functions_return_features_and_generate_reads_their_signature(kind):
    model = tiny.fresh_model(kind)
    out = model.model.get_image_features(**tiny.pixels(kind, [[0]]))
    features = compat.features_of(out)
    assert all(f.ndim == 2 for f in features), changed("what get_image_features returns: rows of every picture")
    twin = compat.with_features(out, features)
    assert twin is not out or isinstance(out, (list, tuple, torch.Tensor))
    if RELEASE.major >= 5:
        assert "pixel_values" in inspect.signature(model.model.get_image_features).parameters


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("part", ["head", "base"])
@pytest.mark.parametrize("as_tuple", [False, True])
@torch.no_grad()
def test_no_output_carries_a_mark_and_what_was_passed_keeps_its_marks(kind, part, as_tuple):
    model = tiny.fresh_model(kind)
    inputs = tiny.row(tiny.batch(kind=kind), 0, kind=kind)
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        if "mm_encoder_outputs" in inspect.signature(model.forward).parameters and part == "head":
            names = ("pixel_values", "image_sizes", "batch_num_images")
            given = model.model.get_image_features(**{n: inputs.pop(n) for n in names if n in inputs})
            inputs["mm_encoder_outputs"] = {"image": given}
        out = (model if part == "head" else model.model)(**inputs, return_dict=not as_tuple)
    tensors = list(leaves(out))
    assert len(tensors) > 1
    assert not any(t.isnan().any() for t in tensors)
    if "mm_encoder_outputs" in inputs and kind != "internvl":  # its pictures are marked when the prompt is known
        assert any(f.isnan().any() for f in compat.features_of(given))


def leaves(value):
    """Tensors in nested outputs, caches left out."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    elif hasattr(value, "to_tuple"):
        yield from leaves(value.to_tuple())


@torch.no_grad()
def test_features_stand_in_the_output_under_a_known_name():
    out = tiny.fresh_model()(**tiny.row(tiny.batch(), 0))
    fields = [f for f in (*compat.FEATURE_FIELDS, *compat.ENCODED_FIELDS) if f in out]
    assert fields, changed("the output's field with the features of pictures")


# ---- modules


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_attention_modules_turn_queries_by_their_own_function(kind):
    model = tiny.fresh_model(kind)
    attention = model.model.language_model.layers[0].self_attn
    assert compat.has_rotary(attention), changed("apply_rotary_pos_emb")
    x, angle = torch.randn(1, 2, 3, 16), torch.zeros(1, 3, 16)
    assert torch.equal(compat.rotate(attention, x, angle.cos(), angle.sin()), x), changed("apply_rotary_pos_emb")
    assert compat.attention_implementation(model.model.language_model) == "sdpa", changed("_attn_implementation")
    assert not compat.has_rotary(torch.nn.Linear(2, 2))


@pytest.mark.skipif(RELEASE.release < (5, 18), reason="attach refuses this family there")
@torch.no_grad()
def test_a_later_turn_under_m_rope_is_numbered_by_deltas_from_its_columns():
    model = tiny.fresh_model("qwen2_vl")
    inputs = tiny.row(tiny.batch(kind="qwen2_vl"), 0, kind="qwen2_vl")
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    n = out.sequences.shape[1]
    ids = torch.cat([out.sequences, torch.tensor([[5, 6]])], 1)
    again = tiny.typed("qwen2_vl", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    seen, hook = seen_keywords(model.model.language_model)
    tiny.generate(model, again, max_new_tokens=1, **tiny.cached(out[tiny.CACHE]))
    hook.remove()
    positions, deltas = seen[0]["position_ids"], compat.position_deltas(model.model)
    assert positions.shape[:2] == (1, 1), changed("the positions of a later turn")
    assert deltas.shape == (1, 1), changed("rope_deltas")
    assert (positions - deltas)[0, 0].tolist() == [n - 1, n, n + 1], changed("rope_deltas")


@pytest.mark.skipif(RELEASE.release < (5, 18), reason="attach refuses this family there")
@torch.no_grad()
def test_layers_with_linear_attention_have_a_cache_of_their_own_that_cannot_be_cut():
    model, inputs = tiny.fresh_model("qwen3_5"), tiny.row(tiny.batch(kind="qwen3_5"), 0, kind="qwen3_5")
    cache = model(**inputs, use_cache=True)[tiny.CACHE]
    names = {type(layer).__name__ for layer in cache.layers}
    assert names == {"DynamicLayer", "LinearAttentionLayer"}, changed("the layers of a cache with linear attention")
    assert compat.past_length(cache) == inputs["input_ids"].shape[1], changed("the length of such a cache")
    with pytest.raises(UnsupportedCacheError, match="taken back"):
        compat.crop_cache(cache, 1)


@pytest.mark.parametrize("kind", tiny.TILED)
def test_crops_and_packing_of_any_resolution(kind):
    base = tiny.fresh_model(kind).model
    assert compat.anyres_grid(base, (40, 20)) == (2, 1), changed("get_anyres_image_grid_shape")
    assert compat.n_anyres_crops(base, (40, 20)) == 3, changed("image_size_to_num_patches")
    crops, newline = torch.randn(3, 36, 4), torch.full((4,), 7.0)
    (packed,) = compat.pack_image_features(base, [crops], torch.tensor([[40, 20]]), newline, "anyres_max_9")
    assert packed.shape[1] == 4, changed("pack_image_features")
    assert (packed == newline).all(1).sum() in (12, 13), changed("newlines of pack_image_features")


@pytest.mark.skipif(tiny.RELEASE.release < (5, 18), reason="attach refuses these families there")
def test_a_pixtral_tower_says_where_pictures_end_and_how_it_turns_queries():
    tower, seen = tiny.fresh_model("mistral3").model.vision_tower, {}
    attention = tower.transformer.layers[0].attention
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    given = tiny.pixels("mistral3", [[0, 1]])
    tower(given["pixel_values"], image_sizes=given["image_sizes"])
    assert compat.segments_of_pixtral(seen) == [4 * 8, 6 * 10], changed("the mask of a Pixtral tower")
    lengths = torch.tensor([0, 3, 7])
    assert compat.segments_of_pixtral({"cu_seq_lens_q": lengths}) == [3, 4]
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        compat.segments_of_pixtral({"attention_mask": None})
    q = torch.randn(1, 4, 92, 8)
    turned, _ = compat.rotate_pixtral(attention, q, q, seen)
    assert torch.equal(turned[:, :, 0], q[:, :, 0]), changed("apply_rotary_pos_emb")  # at (0, 0)
    assert (turned[:, :, 1] - q[:, :, 1]).abs().max() > 1e-3, changed("apply_rotary_pos_emb")


# ---- releases


def test_releases_newer_than_the_newest_tested_one_are_told():
    major, minor = map(int, compat.NEWEST.split(".")[:2])
    for release, newer in {
        compat.OLDEST: False,
        compat.NEWEST: False,
        f"{major}.{minor}.9": False,
        f"{major}.{minor + 1}.0": True,
        f"{major}.{minor + 1}.0.dev0": True,
        f"{major + 1}.0.0rc1": True,
    }.items():
        assert compat.is_newer_than_tested(release) is newer


def test_attach_warns_once_of_a_release_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(compat, "NEWEST", "4.57.0")
    monkeypatch.setattr(compat, "transformers_release", lambda: "5.99.0")
    compat.warn_if_untested.cache_clear()
    model = tiny.fresh_model()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            tokprune.attach(model, "uniform", keep_ratio=0.5).detach()
    assert len(heard) == 1
    assert "tokprune doctor" in str(heard[0].message)
    assert heard[0].filename == __file__
    assert "\n" not in str(heard[0].message)
    compat.warn_if_untested.cache_clear()


def test_doctor_names_the_tested_releases(monkeypatch):
    found = doctor.versions()
    assert compat.OLDEST in found["tested on"]
    assert compat.NEWEST in found["tested on"]
    monkeypatch.setattr(compat, "NEWEST", "4.57.0")
    assert "newer" in doctor.versions()["tested on"] or Version("4.58") > RELEASE


def test_doctor_says_what_a_broken_torchvision_does(tmp_path):
    """A package that is there and cannot be imported, as a CUDA build is beside a CPU torch."""
    package, about = tmp_path / "torchvision", tmp_path / "torchvision-9.9.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tokprune.cli import doctor; print(doctor.versions())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "operator torchvision::nms does not exist" in done.stdout
    assert "pip uninstall torchvision" in done.stdout


def test_a_family_says_which_release_it_needs(monkeypatch):
    monkeypatch.setattr(tiny.family("gemma3"), "oldest", "99.0")
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="gemma3"))
    with pytest.raises(UnsupportedModelError, match=r"99\.0 or newer.*pip install -U transformers"):
        families._checked_release(families.FAMILIES.load(model.config.model_type))


# ---- towers that run on a part of a picture


@pytest.mark.parametrize("kind", tiny.served([*tiny.QWEN, "qwen3_5"]))
@torch.no_grad()
def test_a_qwen_tower_takes_ready_made_what_it_works_out_of_grids(kind):
    tower, inputs = tiny.model(kind).model.visual, tiny.pixels(kind, [[0, 1]])
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    ready = compat.vision_inputs(tower, grids)
    whole, again = tower(pixels, grid_thw=grids), tower(pixels, grid_thw=grids, **ready)
    assert torch.equal(whole.pooler_output, again.pooler_output), changed("what a Qwen tower takes ready-made")
    for name in ready:  # every one of them counts
        broken = {**ready, name: ready[name].flip(0) if "cu_" not in name else ready[name][[0, -1]]}
        if len(ready[name]) > 2:
            other = tower(pixels, grid_thw=grids, **broken).pooler_output
            assert not torch.equal(other, whole.pooler_output), changed(f"the keyword {name} of a Qwen tower")
    spread = compat.spread_features(tower(pixels, grid_thw=grids), lambda rows: rows[:1])
    assert len(spread.pooler_output) == 1, changed("the output of a Qwen tower")
    assert all(len(rows) == 1 for rows in getattr(spread, "deepstack_features", None) or ())
