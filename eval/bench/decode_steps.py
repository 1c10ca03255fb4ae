"""What a step of decoding costs under an attachment, relative to the bare model on a cache as short, made by hand.

python -m tokprune.eval.bench.decode_steps --out eval/results/decode-steps.jsonl

The cache by hand has the keys and values of the pruned one, so both make the same logits, which is checked. What is
measured is the CPU time of the thread that calls the model, in one process, where all ways take turns every few steps;
the short cache has two turns, and the ratio of the two says how far ratios can be trusted.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from tokprune.integrations.transformers import as_cache
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache, LlavaConfig, LlavaForConditionalGeneration

import tokprune

from ..models import path_of
from ..run.rows import conditions

METHODS = ("vtc_cls", "fastv", "pyramiddrop")
BARE, HAND, AGAIN, PRUNED = "bare", "hand", "again", "tokprune"
KEEP, N_TEXT, TURN = 0.25, 64, 4


@dataclass
class Steps:
    """One method on one model.

    Args:
        model: "tiny-llava" or "random-289m".
        lengths: columns in the cache of every layer, after the prefill.
        padded: whether rows have texts of different lengths.
        us: microseconds a step, medians, by what ran.
        ratio: of tokprune to the cache by hand, median, with the quartiles.
        noise: of the cache by hand to itself, likewise.
        to_bare: of tokprune to the bare model on the full cache, likewise.
    """

    model: str
    method: str
    batch_size: int
    padded: bool
    columns: int
    lengths: list[int]
    us: dict[str, float]
    ratio: list[float] | None
    noise: list[float] | None
    to_bare: list[float]
    rounds: int
    steps: int


def random_model(n_layers: int = 20) -> Any:
    """A LLaVA of 289 million random weights with 20 decoder layers: 1024 wide, and 576 visual tokens a picture."""
    sides = {"image_size": 336, "patch_size": 14}
    tower = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": n_layers, "num_attention_heads": 16}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 256, **sides, **tower},
        text_config={"model_type": "llama", "num_key_value_heads": 16, "vocab_size": 16000, **text},
        image_token_index=15999,
    )
    return LlavaForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "tiny-llava": lambda: AutoModelForImageTextToText.from_pretrained(
        path_of("tiny-llava"), dtype=torch.float32, trust_remote_code=False
    ),
    "random-289m": random_model,
}


def prompts(model: Any, batch_size: int, padded: bool) -> dict[str, Tensor]:
    """Noise for pictures, and random text around them; with `padded`, less of it in every other row."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    vision, image = config.vision_config, config.image_token_id
    words = torch.tensor([i for i in range(5, config.text_config.vocab_size) if i != image])
    text = words[torch.randint(len(words), (batch_size, N_TEXT), generator=generator)]
    visual = torch.full((batch_size, (vision.image_size // vision.patch_size) ** 2), image)
    ids = torch.cat([text[:, : N_TEXT // 2], visual, text[:, N_TEXT // 2 :]], 1)
    mask = torch.ones_like(ids)
    if padded:
        mask[1::2, : N_TEXT // 4] = 0
    side = vision.image_size
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(batch_size, 3, side, side, generator=generator),
    }


@dataclass
class Start:
    """Where decoding begins, as generate() would go on from a prefill.

    Args:
        cache: of the prefill.
        mask: (B, S); None where nothing is padded, as generate() passes it.
        positions: (B, 1) of the first step.
        token: (B, 1) of the first step.
    """

    cache: Any
    mask: Tensor | None
    positions: Tensor
    token: Tensor

    def steps(self, model: Any) -> Iterator[tuple[float, Tensor]]:
        """Seconds and logits of one step after the other."""
        mask, positions, token = self.mask, self.positions, self.token
        held = as_cache(model, twin(self.cache))
        while True:
            begun = time.thread_time()
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            given = {"attention_mask": mask, "position_ids": positions, **held}
            out = model(input_ids=token, use_cache=True, logits_to_keep=1, **given)
            token, positions = out.logits[:, -1:].argmax(-1), positions + 1
            yield time.thread_time() - begun, out.logits


def twin(cache: Any) -> Any:
    """The same cache once more; its tensors are replaced by longer ones, never written to."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def prefilled(model: Any, inputs: dict[str, Tensor]) -> Start:
    """Run the prompt."""
    mask, cache = inputs["attention_mask"], DynamicCache(config=model.config.text_config)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=places, use_cache=True, logits_to_keep=1, **as_cache(model, cache))
    return Start(cache, None if mask.all() else mask, places[:, -1:] + 1, out.logits[:, -1:].argmax(-1))


def by_hand(model: Any, pruned: Start) -> Start | None:
    """The pruned cache without what is written on it; None where one mask does not do for all layers."""
    contiguous = len(set(lengths_of(pruned.cache))) == 1
    cache = DynamicCache(config=model.config.text_config)
    for i, layer in enumerate(pruned.cache.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), i)
    if not contiguous:
        return Start(cache, None, pruned.positions, pruned.token) if pruned.mask is None else None
    if pruned.mask is None:
        return Start(cache, None, torch.full_like(pruned.positions, cache.get_seq_length()), pruned.token)
    # Every row has the same visual tokens left, and its padding on the left.
    n_padding = (pruned.mask == 0).sum(1, keepdim=True)
    n_padding = n_padding - n_padding.amin()
    places = torch.arange(cache.get_seq_length())[None]
    return Start(cache, (places >= n_padding).long(), cache.get_seq_length() - n_padding, pruned.token)


@torch.no_grad()
def measured(name: str, model: Any, method: str, batch_size: int, padded: bool, rounds: int, steps: int) -> Steps:
    """Measure one method."""
    inputs, pruned = prompts(model, batch_size, padded), sharing(model)
    with tokprune.attach(pruned, method, keep_ratio=KEEP):
        starts = {BARE: (model, prefilled(model, inputs)), PRUNED: (pruned, prefilled(pruned, inputs))}
        hand = by_hand(model, starts[PRUNED][1])
        if hand is not None:
            starts |= {HAND: (model, hand), AGAIN: (model, hand)}
            check_same(method, starts)
        found = [one_round(starts, steps) for _ in range(rounds + 1)][1:]  # the first one warms up
    us = {what: [times[what] for times in found] for what in starts}
    return Steps(
        model=name,
        method=method,
        batch_size=batch_size,
        padded=padded,
        columns=inputs["input_ids"].shape[1],
        lengths=lengths_of(starts[PRUNED][1].cache),
        us={what: round(median(times), 1) for what, times in us.items() if what != AGAIN},
        ratio=None if hand is None else spread(us[PRUNED], us[HAND]),
        noise=None if hand is None else spread(us[AGAIN], us[HAND]),
        to_bare=spread(us[PRUNED], us[BARE]),
        rounds=rounds,
        steps=steps,
    )


def sharing(model: Any) -> Any:
    """The same model once more, on the same weights, so that an attachment can stay on one of the two."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def one_round(starts: dict[str, tuple[Any, Start]], steps: int) -> dict[str, float]:
    """Median microseconds of every way."""
    running = {what: start.steps(model) for what, (model, start) in starts.items()}
    found: dict[str, list[float]] = {what: [] for what in starts}
    for turn in range(max(steps // TURN, 1)):
        for what in list(starts) if turn % 2 else reversed(starts):
            found[what] += [next(running[what])[0] for _ in range(TURN)]
    return {what: 1e6 * median(times) for what, times in found.items()}


def check_same(method: str, starts: dict[str, tuple[Any, Start]]) -> None:
    """Raise where the logits are not those of the cache by hand."""
    pairs = zip(*(starts[what][1].steps(starts[what][0]) for what in (PRUNED, HAND)), range(4), strict=False)
    differs = max(float((ours - theirs).abs().amax()) for (_, ours), (_, theirs), _ in pairs)
    if differs > 1e-4:
        raise RuntimeError(f"{method}: logits differ from those of the cache by hand by {differs:.2g}")


def lengths_of(cache: Any) -> list[int]:
    """Columns of every layer."""
    return [layer.get_seq_length() for layer in cache.layers]


def spread(of: list[float], to: list[float]) -> list[float]:
    """Median and quartiles of ratios by round."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return [round(x, 4) for x in (middle, low, high)]


def main(
    models: Annotated[str, typer.Option(help="Of tiny-llava,random-289m.")] = ",".join(MODELS),
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(METHODS),
    batch_sizes: Annotated[str, typer.Option(help="Rows at a time.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="From the prefill on.")] = 9,
    steps: Annotated[int, typer.Option(help="Steps a round; 0 for 32 on tiny-llava and 8 on the other.")] = 0,
    padded: Annotated[bool, typer.Option(help="Measure rows of different lengths, too.")] = False,
    out: Annotated[Path | None, typer.Option(help="A file to write rows to.")] = None,
) -> None:
    """Print microseconds a step, and the ratio to a cache as short that was made by hand."""
    torch.set_num_threads(1)
    lines = []
    for name in models.split(","):
        model = MODELS[name]()
        said = conditions(model)
        n = steps or (32 if name == "tiny-llava" else 8)
        for batch_size in map(int, batch_sizes.split(",")):
            for has_padding in [False, *([True] if padded and batch_size > 1 else [])]:
                for method in methods.split(","):
                    found = measured(name, model, method, batch_size, has_padding, rounds, n)
                    typer.echo(text_of(found))
                    lines.append({**asdict(found), "threads": 1, **said})
    if out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def text_of(found: Steps) -> str:
    """One line."""
    said = ", ".join(f"{what} {us:.0f} us" for what, us in found.us.items())
    lengths = "/".join(str(n) for n in dict.fromkeys(found.lengths))
    rows = f"batch {found.batch_size}{' padded' if found.padded else ''}, {found.columns} -> {lengths}"
    line = f"{found.model}, {rows}, {found.method}: {said}; to bare x {found.to_bare[0]:.3f}"
    if found.ratio is None or found.noise is None:
        return line
    (middle, low, high), (same, least, most) = found.ratio, found.noise
    return f"{line}; to hand x {middle:.3f} [{low:.3f}, {high:.3f}], noise x {same:.3f} [{least:.3f}, {most:.3f}]"


if __name__ == "__main__":
    typer.run(main)
