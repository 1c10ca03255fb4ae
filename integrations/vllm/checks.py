"""Refusals before engines start, so that they are the last lines that a user sees; and what is pruned, in one line."""

from __future__ import annotations

from typing import Any

from tokprune.core.errors import OptionError, UnsupportedModelError

from .compat import release, tell, why_not, wrap_verification
from .options import KEY, check_key, plan_of


def install_checks() -> None:
    """Let every configuration be checked when it is made."""
    if not wrap_verification(check):
        tell(f"{KEY}: {why_not(release())}; --mm-processor-kwargs with {KEY!r} would be ignored")


def check(vllm_config: Any) -> None:
    """Refuse what would not be pruned as it was asked for.

    Raises:
        TokPruneError: in one of its kinds, in one line.
    """
    model_config = vllm_config.model_config
    multimodal = model_config.multimodal_config
    given = (multimodal.mm_processor_kwargs or {}) if multimodal is not None else {}
    check_key(given)
    if given.get(KEY) is None:
        return
    if why := why_not(release()):
        raise UnsupportedModelError(f"{KEY}: {why}")
    plan = plan_of(model_config.hf_config, given[KEY])
    _check_class(model_config)
    if why := why_unhooked(vllm_config):
        raise OptionError(f"{KEY}: {why}")
    tell(str(plan))


def _check_class(model_config: Any) -> None:
    wanted = model_config.hf_config.architectures[0]
    if model_config.architecture != wanted:
        raise UnsupportedModelError(
            f"{KEY}: {wanted} runs as {model_config.architecture}, which is not pruned; leave --model-impl out"
        )
    from vllm.model_executor.model_loader import get_model_architecture

    cls = get_model_architecture(model_config)[0]
    if not cls.__module__.startswith("tokprune."):
        raise UnsupportedModelError(
            f"{KEY}: another plug-in runs {wanted} as {cls.__module__}.{cls.__name__}; set VLLM_PLUGINS=tokprune"
        )


def why_unhooked(vllm_config: Any) -> str:
    """Why the vision tower of a server cannot be followed; empty where it can."""
    compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
    for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
        if getattr(compilation, name, False):
            return f"{name} runs the vision tower where nothing can be read; leave it out of --compilation-config"
    if getattr(lora, "enable_tower_connector_lora", False):
        return "LoRA on tower or projector is not served; leave --enable-tower-connector-lora out"
    multimodal = vllm_config.model_config.multimodal_config
    if getattr(multimodal, "video_pruning_rate", None):
        return "--video-pruning-rate would prune videos in vLLM's own way, too; leave it out"
    if getattr(multimodal, "mm_encoder_tp_mode", "weights") == "data":
        return "--mm-encoder-tp-mode data shows each worker a part of the pictures; leave it out"
    return ""
