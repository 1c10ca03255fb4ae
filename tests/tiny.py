"""Tiny random models, built from shrunk configs, and batches for them as a processor would make them.

Kinds of models: "clip" and "siglip" are LLaVA 1.5 with either tower; the others are named by their model_type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from tokprune.integrations.transformers import FAMILIES
from tokprune.integrations.transformers.compat import is_at_least
from tokprune.integrations.transformers.families import VARIANTS
from tokprune.integrations.transformers.families.sizes import Sizes
from transformers import AutoModelForImageTextToText
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokprune.cost.flops import Stack

RELEASE = Version(transformers.__version__)
CACHE = "cache" if Version("5.24") <= RELEASE else "past_key_values"
IMAGE, VIDEO, PAD, EOS, VOCAB = 90, 91, 0, 2, 99
START, END = 88, 89  # around a picture or a frame of Qwen
SUPPRESSED = [IMAGE, VIDEO, EOS]  # a random model must not emit placeholders, and runs are compared at full length
SIDE, PATCH = 24, 4
N_VISUAL = (SIDE // PATCH) ** 2  # 36
TOWERS = ("clip", "siglip")
KINDS = (*TOWERS, "llava_next", "llava_onevision", "internvl")
TILED = ("llava_next", "llava_onevision")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
GLM = ("glm4v", "glm46v")  # pictures or videos in a call: a frame is placeholders of pictures
M_ROPE = (*QWEN, *GLM, "paddleocr_vl", "qwen3_5")
FIXED = ("gemma3", "paligemma", "cohere2_vision", "aya_vision")  # one size of picture, before the language model alone
GEMMA4 = ("gemma4", "gemma4-e2b")  # pictures that see themselves; per-layer inputs and shared keys
CROPPED = ("idefics3", "smolvlm")  # a picture is crops and a thumbnail, each a run of placeholders
PIXTRAL = ("mistral3", "llava_pixtral")  # pictures of any size, a token of text behind every row of placeholders
MORE = CROPPED + PIXTRAL
KIN = ("vipllava", "video_llava", "deepseek_vl", "llava_next_video", "ovis2", "got_ocr2")  # of LLaVA
ONE_SIZE = (*TOWERS, *FIXED, *(kind for kind in KIN if kind != "llava_next_video"))
PINPOINTS = [[24, 48], [48, 24], [48, 48], [96, 96]]
TILE, N_TILE = 32, 16  # InternVL: pixels a side, tokens after the pixel shuffle
# Height and width in pixels: wide, tall and padded, square and padded, wide and padded, tiny.
SIZES = ((24, 48), (40, 20), (30, 30), (20, 48), (5, 7))
# Idefics 3: rows and columns of crops before a thumbnail, and the tokens around a run of placeholders.
CROPS = ((0, 0), (2, 2), (1, 2), (2, 1))
FAKE, GLOBAL, NEWLINE, TAGS = 88, 92, 93, ((94, 95), (96, 97))
# Pixtral: height and width in pixels, and the tokens behind a row of placeholders and behind the last one.
PIXTRAL_SIZES = ((16, 32), (24, 40), (24, 16), (48, 8), (20, 28))
BREAK, END_OF_PICTURE = 92, 93
TILES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3))  # InternVL: rows and columns of crops; a thumbnail joins two or more


# The real ones are 1024 wide and 24 deep, and 4096 wide and 32 deep.
SIZES_OF_A_MODEL = Sizes(
    text=Stack(n_layers=5, width=64, mlp_width=96, n_heads=4, n_kv_heads=2, head_dim=16),
    tower=Stack(n_layers=4, width=32, mlp_width=48, n_heads=4, n_kv_heads=4, head_dim=8, gated=False),
    text_type="llama",
    tower_type="clip_vision_model",
    vocabulary=VOCAB,
    side=SIDE,
    patch=PATCH,
    image_id=IMAGE,
    video_id=VIDEO,
    grids=tuple(map(tuple, PINPOINTS)),
    text_options=dict(
        max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS, tie_word_embeddings=False
    ),
    tower_options=dict(projection_dim=32),
)
SIGLIP = dict(tower_type="siglip_vision_model", tower_options=dict(vision_use_head=False))
OTHERWISE = {
    "siglip": SIGLIP,
    "llava_onevision": {**SIGLIP, "text_type": "qwen2"},
    **{kind: dict(grids=(), tower_options={}) for kind in M_ROPE},
    **{kind: {**SIGLIP, "text_type": "gemma"} for kind in FIXED},
    **{kind: dict(tower_type=f"{kind}_vision", tower_options={}, grids=()) for kind in CROPPED},
    **{kind: dict(tower_type="pixtral", tower_options={}, text_type="mistral", grids=(), side=48) for kind in PIXTRAL},
    "deepseek_vl": SIGLIP,
    "gemma4": dict(tower_options={}),
    # 12 x 12 patches in windows of 5 x 5, so that those at the edges are filled up.
    "got_ocr2": dict(patch=2, tower_options=dict(window_size=5, output_channels=8), text_type="qwen2"),
    "ovis2": dict(tower_options=dict(vocab_size=1024), text_type="qwen2"),
    "internvl": dict(
        tower_type="internvl_vision", tower_options=dict(use_qk_norm=True), text_type="qwen2", side=TILE, grids=()
    ),
}

TEXT_OPTIONS = {
    "gemma4-e2b": dict(
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=2,
        use_bidirectional_attention=None,
    )
}


def family(kind: str):
    """The class of the family of a kind of model."""
    if kind == "llava_pixtral":
        return VARIANTS.load("llava/pixtral")
    return FAMILIES.load("llava" if kind in TOWERS else kind.split("-")[0])


def served(cases: Iterable) -> list:
    """Kinds, or tuples that begin with one; what `attach` refuses on this release is skipped and says why."""
    return [_served(*((case,) if isinstance(case, str) else case)) for case in cases]


def _served(kind: str, *others):
    oldest = family(kind).oldest
    refused = pytest.mark.skip(reason=f"attach refuses {kind} before transformers {oldest}")
    return pytest.param(kind, *others, marks=() if is_at_least(oldest) else refused)


def config(kind: str = "clip"):
    """A model in small, as its family builds it."""
    sizes = replace(SIZES_OF_A_MODEL, **OTHERWISE.get(kind.split("-")[0], {}))
    return family(kind).config_of(replace(sizes, text_options={**sizes.text_options, **TEXT_OPTIONS.get(kind, {})}))


def fresh_model(kind="clip", attn="sdpa", dtype=torch.float32):
    """A model of one's own, to break or to change."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config(kind)).eval()
    sharpen(model)
    model.to(dtype)
    model.set_attn_implementation(attn)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@functools.cache
def model(kind="clip", attn="sdpa", dtype=torch.float32):
    """A shared model; leave it as you find it."""
    return fresh_model(kind, attn, dtype)


@torch.no_grad()
def sharpen(module: torch.nn.Module) -> None:
    """Weights far from uniform attention: with the usual initialisation nothing that is dropped matters."""
    generator = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        alone = any(part in name for part in ("class_embedding", "cls_token", "image_newline"))
        if p.ndim < 2 and not alone:
            continue
        fan_in = 1 if alone or "embed_tokens" in name else p[0].numel()
        p.copy_(torch.randn(p.shape, generator=generator) * (1.2 / math.sqrt(fan_in) if fan_in > 1 else 1.0))


def pictures(n: int, seed: int = 3) -> torch.Tensor:
    """(n, 3, 24, 24)."""
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def tiles(image: int) -> torch.Tensor:
    """(tiles, 3, 32, 32) of a smooth picture, the thumbnail last where there are several."""
    rows, columns = TILES[image % len(TILES)]
    generator = torch.Generator().manual_seed(30 + image)
    smooth = F.interpolate(torch.randn(1, 3, 5, 5, generator=generator), (rows * TILE, columns * TILE), mode="bilinear")
    crops = smooth[0].unflatten(1, (rows, TILE)).unflatten(3, (columns, TILE)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    thumbnail = F.interpolate(smooth, (TILE, TILE), mode="bilinear", antialias=True)
    return crops if len(crops) == 1 else torch.cat([crops, thumbnail])


# Qwen: frames (of two pictures), rows and columns of patches; a token shows 2 x 2 of them.
GRIDS = ((1, 4, 6), (1, 6, 10), (1, 4, 4), (1, 2, 8))
VIDEO_GRIDS = ((2, 4, 8), (3, 4, 4))
MERGED = 4  # patches a token


def patches(grid: tuple[int, int, int], seed: int) -> torch.Tensor:
    """(patches, values) of a picture or video as Qwen's processor gives them."""
    return torch.randn(math.prod(grid), 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(seed))


def video_inputs(videos: list[int], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """What Qwen's processor gives for videos."""
    grids = [VIDEO_GRIDS[v % len(VIDEO_GRIDS)] for v in videos]
    values = torch.cat([patches(grid, 70 + v) for grid, v in zip(grids, videos, strict=True)])
    return {"pixel_values_videos": values.to(dtype), "video_grid_thw": torch.tensor(grids)}


def padded_patches(images: list[int], dtype=torch.float32, n: int = 72) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, n, values), and (images, n, 2) columns and rows or -1 for padding, as Gemma 4's processor gives."""
    values, places = [], torch.full((len(images), n, 2), -1)
    for place, image in zip(places, images, strict=True):
        _, h, w = GRIDS[image % len(GRIDS)]
        place[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)
        own = torch.rand(n, 3 * PATCH**2, generator=torch.Generator().manual_seed(50 + image))
        values.append(own.masked_fill((place < 0).any(1, keepdim=True), 0))
    return torch.stack(values).to(dtype), places


def pixels(kind: str, rows: list[list[int]], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """What a processor gives for the pictures of every row of a batch."""
    images = [image for row in rows for image in row]
    if not images:
        return {}
    if kind in ONE_SIZE:
        return {"pixel_values": pictures(max(images) + 1)[images].to(dtype)}
    if kind == "internvl":
        return {"pixel_values": torch.cat([tiles(i) for i in images]).to(dtype)}
    if kind in GEMMA4:
        return dict(zip(("pixel_values", "image_position_ids"), padded_patches(images, dtype), strict=True))
    if kind in M_ROPE:
        grids = [GRIDS[i % len(GRIDS)] for i in images]
        values = torch.cat([patches(grid, 50 + i) for grid, i in zip(grids, images, strict=True)])
        if kind == "paddleocr_vl":  # of one frame, in raster order
            values = values[:, : 3 * PATCH**2].unflatten(1, (3, PATCH, PATCH))
        return {"pixel_values": values.to(dtype), "image_grid_thw": torch.tensor(grids)}
    if kind in CROPPED:
        return cropped(rows, dtype)
    if kind in PIXTRAL:
        return sized(images, dtype)
    if kind in (*TILED, "llava_next_video"):
        return any_resolution(kind, rows, dtype)
    raise ValueError(f"no pictures for kind {kind!r}: add them here, in pixels() of tests/tiny.py")


def any_resolution(kind: str, rows: list[list[int]], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """What the processors of LLaVA-NeXT and LLaVA-OneVision give: crops, and the sizes of the pictures."""
    images = [image for row in rows for image in row]
    sizes = [SIZES[i % len(SIZES)] for i in images]
    several = [len(row) > 1 and kind == "llava_onevision" for row in rows for _ in row]
    counts = [1 if s else image_size_to_num_patches(z, PINPOINTS, SIDE) for z, s in zip(sizes, several, strict=True)]
    crops = [pictures(n, seed=50 + i) for n, i in zip(counts, images, strict=True)]
    padded = [F.pad(c, (0, 0, 0, 0, 0, 0, 0, max(counts) - len(c))) for c in crops]
    found = {"pixel_values": torch.stack(padded).to(dtype), "image_sizes": torch.tensor(sizes)}
    if kind == "llava_onevision":
        found["batch_num_images"] = torch.tensor([len(row) for row in rows if row])
    return found


def cropped(rows: list[list[int]], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """What Idefics 3's processor gives: the crops of a row of the batch, and empty ones after them."""
    shown = [
        torch.cat([pictures(1 + math.prod(CROPS[i % len(CROPS)]), seed=60 + i) for i in row] or [pictures(0)])
        for row in rows
    ]
    most = max(map(len, shown))
    padded = [F.pad(own, (0, 0, 0, 0, 0, 0, 0, most - len(own))) for own in shown]
    there = [torch.arange(most) < len(own) for own in shown]
    mask = torch.stack(there)[..., None, None].expand(-1, -1, SIDE, SIDE)
    return {"pixel_values": torch.stack(padded).to(dtype), "pixel_attention_mask": mask.long()}


def sized(images: list[int], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """What Pixtral's processor gives: pictures padded to the largest, and their sizes."""
    sizes = [PIXTRAL_SIZES[i % len(PIXTRAL_SIZES)] for i in images]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    own = [
        torch.randn(3, *size, generator=torch.Generator().manual_seed(80 + i))
        for i, size in zip(images, sizes, strict=True)
    ]
    padded_ = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in own]
    return {"pixel_values": torch.stack(padded_).to(dtype), "image_sizes": torch.tensor(sizes)}


def pixtral_grid(kind: str, image: int) -> tuple[int, int]:
    """Rows and columns of tokens."""
    pixels_a_token = PATCH * (2 if kind == "mistral3" else 1)
    height, width = PIXTRAL_SIZES[image % len(PIXTRAL_SIZES)]
    return height // pixels_a_token, width // pixels_a_token


def shown(kind: str, image: int, alone: bool = True) -> list[int]:
    """An image in a prompt, as the processor writes it."""
    if kind in CROPPED:
        return shown_crops(image)
    if kind in PIXTRAL:
        height, width = pixtral_grid(kind, image)
        return ([*[IMAGE] * width, BREAK] * height)[:-1] + [END_OF_PICTURE]
    rows = [IMAGE] * n_rows(kind, image, alone)
    return [START, *rows, END] if kind in (*M_ROPE, *GEMMA4) else rows


def shown_crops(image: int) -> list[int]:
    """The crops of an image, row by row, and its thumbnail."""
    n_rows_, n_columns = CROPS[image % len(CROPS)]
    ids, crop = [], [IMAGE] * (N_VISUAL // MERGED)
    for r in range(n_rows_):
        for c in range(n_columns):
            ids += [FAKE, TAGS[r][c], *crop]
        ids.append(NEWLINE)
    return [*ids, *[NEWLINE][: len(ids)], FAKE, GLOBAL, *crop, FAKE]


@functools.cache
def n_rows(kind: str, image: int, alone: bool = True) -> int:
    """Placeholders of an image, as the bare model counts them; alone in its row or not."""
    if kind in TOWERS:
        return N_VISUAL
    if kind in FIXED:
        return N_VISUAL if kind == "paligemma" else N_VISUAL // 4
    if kind in (*M_ROPE, *GEMMA4):
        return math.prod(GRIDS[image % len(GRIDS)]) // MERGED
    if kind in CROPPED:
        return shown_crops(image).count(IMAGE)
    if kind in PIXTRAL:
        return math.prod(pixtral_grid(kind, image))
    inputs = pixels(kind, [[image] if alone else [image, image]])
    with torch.no_grad():
        out = model(kind).model.get_image_features(**inputs)
    features = getattr(out, "pooler_output", out)
    return sum(map(len, features)) // (1 if alone else 2)


MIXED = ((0,), (1, 2), ())  # one image; two images; text alone


def batch(layout=MIXED, dtype=torch.float32, seed=7, lead=True, kind="clip") -> dict[str, torch.Tensor]:
    """A left-padded batch; row r shows the pictures layout[r] and has 3 + r or so tokens of text.

    Without `lead` no text comes before the first picture, not even a beginning-of-sequence token.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(3, 80, (n,), generator=generator).tolist()

    rows = []
    for r, images in enumerate(layout):
        ids = [1, *words(2 + r)] if lead else []
        for image in images:
            ids += shown(kind, image, len(images) == 1) + words(2)
        rows.append(ids + words(4 + 2 * r))
    return typed(kind, padded(rows)) | pixels(kind, [list(images) for images in layout], dtype)


def typed(kind: str, inputs: dict[str, torch.Tensor], pictures: int = 1) -> dict[str, torch.Tensor]:
    """With what Qwen's processor says of every column: 1 for pictures, 2 for videos; GLM's placeholders are one id."""
    ids = inputs["input_ids"]
    if kind in ("gemma3", "paligemma"):
        return {**inputs, "token_type_ids": (ids == IMAGE).long() if kind == "gemma3" else torch.zeros_like(ids)}
    if kind not in (*M_ROPE, *GEMMA4) or RELEASE.major < 5:
        return inputs
    return {**inputs, "mm_token_type_ids": pictures * (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows]),
    }


def collate(rows: list[list[int]], order: list[int], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask, and the pictures in the order of the prompt."""
    return padded(rows) | pixels("clip", [order], dtype)


def row(inputs: dict[str, torch.Tensor], r: int, layout=MIXED, kind="clip") -> dict[str, torch.Tensor]:
    """Row r alone, without padding."""
    mask = inputs["attention_mask"][r].bool()
    dtype = inputs["pixel_values"].dtype if "pixel_values" in inputs else torch.float32
    single = {"input_ids": inputs["input_ids"][r][mask][None], "attention_mask": mask[mask][None].long()}
    return typed(kind, single) | pixels(kind, [list(layout[r])], dtype)


# generate() of transformers 4 passes pictures with an empty cache alone, and whole: the bare model fails, too.
later_pictures = pytest.mark.skipif(RELEASE.major < 5, reason="the bare model of transformers 4 cannot do this")

# generate() of earlier releases passes no pictures with the chunks of a prompt: the bare model answers without them.
pictures_in_chunks = pytest.mark.skipif(
    RELEASE.release < (5, 23), reason="the bare model of earlier releases does not see pictures with prefill_chunk_size"
)


def cached(cache) -> dict:
    """A cache as this release's keyword."""
    return {CACHE: cache}


def generate(model, inputs, **options) -> torch.Tensor:
    """New tokens of a generation, greedy unless told otherwise."""
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    out = model.generate(**inputs, suppress_tokens=SUPPRESSED, **options)
    return out[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else out
