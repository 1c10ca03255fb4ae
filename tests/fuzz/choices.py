"""What simple methods must choose on LLaVA with either tower, from the bare model's own attention maps."""

from __future__ import annotations

import tiny
import torch
from fuzz.cases import Case
from fuzz.expected import embeds_of
from fuzz.methods import options_of
from fuzz.prompts import Line, pixels_of
from torch import Tensor

NEAR = 1e-6  # scores are single precision in the library; what lies as near as this to the last kept one may differ


@torch.no_grad()
def tower_maps(kind: str, number: int) -> Tensor:
    """(layers, T, T) attention of the vision tower for one picture, mean over heads."""
    model = tiny.model(kind, "eager", torch.float64)
    pixels = pixels_of(kind, [(f"p{number}",)], torch.float64)["pixel_values"]
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    return torch.stack([layer[0].mean(0) for layer in maps])


def tower_scores(kind: str, part: str, number: int) -> Tensor | None:
    """(N,) scores of a method that reads the vision tower; None where this knows none."""
    name, options = part.split(":")[0], options_of(part)
    if name not in ("vtc_cls", "fastervlm", "fopru") or options.get("strategy") == "row":
        return None
    maps, n_special = tower_maps(kind, number), int(kind == "clip")
    patches = maps[:, n_special:, n_special:]
    looked_at = maps[:, 0, 1:] if n_special else patches.mean(1)  # without [CLS], what tokens receive
    if name == "fastervlm":
        return looked_at[2]
    if name == "vtc_cls":
        start = int(options.get("start_layer", 2)) % 4  # 16 of 24 is 2.67 of 4, and the sum ends with layer 2
        return looked_at[start:3].sum(0)
    if options.get("form") == "logits":
        return None
    at = patches[int(options.get("layer", -2))]
    received, given = at.mean(0), at.mean(1)
    if options.get("gate") == "received" or received.var() > given.var():
        return received
    return None  # what is given is nearly constant after a softmax


@torch.no_grad()
def decoder_scores(case: Case, line: Line, layer: int) -> list[Tensor]:
    """(N,) of every picture: attention of the last token of a row in a decoder layer."""
    model = tiny.model(case.kind, "eager", torch.float64)
    embeds = embeds_of(model, case, line, torch.float64)[None]
    out = model.model.language_model(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    row = out.attentions[layer][0, :, -1].mean(0)
    return [row[image.start : image.start + image.n] for image in line.images]


def check_choice(kept: Tensor, scores: Tensor, what: str) -> None:
    """Raise where what is kept does not score highest, ties aside."""
    lowest, is_kept = scores[kept].min(), torch.zeros(len(scores), dtype=torch.bool)
    is_kept[kept] = True
    best_dropped = scores[~is_kept].max() if (~is_kept).any() else -torch.inf
    assert lowest > best_dropped - NEAR * scores.abs().max(), (
        f"{what} drops a token of score {float(best_dropped):.8g} and keeps one of {float(lowest):.8g}"
    )


def check_draws(case: Case, images: list, n_visual: list[int]) -> None:
    """Seeded draws: pictures of one size with one salt keep the same tokens, with different salts others."""
    if case.method.split(":")[0] != "random" or "+" in case.method or case.kind not in ("clip", "siglip"):
        return
    salts = case.salts or (0,) * len(images)
    seen: dict[int, list[int]] = {}
    for image, salt, n in zip(images, salts, n_visual, strict=True):
        kept = image.left(0).tolist()
        assert seen.setdefault(salt, kept) == kept, f"two pictures with salt {salt} keep different tokens"
        some = 2 < len(kept) < n - 2  # so many that chance does not draw them twice
        assert not some or all(s == salt or other != kept for s, other in seen.items()), "salts change nothing"


def check_choices(case: Case, line: Line) -> None:
    """Check the choices of one row of the first turn."""
    if case.kind not in tiny.TOWERS or case.dtype != "float64" or "+" in case.method:
        return
    name, options = case.method.split(":")[0], options_of(case.method)
    if name == "fastv":
        schedule = options.get("schedule", "single/1")  # 2 of 32 layers is 1 of 5, at least
        if not schedule.startswith("single") or float(options.get("uniform", 0)):
            return
        layer = int(options.get("layer", schedule.split("/")[1])) % 5
        scores = decoder_scores(case, line, layer - 1)
        for image, own in zip(line.images, scores, strict=True):
            if image.kept:
                check_choice(image.left(layer), own, case.method)
        return
    items = [int(item[1:]) for item in line.turns[0][1] if isinstance(item, str)]
    for image, number in zip(line.images, items, strict=True):
        scores = tower_scores(case.kind, case.method, number)
        if scores is not None and len(image.left(0)):
            check_choice(image.left(0), scores, case.method)
