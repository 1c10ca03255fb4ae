"""What cuts between decoder layers save in time, beside what the ledger says: a decoder of a real size, random weights.

python -m tokprune.eval.speed                           # 1.1B shapes, 576 visual and 64 text tokens
python -m tokprune.eval.speed --shape 7b --batch-size 8 # LLaVA-1.5-7B's decoder; for a GPU

Every round runs all configurations one after the other, so that ratios compare minutes, not hours, apart. The vision
tower is small: this is about the language model.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokprune
from tokprune.shapes import shape_from_config

from .rows import NONE, conditions
from .run import Stopwatch

SHAPES = {
    "1.1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_key_value_heads=32),
}
METHODS = (
    NONE,
    "vtc_cls",
    "fastv",
    "dart",
    "pyramiddrop",
    "sparsevlm",
    "fastv:schedule=cosine",
    "vtc_cls+fastv",
    "visual_exit:layer=2",
)
N_TEXT = 64
IMAGE = 31_999


@dataclass
class Speed:
    """One configuration. Ratios are to the bare model in the same round, medians over rounds.

    `prefill_ledger` and `decode_ledger` are ratios of FLOPs, vision tower and selection among them.
    """

    shape: str
    method: str
    keep_ratio: float | None
    batch_size: int
    n_visual: int
    n_text: int
    columns: list[int]  # by decoder layer
    prefill_s: float
    prefill_ratio: float
    prefill_ledger: float
    decode_s_per_token: float
    decode_ratio: float
    decode_ledger: float
    rounds: int
    new_tokens: int
    device: str
    dtype: str
    attn_implementation: str
    torch: str
    transformers: str
    date: str


def build(shape: str, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    """A LLaVA with a decoder of this size behind a small tower of 576 patches."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(**SHAPES[shape], num_attention_heads=32, vocab_size=32_000, max_position_embeddings=4096)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=576,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # every run is of full length
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(model, batch_size: int) -> dict[str, torch.Tensor]:
    """576 placeholders with text before and behind."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, 30_000, (batch_size, N_TEXT), generator=generator)
    ids = torch.cat([text[:, :35], torch.full((batch_size, 576), IMAGE), text[:, 35:]], 1)
    pixels = torch.randn(batch_size, 3, 336, 336, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in inputs.items()}


@torch.no_grad()
def once(model, inputs: dict, method: str, keep: float, new_tokens: int) -> tuple[float, float, Any]:
    """Seconds to the first token, seconds for each behind it, and the report."""
    budget = {"keep_ratio": keep} if method != NONE and tokprune.get_method(method).takes_budget else {}
    with nullcontext() if method == NONE else tokprune.attach(model, method, **budget) as attachment:
        with Stopwatch(model) as watch:
            model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, suppress_tokens=[IMAGE], logits_to_keep=1
            )
        return watch.prefill_s, watch.decode_s / (new_tokens - 1), attachment.report if attachment else None


def measure(
    shape: str, keep: float = 0.25, rounds: int = 3, batch_size: int = 1, new_tokens: int = 9, methods=METHODS
) -> list[Speed]:
    """Rows of all configurations; the first round warms up and is not counted."""
    gpu = torch.cuda.is_available()
    model = build(shape, torch.bfloat16 if gpu else torch.float32, "cuda" if gpu else "cpu")
    inputs, times = prompt(model, batch_size), []
    for i in range(rounds + 1):
        turn = i % len(methods)
        found = {m: once(model, inputs, m, keep, new_tokens) for m in (*methods[turn:], *methods[:turn])}
        times += [found] if i else []
    seen = conditions(model)
    ledger, rows = shape_from_config(model.config), []
    n_layers, whole = ledger.text.n_layers, 576 + N_TEXT
    for method in methods:
        report = times[0][method][2]
        columns = report.layers if report else [whole] * n_layers
        bare_decode = ledger.decode(whole).flops
        rows.append(
            Speed(
                shape=shape,
                method=method,
                keep_ratio=keep if method != NONE and tokprune.get_method(method).takes_budget else None,
                batch_size=batch_size,
                n_visual=576,
                n_text=N_TEXT,
                columns=columns,
                prefill_s=median(t[method][0] for t in times),
                prefill_ratio=median(t[method][0] / t[NONE][0] for t in times),
                prefill_ledger=report.ledger.prefill.flops / report.ledger_unpruned.prefill.flops if report else 1.0,
                decode_s_per_token=median(t[method][1] for t in times),
                decode_ratio=median(t[method][1] / t[NONE][1] for t in times),
                decode_ledger=ledger.decode(columns).flops / bare_decode,
                rounds=rounds,
                new_tokens=new_tokens,
                **{k: seen[k] for k in ("device", "dtype", "attn_implementation", "torch", "transformers", "date")},
            )
        )
    return rows


def overhead(n_layers: int = 32, steps: int = 40, rounds: int = 5) -> dict[str, float]:
    """Microseconds that hooks add to one layer of one decoding step, on a decoder so small that nothing else counts.

    Of a cache that is cut and a batch without padding, and of one with padding, where masks are gathered.
    """
    found = {}
    for name, lengths in (("no padding", (9, 9)), ("padding", (9, 5))):
        text = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=n_layers, num_attention_heads=2, vocab_size=32_000
        )
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layer=-2,
        )
        model = LlavaForConditionalGeneration(config).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        ids = torch.full((2, 9 + 16), 7)
        ids[:, 4:20] = IMAGE
        mask = torch.ones_like(ids)
        mask[1, : lengths[0] - lengths[1]] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 56, 56)}
        pairs = [[once(model, inputs, m, 0.5, steps)[1] for m in ("vtc_cls", "vtc_cls+fastv")] for _ in range(rounds)]
        # The least of each: what a machine with other load adds is never less than nothing.
        without, with_cuts = (min(times) for times in zip(*pairs[1:], strict=True))
        found[name] = 1e6 * (with_cuts - without) / n_layers
    return found


def main(
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")] = Path("runs/speed.jsonl"),
    shape: Annotated[str, typer.Option(help="1.1b or 7b.")] = "1.1b",
    keep: Annotated[float, typer.Option(help="Ratio of the visual tokens left at the end.")] = 0.25,
    rounds: Annotated[int, typer.Option(help="Rounds counted.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
) -> None:
    """Measure, print and write."""
    rows = measure(shape, keep, rounds, batch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    console = Console(markup=False, width=140)
    for r in rows:
        console.print(
            f"{r.method:24} prefill {r.prefill_s:6.2f} s, x {r.prefill_ratio:.2f} (ledger {r.prefill_ledger:.2f}); "
            f"decode {1000 * r.decode_s_per_token:6.1f} ms, x {r.decode_ratio:.2f} (ledger {r.decode_ledger:.2f})"
        )
    for name, micros in overhead().items():
        console.print(f"hooks of a cut cache, {name}: {micros:.1f} microseconds a layer and step")


if __name__ == "__main__":
    typer.run(main)
