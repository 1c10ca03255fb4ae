"""In the process that takes requests: fewer placeholders in the prompt, and with each picture what to keep of it."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tokprune.core.errors import OptionError, UnsupportedModelError
from tokprune.core.layout import grid_layout

from .compat import parts_of, with_content, without_key
from .options import EXAMPLE, KEY, Plan, check_key, plan_of

FIELD = "tokprune"  # travels with a picture to the worker: (n_keep, rows, all rows, salt)
FIELDS = {"image": FIELD, "video": f"{FIELD}_video"}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def plan_of_server(model_config: Any) -> Plan | None:
    """From `--mm-processor-kwargs`; None without our key."""
    given = model_config.get_multimodal_config().mm_processor_kwargs or {}
    return plan_of(model_config.hf_config, given.get(KEY))


class PrunedInfo:
    """Mixed into a ProcessingInfo of vLLM."""

    def __init__(self, ctx: Any):
        super().__init__(without_key(ctx, KEY))
        self.plan = plan_of_server(ctx.model_config)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """None of what is not pruned, where something is."""
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        if self.plan is None:
            return limits
        return {name: limit if name in self.plan.family.modalities else 0 for name, limit in limits.items()}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Refuse by name what is not pruned.

        Raises:
            UnsupportedModelError: vLLM answers it with status 400.
        """
        if self.plan is not None and modality not in self.plan.family.modalities and num_items:
            raise UnsupportedModelError(
                f"{KEY}: {modality} input of this model is not served where pictures are pruned; start a server "
                f"without {KEY!r}"
            )
        super().validate_num_items(modality, num_items)  # type: ignore[misc]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """Of a picture or video, those that stay of the most that it may have."""
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        if self.plan is None or most is None:
            return most
        modalities = [name for name in self.plan.family.modalities if name in most]
        return {name: self.plan.n_rows(grid_layout(1, most[name])) for name in modalities}

    def plan_of(self, kwargs: Mapping[str, Any]) -> Plan | None:
        """Of a request with these `mm_processor_kwargs`.

        Raises:
            TokPruneError: vLLM answers it with status 400.
        """
        check_key(kwargs)
        given = kwargs.get(KEY)
        if given is None:
            return self.plan
        if self.plan is None:
            raise OptionError(f"{KEY}: this server prunes nothing; start it with --mm-processor-kwargs '{EXAMPLE}'")
        return self.plan.of_request(given)


class PrunedProcessor:
    """Mixed into a MultiModalProcessor of vLLM. Requests run in several threads, so nothing of one is kept here."""

    info: Any

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """What the engine gets of a prompt.

        Raises:
            UnsupportedModelError: positions behind a picture would be wrong; vLLM answers it with status 400.
        """
        found: Any = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        plan = self.info.plan
        if plan is not None and plan.family.positions == "original":
            for modality in plan.family.modalities:
                lengths = [place.length for place in found["mm_placeholders"].get(modality, ())]
                token = getattr(plan.family.config, f"{modality}_token_id")
                check_places(found["prompt_token_ids"], lengths, token, modality)
        return found

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Features of a picture differ by method and budget: also where servers share what they cache."""
        hashes: Any = super()._get_mm_hashes(inputs)
        plan = self.info.plan_of(inputs.hf_processor_mm_kwargs)
        if plan is None:
            return hashes
        own = {name: hashes[name] for name in plan.family.modalities if name in hashes}
        return hashes | {name: [f"{value}-{plan.identity}" for value in values] for name, values in own.items()}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        """Add our fields; pictures that come as ready features have no pixels and pass unpruned."""
        processed: Any = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        plan = self.info.plan_of(hf_kwargs)
        for modality in () if plan is None else plan.family.modalities:
            given = mm_items.get(modality)
            items = given.get_processor_data().get(f"{modality}s") if given else None
            if items is not None and processed.get(PIXELS[modality]) is not None:
                processed.update(plan.family.noted(processed, self.info))
                processed[FIELDS[modality]] = _numbers(plan, of_modality(processed, modality), items)
        return processed

    def _get_mm_fields_config(self, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
        from vllm.multimodal.inputs import MultiModalFieldConfig

        fields = dict(super()._get_mm_fields_config(inputs, kwargs))
        notes = () if self.info.plan is None else self.info.plan.family.notes
        named = [*FIELDS.items(), *(("image", note) for note in notes)]
        return fields | {field: MultiModalFieldConfig.batched(modality, keep_on_cpu=True) for modality, field in named}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if self.info.plan is None:
            return updates
        breaks = self.info.plan.family.keeps_breaks
        return [_cut(update, out_mm_kwargs, breaks) if update.modality in FIELDS else update for update in updates]


def check_places(prompt: Sequence[int], lengths: Sequence[int], token: int, modality: str = "image") -> None:
    """Raise UnsupportedModelError unless columns of pictures can be told from the prompt alone, as vLLM's runners do.

    Args:
        prompt: ids of its tokens.
        lengths: placeholders of every picture, or of every video.
        token: the id of such a placeholder.
        modality: "image" or "video".
    """
    if list(prompt).count(token) != sum(lengths):
        raise UnsupportedModelError(
            f"{KEY}: the prompt has more {modality} tokens than {modality}s have; leave the others out"
        )
    if len(prompt) and prompt[-1] == token:
        raise UnsupportedModelError(
            f"{KEY}: the prompt ends with {modality} tokens; write <|vision_end|> and text behind them"
        )


def salt_of(image: Any) -> int:
    """For seeded methods: the same picture is drawn from alike in every batch and on every server.

    Args:
        image: a picture; or frames of a video, alone or with what is known about them.
    """
    return zlib.crc32(np.ascontiguousarray(image[0] if isinstance(image, tuple) else image))


def _numbers(plan: Plan, processed: Mapping[str, Any], items: Any) -> torch.Tensor:
    """Our field of pictures or videos."""
    numbers = [
        (plan.n_keep(layout), plan.n_rows(layout), len(layout.crop), salt_of(item))
        for layout, item in zip(plan.family.layouts(processed), items, strict=True)
    ]
    return torch.tensor(numbers, dtype=torch.int64)


def of_modality(processed: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """What a processor made, without the grids of the other modalities."""
    others = {f"{name}_grid_thw" for name in FIELDS if name != modality}
    return {name: value for name, value in processed.items() if name not in others}


def _cut(update: Any, out_mm_kwargs: Any, keeps_breaks: bool) -> Any:
    """The update of a prompt with as many placeholders as rows stay."""
    original, field = update.replacement, FIELDS[update.modality]

    def replacement(item: int) -> Any:
        planned = original(item)
        data = out_mm_kwargs[update.modality][item]
        if field not in data:
            return planned
        _, n_rows, n_all, _ = data[field].data.tolist()
        ids, is_row = parts_of(planned)
        token = ids[is_row.index(True)]
        if keeps_breaks:  # only what ends the whole picture is text
            is_row = [True] * (len(ids) - 1) + [False]
        if sum(is_row) != n_all:
            raise UnsupportedModelError(
                f"{KEY}: vLLM plans {sum(is_row)} tokens for a {update.modality} where its layout says {n_all}"
            )
        return with_content(planned, shortened(ids, is_row, token, n_rows))

    return replace(update, replacement=replacement)


def shortened(ids: Sequence[int], is_row: Sequence[bool], token: int, n_rows: int) -> list[int]:
    """What stands for a picture in a prompt, with fewer rows.

    Args:
        ids: with all rows.
        is_row: which of them are rows; the others stay.
        token: of a row.
        n_rows: that stay.
    """
    places = [i for i, row in enumerate(is_row) if row]
    dropped, kept = set(places[n_rows:]), set(places[:n_rows])
    return [token if i in kept else own for i, own in enumerate(ids) if i not in dropped]


@functools.cache
def mixed(mixin: type, cls: type) -> type:
    """A class of vLLM with one of ours in front."""
    return type(f"Pruned{cls.__name__}", (mixin, cls), {})


def with_processor(model: Any) -> Any:
    """Register, for a subclass of a model of vLLM, the processor of that model with ours in front."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    made = model._processor_factory  # of the class that it is made from

    def info(ctx: Any) -> Any:
        return mixed(PrunedInfo, type(made.info(ctx)))(ctx)

    def processor(info: Any, dummy_inputs: Any, **more: Any) -> Any:
        return mixed(PrunedProcessor, type(made.processor(info, dummy_inputs, **more)))(info, dummy_inputs, **more)

    return MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=made.dummy_inputs)(model)
