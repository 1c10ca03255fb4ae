"""What is asked of a server or of a request, without an engine: refused, or planned."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import KINDS, config_of
from tokprune.eval.models import path_of
from tokprune.integrations.vllm import NEWEST, why_not
from tokprune.integrations.vllm.checks import why_unhooked
from tokprune.integrations.vllm.options import check_key, plan_of
from tokprune.integrations.vllm.processing import salt_of, shortened
from transformers import AutoConfig, AutoModelForImageTextToText

import tokprune
from tokprune.core.budget import Budget

HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEEDS_VLLM = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make test-vllm")
ASKED = {"method": "vtc_cls", "keep_ratio": 0.25}


def config(name: str = "tiny-llava"):
    return config_of(name) if name in KINDS else AutoConfig.from_pretrained(path_of(name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("vtc_cls", "is not an object; use --mm-processor-kwargs"),
        ({}, "which method"),
        ({"keep_ratio": 0.25}, "which method"),
        ({"method": "vtc_cls"}, "give exactly one budget"),
        ({**ASKED, "keep_tokens": 36}, "give exactly one budget"),
        ({"method": "vtc_cls", "keep_ratio": 25}, "Did you mean keep_ratio=0.25"),
        ({"method": "vtc_clss", "keep_ratio": 0.25}, "Did you mean 'vtc_cls'"),
        ({**ASKED, "start_layr": 1}, "Did you mean 'start_layer'"),
        ({**ASKED, "keep_ration": 0.5}, "Did you mean keep_ratio"),
        ({**ASKED, "newlines": "some"}, "newlines='some' is not one of"),
        ({**ASKED, "positions": "original"}, "use positions='contiguous'"),
        ({**ASKED, "method": "vtc_cls:calibrate=bias"}, "leave calibrate out"),
        ({**ASKED, "method": "fastv"}, "'fastv' cuts between decoder layers.* vtc_cls"),
        ({**ASKED, "method": ["vtc_cls", "fastv"], "keep_ratio": [0.5, 0.5]}, "cuts between decoder layers"),
        ({**ASKED, "method": "cdpruner"}, "reads the question.* divprune"),
        ({"method": "prumerge"}, "does not keep an exact number.* visionzip"),
        ({**ASKED, "method": "pool"}, "does not keep an exact number"),
        ({"method": "pixelprune"}, "does not keep an exact number"),
        ({**ASKED, "method": "visionzip:layer=4"}, "reads vision layer 4, and only layers 0 to 3 are built.* divprune"),
        ({"method": "vtc_cls", "flops_ratio": 0.001}, "out of reach.* use flops_ratio="),
        ({"config": "/no/such/folder"}, "no such file"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(given, message):
    with pytest.raises(tokprune.TokPruneError, match=message) as refused:
        plan_of(config(), given)
    assert str(refused.value).startswith("tokprune: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "some"),
    [
        ("tiny-llava", {"vtc_cls", "visionzip", "divprune", "fopru", "random"}),
        ("tiny-qwen", {"divprune", "random"}),
        pytest.param("random-onevision", {"visionzip", "divprune", "fopru", "random"}, marks=NEEDS_VLLM),
        ("random-internvl", {"vtc_cls", "visionzip", "vispruner", "divprune", "fopru", "random"}),
        ("random-gemma3", {"visionzip", "divprune", "fopru", "random"}),
        ("random-mistral3", {"visionzip", "divprune", "fopru", "random"}),
    ],
)
def test_methods_that_are_named_as_working_do_work(model, some):
    with pytest.raises(tokprune.TokPruneError) as refused:
        plan_of(config(model), {**ASKED, "method": "fastv"})
    names = str(refused.value).partition("work here: ")[2].split(", ")
    assert some <= set(names)
    for name in names:
        assert plan_of(config(model), {**ASKED, "method": name}) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "vtc_cls", "keep_ratio": 0.25}, "is not read in vLLM.* divprune"),
        ({"method": "visionzip", "keep_ratio": 0.25}, "is not read in vLLM.* divprune"),
        ({"method": "divprune", "flops_ratio": 0.5}, "not known; use keep_ratio or keep_tokens"),
        ({"method": "divprune", "keep_ratio": 0.5, "positions": "contiguous"}, "use positions='original'"),
        ({"method": "divprune"}, "give exactly one budget"),
    ],
)
def test_what_cannot_be_served_of_qwen_is_refused_in_one_line(given, message):
    with pytest.raises(tokprune.TokPruneError, match=message) as refused:
        plan_of(config("tiny-qwen"), given)
    assert str(refused.value).startswith("tokprune: ")
    assert "\n" not in str(refused.value)


def test_pictures_of_qwen_have_any_size():
    plan = plan_of(config("tiny-qwen"), {"method": "divprune", "keep_ratio": 0.25, "positions": "original"})
    wide, high = plan.family.layouts({"image_grid_thw": torch.tensor([[1, 4, 16], [1, 12, 2]])})
    assert (wide.height, wide.width, plan.n_rows(wide)) == (2, 8, 4)
    assert (high.height, high.width, plan.n_rows(high)) == (6, 1, 2)
    assert "1296 -> 324 tokens of a picture of 36 x 36 tokens" in str(plan)


def test_other_models_and_towers_are_refused():
    other = config()
    other.architectures = ["LlavaNextVideoForConditionalGeneration"]
    with pytest.raises(tokprune.TokPruneError, match="LlavaForConditionalGeneration.* Use tokprune.attach"):
        plan_of(other, ASKED)
    other = config()
    other.vision_config = AutoConfig.for_model("pixtral")
    with pytest.raises(tokprune.TokPruneError, match="'pixtral' towers"):
        plan_of(other, ASKED)
    other = config()
    other.vision_config = AutoConfig.for_model("siglip_vision_model", image_size=96, patch_size=8)
    with pytest.raises(tokprune.TokPruneError, match=r"--hf-overrides.*full"):
        plan_of(other, ASKED)
    other.vision_feature_select_strategy = "full"
    with pytest.raises(tokprune.TokPruneError, match="no \\[CLS\\].* vtc_cls:without_cls=received"):
        plan_of(other, ASKED)
    assert plan_of(other, {**ASKED, "method": "vtc_cls:without_cls=received"}) is not None


@pytest.mark.parametrize("name", ["random-gemma3", "random-mistral3"])
def test_methods_that_rank_by_the_cls_token_are_refused_without_one(name):
    with pytest.raises(tokprune.TokPruneError, match="no \\[CLS\\].* vtc_cls:without_cls=received"):
        plan_of(config(name), ASKED)
    assert plan_of(config(name), {**ASKED, "method": "vtc_cls:without_cls=received"}) is not None


def test_flops_of_pictures_of_any_size_are_not_counted():
    with pytest.raises(tokprune.TokPruneError, match="use keep_ratio or keep_tokens"):
        plan_of(config("random-mistral3"), {"method": "divprune", "flops_ratio": 0.5})
    assert plan_of(config("random-gemma3"), {"method": "divprune", "flops_ratio": 0.8}) is not None


def test_tokens_of_text_between_rows_of_a_picture_stay():
    plan = plan_of(config("random-mistral3"), {"method": "divprune", "keep_ratio": 0.25})
    wide, high = plan.family.layouts({"pixel_values": [torch.zeros(3, 32, 96), torch.zeros(3, 64, 16)]})
    assert (plan.n_keep(wide), plan.n_rows(wide), len(wide.crop)) == (3, 3 + 1, 12 + 1)
    assert (plan.n_keep(high), plan.n_rows(high), len(high.crop)) == (1, 1 + 3, 4 + 3)
    assert wide.crop == (*[0] * 6, -1, *[0] * 6)


def test_what_stands_for_a_picture_is_cut_at_its_end():
    assert shortened([7, 1, 1, 1, 8], [False, True, True, True, False], 1, 2) == [7, 1, 1, 8]
    assert shortened([1, 9, 1, 9, 1, 8], [True] * 5 + [False], 1, 3) == [1, 1, 1, 8]


def test_towers_that_are_read_otherwise_than_asked_are_refused():
    other = config("random-internvl")
    other.vision_feature_layer = -2
    with pytest.raises(tokprune.TokPruneError, match=r"vision_feature_layer=-2.*--hf-overrides"):
        plan_of(other, ASKED)
    other.vision_feature_layer, other.vision_feature_select_strategy = -1, "full"
    with pytest.raises(tokprune.TokPruneError, match=r"'full'.*--hf-overrides"):
        plan_of(other, ASKED)
    other = config("random-onevision")
    other.vision_config = AutoConfig.for_model("clip_vision_model")
    with pytest.raises(tokprune.TokPruneError, match="'clip_vision_model' towers.*siglip"):
        plan_of(other, ASKED)


@pytest.mark.parametrize(
    ("given", "n_keep"),
    [
        (ASKED, 36),
        ({"method": "vtc_cls", "keep_tokens": 16}, 16),
        ({"method": "vtc_cls", "keep_tokens": 999}, 144),
        ({"method": "vtc_cls:start_layer=2", "keep_ratio": 0.11}, 16),
        ({"method": "vtc_cls", "start_layer": 2, "keep_ratio": 0.11}, 16),
        ({"method": ["damro_filter:layer=3", "vtc_cls"], "keep_ratio": 0.25}, 36),
        ({"method": "vtc_cls", "keep_ratio": 1.0}, 144),
    ],
)
def test_tokens_of_a_picture(given, n_keep):
    plan = plan_of(config(), given)
    assert plan.n_keep(plan.family.largest) == plan.n_rows(plan.family.largest) == n_keep
    assert f"144 -> {n_keep} tokens a picture" in str(plan)


def test_a_budget_of_flops_is_that_of_attach():
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-llava"))
    plan = plan_of(config(), {"method": "vtc_cls", "flops_ratio": 0.5})
    with tokprune.attach(model, "vtc_cls", flops_ratio=0.5) as attachment:
        ids = torch.tensor([[1, *[config().image_token_index] * 144, 5]])
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
        assert len(attachment.kept[0]) == plan.n_keep(plan.family.largest)


def test_a_saved_folder_says_everything(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-llava"))
    with tokprune.attach(model, "vtc_cls:start_layer=2", keep_tokens=20) as attachment:
        attachment.save(tmp_path / "deploy")
    plan = plan_of(config(), {"config": str(tmp_path / "deploy")})
    assert "vtc_cls:start_layer=2 keep_tokens=20: 144 -> 20" in str(plan)
    assert plan.identity == plan_of(config(), {"method": "vtc_cls:start_layer=2", "keep_tokens": 20}).identity
    with pytest.raises(tokprune.TokPruneError, match="leave keep_ratio out"):
        plan_of(config(), {"config": str(tmp_path / "deploy"), "keep_ratio": 0.5})
    with pytest.raises(tokprune.TokPruneError, match="was saved from a 'llava' model"):
        plan_of(config("tiny-llava-next"), {"config": str(tmp_path / "deploy")})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "fopru"}, "a request sets keep_ratio, keep_tokens, flops_ratio and not 'method'"),
        ({"kep_tokens": 3}, "did you mean keep_tokens"),
        ({"keep_ratio": 25}, "Did you mean keep_ratio=0.25"),
        ({}, "give exactly one budget"),
        ("vtc_cls", "is not an object"),
    ],
)
def test_a_request_sets_a_budget_and_nothing_else(given, message):
    plan = plan_of(config(), ASKED)
    with pytest.raises(tokprune.TokPruneError, match=message) as refused:
        plan.of_request(given)
    assert str(refused.value).startswith("tokprune: ")
    assert plan.of_request({"keep_tokens": 16}).n_keep(plan.family.largest) == 16


def test_whatever_decides_what_is_kept_is_in_the_digest():
    asked = [
        ASKED,
        {**ASKED, "keep_ratio": 0.5},
        {**ASKED, "method": "vtc_cls:start_layer=1"},
        {**ASKED, "method": "fopru"},
        {**ASKED, "newlines": "drop"},
    ]
    plans = [plan_of(config(), given) for given in asked]
    assert len({plan.identity for plan in plans}) == len(plans)
    assert plans[1].of_request({"keep_ratio": 0.25}).identity == plans[0].identity


@pytest.mark.parametrize("name", ["tokprun", "Tokprune", "tokpruned", "TOKPRUNE"])
def test_a_key_that_vllm_would_ignore_is_refused(name):
    with pytest.raises(tokprune.TokPruneError, match="nothing pruned; did you mean 'tokprune'"):
        check_key({name: ASKED})
    check_key({"tokprune": ASKED, "num_crops": 4})


@pytest.mark.parametrize("release", ["0.19.1", "0.31.4", "0.99.0", "1.0.0", "dev", None])
def test_releases_that_were_not_tested_are_refused(release):
    assert f"pip install 'vllm=={NEWEST}'" in why_not(release)
    assert not why_not(NEWEST)


@pytest.mark.parametrize(
    ("compilation", "lora", "multimodal", "word"),
    [
        ({"compile_mm_encoder": True}, None, {}, "compile_mm_encoder"),
        ({"cudagraph_mm_encoder": True}, None, {}, "cudagraph_mm_encoder"),
        ({}, {"enable_tower_connector_lora": True}, {}, "--enable-tower-connector-lora"),
        ({}, None, {"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode"),
        ({}, None, {"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({}, {"enable_tower_connector_lora": False}, {"mm_encoder_tp_mode": "weights"}, ""),
    ],
)
def test_towers_that_cannot_be_followed_are_refused(compilation, lora, multimodal, word):
    given = SimpleNamespace(
        compilation_config=SimpleNamespace(**compilation),
        lora_config=None if lora is None else SimpleNamespace(**lora),
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(**multimodal)),
    )
    assert word in why_unhooked(given)
    assert bool(word) == bool(why_unhooked(given))


def test_a_picture_has_one_salt_whatever_it_comes_as():
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    assert salt_of(Image.fromarray(pixels)) == salt_of(pixels) == salt_of(torch.from_numpy(pixels))
    assert salt_of(pixels) != salt_of(pixels + 1)


@NEEDS_VLLM
@pytest.mark.parametrize("name", ["tiny-llava-next", "random-onevision"])
def test_layouts_of_many_sizes_have_the_rows_that_vllm_plans(name):
    from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionProcessingInfo

    family = plan_of(config(name), {"method": "divprune", "keep_ratio": 0.5}).family
    infos = {"tiny-llava-next": LlavaNextProcessingInfo, "random-onevision": LlavaOnevisionProcessingInfo}
    info = infos[name](SimpleNamespace(get_hf_config=lambda *_: family.config))
    for height in range(20, 400, 29):
        for width in range(20, 700, 37):
            (layout,) = family.layouts({"image_sizes": torch.tensor([[height, width]])})
            planned = info.get_num_image_tokens(image_width=width, image_height=height)
            assert len(layout.crop) == planned, (height, width)


@NEEDS_VLLM
@pytest.mark.parametrize(("newlines", "kept"), [("auto", "keep"), ("keep", "keep"), ("drop", "drop")])
def test_newlines_do_not_hang_on_what_is_kept(newlines, kept):
    plan = plan_of(config("tiny-llava-next"), {**ASKED, "newlines": newlines})
    layout = plan.family.largest
    n_newlines = layout.n_newlines if kept == "keep" else 0
    assert plan.request.newlines == kept
    assert plan.n_rows(layout) == plan.n_keep(layout) + n_newlines
    assert "of the largest picture" in str(plan)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"random-qwen3"}))
def test_comparisons_refuse_models_whose_tokens_they_do_not_count(name):
    from tokprune.eval.run.served import refuse_uncounted

    refuse_uncounted(config())
    refuse_uncounted(config("random-qwen3"))
    with pytest.raises(tokprune.TokPruneError, match="leave --backend vllm out"):
        refuse_uncounted(config(name))


PICTURES = [Image.new("RGB", size) for size in ((192, 150), (130, 64), (50, 140), (60, 60), (33, 35), (20, 300))]


@NEEDS_VLLM
@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize(
    ("asked", "requested"), [({"keep_ratio": 0.25}, {}), ({"keep_tokens": 7}, {"keep_ratio": 0.4})]
)
def test_prompts_have_the_tokens_that_stay(name, asked, requested, place):
    """Budgets are of every picture over all its crops; newlines are not counted."""
    from questions import SHOWN

    whole, cut = processor_of(place(name), None), processor_of(place(name), {"method": "divprune", **asked})
    budget, of_request = Budget(**(requested or asked)), {"tokprune": requested} if requested else {}
    for shown in (*([p] for p in PICTURES), PICTURES[:2], PICTURES[2:5]):
        prompt = f"{SHOWN[name][0] * len(shown)} what?"
        before, after = rows_of(whole, prompt, shown, {}), rows_of(cut, prompt, shown, of_request)
        counts = [visual_and_others(name, whole.info, p, n) for p, n in zip(shown, before, strict=True)]
        assert after == [budget.n_keep(visual) + others for visual, others in counts]


def rows_of(processor, prompt, pictures, kwargs):
    """Rows of every picture that its prompt has place for."""
    found = processor(prompt, processor.info.parse_mm_data({"image": pictures}), hf_processor_mm_kwargs=kwargs)
    return [place.get_num_embeds() for place in found["mm_placeholders"]["image"]]


def visual_and_others(name, info, picture, n):
    """Tokens of a picture that show a part of it, and rows that stay in any case, of n placeholders of vLLM."""
    if name == "random-onevision":
        family = plan_of(config(name), {"method": "divprune", "keep_ratio": 0.5}).family
        (layout,) = family.layouts({"image_sizes": torch.tensor([picture.size[::-1]])})
        return n - layout.n_newlines, layout.n_newlines
    if name == "random-mistral3":  # a token of text behind every row but the last
        width, height = picture.size
        _, n_rows = info.get_vision_encoder_info().get_patch_grid_size(image_width=width, image_height=height)
        return n, n_rows - 1
    return n, 0


@NEEDS_VLLM
def test_pan_and_scan_is_refused(place):
    asked = {"method": "divprune", "keep_ratio": 0.5}
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    processor, wide = processor_of(place("random-gemma3"), asked), [Image.new("RGB", (300, 60))]
    assert rows_of(processor, "<start_of_image> what?", wide, {}) == [18]
    with pytest.raises(tokprune.TokPruneError, match="leave do_pan_and_scan out"):
        rows_of(processor, "<start_of_image> what?", wide, crops)


@NEEDS_VLLM
def test_prompts_of_qwen_are_cut_or_refused_before_an_engine_sees_them():
    columns = columns_of(path_of("tiny-qwen"), {"method": "divprune", "keep_ratio": 0.25})
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    wide, high = Image.new("RGB", (128, 64)), Image.new("RGB", (64, 96))
    assert columns(f"{shown}{shown} what?", image=[wide, high]) == [8, 6]
    assert columns("<|image_pad|><|image_pad|> what?", image=[wide, high]) == [8, 6]
    with pytest.raises(tokprune.TokPruneError, match=r"<\|vision_end\|>"):
        columns("what? <|image_pad|>", image=[wide])
    with pytest.raises(tokprune.TokPruneError, match="more image tokens than"):
        columns(f"{shown} <|image_pad|> what?", image=[wide])


@NEEDS_VLLM
def test_videos_have_one_budget_for_all_frames(place):
    asked = {"method": "vidcom2", "keep_ratio": 0.25}
    columns = columns_of(path_of("tiny-qwen"), asked)
    shown, picture = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))
    told = {"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8)), "do_sample_frames": False}
    videos = [(np.zeros((8, height, 64, 3), np.uint8), told) for height in (32, 64)]
    assert columns(f"{shown}{shown} what?", video=videos) == [8, 16]
    assert columns(f"{picture}{shown} what?", image=[Image.new("RGB", (64, 64))], video=videos[:1]) == [4, 8]
    with pytest.raises(tokprune.TokPruneError, match="more video tokens than"):
        columns(f"{shown} <|video_pad|> what?", video=videos[:1])
    with pytest.raises(tokprune.TokPruneError, match="video input of this model is not served"):
        columns_of(place("random-qwen3"), asked)(f"{shown} what?", video=videos[:1])


def columns_of(model, asked):
    """(prompt, items) to the columns of every picture, and then of every video."""
    processor = processor_of(model, asked)

    def columns(prompt, **items):
        found = processor(prompt, processor.info.parse_mm_data(items))["mm_placeholders"]
        return [place.length for modality in ("image", "video") for place in found.get(modality, ())]

    return columns


def processor_of(model, given):
    """vLLM's processor of a model, with our key or without."""
    from tokprune.integrations.vllm import register
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    register()
    key = {"tokprune": given} if given else None
    asked = EngineArgs(model, mm_processor_kwargs=key, enforce_eager=True, max_model_len=1024)
    return MULTIMODAL_REGISTRY.create_processor(asked.create_model_config())
