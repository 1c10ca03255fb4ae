"""The host vLLM: a general plug-in that prunes pictures between the projector and the language model.

Read `options` (what was asked), `processing` (fewer placeholders in the prompt), `pruning` (the rows that stay),
`models` (vLLM's own model classes with both); `families/` holds facts about models, `checks` refuses what cannot be
served before engines start, `compat` has what is private to vLLM. Nothing of vLLM is imported before `register` runs.
"""

from .compat import NEWEST, OLDEST, release, why_not
from .families import FAMILIES
from .options import KEY

MODELS = {
    "LlavaForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokprune.integrations.vllm.models:PrunedLlavaNext",
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

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)


__all__ = ["FAMILIES", "KEY", "MODELS", "NEWEST", "OLDEST", "register", "release", "why_not"]
