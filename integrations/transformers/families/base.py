"""What a model family is: where its models keep its vision tower, its features and its language model.

To add a family, answer these: through which functions do pictures become features (`encode_functions`)? Is
there one row per placeholder id, and which ids are placeholders? Does the tower have a [CLS] token, and at
which layers do its features end? Which rows show no patch (newlines)? Which state does the model cache on
itself? Then write one file with a subclass, and one line in the table of this package.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tokprune.core.errors import OptionError, UnsupportedModelError
from tokprune.core.layout import Layout
from tokprune.core.lazy import nn, torch
from tokprune.core.signals import Decoder, Kind, Tower
from tokprune.cost.flops import Shape
from tokprune.prune.supply import Supply, tower_kinds

from ..compat import OLDEST, attention_implementation, features_of
from .sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor

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


class ModelFamily:
    """One model family. Knows no method.

    Args:
        model: a transformers model of this family, with or without its language-modelling head.

    Attributes:
        model_type: `config.model_type`.
        oldest: the oldest release of transformers that the laws hold on for this family.
        encode_functions: functions of the base model that turn pictures into rows for the language model, each
            with the field of the configuration that names its placeholder id.
        language_model_name: attribute of the base model that holds its language model.
        images_from_prompt: whether only the prompt tells which crops make up an image; then tokens are selected
            when the language model runs, not when pictures are encoded.
        joins_runs: whether an image may be several runs of placeholders with text between them; then `images_in` is
            asked, which reads the prompt.
        default_positions: what positions="auto" means here.
        towers: the vision towers it knows, by `vision_config.model_type`.
        one_patch_a_row: whether the projector takes one patch a row (no pixel shuffle).
        nested_encoders: encode functions that call another one, by name.
        m_rope: whether positions are those of M-RoPE, which are not column numbers.
        first_position: what positions begin with.
        column_inputs: keywords of the language model with one entry a column, and the axis of the columns.
        ready_masks: whether the base model hands ready masks to its language model, which have to be made anew.
        column_types: keyword of the base model that says what every column is, for those masks.
        sliding_caches: whether layers with a sliding window may hold a pruned sequence; the window counts kept tokens.
        recurrent_caches: whether layers may hold a state of all that they have read, which cannot be taken back, in
            place of keys.
        no_layer_cuts: why nothing can be cut between decoder layers; empty where it can.
        no_tower_signals: what its vision tower does so that attention cannot be read; empty where it can.
        picture_processor: class of its processor that is loaded for pictures alone where torchvision is missing, which
            video processors need; empty if it needs none.
        patches_clips: whether clips are then cut into patches by the image processor, two frames a step of time.
        takes_cells: whether its tower can run on a part of a picture's tokens; then `cells`, `cell_tower` and
            `tower_part` say how.
        visual_inputs: keywords with a list of (visual columns, D), selected by the mask that `visual_mask` names.
    """

    model_type: ClassVar[str] = ""
    oldest: ClassVar[str] = OLDEST
    encode_functions: ClassVar[Mapping[str, str]] = {"get_image_features": "image_token_id"}
    language_model_name: ClassVar[str] = "language_model"
    images_from_prompt: ClassVar[bool] = False
    joins_runs: ClassVar[bool] = False
    default_positions: ClassVar[str] = "contiguous"
    towers: ClassVar[Mapping[str, TowerKind]] = {}
    one_patch_a_row: ClassVar[bool] = True
    nested_encoders: ClassVar[Mapping[str, str]] = {}
    m_rope: ClassVar[bool] = False
    first_position: ClassVar[int] = 0
    column_inputs: ClassVar[Mapping[str, int]] = {"token_type_ids": 1}  # some tokenizers give them to any model
    visual_inputs: ClassVar[Sequence[str]] = ()
    visual_mask: ClassVar[str] = ""
    ready_masks: ClassVar[bool] = False
    column_types: ClassVar[str] = ""
    sliding_caches: ClassVar[bool] = False
    picture_processor: ClassVar[str] = ""
    patches_clips: ClassVar[bool] = False
    recurrent_caches: ClassVar[bool] = False
    no_layer_cuts: ClassVar[str] = ""
    no_tower_signals: ClassVar[str] = ""
    takes_cells: ClassVar[bool] = False

    def __init__(self, model: nn.Module):
        self.model = model
        is_base = hasattr(model, self.language_model_name) and not hasattr(model, "lm_head")
        self.base: Any = model if is_base else model.model
        kind = self.base.config.vision_config.model_type
        if kind not in self.towers:
            raise UnsupportedModelError(
                f"the {self.base.config.model_type!r} family knows the towers {', '.join(self.towers)}; this model "
                f"has {kind!r}, which packs its pictures differently"
            )

    @property
    def language_model(self) -> nn.Module:
        """The decoder that takes `inputs_embeds`."""
        return getattr(self.base, self.language_model_name)

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """By encode function, the id in `input_ids` that stands for one visual token."""
        found = {name: getattr(self.base.config, field, None) for name, field in self.encode_functions.items()}
        return {name: value for name, value in found.items() if value is not None}

    def is_placeholder(self, ids: Tensor) -> Tensor:
        """Which ids stand for visual tokens, bool."""
        return torch.isin(ids, torch.tensor(list(self.placeholder_ids.values()), device=ids.device))

    def encode(self, name: str, **arguments: Any) -> list[Tensor]:
        """Rows of pictures through one of the encode functions, (N, D) an entry."""
        return list(features_of(getattr(self.base, name)(**arguments)))

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

    @property
    def facts(self) -> dict[str, Any]:
        """Kind and size of the model, as saved attachments note them."""
        return {
            "model_type": self.base.config.model_type,
            "decoder_layers": self.decoder.n_layers,
            "decoder_width": self.decoder.width,
            "tower_layers": self.tower.n_layers,
            "tower_has_cls": self.tower.has_cls,
        }

    @functools.cached_property
    def shape(self) -> Shape | None:
        """What the ledger needs, or None for a family that it cannot count."""
        try:
            return self.shape_of(self.base.config)
        except UnsupportedModelError:
            return None

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """The ledger's view of a configuration of this family.

        Raises:
            UnsupportedModelError: the cost of its tower or its language model is not known.
        """
        raise UnsupportedModelError(f"the FLOPs of {config.model_type!r} are not known")

    @classmethod
    def config_of(cls, sizes: Sizes) -> Any:
        """A configuration of these sizes, for tests and benchmarks."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            cls.model_type,
            vision_config=cls.tower_config(sizes),
            text_config=cls.text_config(sizes),
            **cls.options(sizes),
        )

    @classmethod
    def tower_config(cls, sizes: Sizes) -> Any:
        """The vision tower's part of `config_of`."""
        return sizes.tower_config()

    @classmethod
    def text_config(cls, sizes: Sizes) -> Any:
        """The language model's part of `config_of`."""
        from transformers import AutoConfig

        return AutoConfig.for_model(sizes.text_type, **sizes.text_arguments)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """What `config_of` says about placeholders, features and crops."""
        raise NotImplementedError

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """The family's own image processor, for crops of this configuration."""
        raise NotImplementedError

    @property
    def supply(self) -> Supply:
        """What can be collected for methods."""
        return Supply(self.tower, self.supplies_of(self.tower), self.no_tower_signals)

    @classmethod
    def supplies_of(cls, tower: Tower) -> frozenset[Kind]:
        """Kinds of signals from such a tower."""
        kinds = {Kind.TEXT_EMBEDS} | {k for k in Kind if k.is_decoder}
        if not cls.no_tower_signals:
            kinds |= tower_kinds(tower)
        if cls.takes_cells:
            kinds.add(Kind.PIXELS)
        return frozenset(kinds)

    @property
    def position_functions(self) -> list[tuple[Any, str]]:
        """Functions, by owner and name, that work out positions from the length of the cache."""
        named = ((self.base, "compute_3d_position_ids"), (self.model, "_prepare_position_ids_for_generation"))
        return [(owner, name) for owner, name in named if self.m_rope and hasattr(owner, name)]

    def check_positions(self, positions: str) -> None:
        """Raise where kept tokens cannot be numbered so."""
        if self.m_rope and positions == "contiguous":
            raise OptionError(
                "positions='contiguous' does not exist under M-RoPE, where positions are places in a picture and not "
                "column numbers; use positions='original' (or 'auto')"
            )

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

    def tower_projections(self, layer: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The attention module of a vision layer, and the modules in it whose outputs become queries and keys."""
        module = self.attention_module(layer)
        # Where queries and keys are normalised, attention sees them after that.
        sides = {side: getattr(module, f"{side}_norm", None) or getattr(module, f"{side}_proj") for side in ("q", "k")}
        return module, sides

    def tower_twins(self, module: nn.Module) -> list[nn.Module]:
        """A module of the vision tower, and those that do its work for other pictures; one of them runs at a time."""
        return [module]

    def tower_heads(
        self, outputs: Mapping[str, Tensor], entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Queries and keys as attention sees them, (crops, H, T, d) with the scale, for every segment of the sequence.

        Args:
            outputs: of the modules that `tower_projections` names.
            entered: keywords that the attention module was called with, and itself as "module".
        """
        module = entered["module"]
        q, k = (outputs[side].unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for side in ("q", "k"))
        yield q, k, module.scale

    def tower_states(self, out: Tensor, entered: Mapping[str, Any]) -> Tensor:
        """What a vision layer put out, (crops, T, D), in the order of `tower_heads`.

        Args:
            out: its output.
            entered: keywords that it was called with.
        """
        return out if out.ndim == 3 else out[None]

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

    def images_in(self, ids: Sequence[int], runs: Sequence[range]) -> list[tuple[int, Any]]:
        """Images in a row of a prompt: of how many runs of placeholders each is, and what `layouts` is told of it.

        Args:
            ids: of the row, or other numbers that are the same where ids are.
            runs: columns of its runs of placeholders.
        """
        return [(1, len(run)) for run in runs]

    def pieces(self, name: str, arguments: Mapping[str, Any], features: list[Tensor]) -> list[Tensor]:
        """What was encoded, (N, D) an entry that is one run of placeholders; only where `images_from_prompt`."""
        return features

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[Any] = ()
    ) -> list[Layout]:
        """Where the rows of every encoded image lie.

        Args:
            name: the encode function.
            arguments: of the call.
            features: what it returned, one (N, D) an entry.
            runs: placeholders of every image in the prompt, or what `images_in` tells of it; only where
                `images_from_prompt`.
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

    def cells(self, name: str, arguments: Mapping[str, Any]) -> Tensor:
        """Pixel values of what every token shows, (N, P), one picture after the other; only where `takes_cells`."""
        raise NotImplementedError

    @property
    def cell_tower(self) -> nn.Module:
        """The module that makes features of pixels; only where `takes_cells`."""
        raise NotImplementedError

    def tower_part(self, args: tuple, kwargs: dict, keep: Tensor, index: Tensor) -> tuple[tuple, dict]:
        """Arguments of `cell_tower` for the tokens that stay; only where `takes_cells`.

        Args:
            args: as it is called.
            kwargs: as it is called.
            keep: (N,) bool, of all pictures of the call.
            index: (K,), where the kept ones are among the N.
        """
        raise NotImplementedError

    def merges_states(self, layout: Layout) -> bool:
        """Whether packed rows of this image are projected patches one by one, so that states can be merged instead."""
        return self.tower.projects_rows

    def crop_patches(self, layout: Layout) -> int | None:
        """Patches of a crop where the picture's size decides; None where the configuration does."""
        return None
