"""Rows of families with M-RoPE as their processors make them, and what pruned models of them must compute."""

from __future__ import annotations

import tiny
import torch
import torch.nn.functional as F

ROWS = ((("image", 0),), (("image", 1), ("image", 2)), (("video", 0), ("image", 3)), ())
PICTURES = ((("image", 0),), (("image", 1), ("image", 2)), (("image", 3),), ())
VIDEOS = ((("video", 0),), (("video", 1), ("video", 0)), (("video", 1),), ())
MIXED = {kind: ROWS for kind in (*tiny.QWEN, "qwen3_5")}
DTYPE = torch.float64
BY_COLUMN = ("input_ids", "attention_mask", "mm_token_type_ids")


def model_of(kind, dtype=DTYPE):
    model = tiny.model(kind, "sdpa", dtype)
    if kind.endswith("moe"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model


def pictures_of(kind):
    """Rows that show pictures, and videos where both may be in a call."""
    return MIXED.get(kind, PICTURES)


def placeholder_of(kind, what):
    return tiny.VIDEO if what == "video" and kind not in tiny.GLM else tiny.IMAGE


def typed(kind, rows, inputs):
    """With the types of columns; a placeholder of GLM is of a video where there are only those."""
    shown = {what for parts in rows for what, _ in parts}
    return tiny.typed(kind, inputs, 2 if kind in tiny.GLM and shown == {"video"} else 1)


def row(kind, parts, seed=0, dtype=DTYPE):
    """One row as the processor makes it: pictures and videos in the order of the prompt, text around them."""
    generator = torch.Generator().manual_seed(10 + seed)

    def words(n):
        return torch.randint(3, 80, (n,), generator=generator).tolist()

    ids = [1, *words(2 + seed)]
    for what, number in parts:
        grid = (tiny.GRIDS if what == "image" else tiny.VIDEO_GRIDS)[number]
        frames = grid[0] if what == "video" and kind.startswith(("qwen3", "glm")) else 1
        placeholder = placeholder_of(kind, what)
        n = grid[0] * grid[1] * grid[2] // tiny.MERGED // frames
        for _ in range(frames):  # a timestamp before every frame
            ids += [*words(1), tiny.START, *[placeholder] * n, tiny.END]
        ids += words(2)
    ids += words(4 + seed)
    found = typed(kind, [parts], tiny.padded([ids]))
    images = [number for what, number in parts if what == "image"]
    videos = [number for what, number in parts if what == "video"]
    found |= tiny.pixels(kind, [images], dtype) if images else {}
    return found | (tiny.video_inputs(videos, dtype) if videos else {})


def batch(kind, rows=None, dtype=DTYPE):
    """The rows, left-padded."""
    rows = pictures_of(kind) if rows is None else rows
    singles = [row(kind, parts, seed, dtype) for seed, parts in enumerate(rows)]
    longest = max(single["input_ids"].shape[1] for single in singles)
    found = {}
    for name in dict.fromkeys(name for single in singles for name in single):
        parts = [single[name] for single in singles if name in single]
        if name in BY_COLUMN:
            parts = [F.pad(p, (longest - p.shape[1], 0)) for p in parts]
        found[name] = torch.cat(parts)
    return found, singles


def n_kept(kept):
    return [len(k) for k in kept]


def columns_kept(kind, inputs, kept, rows):
    """(B, S) bool: what stays, from what was kept of pictures and then of videos."""
    keep, ids = inputs["attention_mask"].bool().clone(), inputs["input_ids"]
    for what in ("image", "video"):
        own = [number for parts in rows for w, number in parts if w == what]
        sizes = [
            torch.tensor((tiny.GRIDS if what == "image" else tiny.VIDEO_GRIDS)[n]).prod().item() // tiny.MERGED
            for n in own
        ]
        mine, kept = kept[: len(own)], kept[len(own) :]
        flags = [torch.zeros(n, dtype=torch.bool).index_fill(0, k, True) for n, k in zip(sizes, mine, strict=True)]
        if flags:
            keep[ids == placeholder_of(kind, what)] = torch.cat(flags)
    return keep


@torch.no_grad()
def captured(model, inputs):
    """Positions that the bare model gives its language model."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen["position_ids"]


@torch.no_grad()
def short_greedy(model, single, keep, positions, n_new=6):
    """Logits of one row's kept columns, and greedy tokens, from the language model alone on the short sequence."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**single, use_cache=False)
    hook.remove()
    embeds, positions = seen["inputs_embeds"][:, keep], positions[..., keep]
    logits, tokens = [], []
    for _ in range(n_new):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        out = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
        )
        logits.append(model.lm_head(out.last_hidden_state)[0])
        last = logits[-1][-1].clone()
        last[tiny.SUPPRESSED] = -torch.inf
        tokens.append(int(last.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    return logits[0], tokens


@torch.no_grad()
def masked(model, inputs, keep, positions):
    """Logits of the bare model that does not see the dropped columns."""
    rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
    return model(**rest, attention_mask=keep.long(), position_ids=positions, use_cache=False).logits


@torch.no_grad()
def masked_greedy(model, inputs, keep, positions, n_new=6):
    """Greedy tokens that recompute everything at every step."""
    inputs, tokens = dict(inputs), []
    for _ in range(n_new):
        logits = masked(model, inputs, keep, positions)[:, -1]
        logits[:, tiny.SUPPRESSED] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, 1))
        keep, positions = F.pad(keep, (0, 1), value=True), torch.cat([positions, positions[..., -1:] + 1], -1)
    return torch.cat(tokens, 1)
