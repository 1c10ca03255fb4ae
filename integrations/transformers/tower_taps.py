"""Signals from the vision tower, collected while a picture is encoded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.core import attention
from tokprune.core.clock import span
from tokprune.core.errors import NotCopyable, TokPruneError
from tokprune.core.signals import Kind, Signal

from .compat import features_of, with_features
from .families.base import ModelFamily
from .hooks import Hooks
from .passes import Passes


def split_features(out: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """What an encode function returned, as one (N, D) an image, and how to put new ones back."""
    given = features_of(out)

    def put_back(features: list[Tensor]) -> Any:
        # What the model has by frame may be one video here.
        is_tensor = isinstance(given, Tensor)
        return with_features(out, torch.cat(features).view(given.shape) if is_tensor else type(given)(features))

    return list(given), put_back


OF_READ_LAYER = (Kind.CLS_STATE, Kind.TOWER_STATES)


class TowerTap(NotCopyable):
    """Collects signals from the vision tower; open only while a picture is encoded.

    Hooks on the projections see what attention sees, whichever attention implementation runs, and cost no
    extra product of hidden states. With `states`, what the projector takes is collected, too. What is not about
    attention comes from the output of the layer that the model reads.
    """

    def __init__(self, family: ModelFamily, signals: frozenset[Signal], passes: Passes, states: bool = False):
        self.family, self.states, self._passes = family, states, passes
        self.signals = frozenset(s for s in signals if s.kind not in (Kind.TEXT_EMBEDS, Kind.PIXELS))
        self.n_special = 1 if family.tower.has_cls else 0

    def install(self, hooks: Hooks) -> None:
        """Register the hooks."""
        for layer in sorted({layer for s in self.signals for layer in s.layers}):
            module, projections = self.family.tower_projections(layer)
            for twin in self.family.tower_twins(module):
                hooks.before(twin, functools.partial(self._entered, layer))
            for side, projection in projections.items():
                for twin in self.family.tower_twins(projection):
                    hooks.after(twin, functools.partial(self._seen, layer, len(projections), side))
        if any(s.kind in OF_READ_LAYER for s in self.signals):
            layer = self.family.vision_layers[self.family.read_layer]
            for twin in self.family.tower_twins(layer):
                hooks.after(twin, self._read_layer_seen)
        if self.states:
            hooks.before(self.family.projector, self._states_seen)

    def collect(self, encode: Callable[[], Any], name: str = "") -> tuple[Any, dict[Signal | str, Tensor]]:
        """What an encode function returns, and what was collected meanwhile.

        Collected is every signal, (crops, patches, l, ...) or (crops, D), and "states", (crops, patches, D).

        Raises:
            TokPruneError: a layer did not run.
        """
        with self._passes.encoding(name) as encoding:
            encoding.collected = {}
            out = encode()
        return out, self._complete(encoding.collected)

    @span("signals")
    def _complete(self, rows: dict) -> dict[Signal | str, Tensor]:
        missing = sorted({layer for s in self.signals for layer in s.layers if (s, layer) not in rows})
        if missing:
            raise TokPruneError(
                f"vision layers {missing} did not run while the picture was encoded; "
                "choose layers up to the one whose features the model reads. If the tower is compiled, compile decoder "
                "layers instead, or use a method that reads nothing of the tower"
            )
        found = {s: rows[s] for s in self.signals if s.kind in OF_READ_LAYER}
        # The tower's layers may sit on several devices.
        found |= {
            s: torch.stack([rows[s, layer].to(rows[s, s.layers[0]].device) for layer in s.layers], 2)
            for s in self.signals
            if s.kind not in OF_READ_LAYER
        }
        return found | ({"states": rows["states"]} if self.states else {})

    def _entered(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows = self._open
        if rows is not None:
            rows["entered", layer] = {**kwargs, "module": module}

    @torch.no_grad()
    def _seen(
        self, layer: int, n_sides: int, side: str, projection: nn.Module, args: tuple, kwargs: dict, out: Tensor
    ) -> None:
        rows = self._open
        if rows is None:
            return
        sides = rows.setdefault(("sides", layer), {})
        sides[side] = out
        if len(sides) < n_sides:
            return
        del rows["sides", layer]
        entered = rows.pop(("entered", layer))
        asked = [s for s in self.signals if layer in s.layers]
        found: dict[Signal, list[Tensor]] = {}
        # Autocast would turn the products back to half precision.
        with span("signals"), torch.autocast(out.device.type, enabled=False):
            for q, k, scale in self.family.tower_heads(sides, entered):
                for signal, row in attention.signal_rows(asked, q, k, scale, self.n_special):
                    found.setdefault(signal, []).append(row)
        for signal, parts in found.items():
            rows[signal, layer] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _read_layer_seen(self, layer: nn.Module, args: tuple, kwargs: dict, out):
        rows = self._open
        if rows is None:
            return
        states = self.family.tower_states(out[0] if isinstance(out, tuple) else out, kwargs)
        for s in self.signals:
            if s.kind is Kind.CLS_STATE:
                rows[s] = states[:, 0].float()
            if s.kind is Kind.TOWER_STATES:
                rows[s] = states[:, self.n_special :, None].float()

    def _states_seen(self, projector: nn.Module, args: tuple, kwargs: dict):
        rows = self._open
        if rows is not None:
            rows["states"] = args[0]

    @property
    def _open(self) -> dict | None:
        """Where to collect; None where no picture is being encoded for this attachment."""
        return self._passes.collecting
