"""Drops columns between decoder layers; every layer keeps its own part of the sequence in the KV cache.

After a cut, layers run on fewer columns. The cache of transformers has a length for every layer, so nothing is changed
there: which columns a layer holds is written on the cache object, with what `..shorten` writes. Columns keep the
positions that they came with. The hidden states get their length back after the last layer. Independent of
methods and model families.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokprune.core.clock import span
from tokprune.core.errors import NotCopyable, TokPruneError, UnsupportedCacheError
from tokprune.core.ops import forward_fill, gather_columns, right_align

from .. import compat
from ..caches import Columns, NewColumns
from ..hooks import Hooks
from ..shorten import Shortener


@dataclass(frozen=True)
class Entry:
    """What enters the language model in one pass, after the columns dropped before it.

    Args:
        embeds: (B, S, D).
        valid: (B, S) bool; False is padding.
        source: (B, S) the user's columns, or None where they are the same.
        past: columns before these in layer 0.
    """

    embeds: Tensor
    valid: Tensor
    source: Tensor | None
    past: int


@dataclass(frozen=True)
class Cut:
    """What stays before a layer.

    Args:
        hidden: (B, K, D) hidden states, changed where a method merges.
        keep: (B, K) bool; False also for padding.
        lengths: columns that stay, by row, known on the host.
        n_tail: how many of the last columns of this pass stay in every row, at least.
    """

    hidden: Tensor
    keep: Tensor
    lengths: list[int]
    n_tail: int


class Here(Protocol):
    """What a chooser may ask about the layer that it is asked at."""

    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the columns that are here, (B or 1, K, d)."""

    def alone(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines as if every row were alone, without padding before it."""

    def cached(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys of earlier passes in a layer, (B, H, P, d), and which of them are not padding, (B, P)."""

    def held(self, layer: int) -> Tensor | None:
        """Keys of earlier passes and of this one in the layer before, (B, H, P + K, d); None without a cache."""


class Chooser(Protocol):
    """Who decides what stays."""

    layers: frozenset[int]

    def begin(self, entry: Entry) -> bool:
        """Called with every pass over a prompt; whether something is to be cut in it."""

    def cut(self, layer: int, hidden: Tensor, here: Here) -> Cut | None:
        """Asked before each of `layers`; None leaves all columns."""

    def end(self, lengths: list[int], past: list[int], rows: list[list[int]]) -> None:
        """Called after a pass with cuts: columns by layer, cached ones before, and after a cut those of every row."""


@dataclass
class _Layers:
    """One pass through the layers."""

    cache: Any
    past: int  # columns of earlier passes in layer 0
    n: int  # columns of this pass before any cut
    mask: Tensor | None  # (B, past + n), or None
    cutting: bool
    old: tuple[Columns | None, ...]
    new: list[Columns | None]
    origin: Tensor | None  # (B, 1) positions of the rows' first tokens, where padding counts as positions
    kept: NewColumns | None = None  # of this pass, at the layer that is reached
    lengths: list[int] = field(default_factory=list)
    past_lengths: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    row_lengths: list[int] = field(default_factory=list)  # at the layer that is reached
    served: dict[int, tuple] = field(default_factory=dict)  # by stage, where nothing is cut
    memo: dict = field(default_factory=dict)  # by what it is made of: layers of a stage share it

    def once(self, key: tuple, make):
        """Made for the first layer of a stage, used by the others; the sources are held so that ids stay theirs."""
        found = self.memo.get(tuple(map(id, key)))
        if found is None:
            found = self.memo[tuple(map(id, key))] = (key, make())
        return found[1]


class LayerShortener(NotCopyable):
    """Hooks on a language model and its layers from the first possible cut on.

    Args:
        language_model: has `layers`, called one after the other with hidden states and keywords.
        shortener: of the same model, which runs before.
        chooser: decides what stays.
        first: the first layer to hook.
    """

    def __init__(self, language_model: nn.Module, shortener: Shortener, chooser: Chooser, first: int):
        self.language_model, self.shortener, self.chooser, self.first = language_model, shortener, chooser, first
        shortener.serves_cut_layers = True
        self.n_layers = len(language_model.layers)  # type: ignore[arg-type]

    def install(self, hooks: Hooks) -> None:
        """Register the hooks, the shortener's among them, which runs first and ends last."""
        module: Any = self.language_model
        idle = self.shortener.observer.passes.idle
        hooks.after(module, self._leave, idle)
        self.shortener.install(hooks)
        hooks.before(module, self._enter)
        hooks.count(module.layers)
        for i in range(self.first, self.n_layers):
            hooks.before(module.layers[i], functools.partial(self._layer, i), idle)

    @property
    def _pass(self) -> Any:
        return self.shortener.observer.passes.current

    # ------------------------------------------------------------------------------- the language model

    @span("cut")
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        embeds, cache = kwargs.get("inputs_embeds"), compat.cache_of(kwargs)
        if self._pass.step is not None and self._goes_on(cache, kwargs):
            return None
        x = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if x is None:
            return None
        past, mask = compat.past_length(cache), self.shortener.mask_of(kwargs)
        old = getattr(cache, compat.LAYERS_STATE, None) or (None,) * self.n_layers
        if any(old[: self.first]):
            raise UnsupportedCacheError("layers of this cache were cut by another attachment; start a new cache")
        cutting = False
        if embeds is not None and (x.shape[1] > 1 or past == 0):
            cutting = self.chooser.begin(self._entry(embeds, mask, past))
        if not cutting and not any(old):
            return None
        compat.refuse_unsupported(cache, mask)
        if cutting:
            self._refuse(module, kwargs)
        elif any(c is not None and len(c.source) != len(x) for c in old):
            raise UnsupportedCacheError("the cache was pruned with another batch; start a new cache")
        self._pass.layers = _Layers(cache, past, x.shape[1], mask, cutting, old, list(old), self.shortener.origin())
        given = kwargs.get("attention_mask")
        if cutting and given is mask:
            ready = compat.without_blind_rows(module, mask, x.shape[1], x.dtype)
            return None if ready is mask else (args, {**kwargs, "attention_mask": ready})
        return None

    def _goes_on(self, cache: Any, kwargs: Mapping) -> bool:
        """Whether no layer needs anything in a step of decoding: nothing is padded, and nothing was taken back."""
        mask, x = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        old = getattr(cache, compat.LAYERS_STATE, None)
        if mask is not None or x is None or self._attention != "sdpa" or self._pass.shortening is not None:
            return False
        if old is None:
            return True
        past = compat.past_length(cache)
        firsts = [i for i, columns in enumerate(old) if columns is not None and columns is not old[i - 1]]
        for i in firsts:
            n_past = old[i].source.shape[1] + past - old[i].n_outer
            known = old[i].all_valid and past >= old[i].n_outer and len(old[i].source) == len(x)
            if i < self.first or not known or compat.layer_length(cache, i) != n_past:
                return False
        return True

    def _entry(self, embeds: Tensor, mask: Any, past: int) -> Entry:
        new = self.shortener.new_columns
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if new is not None:
            valid = new.valid
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask[:, -embeds.shape[1] :].to(embeds.device).bool()
        return Entry(embeds, valid, None if new is None else new.source, past)

    def _refuse(self, module: nn.Module, kwargs: Mapping) -> None:
        if module.training:
            raise TokPruneError("methods between decoder layers are for inference: call model.eval(), or attach later")
        config = module.config
        asked = kwargs.get("output_attentions")
        if config.output_attentions if asked is None else asked:  # type: ignore[union-attr]
            raise TokPruneError(
                "output_attentions with cuts between decoder layers would give maps of several sizes; leave it out, or "
                "use a method that acts before the language model"
            )

    @span("cut")
    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, out):
        this = self._pass.layers
        if this is None:
            return None
        cache = compat.cache_of(out) if isinstance(out, Mapping) else this.cache
        if cache is not None:
            setattr(cache, compat.LAYERS_STATE, tuple(this.new))
        if this.cutting:
            uncut: list[list[int]] = [[]] * self.first
            lengths = [this.n] * self.first + this.lengths
            self.chooser.end(lengths, [this.past] * self.first + this.past_lengths, uncut + this.rows)
        if this.kept is None:
            return None
        fill = forward_fill(this.kept.source, this.kept.valid, this.n)
        if isinstance(out, tuple):
            return (gather_columns(out[0], fill, 1), *out[1:])
        out["last_hidden_state"] = gather_columns(out["last_hidden_state"], fill, 1)
        return out

    # ------------------------------------------------------------------------------- one decoder layer

    def _layer(self, i: int, module: nn.Module, args: tuple, kwargs: dict):
        this = self._pass.layers
        if this is None:
            return None
        if not this.cutting:
            return self._serve(this, i, args, kwargs)
        return self._cut(this, i, args, kwargs)

    @span("cut")
    def _cut(self, this: _Layers, i: int, args: tuple, kwargs: dict):
        """A layer of a pass with cuts: which columns it sees."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if i in self.chooser.layers:
            cut = self.chooser.cut(i, hidden, _Here(self, this, kwargs))
            if cut is not None:
                hidden = self._gather(this, cut)
        old, n_past = self._history(this, i)
        if old is not None:
            self._take_back(this, i, n_past)
        this.lengths.append(hidden.shape[1])
        this.past_lengths.append(n_past)
        this.rows.append(this.row_lengths)
        if this.kept is None and old is None:
            return None
        columns = self._columns(this, i, old)
        changed = self._keywords(this, columns, kwargs, hidden)
        if not changed:
            return None
        if args:
            return (hidden, *args[1:]), {**kwargs, **changed}
        return args, {**kwargs, **changed, "hidden_states": hidden}

    def _serve(self, this: _Layers, i: int, args: tuple, kwargs: dict):
        """A pass without cuts on a cache with some, every step of decoding: what a stage needs is made once."""
        before, mask = this.old[i], kwargs.get("attention_mask")
        if before is None:
            return None
        found = this.served.get(id(before))
        if found is None or found[2] is not mask:
            columns: Any
            columns, n_past = self._history(this, i)
            changed = self._keywords(this, columns, kwargs, args[0] if args else kwargs["hidden_states"])
            longer = compat.layer_length(this.cache, i) > n_past
            found = this.served[id(before)] = columns, n_past if longer else None, mask, changed
        columns, n_past, _, changed = found
        if n_past is not None:  # all layers of a stage are equally long
            self._take_back(this, i, n_past)
        this.new[i] = columns
        return (args, {**kwargs, **changed}) if changed else None

    def _gather(self, this: _Layers, cut: Cut) -> Tensor:
        """Hidden states of what stays, right-aligned."""
        longest = max(cut.lengths)
        source, valid = right_align(cut.keep, longest)
        equal = min(cut.lengths) == longest
        hidden = gather_columns(cut.hidden, source, 1)
        hidden = hidden if equal else hidden.masked_fill(~valid[..., None], 0)
        outer = source if this.kept is None else this.kept.source.gather(1, source)
        none = source.new_zeros(len(source), 1)
        this.kept = NewColumns(outer, valid, this.n, equal, cut.n_tail, none, none)
        this.row_lengths = cut.lengths
        return hidden

    def _history(self, this: _Layers, i: int) -> tuple[Columns | None, int]:
        """What a layer's cache holds of earlier passes, cut back where candidates were taken back, and how much."""
        old = this.old[i]
        if old is None:
            return None, this.past
        if this.past < old.n_outer - old.n_tail:
            raise UnsupportedCacheError(
                "the cache was cut back into the part of the prompt from which tokens were dropped; start a new cache"
            )
        old = this.once((old,), lambda: old.shortened(this.past))
        return old, old.source.shape[1] + this.past - old.n_outer

    def _take_back(self, this: _Layers, i: int, n_past: int) -> None:
        """Cut a layer's cache that was left too long; only before the layer has run in this pass."""
        # transformers cuts all layers to one length, which is above a pruned layer's
        compat.crop_layer(this.cache, i, n_past)

    def _columns(self, this: _Layers, i: int, old: Columns | None) -> Columns:
        """What the layer's cache holds after this pass."""
        if this.kept is None:
            this.new[i] = old
            return old  # type: ignore[return-value]
        kept = this.kept

        def extended() -> Columns:
            before = old or Columns.identity(len(kept.source), this.past, kept.source.device)
            return before.extended(this.past, kept)

        columns = this.new[i] = this.once((old, kept), extended)
        return columns

    def _keywords(self, this: _Layers, columns: Columns, kwargs: Mapping, hidden: Tensor) -> dict[str, Any]:
        """What the layer has to be called with instead."""
        changed: dict[str, Any] = {}
        mask = kwargs.get("attention_mask")
        inner = this.once((columns, mask), lambda: self._mask(this, columns, mask, hidden))
        if inner is not mask:
            changed["attention_mask"] = inner
        flash = "flash" in self._attention
        if flash and kwargs.get("position_ids") is not None:
            # Flash attention takes gaps in positions for several packed sequences; the rotation is done already.
            changed["position_ids"] = None
        if this.kept is None:
            return changed
        changed["position_embeddings"] = self._rotary(this, kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None and not flash:
            ids, source = kwargs["position_ids"], this.kept.source
            changed["position_ids"] = this.once((ids, source), lambda: gather_columns(ids, source, -1))
        if kwargs.get("cache_position") is not None:  # transformers 4
            changed["cache_position"] = kwargs["cache_position"][: hidden.shape[1]]
        return changed

    @property
    def _attention(self) -> str:
        return compat.attention_implementation(self.language_model)

    def _rotary(self, this: _Layers, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        kept = this.kept
        if kept is None:
            return pair
        return this.once((pair, kept), lambda: tuple(gather_columns(t, kept.source, -2) for t in pair))

    def _mask(self, this: _Layers, columns: Columns, mask: Any, hidden: Tensor) -> Any:
        """The mask of a layer, from the one that transformers made for all."""
        total = this.past + this.n
        if mask is None and columns.all_valid:
            return None
        if (mask is None and "flash" in self._attention) or (isinstance(mask, Tensor) and mask.ndim == 2):
            return columns.inner_mask(mask, total)
        batch, device = len(columns.source), columns.source.device
        source, valid = columns.up_to(total)
        kept = this.kept
        rows = torch.arange(this.n, device=device).expand(batch, -1) if kept is None else kept.source
        if mask is None:
            seen = source[:, None, None] <= (rows + this.past)[:, None, :, None]
            mask = seen if self._attention != "eager" else _additive(seen, hidden.dtype)
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask.expand(batch, -1, -1, -1)
            index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.gather(2, index.to(mask.device)) if kept is not None else mask
            index = source[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
            mask = mask.gather(3, index.to(mask.device))
        else:
            raise TokPruneError(
                f"attention masks of type {type(mask).__name__} cannot be shortened; use attn_implementation='sdpa'"
            )
        if columns.all_valid:
            return mask
        # Padding sees everything: a query that sees nothing is NaN in some kernels, and NaN spreads through products.
        padding = torch.zeros_like(valid[:, :1]) if kept is None else ~kept.valid
        hides, shows = ~valid[:, None, None].to(mask.device), padding[:, None, :, None].to(mask.device)
        if mask.dtype == torch.bool:
            return (mask & ~hides) | shows
        return mask.masked_fill(hides, torch.finfo(mask.dtype).min).masked_fill(shows, 0)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


class _Here:
    """The layer that a chooser is asked at."""

    def __init__(self, shortener: LayerShortener, this: _Layers, kwargs: Mapping):
        self.shortener, self.this, self.kwargs = shortener, this, kwargs

    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the columns that are here."""
        return self.shortener._rotary(self.this, self.kwargs["position_embeddings"])

    def alone(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The same as if every row were alone, without padding before it."""
        origin = self.this.origin
        if origin is None:
            return pair
        (cos, sin), (c, s) = pair, compat.rotary(self.shortener.language_model, pair[0], origin)
        length = (c.square() + s.square()).sqrt()  # cosines and sines may be scaled
        return (cos * c + sin * s) / length, (sin * c - cos * s) / length

    def cached(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys of earlier passes in a layer and which of them are not padding."""
        this = self.this
        if not this.past:
            return None
        old, n_past = self.shortener._history(this, layer)
        keys = compat.cached_keys(this.cache, layer)[:, :, :n_past]
        mask = None if this.mask is None else this.mask[:, : this.past]
        if old is not None:
            mask = old.inner_mask(mask, this.past)
        visible = torch.ones(len(keys), n_past, device=keys.device) if mask is None else mask
        return keys, visible.to(keys.device).bool()

    def held(self, layer: int) -> Tensor | None:
        """Keys of earlier passes and of this one in the layer before; None where no cache holds exactly them."""
        this, cache = self.this, compat.cache_of(self.kwargs)
        if cache is None:
            return None
        keys = compat.cached_keys(cache, layer)
        n_columns = (this.past_lengths or [this.past])[-1] + (this.lengths or [this.n])[-1]
        return keys if keys.shape[2] == n_columns else None
