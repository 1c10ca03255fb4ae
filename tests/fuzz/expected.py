"""What a pruned model must compute and keep, worked out from the bare model. Nothing of tokprune is called here."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import oracle
import tiny
import torch
from fuzz.cases import Case, Row
from fuzz.methods import N_DECODER, options_of, parts_of, promises, takes_budget
from fuzz.prompts import Line, Shown, numbers, pixels_of
from torch import Tensor


@torch.no_grad()
def features_of(model, kind: str, row: Row, dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(N, D) of every picture and of every video of one row, from the bare model."""
    pixels = pixels_of(kind, [row], dtype)
    videos = pixels.pop("pixel_values_videos", None)
    whole = oracle.features_of(model, pixels) if pixels else None
    alone = len(numbers(row, "p")) == 1
    lengths = [tiny.n_rows(kind, i, alone) for i in numbers(row, "p")]
    pictures = [] if whole is None else list(whole.flatten(0, -2).split(lengths))
    if videos is None:
        return pictures, []
    read = {name: getattr(model.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    out = model.model.get_video_features(videos, **read)
    found = list(getattr(out, "pooler_output", out))
    newline = model.model.image_newline[None]  # transformers 4 joins it later
    return pictures, [f if len(f) % 9 else torch.cat([f, newline]) for f in found]


@torch.no_grad()
def embeds_of(model, case: Case, line: Line, dtype) -> Tensor:
    """(L, D) of one row with all its turns, every visual token in place."""
    ids = torch.tensor(line.ids)
    embeds = model.get_input_embeddings()(ids).clone()
    images = list(line.images)
    for _, row in line.turns:
        pictures, videos = features_of(model, case.kind, row, dtype)
        for item in (item for item in row if isinstance(item, str)):
            image = images.pop(0)
            rows = (videos if item[0] == "v" else pictures).pop(0)
            embeds[image.start : image.start + image.n] = rows.to(embeds.dtype)
    return embeds


def there(line: Line, layer: int) -> Tensor:
    """(L,) bool: columns of a row that a layer sees."""
    found = torch.ones(len(line.ids), dtype=torch.bool)
    for image in line.images:
        found[image.start : image.start + image.n] = False
        found[image.start + image.left(layer)] = True
    return found


@torch.no_grad()
def logits_of(model, case: Case, line: Line, dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(L, V) of the short sequence, and (L,) which columns are there to the end; the other rows are zero.

    No layer sees a column that left before it: the bare model runs without cache, on the columns that its first layer
    sees, and masks in every layer those that have left. A column that is gone sees itself: nothing is undefined.
    """
    columns = there(line, 0)
    embeds = embeds_of(model, case, line, dtype)[columns][None]
    n = embeds.shape[1]
    places = columns.nonzero()[:, 0] if case.positions == "original" else torch.arange(n)
    causal, eye = torch.ones(n, n, dtype=torch.bool).tril(), torch.eye(n, dtype=torch.bool)
    decoder, hooks = model.model.language_model, []
    for i, layer in enumerate(decoder.layers):
        mask = (causal & there(line, i)[columns] | eye)[None, None]
        if decoder.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min / 4)

        def masked(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        out = decoder(
            inputs_embeds=embeds,
            position_ids=places[None] + offset,
            attention_mask=torch.ones(1, n, dtype=torch.long),
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    found = model.lm_head(out.last_hidden_state)[0]
    logits = found.new_zeros(len(line.ids), found.shape[1])
    logits[columns] = found
    return logits, there(line, N_DECODER)


def filled(logits: Tensor, alive: Tensor, start: int) -> Tensor:
    """What stands in columns that left: the last one before them that did not, from a column on."""
    at = torch.where(alive, torch.arange(len(alive)), -1)
    at[:start] = -1
    return logits[at.cummax(0).values.clamp(min=0)], at.cummax(0).values >= 0


# ---------------------------------------------------------------------------------------- counts


def half_up(ratio: float, n: int) -> int:
    return int((Decimal(str(ratio)) * n).quantize(Decimal(1), ROUND_HALF_UP))


def of_budget(budget: dict, n: int) -> int | None:
    """Tokens of n that a budget keeps; None for FLOPs."""
    if "keep_tokens" in budget:
        return min(budget["keep_tokens"], n)
    if "keep_ratio" in budget:
        return min(n, max(1, half_up(budget["keep_ratio"], n)))
    return None


def budgets(case: Case) -> tuple[dict, dict]:
    """Of the method before the language model and of that between its layers; empty where it takes none."""
    before, between = (takes_budget(part) for part in parts_of(case.method))
    given = case.budget or {}
    if not (before and between):
        return given if before else {}, given if between else {}
    (name, value) = next(iter(given.items()))
    values = value if isinstance(value, list) else [value**0.5] * 2
    return {name: values[0]}, {name: values[1]}


def newlines_of(model, features: Tensor) -> Tensor:
    """(N,) bool: rows that are the model's newline."""
    newline = getattr(model.model, "image_newline", None)
    if newline is None:
        return torch.zeros(len(features), dtype=torch.bool)
    return (features == newline.to(features)).all(1)


def is_exact(part: str, budget: dict) -> bool:
    return promises(part) == "exact" and "flops_ratio" not in budget


def check_counts(case: Case, image: Shown, newline: Tensor, has_text_behind: bool) -> None:
    """Raise where an image keeps another number than promised, in any stage."""
    before, between = parts_of(case.method)
    first, second = budgets(case)
    n = int((~newline).sum())
    given = int((~newline[image.left(0)]).sum())
    left = int((~newline[image.left(N_DECODER)]).sum())
    if before is None:
        assert given == n, f"{given} of {n} tokens reach the language model, and nothing acts before it"
    elif before == "blind":
        assert given == 0, f"blind keeps {given}"
    else:
        check_number(before, first, n, given, "before the language model")
    if between is None:
        assert left == given, f"{given} tokens are given and {left} left, and nothing acts between layers"
    elif takes_budget(between):
        check_number(between, second, given, left, "between layers")
    else:
        check_unbudgeted(between, given, left, has_text_behind)


def check_number(part: str, budget: dict, n: int, found: int, where: str) -> None:
    promised = of_budget(budget, n) if budget else None
    said = f"{part} keeps {found} of {n} {where}, budget {budget}"
    if n and promised is not None and promised >= n:
        assert found == n, said
    elif promised is not None and is_exact(part, budget):
        assert found == promised, f"{said}, promised {promised}"
    elif promised is not None and promises(part) == "at most":
        assert 1 <= found <= promised, f"{said}, promised {promised} at most"
    elif "flops_ratio" in budget and promises(part) != "content":
        assert (0 < found < n) or n <= 1, said  # a part of the FLOPs is never all tokens
    else:
        assert 0 <= found <= n, said


def check_unbudgeted(part: str, given: int, left: int, has_text_behind: bool) -> None:
    """Exits leave all or nothing; counts of one's own are met."""
    name, schedule = part.split(":")[0], options_of(part).get("schedule", "")
    if name in ("dyvte", "visual_exit"):
        assert left in (0, given), f"{part} leaves {left} of {given}"
        if "layer" in options_of(part) and has_text_behind:
            assert left == 0, f"{part} leaves {left} of {given}"
        return
    if not schedule.startswith("layers/") or promises(part) == "content":
        assert left <= given, f"{part} leaves {left} of {given}"
        return
    values = [step.split("x")[1] for step in schedule.split("/")[1:]]
    if values[-1] == "0":
        values = values if has_text_behind else values[:-1]
    wanted = given
    for value in values:
        wanted = min(wanted, int(value) if value.isdigit() else max(1, half_up(float(value), given)))
    assert left == wanted, f"{part} leaves {left} of {given}, not {wanted}"


def check_newlines(case: Case, image: Shown, newline: Tensor) -> None:
    """Raise where newlines do not follow the policy; of stages that dropped something."""
    policy = case.newlines
    if policy == "auto":
        kept_all = {"globalcom2": "keep", "hired": "drop", "vidcom2": "keep"}
        before = parts_of(case.method)[0] or ""
        policy = kept_all.get(before.split(":")[0], "") if "faithful=true" in before else ""
        policy = policy or "keep_rows_with_tokens"
    ends = newline.nonzero()[:, 0].tolist()
    if not ends or case.method == "blind":
        return
    whole = len(ends) == 1 and ends[0] == len(newline) - 1 and len(newline) in (37, 28)  # one ends the whole picture
    starts = [0 if whole else 36, *(end + 1 for end in ends)]  # the thumbnail comes first
    for layer in sorted(image.kept):
        kept = set(image.kept[layer].tolist())
        if len(kept) == image.n or not any(i not in ends for i in kept):
            continue
        used = {end for start, end in zip(starts, ends, strict=False) if kept & set(range(start, end))}
        wanted = {"keep": set(ends), "drop": set(), "keep_rows_with_tokens": used}[policy]
        found = kept & set(ends)
        assert found == wanted, f"newlines {sorted(found)} of {ends} stay from layer {layer} on, not {sorted(wanted)}"
