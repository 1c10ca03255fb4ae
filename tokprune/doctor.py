"""What works on this machine, and proof on the embedded model that pruning prunes."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tokprune

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "lmms-eval", "flash-attn")
QUESTIONS = ("is there a red ring?", "what color is the shape that is not in the top left of the image?")
KEEP = 0.25


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it holds, and what was seen."""

    what: str
    ok: bool
    seen: str


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here; "not installed" where one is not."""
    found = {"python": platform.python_version(), "tokprune": tokprune.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    cuda = torch.cuda.is_available()
    found["device"] = torch.cuda.get_device_name(0) if cuda else f"cpu, {torch.get_num_threads()} threads"
    found["models"] = ", ".join(tokprune.list_models())
    flash = "flash_attention_2" if found["flash-attn"] != "not installed" and cuda else ""
    found["attention"] = ", ".join(filter(None, ("sdpa", "eager", flash)))
    return found


def findings(runner: Any) -> Iterator[Finding]:
    """Checks of a loaded model, one after the other; `runner` is a `tokprune.eval.run.Runner`.

    Lengths are counted by hooks of this function on the decoder layers, not taken from the report.
    """
    model, inputs = runner.model, _inputs(runner)
    bare, before = _logits(model, inputs)
    with tokprune.attach(model, "uniform", keep_ratio=1):
        same, _ = _logits(model, inputs)
    yield Finding("keeping all tokens changes no bit", torch.equal(same, bare), f"{before[0]} columns")
    for method in tokprune.list_methods():
        yield _guarded(method, functools.partial(_prunes, model, inputs, method, before[0]))
    after, _ = _logits(model, inputs)
    yield Finding("the model is as it was after detaching", torch.equal(after, bare), "logits equal")


def _guarded(method: str, check: Callable[[], Finding]) -> Finding:
    """Any failure is a finding here."""
    try:
        return check()
    except Exception as error:
        return Finding(f"{method} prunes", False, f"{type(error).__name__}: {error}")


def _prunes(model, inputs: dict, method: str, n_columns: int) -> Finding:
    n_visual = model.config.image_seq_length
    budget: dict[str, Any] = {"keep_ratio": KEEP} if tokprune.get_method(method).takes_budget else {}
    n_keep = round(n_visual * KEEP) if budget else 0
    with tokprune.attach(model, method, **budget) as attachment:
        logits, columns = _logits(model, inputs)
        kept = [image.n_kept for image in attachment.report.images]
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    wanted = [n_columns - n_visual + n for n in kept]
    ok = (
        set(columns) == set(wanted)
        and all(n <= n_keep for n in kept)
        and bool(logits.isfinite().all())
        and answer.shape[1] > inputs["input_ids"].shape[1]
    )
    seen = f"visual tokens {n_visual} -> {kept[0]}, decoder layers saw {n_columns} -> {columns[0]} columns"
    return Finding(f"{method} prunes", ok, seen)


def _inputs(runner: Any) -> dict[str, torch.Tensor]:
    """Two questions of different lengths about one scene."""
    from .eval.tasks.findit import FindIt

    picture = FindIt().image("test-0")
    text = [runner.prompt(q) for q in QUESTIONS]
    inputs = runner.processor(images=[[picture]] * 2, text=text, padding=True, return_tensors="pt")
    return dict(inputs.to(runner.model.device, runner.model.dtype))


@torch.no_grad()
def _logits(model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
    """Logits, and the columns that every decoder layer saw."""
    columns: list[int] = []

    def count(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        columns.append(hidden.shape[1])

    layers = model.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        return model(**inputs).logits, columns
    finally:
        for hook in hooks:
            hook.remove()
