"""Queries and keys of decoder layers, for scores that methods compute from them; no layer is called twice."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.core.errors import NotCopyable, UnsupportedModelError

from ..compat import has_rotary, plain_rotary, rotate
from ..hooks import Hooks, Unless
from ..passes import Passes

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Attention:
    """One layer's attention in one pass, without its cache.

    Args:
        module: the attention module; has scaling and head_dim.
        rotary: cosines and sines, (B or 1, K, d).
        q, k: (B, K, H, d) before the rotation; q is None where it is computed on demand from `states`.
        states: (B, K, D), what the projections take.
    """

    module: Any
    rotary: Rotary
    k: Tensor
    q: Any = None
    states: Tensor | None = None

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.module.scaling

    def queries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Rotated, (G, H, R, d), of rows (G,) at columns (G, R)."""
        at = rows[:, None], columns
        if self.states is None:
            return self._rotated(self.q[at], rows, columns)
        return self._rotated(_projected(self.module, "q", self.states[at]), rows, columns)

    def keys(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Rotated, (G, H_kv, K, d), of rows (G,), at all columns or at (G, R)."""
        if columns is None:
            columns = torch.arange(self.k.shape[1], device=self.k.device).expand(len(rows), -1)
        return self._rotated(self.k[rows[:, None], columns], rows, columns)

    def _rotated(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(G, R, H, d) as attention sees it, (G, H, R, d)."""
        cos, sin = (t[rows[:, None] if len(t) > 1 else 0, columns] for t in self.rotary)
        return rotate(self.module, x.transpose(1, 2), cos, sin)


class DecoderTap(NotCopyable):
    """Collects queries and keys of decoder layers while a pass asks for them.

    Hooks on the projections see what attention sees, whichever implementation runs, and cost no extra product.
    """

    def __init__(self, language_model: nn.Module, passes: Passes):
        self.layers: Any = language_model.layers
        self._passes = passes

    @property
    def _open(self) -> _Open:
        """What is collected of the pass under way."""
        this = self._passes.current
        if this is None:
            return _Open()
        if this.tap is None:
            this.tap = _Open()
        return this.tap

    def check(self) -> None:
        """Raise where the layers are built otherwise."""
        attention = getattr(self.layers[0], "self_attn", None)
        parts = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "scaling", "head_dim"))
        if not parts or not has_rotary(attention) or not hasattr(self.layers[0], "input_layernorm"):
            raise UnsupportedModelError(
                f"attention scores of {type(self.layers[0]).__name__} cannot be computed: it has no q_proj and k_proj "
                "with a rotary embedding. Use a method that acts before the language model, such as 'vtc_cls'"
            )

    def install(self, hooks: Hooks, layers: Iterable[int], unless: Unless) -> None:
        """Hook these layers; `unless` as for `Hooks.before`."""
        for layer in layers:
            module = self.layers[layer].self_attn
            enter = functools.partial(self._enter, layer)
            hooks.before(module, enter, unless)
            for side in ("q", "k"):
                projection = getattr(module, f"{side}_norm", None) or getattr(module, f"{side}_proj")
                hooks.after(projection, functools.partial(self._seen, layer, side), unless)

    def open(self, layers: frozenset[int]) -> None:
        """Collect from these layers in this pass, until the next time."""
        self._open.wanted, self._open.seen = layers, {}

    def take(self, layer: int) -> Attention:
        """What a layer computed; it is let go."""
        seen, module = self._open.seen.pop(layer), self.layers[layer].self_attn
        return Attention(module, seen["rotary"], _by_head(module, seen["k"]), _by_head(module, seen["q"]))

    def ahead(self, layer: int, hidden: Tensor, rotary: Rotary) -> Attention:
        """What a layer would compute from its input, with its own norm and projections."""
        module = self.layers[layer].self_attn
        states = self.layers[layer].input_layernorm(hidden)
        return Attention(module, plain_rotary(module, rotary), _projected(module, "k", states), states=states)

    def _enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        found = self._open
        if layer in found.wanted:
            pair = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
            found.seen[layer] = {"rotary": plain_rotary(module, pair)}

    def _seen(self, layer: int, side: str, projection: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        found = self._open
        if layer in found.seen:
            found.seen[layer][side] = out


@dataclass
class _Open:
    """What a pass collects, and from which layers."""

    wanted: frozenset[int] = frozenset()
    seen: dict[int, dict[str, Any]] = field(default_factory=dict)


def _by_head(module: Any, x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x.unflatten(-1, (-1, module.head_dim))


def _projected(module: Any, side: str, states: Tensor) -> Tensor:
    """(..., H, d) as attention takes them."""
    x = getattr(module, f"{side}_proj")(states).unflatten(-1, (-1, module.head_dim))
    norm = getattr(module, f"{side}_norm", None)
    return x if norm is None else norm(x)
