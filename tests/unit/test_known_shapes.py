"""Known shapes equal those of the configurations that the models ship with, written here by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from tokprune.integrations.transformers import shape_from_config
from transformers import AutoConfig

from tokprune.core import errors
from tokprune.cost.shapes import known_shape

t = dict
QWEN2_5_VIT = t(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)


def text(width, mlp, layers, heads, kv_heads, vocabulary, **more):
    return t(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        **more,
    )


def siglip(width, mlp, layers, heads, side, patch, **more):
    return t(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        **more,
    )


def qwen3_vit(depth, width, mlp, out, indexes):
    return t(
        depth=depth,
        hidden_size=width,
        intermediate_size=mlp,
        num_heads=16,
        out_hidden_size=out,
        patch_size=16,
        deepstack_visual_indexes=indexes,
    )


CONFIGS = {
    "qwen2.5-vl-3b": t(
        model_type="qwen2_5_vl",
        text_config=text(2048, 11008, 36, 16, 2, 151936),
        vision_config=t(out_hidden_size=2048, **QWEN2_5_VIT),
    ),
    "qwen2.5-vl-7b": t(
        model_type="qwen2_5_vl",
        text_config=text(3584, 18944, 28, 28, 4, 152064),
        vision_config=t(out_hidden_size=3584, **QWEN2_5_VIT),
    ),
    "qwen3-vl-2b": t(
        model_type="qwen3_vl",
        text_config=text(2048, 6144, 28, 16, 8, 151936, head_dim=128),
        vision_config=qwen3_vit(24, 1024, 4096, 2048, [5, 11, 17]),
    ),
    "qwen3-vl-8b": t(
        model_type="qwen3_vl",
        text_config=text(4096, 12288, 36, 32, 8, 151936, head_dim=128),
        vision_config=qwen3_vit(27, 1152, 4304, 4096, [8, 16, 24]),
    ),
    "smolvlm2-500m": t(
        model_type="smolvlm",
        scale_factor=4,
        text_config=text(960, 2560, 32, 15, 5, 49280, model_type="llama"),
        vision_config=siglip(768, 3072, 12, 12, 512, 16),
    ),
    "smolvlm2-2.2b": t(
        model_type="smolvlm",
        scale_factor=3,
        text_config=text(2048, 8192, 24, 32, 32, 49280, model_type="llama"),
        vision_config=siglip(1152, 4304, 27, 16, 384, 14),
    ),
    "mistral3-24b": t(
        model_type="mistral3",
        text_config=text(5120, 32768, 40, 32, 8, 131072, model_type="mistral", head_dim=128),
        vision_config=siglip(1024, 4096, 24, 16, 1540, 14, model_type="pixtral"),
    ),
    "gemma3-4b": t(
        model_type="gemma3",
        text_config=text(2560, 10240, 34, 8, 4, 262208, head_dim=256),
        vision_config=siglip(1152, 4304, 27, 16, 896, 14, model_type="siglip_vision_model", vision_use_head=False),
    ),
    "glm4v-9b": t(
        model_type="glm4v",
        text_config=text(4096, 13696, 40, 32, 2, 151552),
        vision_config=t(depth=24, hidden_size=1536, intermediate_size=13696, num_heads=12, out_hidden_size=4096),
    ),
}


pytestmark = pytest.mark.skipif(tiny.RELEASE.release < (5, 18), reason="attach refuses these families there")


@pytest.mark.parametrize("name", CONFIGS)
def test_known_shapes_are_those_of_their_configurations(name):
    given = dict(CONFIGS[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    assert replace(shape_from_config(config), name=name) == known_shape(name)


def test_a_page_and_a_video_in_tokens():
    shape = known_shape("qwen2.5-vl-7b")
    assert shape.tokens_of(1500, 2000) == (54 * 71, 1)  # tokens of 28 x 28 pixels
    assert shape.tokens_of(448, 448, 64) == (32 * 16 * 16, 32)  # two frames share their tokens
    one, whole = shape.picture(256, 1), shape.picture(32 * 256, 32)
    assert whole.vision.flops == 32 * one.vision.flops
    assert whole.projector.flops == 32 * one.projector.flops
    with pytest.raises(errors.UnsupportedModelError, match="--crops"):
        known_shape("llava-1.5-7b").tokens_of(336, 336)
