"""Versions of what is installed, and checks of pruning on the embedded model."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tokprune
from tokprune.integrations.transformers import (
    NEWEST,
    OLDEST,
    family_of,
    is_newer_than_tested,
    torchvision_fault,
)

from ..core.tokens import Count, Stage
from ..methods import METHODS

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "lmms-eval", "flash-attn")
QUESTIONS = ("is there a red ring?", "what color is the shape that is not in the top left of the image?")
KEEP = 0.25
REINSTALL = "use pip uninstall torchvision, or install the build that matches your torch"


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it passed, and what was measured."""

    what: str
    ok: bool
    seen: str


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here, or "not installed"."""
    found = {"python": platform.python_version(), "tokprune": tokprune.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["tested on"] = f"transformers {OLDEST} to {NEWEST}"
    if is_newer_than_tested(found["transformers"]):
        found["tested on"] += f"; {found['transformers']} is newer, so rely on the checks below"
    fault = torchvision_fault()
    if fault is not None:
        found["torchvision"] = f"cannot be imported, and so transformers cannot load models ({fault}); {REINSTALL}"
    cuda = torch.cuda.is_available()
    found["device"] = torch.cuda.get_device_name(0) if cuda else f"cpu, {torch.get_num_threads()} threads"
    found["models"] = ", ".join(tokprune.list_models())
    flash = "flash_attention_2" if found["flash-attn"] != "not installed" and cuda else ""
    found["attention"] = ", ".join(filter(None, ("sdpa", "eager", flash)))
    return found


def findings(runner: Any) -> Iterator[Finding]:
    """Checks of a loaded model, one by one; `runner` is a `tokprune.eval.run.Runner`.

    Lengths are counted by hooks of this module on the decoder layers, not taken from the report, and pruned logits
    are compared with those of a short sequence put together by hand.
    """
    model, inputs = runner.model, _inputs(runner)
    bare, before = _watched(model, lambda: model(**inputs).logits)
    with tokprune.attach(model, "uniform", keep_ratio=1):
        same, _ = _watched(model, lambda: model(**inputs).logits)
    yield Finding("keeping all tokens leaves logits bit-identical", torch.equal(same, bare), f"{before[0]} columns")
    for method in tokprune.list_methods():
        fault = METHODS.fault(method)
        if fault:
            yield Finding(method, False, fault)
        if fault or not _runs_here(tokprune.get_method(method)):
            continue
        try:
            yield _prunes(model, inputs, method)
        except Exception as error:  # any failure is a finding here
            yield Finding(f"{method} prunes", False, f"{type(error).__name__}: {error}")
    after, _ = _watched(model, lambda: model(**inputs).logits)
    yield Finding("detaching restores the model", torch.equal(after, bare), "logits equal")


def _runs_here(built: tokprune.Method) -> bool:
    """Whether a method needs no file, and no tower that runs on a part of a picture, which the embedded model lacks."""
    return not built.needs_file and built.space != "pixels"


def _prunes(model, inputs: dict, method: str) -> Finding:
    n_visual, built = int(family_of(model).is_placeholder(inputs["input_ids"][:1]).sum()), tokprune.get_method(method)
    if built.is_filter:
        after = "fastv" if built.stage is Stage.DECODER else "vtc_cls"
        method, built = f"{method}+{after}", tokprune.get_method(after)
    budget: dict[str, Any] = {"keep_ratio": KEEP} if built.takes_budget else {}
    n_keep = round(n_visual * KEEP) if budget else n_visual
    with tokprune.attach(model, method, **budget) as attachment:
        logits, columns = _watched(model, lambda: model(**inputs).logits)
        kept, report = attachment.kept, attachment.report
        left = [image.left for image in report.images]
        _, in_generate = _watched(model, lambda: model.generate(**inputs, max_new_tokens=3, do_sample=False))
    n_layers, counts, lengths = family_of(model).decoder.n_layers, [len(k) for k in left], _lengths(inputs)
    by_layer = [image.n_by_layer(n_layers) for image in report.images]
    widths = [max(_columns(lengths, n_visual, at)) for at in zip(*by_layer, strict=True)]
    exits = isinstance(kept[0], dict) and not budget
    problems = {
        f"asked to keep {n_keep}": max(counts) > n_keep or (bool(budget) and min(counts) < _least(built, n_keep)),
        "nothing kept": method != "blind" and not exits and not all(counts),
        "something kept": method == "blind" and any(counts),
        "the layers saw a wrong length": columns != widths,
        "generate ran on a wrong length": in_generate[:n_layers] != columns,
        "logits are not those of the kept tokens": _differs(model, inputs, kept, logits, built),
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    shown = " and ".join(map(str, sorted(set(counts))))
    width = f"{columns[0]}" if columns[0] == columns[-1] else f"{columns[0]} ... {columns[-1]}"
    if not budget and set(counts) == {n_visual}:  # it decides by itself
        seen = f"keeps all {n_visual} visual tokens of these pictures, as it may; decoder layers saw {width} columns"
        return Finding(f"{method} runs", not found, "; ".join([seen, *found]))
    seen = f"visual tokens {n_visual} -> {shown}, decoder layers saw {max(lengths)} -> {width} columns"
    return Finding(f"{method} prunes", not found, "; ".join([seen, *found]))


def _least(built: tokprune.Method, n_keep: int) -> int:
    return n_keep if built.count is Count.EXACT else 1


def _columns(lengths: list[int], n_visual: int, counts: Sequence[int]) -> list[int]:
    return [length - n_visual + n for length, n in zip(lengths, counts, strict=True)]


def _lengths(inputs: dict) -> list[int]:
    return inputs["attention_mask"].sum(1).tolist()


@torch.no_grad()
def _differs(model, inputs: dict, kept: list, logits: torch.Tensor, built: tokprune.Method) -> bool:
    """Whether the last logits of any row differ from those of its kept tokens alone, without padding or cache.

    Of methods that merge, or that cut between layers, only whether they are numbers.
    """
    if not built.keeps_features or isinstance(kept[0], dict):
        return not bool(logits.isfinite().all())
    family = family_of(model)
    for row, index in enumerate(kept):
        real = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][real]
        embeds = model.get_input_embeddings()(ids)
        (features,) = family.encode("get_image_features", pixel_values=inputs["pixel_values"][row : row + 1])
        visual = family.is_placeholder(ids).nonzero()[:, 0]
        columns = torch.ones_like(ids, dtype=torch.bool)
        columns[visual] = False
        columns[visual[index.to(visual.device)]] = True
        embeds[visual] = features.to(embeds.dtype)
        out = family.language_model(inputs_embeds=embeds[columns][None], use_cache=False).last_hidden_state
        wanted = model.get_output_embeddings()(out)[0, -1].float()
        if not torch.allclose(logits[row, -1].float(), wanted, atol=0.02 * float(wanted.abs().max())):
            return True
    return False


def _inputs(runner: Any) -> dict[str, torch.Tensor]:
    """Two questions of different lengths about two scenes, left-padded."""
    from tokprune.eval.tasks.findit import FindIt

    pictures = [[FindIt().image(name)] for name in ("validation-0", "validation-1")]
    text = [runner.prompt(q) for q in QUESTIONS]
    inputs = runner.processor(images=pictures, text=text, padding=True, return_tensors="pt")
    return dict(inputs.to(runner.model.device, runner.model.dtype))


@torch.no_grad()
def _watched(model, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """What a call returns, and the columns that every decoder layer saw, pass by pass."""
    columns: list[int] = []

    def count(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        columns.append(hidden.shape[1])

    layers = family_of(model).language_model.layers
    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        return run(), columns
    finally:
        for hook in hooks:
            hook.remove()
