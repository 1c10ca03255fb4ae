"""What a model adapter is: where a model family keeps its vision tower, its features and its language model.

To add a family, answer these: through which functions do pictures become features (`encode_functions`)? Is
there one row per placeholder id, and which ids are placeholders? Does the tower have a [CLS] token, and at
which layers do its features end? Which rows show no patch (newlines)? Which state does the model cache on
itself? Then write one file with a subclass, and one line in the table of this package.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokprune import attention
from tokprune.errors import NotCopyable, TokPruneError, UnsupportedModelError
from tokprune.flops import Shape
from tokprune.shapes import shape_from_config
from tokprune.types import Kind, Layout, Signal, Tower


class TowerKind(NamedTuple):
    """A kind of vision tower: its name for tables, and whether it has a [CLS] token."""

    name: str
    has_cls: bool


class ModelAdapter:
    """One model family. Knows no method.

    Args:
        model: a transformers model of this family, with or without its language-modelling head.

    Attributes:
        encode_functions: functions of the base model that turn pictures into rows for the language model.
        default_positions: what positions="auto" means here.
        towers: the vision towers it knows, by `vision_config.model_type`.
    """

    encode_functions: ClassVar[tuple[str, ...]] = ("get_image_features",)
    default_positions: ClassVar[str] = "contiguous"
    towers: ClassVar[Mapping[str, TowerKind]] = {}

    def __init__(self, model: nn.Module):
        self.model = model
        self.base: Any = model if hasattr(model, "language_model") and not hasattr(model, "lm_head") else model.model

    @property
    def language_model(self) -> nn.Module:
        """The decoder that takes `inputs_embeds`."""
        return self.base.language_model

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids in `input_ids` that stand for one visual token each."""
        return (self.base.config.image_token_id,)

    @functools.cached_property
    def tower(self) -> Tower:
        """Depth of the vision tower, and whether it has a [CLS] token."""
        config = self.base.config.vision_config
        return Tower(config.num_hidden_layers, self.towers[config.model_type].has_cls)

    @functools.cached_property
    def shape(self) -> Shape | None:
        """What the ledger needs, or None for a family that it cannot count."""
        try:
            return shape_from_config(self.base.config)
        except UnsupportedModelError:
            return None

    @property
    def supplies(self) -> frozenset[Kind]:
        """Kinds of signals that can be collected."""
        return self.supplies_of(self.tower.has_cls)

    @classmethod
    def supplies_of(cls, has_cls: bool) -> frozenset[Kind]:
        """Kinds of signals from a tower with or without a [CLS] token."""
        return frozenset({Kind.RECEIVED, Kind.GIVEN} | ({Kind.CLS_ROW} if has_cls else set()))

    def supplies_all(self, signals: frozenset[Signal]) -> bool:
        """Whether every signal is of a kind that can be collected."""
        return all(s.kind in self.supplies for s in signals)

    def check_attention(self, positions: str) -> None:
        """Raise where the language model's attention implementation cannot serve a shorter sequence."""
        implementation = getattr(self.language_model.config, "_attn_implementation", "") or ""
        if "flex" in implementation:
            raise UnsupportedModelError(
                "flex attention masks cannot be shortened; load with attn_implementation='sdpa'"
            )
        if "flash" in implementation and positions == "original":
            raise UnsupportedModelError(
                "flash attention takes gaps in positions for several packed sequences; "
                "use positions='contiguous', or attn_implementation='sdpa'"
            )

    def attention_module(self, layer: int) -> nn.Module:
        """The attention module of a vision layer; has q_proj, k_proj, num_heads and scale."""
        raise NotImplementedError

    def layouts(self, arguments: Mapping[str, Any], features: list[Tensor]) -> list[Layout]:
        """Where the rows of every encoded image lie; arguments are those of the encode function."""
        raise NotImplementedError

    def crop_patches(self, layout: Layout) -> int | None:
        """Patches of a crop where the picture's size decides; None where the configuration does."""
        return None

    def pack(self, signal: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        """A signal over patches, (crops, l, patches), as one (l, N) an image in packed space."""
        return list(signal)


def split_features(out: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """What an encode function returned, as one (N, D) an image, and how to put new ones back.

    Releases 5 return an output object whose `pooler_output` holds the features, releases 4 the features.
    """
    if hasattr(out, "pooler_output"):
        kind = type(out.pooler_output)

        def put_back(features: list[Tensor]):
            out.pooler_output = torch.stack(features) if kind is Tensor else kind(features)
            return out

        return list(out.pooler_output), put_back
    if isinstance(out, Tensor):
        return list(out), torch.stack
    return list(out), type(out)


class SignalTap(NotCopyable):
    """Collects signals from the queries and keys of vision layers; open only while a picture is encoded.

    Hooks on the projections see what attention sees, whichever attention implementation runs, and cost no
    extra product of hidden states.
    """

    def __init__(self, adapter: ModelAdapter, signals: frozenset[Signal]):
        self.adapter, self.signals = adapter, signals
        self.n_special = 1 if adapter.tower.has_cls else 0
        self._local = _Open()

    def install(self, stack) -> None:
        """Register the hooks; the stack removes them."""
        for layer in sorted({layer for s in self.signals for layer in s.layers}):
            module = self.adapter.attention_module(layer)
            for side in ("q", "k"):
                # Where queries and keys are normalised, attention sees them after that.
                projection = getattr(module, f"{side}_norm", None) or getattr(module, f"{side}_proj")
                hook = functools.partial(self._seen, layer, module, side)
                stack.callback(projection.register_forward_hook(hook).remove)

    def collect(self, encode: Callable[[], Any]) -> tuple[Any, dict[Signal, Tensor]]:
        """What an encode function returns, and the signals of its vision layers."""
        self.open()
        try:
            out = encode()
        except BaseException:
            self._local.rows, self._local.sides = None, {}
            raise
        return out, self.close()

    def open(self) -> None:
        """Start collecting in this thread."""
        self._local.sides, self._local.rows = {}, {}

    def close(self) -> dict[Signal, Tensor]:
        """Stop, and return every signal over patches, (crops, l, patches).

        Raises:
            TokPruneError: a layer did not run.
        """
        rows, self._local.rows, self._local.sides = self._local.rows, None, {}
        missing = sorted({layer for s in self.signals for layer in s.layers if (s, layer) not in rows})
        if missing:
            raise TokPruneError(
                f"vision layers {missing} did not run while the picture was encoded; "
                "choose layers up to the one whose features the model reads"
            )
        # The tower's layers may sit on several devices.
        return {
            s: torch.stack([rows[s, layer].to(rows[s, s.layers[0]].device) for layer in s.layers], 1)
            for s in self.signals
        }

    @torch.no_grad()
    def _seen(self, layer: int, module: nn.Module, side: str, projection: nn.Module, args: tuple, out: Tensor):
        if self._local.rows is None:
            return
        sides = self._local.sides.setdefault(layer, {})
        sides[side] = out
        if len(sides) == 2:
            del self._local.sides[layer]
            q, k = (sides[s].unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for s in ("q", "k"))
            asked = [s for s in self.signals if layer in s.layers]
            with torch.autocast(q.device.type, enabled=False):  # it would turn the products back to half precision
                for signal, row in signal_rows(asked, q, k, module.scale, self.n_special):
                    self._local.rows[signal, layer] = row


class _Open(threading.local):
    """What a thread has collected; rows is None while the tap is closed."""

    sides: dict = {}
    rows: dict | None = None


def signal_rows(signals: list[Signal], q: Tensor, k: Tensor, scale: float, n_special: int):
    """(signal, (crops, patches)) for every signal asked of one layer; q and k are (crops, H, T, d)."""
    for form in sorted({s.form for s in signals}):
        asked = {s.kind: s for s in signals if s.form == form}
        if Kind.CLS_ROW in asked:
            yield asked[Kind.CLS_ROW], attention.cls_row(q, k, scale, form, n_special)
        if Kind.RECEIVED in asked and Kind.GIVEN in asked:
            received, given = attention.received_and_given(q, k, scale, form, n_special)
            yield asked[Kind.RECEIVED], received
            yield asked[Kind.GIVEN], given
        elif Kind.RECEIVED in asked:
            yield asked[Kind.RECEIVED], attention.received(q, k, scale, form, n_special)
        elif Kind.GIVEN in asked:
            yield asked[Kind.GIVEN], attention.given(q, k, scale, form, n_special)
