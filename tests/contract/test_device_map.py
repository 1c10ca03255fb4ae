"""Models spread by `device_map`: weights that come and go with each module's forward pass change no selection."""

from __future__ import annotations

import functools

import pytest
import specs
import tiny
import torch
from transformers import AutoModelForImageTextToText

import tokprune

EVERYTHING = [s for s in specs.SPECS if s not in specs.BEFORE_THE_TOWER] + specs.CUTTING
FEW = ["vtc_cls:without_cls=received", "visionzip", "cdpruner", "globalcom2", "fastv", "sparsevlm", "fopru+dart"]
PARTS = {
    "all but the head": {"model.vision_tower": "disk", "model.multi_modal_projector": "disk"},
    "decoder layers": {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"},
}


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Models whose modules lie on the disk between their forward passes, by kind and map."""

    @functools.cache
    def load(kind: str, parts: str):
        folder = tmp_path_factory.mktemp(f"{kind}-{parts.replace(' ', '-')}")
        bare = tiny.fresh_model(kind)
        bare.save_pretrained(folder)
        names = {name for name, _ in bare.model.named_children()} | {"language_model"}
        where = {k: v for k, v in PARTS[parts].items() if k.removeprefix("model.") in names}
        rest = {f"model.{name}": "cpu" for name, _ in bare.model.named_children() if f"model.{name}" not in where}
        del rest["model.language_model"]
        rest |= {f"model.language_model.{name}": "disk" for name, _ in bare.model.language_model.named_children()}
        rest["model.language_model.embed_tokens"] = "cpu"  # tied to the head in some families
        loose = {name: "cpu" for name, _ in bare.model.named_parameters(prefix="model", recurse=False)}
        mapped = AutoModelForImageTextToText.from_pretrained(
            folder,
            device_map={**rest, **where, **loose, "lm_head": "cpu"},
            offload_folder=folder / "offloaded",
            dtype=torch.float32,
        ).eval()
        assert any(p.device.type == "meta" for p in mapped.model.language_model.layers.parameters())
        return bare.eval(), mapped

    return load


def answers(model, kind: str, spec: str) -> tuple[torch.Tensor, list]:
    budget = {"keep_ratio": 0.4} if specs.build(spec).takes_budget else {}
    with tokprune.attach(model, spec, **budget) as attachment:
        out = tiny.generate(model, tiny.batch(kind=kind), max_new_tokens=4, do_sample=False)
        return out, attachment.report.to_dict()


def assert_same(spread, kind: str, parts: str, spec: str) -> None:
    bare, mapped = spread(kind, parts)
    (expected, kept), (found, kept_there) = (answers(m, kind, spec) for m in (bare, mapped))
    assert torch.equal(expected, found)
    assert kept == kept_there


@pytest.mark.slow
@pytest.mark.parametrize("spec", [specs.scaled(s) for s in EVERYTHING])
def test_every_method_selects_the_same(spread, spec):
    assert_same(spread, "clip", "all but the head", spec)


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("spec", FEW)
def test_every_family_selects_the_same(spread, kind, spec, parts):
    assert_same(spread, kind, parts, spec)


def test_detach_leaves_the_hooks_of_accelerate(spread):
    _, mapped = spread("clip", "all but the head")
    before = [(name, type(m._hf_hook).__name__) for name, m in mapped.named_modules() if hasattr(m, "_hf_hook")]
    forwards = [m.forward for m in mapped.modules()]
    tokprune.attach(mapped, "fastv", keep_ratio=0.4).detach()
    after = [(name, type(m._hf_hook).__name__) for name, m in mapped.named_modules() if hasattr(m, "_hf_hook")]
    assert before == after
    assert before
    assert [m.forward for m in mapped.modules()] == forwards
