"""vLLM's model classes with pruning; without our key they do what the classes do that they are made from."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

from .processing import FIELD, plan_of_server, with_processor
from .pruning import Pruner


class Pruned:
    """Mixed into a model class of vLLM with a vision tower and a projector."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        plan, model = plan_of_server(vllm_config.model_config), cast(Any, self)
        self.tokprune = None if plan is None else Pruner(plan, model.vision_tower, model.multi_modal_projector)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Rows of every picture for the language model: as many as the prompt has placeholders."""
        numbers = kwargs.pop(FIELD, None)
        encode = functools.partial(super().embed_multimodal, **kwargs)
        if self.tokprune is None or numbers is None:
            return encode()
        numbers = torch.as_tensor(numbers) if isinstance(numbers, torch.Tensor) else torch.stack(list(numbers))
        return [kept.features for kept in self.tokprune.prune(encode, kwargs, numbers)]

    def get_mm_lora_token_counts(self, **kwargs: Any) -> Any:
        """LoRA on the tower asks for the tokens that it sees, which are not those of the prompt here."""
        if self.tokprune is not None:
            raise NotImplementedError("tokprune: LoRA on tower or projector is not served; leave it out")
        return super().get_mm_lora_token_counts(**kwargs)


@with_processor
class PrunedLlava(Pruned, LlavaForConditionalGeneration):
    """LLaVA 1.5."""


@with_processor
class PrunedLlavaNext(Pruned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""
