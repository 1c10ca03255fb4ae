"""Everything that tokprune takes from transformers without a promise: names, attributes and behaviour of its releases.

Nothing else in the package names these things. Each has a test in `tests/contract/test_compat.py` that fails with a
sentence when a release changes it. transformers itself is not imported here: what is asked for hangs on the model.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tokprune.core.errors import UnsupportedCacheError, UnsupportedModelError
from tokprune.core.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor

OLDEST, NEWEST = "4.57.6", "5.24.0"  # releases of transformers that the laws run on, and some between
STATIC_SINCE = "5.24"  # its generate() prepares what static caches need in prepare_inputs_for_generation
LAYERS_STATE = "_tokprune_layers"  # on a cache whose layers were cut: what each of them holds
# Outputs of a multimodal model that hold encoded pictures: features up to 5.23, the encoder's whole output from 5.24.
FEATURE_FIELDS = ("image_hidden_states", "video_hidden_states")
ENCODED_FIELDS = ("image_outputs", "video_outputs")


# ------------------------------------------------------------------------------------------- releases


@functools.cache
def transformers_release() -> str:
    """The installed release of transformers; reading a package's metadata takes milliseconds."""
    return importlib.metadata.version("transformers")


def is_newer_than_tested(release: str) -> bool:
    """Whether a release has another major or minor number than any that was tested, and a higher one."""
    found, newest = ([int(part) for part in text.split(".")[:2]] for text in (release, NEWEST))
    return found > newest


def is_at_least(release: str) -> bool:
    """Whether the installed release is this one or a newer one."""
    found, least = ([int(part) for part in text.split(".")[:2]] for text in (transformers_release(), release))
    return found >= least


@functools.cache
def warn_if_untested() -> None:
    """Warn once a process where transformers is newer than the newest release that was tested."""
    release = transformers_release()
    if is_newer_than_tested(release):
        warnings.warn(
            f"transformers {release} is newer than {NEWEST}, the newest release that tokprune is tested on; "
            "check it with: tokprune doctor",
            stacklevel=4,
        )


def torchvision_fault() -> str | None:
    """Why an installed torchvision keeps transformers from importing its models; None where it does not."""
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever a broken binary raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


# ------------------------------------------------------------------------------------------- KV caches


def cache_of(named: Mapping) -> Any:
    """The cache among the keywords or in the output of a call; `past_key_values` before 5.24."""
    found = named.get("cache")
    if found is None and "cache" not in getattr(type(named), "__dataclass_fields__", ()):
        found = named.get("past_key_values")
    return found


def as_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword with which a model's forward takes a cache."""
    takes = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}


def past_length(cache: Any) -> int:
    """Tokens in a cache; 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def is_static(cache: Any) -> bool:
    """Whether a cache holds keys in tensors of a fixed size."""
    return type(cache).__name__ == "StaticCache"


def limit_static(cache: Any, length: int) -> int:
    """Shorten layers that hold nothing yet to a length; layers with a shorter window stay. Returns the longest."""
    sized = [layer for layer in cache.layers if hasattr(layer, "max_cache_len")]
    for layer in sized:
        if not layer.is_initialized:
            layer.max_cache_len = min(layer.max_cache_len, length)
    return max((layer.max_cache_len for layer in sized), default=0)


def cached_keys(cache: Any, layer: int) -> Tensor:
    """Keys that a layer holds, (B, H, P, d)."""
    return cache.layers[layer].keys


def crop_cache(cache: Any, n: int) -> None:
    """Take the last n tokens out of every layer.

    Raises:
        UnsupportedCacheError: a layer holds a state that nothing can be taken out of.
    """
    if not all(getattr(layer, "is_croppable", not _is_recurrent(layer)) for layer in cache.layers):
        raise UnsupportedCacheError(
            "layers of this cache hold one state of all that they have read, so tokens cannot be taken back and passed "
            "again; pass only new tokens, with the full attention_mask"
        )
    cache.crop(-n)


def _is_recurrent(layer: Any) -> bool:
    return type(layer).__name__ == "LinearAttentionLayer"


def layer_length(cache: Any, layer: int) -> int:
    """Tokens that a layer of a cache holds."""
    return int(cache.layers[layer].get_seq_length())


def crop_layer(cache: Any, layer: int, length: int) -> None:
    """Cut one layer back to a length."""
    held = cache.layers[layer]
    excess = held.get_seq_length() - length
    if excess > 0:
        held.crop(-excess)


def refuse_unsupported(
    cache: Any, mask: Any, sliding: bool = False, recurrent: bool = False, static: bool = False
) -> None:
    """Raise UnsupportedCacheError for caches and masks that cannot be shortened.

    Args:
        cache: of the call.
        mask: of the call.
        sliding: whether layers with a sliding window may hold a pruned sequence.
        recurrent: whether layers may hold a state in place of keys.
        static: whether layers may have a fixed size.
    """
    _refuse_cache(cache, sliding, recurrent, static and is_at_least(STATIC_SINCE))
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise UnsupportedCacheError(
            f"an attention mask of your own ({_kind_of_mask(mask)}) cannot be shortened with the tokens; pass the "
            "2-D attention_mask that the processor makes, with attn_implementation='sdpa' or 'eager'"
        )


def _kind_of_mask(mask: Any) -> str:
    return f"{mask.ndim}-D" if isinstance(mask, torch.Tensor) else type(mask).__name__


def _refuse_cache(cache: Any, sliding: bool, recurrent: bool, static: bool) -> None:
    if cache is None:
        return
    # A DummyLayer holds nothing: its layer reads the keys of another one.
    allowed = {"DynamicCache", "DynamicLayer", "DummyLayer", *(["DynamicSlidingWindowLayer"] if sliding else [])}
    allowed |= {"LinearAttentionLayer"} if recurrent else set()
    if static:
        allowed |= {name.replace("Dynamic", "Static") for name in allowed}
    layers = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    layers.add(getattr(getattr(cache, "layer_class_to_replicate", None), "__name__", "DynamicLayer"))
    names = {type(cache).__name__, *layers}
    for word, kind, instead in (
        ("Static", "static", "leave cache_implementation out"),
        ("Quant", "quantised", "leave cache_implementation out"),
        ("Sliding", "sliding-window", "use a model or configuration without sliding_window"),
    ):
        if any(word in name for name in names - allowed):
            raise UnsupportedCacheError(
                f"a {kind} cache ({type(cache).__name__}) cannot hold pruned sequences; {instead} (DynamicCache)"
            )
    if getattr(cache, "offloading", False):
        raise UnsupportedCacheError(
            "an offloaded cache cannot hold pruned sequences; leave cache_implementation='offloaded' out (DynamicCache)"
        )
    if not names <= allowed:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} ({', '.join(sorted(layers))}) cannot hold pruned sequences; use a DynamicCache"
        )


# ------------------------------------------------------------------------------------------- encoded pictures


def features_of(encoded: Any) -> Any:
    """What an encode function made of pictures: releases 5 return an output object, releases 4 the features."""
    return getattr(encoded, "pooler_output", encoded)


def with_features(encoded: Any, features: Any) -> Any:
    """The same with other features; the object that was given stays as it is."""
    if not hasattr(encoded, "pooler_output"):
        return features
    twin = copy.copy(encoded)
    twin.pooler_output = features
    return twin


def replace_features(out: Any, change: Callable[[Any], Any]) -> Any:
    """The output of a multimodal model with the pictures that it hands back changed.

    What it hands back is passed again by generate() at every step without a cache, so that object stays as it is.
    """
    if isinstance(out, tuple):
        return tuple(map(change, out))
    for field in FEATURE_FIELDS:
        if field in out:
            out[field] = change(out[field])
    for field in ENCODED_FIELDS:
        if field in out:
            out[field] = with_features(out[field], change(features_of(out[field])))
    return out


# ------------------------------------------------------------------------------------------- modules


def attention_implementation(module: Any) -> str:
    """Name of a module's attention implementation; "" where none is set."""
    return getattr(module.config, "_attn_implementation", "") or ""


def rotary(language_model: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (B, n, d), that a language model turns queries and keys by, at positions (B, n)."""
    return language_model.rotary_emb(like, positions)


def turns(language_model: Any, positions: Tensor, m_rope: bool) -> Tensor:
    """(B or 1, n, 2 d) float32 of length 1: cosines and sines that positions (B or 1, n), or (3 or 4, B, n), turn by.

    The product of two of them is the mean cosine of the angle between the two positions, over all frequencies.
    """
    positions = positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions  # the first counts columns
    attention = language_model.layers[0].self_attn
    if m_rope and positions.ndim == 2:
        positions = positions.expand(3, *positions.shape)
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = plain_rotary(attention, rotary(language_model, like, positions))
    return torch.nn.functional.normalize(torch.cat([cos, sin], -1), dim=-1)  # they may be scaled


def without_blind_rows(module: Any, mask: Tensor | None, n_new: int, dtype: torch.dtype) -> Tensor | None:
    """A mask (B, P + n_new) with which padding is not NaN.

    Eager attention takes its softmax in float32, where float64's least number is an infinity: a row that sees nothing
    becomes NaN, and spreads. There the mask is made ready, (B, 1, n_new, P + n_new), and padding sees everything.
    """
    if mask is None or n_new == 1 or dtype != torch.float64 or attention_implementation(module) != "eager":
        return mask
    valid = mask.bool()
    past = mask.shape[1] - n_new
    causal = torch.ones(n_new, mask.shape[1], dtype=torch.bool, device=mask.device).tril(past)
    seen = (causal & valid[:, None]) | ~valid[:, past:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def ready_masks(
    model: Any, embeds: Tensor, mask: Tensor, cache: Any, positions: Tensor, first: bool, types: Mapping[str, Tensor]
) -> Any:
    """Masks that a model would make for its language model, for embeddings (B, K, D) after what a cache holds.

    Args:
        model: with its head; its class makes the masks.
        embeds: (B, K, D).
        mask: (B, P + K), 0 for padding.
        cache: or None.
        positions: (B, K).
        first: whether nothing came before.
        types: the model's keyword for what every column is, (B, K), where it has one.
    """
    takes = inspect.signature(model.create_masks_for_generate).parameters
    return model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=embeds,
        attention_mask=mask,
        **{"cache" if "cache" in takes else "past_key_values": cache},
        position_ids=positions,
        is_first_iteration=first,
        **types,
    )


def rotate(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, H, S, d) of an attention module, turned by its own rotary embedding."""
    module = sys.modules[type(attention).__module__]
    if hasattr(module, "apply_rotary_pos_emb"):
        return module.apply_rotary_pos_emb(x, x[:, :1], cos, sin)[0]  # it turns two; of the second, one head
    return x * cos[:, None] + module.rotate_half(x) * sin[:, None]  # of M-RoPE in releases 4, after `plain_rotary`


def position_deltas(base: Any) -> Tensor | None:
    """(B, 1) by how much M-RoPE positions of text after the last prompt differ from the numbers of its columns."""
    return getattr(base, "rope_deltas", None)


def has_rotary(attention: Any) -> bool:
    """Whether `rotate` works on an attention module."""
    module = sys.modules[type(attention).__module__]
    return hasattr(module, "apply_rotary_pos_emb") or hasattr(module, "apply_multimodal_rotary_pos_emb")


def plain_rotary(attention: Any, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines by column, (B, K, d); releases 4 give those of M-RoPE by axis, (3, B, K, d)."""
    if pair[0].ndim < 4:
        return pair
    sections = [2 * n for n in attention.rope_scaling["mrope_section"]]
    cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(t.split(sections, -1))], -1) for t in pair)
    return cos, sin


def rotate_vision(attention: Any, q: Tensor, k: Tensor, entered: Mapping) -> tuple[Tensor, Tensor]:
    """Queries and keys (patches, H, d) of a vision tower with two-dimensional rotary positions, turned by its own."""
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    return turn(q, k, *entered["position_embeddings"])


def rotate_by_place(attention: Any, x: Tensor, entered: Mapping) -> Tensor:
    """Queries or keys (crops, patches, H, d) of Gemma 4's vision tower, turned by the columns and rows of patches."""
    turn = sys.modules[type(attention).__module__].apply_multidimensional_rope
    return turn(x, *entered["position_embeddings"], entered["position_ids"])


def rotate_pixtral(attention: Any, q: Tensor, k: Tensor, entered: Mapping) -> tuple[Tensor, Tensor]:
    """Queries and keys (1, H, patches, d) of a Pixtral tower, turned by its own rotary embedding."""
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return turn(q, k, *entered["position_embeddings"], unsqueeze_dim=0)


def segments_of_pixtral(entered: Mapping) -> list[int]:
    """Patches of every picture in the sequence of a Pixtral tower, from its mask or what flash attention is told.

    Raises:
        UnsupportedModelError: nothing says where a picture ends.
    """
    if entered.get("cu_seq_lens_q") is not None:
        return entered["cu_seq_lens_q"].diff().tolist()
    mask = entered.get("attention_mask")
    if mask is None:
        raise UnsupportedModelError(
            "attention scores of a Pixtral tower need its mask; load the model with attn_implementation='sdpa'"
        )
    starts = (mask[0, 0].diagonal(-1) != 0).nonzero()[:, 0] + 1  # a first patch does not see the one before it
    places = [0, *starts.tolist(), mask.shape[-1]]
    return [end - start for start, end in itertools.pairwise(places)]


def window_index(tower: Any, grids: Tensor) -> Tensor:
    """The order in which a Qwen2.5 tower has the tokens of pictures of these grids, (n, 3)."""
    if hasattr(tower, "get_window_index"):
        return tower.get_window_index(grids)[0]
    config = tower.config
    found = sys.modules[type(tower).__module__].get_vision_window_index
    return found(
        grids,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
    )[0]


def vision_inputs(tower: Any, grids: Tensor) -> dict[str, Tensor]:
    """What a Qwen tower works out of the grids (n, 3) of its pictures, by keywords with which it takes it ready-made.

    By patch: `position_ids`, and `interp_indices` with `interp_weights` where positions are learned. Ends of what
    attends to itself, in patches: `cu_seqlens`, and `cu_window_seqlens` with the order of tokens, `window_index`, where
    there are windows.
    """
    module, config = sys.modules[type(tower).__module__], tower.config
    found = {
        "position_ids": module.get_vision_position_ids(grids, config.spatial_merge_size),
        "cu_seqlens": module.get_vision_attention_seqlens(grids, config)[0],
    }
    if hasattr(module, "get_vision_window_index"):
        sizes = {"window_size": config.window_size, "patch_size": config.patch_size}
        windows = module.get_vision_window_index(grids, spatial_merge_size=config.spatial_merge_size, **sizes)
        found |= dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True))
    if hasattr(module, "get_vision_interpolation_indices_and_weights"):
        between = module.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
        )
        found |= dict(zip(("interp_indices", "interp_weights"), between, strict=True))
    return found


def spread_features(out: Any, spread: Callable[[Tensor], Tensor]) -> Any:
    """The output of a Qwen tower with `spread` on every tensor that has a row for each token."""
    out.pooler_output = spread(out.pooler_output)
    if getattr(out, "deepstack_features", None) is not None:
        out.deepstack_features = [spread(rows) for rows in out.deepstack_features]
    return out


def m_rope(sections: list[int], interleaved: bool = False) -> dict[str, Any]:
    """What a text configuration says of M-RoPE."""
    options: dict[str, Any] = {"rope_type": "default", "mrope_section": sections}
    if interleaved:
        options["mrope_interleaved"] = True
    if transformers_release().startswith("4."):
        return {"rope_scaling": options, "rope_theta": 10000.0}
    return {"rope_parameters": {**options, "rope_theta": 10000.0}}


def forget_compiled_code() -> None:
    """Let torch.compile trace everything anew: code that it made before does not notice hooks that come or go."""
    if "torch._dynamo" in sys.modules and sys.modules["torch._dynamo"].convert_frame.input_codes.seen:
        torch.compiler.reset()


def pack_image_features(base: Any, crops: list[Tensor], sizes: Any, newline: Tensor, ratio: str | None) -> list[Tensor]:
    """Values of patches through a LLaVA-NeXT model's own packing; releases differ in what it takes."""
    takes = inspect.signature(base.pack_image_features).parameters
    options: dict[str, Any] = {"image_newline": newline}
    if "vision_feature_select_strategy" in takes:
        options["vision_feature_select_strategy"] = base.config.vision_feature_select_strategy
    if "vision_aspect_ratio" in takes:
        options["vision_aspect_ratio"] = ratio
    return list(base.pack_image_features(crops, sizes, **options)[0])


def anyres_grid(base: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the crops of a picture of (height, width) pixels."""
    config = base.config
    shape = _module_of(base).get_anyres_image_grid_shape
    return tuple(shape(size, config.image_grid_pinpoints, config.vision_config.image_size))


def n_anyres_crops(base: Any, size: tuple[int, int]) -> int:
    """Crops of a picture of (height, width) pixels, the thumbnail among them."""
    config = base.config
    count = _module_of(base).image_size_to_num_patches
    return int(count(size, config.image_grid_pinpoints, config.vision_config.image_size))


def _module_of(base: Any) -> Any:
    for kind in type(base).__mro__:
        module = sys.modules.get(kind.__module__)
        if hasattr(module, "image_size_to_num_patches"):
            return module
    raise UnsupportedModelError(f"{type(base).__name__} does not say how pictures are cut into crops")


def positions_of_4(kwargs: Mapping, past: int, n: int, device: torch.device) -> dict[str, Tensor]:
    """`cache_position` where a call of transformers 4 carries one, for n columns after `past`; else nothing."""
    if kwargs.get("cache_position") is None:
        return {}
    return {"cache_position": torch.arange(past, past + n, device=device)}
