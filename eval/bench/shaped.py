"""Builds models of known shapes with random weights, and prompts with pictures cut as the real models cut them.

Times do not depend on the values of weights, so nothing is downloaded. Methods that decide by content see noise here.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
import transformers
from PIL import Image
from tokprune.integrations.transformers import features_of, shape_from_config
from transformers import AutoModelForImageTextToText

from tokprune.core.errors import RunError
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import KNOWN, known_shape

PATCH = 14
GIB = 2**30
SCALED = "type fewer decoder layers (--layers 4), --dtype bfloat16, or a smaller batch"


# ------------------------------------------------------------------------------------------ configurations


def _clip(shape: Shape, side: int) -> transformers.PretrainedConfig:
    return transformers.CLIPVisionConfig(**_tower(shape), image_size=side, patch_size=PATCH, projection_dim=768)


def _siglip(shape: Shape, side: int) -> transformers.PretrainedConfig:
    head = shape.vision.pooling_head
    return transformers.SiglipVisionConfig(**_tower(shape), image_size=side, patch_size=PATCH, vision_use_head=head)


def _internvit(shape: Shape, side: int) -> transformers.PretrainedConfig:
    sides = dict(image_size=[side, side], patch_size=[PATCH, PATCH])
    return transformers.InternVLVisionConfig(**_tower(shape), **sides, attention_bias=True)


def _tower(shape: Shape) -> dict[str, int]:
    stack = shape.vision.stack
    return dict(
        hidden_size=stack.width,
        intermediate_size=stack.mlp_width,
        num_hidden_layers=stack.n_layers,
        num_attention_heads=stack.n_heads,
    )


def _language_model(shape: Shape, cls: Any) -> transformers.PretrainedConfig:
    stack = shape.text
    return cls(
        hidden_size=stack.width,
        intermediate_size=stack.mlp_width,
        num_hidden_layers=stack.n_layers,
        num_attention_heads=stack.n_heads,
        num_key_value_heads=stack.n_kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32768,
        **({"sliding_window": None} if cls is transformers.MistralConfig else {}),
    )


def _grids(side: int, most: int) -> list[list[int]]:
    return [[rows * side, columns * side] for rows in range(1, most + 1) for columns in range(1, most + 1)]


@dataclass(frozen=True)
class Family:
    """How to build a model of a family.

    Args:
        config: its configuration class.
        vision: the tower's configuration, from a shape and pixels a side.
        text: the language model's configuration class.
        side: pixels a side that the tower takes.
        options: of the configuration, from pixels a side and the id of the placeholder.
    """

    config: Any
    vision: Callable[[Shape, int], transformers.PretrainedConfig]
    text: Any
    side: int
    options: Callable[[int, int], dict[str, Any]]


def _llava(side: int, image: int) -> dict[str, Any]:
    return dict(
        image_token_index=image,
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next(side: int, image: int) -> dict[str, Any]:
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    return {**_llava(side, image), "image_grid_pinpoints": grids}


def _onevision(side: int, image: int) -> dict[str, Any]:
    return dict(
        image_token_index=image,
        video_token_index=image - 1,
        image_grid_pinpoints=_grids(side, 6),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _internvl(side: int, image: int) -> dict[str, Any]:
    n_patches = (side // PATCH) ** 2
    return dict(
        image_token_id=image,
        image_seq_length=n_patches // 4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def family_of(name: str) -> Family | None:
    """The family of a known shape, by its name; None if it cannot be built."""
    llama, mistral, qwen = transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen2Config
    if name.startswith("llava-next"):
        text = mistral if "mistral" in name else llama
        return Family(transformers.LlavaNextConfig, _clip, text, 336, _llava_next)
    if name.startswith("llava-1.5"):
        return Family(transformers.LlavaConfig, _clip, llama, 336, _llava)
    if name.startswith("onevision"):
        return Family(transformers.LlavaOnevisionConfig, _siglip, qwen, 384, _onevision)
    if name.startswith("internvl3"):
        return Family(transformers.InternVLConfig, _internvit, qwen, 448, _internvl)
    return None


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
    shape, family = known_shape(name), family_of(name)
    if family is None:
        built = ", ".join(n for n in KNOWN if family_of(n))
        raise RunError(f"cannot build a model of shape {name!r}; type one of: {built}")
    for option, asked, real in (
        ("--layers", layers, shape.text.n_layers),
        ("--vision-layers", vision_layers, shape.vision.stack.n_layers),
    ):
        least = 2 if option == "--layers" else 3
        if asked is not None and not least <= asked <= real:
            raise RunError(f"{option} {asked} is outside {least} to {real}, the layers of {name}")
    if side is not None and (side % PATCH or side < 4 * PATCH):
        raise RunError(f"--resolution {side} has to be a multiple of {PATCH}, the pixels of a patch; type 336")
    text = replace(shape.text, n_layers=layers or shape.text.n_layers)
    tower = replace(shape.vision.stack, n_layers=vision_layers or shape.vision.stack.n_layers)
    shape = replace(shape, text=text, vision=replace(shape.vision, stack=tower))
    side = side or family.side
    return family.config(
        vision_config=family.vision(shape, side),
        text_config=_language_model(shape, family.text),
        **family.options(side, shape.vocabulary - 1),
    )


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
        RunError: names the memory needed, the free memory, and what to type.
    """
    weights = 0 if loaded else sum(p.numel() * p.element_size() for p in model.parameters())
    shape, size = shape_from_config(model.config), model.dtype.itemsize
    cache = shape.read(columns, rows=rows, bytes_per_value=size).kv_bytes
    layer = rows * columns * (3 * shape.text.mlp_width + 4 * shape.text.width) * size  # hidden states of one layer
    maps = 2 * rows * shape.text.n_heads * columns**2 * size if model.config._attn_implementation == "eager" else 0
    needed, free = weights + cache + layer + maps, free_bytes(device)
    if needed > free:
        raise RunError(
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
    side = config.vision_config.image_size
    return side if isinstance(side, int) else side[0]


def image_processor_of(config: transformers.PretrainedConfig) -> Any:
    """The family's own image processor, for the crops of this configuration."""
    side = crop_side(config)
    square = {"height": side, "width": side}
    if config.model_type == "llava":
        return _pil("clip", "CLIPImageProcessor")(size={"shortest_edge": side}, crop_size=square)
    grids = {"image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None)}
    if config.model_type == "llava_next":
        options = dict(size={"shortest_edge": side}, crop_size=square)
        return _pil("llava_next", "LlavaNextImageProcessor")(**options, **grids)
    if config.model_type == "llava_onevision":
        return _pil("llava_onevision", "LlavaOnevisionImageProcessor")(size=square, **grids)
    return _pil("got_ocr2", "GotOcr2ImageProcessor")(size=square, crop_to_patches=True, min_patches=1, max_patches=12)


def _pil(module: str, name: str) -> Any:
    """An image processor that needs no torchvision; transformers 4 has it under the plain name."""
    try:
        found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
        return getattr(found, f"{name}Pil")
    except ImportError:
        return getattr(transformers, name)


def pictures(side: int, n: int) -> list[Image.Image]:
    """Square pictures of smooth noise, all different: equal rows of a batch would be treated as beam copies."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(n, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")
    return [Image.fromarray((p * 255).byte().permute(1, 2, 0).numpy()) for p in smooth]


def encoded(image_processor: Any, side: int, n: int) -> dict[str, torch.Tensor]:
    """The processor's output for n square pictures."""
    found = image_processor(pictures(side, n), return_tensors="pt")
    return {name: found[name] for name in ("pixel_values", "image_sizes", "batch_num_images") if name in found}


@torch.no_grad()
def placeholders(model: Any, pixels: dict[str, torch.Tensor]) -> int:
    """Rows that one picture gives the language model, newlines included, as the model packs them.

    Args:
        model: a skeleton is enough.
        pixels: of one picture.
    """
    values = pixels["pixel_values"].to(model.device, model.dtype)
    out = model.model.get_image_features(**{**pixels, "pixel_values": values})
    return sum(map(len, features_of(out)))


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
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
