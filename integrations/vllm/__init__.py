"""The host vLLM: a general plug-in that prunes pictures between the projector and the language model.

Read `options` (what was asked), `processing` (fewer placeholders in the prompt), `pruning` (the rows that stay),
`models` (vLLM's own model classes with both); `families/` holds facts about models, `checks` refuses what cannot be
served before engines start, `engine` answers batches for evaluations, `compat` has what is private to vLLM. Nothing of
vLLM is imported before `register` runs or an engine starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .compat import NEWEST, OLDEST, release, repair_cpu_runner, why_not
from .families import FAMILIES
from .options import KEY, Plan, plan_of

if TYPE_CHECKING:
    from .engine import Engine, conditions_of, quiet, refuse_without_vllm

MODELS = {
    "Gemma3ForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedGemma3",
    "InternVLForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedInternVL",
    "LlavaForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedLlavaOnevision",
    "Mistral3ForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedMistral3",
    "Qwen2_5_VLForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedQwen3VL",
}


def register() -> None:
    """The entry point: called in every process of vLLM, more than once in some.

    Model classes are registered by name, under the names of the classes that they are made from; without our key in
    `--mm-processor-kwargs` they do what those do.
    """
    from .checks import install_checks

    install_checks()
    if why_not(release()):
        return  # the checks refuse our key, and everything else is vLLM's own
    from vllm import ModelRegistry

    repair_cpu_runner()
    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)


_OF_ENGINE = ("Engine", "conditions_of", "quiet", "refuse_without_vllm")  # imported when they are asked for


def __getattr__(name: str) -> Any:
    """A name of the engine."""
    if name not in _OF_ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.engine"), name)


__all__ = [
    "FAMILIES",
    "KEY",
    "MODELS",
    "NEWEST",
    "OLDEST",
    "Engine",
    "Plan",
    "conditions_of",
    "plan_of",
    "quiet",
    "refuse_without_vllm",
    "register",
    "release",
    "why_not",
]
