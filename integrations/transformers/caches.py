"""Marks of dropped tokens, and which of the user's columns the language model and its cache hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .compat import cache_of, past_length

_STATE = "_tokprune_columns"  # on a cache: what it holds
_ROOM = "_tokprune_room"  # on a static cache of generate(), until its first pass: what shortens it


def mark_dropped(features: Tensor, keep: Tensor) -> Tensor:
    """Features, (..., N, D), whose dropped rows carry the mark; keep is (..., N) bool."""
    mark = features.new_zeros(features.shape[-1])
    mark[0] = float("nan")
    return torch.where(keep[..., None], features, mark)


def find_marks(features: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of (..., D) carry the mark, and which hold any other NaN; both (...) bool."""
    first = features[..., 0].isnan()
    # One read, and no temporary of the features' size; a sum of values with signs could be 0 where they are not.
    others = torch.linalg.vector_norm(features[..., 1:], 1, -1)
    marked = first & (others == 0)
    return marked, (first | others.isnan()) & ~marked


def without_marks(features: Any) -> Any:
    """Features, or lists and tuples of them, with zeros in place of marked rows; anything else as it is."""
    if type(features) in (list, tuple):
        return type(features)(without_marks(f) for f in features)
    if not (isinstance(features, Tensor) and features.is_floating_point()):
        return features
    return features.masked_fill(find_marks(features)[0][..., None], 0)


@dataclass(frozen=True)
class Columns:
    """Which of the user's columns ("outer") the stored ones ("inner") are; after n_outer they run one to one.

    Args:
        source: (B, K) outer column of every inner one.
        valid: (B, K); False for the padding of rows shorter than the longest.
        n_outer: outer columns described so far.
        all_valid: no padding anywhere.
        shift: (B, 1) how far contiguous positions have moved.
        n_tail: how many of the last columns are one to one in every row.
        keys: `calibrate.Keys` of all columns, new ones after `n_outer` too, under a calibration; else None.
    """

    source: Tensor
    valid: Tensor
    n_outer: int
    all_valid: bool
    shift: Tensor
    n_tail: int
    keys: Any = None

    @classmethod
    def identity(cls, batch: int, n_outer: int, device: torch.device) -> Columns:
        """Nothing dropped in the first n_outer columns."""
        source = torch.arange(n_outer, device=device).expand(batch, n_outer)
        shift = torch.zeros(batch, 1, dtype=torch.long, device=device)
        return cls(source, torch.ones_like(source, dtype=torch.bool), n_outer, True, shift, n_outer)

    @property
    def n_dropped(self) -> int:
        """Columns by which the cache is shorter."""
        return self.n_outer - self.source.shape[1]

    def up_to(self, n_outer: int) -> tuple[Tensor, Tensor]:
        """Source and valid, continued one to one up to an outer length."""
        batch = self.source.shape[0]
        tail = torch.arange(self.n_outer, n_outer, device=self.source.device).expand(batch, -1)
        valid = torch.cat([self.valid, torch.ones_like(tail, dtype=torch.bool)], 1)
        return torch.cat([self.source, tail], 1), valid

    def extended(self, past: int, new: NewColumns) -> Columns:
        """With a block after `past` outer columns."""
        source, valid = self.up_to(past)
        return Columns(
            source=torch.cat([source, new.source + past], 1),
            valid=torch.cat([valid, new.valid], 1),
            n_outer=past + new.n_outer,
            all_valid=self.all_valid and new.all_valid,
            shift=self.shift + new.n_marked,
            n_tail=new.n_tail,
            keys=self.keys,
        )

    def shortened(self, n_outer: int) -> Columns:
        """Without the last columns; they must be one to one."""
        n_less = max(self.n_outer - n_outer, 0)
        if n_less == 0:
            return self
        source, valid = self.source[:, :-n_less], self.valid[:, :-n_less]
        return replace(self, source=source, valid=valid, n_outer=n_outer, n_tail=self.n_tail - n_less)

    def inner_mask(self, mask: Tensor | None, n_outer: int) -> Tensor | None:
        """A (B, n_outer) mask, or None for all ones, over the inner columns; None where nothing is masked."""
        if mask is None and self.all_valid:
            return None
        source, valid = self.up_to(n_outer)
        if mask is None:
            return valid.long()
        return mask.gather(1, source.to(mask.device)) * valid.to(mask)


def columns_on(cache: Any) -> Columns | None:
    """What a cache holds, where it was pruned before the language model."""
    return getattr(cache, _STATE, None)


@dataclass(frozen=True)
class NewColumns:
    """The columns of one forward pass that stay.

    Args:
        source, valid, n_outer, all_valid, n_tail: as in `Columns`, of this pass alone.
        marked_before: (B, K) marked columns before every kept one.
        n_marked: (B, 1) marked columns of every row.
    """

    source: Tensor
    valid: Tensor
    n_outer: int
    all_valid: bool
    n_tail: int
    marked_before: Tensor
    n_marked: Tensor


@contextlib.contextmanager
def at_full_length(cache: Any) -> Iterator[None]:
    """The cache reports the length that it would have if nothing had been dropped."""
    columns = columns_on(cache)
    if columns is None:
        yield
        return
    length = past_length(cache) + columns.n_dropped
    cache.get_seq_length = lambda *ignored, **also_ignored: length
    try:
        yield
    finally:
        del cache.get_seq_length


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """(B or 1, S) positions that count columns: those of a 1-D model, or the first row of (4, B, S); else None."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def with_text_positions(position_ids: Any, deltas: Any) -> Any:
    """(4, B, S) M-RoPE positions with those that count columns first, where a later turn is given (1, B, S).

    Args:
        position_ids: of new text, which is as far along every axis.
        deltas: (B, 1) by how much they differ from the numbers of columns.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 3 or len(position_ids) != 1 or deltas is None:
        return position_ids
    return torch.cat([position_ids - deltas.to(position_ids.device), position_ids.expand(3, -1, -1)])


def note_columns(cache: Any, columns: Columns) -> None:
    """Write on a cache what it holds."""
    setattr(cache, _STATE, columns)


def note_room(cache: Any, shorten: Callable[[Any, int], None]) -> None:
    """Write on an empty cache of fixed size what is to be called with it and the number of dropped columns."""
    setattr(cache, _ROOM, shorten)


def fit_room(cache: Any, n_dropped: int) -> None:
    """Shorten an empty cache of fixed size by the columns that its first pass drops; others stay."""
    shorten = getattr(cache, _ROOM, None)
    if shorten is not None:
        delattr(cache, _ROOM)
        shorten(cache, n_dropped)


# ---------------------------------------------------------------------------------------- later turns
# generate() cuts a conversation that is passed whole by the length of the cache, which is short by the tokens that were
# dropped, so it passes as many tokens again as were dropped.

BY_COLUMN = ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Again:
    """A call without the tokens that the cache holds.

    Args:
        n: how many they are; they come first.
        args, kwargs: of the call, without them.
    """

    n: int
    args: tuple
    kwargs: dict[str, Any]

    @staticmethod
    def expanded(out: Any, n: int) -> Any:
        """The model's output with NaN for the hidden states that were not computed again."""

        def longer(states: Tensor) -> Tensor:
            return torch.cat([states.new_full((len(states), n, states.shape[2]), torch.nan), states], 1)

        if isinstance(out, tuple):
            return (longer(out[0]), *out[1:])
        out["last_hidden_state"] = longer(out["last_hidden_state"])
        return out


def given_again(
    args: tuple,
    kwargs: Mapping[str, Any],
    placeholders: Sequence[int],
    takes_back: bool = True,
    first_position: int = 0,
) -> Again | None:
    """The call without what the cache holds; None where the user passes new tokens alone.

    Text at the end of what the cache holds is left in the call, where it can be taken back from the cache instead.

    Args:
        args: of a call of the model.
        kwargs: of the same; the cache is one of them.
        placeholders: ids that stand for visual tokens.
        takes_back: whether the cache can be cut back.
        first_position: of the first column.
    """
    cache = cache_of(kwargs)
    columns = columns_on(cache)
    if columns is None or not columns.n_dropped:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    embeds = kwargs["inputs_embeds"] if ids is None else None
    n_new = len((embeds if ids is None else ids)[0])  # type: ignore[index]
    mask, positions = kwargs.get("attention_mask"), text_positions(kwargs.get("position_ids"))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        past = mask.shape[1] - n_new
    elif mask is None and positions is not None:
        past = int(positions.amax()) + 1 - first_position - n_new
    else:
        return None
    n = columns.n_dropped
    if past != past_length(cache) or n_new <= n:
        return None
    is_tail = ids is not None and past >= columns.n_outer - columns.n_tail and not _any_of(ids[:, :n], placeholders)
    if takes_back and is_tail:
        return None
    rest = {k: v[..., n:] for k, v in kwargs.items() if k in BY_COLUMN and v is not None and v.shape[-1] == n_new}
    if embeds is not None:
        return Again(n, args, {**kwargs, **rest, "inputs_embeds": embeds[:, n:]})
    if "input_ids" in kwargs:
        return Again(n, args, {**kwargs, **rest, "input_ids": ids[:, n:]})
    return Again(n, (ids[:, n:], *args[1:]), {**kwargs, **rest})


def _any_of(ids: Tensor, wanted: Sequence[int]) -> bool:
    return bool(torch.isin(ids, torch.tensor(wanted, device=ids.device)).any())
