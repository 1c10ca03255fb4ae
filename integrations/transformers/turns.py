"""Later turns on a pruned cache: tokens that are passed although the cache holds them already.

generate() cuts a conversation that is passed whole by the length of the cache, which is short by the tokens that were
dropped, so it passes as many tokens again as were dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .caches import columns_on
from .compat import cache_of, past_length

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


def given_again(args: tuple, kwargs: Mapping[str, Any], placeholders: Sequence[int]) -> Again | None:
    """The call without what the cache holds; None where the user passes new tokens alone.

    Text at the end of what the cache holds is left in the call: it is taken back from the cache instead.

    Args:
        args: of a call of the model.
        kwargs: of the same; the cache is one of them.
        placeholders: ids that stand for visual tokens.
    """
    cache = cache_of(kwargs)
    columns = columns_on(cache)
    if columns is None or not columns.n_dropped:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    embeds = kwargs["inputs_embeds"] if ids is None else None
    n_new = len((embeds if ids is None else ids)[0])  # type: ignore[index]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        past = mask.shape[1] - n_new
    elif mask is None and positions is not None:
        past = int(positions.amax()) + 1 - n_new
    else:
        return None
    n = columns.n_dropped
    if past != past_length(cache) or n_new <= n:
        return None
    if ids is not None and past >= columns.n_outer - columns.n_tail and not _any_of(ids[:, :n], placeholders):
        return None
    rest = {k: v[..., n:] for k, v in kwargs.items() if k in BY_COLUMN and v is not None and v.shape[-1] == n_new}
    if embeds is not None:
        return Again(n, args, {**kwargs, **rest, "inputs_embeds": embeds[:, n:]})
    if "input_ids" in kwargs:
        return Again(n, args, {**kwargs, **rest, "input_ids": ids[:, n:]})
    return Again(n, (ids[:, n:], *args[1:]), {**kwargs, **rest})


def _any_of(ids: Tensor, wanted: Sequence[int]) -> bool:
    return bool(torch.isin(ids, torch.tensor(wanted, device=ids.device)).any())
