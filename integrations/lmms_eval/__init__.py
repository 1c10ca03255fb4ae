"""lmms-eval: the model `tokprune`, found through lmms-eval's entry-point group `lmms_eval.models`; nothing is forked.

    lmms-eval --model tokprune --model_args pretrained=PATH,method=vtc_cls,keep_ratio=0.25 --tasks pope --batch_size 8

`options.Options` lists what `--model_args` takes.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point names: the plug-in's class by its path, imported when the model is asked for.

    It is a "simple" class, which is handed a text and pictures, and not a "chat" class, which is handed messages:
    lmms-eval asks log-likelihoods (multiple choice) of simple classes alone.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tokprune", simple_class_path="tokprune.integrations.lmms_eval.model.TokPrune")
