"""vLLM's model classes with pruning; without our key they do what the classes do that they are made from."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from vllm.model_executor.models.gemma3_mm import Gemma3ForConditionalGeneration
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.mistral3 import Mistral3ForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from tokprune.prune.select import Kept

from .compat import let_positions_be_asked
from .m_rope import interval_of, pictures_of, placed, text_positions, with_places
from .processing import FIELD, FIELDS, plan_of_server, with_processor
from .pruning import Pruner


class Pruned:
    """Mixed into a model class of vLLM with a vision tower and a projector."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        plan, model = plan_of_server(vllm_config.model_config), cast(Any, self)
        tower, projector = (getattr(model, name, None) for name in ("vision_tower", "multi_modal_projector"))
        self.tokprune = None if plan is None else Pruner(plan, tower, projector)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Rows of every picture for the language model: as many as the prompt has placeholders."""
        numbers = kwargs.pop(FIELD, None)
        if self.tokprune is None or numbers is None:
            return super().embed_multimodal(**kwargs)
        encode = functools.partial(self.rows_of_pictures, **kwargs)
        numbers = torch.as_tensor(numbers) if isinstance(numbers, torch.Tensor) else torch.stack(list(numbers))
        return [kept.features for kept in self.tokprune.prune(encode, kwargs, numbers)]

    def rows_of_pictures(self, **kwargs: Any) -> Any:
        """Rows of every whole picture, as a prompt has them."""
        return super().embed_multimodal(**kwargs)

    def get_mm_lora_token_counts(self, **kwargs: Any) -> Any:
        """LoRA on the tower asks for the tokens that it sees, which are not those of the prompt here."""
        if self.tokprune is not None:
            raise NotImplementedError("tokprune: LoRA on tower or projector is not served; leave it out")
        return super().get_mm_lora_token_counts(**kwargs)


def with_breaks(rows: torch.Tensor, ending: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of a picture with one more behind every `width` of them but the last.

    Args:
        rows: (H * width, D).
        ending: (1, D).
        width: tokens of a row of the picture.
    """
    grid = rows.unflatten(0, (-1, width))
    return torch.cat([grid, ending.to(rows).expand(len(grid), 1, -1)], 1).flatten(0, 1)[:-1]


class PrunedMRope(Pruned):
    """Mixed into a Qwen-VL model of vLLM: rows bring their places along, and dropped ones leave gaps in positions.

    What is added in the first decoder layers of Qwen3-VL lies behind the features of a row, and stays with it.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        if plan_of_server(vllm_config.model_config) is not None:
            let_positions_be_asked(vllm_config.model_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _postprocess_image_embeds_evs(self, rows: Any, image_input: Any) -> Any:
        """Places are added when it is known which rows stay."""
        return super()._postprocess_image_embeds_evs(rows, image_input) if self.tokprune is None else rows

    def _postprocess_video_embeds_evs(self, rows: Any, video_input: Any) -> Any:
        """As those of pictures."""
        return super()._postprocess_video_embeds_evs(rows, video_input) if self.tokprune is None else rows

    @property
    def _per_second(self) -> float:
        return getattr(cast(Any, self).config.vision_config, "tokens_per_second", 1.0)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Kept rows with their places behind them; vLLM shows pictures alone, or videos alone."""
        if self.tokprune is None:
            return super().embed_multimodal(**kwargs)
        given = [numbers for field in FIELDS.values() if (numbers := kwargs.pop(field, None)) is not None]
        numbers, width = next(iter(given), None), cast(Any, self).config.text_config.hidden_size
        whole = list(super().embed_multimodal(**kwargs) or ())
        if numbers is None:
            kept = [Kept(torch.arange(len(rows), device=rows.device), rows[:, :width]) for rows in whole]
        else:
            numbers = torch.as_tensor(numbers) if isinstance(numbers, torch.Tensor) else torch.stack(list(numbers))
            kept = self.tokprune.prune(lambda: [rows[:, :width] for rows in whole], kwargs, numbers)
        layouts = self.tokprune.plan.family.layouts(kwargs) if whole else []
        seconds = kwargs.get("second_per_grid_ts")
        seconds = [None] * len(whole) if seconds is None else seconds
        return [
            with_places(
                torch.cat([k.features, rows[k.index, width:]], 1), k.index, layout, interval_of(own, self._per_second)
            )
            for k, rows, layout, own in zip(kept, whole, layouts, seconds, strict=True)
        ]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """Those of text, which continue behind the whole picture or video."""
        if self.tokprune is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        merge = cast(Any, self).config.vision_config.spatial_merge_size
        return text_positions(len(input_tokens), pictures_of(mm_features, merge, self._per_second))

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: torch.Tensor, num_computed_tokens: int
    ) -> Any:
        """Those of the rows of a chunk."""
        given = (input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
        if self.tokprune is None:
            return super().recompute_mrope_positions(*given)
        ids, config = torch.as_tensor(input_ids, device=mrope_positions.device), cast(Any, self).config
        is_picture = (ids == config.image_token_id) | (ids == config.video_token_id)
        return placed(mrope_positions, is_picture, multimodal_embeddings, num_computed_tokens)


@with_processor
class PrunedGemma3(Pruned, Gemma3ForConditionalGeneration):
    """Gemma 3."""


@with_processor
class PrunedInternVL(Pruned, InternS1ForConditionalGeneration):
    """InternVL in transformers' own form, which vLLM runs as this."""


@with_processor
class PrunedLlava(Pruned, LlavaForConditionalGeneration):
    """LLaVA 1.5."""


@with_processor
class PrunedLlavaNext(Pruned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


@with_processor
class PrunedLlavaOnevision(Pruned, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""


@with_processor
class PrunedMistral3(Pruned, Mistral3ForConditionalGeneration):
    """Mistral 3; tokens that end the rows of a picture are among its rows."""

    def rows_of_pictures(self, **kwargs: Any) -> Any:
        """Rows of every picture, and behind each row of tokens but the last the embedding of what ends it."""
        model: Any = self
        family, whole = model.tokprune.plan.family, super().rows_of_pictures(**kwargs)
        return [
            with_breaks(rows, model.language_model.embed_input_ids(token.to(rows.device)), layout.width)
            for rows, layout, token in zip(whole, family.layouts(kwargs), family.breaks(kwargs), strict=True)
        ]


@with_processor
class PrunedQwen25VL(PrunedMRope, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@with_processor
class PrunedQwen3VL(PrunedMRope, Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""
