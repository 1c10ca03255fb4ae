"""The benchmark of decode steps: the cache by hand makes the same logits, and ratios are of what they say."""

import json

import pytest
import torch
from tokprune.eval.bench import decode_steps
from transformers import LlavaConfig, LlavaForConditionalGeneration


def micro():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tower = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "num_hidden_layers": 3, **sizes}
    text = {"model_type": "llama", "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 64, **sizes}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=63)
    ).eval()


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(decode_steps, "MODELS", {"micro": micro})


def test_rows_hold_every_method_and_batch(model, tmp_path):
    out = tmp_path / "rows.jsonl"
    decode_steps.main(
        models="micro", methods="vtc_cls,fastv", batch_sizes="1,2", rounds=2, steps=4, padded=True, out=out
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["method"], row["batch_size"], row["padded"]): row for row in rows}
    assert len(found) == len(rows) == 6
    assert found["vtc_cls", 1, False]["lengths"] == [68] * 4  # 64 of text and a quarter of 16
    assert found["fastv", 1, False]["lengths"] == [80, 68, 68, 68]
    for (method, _, padded), row in found.items():
        assert (row["ratio"] is None) == (row["noise"] is None) == (method == "fastv" and padded)
        assert set(row["us"]) == {"bare", "tokprune", *([] if row["ratio"] is None else ["hand"])}


@torch.no_grad()
@pytest.mark.parametrize("method", ["vtc_cls", "fastv"])
def test_a_cache_by_hand_that_differs_is_an_error(model, method):
    bare = micro()
    pruned = decode_steps.sharing(bare)
    inputs = decode_steps.prompts(bare, 2, False)
    with decode_steps.tokprune.attach(pruned, method, keep_ratio=0.25):
        start = decode_steps.prefilled(pruned, inputs)
        hand = decode_steps.by_hand(bare, start)
        decode_steps.check_same(method, {"tokprune": (pruned, start), "hand": (bare, hand)})
        hand.positions = hand.positions + 1
        with pytest.raises(RuntimeError, match="differ"):
            decode_steps.check_same(method, {"tokprune": (pruned, start), "hand": (bare, hand)})


@torch.no_grad()
def test_the_same_model_once_more_shares_its_weights_and_no_hooks(model):
    bare = micro()
    other = decode_steps.sharing(bare)
    assert all(a is b for a, b in zip(bare.parameters(), other.parameters(), strict=True))
    with decode_steps.tokprune.attach(other, "vtc_cls", keep_ratio=0.25):
        assert not bare.model.language_model._forward_pre_hooks
