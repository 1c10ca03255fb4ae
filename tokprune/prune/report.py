"""What really happened in a call: tokens, columns, FLOPs and KV bytes, in one honest line and as a dict."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.layout import Layout
from ..core.signals import Kind, Signal
from ..cost.flops import Ledger, Ops, Shape

if TYPE_CHECKING:
    from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from .shown import ShownReport
    from .videos import Clip


@dataclass(frozen=True, repr=False)
class ImageReport:
    """One image or video: visual tokens before and after, and what encoding it took.

    Args:
        keep: (N,) bool on the device, read when asked for.
        layout: where the rows lie.
        n_patches: patches of a crop, or None for the configuration's.
        spent: what collecting signals and selecting computed, given the number of tokens kept.
        cuts: (N,) bool on the device by decoder layer: what is left from that layer on.
        cut_ops: what cutting computed, given the tokens left at each of `cuts`.
        is_video: whether it is a video.
        before_tower: whether the tower ran on the kept tokens alone.
    """

    keep: Tensor
    layout: Layout
    n_patches: int | None = None
    spent: Callable[[int], Ops] = lambda n_kept: Ops()
    cuts: dict[int, Tensor] = field(default_factory=dict)
    cut_ops: dict[int, Ops] = field(default_factory=dict)
    is_video: bool = False
    before_tower: bool = False

    @property
    def n_visual(self) -> int:
        """Tokens that show a patch."""
        return self.layout.n_visual

    @property
    def n_special(self) -> int:
        """Rows that show none: newlines, [CLS] features."""
        return len(self.layout.crop) - self.n_visual

    @functools.cached_property
    def kept(self) -> Tensor:
        """Indices of the kept rows among the image's placeholders, (K,) int64, on the CPU."""
        return self.keep.nonzero()[:, 0].cpu()

    @functools.cached_property
    def kept_by_layer(self) -> dict[int, Tensor]:
        """The same from a decoder layer on, by layer; 0 is what the language model is given, where that is not all."""
        found = {layer: keep.nonzero()[:, 0].cpu() for layer, keep in sorted(self.cuts.items())}
        return found if len(self.kept) == len(self.layout.crop) else {0: self.kept, **found}

    @functools.cached_property
    def n_given(self) -> int:
        """Visual tokens that the language model is given."""
        return self._n_visual(self.kept)

    @functools.cached_property
    def n_kept(self) -> int:
        """Visual tokens left after the last cut, rows that show no patch not counted."""
        return self._n_visual(self.left)

    @property
    def n_encoded(self) -> int:
        """Visual tokens that the vision tower ran on."""
        return self.n_given if self.before_tower else self.n_visual

    def encoded(self, shape: Shape) -> Ledger:
        """Tower and projector as they ran: crop by crop, where tokens left before them."""
        if not self.before_tower or self.n_patches is None:
            return shape.encode(self.layout.n_crops, self.n_patches)
        patches_a_token = self.n_patches * self.layout.n_crops // self.n_visual
        sizes = [n * patches_a_token for n in self._by_crop(self.kept).values()]
        parts = [shape.encode(sizes.count(n), n) for n in sorted(set(sizes))]
        return sum(parts[1:], parts[0])

    def spent_before_llm(self, shape: Shape) -> Ops:
        """What selecting computed, less what tower and projector were spared."""
        whole = shape.encode(self.layout.n_crops, self.n_patches)
        return self.selector + self.encoded(shape).before_llm + whole.before_llm * -1

    def n_by_layer(self, n_layers: int) -> list[int]:
        """Visual tokens in every decoder layer."""
        counts = {layer: self._n_visual(kept) for layer, kept in self.kept_by_layer.items() if layer}
        return by_layer(counts, self.n_given, n_layers)

    def placeholders_by_layer(self, n_layers: int) -> list[int]:
        """The same with rows that show no patch."""
        counts = {layer: len(kept) for layer, kept in self.kept_by_layer.items() if layer}
        return by_layer(counts, len(self.kept), n_layers)

    @property
    def left(self) -> Tensor:
        """Indices of the rows left after the last cut among the image's placeholders, on the CPU."""
        return list(self.kept_by_layer.values())[-1] if self.cuts else self.kept

    def _n_visual(self, rows: Tensor) -> int:
        return sum(self.layout.crop[i] >= 0 for i in rows.tolist())

    @functools.cached_property
    def selector(self) -> Ops:
        """What collecting signals and selecting computed."""
        return self.spent(self.n_given) + sum(self.cut_ops.values(), Ops())

    @property
    def n_special_kept(self) -> int:
        """Rows that show no patch and stay."""
        return len(self.left) - self.n_kept

    def kept_by_crop(self) -> dict[int, int]:
        """How many tokens each crop keeps."""
        return self._by_crop(self.left)

    def _by_crop(self, rows: Tensor) -> dict[int, int]:
        counts = dict.fromkeys(self.layout.crops, 0)
        for i in rows.tolist():
            if self.layout.crop[i] >= 0:
                counts[self.layout.crop[i]] += 1
        return counts

    def __repr__(self):
        special = f", {self.n_special} -> {self.n_special_kept} rows without a patch" if self.n_special else ""
        name = "video" if self.is_video else "image"
        return f"ImageReport({name}, {self.n_visual} -> {self.n_kept} visual tokens{special}, {self.layout!r})"


def by_layer(cuts: Mapping[int, int], n_visual: int, n_layers: int) -> list[int]:
    """Visual tokens in every layer, from what is left from a layer on."""
    return list(itertools.accumulate(range(n_layers), lambda n, layer: cuts.get(layer, n), initial=n_visual))[1:]


@dataclass(frozen=True, repr=False)
class Prefill:
    """One pass over a prompt: rows, columns in and columns the language model was given, cached ones before them.

    `lengths` holds the kept columns of each row, (B,) on the device; None where nothing was dropped. Where decoder
    layers were cut, `layers` and `past_layers` hold columns by layer, and `layer_rows` those of each row (empty before
    the first cut).
    """

    n_rows: int
    n_outer: int
    n_inner: int
    past_outer: int
    past_inner: int
    lengths: Tensor | None
    layers: list[int] | None = None
    past_layers: list[int] | None = None
    layer_rows: list[list[int]] | None = None

    def columns(self, n_layers: int) -> tuple[list[int], list[int]]:
        """Columns that every layer ran on, and cached ones before them."""
        return self.layers or [self.n_inner] * n_layers, self.past_layers or [self.past_inner] * n_layers

    @functools.cached_property
    def rows(self) -> list[int]:
        """Columns of each row without padding; empty where nothing was dropped."""
        return [] if self.lengths is None else self.lengths.tolist()

    def __repr__(self):
        left = f", {self.layers[-1]} after the last cut" if self.layers else ""
        cached = f", {self.past_outer} -> {self.past_inner} cached" if self.past_outer else ""
        return f"Prefill(rows={self.n_rows}, {self.n_outer} -> {self.n_inner} columns{left}{cached})"


@dataclass(repr=False)
class Report:
    """One call of an attached model.

    Args:
        method: label with options.
        budget: as asked.
        signals: what was collected, with its layers.
        n_layers: decoder layers.
        images: one entry an image, beam copies folded.
        encoded: one entry an encoded image, copies included.
        shape: the model as the ledger sees it; None where its cost is not known.
        bytes_per_value: of keys and values.
        prefills: one entry a pass over prompt tokens.
        clamped: whether a count above an image's number of tokens was asked for.
        between: whether tokens may be dropped between decoder layers.
        rows_of: gives the rows of `encoded`.
        encode_s: seconds for the vision tower, the projector and the selection before the language model.
        prefill_s: seconds for the base model's passes over the prompt; both are None on a GPU, which works on its own.
    """

    method: str
    budget: str
    signals: str
    n_layers: int
    images: list[ImageReport] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    clamped: bool = False
    between: bool = False
    encoded: list[ImageReport] = field(default_factory=list)
    shape: Shape | None = None
    bytes_per_value: int = 2
    rows_of: Callable[[], list[int | None]] = list
    encode_s: float | None = None
    prefill_s: float | None = None

    @property
    def rows(self) -> list[int | None]:
        """The row of the batch that each of `images` is in; None where the prompt does not tell."""
        by_image = {id(image): row for image, row in zip(self.encoded, self.rows_of(), strict=False)}
        n_copies = len(self.encoded) // max(len(self.images), 1)  # beams, whose rows follow each other
        found = [by_image.get(id(image)) for image in self.images]
        return [None if row is None else row // max(n_copies, 1) for row in found]

    @property
    def layers(self) -> list[int]:
        """Prompt columns that each decoder layer ran on, padding included, summed over passes."""
        passes = [p.columns(self.n_layers)[0] for p in self.prefills] or [[0] * self.n_layers]
        return [sum(by_pass) for by_pass in zip(*passes, strict=True)]

    def n_mean(self, image: ImageReport) -> float:
        """Visual tokens of an image in the mean over decoder layers."""
        return sum(image.n_by_layer(self.n_layers)) / self.n_layers

    def row_layers(self, prefill: int, given: list[int]) -> list[list[int]]:
        """Columns of every row in every decoder layer, without padding.

        Args:
            prefill: which pass.
            given: columns of every row before any cut.
        """
        by_layer = self.prefills[prefill].layer_rows or [[]] * self.n_layers
        return [[rows[i] if rows else n for rows in by_layer] for i, n in enumerate(given)]

    @property
    def n_prompt(self) -> int:
        """Prompt columns before pruning, padding included."""
        return sum(p.n_outer for p in self.prefills)

    @property
    def n_prompt_kept(self) -> int:
        """Prompt columns that the language model ran on, padding included."""
        return sum(p.n_inner for p in self.prefills)

    @functools.cached_property
    def ledger(self) -> Ledger | None:
        """The call as it ran, at its padded width; None where the cost of the model is not known."""
        return self._ledger(
            [p.columns(self.n_layers) for p in self.prefills],
            lambda image, shape: image.encoded(shape) + Ledger((Ops(),) * shape.text.n_layers, selector=image.selector),
        )

    @functools.cached_property
    def ledger_unpruned(self) -> Ledger | None:
        """The same call of the bare model."""
        before = [([p.n_outer] * self.n_layers, [p.past_outer] * self.n_layers) for p in self.prefills]
        return self._ledger(before, lambda image, shape: shape.encode(image.layout.n_crops, image.n_patches))

    def _ledger(
        self, columns: list[tuple[list[int], list[int]]], encode: Callable[[ImageReport, Shape], Ledger]
    ) -> Ledger | None:
        shape = self.shape
        if shape is None or not self.prefills:
            return None
        ledger = Ledger(layers=(Ops(),) * shape.text.n_layers)
        for image in self.encoded:
            ledger += encode(image, shape)
        for p, (n, past) in zip(self.prefills, columns, strict=True):
            ledger += shape.read(n, rows=p.n_rows, past=past, bytes_per_value=self.bytes_per_value)
        return ledger

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "method": self.method,
            "budget": self.budget,
            "signals": self.signals,
            "rows": self.rows,
            "n_visual": [i.n_visual for i in self.images],
            "n_kept": [i.n_kept for i in self.images],
            "n_given": [i.n_given for i in self.images],
            "n_encoded": [i.n_encoded for i in self.images],
            "n_mean": [self.n_mean(i) for i in self.images],
            "n_special": [i.n_special for i in self.images],
            "n_special_kept": [i.n_special_kept for i in self.images],
            "kept_by_crop": [i.kept_by_crop() for i in self.images],
            "prompt_columns": self.n_prompt,
            "prompt_columns_kept": self.n_prompt_kept,
            "layers": self.layers,
            **self._costs(),
        }

    def _costs(self) -> dict[str, Any]:
        before, after = self.ledger_unpruned, self.ledger
        if before is None or after is None:
            return {}
        return {
            "llm_flops": [before.llm.flops, after.llm.flops],
            "prefill_flops": [before.prefill.flops, after.prefill.flops],
            "selector_flops": after.selector.flops,
            "before_llm_flops": before.before_llm.flops,
            "tower_flops": [before.vision.flops, after.vision.flops],
            "kv_bytes": [before.kv_bytes, after.kv_bytes],
        }

    def show(self, pictures: Sequence[Image.Image | Clip], processor: Any = None) -> ShownReport:
        """The pictures of the call with the dropped tokens dim, for notebooks: a report holds no pixels.

        Args:
            pictures: one for each of `images`, as the processor was given them; a video as a
                `tokprune.prune.videos.Clip`.
            processor: of the model; needed where a picture's sides have another ratio than its tokens' grid, since it
                may then have been cropped or stretched.

        Raises:
            RunError: another number of pictures, or one whose part that the model saw is not known.
        """
        from .shown import drawn  # Pillow and NumPy are for notebooks alone

        return drawn(self, pictures, processor)

    def _repr_html_(self) -> str:
        from .shown import report_html

        return report_html(self)

    def __repr__(self):
        return "\n  ".join(self.lines)

    def __str__(self):
        head, *parts = self.lines
        return f"{head}: " + "; ".join(parts)

    @property
    def lines(self) -> list[str]:
        """Method and budget, and what `str` says about the call."""
        return [f"{self.method} {self.budget}".strip(), *self._parts()]

    def _parts(self) -> list[str]:
        if not self.prefills and not self.images:
            return ["no call yet"]
        parts = [_tokens_line(self.images), f"language model {self.n_prompt} -> {self.n_prompt_kept} columns"]
        if any(i.before_tower for i in self.images):
            n_cells = sum(i.n_visual for i in self.images), sum(i.n_encoded for i in self.images)
            parts.insert(1, f"vision tower {n_cells[0]} -> {n_cells[1]} cells in all")
        if any(i.cuts for i in self.images):
            parts[-1] += f", {self.layers[-1]} after the last cut"
            parts.append(self._layers_line())
        if self.clamped:
            parts.append("more tokens asked for than an image has: all kept")
        elif self.images and self.between and not self._dropped:
            parts.append("nothing was dropped between layers")
        elif self.images and self.layers[-1] == self.n_prompt and self._dropped:
            parts.append("nothing is saved in this batch: its longest row keeps all its columns")
        if self.ledger and self.ledger_unpruned:
            parts += _cost_lines(self.ledger_unpruned, self.ledger)
        if self.signals:
            parts.append(self.signals)
        return parts

    def _layers_line(self) -> str:
        """Columns by decoder layer: "layers 0-1: 153, 2-7: 45 columns; visual tokens 63 in the mean over layers"."""
        steps = [i for i, n in enumerate(self.layers) if i == 0 or n != self.layers[i - 1]] + [self.n_layers]
        spans = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in itertools.pairwise(steps)]
        shown = ", ".join(f"{span}: {self.layers[a]}" for span, a in zip(spans, steps, strict=False))
        mean = sum(map(self.n_mean, self.images)) / len(self.images)
        return f"decoder layers {shown} columns, {mean:.4g} visual tokens in the mean over layers"

    @property
    def _dropped(self) -> bool:
        return any(i.n_kept < i.n_visual for i in self.images)


LIMIT_SHOWN = 0.1  # the share of tower and projector from which a report names it


def _cost_lines(before: Ledger, after: Ledger) -> list[str]:
    """FLOPs of language model and prefill, KV bytes, and how far the vision tower limits what can be saved."""
    llm, whole = (before.llm.flops, after.llm.flops), (before.prefill.flops, after.prefill.flops)
    lines = [
        f"LLM {arrow(*llm, 'FLOPs', 1000)}, whole prefill {arrow(*whole, 'FLOPs', 1000)}",
        f"KV cache {arrow(before.kv_bytes, after.kv_bytes, 'B', 1024)}",
    ]
    encoding = before.before_llm.flops, after.before_llm.flops
    share = encoding[0] / whole[0]
    if encoding[1] < encoding[0]:
        lines.append(f"vision tower and projector {arrow(*encoding, 'FLOPs', 1000)}")
    elif share >= LIMIT_SHOWN:
        lines.append(f"vision tower and projector are {100 * share:.0f} % of the unpruned prefill and cannot be saved")
    return lines


def arrow(before: int, after: int, unit: str, base: int) -> str:
    """Two amounts in one readable unit, and their ratio: "8.50 -> 2.51 TFLOPs (29.5 %)"."""
    prefixes = ("", "K", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    power = min(int(math.log(max(before, 1), base)), len(prefixes) - 1)
    a, b = (f"{amount / base**power:.3g}" for amount in (before, after))
    return f"{a} -> {b} {prefixes[power]}{unit} ({100 * after / max(before, 1):.3g} %)"


def _tokens_line(images: list[ImageReport]) -> str:
    if not images:
        return "no image"
    pairs = sorted({(i.n_visual, i.n_kept) for i in images}, reverse=True)
    shown = ", ".join(f"{before} -> {after}" for before, after in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
    n_videos = sum(i.is_video for i in images)
    counts = [(len(images) - n_videos, "image"), (n_videos, "video")]
    named = " and ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counts if n)
    line = f"{named}, visual tokens {shown} each"
    newlines = sum(i.layout.n_newlines for i in images), sum(i.n_special_kept for i in images)
    return f"{line}, newlines {newlines[0]} -> {newlines[1]} in all" if newlines[0] else line


def describe_signals(signals: frozenset[Signal]) -> str:
    """What was collected, from which layers."""

    def layers(s: Signal) -> str:
        if not s.layers:
            return ""
        span = f"{s.layers[0]}" if s.layers[-1] - s.layers[0] == 0 else f"{s.layers[0]}-{s.layers[-1]}"
        span = span if s.layers[-1] - s.layers[0] == len(s.layers) - 1 else ", ".join(map(str, s.layers))
        return f" of vision layer {span}"

    def form(s: Signal) -> str:
        attention = s.kind in (Kind.CLS_ROW, Kind.RECEIVED, Kind.GIVEN)
        special = {"keys": "", "both": ", queries of [CLS] too", "none": ", without [CLS]"}[s.special]
        return f" ({s.form}{', one head' if s.heads == 'single' else ''}{special})" if attention else ""

    return ", ".join(sorted(s.kind.value + form(s) + layers(s) for s in signals))
