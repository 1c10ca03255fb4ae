"""The embedded model of any size of picture and of clips, before training: configuration, words and processor."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokprune.integrations.transformers import FAMILIES, Sizes, pil_image_processor, without_videos
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tokprune.cost.flops import Stack

from ...tasks import findit
from . import recipe

PATCH_SIZE = 8
MERGE = 2
TOKEN = PATCH_SIZE * MERGE  # pixels along a side of a visual token
TOWER_WIDTH = 128
# Time turns the fastest pair, then rows, then columns. With the shares of the large model (a quarter, three eighths,
# three eighths) and only 16 pairs, columns would be left with angles too small to tell left from right.
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 2, 12]}

SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "USER:",
    "ASSISTANT:",
)
_GRAMMAR = (
    "? what color shape shapes is the there a where how many are yes no top bottom left right "
    "0 1 2 3 4 5 6 7 8 9 moved appeared came last frames show"
).split()
VOCABULARY = list(dict.fromkeys([*SPECIAL, *_GRAMMAR, *findit.COLOURS, *findit.SHAPES, *findit.PLURALS.values()]))
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
UNK, BOS, EOS, PAD, START, END, IMAGE, VIDEO, USER, ASSISTANT = range(len(SPECIAL))

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> {% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|> {% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_config() -> Qwen2_5_VLConfig:
    """A tower of 4 layers, two of them with windows of 2 x 2 tokens, and the language model of tiny-llava's sizes."""
    return FAMILIES.load("qwen2_5_vl").config_of(
        Sizes(
            text=Stack(n_layers=8, width=160, mlp_width=432, n_heads=5, n_kv_heads=5, head_dim=32),  # 28 in the 7B
            tower=Stack(  # 32 layers of width 1280
                n_layers=4, width=TOWER_WIDTH, mlp_width=256, n_heads=4, n_kv_heads=4, head_dim=32, gated=True
            ),
            text_type="qwen2",
            tower_type="",
            vocabulary=-(-len(VOCABULARY) // 16) * 16,
            side=findit.SIZE,
            patch=PATCH_SIZE,
            image_id=IMAGE,
            video_id=VIDEO,
            text_options=dict(
                max_position_embeddings=2048,
                rms_norm_eps=1e-6,
                bos_token_id=BOS,
                eos_token_id=EOS,
                pad_token_id=PAD,
                tie_word_embeddings=True,
            ),
            # One step of time is one position, as one token to the right is.
            tower_options=dict(tokens_per_second=1),
        )
    )


def build_model() -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL with random weights."""
    config = build_config()
    config.tie_word_embeddings = True
    config.text_config.rope_parameters = ROPE
    return Qwen2_5_VLForConditionalGeneration(config)


@torch.no_grad()
def start_from_llava(model: Qwen2_5_VLForConditionalGeneration, path: str) -> None:
    """Take over the language model of tiny-llava, word by word, and the filters of its patches.

    Qwen2 differs from Llama by biases of queries, keys and values, which begin at zero. A filter is shared out evenly
    between the two frames that a patch shows.
    """
    old = {k: w.float() for k, w in load_file(path).items()}
    for name, weight in model.model.language_model.named_parameters():
        source = f"language_model.model.{name}"
        if name == "embed_tokens.weight":
            for word in set(WORD_IDS) & set(recipe.WORD_IDS):
                weight[WORD_IDS[word]] = old[source][recipe.WORD_IDS[word]]
            weight[IMAGE] = weight[VIDEO] = 0
        elif source in old:
            weight.copy_(old[source])
        else:
            weight.zero_()
    patches = old["vision_tower.vision_model.embeddings.patch_embedding.weight"]
    model.model.visual.patch_embed.proj.weight.copy_(patches[:, :, None].expand(-1, -1, 2, -1, -1) / 2)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """As tiny-llava's, over the words of its tasks and the tokens around pictures and clips."""
    placeholders = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return recipe.build_tokenizer(WORD_IDS, SPECIAL, placeholders)


@functools.cache
def build_image_processor():
    """Qwen2-VL's, for patches of 8 pixels: pictures of any size, in whole tokens of 16 x 16 pixels."""
    return pil_image_processor("qwen2_vl", "Qwen2VLImageProcessor")(
        patch_size=PATCH_SIZE,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * TOKEN**2, "longest_edge": 256 * TOKEN**2},
    )


def save_processor(out: Path) -> None:
    """Save a Qwen2_5_VLProcessor of tokenizer, image and video processor.

    A video processor cannot be made without torchvision, so its settings are written out: those for pictures.
    """
    tokenizer, images = build_tokenizer(), build_image_processor()
    without_videos("qwen2_5_vl")(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(out)
    shared = {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
    picture = {**shared, "image_processor_type": "Qwen2VLImageProcessor"}
    video = {**shared, "video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False}
    name = {"processor_class": "Qwen2_5_VLProcessor"}
    _write(out / "preprocessor_config.json", {**picture, **name})
    _write(out / "video_preprocessor_config.json", {**video, **name})
    _write(out / "processor_config.json", {"image_processor": picture, "video_processor": video, **name})


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


@functools.cache
def positions(model: nn.Module, grid: tuple[int, int, int], is_video: bool) -> tuple[Tensor, int]:
    """M-RoPE positions of the visual tokens of a prompt, (3, N), and of the first token after them.

    The grid is in patches: frames (pairs of them in a clip), rows, columns.
    """
    n = grid[0] * grid[1] * grid[2] // MERGE**2
    ids = torch.tensor([[BOS, USER, START, *[VIDEO if is_video else IMAGE] * n, END]])
    types = torch.where(ids == VIDEO, 2, torch.where(ids == IMAGE, 1, 0))
    name = "video_grid_thw" if is_video else "image_grid_thw"
    found, _ = model.get_rope_index(ids, mm_token_type_ids=types, **{name: torch.tensor([grid])})
    return found[:, 0, 3 : 3 + n], int(found[0, 0, -1])
