"""Drops marked columns before the language model and gives the user's length back after it.

A dropped visual token travels as a marked row: NaN in channel 0, zeros elsewhere. The mark sits in the
features themselves, so it survives whatever the model does between its vision tower and its language model:
repeating for beams, scattering into the prompt, slicing for chunked prefill. Only the language model sees a
shorter sequence; input_ids, attention_mask, labels and logits keep their length, and `generate` is untouched.

Which of the user's columns the KV cache holds is written on the cache object itself, so it follows copies of
the cache, outlives single calls, and is freed with the keys it describes. Independent of
methods; what differs between model families is in their declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tokprune.core.clock import span
from tokprune.core.errors import (
    BadFeaturesError,
    NotCopyable,
    TokPruneError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tokprune.core.ops import forward_fill, gather_columns, right_align

from . import compat
from .caches import Columns, NewColumns, columns_on, find_marks, fit_room, note_columns, text_positions
from .calibrate import Calibrator
from .compat import LAYERS_STATE, cache_of, crop_cache, past_length, positions_of_4, refuse_unsupported
from .families.base import ModelFamily
from .hooks import Hooks
from .passes import Pass, Passes

Positions = Literal["contiguous", "original"]
KNOWN_INPUTS = ("inputs_embeds", "input_ids", "attention_mask", "position_ids", "cache_position")


# ---------------------------------------------------------------------------------------- the hooks


@dataclass(frozen=True)
class Ran:
    """What one pass really ran on: rows, columns and cached columns before and after, kept columns a row (B,)."""

    n_rows: int
    n_outer: int
    n_inner: int
    past_outer: int
    past_inner: int
    lengths: Tensor | None = None


class Watcher(Protocol):
    """Who is told what happens."""

    passes: Passes

    def flags(self) -> Mapping[str, Tensor]:
        """Truths and counts, scalars on the device, to be read in the one synchronisation of a prefill."""

    def visual_sizes(self) -> Tensor:
        """(B, S) of the pass under way: how many tokens a visual column stands for, 0 for text."""

    def before_prefill(self, facts: Mapping[str, int], starts_call: bool) -> None:
        """Called with the flags' values and `marked`; raises where they contradict what was promised."""

    def after_prefill(self, ran: Ran) -> None:
        """Called with the lengths of the sequence."""


@dataclass(frozen=True)
class KnownMask:
    """What a pass of generate() was told of padding; generate() makes it longer by ones, and changes nothing else.

    Args:
        cache: of the pass.
        n_outer: columns of the user after it.
        inner: (B, columns of the cache after it); None where nothing is padding.
    """

    cache: Any
    n_outer: int
    inner: Tensor | None

    def longer(self) -> Tensor | None:
        """With one more column."""
        return None if self.inner is None else torch.cat([self.inner, self.inner.new_ones(len(self.inner), 1)], 1)


@dataclass
class _Shortening:
    """One forward pass of the language model, between its two hooks."""

    cache: Any
    new: NewColumns | None = None
    columns: Columns | None = None  # with the new ones
    given: Any = None  # the caller's mask
    numbered: bool = True  # whether the caller gave positions
    mask: Tensor | None = None  # (B, inner columns), what the language model is told of padding


class Shortener(NotCopyable):
    """Forward hooks of one language model.

    Args:
        family: of the model; its language model is called with `inputs_embeds` and keywords.
        positions: "contiguous" numbers the kept columns without gaps, "original" leaves them their numbers.
        observer: told the facts of every prefill.
        calibrator: makes the mask where attention gets a bias; None where it does not.
    """

    def __init__(
        self, family: ModelFamily, positions: Positions, observer: Watcher, calibrator: Calibrator | None = None
    ):
        self.family, self.language_model, self.calibrator = family, family.language_model, calibrator
        self.positions, self.observer = positions, observer
        self.serves_cut_layers = False

    def install(self, hooks: Hooks) -> None:
        """Register the hooks."""
        hooks.before(self.language_model, self.before)
        hooks.after(self.language_model, self.after, self.observer.passes.idle)

    @property
    def new_columns(self) -> NewColumns | None:
        """What stays of the pass under way in this thread; None where nothing of it is marked."""
        this = self._pass.shortening
        return this.new if this else None

    def mask_of(self, kwargs: Mapping) -> Any:
        """The (B, S) mask of the pass under way, or what the caller passed where nothing was dropped."""
        this = self._pass.shortening
        return kwargs.get("attention_mask") if this is None or this.columns is None else this.mask

    def origin(self) -> Tensor | None:
        """(B, 1) padding before the rows of the pass under way, where it counts as positions; else None."""
        this = self._pass.shortening
        if this is None or this.numbered or not isinstance(this.given, Tensor) or this.given.ndim != 2:
            return None
        return this.given.long().argmax(1, keepdim=True)

    def _asked_mask(self, kwargs: Mapping) -> Any:
        """The mask that says which columns are padding, as the caller gave it."""
        return self._pass.asked.get("attention_mask") if self.family.ready_masks else kwargs.get("attention_mask")

    @property
    def _pass(self) -> Pass:
        """The pass under way."""
        this = self.observer.passes.current
        if this is None:
            raise TokPruneError("the language model's hooks run outside of a pass; call attachment.detach()")
        return this

    @span("shorten")
    def before(self, module: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook: gather marked columns away; None where there is nothing to do."""
        cache = cache_of(kwargs)
        if self._pass.step is not None and self._goes_on(cache, args, kwargs):
            return self._step(cache, args, kwargs)
        mask = self._asked_mask(kwargs)
        this = _Shortening(cache, given=mask, numbered=kwargs.get("position_ids") is not None)
        self._pass.shortening = this
        embeds = kwargs.get("inputs_embeds")
        x = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if x is None:
            return None
        if not self.serves_cut_layers and hasattr(cache, LAYERS_STATE):
            raise UnsupportedCacheError("layers of this cache were cut by another attachment; start a new cache")
        columns = columns_on(cache)
        n_new, past_inner = x.shape[1], past_length(cache)
        is_prefill = n_new > 1 or past_inner == 0
        seen = None
        if is_prefill and embeds is not None:
            seen = self._inspect(embeds, mask)
            self.observer.before_prefill(seen.flags, starts_call=past_inner == 0)
            _refuse_unusable(seen, past_inner)
        if columns is None and not (seen and seen.any_marked):
            if is_prefill:
                fit_room(cache, 0)
                self.observer.after_prefill(Ran(len(x), n_new, n_new, past_inner, past_inner))
            return None
        family = self.family
        refuse_unsupported(
            cache, mask, family.sliding_caches, family.recurrent_caches, static=not self.serves_cut_layers
        )
        if columns is not None and (columns.keys is None) != (self.calibrator is None):
            raise UnsupportedCacheError(
                "this cache was pruned with another calibrate, and attention to what it holds needs the same; start a "
                "new cache"
            )
        columns = _known_columns(columns, x, past_inner)
        counted = text_positions(kwargs.get("position_ids"))
        counted = counted if counted is None else counted - self.family.first_position
        past, columns = _rewound(columns, cache, mask, counted, n_new, past_inner)
        this.new = _new_columns(seen) if seen and seen.any_marked else None
        fit_room(cache, n_new - this.new.source.shape[1] if this.new else 0)
        short = self._short({**kwargs, "attention_mask": mask}, x, columns, this, past)
        if is_prefill:
            n_inner, lengths = (this.new.source.shape[1], this.new.valid.sum(1)) if this.new else (n_new, None)
            self.observer.after_prefill(Ran(len(x), n_new, n_inner, past, past_length(cache), lengths))
        return args, short

    def _goes_on(self, cache: Any, args: tuple, kwargs: Mapping) -> bool:
        """Whether a step of decoding follows what the cache holds, of which nothing is taken back or refused."""
        columns, mask = columns_on(cache), kwargs.get("attention_mask")
        cut = hasattr(cache, LAYERS_STATE)
        if columns is None:
            return not cut or self.serves_cut_layers
        if cut or self.serves_cut_layers or self.calibrator is not None or columns.keys is not None:
            return False
        positions = kwargs.get("position_ids")
        if positions is None or kwargs.get("cache_position") is not None:
            return False
        x = kwargs.get("inputs_embeds")
        x = x if x is not None else kwargs.get("input_ids", args[0] if args else None)
        n_outer = past_length(cache) + columns.n_dropped
        known = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == n_outer + 1)
        return known and n_outer >= columns.n_outer and x is not None and len(x) == len(columns.source)

    def _step(self, cache: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The keywords of such a step; None where they stay."""
        columns, positions = columns_on(cache), kwargs["position_ids"]
        if columns is None:
            return None
        n_outer = past_length(cache) + columns.n_dropped + 1
        if self.positions == "contiguous":
            positions = positions - columns.shift.to(positions.device)
        generation = self._pass.generation
        known = None if generation is None else generation.mask
        if known is not None and known.cache is cache and known.n_outer == n_outer - 1:
            inner = known.longer()
        else:
            inner = columns.inner_mask(kwargs.get("attention_mask"), n_outer)
        if generation is not None:
            generation.mask = KnownMask(cache, n_outer, inner)
        return args, {**kwargs, "attention_mask": inner, "position_ids": positions}

    def _inspect(self, embeds: Tensor, mask) -> _Seen:
        """Which columns stay, and every fact about them, in one synchronisation."""
        marked, bad = find_marks(embeds)
        keep = ~marked
        if isinstance(mask, Tensor) and mask.ndim == 2:
            keep = keep & mask[:, -embeds.shape[1] :].to(keep.device).bool()  # squeezes padding out, too
        lengths = keep.sum(1)
        places = torch.arange(1, keep.shape[1] + 1, device=keep.device)
        # Rows of which this part of a prompt is padding alone hold nothing, either, and nothing was taken from them.
        emptied = (marked.any(1) & (lengths == 0)).any()
        flags = {**self.observer.flags(), "marked": marked.any(), "bad": bad.any(), "emptied": emptied}
        numbers = [lengths.amax(), lengths.amin(), places.masked_fill(keep, 0).amax()]
        values = torch.stack([*numbers, *(f.to(lengths) for f in flags.values())]).tolist()
        longest, shortest, last_dropped = values[:3]
        read = dict(zip(flags, values[3:], strict=True))
        return _Seen(keep, marked, longest, shortest, keep.shape[1] - last_dropped, read)

    def _short(self, kwargs: dict, x: Tensor, before: Columns, this: _Shortening, past: int) -> dict:
        """The keywords for the short sequence."""
        short, new, n_new, cache = dict(kwargs), this.new, x.shape[1], this.cache
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(past, past + n_new, device=x.device)[None]
        shift = before.shift
        if new is not None:
            embeds = gather_columns(x, new.source, 1)
            # NaN under a mask is still NaN: 0 * NaN in the product of weights and values.
            short["inputs_embeds"] = embeds if new.all_valid else embeds.masked_fill(~new.valid[..., None], 0)
            position_ids = gather_columns(position_ids, new.source, -1)
            shift = shift + new.marked_before
            short |= self._gathered(kwargs, new)
        if self.positions == "contiguous":
            position_ids = position_ids - shift.to(position_ids.device)
        short["position_ids"] = position_ids
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, : past + n_new]
        this.columns = before.extended(past, new) if new else before
        inner = this.columns.inner_mask(mask, past + n_new)
        past_inner, n_inner = past_length(cache), new.source.shape[1] if new else n_new
        generation = self._pass.generation
        if generation is not None:
            # What the only block holds had its padding taken out.
            ones = past == 0 and new is not None and new.all_valid
            generation.mask = KnownMask(cache, past + n_new, None if ones else inner)
        if inner is None and self.positions == "original" and (n_inner > 1 or self.calibrator is not None):
            # Gapped positions without mask and cache are taken for several packed sequences; a calibration reads it.
            inner = torch.ones(x.shape[0], past_inner + n_inner, dtype=torch.long, device=x.device)
        this.mask = inner
        if self.calibrator is not None:
            sizes = None if new is None else gather_columns(self.observer.visual_sizes(), new.source, 1) * new.valid
            keys = self.calibrator.keys(before.keys, past_inner, position_ids, sizes, x.shape[0])
            this.columns = replace(this.columns, keys=keys)
            dtype = x.dtype if x.is_floating_point() else self.language_model.dtype
            pruned = this.columns.shift > 0  # rows of which nothing was dropped are as they are alone
            short["attention_mask"] = self.calibrator.mask(keys, inner, pruned, n_inner, cache, dtype)
        elif self.family.ready_masks:
            short["attention_mask"] = self._masks(short, new, inner, cache, past, x)
        else:
            short["attention_mask"] = compat.without_blind_rows(self.language_model, inner, n_inner, x.dtype)
        return short | positions_of_4(kwargs, past_inner, n_inner, x.device)

    def _masks(
        self, short: Mapping, new: NewColumns | None, inner: Tensor | None, cache: Any, past: int, x: Tensor
    ) -> Any:
        """Masks as the base model makes them, for the short sequence."""
        types = self._pass.asked.get(self.family.column_types)
        if types is not None:
            types = types[:, -x.shape[1] :]
            types = types if new is None else gather_columns(types, new.source, 1).masked_fill(~new.valid, 0)
        if inner is None:
            inner = torch.ones(len(x), past_length(cache) + short["position_ids"].shape[-1], device=x.device)
        named = {} if types is None else {self.family.column_types: types}
        return compat.ready_masks(
            self.family.model,
            short.get("inputs_embeds", x),
            inner.long(),
            cache,
            short["position_ids"],
            past == 0,
            named,
        )

    def _gathered(self, kwargs: Mapping, new: NewColumns) -> dict[str, Any]:
        """Inputs of the language model that go by column, for the columns that stay.

        Raises:
            UnsupportedModelError: there is one that the family does not declare.
        """
        family = self.family
        known = {*KNOWN_INPUTS, *family.column_inputs, *family.visual_inputs, family.visual_mask}
        for name, value in kwargs.items():
            if name not in known and isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == new.n_outer > 1:
                raise UnsupportedModelError(
                    f"the language model of {type(family.model).__name__} is given {name}, {tuple(value.shape)}, which "
                    "seems to go by column, and its family does not say how to shorten it; use tokprune.list_models()"
                )
        given = {name: axis for name, axis in family.column_inputs.items() if kwargs.get(name) is not None}
        short: dict[str, Any] = {name: gather_columns(kwargs[name], new.source, axis) for name, axis in given.items()}
        where = kwargs.get(family.visual_mask)
        if where is not None:
            kept = torch.zeros_like(where).scatter(1, new.source.to(where.device), new.valid.to(where.device))
            short[family.visual_mask] = where.gather(1, new.source.to(where.device)) & new.valid.to(where.device)
            stays = kept[where]
            for name in family.visual_inputs:
                short[name] = [rows[stays.to(rows.device)] for rows in kwargs[name]]
        return short

    @span("shorten")
    def after(self, module: nn.Module, args: tuple, kwargs: dict, out):
        """Forward hook: note the columns on the cache, and expand the hidden states to the user's length."""
        this = self._pass.shortening
        if this is None or this.columns is None:
            return None
        cache = cache_of(out) if isinstance(out, Mapping) else this.cache
        if cache is not None:
            note_columns(cache, this.columns)
        if this.new is None:
            return None
        states = out[0] if isinstance(out, tuple) else out["last_hidden_state"]
        if states.shape[1] != this.new.source.shape[1]:
            return None  # the last columns alone, as it was asked for with logits_to_keep
        fill = forward_fill(this.new.source, this.new.valid, this.new.n_outer)
        if isinstance(out, tuple):
            return (gather_columns(states, fill, 1), *out[1:])
        out["last_hidden_state"] = gather_columns(states, fill, 1)
        return out


@dataclass(frozen=True)
class _Seen:
    """What a prefill's embeddings hold; flags and numbers are read from the device already."""

    keep: Tensor  # (B, S)
    marked: Tensor  # (B, S)
    longest: int
    shortest: int
    n_tail: int
    flags: dict[str, int]

    @property
    def any_marked(self) -> bool:
        return bool(self.flags["marked"])


def _known_columns(columns: Columns | None, x: Tensor, past_inner: int) -> Columns:
    """What the cache holds; without a note on it, everything."""
    if columns is None:
        return Columns.identity(x.shape[0], past_inner, x.device)
    if columns.source.shape[0] != x.shape[0]:
        raise UnsupportedCacheError(
            f"the cache was pruned with a batch of {columns.source.shape[0]} and now meets {x.shape[0]} rows; "
            "start a new cache when the batch changes"
        )
    return columns


def _refuse_unusable(seen: _Seen, past_inner: int) -> None:
    if seen.flags["bad"]:
        raise BadFeaturesError("the vision tower or the embeddings produced NaN; run them in float32 or bfloat16")
    if not seen.any_marked or not seen.flags["emptied"]:
        return
    if past_inner:
        raise TokPruneError(
            "a part of the prompt holds dropped tokens alone; pass larger parts (prefill_chunk_size in generate)"
        )
    raise TokPruneError(
        "every token of a row was dropped and it has no text: keep at least one visual token (keep_tokens=1), "
        "or add text to the prompt"
    )


def _new_columns(seen: _Seen) -> NewColumns:
    source, valid = right_align(seen.keep, seen.longest)
    return NewColumns(
        source=source,
        valid=valid,
        n_outer=seen.keep.shape[1],
        all_valid=seen.longest == seen.shortest,
        n_tail=seen.n_tail,
        marked_before=seen.marked.long().cumsum(1).gather(1, source),
        n_marked=seen.marked.sum(1, keepdim=True),
    )


def _rewound(
    columns: Columns, cache: Any, mask: Tensor | None, counted: Tensor | None, n_new: int, past_inner: int
) -> tuple[int, Columns]:
    """How many outer columns precede this pass, and the columns with whatever is passed again taken back.

    Assisted decoding takes rejected candidates back, and callers may pass the end of a prompt again. Where the
    cache is longer than what precedes this pass it is cut here: releases of transformers before 5.18 cut it to
    the user's length, which is above the short cache's, so nothing happens there.
    """
    past = past_inner + columns.n_dropped
    if mask is not None:
        past = mask.shape[1] - n_new
    elif n_new > 1 and counted is not None:
        past = int(counted.amax()) + 1 - n_new
    if past < columns.n_outer - columns.n_tail:
        raise UnsupportedCacheError(
            f"this cache already holds the first {columns.n_outer} tokens of the prompt, pruned, and "
            "tokens of it were passed again; pass only the new input_ids (with the full attention_mask), "
            "or start without past_key_values"
        )
    excess = past_inner - (past - columns.n_dropped)
    if excess < 0:
        raise UnsupportedCacheError(
            f"attention_mask covers {past + n_new} tokens, but the cache and the new ones are "
            f"{past + excess + n_new}; pass a mask over all tokens before pruning"
        )
    if excess > 0:
        crop_cache(cache, excess)
    return past, columns.shortened(past)
