"""Builds models of known shapes with random weights, and prompts with pictures cut as the real models cut them.

Times do not depend on the values of weights, so nothing is downloaded. Methods that decide by content see noise here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from PIL import Image
from tokprune.integrations.transformers import FAMILIES, Sizes, family_class, family_of, shape_from_config
from transformers import AutoModelForImageTextToText

from tokprune.core.errors import RunError
from tokprune.cost.shapes import KNOWN, known_shape
from tokprune.prune.pictures import open_picture

GIB = 2**30
SCALED = "type fewer decoder layers (--layers 4), --dtype bfloat16, or a smaller batch"


class NoRoom(RunError):
    """A model with its largest batch does not fit the free memory."""


# ------------------------------------------------------------------------------------------ configurations


class Build(NamedTuple):
    """How a known shape is built: its family, its parts, pixels a side, and the grids that pictures are cut into.

    A model that takes pictures of any size has no parts of other types; its usual picture is half of `side`.
    """

    family: str
    text: str
    tower: str
    side: int
    grids: tuple[tuple[int, int], ...] = ()
    patch: int = 14


NEXT_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_GRIDS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
BUILDS = {
    "llava-next-mistral": Build("llava_next", "mistral", "clip_vision_model", 336, NEXT_GRIDS),
    "llava-next": Build("llava_next", "llama", "clip_vision_model", 336, NEXT_GRIDS),
    "llava-1.5": Build("llava", "llama", "clip_vision_model", 336),
    "onevision": Build("llava_onevision", "qwen2", "siglip_vision_model", 384, ONEVISION_GRIDS),
    "internvl3": Build("internvl", "qwen2", "internvl_vision", 448),
    "qwen2.5-vl": Build("qwen2_5_vl", "", "", 1008),
    "qwen3-vl": Build("qwen3_vl", "", "", 992, patch=16),
}


def build_of(name: str) -> Build | None:
    """How a known shape is built, by its name; None where it cannot be."""
    return next((build for prefix, build in BUILDS.items() if name.startswith(prefix)), None)


def config_of(
    name: str, layers: int | None = None, vision_layers: int | None = None, side: int | None = None
) -> transformers.PretrainedConfig:
    """The configuration of a known shape.

    Args:
        name: such as "llava-1.5-7b".
        layers: decoder layers, fewer than the real ones.
        vision_layers: layers of the vision tower.
        side: width and height in pixels that the tower takes, for models that take one size only.

    Raises:
        RunError: the shape cannot be built, or a size is invalid.
    """
    shape, build = known_shape(name), build_of(name)
    if build is None:
        built = ", ".join(n for n in KNOWN if build_of(n))
        raise RunError(f"cannot build a model of shape {name!r}; type one of: {built}")
    for option, asked, real in (
        ("--layers", layers, shape.text.n_layers),
        ("--vision-layers", vision_layers, shape.vision.stack.n_layers),
    ):
        least = 2 if option == "--layers" else 3
        if asked is not None and not least <= asked <= real:
            raise RunError(f"{option} {asked} is outside {least} to {real}, the layers of {name}")
    if side is not None and (side % build.patch or side < 4 * build.patch):
        raise RunError(f"--resolution {side} has to be a multiple of {build.patch}, the pixels of a patch; type 336")
    text = replace(shape.text, n_layers=layers or shape.text.n_layers)
    tower = replace(shape.vision.stack, n_layers=vision_layers or shape.vision.stack.n_layers)
    side = side or build.side
    clip = {"projection_dim": 768} if build.tower.startswith("clip") else {}
    siglip = {"vision_use_head": shape.vision.pooling_head} if build.tower.startswith("siglip") else {}
    mistral = {"sliding_window": None} if build.text == "mistral" else {}
    return FAMILIES.load(build.family).config_of(
        Sizes(
            text=text,
            tower=tower,
            text_type=build.text,
            tower_type=build.tower,
            vocabulary=shape.vocabulary,
            side=side,
            patch=build.patch,
            image_id=shape.vocabulary - 1,
            video_id=shape.vocabulary - 2,
            grids=build.grids,
            text_options={"max_position_embeddings": 32768, **mistral},
            tower_options={**clip, **siglip, **_any_size_options(build.family, tower.n_layers)},
        )
    )


def _any_size_options(family: str, n_layers: int) -> dict[str, Any]:
    """What the real towers that take any size say about their layers, as far into a tower of `n_layers`."""
    if family == "qwen2_5_vl":  # every eighth layer attends to the whole picture, the others within windows
        return {"window_size": 112, "fullatt_block_indexes": list(range(7, n_layers, 8)) or [n_layers - 1]}
    if family == "qwen3_vl":
        return {"num_position_embeddings": 2304, "deepstack_visual_indexes": [n_layers * i // 4 for i in (1, 2, 3)]}
    return {}


# ------------------------------------------------------------------------------------------ models


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype, attn: str) -> torch.nn.Module:
    """A model without weights, which takes no memory."""
    return _built(config, dtype, attn, torch.device("meta"))


def build(config: transformers.PretrainedConfig, dtype: torch.dtype, attn: str, device: torch.device):
    """A model with random weights; it always generates the full length."""
    torch.manual_seed(0)
    model = _built(config, dtype, attn, device)
    model.generation_config.pad_token_id = 0
    return endless(model)


def endless(model: Any) -> Any:
    """The same model, changed so that no token ends an answer: all runs have the same length."""
    model.generation_config.eos_token_id = None
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    return model


def _built(config: transformers.PretrainedConfig, dtype: torch.dtype, attn: str, device: torch.device) -> Any:
    with _quiet(), device:
        try:
            return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn).eval()
        except (ImportError, ValueError) as error:  # an attention implementation that is not installed
            raise RunError(f"--attn {attn}: {first_line(error)} Type --attn sdpa") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' remarks on configurations without a checkpoint."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_too_large(
    model: torch.nn.Module, device: torch.device, rows: int, columns: int, name: str, loaded: bool = False
) -> None:
    """Raise if a model and what it computes do not fit the free memory.

    Args:
        model: a skeleton.
        device: where to build it.
        rows: rows of the largest batch.
        columns: columns of the prompt and the output.
        name: for the message.
        loaded: whether its weights are in memory already.

    Raises:
        NoRoom: names the memory needed, the free memory, and what to type.
    """
    weights = 0 if loaded else sum(p.numel() * p.element_size() for p in model.parameters())
    shape, size = shape_from_config(model.config), model.dtype.itemsize
    cache = shape.read(columns, rows=rows, bytes_per_value=size).kv_bytes
    layer = rows * columns * (3 * shape.text.mlp_width + 4 * shape.text.width) * size  # hidden states of one layer
    maps = 2 * rows * shape.text.n_heads * columns**2 * size if model.config._attn_implementation == "eager" else 0
    needed, free = weights + cache + layer + maps, free_bytes(device)
    if needed > free:
        raise NoRoom(
            f"{name} needs {needed / GIB:.1f} GiB ({weights / GIB:.1f} of weights in "
            f"{str(model.dtype).removeprefix('torch.')}, {cache / GIB:.1f} of KV cache) and {free / GIB:.1f} GiB are "
            f"free on {device}; {'type a smaller batch, or fewer tokens' if loaded else SCALED}"
        )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


# ------------------------------------------------------------------------------------------ prompts


def takes_any_size(config: transformers.PretrainedConfig) -> bool:
    """Whether a larger picture is cut into more crops."""
    return config.model_type != "llava"


def crop_side(config: transformers.PretrainedConfig) -> int:
    """Width and height of a crop in pixels."""
    side = getattr(config.vision_config, "image_size", 336)  # 576 tokens of twice that side, as in LLaVA, for Qwen
    return side if isinstance(side, int) else side[0]


def image_processor_of(config: transformers.PretrainedConfig) -> Any:
    """The family's own image processor, for crops of this configuration."""
    return family_class(config).image_processor(config)


def pictures(side: int, n: int, file: Path | None = None) -> list[Image.Image]:
    """Square pictures of smooth noise, all different: equal rows of a batch would be treated as beam copies.

    Args:
        side: width and height in pixels.
        n: how many.
        file: one picture to use instead.

    Raises:
        TaskError: the file is no picture.
    """
    if file:
        return [open_picture(file)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(n, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")
    return [as_picture(p) for p in smooth]


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """From (3, height, width) in [0, 1]."""
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def encoded(image_processor: Any, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """The processor's output for pictures."""
    found = image_processor(images, return_tensors="pt")
    names = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw")
    return {name: found[name] for name in names if name in found}


@torch.no_grad()
def placeholders(model: Any, pixels: dict[str, torch.Tensor]) -> int:
    """Rows that one picture gives the language model, newlines included, as the model packs them.

    Args:
        model: a skeleton is enough.
        pixels: of one picture.
    """
    if "image_grid_thw" in pixels:  # says it without running the tower
        return sum(len(layout.crop) for layout in family_of(model).layouts("get_image_features", pixels, []))
    values = pixels["pixel_values"].to(model.device, model.dtype)
    return sum(map(len, family_of(model).encode("get_image_features", **{**pixels, "pixel_values": values})))


def prompt(config: Any, n_visual: int, n_text: int, pixels: dict[str, torch.Tensor], rows: int) -> dict:
    """A batch; every row has text before and after its picture.

    Args:
        config: of the model.
        n_visual: placeholders of a picture.
        n_text: tokens of text.
        pixels: of all rows.
        rows: of the batch.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = config.text_config.vocab_size
    special = {getattr(config, name, None) for name in ("image_token_id", "video_token_id")}
    # Low ids are often special; a small vocabulary has no others to spare.
    least = 100 if vocabulary > 1000 else 3
    words = torch.tensor([i for i in range(least, vocabulary) if i not in special])
    text = words[torch.randint(len(words), (rows, n_text), generator=generator)]
    before = math.ceil(n_text / 2)
    image = torch.full((rows, n_visual), config.image_token_id)
    ids = torch.cat([text[:, :before], image, text[:, before:]], 1)
    types = {"mm_token_type_ids": (ids == config.image_token_id).long()} if family_class(config).m_rope else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **pixels}
