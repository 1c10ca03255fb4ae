"""Where encoded images lie in a prompt, for what can be selected only when the prompt is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.core.clock import span
from tokprune.core.errors import TokPruneError
from tokprune.core.ops import on_device


@dataclass(frozen=True)
class Place:
    """Rows of the batch that show an image (beam copies show the same one), and its columns there."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def placeholders(
    ids: Tensor | None, embeds: Tensor | None, wanted: Mapping[str, int], model: nn.Module
) -> dict[str, Tensor]:
    """Which columns are placeholders, (B, S) bool by encode function, from ids or else from embeddings."""
    if ids is not None:
        return {name: ids == i for name, i in wanted.items()}
    if embeds is None:
        return {}
    rows = model.get_input_embeddings()(on_device(list(wanted.values()), embeds.device))  # type: ignore[operator]
    return {name: (embeds == row).all(-1) for name, row in zip(wanted, rows, strict=True)}


def matching_rows(embeds: Tensor, features: Sequence[Tensor]) -> Tensor:
    """(B, S) bool: columns that hold encoded rows, where a caller merged them itself.

    Args:
        embeds: (B, S, D).
        features: (N, D) an entry; an entry is found where all of its rows follow each other.
    """
    found = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for rows in features:
        rows, n = rows.to(embeds), len(rows)
        if n > embeds.shape[1]:
            continue
        starts = (embeds[:, : embeds.shape[1] - n + 1] == rows[0]).all(-1)
        for row, start in starts.nonzero().tolist():
            if torch.equal(embeds[row, start : start + n], rows):
                found[row, start : start + n] = True
    return found


@span("select")
def places_of(mask: Tensor, n_encoded: int, lengths: Sequence[int] | None) -> list[Place]:
    """The place of every image; reads the mask from the device.

    Args:
        mask: (B, S) bool, placeholders.
        n_encoded: rows that were encoded; a multiple of them in the batch are copies of its rows.
        lengths: rows of every image, or None to take every run of placeholders for one.

    Raises:
        TokPruneError: the prompt does not hold what was encoded.
    """
    columns = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
    copies, rest = divmod(sum(map(len, columns)), n_encoded)
    if rest and lengths and not sum(map(len, columns)) % (n_encoded + len(lengths)):
        # transformers 4 joins a newline to every video after it was encoded.
        longer = places_of(mask, n_encoded + len(lengths), [n + 1 for n in lengths])
        return [Place(place.rows, place.columns[:-1]) for place in longer]
    bases = columns[:: max(copies, 1)]
    alike = copies and all(c == bases[i // copies] for i, c in enumerate(columns))
    if rest or not alike:
        raise TokPruneError(
            f"the prompt holds {sum(map(len, columns))} image placeholders where {n_encoded} rows were encoded; "
            "methods that read the prompt, and models whose images only the prompt tells apart, need it in one pass "
            "(without prefill_chunk_size), with the pictures of this call alone"
        )
    places, left = [], list(lengths or [])
    for i, own in enumerate(bases):
        rows = tuple(range(i * copies, (i + 1) * copies))
        for part in _runs(own) if lengths is None else _pieces(own, left):
            places.append(Place(rows, tuple(part)))
    return places


def joined_runs(
    runs: Sequence[Place], numbers: Tensor, images_in: Callable[[Sequence[int], Sequence[range]], list[tuple[int, Any]]]
) -> tuple[list[Place], list[Any]]:
    """The place of every image that may be several runs of placeholders; reads the prompt from the device.

    Args:
        runs: places of runs of placeholders.
        numbers: (B, S) ids of the prompt, or other numbers that are the same where ids are.
        images_in: from a row's numbers and runs to the number of runs of every image, and what else is known of it.
    """
    host, places, about = numbers.cpu(), [], []
    for rows, own_ in itertools.groupby(runs, key=lambda place: place.rows):
        own = list(own_)
        columns = [range(run.columns[0], run.columns[-1] + 1) for run in own]
        for n, told in images_in(host[rows[0]].tolist(), columns):
            mine, own = own[:n], own[n:]
            places.append(Place(rows, tuple(itertools.chain.from_iterable(run.columns for run in mine))))
            about.append(told)
    return places, about


def numbers_of(ids: Tensor | None, embeds: Tensor) -> Tensor:
    """(B, S) ids of a prompt, or from its embeddings other numbers that are the same where ids are."""
    if ids is not None:
        return ids
    return torch.unique(embeds.flatten(0, 1), dim=0, return_inverse=True)[1].view(embeds.shape[:2])


def same_places(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Whether a prompt comes again, maybe with more text after it; without a cache it does at every step."""
    if not before or before.keys() != now.keys():
        return False
    for name, old in before.items():
        new, n = now[name], old.shape[1]
        if len(new) != len(old) or new.shape[1] < n or not torch.equal(new[:, :n], old) or bool(new[:, n:].any()):
            return False
    return True


def _runs(columns: list[int]) -> list[list[int]]:
    starts = [i for i, c in enumerate(columns) if i == 0 or columns[i - 1] != c - 1]
    return [columns[a:b] for a, b in itertools.pairwise([*starts, len(columns)])]


def _pieces(columns: list[int], left: list[int]) -> list[list[int]]:
    """Cut off as many images as the columns hold; `left` loses them."""
    pieces = []
    while columns:
        n = left.pop(0)
        pieces.append(columns[:n])
        columns = columns[n:]
    return pieces


@span("select")
def text_of(embeds: Tensor, masks: Sequence[Tensor], attention_mask: Tensor | None, rows: Sequence[int]) -> Tensor:
    """(len(rows), T, D) float32: embeddings of the text in these rows, zeros where a row has none.

    T are the columns that hold text in any row of the batch: a prompt is mostly placeholders.
    """
    is_text = ~torch.stack([m.to(embeds.device) for m in masks]).any(0)
    if attention_mask is not None and attention_mask.ndim == 2:
        is_text = is_text & attention_mask[:, -embeds.shape[1] :].to(embeds.device).bool()
    columns = is_text.any(0).nonzero()[:, 0]
    return (embeds[:, columns].float() * is_text[:, columns, None])[list(rows)]
