"""Schedules: how many visual tokens are left at every decoder layer, given how many are left at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, ClassVar

from .errors import OptionError
from .files import first_line, read_json, write_json
from .signals import Decoder

PAPER_DEPTH = 32  # decoder layers of the models that papers give layers for
FORMAT, VERSION = "tokprune-schedule", 1
MOST_LAYERS = 10_000
HOW = "make one with: tokprune search --model NAME --task findit --tolerance 0.01 --out schedule.json"


class Schedule:
    """Base class; write `ratios`. As text it is a name and its parameters, separated by slashes: "pyramid/8/16/24"."""

    described: ClassVar[str] = (
        "a schedule (single/2, pyramid/8/16/24, cosine, sigmoid/0.5/8, or layers/2x288/8x144 for counts)"
    )

    @property
    def takes_budget(self) -> bool:
        """True if the number of tokens left at the end is a budget, False if the schedule sets it."""
        return True

    @property
    def text(self) -> str:
        """The text from which `parse` makes this schedule; empty if there is none."""
        return ""

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        """Layers before which it may cut, ascending."""
        return tuple(sorted(self.ratios(decoder, 0.01)))

    def ratios(self, decoder: Decoder, keep: float) -> dict[int, float]:
        """The fraction left from a layer on, by layer; `keep` is left at the end.

        Raises:
            OptionError: a layer does not exist.
        """
        raise NotImplementedError

    def counts(self, decoder: Decoder, n_visual: int, n_keep: int) -> dict[int, int]:
        """Tokens left of n_visual from a layer on, strictly falling; the last is `n_keep`, rounded half up before."""
        found, left = {}, n_visual
        ratios = sorted(self.ratios(decoder, n_keep / n_visual).items())
        for layer, ratio in ratios:
            n = n_keep if layer == ratios[-1][0] else max(n_keep, half_up(ratio, n_visual))
            if n < left:
                found[layer] = left = n
        return found

    @staticmethod
    def parse(text: str) -> Schedule:
        """From its text.

        Raises:
            OptionError: no such schedule, or parameters that are not numbers.
        """
        name, *values = text.split("/")
        try:
            if name in ("single", "pyramid") and all(values):
                numbers = tuple(int(v) for v in values)
                return Pyramid(numbers) if name == "pyramid" else Single(*numbers)
            if name in ("cosine", "sigmoid"):
                numbers_ = [float(v) for v in values]
                return Cosine(*numbers_) if name == "cosine" else Sigmoid(*numbers_)
            if name == "layers" and values:
                return Explicit.of({int(a): _number(b) for a, b in (v.split("x") for v in values)})
        except (TypeError, ValueError):
            pass
        raise OptionError(f"schedule={text!r} is not {Schedule.described}")


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def half_up(ratio: float, n: int) -> int:
    """A fraction of n, rounded half up."""
    return int((Decimal(str(ratio)) * n).quantize(Decimal(1), ROUND_HALF_UP))


@dataclass(frozen=True)
class Single(Schedule):
    """One cut.

    Args:
        layer: the first that sees fewer tokens; None is FastV's 2 of 32, scaled to this model's depth.
    """

    layer: int | None = None

    @property
    def text(self) -> str:
        return "single" if self.layer is None else f"single/{self.layer}"

    def ratios(self, decoder: Decoder, keep: float) -> dict[int, float]:
        layer = decoder.scaled(2, PAPER_DEPTH) if self.layer is None else decoder.layer(self.layer)
        return {layer: keep}


@dataclass(frozen=True)
class Pyramid(Schedule):
    """The same factor at every cut, so that `keep` is left after the last.

    Args:
        at: the layers; empty is PyramidDrop's 8, 16 and 24 of 32, scaled to this model's depth.
    """

    at: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return "/".join(["pyramid", *map(str, self.at)])

    def ratios(self, decoder: Decoder, keep: float) -> dict[int, float]:
        """keep^(1/n), keep^(2/n) ... keep."""
        layers = [decoder.layer(i) for i in self.at] or [decoder.scaled(i, PAPER_DEPTH) for i in (8, 16, 24)]
        if self.at and len(set(layers)) < len(layers):
            raise OptionError(f"pyramid/{'/'.join(map(str, self.at))} names a layer twice; use each once")
        return {layer: keep ** ((i + 1) / len(layers)) for i, layer in enumerate(sorted(layers))}


@dataclass(frozen=True)
class Cosine(Schedule):
    """p-MoD's progressive ratio decay (arXiv 2412.04449): half a cosine over the depth, full above a ceiling.

    In the paper tokens skip layers and come back; here they are dropped. The paper's floor of 0.15 is the budget here.

    Args:
        shift: added to the cosine, which runs from 0.5 to -0.5.
        ceiling: layers with a larger ratio keep all.
    """

    shift: float = 0.5
    ceiling: float = 0.85

    def __post_init__(self):
        if not (0 <= self.shift <= 1 and 0 < self.ceiling <= 1):
            raise OptionError(
                f"invalid cosine/{self.shift:g}/{self.ceiling:g}; use a shift and a ceiling up to 1, as cosine/0.5/0.85"
            )

    @property
    def text(self) -> str:
        return f"cosine/{self.shift}/{self.ceiling}"

    def ratios(self, decoder: Decoder, keep: float) -> dict[int, float]:
        """max(keep, 0.5 cos(pi l / (L - 1)) + shift) where that is not above the ceiling."""
        last = decoder.n_layers - 1
        curve = {layer: 0.5 * math.cos(math.pi * layer / last) + self.shift for layer in range(1, last + 1)}
        return {layer: max(keep, ratio) for layer, ratio in curve.items() if ratio <= self.ceiling} or {last: keep}


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """P-Sigmoid (arXiv 2412.00556): lo + (1 - lo) / (1 + exp(steepness (l - middle))), falling to `keep`.

    The paper's parametrisation is not known; this one becomes a single cut when it is steep.

    Args:
        steepness: per layer, above 0.
        middle: the layer of the steepest fall; None is a quarter of the depth.
    """

    steepness: float = 1.0
    middle: float | None = None

    def __post_init__(self):
        if not 0 < self.steepness < math.inf or (self.middle is not None and not math.isfinite(self.middle)):
            raise OptionError(
                f"a sigmoid of steepness {self.steepness:g} does not fall; use a positive steepness, as sigmoid/0.5/8"
            )

    @property
    def text(self) -> str:
        return f"sigmoid/{self.steepness}" + ("" if self.middle is None else f"/{self.middle}")

    def fall(self, layer: float, n_layers: int) -> float:
        """The sigmoid itself, from 1 to 0."""
        middle = n_layers / 4 if self.middle is None else self.middle
        return 1 / (1 + math.exp(min(self.steepness * (layer - middle), 700)))

    def ratios(self, decoder: Decoder, keep: float) -> dict[int, float]:
        """`lo` is solved so that the last layer has `keep`."""
        n = decoder.n_layers
        end = self.fall(n - 1, n)
        lo = (keep - end) / (1 - end) if end < 1 else keep
        return {layer: max(keep, lo + (1 - lo) * self.fall(layer, n)) for layer in range(1, n)}


@dataclass(frozen=True)
class Explicit(Schedule):
    """What is left from given layers on: counts (whole numbers; 0 drops all), or fractions up to 1.0.

    It takes no budget.

    Args:
        steps: (layer, count or fraction), by layer, falling.
    """

    steps: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, steps: Mapping[int, float]) -> Explicit:
        return cls(tuple(sorted(steps.items())))

    def __post_init__(self):
        values = [value for _, value in self.steps]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in values)
        layers = all(isinstance(layer, int) for layer, _ in self.steps)
        kinds = {isinstance(v, int) for v in values}
        signs = {layer < 0 for layer, _ in self.steps} if layers else set()
        # Whether layers from the end fall is known with the depth.
        falling = numbers and (len(signs) > 1 or values == sorted(values, reverse=True))
        if not (values and layers and falling and len(kinds) == 1 and (kinds == {True} or max(values) <= 1)):
            raise OptionError(
                f"schedule {dict(self.steps)} is not layers with falling counts ({{2: 288, 8: 144}}) or falling "
                "fractions ({2: 0.5, 8: 0.25})"
            )

    @property
    def text(self) -> str:
        return "/".join(["layers", *(f"{layer}x{value}" for layer, value in self.steps)])

    @property
    def takes_budget(self) -> bool:
        return False

    def _resolved(self, decoder: Decoder) -> list[tuple[int, float]]:
        found = sorted((decoder.layer(layer), value) for layer, value in self.steps)
        values = [value for _, value in found]
        if len(dict(found)) < len(found) or values != sorted(values, reverse=True):
            raise OptionError(f"schedule {dict(self.steps)} does not fall from layer to layer; use each layer once")
        return found

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        return tuple(layer for layer, _ in self._resolved(decoder))

    def counts(self, decoder: Decoder, n_visual: int, n_keep: int) -> dict[int, int]:
        """As given; fractions are rounded half up to at least 1. A picture with fewer tokens keeps all."""
        found, left = {}, n_visual
        for layer, value in self._resolved(decoder):
            n = value if isinstance(value, int) or not value else max(1, half_up(value, n_visual))
            if n < left:
                found[layer] = left = int(n)
        return found


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule that was found for one language model; stored as JSON.

    Args:
        score: the method between decoder layers that ranks the tokens, without a schedule ("fastv").
        layers: the fraction of the visual tokens that is left from a layer on, 0 to 1 and falling; 0 drops all.
        n_layers: decoder layers of the model that it was found for.
        fingerprint: of the same, `types.Decoder.fingerprint`.
        found: how it was found: model, task, samples, settings and what was measured, as JSON values.

    Raises:
        OptionError: a field is invalid.
    """

    score: str
    layers: Mapping[int, float]
    n_layers: int
    fingerprint: str
    found: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("score", "fingerprint"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise OptionError(f"{name!r} is not text")
        n = self.n_layers
        if not isinstance(n, int) or isinstance(n, bool) or not 2 <= n <= MOST_LAYERS:
            raise OptionError(f"'n_layers' is not a whole number from 2 to {MOST_LAYERS}")
        if not isinstance(self.found, Mapping):
            raise OptionError("'found' is not an object")
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise OptionError('\'layers\' is not an object of layers and fractions ({"2": 0.5, "5": 0.25})')
        for layer, ratio in self.layers.items():
            if not isinstance(layer, int) or not 1 <= layer < n:
                raise OptionError(f"'layers' names {str(layer)[:20]!r}, which is not a layer from 1 to {n - 1}")
            if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
                raise OptionError(f"what is left from layer {layer} on is not a number from 0 to 1")
        ratios = [float(ratio) for _, ratio in sorted(self.layers.items())]
        if ratios != sorted(ratios, reverse=True):
            raise OptionError("the fractions in 'layers' rise with the layer; dropped tokens do not come back")

    @property
    def schedule(self) -> Explicit:
        return Explicit.of({layer: float(ratio) for layer, ratio in self.layers.items()})


def write_schedule(path: str | Path, schedule: ScheduleFile) -> None:
    """Write a schedule file atomically.

    Raises:
        OSError: it cannot be written.
    """
    layers = {str(layer): float(ratio) for layer, ratio in sorted(schedule.layers.items())}
    write_json(path, FORMAT, VERSION, {**asdict(schedule), "layers": layers})


def read_schedule(path: str | Path) -> ScheduleFile:
    """Read and check a schedule file; nothing in it is executed.

    Raises:
        OptionError: the file is missing, broken or something else.
    """
    try:
        return _schedule_of(read_json(path, FORMAT, VERSION))
    except FileNotFoundError as error:
        raise OptionError(f"file={str(path)!r}: there is no such file; {HOW}") from error
    except (OSError, ValueError, RecursionError) as error:  # OptionError and what json raises are ValueErrors
        raise OptionError(f"file={str(path)!r} is not a schedule: {first_line(error)}; {HOW}") from error


def _schedule_of(values: Mapping[str, Any]) -> ScheduleFile:
    layers = values.get("layers")
    if not isinstance(layers, dict) or not all(re.fullmatch("[0-9]{1,5}", layer) for layer in layers):
        raise OptionError('\'layers\' is not an object of layers and fractions ({"2": 0.5, "5": 0.25})')
    given = {int(layer): ratio for layer, ratio in layers.items()}
    if len(given) < len(layers):
        raise OptionError("'layers' names a layer twice")
    named = {name: values.get(name) for name in ("score", "n_layers", "fingerprint")}
    return ScheduleFile(layers=given, found=values.get("found", {}), **named)  # type: ignore[arg-type]
