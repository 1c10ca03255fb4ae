"""What can be said of a KV cache of transformers without knowing its model."""

from __future__ import annotations

from torch import Tensor

from .errors import UnsupportedCacheError

LAYERS_STATE = "_tokprune_layers"  # on a cache whose layers were cut: what each of them holds


def past_length(cache) -> int:
    """Tokens in a cache; 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_unsupported(cache, mask) -> None:
    """Raise UnsupportedCacheError for caches and masks that cannot be shortened."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedCacheError(
            "a ready-made attention mask (static cache, flex attention, or your own 4-D mask) cannot be "
            "shortened; use the default cache with attn_implementation='sdpa' or 'eager', and a 2-D mask"
        )
    if cache is None:
        return
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    kinds.add(getattr(getattr(cache, "layer_class_to_replicate", None), "__name__", "DynamicLayer"))
    if type(cache).__name__ != "DynamicCache" or getattr(cache, "offloading", False) or kinds != {"DynamicLayer"}:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} ({', '.join(sorted(kinds))}) is not supported with pruned tokens; leave "
            "cache_implementation out (DynamicCache: no static, quantised, offloaded or sliding-window cache)"
        )
