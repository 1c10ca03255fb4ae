"""What a model adapter is: where a model family keeps its vision tower, its features and its language model.

To add a family, answer these: through which functions do pictures become features (`encode_functions`)? Is
there one row per placeholder id, and which ids are placeholders? Does the tower have a [CLS] token, and at
which layers do its features end? Which rows show no patch (newlines)? Which state does the model cache on
itself? Then write one file with a subclass, and one line in the table of this package.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokprune import attention
from tokprune.compat import attention_implementation, features_of, with_features
from tokprune.errors import NotCopyable, TokPruneError, UnsupportedModelError
from tokprune.flops import Shape
from tokprune.hooks import Hooks
from tokprune.shapes import shape_from_config
from tokprune.spans import span
from tokprune.types import Decoder, Kind, Layout, Signal, Tower

# What tells one language model's configuration from another's.
FINGERPRINT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


class TowerKind(NamedTuple):
    """A kind of vision tower: its name for tables, and whether it has a [CLS] token."""

    name: str
    has_cls: bool


class ModelAdapter:
    """One model family. Knows no method.

    Args:
        model: a transformers model of this family, with or without its language-modelling head.

    Attributes:
        encode_functions: functions of the base model that turn pictures into rows for the language model, each
            with the field of the configuration that names its placeholder id.
        images_from_prompt: whether only the prompt tells which crops make up an image; then tokens are selected
            when the language model runs, not when pictures are encoded.
        default_positions: what positions="auto" means here.
        towers: the vision towers it knows, by `vision_config.model_type`.
        one_patch_a_row: whether the projector takes one patch a row (no pixel shuffle).
    """

    encode_functions: ClassVar[Mapping[str, str]] = {"get_image_features": "image_token_id"}
    images_from_prompt: ClassVar[bool] = False
    default_positions: ClassVar[str] = "contiguous"
    towers: ClassVar[Mapping[str, TowerKind]] = {}
    one_patch_a_row: ClassVar[bool] = True

    def __init__(self, model: nn.Module):
        self.model = model
        self.base: Any = model if hasattr(model, "language_model") and not hasattr(model, "lm_head") else model.model
        kind = self.base.config.vision_config.model_type
        if kind not in self.towers:
            raise UnsupportedModelError(
                f"the {self.base.config.model_type!r} adapter knows the towers {', '.join(self.towers)}; this model "
                f"has {kind!r}, which packs its pictures differently"
            )

    @property
    def language_model(self) -> nn.Module:
        """The decoder that takes `inputs_embeds`."""
        return self.base.language_model

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """By encode function, the id in `input_ids` that stands for one visual token."""
        found = {name: getattr(self.base.config, field, None) for name, field in self.encode_functions.items()}
        return {name: value for name, value in found.items() if value is not None}

    @functools.cached_property
    def tower(self) -> Tower:
        """Depth of the vision tower, whether it has a [CLS] token, and whether merged states can be projected."""
        config = self.base.config.vision_config
        one_layer = isinstance(self.base.config.vision_feature_layer, int)
        has_cls = self.towers[config.model_type].has_cls
        return Tower(config.num_hidden_layers, has_cls, self.one_patch_a_row and one_layer)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Depth, width and a hash of the language model's configuration."""
        config = self.language_model.config
        named = {name: getattr(config, name, None) for name in FINGERPRINT}
        text = json.dumps({**named, "model_type": config.model_type}, sort_keys=True, default=str)
        return Decoder(
            len(self.language_model.layers), config.hidden_size, hashlib.sha256(text.encode()).hexdigest()[:16]
        )

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
        return self.supplies_of(self.tower)

    @classmethod
    def supplies_of(cls, tower: Tower) -> frozenset[Kind]:
        """Kinds of signals from such a tower."""
        kinds = {Kind.RECEIVED, Kind.GIVEN, Kind.KEYS, Kind.TEXT_EMBEDS} | {k for k in Kind if k.is_decoder}
        if tower.has_cls:
            kinds |= {Kind.CLS_ROW, Kind.CLS_STATE} if tower.projects_rows else {Kind.CLS_ROW}
        return frozenset(kinds)

    def supplies_all(self, signals: frozenset[Signal]) -> bool:
        """Whether every signal is of a kind that can be collected."""
        return all(s.kind in self.supplies for s in signals)

    def check_attention(self, positions: str) -> None:
        """Raise where the language model's attention implementation cannot serve a shorter sequence."""
        implementation = attention_implementation(self.language_model)
        if "flex" in implementation:
            raise UnsupportedModelError(
                "flex attention masks cannot be shortened; load with attn_implementation='sdpa'"
            )
        if "flash" in implementation and positions == "original":
            raise UnsupportedModelError(
                "flash attention takes gaps in positions for several packed sequences; "
                "use positions='contiguous', or attn_implementation='sdpa'"
            )

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower; transformers 4 nests some towers once more."""
        tower = self.base.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    def attention_module(self, layer: int) -> nn.Module:
        """The attention module of a vision layer; has q_proj, k_proj, num_heads and scale."""
        return self.vision_layers[layer].self_attn

    @property
    def read_layer(self) -> int:
        """The vision layer whose output the projector reads."""
        index = self.base.config.vision_feature_layer
        index = index if isinstance(index, int) else index[-1]
        return (index if index >= 0 else len(self.vision_layers) + 1 + index) - 1

    def selection(self, arguments: Mapping[str, Any]) -> str:
        """Feature selection of a call: "default" cuts the tower's first row off, "full" leaves it."""
        return arguments.get("vision_feature_select_strategy") or self.base.config.vision_feature_select_strategy

    @property
    def projector(self) -> nn.Module:
        """From states of the tower to rows for the language model."""
        return self.base.multi_modal_projector

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """Where the rows of every encoded image lie.

        Args:
            name: the encode function.
            arguments: of the call.
            features: what it returned, one (N, D) an entry.
            runs: placeholders of every image in the prompt; only where `images_from_prompt`.
        """
        raise NotImplementedError

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Values of patches, (crops, patches, C), through the model's own packing: (N, C) an entry of `features`.

        Rows that show no patch hold NaN.
        """
        return list(values)

    def crops_of(self, name: str, arguments: Mapping[str, Any], n_crops: int) -> list[int]:
        """How many of the encoded crops belong to each entry of `features`."""
        return [1] * n_crops

    def merges_states(self, layout: Layout) -> bool:
        """Whether packed rows of this image are projected patches one by one, so that states can be merged instead."""
        return self.tower.projects_rows

    def crop_patches(self, layout: Layout) -> int | None:
        """Patches of a crop where the picture's size decides; None where the configuration does."""
        return None


def split_features(out: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """What an encode function returned, as one (N, D) an image, and how to put new ones back."""
    given = features_of(out)

    def put_back(features: list[Tensor]) -> Any:
        return with_features(out, torch.stack(features) if isinstance(given, Tensor) else type(given)(features))

    return list(given), put_back


class SignalTap(NotCopyable):
    """Collects signals from the vision tower; open only while a picture is encoded.

    Hooks on the projections see what attention sees, whichever attention implementation runs, and cost no
    extra product of hidden states. With `states`, what the projector takes is collected, too.
    """

    def __init__(self, adapter: ModelAdapter, signals: frozenset[Signal], states: bool = False):
        self.adapter, self.states = adapter, states
        self.signals = frozenset(s for s in signals if s.kind is not Kind.TEXT_EMBEDS)
        self.n_special = 1 if adapter.tower.has_cls else 0
        self._local = _Open()

    def install(self, hooks: Hooks) -> None:
        """Register the hooks."""
        for layer in sorted({layer for s in self.signals for layer in s.layers}):
            module = self.adapter.attention_module(layer)
            for side in ("q", "k"):
                # Where queries and keys are normalised, attention sees them after that.
                projection = getattr(module, f"{side}_norm", None) or getattr(module, f"{side}_proj")
                hook = functools.partial(self._seen, layer, module, side)
                hooks.after(projection, hook)
        if any(s.kind is Kind.CLS_STATE for s in self.signals):
            layer = self.adapter.vision_layers[self.adapter.read_layer]
            hooks.after(layer, self._cls_seen)
        if self.states:
            hooks.before(self.adapter.projector, self._states_seen)

    def collect(self, encode: Callable[[], Any]) -> tuple[Any, dict[Signal | str, Tensor]]:
        """What an encode function returns, and what was collected meanwhile."""
        outer = self._local.rows, self._local.sides
        self.open()
        try:
            return encode(), self.close()
        finally:
            self._local.rows, self._local.sides = outer

    def open(self) -> None:
        """Start collecting in this thread."""
        self._local.sides, self._local.rows = {}, {}

    @span("signals")
    def close(self) -> dict[Signal | str, Tensor]:
        """Stop, and return every signal, (crops, patches, l, ...) or (crops, D), and "states", (crops, patches, D).

        Raises:
            TokPruneError: a layer did not run.
        """
        rows, self._local.rows, self._local.sides = self._local.rows, None, {}
        missing = sorted({layer for s in self.signals for layer in s.layers if (s, layer) not in rows})
        if missing:
            raise TokPruneError(
                f"vision layers {missing} did not run while the picture was encoded; "
                "choose layers up to the one whose features the model reads. If the tower is compiled, compile decoder "
                "layers instead, or use a method that reads nothing of the tower"
            )
        found = {s: rows[s] for s in self.signals if s.kind is Kind.CLS_STATE}
        # The tower's layers may sit on several devices.
        found |= {
            s: torch.stack([rows[s, layer].to(rows[s, s.layers[0]].device) for layer in s.layers], 2)
            for s in self.signals
            if s.kind.is_per_token
        }
        return found | ({"states": rows["states"]} if self.states else {})

    @torch.no_grad()
    def _seen(
        self, layer: int, module: nn.Module, side: str, projection: nn.Module, args: tuple, kwargs: dict, out: Tensor
    ):
        if self._local.rows is None:
            return
        sides = self._local.sides.setdefault(layer, {})
        sides[side] = out
        if len(sides) == 2:
            del self._local.sides[layer]
            q, k = (sides[s].unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for s in ("q", "k"))
            asked = [s for s in self.signals if layer in s.layers]
            # Autocast would turn the products back to half precision.
            with span("signals"), torch.autocast(q.device.type, enabled=False):
                for signal, row in signal_rows(asked, q, k, module.scale, self.n_special):
                    self._local.rows[signal, layer] = row

    def _cls_seen(self, layer: nn.Module, args: tuple, kwargs: dict, out):
        if self._local.rows is not None:
            state = (out[0] if isinstance(out, tuple) else out)[:, 0].float()
            self._local.rows |= {s: state for s in self.signals if s.kind is Kind.CLS_STATE}

    def _states_seen(self, projector: nn.Module, args: tuple, kwargs: dict):
        if self._local.rows is not None:
            self._local.rows["states"] = args[0]


class _Open(threading.local):
    """What a thread has collected; rows is None while the tap is closed."""

    sides: dict = {}
    rows: dict | None = None


def signal_rows(signals: list[Signal], q: Tensor, k: Tensor, scale: float, n_special: int):
    """(signal, (crops, patches, ...)) for every signal asked of one layer; q and k are (crops, H, T, d)."""
    for s in signals:
        if s.kind is Kind.KEYS:
            yield s, k[:, :, n_special:].transpose(1, 2).float()
    for form, heads in sorted({(s.form, s.heads) for s in signals if s.kind is not Kind.KEYS}):
        asked = {s.kind: s for s in signals if (s.form, s.heads) == (form, heads)}
        queries, keys, by = attention.as_one_head(q, k) if heads == "single" else (q, k, scale)
        if Kind.CLS_ROW in asked:
            yield asked[Kind.CLS_ROW], attention.cls_row(queries, keys, by, form, n_special)
        if Kind.RECEIVED in asked and Kind.GIVEN in asked:
            received, given = attention.received_and_given(queries, keys, by, form, n_special)
            yield asked[Kind.RECEIVED], received
            yield asked[Kind.GIVEN], given
        elif Kind.RECEIVED in asked:
            yield asked[Kind.RECEIVED], attention.received(queries, keys, by, form, n_special)
        elif Kind.GIVEN in asked:
            yield asked[Kind.GIVEN], attention.given(queries, keys, by, form, n_special)
