"""The embedded models before training: their configurations, their words and their genuine processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ...tasks import findit

PATCH_SIZE = 8
GRID = findit.SIZE // PATCH_SIZE
N_VISUAL = GRID * GRID
PINPOINTS = [[findit.SIZE, 2 * findit.SIZE], [2 * findit.SIZE, findit.SIZE], [2 * findit.SIZE, 2 * findit.SIZE]]
EASYVQA_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
EASYVQA_SHAPES = ("circle", "rectangle", "triangle")

SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>", "USER:", "ASSISTANT:")
_GRAMMAR = (
    "? what color shape shapes is the there a where how many are yes no top bottom left right "
    "does image contain not present in of 0 1 2 3 4 5 6 7 8 9"
).split()
VOCABULARY = list(
    dict.fromkeys(
        [*SPECIAL, *_GRAMMAR, *findit.COLOURS, *findit.SHAPES, *findit.PLURALS.values(), *EASYVQA_COLOURS]
        + list(EASYVQA_SHAPES)
    )
)
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
BOS, EOS, IMAGE, PAD, USER, ASSISTANT = (
    WORD_IDS[w] for w in ("<s>", "</s>", "<image>", "<pad>", "USER:", "ASSISTANT:")
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,  # 1024 in CLIP ViT-L/14-336
        intermediate_size=512,
        num_hidden_layers=5,  # 24
        num_attention_heads=4,
        image_size=findit.SIZE,  # 336
        patch_size=PATCH_SIZE,  # 14
        projection_dim=128,
    )


def _text_config(max_positions: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-len(VOCABULARY) // 16) * 16,
        hidden_size=160,  # 4096 in Vicuna-7B
        intermediate_size=432,
        num_hidden_layers=8,  # 32
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def _config(cls: type, max_positions: int, **more: Any):
    return cls(
        vision_config=_vision_config(),
        text_config=_text_config(max_positions),
        image_token_id=IMAGE,
        image_seq_length=N_VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        **more,
    )


def build_model() -> LlavaForConditionalGeneration:
    """A tiny LLaVA with random weights: CLIP tower with [CLS], MLP projector, narrow Llama of 8 layers."""
    return LlavaForConditionalGeneration(_config(LlavaConfig, 1024))


def build_next_model() -> LlavaNextForConditionalGeneration:
    """The same parts as a tiny LLaVA-NeXT: a thumbnail and up to 2 x 2 crops, 744 placeholders at 192 x 192."""
    return LlavaNextForConditionalGeneration(_config(LlavaNextConfig, 2048, image_grid_pinpoints=PINPOINTS))


def build_tokenizer(
    word_ids: Mapping[str, int] = WORD_IDS,
    special: Sequence[str] = SPECIAL,
    placeholders: Mapping[str, str] = MappingProxyType({"image_token": "<image>"}),
) -> PreTrainedTokenizerFast:
    """Word-level, over the vocabulary of the tasks."""
    words = Tokenizer(models.WordLevel(dict(word_ids), unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ?")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=dict(placeholders),
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
    )


_PROCESSOR: dict[str, Any] = dict(
    patch_size=PATCH_SIZE,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=CHAT_TEMPLATE,
)


def build_processor() -> LlavaProcessor:
    """The tokenizer and CLIP's image processor at 96 pixels."""
    return LlavaProcessor(image_processor=build_image_processor(), tokenizer=build_tokenizer(), **_PROCESSOR)


def build_next_processor() -> LlavaNextProcessor:
    """The tokenizer and LLaVA-NeXT's image processor: a thumbnail of 96 pixels and crops of the same size."""
    return LlavaNextProcessor(image_processor=build_next_image_processor(), tokenizer=build_tokenizer(), **_PROCESSOR)


def build_image_processor():
    """CLIP's image processor at 96 pixels, in its PIL form where the release has one by that name."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": findit.SIZE}, crop_size={"height": findit.SIZE, "width": findit.SIZE})


def build_next_image_processor():
    """LLaVA-NeXT's image processor, in its PIL form where the release has one by that name."""
    try:
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil as Processor,
        )
    except ImportError:  # transformers 4
        from transformers import LlavaNextImageProcessor as Processor
    side = findit.SIZE
    return Processor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=PINPOINTS
    )
