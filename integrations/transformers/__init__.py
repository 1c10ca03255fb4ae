"""Hugging Face transformers: one file a model family, named by `config.model_type`."""

from tokprune.registry import Registry

MODELS = Registry(
    what="model adapter",
    table={"llava": "tokprune.integrations.transformers.llava:Llava"},
    listing="tokprune.list_models()",
)
