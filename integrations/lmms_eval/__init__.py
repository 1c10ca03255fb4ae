"""The model `tokprune` for lmms-eval, found through its entry-point group `lmms_eval.models`.

    lmms-eval --model tokprune --model_args pretrained=PATH,method=vtc_cls,keep_ratio=0.25 --tasks pope --batch_size 8

`options.Options` lists what `--model_args` takes.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The manifest of the plug-in; its class is imported when the model is used.

    It is a "simple" class, which gets a text and pictures, not a "chat" class, which gets messages: lmms-eval asks only
    simple classes for log-likelihoods (multiple choice).
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tokprune", simple_class_path="tokprune.integrations.lmms_eval.model.TokPrune")
