"""A case, drawn from a seed: model, method, budget, batch, and a way of calling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

import tiny
from fuzz.methods import draw_method, parts_of, sometimes, takes_budget, with_options

Row = tuple[int | str, ...]  # an int is so many words, "p3" picture 3, "v1" video 1
N_FRAMES = 3


@dataclass(frozen=True)
class Case:
    """Everything that a case is made of; its repr is code.

    Args:
        rows: of the batch; `texts` seeds the words of each.
        side: where shorter rows are padded.
        way: of calling, a name in `calls.WAYS`; `how` are its options.
        around: what happens around the call, a name in `laws.AROUND`.
        salts: of every image of the first turn, or None.
    """

    seed: int = 0
    kind: str = "clip"
    dtype: str = "float64"
    attn: str = "sdpa"
    method: str = "vtc_cls"
    budget: dict | None = None
    positions: str = "auto"
    newlines: str = "auto"
    rows: tuple[Row, ...] = ((2, "p0", 4),)
    texts: tuple[int, ...] = (0,)
    side: str = "left"
    way: str = "forward"
    how: dict | None = None
    around: str = "nothing"
    salts: tuple[int, ...] | None = None

    def __repr__(self):
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(given)})"


def draw(seed: int) -> Case:
    """The case of a seed."""
    random = Random(seed)
    kind = random.choice(tiny.KINDS)
    dtype = random.choices(("float64", "float32", "bfloat16"), (75, 17, 8))[0]
    attn = random.choices(("sdpa", "eager"), (75, 25))[0]
    method = draw_method(random, kind)
    if sometimes(random, 0.08):  # what these choose is known without the library
        kind, dtype = random.choice(("clip", "clip", "siglip")), "float64"
        method = with_options(random, random.choice(("fastervlm", "fastv", "fopru", "vtc_cls")), kind)
    way, how = draw_way(random)
    single = way == "lookup" or (way == "turns" and how.get("generate") and not how.get("padded"))
    side = random.choices(("left", "right"), (70, 30))[0]
    if way in ("generate", "lookup") or how.get("generate"):
        side = "left"
    if way == "by_hand" and side == "right":
        how["numbered"] = True
    rows = draw_rows(random, kind, single)
    texts = tuple(random.randrange(1000) for _ in rows)
    if way == "lookup":
        texts = (-1,)
    if len(rows) > 1 and sometimes(random, 0.15):  # equal rows
        rows, texts = (rows[0],) * len(rows), (texts[0],) * len(rows)
    n_images = sum(isinstance(item, str) for row in rows for item in row)
    if n_images == 0 and not sometimes(random, 0.3):
        rows = ((*rows[0], "p0", 2), *rows[1:])
        n_images = 1
    salts = tuple(random.randrange(3) for _ in range(n_images)) if n_images and sometimes(random, 0.2) else None
    around = random.choices(
        ("nothing", "paused", "nested", "reattached", "failed", "abandoned", "thread", "compiled", "replaced"),
        (690, 70, 60, 40, 40, 40, 40, 4, 16),
    )[0]
    if around in ("nested", "failed", "abandoned") or way == "turns":
        salts = None  # they are one a picture, and other calls show others
    if around == "replaced" and how:
        how = {**how, "states": False}  # transformers hooks layers when it first hands states out, not later ones
    return Case(
        seed=seed,
        kind=kind,
        dtype=dtype,
        attn=attn,
        method=method,
        budget=draw_budget(random, method),
        positions=random.choice(("auto", "contiguous", "original")),
        newlines=random.choice(("auto", "auto", "keep_rows_with_tokens", "keep", "drop")),
        rows=rows,
        texts=texts,
        side=side,
        way=way,
        how=how,
        around=around,
        salts=salts,
    )


def draw_budget(random: Random, method: str) -> dict:
    before, between = parts_of(method)
    n = takes_budget(before) + takes_budget(between)
    if not n:
        return {}
    ratio = lambda: random.choice((0.05, 0.11, 0.25, 0.3, 0.5, 0.5, 0.77, 0.97, 1.0))  # noqa: E731
    what = random.choices(("keep_ratio", "keep_tokens", "flops_ratio"), (60, 30, 10))[0]
    if n == 2:
        if what == "keep_tokens":
            return {what: sorted((random.choice((1, 3, 9, 20, 30)) for _ in range(2)), reverse=True)}
        return {"keep_ratio": ratio() if sometimes(random) else [ratio(), ratio()]}
    if what == "keep_tokens":
        return {what: random.choice((1, 1, 2, 5, 9, 15, 16, 35, 36, 60, 10_000))}
    if what == "flops_ratio":
        scope = random.choice(("llm", "llm", "prefill"))
        return {what: random.choice((0.8, 0.9, 0.95)), "flops_scope": scope, "flops_text": random.choice((0, 16, 64))}
    return {what: ratio()}


def draw_rows(random: Random, kind: str, single: bool) -> tuple[Row, ...]:
    n_rows = 1 if single else random.choices((1, 2, 3), (35, 35, 30))[0]
    return tuple(draw_row(random, kind) for _ in range(n_rows))


def draw_row(random: Random, kind: str) -> Row:
    """Words and pictures in turn; either may be missing at both ends, and words between pictures."""
    n_images = random.choices((0, 1, 2, 3), (15, 50, 23, 12))[0]
    words = lambda: random.choices((1, 3, random.randint(2, 12), 60, 300), (25, 40, 31, 3, 1))[0]  # noqa: E731
    row: list[int | str] = [] if n_images and sometimes(random, 0.2) else [words()]
    for i in range(n_images):
        video = kind == "llava_onevision" and sometimes(random, 0.25)
        row.append(f"{'v' if video else 'p'}{random.randrange(5)}")
        last = i == n_images - 1
        # InternVL reads off runs of placeholders which tiles make up an image.
        apart = not last and kind == "internvl"
        if apart or not sometimes(random, 0.12):
            row.append(words())
    return tuple(row)


def draw_way(random: Random) -> tuple[str, dict]:
    way = random.choices(("forward", "generate", "lookup", "turns", "by_hand", "merged"), (38, 30, 5, 14, 8, 5))[0]
    if way == "forward":
        how = {
            "mask": random.random() < 0.8,
            "cache": random.choice(("default", "default", "off", "on", "empty")),
            "logits": random.choice((0, 0, 0, 1, 3, "all", "list")),
            "embeds": sometimes(random, 0.15),
            "states": sometimes(random, 0.15),
            "numbered": sometimes(random, 0.3),
        }
    elif way == "generate":
        how = {
            "mode": random.choice(
                ("greedy", "greedy", "beams", "sample", "several", "sampled beams", "uncached", "chunked", "stopping")
            ),
            "embeds": sometimes(random, 0.12),
            "n_new": random.choice((1, 3, 5)),
        }
    elif way == "turns":
        how = {
            "generate": sometimes(random, 0.5),
            "all_ids": sometimes(random, 0.5),
            "padded": sometimes(random, 0.4),
            "more": random.choice((((3,),), ((2, "p4", 3),), ((1,), ("p2", 2)), ((3,), (1,)))),
        }
    elif way == "by_hand":
        how = {"mask": sometimes(random, 0.6), "numbered": sometimes(random, 0.3), "pause": sometimes(random, 0.3)}
    elif way == "merged":
        how = {"via": random.choice(("embeds", "outputs"))}
    else:
        how = {}
    return way, {key: value for key, value in how.items() if value or key in ("mask", "cache")}
