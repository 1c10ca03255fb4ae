"""Genuine processors of the any-resolution families at the tiny models' sizes; image-only ones need no torchvision."""

from __future__ import annotations

import re

import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AddedToken,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

WORDS = ["<pad>", "<s>", "</s>", "what", "is", "it", "?", "<img>", "</img>", "\n"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level; every id below the tiny models' vocabulary."""
    ids = {f"word{i}": i for i in range(tiny.VOCAB)}
    names = {**dict(enumerate(WORDS)), tiny.IMAGE: "<image>", tiny.VIDEO: "<video>"}
    ids = {names.get(i, word): i for word, i in ids.items()}
    words = Tokenizer(models.WordLevel(ids, unk_token="what"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<pad>", "<s>", "</s>", "<image>", "<video>", "<img>", "</img>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<image>",
        },
    )


class ImageOnlyOnevision(LlavaOnevisionProcessor):
    """Without the video part, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, num_image_tokens, chat_template=None):
        self.num_image_tokens, self.vision_feature_select_strategy = num_image_tokens, "full"
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id, self.video_token_id = tiny.IMAGE, tiny.VIDEO
        self.vision_aspect_ratio = "anyres_max_9"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyInternVL(InternVLProcessor):
    """Without the video part, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, image_seq_length, chat_template=None):
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = "<img>", "</img>"
        self.start_image_token_id, self.end_image_token_id = WORDS.index("<img>"), WORDS.index("</img>")
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id, self.image_ids = tiny.IMAGE, [tiny.IMAGE]
        self.multimodal_pattern = re.compile("(?P<image><image>)|(?P<video><video>)")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor(kind: str):
    """The processor of "llava_next", "llava_onevision" or "internvl"."""
    images = tiny.family(kind).image_processor(tiny.config(kind))
    if kind == "llava_next":
        options = dict(patch_size=tiny.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
        return LlavaNextProcessor(image_processor=images, tokenizer=tokenizer(), **options)
    if kind == "llava_onevision":
        return ImageOnlyOnevision(images, tokenizer(), num_image_tokens=tiny.N_VISUAL)
    images.max_patches = 6
    return ImageOnlyInternVL(images, tokenizer(), image_seq_length=tiny.N_TILE)


def cropped_processor(kind: str) -> Idefics3Processor:
    """Idefics 3's processor with the image processor of a family; every tag and newline is a token."""
    tags = [f"<row_{r + 1}_col_{c + 1}>" for r in range(4) for c in range(4)]
    special = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "\n", *tags]
    ids = {f"word{i}": i for i in range(tiny.VOCAB)}
    names = {**dict(enumerate(WORDS[:-1])), tiny.IMAGE: "<image>", **dict(enumerate(special, 20))}
    ids = {names.get(i, word): i for word, i in ids.items()}
    words = Tokenizer(models.WordLevel(ids, unk_token="what"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<pad>", "<s>", "</s>", "<image>", *special)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    images = tiny.family(kind).image_processor(tiny.config(kind))
    return Idefics3Processor(images, made, image_seq_len=tiny.N_VISUAL // tiny.MERGED)


def cropped_inputs(kind: str, rows: list[list[Image.Image]]) -> dict:
    """What the genuine processor gives for rows of pictures."""
    text = ["<s> " + "<image> it " * len(row) + "what is it ?" for row in rows]
    found = cropped_processor(kind)(images=rows if any(rows) else None, text=text, padding=True, return_tensors="pt")
    known = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
    return {name: value for name, value in found.items() if name in known}


# Width and height: square, wide, tall, padded both ways, tiny, and one that OneVision makes smaller.
PICTURES = {
    "square": (48, 48),
    "wide": (96, 24),
    "tall": (20, 60),
    "padded": (48, 30),
    "narrow": (30, 48),
    "tiny": (3, 2),
    "large": (96, 90),
}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth colours."""
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    values = torch.nn.functional.interpolate(noise[None], size[::-1], mode="bilinear")[0]
    return Image.fromarray((values * 255).byte().permute(1, 2, 0).numpy())


def prompt(kind: str, n_images: int) -> str:
    return "<s> " + "<image> it " * n_images + "what is it ?"


def inputs_of(kind: str, rows: list[list[Image.Image]]) -> dict:
    """What the genuine processor gives; its placeholders stand apart by words."""
    made = processor(kind)
    text = [prompt(kind, len(row)) for row in rows]
    images = [row for row in rows if row]
    out = made(images=images or None, text=text, padding=True, return_tensors="pt")
    known = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "batch_num_images")
    return {k: v for k, v in out.items() if k in known}


def video_inputs(n_frames: int = 3, dtype=torch.float32) -> dict:
    n = n_frames * 9 + 1
    ids = torch.tensor([[1, 5, 6, *[tiny.VIDEO] * n, 7, 8, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": tiny.pictures(n_frames)[None].to(dtype),
    }
