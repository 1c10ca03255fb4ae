"""In the worker: signals from vLLM's towers while pictures are encoded, and the rows that stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.core import ops
from tokprune.core.attention import signal_rows
from tokprune.core.budget import Budget
from tokprune.core.layout import Layout
from tokprune.core.signals import Kind, Signal
from tokprune.methods.base import mistaken
from tokprune.prune.select import Kept, Picture, Selector, visual_rows

from .compat import attention_of, complain, heads_of, vision_encoder, vision_layers
from .options import KEY, Plan, rows_of


class Tap:
    """Collects what a method needs from a vision tower; open only while pictures are encoded.

    Hooks see what attention is called with. They stay as long as the model: vLLM has no moment to undo.

    Args:
        plan: says what is needed.
        tower: the vision tower, built up to the layer that the model reads.
        projector: takes what the tower puts out.
    """

    def __init__(self, plan: Plan, tower: nn.Module, projector: nn.Module):
        self.signals, self.n_special = plan.signals, int(plan.family.tower.has_cls)
        self._skipped, self._open, self._segments = plan.family.n_leading, False, None
        self._rows: dict[Any, Tensor] = {}
        if not self.signals:
            return
        layers = vision_layers(tower)
        for layer in sorted({layer for s in self.signals for layer in s.layers}):
            attention = attention_of(layers[layer])
            attention.attn.register_forward_pre_hook(functools.partial(self._attends, layer, attention))
        if any(s.kind in (Kind.CLS_STATE, Kind.TOWER_STATES) for s in self.signals):
            vision_encoder(tower).register_forward_hook(
                self._last_layer_seen
            )  # none is built behind the one that is read
        if plan.merges_states:
            projector.register_forward_pre_hook(self._states_seen)

    def collect(
        self, encode: Callable[[], Any], segments: list[int] | None = None
    ) -> tuple[list[Tensor], dict[Any, Tensor]]:
        """Rows of every picture, and what was collected.

        Collected is every signal, (crops, patches, l, ...) or (crops, D), and "states", (crops, patches, D).

        Args:
            encode: vLLM's own function.
            segments: patches of every picture, where all are one sequence, in which each sees itself alone.
        """
        self._rows, self._segments, self._open = {}, segments, True
        try:
            features = list(encode())
        finally:
            rows, self._rows, self._open = self._rows, {}, False
        found = {s: torch.stack([rows[s, i] for i in s.layers], 2) for s in self.signals if s.layers}
        found |= {key: value for key, value in rows.items() if not isinstance(key, tuple)}
        return features, found

    @torch.no_grad()
    def _attends(self, layer: int, attention: nn.Module, module: nn.Module, args: Any) -> None:
        if not self._open:
            return
        asked = [s for s in self.signals if layer in s.layers]
        q, k, scale = heads_of(attention, args)
        lengths = self._segments or [q.shape[2]]
        parts = [
            dict(signal_rows(asked, *own, scale, self.n_special))
            for own in zip(q.split(lengths, 2), k.split(lengths, 2), strict=True)
        ]
        for signal in asked:
            if signal in parts[0]:
                self._rows[signal, layer] = torch.cat([part[signal] for part in parts], 1)

    def _last_layer_seen(self, module: nn.Module, args: Any, out: Any) -> None:
        if not self._open:
            return
        states = out[-1] if isinstance(out, (list, tuple)) else out  # of all layers, where the model reads several
        for s in self.signals:
            if s.kind is Kind.CLS_STATE:
                self._rows[s] = states[:, 0].float()
            if s.kind is Kind.TOWER_STATES:
                self._rows[s] = states[:, self.n_special :, None].float()

    def _states_seen(self, module: nn.Module, args: Any) -> None:
        if self._open:
            self._rows["states"] = args[0][:, self._skipped :]


class Pruner:
    """Encodes pictures and keeps what was planned of each.

    Args:
        plan: of the server; the number of tokens comes with every picture.
        tower: the vision tower.
        projector: takes what the tower puts out.
    """

    def __init__(self, plan: Plan, tower: nn.Module, projector: nn.Module):
        self.plan, self._tap = plan, Tap(plan, tower, projector)
        self._project = projector if plan.merges_states else None

    def prune(self, encode: Callable[[], Any], items: Mapping[str, Any], numbers: Tensor) -> list[Kept]:
        """The rows that stay of every picture.

        Args:
            encode: vLLM's own function, one (N, D) a picture.
            items: what it encodes.
            numbers: our field of every picture, on the host.
        """
        features, collected = self._tap.collect(encode, self.plan.family.segments(items))
        pictures = self._pictures(features, items, collected)
        kept = [Kept(torch.arange(len(rows), device=rows.device), rows) for rows in features]
        mistakes = []
        for n_keep in dict.fromkeys(numbers[:, 0].tolist()):
            members = [i for i, number in enumerate(numbers[:, 0].tolist()) if number == n_keep]
            salts = [int(numbers[i, 3]) for i in members]
            for group in self._selector(n_keep).groups([pictures[i] for i in members], salts):
                mistakes.append(group.mistake)
                layout = pictures[members[group.members[0]]].layout
                index = ops.keep_top(group.keep.float(), rows_of(layout, n_keep, self.plan.request.newlines))
                rows = ops.take(group.features, index)
                for place, i in enumerate(group.members):
                    kept[members[i]] = Kept(index[place], rows[place])
        self._complain(mistakes)
        return kept

    @functools.lru_cache(maxsize=256)  # noqa: B019 - it lives as long as its server
    def _selector(self, n_keep: int) -> Selector:
        return self.plan.selector(Budget(keep_tokens=n_keep), self._project)

    def _pictures(self, features: list[Tensor], items: Mapping[str, Any], collected: dict) -> list[Picture]:
        family, layouts = self.plan.family, self.plan.family.layouts(items)
        signals: list[dict[Signal, Tensor]] = [{} for _ in features]
        for signal in self.plan.signals:
            for own, value in zip(signals, self._by_picture(signal, collected[signal], items, layouts), strict=True):
                own[signal] = value
        states: Sequence[Any] = [None] * len(features)
        if "states" in collected:
            value = collected["states"]
            packed = visual_rows(family.pack(items, value), layouts, value.shape[2:])
            states = [own if family.merges_states(lay) else None for own, lay in zip(packed, layouts, strict=True)]
        return [Picture(*fields) for fields in zip(features, layouts, signals, states, strict=True)]

    def _by_picture(
        self, signal: Signal, values: Tensor, items: Mapping[str, Any], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        family = self.plan.family
        if signal.kind is Kind.CLS_STATE:  # without those of crops that fill up a batch
            crops = values.split(family.crops_of(items))
            return [own[: layout.n_crops] for own, layout in zip(crops, layouts, strict=True)]
        packed = family.pack(items, values.flatten(2))
        return [rows.transpose(0, 1) for rows in visual_rows(packed, layouts, values.shape[2:])]

    def _complain(self, mistakes: list[Tensor]) -> None:
        """Say where a method broke its promises; the number of rows is right in any case, and the server goes on."""
        if mistakes and (code := int(torch.stack(mistakes).amax())):
            method: Any = self.plan.request.before
            complain(f"{KEY}: {mistaken(method, code)}")
