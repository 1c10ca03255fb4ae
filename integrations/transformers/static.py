"""Static caches: the kept columns lie at their front, and generate() decodes on them without any hook.

The prefill is as on other caches. What a step of decoding needs to know of the dropped columns, positions and mask, is
made where generate() prepares the step, outside of what it compiles. Hooks then leave the step alone, so that one graph
without breaks serves every picture. A cache that generate() makes is only as long as what is kept and what may follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .caches import Columns, columns_on, note_room
from .compat import cache_of, is_static, limit_static
from .hooks import mark_ready
from .passes import Passes, Pauses
from .shorten import Positions

BUCKET = 64  # lengths are multiples of it, so that prompts of nearly one length share a graph


class StaticSteps:
    """Prepares the passes of generate() on static caches, and the length of these.

    Args:
        positions: as for the columns before the language model.
        passes, pauses: of the attachment.
    """

    def __init__(self, positions: Positions, passes: Passes, pauses: Pauses):
        self.positions, self.passes, self.pauses = positions, passes, pauses
        self._longest = 0  # of the caches so far: a shorter one would be compiled for anew

    def make_cache(self, original: Callable[..., Any], *args: Any, max_cache_len: int, **kwargs: Any) -> Any:
        """In place of the model's _prepare_static_cache, which is `original`."""
        cache = original(*args, max_cache_len=max_cache_len, **kwargs)
        if not self.pauses.hold_here:
            note_room(cache, functools.partial(self._shorten, max_cache_len))
        return cache

    def _shorten(self, n_outer: int, cache: Any, n_dropped: int) -> None:
        """Leave out the columns that n_dropped tokens of the prompt would take, before anything is stored."""
        needed = -(-(n_outer - n_dropped) // BUCKET) * BUCKET
        self._longest = limit_static(cache, max(needed, self._longest))

    def prepare(self, original: Callable[..., dict], *args: Any, **kwargs: Any) -> dict:
        """In place of the model's prepare_inputs_for_generation, which is `original`."""
        cache = cache_of(kwargs)
        if cache is None or not is_static(cache):
            return original(*args, **kwargs)
        generation, columns = self.passes.generation, columns_on(cache)
        if generation is None or kwargs.get("is_first_iteration") or kwargs.get("next_sequence_length") != 1:
            mark_ready(cache, False)
            inputs = original(*args, **kwargs)
            # Columns can be taken out of the mask that the user passed, not out of the one that is made of it.
            bare = columns is None and self.pauses.hold_here
            return inputs if bare else {**inputs, "attention_mask": kwargs.get("attention_mask")}
        if cache not in generation.ready:
            generation.ready.append(cache)
        mark_ready(cache, True)
        return original(*args, **kwargs) if columns is None else self._step(original, columns, args, kwargs)

    def _step(self, original: Callable[..., dict], columns: Columns, args: tuple, kwargs: dict) -> dict:
        """One step of decoding on a pruned cache."""
        mask, positions = kwargs.get("attention_mask"), kwargs["position_ids"]
        n_outer = (positions if mask is None else mask).shape[-1]
        inputs = original(*args, **{**kwargs, "attention_mask": columns.inner_mask(mask, n_outer)})
        if self.positions == "contiguous":
            inputs["position_ids"] = _moved(inputs["position_ids"], columns.shift)
        return inputs


def _moved(positions: Tensor, shift: Tensor) -> Tensor:
    return positions - shift.to(positions.device)
