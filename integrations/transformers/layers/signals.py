"""What a method between decoder layers may read at a cut: attention, keys, states and embeddings of images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.core import attention, ops
from tokprune.core.errors import TokPruneError
from tokprune.core.signals import Kind, Signal

from .shorten import Here
from .state import PADDING, TEXT, ImageState, PromptState


@dataclass
class LayerSignals:
    """What can be read at one cut, of groups of images that have the same shape.

    Args:
        tap: gives queries and keys of decoder layers.
        prompt: of the pass.
        layer: the first that would see less.
        hidden: (B, K, D), its input.
        here: the layer's rotary embedding and cache.
    """

    tap: Any
    prompt: PromptState
    layer: int
    hidden: Tensor
    here: Here
    attentions: dict[int, Any] = field(default_factory=dict)

    def own(self, rows: Tensor, group: list[ImageState]) -> Tensor:
        """(G, K) bool: columns of the images."""
        numbers = ops.on_device([i.number for i in group], rows.device)
        return self.prompt.owner[rows] == numbers[:, None]

    def present(self, rows: Tensor, group: list[ImageState], n_rows: int) -> Tensor:
        """(G, N) bool: which rows of the images are still there."""
        index = self.prompt.index[rows].masked_fill(~self.own(rows, group), n_rows)
        found = torch.zeros(len(rows), n_rows + 1, dtype=torch.bool, device=rows.device)
        return found.scatter(1, index, True)[:, :n_rows]

    def visual(self, rows: Tensor, group: list[ImageState]) -> Tensor:
        """(G, n) columns of the visual tokens that are still there."""
        return ops.keep_top((self.own(rows, group) & self.prompt.shows[rows]).float(), group[0].n)

    def text(self, rows: Tensor, group: list[ImageState], which: str, before: bool = False) -> Tensor:
        """(G, T) columns of text; with `before`, before any cut."""
        starts = {"after": [i.after for i in group], "last": [i.last for i in group], "all": [-1] * len(group)}[which]
        n_text = group[0].n_text[which]
        owner = self.prompt.owner_before if before else self.prompt.owner
        place = torch.arange(owner.shape[1], device=rows.device).expand_as(owner) if before else self.prompt.place
        if not n_text:
            return self.last_column(rows, owner, place)
        inside = (place[rows] > ops.on_device(starts, rows.device)[:, None]) & (
            place[rows] <= self.prompt.end[rows][:, None]
        )
        return ops.keep_top(((owner[rows] == TEXT) & inside).float(), n_text)

    def last_column(self, rows: Tensor, owner: Tensor, place: Tensor) -> Tensor:
        """(G, 1) the last column of the prompt that is still there."""
        inside = (owner[rows] != PADDING) & (place[rows] <= self.prompt.end[rows][:, None])
        return place[rows].masked_fill(~inside, -1).argmax(1, keepdim=True)

    def attention(self, layer: int):
        """Queries and keys of the layer before the cut, or of the one after it."""
        if layer not in self.attentions:
            ahead = layer == self.layer
            self.attentions[layer] = (
                self.tap.ahead(layer, self.hidden, self.here.rotary()) if ahead else self.tap.take(layer)
            )
        return self.attentions[layer]

    def keys_alone(self, layer: int, rows: Tensor, columns: Tensor) -> Tensor:
        """(G, n, H, d) float32 keys at columns (G, n); as if without padding, which rotates them."""
        found = self.attention(layer)
        found = replace(found, rotary=self.here.alone(found.rotary))
        return found.keys(rows, columns).transpose(1, 2).float()

    def attended(self, layer: int, rows: Tensor, columns: Tensor) -> Tensor:
        """(G, R, K) attention of some columns to all of this pass, mean over heads; cached ones share the softmax."""
        found, prompt, cached = self.attention(layer), self.prompt, self.here.cached(layer)
        places = prompt.place[rows]
        allowed = (places[:, None] <= places.gather(1, columns)[..., None]) & (prompt.owner[rows] != PADDING)[:, None]
        keys, n_cached = self._keys(layer, rows, cached), 0
        if cached is not None:
            seen = cached[1][rows][:, None].expand(-1, columns.shape[1], -1)
            allowed, n_cached = torch.cat([seen, allowed], 2), cached[1].shape[1]
        weights = attention.rows(found.queries(rows, columns), keys, found.scale, allowed)
        return weights.mean(1)[..., n_cached:]

    def _keys(self, layer: int, rows: Tensor, cached: tuple[Tensor, Tensor] | None) -> Tensor:
        """(G, H_kv, P + K, d), rotated: of earlier passes and of this one, from the cache where it holds them."""
        held = self.here.held(layer) if layer < self.layer else None
        if held is not None:
            return held[rows]
        keys = self.attention(layer).keys(rows)
        return keys if cached is None else torch.cat([cached[0][rows].to(keys), keys], 2)

    def note_mass(self, layer: int) -> None:
        """Attention of the last prompt tokens to all visual tokens in the layer before this one, by row."""
        prompt = self.prompt
        rows = torch.arange(len(prompt.owner), device=prompt.owner.device)
        row = self.attended(layer, rows, self.last_column(rows, prompt.owner, prompt.place))[:, 0]
        prompt.masses[layer] = (row * prompt.shows).sum(1)

    def signal(self, s: Signal, rows: Tensor, columns: Tensor, group: list[ImageState]) -> Tensor:
        """One signal of a group of images; shapes as in `types.Kind`."""
        if s.kind is Kind.LM_ROW:
            last = self.last_column(rows, self.prompt.owner, self.prompt.place)
            return torch.stack([self.attended(at, rows, last)[:, 0].gather(1, columns) for at in s.layers], 1)
        if s.kind is Kind.LM_MASS:
            return torch.stack([self.prompt.masses[at][rows] for at in s.layers], 1)
        if s.kind is Kind.LM_TEXT_ROWS:
            found = self.attended(s.layers[0], rows, self.text(rows, group, s.text))
            return found.gather(2, columns[:, None].expand(-1, found.shape[1], -1))
        if s.kind is Kind.LM_KEYS:
            return self.keys_alone(s.layers[0], rows, columns)
        if s.kind is Kind.LM_TEXT_KEYS:
            return self.keys_alone(s.layers[0], rows, self.text(rows, group, s.text))
        if s.kind is Kind.LM_TEXT_STATES:
            return self.hidden[rows[:, None], self.text(rows, group, s.text)].float()
        if s.kind is Kind.LM_FIRST_STATE:
            first = (self.prompt.owner[rows] != PADDING).float().argmax(1)
            return self.hidden[rows, first].float()
        embeds = self.prompt.embeds
        if embeds is None:
            raise TokPruneError(f"{s.kind.value} is not a signal of a language model's layer")
        if s.kind is Kind.LM_TEXT_EMBEDS:
            return embeds[rows[:, None], self.text(rows, group, s.text, before=True)].float()
        numbers = ops.on_device([i.number for i in group], rows.device)
        own = (self.prompt.owner_before[rows] == numbers[:, None]) & self.prompt.shows_before[rows]
        return embeds[rows[:, None], ops.keep_top(own.float(), group[0].n_received)].float()
