"""Methods between decoder layers: finds the visual tokens of a pass, asks the method at every cut, and records."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokprune.core import ops
from tokprune.core.budget import REFERENCE_TEXT, Budget
from tokprune.core.errors import NothingPrunedError
from tokprune.core.layout import Layout
from tokprune.core.signals import Decoder, Kind
from tokprune.core.tokens import Count, VisualTokens
from tokprune.cost.flops import Ops
from tokprune.cost.selection import cut_ops, widths_of_cuts
from tokprune.methods.base import asked_signals, checked_selection, mistake, mistaken
from tokprune.methods.decoder import ExitMethod
from tokprune.prune.copies import same_as_before
from tokprune.prune.report import by_layer
from tokprune.prune.request import Request
from tokprune.prune.select import checked_least, most_specials, with_newlines
from tokprune.prune.slow import warn_of_cuts

from ..families.base import ModelFamily
from ..passes import Call, Pass
from ..prompt import same_places
from .shorten import Cut, Entry, Here
from .signals import LayerSignals
from .state import PADDING, ImageState, PromptState, owners, prompt_state
from .taps import DecoderTap

WITH_TEXT = {Kind.LM_TEXT_ROWS, Kind.LM_TEXT_KEYS, Kind.LM_TEXT_STATES, Kind.LM_TEXT_EMBEDS}


class LayerSelector:
    """A method between decoder layers, with its budget, on one model; a `shorten.Chooser`.

    Args:
        family: of the model.
        request: the method, and its budget of what the language model is given; or what to replay.
        owner: the observer.
    """

    def __init__(self, family: ModelFamily, request: Request, owner: Any):
        self.family, self.owner, self.method, self.label = family, owner, request.between, request.label
        self.budget, self.newlines, self.replay = request.between_budget, request.newlines, request.replay
        self.decoder: Decoder = family.decoder
        self.cut_layers = tuple(self.method.layers(self.decoder))
        if self.replay is not None:
            self.cut_layers = tuple(sorted({layer for kept in self.replay.kept for layer in kept if layer}))
        self.reads = {} if self.replay else {i: asked_signals(self.method, "reads", i) for i in self.cut_layers}
        self.tapped = frozenset(at for b, signals in self.reads.items() for s in signals for at in s.layers if at < b)
        self.tap = DecoderTap(family.language_model, owner.passes)
        if any(s.layers for signals in self.reads.values() for s in signals):
            self.tap.check()
        # What a layer computed is read at the input of the next one, before anything else is cut there.
        self.layers = frozenset(self.cut_layers) | {layer + 1 for layer in self.tapped}
        self.first = min(self.layers, default=self.decoder.n_layers)
        every = {(s.kind, at) for signals in self.reads.values() for s in signals for at in s.layers or (0,)}
        self._masses = {at for kind, at in every if kind is Kind.LM_MASS}
        self._reads_embeds = any(kind in (Kind.LM_EMBEDS, Kind.LM_TEXT_EMBEDS) for kind, _ in every)
        self.targets = functools.lru_cache(maxsize=256)(self._targets)

    @property
    def now(self) -> Pass:
        """The pass under way."""
        return self.owner.passes.current

    @property
    def keeps_all(self) -> bool:
        """Whether the budget is everything."""
        return self.budget is not None and self.budget.is_everything

    # ------------------------------------------------------------------------------- budgets

    def _targets(self, layout: Layout, n_received: int) -> dict[int, int]:
        """Tokens left of an image from a layer on."""
        cuts = functools.partial(self.method.cuts, self.decoder, n_received)
        if self.budget is None:
            return cuts(0)
        least = min(self.method.min_keep(layout), n_received)
        n_keep = self.budget.n_keep(n_received, lambda n: self._flops(layout, n_received, n), least)
        checked_least(n_keep, least, n_received, self.label)
        return {} if n_keep >= n_received else cuts(n_keep)

    def _flops(self, layout: Layout, n_received: int, n_keep: int) -> int:
        """What the last cut's count costs, with the reference text."""
        cuts = self.method.cuts(self.decoder, n_received, n_keep) if n_keep < n_received else {}
        budget = self.budget or Budget(flops_ratio=1)
        n_text = budget.flops_text
        n_other = n_text + most_specials(layout, n_keep, self.newlines)
        left = by_layer(cuts, n_received, self.decoder.n_layers)
        spent = sum(
            (self.spent(layer, layout, n, left[layer - 1] + n_other, n_text) for layer, n in cuts.items()), Ops()
        )
        shape = self.family.shape
        n_patches = self.family.crop_patches(layout)
        ledger = shape.encode(layout.n_crops, n_patches, spent) + shape.read([n_other + n for n in left])
        return getattr(ledger, budget.flops_scope).flops

    def spent(self, layer: int, layout: Layout, n_keep: int, n_columns: int, n_text: int = REFERENCE_TEXT) -> Ops:
        """What one cut of one image computes, in a row of n_columns."""
        shape = self.family.shape
        if shape is None or not self.reads:
            return Ops()
        return cut_ops(shape, self.method.cost, self.reads[layer], layer, layout, n_keep, n_columns, n_text)

    # ------------------------------------------------------------------------------- one pass

    def begin(self, entry: Entry) -> bool:
        """Find the images of this pass; whether any is cut in it."""
        call, masks = self.now.call, self.now.masks
        if self.owner.paused or self.keeps_all:
            return False
        if not masks:
            self._refuse_unplaced(call, entry)
            return False
        own = torch.stack([m.to(entry.embeds.device) for m in masks.values()]).long()  # (names, B, S)
        embeds, source = entry.embeds, entry.source
        same = same_as_before(embeds, entry.valid).long() * (
            not entry.past
        )  # what is cached may differ where the embeddings do not
        parts = [own, same, entry.valid.long(), *([] if source is None else [source])]
        flat = torch.cat([p.flatten() for p in parts]).cpu()  # the one read of a pass
        own, same, valid, *source_ = [
            x.view(p.shape) for x, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        if not own.any():
            self._refuse_unplaced(call, entry)
            return False
        if call is None or not call.images:
            raise NothingPrunedError(
                f"the prompt has image placeholders and {self.label!r} asks for fewer tokens, but no picture was "
                "encoded under this attachment. Pass pixel_values, or use attachment.paused()"
            )
        end = self._prompt_end(call, masks, entry.past)
        owner, index, found = owners(call, dict(zip(masks, own.bool(), strict=True)))
        columns = source_[0] if source_ else torch.arange(owner.shape[1]).expand(owner.shape)
        host = owner, index, columns, valid.bool(), same.bool()
        prompt = prompt_state(entry, found, host, end, self.owner.salts, self._reads_embeds)
        for image in prompt.images:
            self._aim(image)
            call.clamped |= bool(self.budget and self.budget.keep_tokens and self.budget.keep_tokens > image.n)
        if not any(image.targets for image in prompt.images):
            return False
        self._warn_if_slow(prompt, embeds.device)
        self.now.prompt = prompt
        self.tap.open(self.tapped)
        return True

    def _warn_if_slow(self, prompt: PromptState, device: torch.device) -> None:
        """Say what the cuts of every kind of picture cost, before the first."""
        if self.replay is not None or self.family.shape is None:
            return
        widths = widths_of_cuts(self.family.shape)
        for layout, *counts in dict.fromkeys((i.layout, *i.targets.values()) for i in prompt.images):
            warn_of_cuts(self.method, self.label, layout, counts, widths, device)

    def _refuse_unplaced(self, call: Call | None, entry: Entry) -> None:
        """Raise where pictures were encoded for a prompt that shows no place for them."""
        if call is not None and call.images and not call.prompt and not entry.past and len(call.prefills) <= 1:
            raise NothingPrunedError(
                f"pictures were encoded, but the prompt has no image placeholders for {self.label!r} to find "
                "their tokens by; pass the whole prompt at once, as input_ids with pixel_values"
            )

    def _prompt_end(self, call: Call, masks: Mapping[str, Tensor], past: int) -> int:
        """Width of the prompt; without a cache it is passed again with what was generated since."""
        width = next(iter(masks.values())).shape[1] - self.now.n_candidates
        if not past and same_places(call.prompt, masks):
            return next(iter(call.prompt.values())).shape[1]
        call.prompt = {name: mask[:, :width] for name, mask in masks.items()}
        return width

    def _aim(self, image: ImageState) -> None:
        """What is to be left of an image."""
        if self.replay is not None:
            visual = set(image.layout.visual)
            kept = {layer: rows for layer, rows in self.replay.of(image.number).items() if layer}
            image.targets = {layer: len(visual.intersection(rows.tolist())) for layer, rows in kept.items()}
        elif image.n:
            image.targets = dict(self.targets(image.layout, image.n))
        if 0 in image.targets.values() and not image.n_text["last"]:
            # Without text after the last image an exit would lose what the answer is made of, or the whole row.
            image.targets = {layer: n for layer, n in image.targets.items() if n}

    # ------------------------------------------------------------------------------- one cut

    def cut(self, layer: int, hidden: Tensor, here: Here) -> Cut | None:
        """What stays before a layer."""
        prompt = self.now.prompt
        if prompt is None:
            return None
        seen = LayerSignals(self.tap, prompt, layer, hidden, here)
        replayed = self.replay is not None  # newlines may leave alone
        asked = [
            i for i in prompt.images if i.n and (i.targets.get(layer, i.n) < i.n or (replayed and layer in i.targets))
        ]
        if not any(i.targets and max(i.targets) >= layer and i.n for i in prompt.images):
            self.tap.open(frozenset())  # nothing is left to be decided
            return None
        if layer - 1 in self._masses:
            seen.note_mass(layer - 1)
        if not asked:
            return None
        widths = prompt.widths()
        for image in asked:
            columns, text = widths[image.row], image.n_text["after"]
            image.report.cut_ops[layer] = self.spent(layer, image.layout, image.targets[layer], columns, text)
        drop = torch.zeros(prompt.owner.shape, dtype=torch.int32, device=hidden.device)
        unknown: list[tuple[ImageState, Tensor]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for group in self._groups(layer, asked):
                hidden, full = self._select(seen, layer, hidden, group)
                rows = ops.on_device([i.row for i in group], hidden.device)
                own = seen.own(rows, group)
                stays = full.gather(1, prompt.index[rows].clamp(max=full.shape[1] - 1))
                drop = drop.index_add(0, rows, (own & ~stays).int())
                for image, kept in zip(group, full, strict=True):
                    image.report.cuts[layer] = kept
                    unknown.append((image, kept))
        keep = (drop == 0) & (prompt.owner != PADDING)
        lengths = self._lengths(prompt, layer, keep, unknown)
        if lengths is None:
            return None
        copies = [r for r, leader in enumerate(prompt.leader) if r != leader]
        if copies:
            leaders = ops.on_device(prompt.leader, hidden.device)
            keep, hidden = keep[leaders], hidden[leaders]
            lengths = [lengths[leader] for leader in prompt.leader]
        prompt.gather(keep, max(lengths))
        return Cut(hidden, keep, lengths, prompt.n_tail)

    def _groups(self, layer: int, asked: list[ImageState]) -> list[list[ImageState]]:
        """Images that a method can see at once: of one shape, with equally much text where that is read."""
        texts = {s.text for s in self.reads.get(layer, ()) if s.kind in WITH_TEXT}

        def shape(image: ImageState) -> tuple:
            text = tuple(image.n_text[t] for t in sorted(texts))
            return image.layout, image.n, image.n_received, image.n_special, image.targets[layer], text

        groups: dict[tuple, list[ImageState]] = {}
        for image in asked:
            groups.setdefault(shape(image), []).append(image)
        return list(groups.values())

    def _select(self, seen: LayerSignals, layer: int, hidden: Tensor, group: list[ImageState]) -> tuple[Tensor, Tensor]:
        """Hidden states, changed where the method merges, and (G, N) bool: which rows of the images stay."""
        prompt, layout, target = seen.prompt, group[0].layout, group[0].targets[layer]
        rows = ops.on_device([i.row for i in group], hidden.device)
        columns = seen.visual(rows, group)
        index = prompt.index[rows].gather(1, columns)
        if self.replay is not None:
            keeps = [self.replay.keep(i.number, layer, len(layout.crop)) for i in group]
            return hidden, torch.stack(keeps).to(hidden.device)
        if not target and not isinstance(self.method, ExitMethod):
            return hidden, torch.zeros(len(group), len(layout.crop), dtype=torch.bool, device=hidden.device)
        features = hidden[rows[:, None], columns]
        signals = {s: seen.signal(s, rows, columns, group) for s in self.reads[layer]}
        salts = tuple(i.salt for i in group)
        tokens = replace(VisualTokens.of(features, layout, signals, salts), index=index)
        selected = checked_selection(self.method, self.method.select(tokens, target), tokens)
        prompt.mistakes.append(mistake(selected, None if self.budget is None else target, self.method.count))
        if selected.features is not features:
            hidden = hidden.index_put((rows[:, None], columns), selected.features.to(hidden.dtype))
        if isinstance(self.method, ExitMethod):
            return hidden, seen.present(rows, group, len(layout.crop)) & selected.keep.all(1, keepdim=True)
        full = torch.zeros(len(group), len(layout.crop), dtype=torch.bool, device=hidden.device)
        full = full.scatter(1, index, selected.keep)
        if group[0].n_special:
            full = self._with_specials(full, layout)
        return hidden, full

    def _with_specials(self, full: Tensor, layout: Layout) -> Tensor:
        """Rows that show no patch stay with the tokens of their image, newlines by the policy."""
        special = [i for i, crop in enumerate(layout.crop) if crop < 0]
        some = full.any(1, keepdim=True)
        full = full.index_fill(1, ops.on_device(special, full.device), True)
        return with_newlines(full, layout, self.newlines) & some

    def _lengths(
        self, prompt: PromptState, layer: int, keep: Tensor, chosen: list[tuple[ImageState, Tensor]]
    ) -> list[int] | None:
        """Columns left in every row; read from the device only where counts alone do not tell. None: nothing leaves."""
        content = isinstance(self.method, ExitMethod) or self.method.count is Count.CONTENT
        if content or any(i.n_special for i, _ in chosen):
            totals = [kept.sum() for _, kept in chosen]
            visual = [kept[ops.on_device(i.layout.visual, kept.device)].sum() for i, kept in chosen]
            counts, n_visual, lengths = torch.stack([*totals, *visual, *keep.sum(1)]).split(
                [len(chosen), len(chosen), len(keep)]
            )
            read = torch.cat([counts, n_visual, lengths]).tolist()
            before = sum(i.n for i, _ in chosen)
            for (image, _), total, n in zip(chosen, read, read[len(chosen) :], strict=False):
                if content and n == image.n:
                    del image.report.cuts[layer]  # nothing happened to this one
                image.n, image.n_special = n, total - n
            if content and sum(i.n for i, _ in chosen) == before:
                return None
            return read[2 * len(chosen) :]
        for image, _ in chosen:
            image.n = image.targets[layer]
        return prompt.widths()

    def end(self, lengths: list[int], past: list[int], rows: list[list[int]]) -> None:
        """Tell the report what ran."""
        call, prompt = self.now.call, self.now.prompt
        self.tap.open(frozenset())
        mistakes = prompt.mistakes if prompt else []
        on_host = bool(mistakes) and mistakes[0].device.type == "cpu"  # elsewhere it would be a synchronisation
        if on_host and (code := int(torch.stack(mistakes).amax())):
            raise mistaken(self.method, code)
        for copy, report in prompt.copies if prompt else ():
            copy.cuts.update(report.cuts)
            copy.cut_ops.update(report.cut_ops)
        if call is not None and call.prefills:
            call.prefills[-1] = replace(call.prefills[-1], layers=lengths, past_layers=past, layer_rows=rows)
