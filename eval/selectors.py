"""What selection costs at LLaVA-NeXT's shapes, beside the prefill that it is to save.

python -m tokprune.eval.selectors            # 5 x 576 visual tokens of width 4096, random weights
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

import tokprune
from tokprune.core.clock import listen
from tokprune.core.files import write_text

from .efficiency import CLIP_LARGE
from .models import PRE_LLM
from .run.rows import device_name
from .run.stopwatch import now

IMAGE, N_TEXT, N_LAYERS = 90, 64, 32
METHODS = (*PRE_LLM, "uniform", "pool", "random")


@dataclass
class SelectorTime:
    """One method on one picture; `layer_s` is the unpruned prefill of one decoder layer, `share` of 32 of them."""

    method: str
    keep_ratio: float | None
    n_visual: int
    n_kept: int
    width: int
    signals_s: float
    select_s: float
    layer_s: float
    share: float
    rounds: int
    device: str
    dtype: str
    torch: str


def llava_next() -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT-7B with random weights and one decoder layer."""
    tower = CLIPVisionConfig(**CLIP_LARGE)
    text = LlamaConfig(
        vocab_size=128, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    config = LlavaNextConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[2 * tower.image_size, 2 * tower.image_size]],
    )
    return LlavaNextForConditionalGeneration(config).eval()


def inputs_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """One square picture of a thumbnail and 2 x 2 crops, beside 64 text tokens."""
    vision, parameter = model.config.vision_config, next(model.parameters())
    side = vision.image_size // vision.patch_size
    n_rows = side * side + 2 * side * (2 * side + 1)
    ids = torch.tensor([[1, *[IMAGE] * n_rows, *range(2, N_TEXT + 1)]])
    pixels = torch.randn(1, 5, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[2 * vision.image_size] * 2])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": size}
    return {**{k: v.to(parameter.device) for k, v in inputs.items()}, "pixel_values": pixels.to(parameter)}


@torch.no_grad()
def watched(model: nn.Module, inputs: dict[str, torch.Tensor], attach: Callable[[], Any] | None) -> dict[str, float]:
    """Seconds of one prefill: "signals", "select" with making the sequence shorter, "layer" of the decoder."""
    device, layer = next(model.parameters()).device, model.model.language_model.layers[0]
    with attach() if attach else nullcontext() as attachment, listen(lambda: now(device)) as parts:
        hooks = [
            layer.register_forward_pre_hook(lambda *ignored: parts.begin("layer")),
            layer.register_forward_hook(lambda *ignored: parts.end()),
        ]
        model(**inputs, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        n_kept = attachment.report.images[0].n_kept if attachment else 0
    found = parts.seconds
    select = found["select"] + found["shorten"]
    return {"signals": found["signals"], "select": select, "layer": found["layer"], "n_kept": n_kept}


def measure(
    model: nn.Module, methods: tuple[str, ...] = METHODS, keep_ratio: float = 0.25, rounds: int = 2
) -> list[SelectorTime]:
    """Every method in turns."""
    inputs = inputs_for(model)
    watched(model, inputs, None)  # the first run is slow
    bare, runs = [], {method: [] for method in methods}
    for _ in range(rounds):
        bare.append(watched(model, inputs, None))
        for method in methods:
            budget = {"keep_ratio": keep_ratio} if _takes_budget(method) else {}
            runs[method].append(watched(model, inputs, lambda m=method, b=budget: tokprune.attach(model, m, **b)))
    layer_s = median(r["layer"] for r in bare)
    vision, parameter = model.config.vision_config, next(model.parameters())
    times = []
    for method, seen in runs.items():
        signals, select = (median(r[part] for r in seen) for part in ("signals", "select"))
        times.append(
            SelectorTime(
                method=method,
                keep_ratio=keep_ratio if _takes_budget(method) else None,
                n_visual=5 * (vision.image_size // vision.patch_size) ** 2,
                n_kept=int(seen[0]["n_kept"]),
                width=model.config.text_config.hidden_size,
                signals_s=signals,
                select_s=select,
                layer_s=layer_s,
                share=(signals + select) / (N_LAYERS * layer_s),
                rounds=rounds,
                device=device_name(parameter.device),
                dtype=str(parameter.dtype).removeprefix("torch."),
                torch=torch.__version__,
            )
        )
    return times


def _takes_budget(spec: str) -> bool:
    return tokprune.get_method(spec).takes_budget


def main(
    out: Annotated[Path | None, typer.Option(help="Where to write the rows as JSONL.")] = None, rounds: int = 2
) -> None:
    """Time of signals and selection of one picture, as a share of the unpruned prefill of 32 decoder layers."""
    gpu = torch.cuda.is_available()
    model = llava_next().to("cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)
    times = measure(model, rounds=rounds)
    first = times[0]
    title = f"{first.n_visual} visual tokens of width {first.width}, {first.device}, {first.dtype}"
    table = Table("method", "kept", "signals", "selection", "share of 32 layers", title=title, title_justify="left")
    for t in times:
        milliseconds = (f"{1000 * s:.1f} ms" for s in (t.signals_s, t.select_s))
        table.add_row(t.method, str(t.n_kept), *milliseconds, f"{100 * t.share:.2f} %")
    console = Console(width=110)
    console.print(table)
    console.print(f"one decoder layer on the unpruned prompt: {first.layer_s:.2f} s")
    if out:
        write_text(out, "".join(json.dumps(asdict(t)) + "\n" for t in times))


if __name__ == "__main__":
    typer.run(main)
