"""Gate files: small networks, one per decoder layer, that say when to drop a prompt's visual tokens.

A file is in the safetensors format, which holds no code: of every layer `gate.LAYER.in`,
(H, 2 D), and `gate.LAYER.out`, (2, H), and as metadata which language model they were fitted to and what was seen while
fitting.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError, safe_open

from ..core.errors import OptionError
from ..core.files import first_line, write_tensors
from ..core.lazy import F, torch
from ..core.signals import Decoder

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "tokprune gates 1"
HOW = "make one with: tokprune fit-exit --model NAME --task findit --out gate.safetensors"
_NAME = re.compile(r"gate\.(0|[1-9]\d{0,5})\.(in|out)")

Weights: TypeAlias = "tuple[Tensor, Tensor]"


@dataclass(frozen=True, eq=False)
class Gates:
    """One gate per decoder layer: Linear(2 D to H), GELU, Linear(H to 2), no biases; outputs are (keep, exit).

    Args:
        decoder: the language model they were fitted to.
        weights: by the layer whose output they read, (H, 2 D) and (2, H), float32.
        notes: results of the fit; plain numbers, lists and dicts.
    """

    decoder: Decoder
    weights: Mapping[int, Weights]
    notes: Mapping[str, Any] = field(default_factory=dict)
    _moved: dict[tuple[int, torch.device], Weights] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose output a gate reads, ascending."""
        return tuple(sorted(self.weights))

    @property
    def hidden(self) -> int:
        """H, the width inside a gate."""
        return len(next(iter(self.weights.values()))[0])

    def logits(self, layer: int, features: Tensor) -> Tensor:
        """(G, 2) for keep and exit, from (G, 2 D) float32 of a layer's output."""
        key = layer, features.device
        with torch.no_grad():  # also so that weights which came up in inference mode can be used outside of it
            if key not in self._moved:
                first, last = self.weights[layer]
                self._moved[key] = first.to(features.device), last.to(features.device)
            return gate_logits(self._moved[key], features)


def gate_logits(weights: Weights, features: Tensor) -> Tensor:
    """(G, 2) for keep and exit."""
    return F.linear(F.gelu(F.linear(features, weights[0])), weights[1])


def gate_features(states: Tensor) -> Tensor:
    """(G, 2 D) float32, what a gate reads: the mean of the text's states without the last one, and the last one.

    Args:
        states: (G, T, D) of the text after the last image, including the last token of the prompt. With one token, it
            is the mean too.
    """
    states = states.float()
    mean = states[:, :-1].mean(1) if states.shape[1] > 1 else states[:, -1]
    return torch.cat([mean, states[:, -1]], 1)


def write_gates(path: str | Path, gates: Gates) -> None:
    """Write a gate file atomically; the same gates give the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    decoder = gates.decoder
    metadata = {
        "format": FORMAT,
        "fingerprint": decoder.fingerprint,
        "n_layers": str(decoder.n_layers),
        "width": str(decoder.width),
        "notes": json.dumps(gates.notes),
    }
    tensors = {}
    for layer, pair in gates.weights.items():
        for side, weight in zip(("in", "out"), pair, strict=True):
            tensors[f"gate.{layer}.{side}"] = weight.float()
    write_tensors(path, tensors, metadata)


def read_gates(path: str | Path) -> Gates:
    """Read and check a gate file; nothing in it is executed.

    Raises:
        OptionError: the file is missing, broken or something else.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OptionError(f"gate={str(path)!r} is not a file; {HOW}")
        with safe_open(path, framework="pt") as file:
            decoder, notes = _facts(file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
            layers = _layers(shapes, decoder)
            weights = {i: (file.get_tensor(f"gate.{i}.in"), file.get_tensor(f"gate.{i}.out")) for i in layers}
    except FileNotFoundError as error:
        raise OptionError(f"gate={str(path)!r}: there is no such file; {HOW}") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"gate={str(path)!r} cannot be read: {first_line(error)}; {HOW}") from error
    for i, pair in weights.items():
        if not all(w.is_floating_point() and bool(w.isfinite().all()) for w in pair):
            raise OptionError(f"gate={str(path)!r}: the weights for layer {i} are not finite numbers; {HOW}")
    # Copies: what is mapped from the file would change, or end the process, where the file is written over in place.
    copies = {i: (a.to(torch.float32, copy=True), b.to(torch.float32, copy=True)) for i, (a, b) in weights.items()}
    return Gates(decoder, copies, notes)


def _facts(metadata: Mapping[str, str]) -> tuple[Decoder, dict[str, Any]]:
    found = metadata.get("format", "none")
    if found != FORMAT:
        raise ValueError(f"its format is {found[:40]!r}, not {FORMAT!r}")
    numbers = [metadata.get(name, "") for name in ("n_layers", "width")]
    if not all(re.fullmatch(r"[1-9]\d{0,6}", n) for n in numbers):
        raise ValueError("it does not say which language model it was fitted to")
    notes = json.loads(metadata.get("notes", "{}"))
    if not isinstance(notes, dict):
        raise ValueError("its notes are not an object")
    return Decoder(int(numbers[0]), int(numbers[1]), metadata.get("fingerprint", "")), notes


def _layers(shapes: Mapping[str, tuple[int, ...]], decoder: Decoder) -> list[int]:
    """Layers that have a whole gate of the right shape."""
    matches = {name: _NAME.fullmatch(name) for name in shapes}
    strange = [name for name, match in matches.items() if match is None]
    layers = sorted({int(match[1]) for match in matches.values() if match})
    if strange or not layers or layers[-1] > decoder.n_layers - 2:
        raise ValueError(f"it holds no gates for layers 0 to {decoder.n_layers - 2}, or something else as well")
    hidden = shapes.get(f"gate.{layers[0]}.in", (0,))[0]
    for i in layers:
        pair = shapes.get(f"gate.{i}.in"), shapes.get(f"gate.{i}.out")
        if hidden < 1 or pair != ((hidden, 2 * decoder.width), (2, hidden)):
            raise ValueError(f"the gate for layer {i} has shapes {pair[0]} and {pair[1]}")
    return layers
