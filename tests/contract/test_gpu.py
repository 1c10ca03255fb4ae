"""Laws that need a GPU. TOKPRUNE_GPU_LAWS=cpu runs those that can on a CPU, to try the tests themselves."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings

import pytest
import tiny
import torch

import tokprune

DEVICE = os.environ.get("TOKPRUNE_GPU_LAWS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
cuda_alone = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
SPECS = ("uniform", "vtc_cls", "divprune", "cdpruner", "fopru", "fastv", "pyramiddrop")


def there(inputs: dict, dtype: torch.dtype) -> dict:
    """On the device, pictures in the model's dtype."""
    moved = {name: value.to(DEVICE) for name, value in inputs.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()}


def model_there(dtype: torch.dtype):
    return tiny.fresh_model().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_keep_all_is_the_bare_model(dtype):
    model, inputs = model_there(dtype), there(tiny.batch(), dtype)
    want, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    with tokprune.attach(model, "vtc_cls", keep_ratio=1.0):
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(tiny.generate(model, inputs), tokens)


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_batch_on_the_device_is_that_of_the_cpu(spec):
    here, inputs = tiny.fresh_model(), tiny.batch()
    with tokprune.attach(here, spec, keep_ratio=0.5) as attachment:
        want, kept = here(**inputs).logits, attachment.kept
    model = model_there(torch.float32)
    with tokprune.attach(model, spec, keep_ratio=0.5) as attachment:
        got, kept_there = model(**there(inputs, torch.float32)).logits, attachment.kept
    assert str(kept) == str(_on_cpu(kept_there))
    real = inputs["attention_mask"].bool()
    assert (got.cpu() - want)[real].abs().max() < 1e-3


def _on_cpu(kept):
    if isinstance(kept, dict):
        return {key: _on_cpu(value) for key, value in kept.items()}
    return [_on_cpu(value) for value in kept] if isinstance(kept, list) else kept.cpu()


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_cached_decoding_in_bfloat16_runs_and_ends(spec):
    model, inputs = model_there(torch.bfloat16), there(tiny.batch(), torch.bfloat16)
    with tokprune.attach(model, spec, keep_ratio=0.5) as attachment:
        out = tiny.generate(model, inputs)
        assert attachment.report.images
    assert out.shape == (len(inputs["input_ids"]), 8)


@cuda_alone
@pytest.mark.parametrize("spec", ["uniform", "vtc_cls", "divprune", "fopru"])
@torch.no_grad()
def test_one_wait_for_the_device_a_prefill(spec):
    model, inputs = model_there(torch.bfloat16), there(tiny.row(tiny.batch(), 0), torch.bfloat16)

    def waits() -> int:
        model(**inputs)  # compiles kernels, fills what is remembered of layouts
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)

    bare = waits()
    with tokprune.attach(model, spec, keep_ratio=0.5):
        assert waits() <= bare + 1


FLASH = "flash_attention_2"
has_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")


@cuda_alone
@pytest.mark.parametrize("way", [pytest.param("flash_attn", marks=has_flash), "sdpa"])
@pytest.mark.parametrize("spec", ["vtc_cls", "divprune", "fastv"])
@torch.no_grad()
def test_flash_attention_is_close_to_the_map(spec, way):
    """Rows of different lengths with flash-attn; with the flash backend of torch, which takes no padding, one row."""
    model = model_there(torch.bfloat16)
    inputs = there(tiny.batch() if way == "flash_attn" else tiny.row(tiny.batch(), 0), torch.bfloat16)
    language_model, real = model.model.language_model, inputs["attention_mask"].bool()
    language_model.set_attn_implementation("eager")
    with tokprune.attach(model, spec, keep_ratio=0.5):
        want = model(**inputs).logits
    language_model.set_attn_implementation(FLASH if way == "flash_attn" else "sdpa")
    backend = contextlib.nullcontext()
    if way == "sdpa":
        if spec == "fastv":
            pytest.skip("a cut makes its own mask")
        inputs.pop("attention_mask")
        backend = torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION])
    language_model.config._attn_implementation = FLASH if way == "flash_attn" else "sdpa"
    with tokprune.attach(model, spec, keep_ratio=0.5):
        with backend:
            got = model(**inputs).logits
    assert (got - want)[real].abs().max() < 0.1 * want[real].abs().max()
