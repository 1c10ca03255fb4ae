"""What selection costs: time spent on signals as a share of the vision tower's own time.

python -m tokprune.eval.efficiency            # CLIP ViT-L/14-336 shapes, random weights
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokprune
from tokprune.core.clock import listen
from tokprune.core.files import write_text

from .run.rows import device_name
from .run.stopwatch import now
from .stats import percentile

SELECTORS = {
    "[CLS] row, 1 layer": "fastervlm",
    "[CLS] rows, 7 layers": "vtc_cls",
    "received and given, 1 layer": "fopru",
    "received and given before the softmax, 1 layer": "fopru:form=logits",
}


CLIP_LARGE = dict(  # CLIP ViT-L/14-336
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


@dataclass
class Cost:
    """One selector on one tower."""

    selector: str
    method: str
    n_layers: int
    n_tokens: int
    batch_size: int
    tower_s_p50: float
    signals_s_p20: float
    signals_s_p50: float
    signals_s_p80: float
    share: float
    rounds: int
    device: str
    dtype: str
    torch: str


def clip_large() -> LlavaForConditionalGeneration:
    """LLaVA-1.5's tower at its real size, random weights, before a language model of one small layer."""
    vision = CLIPVisionConfig(**CLIP_LARGE)
    text = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=32)
    ).eval()


@torch.no_grad()
def signals_time(model, spec: str, pixels: torch.Tensor) -> tuple[float, float]:
    """(seconds of the tower without the signals, seconds of the signals) in one forward pass."""
    tower = model.model.vision_tower
    with tokprune.attach(model, spec, keep_ratio=0.25), listen(lambda: now(pixels.device)) as parts:
        hooks = [
            tower.register_forward_pre_hook(lambda *ignored: parts.begin("tower")),
            tower.register_forward_hook(lambda *ignored: parts.end()),
        ]
        model.model.get_image_features(pixels)
        for hook in hooks:
            hook.remove()
    return parts.seconds["tower"], parts.seconds["signals"]


def measure(model, batch_size: int = 1, rounds: int = 5) -> list[Cost]:
    """Every selector, in turns, so that a slow minute meets them all."""
    config = model.config.vision_config
    side = config.image_size
    parameter = next(model.parameters())
    pixels = torch.randn(batch_size, 3, side, side).to(parameter)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SELECTORS}
    for turn in range(rounds + 1):
        for name, spec in SELECTORS.items():
            pair = signals_time(model, spec, pixels)
            if turn:  # the first turn warms up
                times[name].append(pair)
    costs = []
    for name, pairs in times.items():
        signals = sorted(s for _, s in pairs)
        costs.append(
            Cost(
                selector=name,
                method=SELECTORS[name],
                n_layers=config.num_hidden_layers,
                n_tokens=(side // config.patch_size) ** 2 + 1,
                batch_size=batch_size,
                tower_s_p50=median(t for t, _ in pairs),
                signals_s_p20=percentile(signals, 0.2),
                signals_s_p50=median(signals),
                signals_s_p80=percentile(signals, 0.8),
                share=median(s / t for t, s in pairs),
                rounds=rounds,
                device=device_name(parameter.device),
                dtype=str(parameter.dtype).removeprefix("torch."),
                torch=torch.__version__,
            )
        )
    return costs


def main(
    out: Annotated[Path | None, typer.Option(help="Where to write the rows as JSONL.")] = None,
    batch_size: int = 1,
    rounds: int = 5,
) -> None:
    """Share of the tower's time that each selector's signals take."""
    model = clip_large().to("cuda" if torch.cuda.is_available() else "cpu")
    costs = measure(model, batch_size, rounds)
    first = costs[0]
    table = Table(
        "signals",
        "tower",
        "signals alone",
        "share",
        title=f"{first.n_layers} layers, {first.n_tokens} tokens, {first.device}, {first.dtype}, batch {batch_size}",
        title_justify="left",
    )
    for cost in costs:
        table.add_row(
            cost.selector,
            f"{cost.tower_s_p50:.3f} s",
            f"{1000 * cost.signals_s_p50:.2f} ms",
            f"{100 * cost.share:.2f} %",
        )
    Console(width=110).print(table)
    if out:
        write_text(out, "".join(json.dumps(asdict(cost)) + "\n" for cost in costs))


if __name__ == "__main__":
    typer.run(main)
