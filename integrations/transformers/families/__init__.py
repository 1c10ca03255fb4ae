"""Hugging Face transformers: one file a model family, named by `config.model_type`."""

from __future__ import annotations

from typing import Any

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.lazy import nn
from tokprune.core.registry import Registry
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import KNOWN

from ..compat import is_at_least, transformers_release
from .base import ModelFamily

FAMILIES = Registry(
    what="model family",
    table={
        "aya_vision": "tokprune.integrations.transformers.families.cohere2_vision:AyaVision",
        "cohere2_vision": "tokprune.integrations.transformers.families.cohere2_vision:Cohere2Vision",
        "deepseek_vl": "tokprune.integrations.transformers.families.deepseek_vl:DeepSeekVL",
        "gemma3": "tokprune.integrations.transformers.families.gemma3:Gemma3",
        "gemma4": "tokprune.integrations.transformers.families.gemma4:Gemma4",
        "glm46v": "tokprune.integrations.transformers.families.glm4v:Glm46V",
        "glm4v": "tokprune.integrations.transformers.families.glm4v:Glm4V",
        "got_ocr2": "tokprune.integrations.transformers.families.got_ocr2:GotOcr2",
        "idefics3": "tokprune.integrations.transformers.families.idefics3:Idefics3",
        "internvl": "tokprune.integrations.transformers.families.internvl:InternVL",
        "llava": "tokprune.integrations.transformers.families.llava:Llava",
        "llava_next": "tokprune.integrations.transformers.families.llava_next:LlavaNext",
        "llava_next_video": "tokprune.integrations.transformers.families.llava_next_video:LlavaNextVideo",
        "llava_onevision": "tokprune.integrations.transformers.families.llava_onevision:LlavaOnevision",
        "ovis2": "tokprune.integrations.transformers.families.ovis2:Ovis2",
        "paddleocr_vl": "tokprune.integrations.transformers.families.paddleocr_vl:PaddleOCRVL",
        "mistral3": "tokprune.integrations.transformers.families.pixtral:Mistral3",
        "paligemma": "tokprune.integrations.transformers.families.paligemma:PaliGemma",
        "qwen2_5_vl": "tokprune.integrations.transformers.families.qwen2_vl:Qwen25VL",
        "qwen2_vl": "tokprune.integrations.transformers.families.qwen2_vl:Qwen2VL",
        "qwen3_5": "tokprune.integrations.transformers.families.qwen3_5:Qwen35",
        "qwen3_vl": "tokprune.integrations.transformers.families.qwen3_vl:Qwen3VL",
        "qwen3_vl_moe": "tokprune.integrations.transformers.families.qwen3_vl:Qwen3VLMoE",
        "smolvlm": "tokprune.integrations.transformers.families.idefics3:SmolVLM",
        "video_llava": "tokprune.integrations.transformers.families.video_llava:VideoLlava",
        "vipllava": "tokprune.integrations.transformers.families.vipllava:VipLlava",
    },
    group="tokprune.families",
    listing="tokprune.list_models()",
    base=ModelFamily,
)

# Families of models whose vision tower packs pictures in its own way, by model_type and vision_config.model_type.
VARIANTS = Registry(
    what="model family",
    table={"llava/pixtral": "tokprune.integrations.transformers.families.pixtral:LlavaPixtral"},
)


def all_families() -> list[type[ModelFamily]]:
    """Every family of this package, and behind it its variants."""
    return [
        found
        for name in FAMILIES.own_names()
        for found in (FAMILIES.load(name), *(VARIANTS.load(v) for v in VARIANTS.names() if v.startswith(f"{name}/")))
    ]


def other_families() -> list[type[ModelFamily]]:
    """Families of other packages that can be imported."""
    own = FAMILIES.own_names()
    return [FAMILIES.load(name) for name in FAMILIES.importable() if name not in own]


def family_class(config: Any) -> type[ModelFamily]:
    """The family of a configuration.

    Raises:
        UnknownNameError: there is none for its model_type.
        PluginError: it is another package's and cannot be imported.
    """
    variant = f"{config.model_type}/{getattr(getattr(config, 'vision_config', None), 'model_type', '')}"
    return VARIANTS.load(variant) if variant in VARIANTS.names() else FAMILIES.load(config.model_type)


def family_of(model: Any) -> ModelFamily:
    """The family of a model; a PEFT model is unwrapped.

    Raises:
        UnsupportedModelError: no family, or a wrapping that hooks cannot follow.
    """
    model = _unwrapped(model)
    _checked_type(model)
    family = family_class(model.config)
    _checked_release(family)
    return family(model)


def _checked_release(family: type[ModelFamily]) -> None:
    if not is_at_least(family.oldest):
        raise UnsupportedModelError(
            f"{family.model_type!r} needs transformers {family.oldest} or newer, and {transformers_release()} is "
            "installed; use pip install -U transformers"
        )


def shape_from_config(config: Any) -> Shape:
    """The ledger's view of a configuration; nothing is downloaded.

    Raises:
        UnsupportedModelError: a family, a tower or a language model whose cost is not known.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type not in FAMILIES.names():
        raise UnsupportedModelError(
            f"cannot count the FLOPs of model_type {model_type!r}; use one of {', '.join(FAMILIES.names())}, "
            f"or a shape by name: {', '.join(KNOWN)}"
        )
    return family_class(config).shape_of(config)


def _unwrapped(model: Any) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UnsupportedModelError(
            f"{type(model).__name__} calls copies of the model that hooks do not follow; attach to model.module"
        )
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    if not isinstance(model, nn.Module):
        inside = isinstance(getattr(model, "model", None), nn.Module)  # of a pipeline
        instead = ": pass the model that it holds, as in attach(pipe.model, ...)" if inside else ""
        raise UnsupportedModelError(f"attach() takes a transformers model, not {type(model).__name__}{instead}")
    for part in model.modules():
        name = type(part).__name__
        if name == "OptimizedModule":
            raise UnsupportedModelError(
                "torch.compile() put a part of the model into another module; use its compile() method instead, as in "
                "model.model.language_model.compile()"
            )
        if name.startswith(("FullyShardedDataParallel", "FSDP")):
            raise UnsupportedModelError("the model is wrapped in FSDP; attach to an unsharded model")
    return model


def _checked_type(model: nn.Module) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no config.model_type: not a transformers model")
    if model_type not in FAMILIES.names():
        raise UnsupportedModelError(
            f"no model family for model_type {model_type!r} ({type(model).__name__}). "
            f'Supported: {", ".join(FAMILIES.names())} (tokprune.list_models()); to add a family, use "tokprune '
            'new family"'
        )
