"""Ways of calling a model with a case's batch; each tells logits by row and column."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from fuzz.cases import Case
from fuzz.prompts import Batch, Line, counted
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList


@dataclass
class Told:
    """What a call said about one row: logits (n, V) at columns of its ids."""

    row: int
    line: Line
    at: list[int]
    logits: Tensor
    offset: int = 0  # position of the first column
    score: float | None = None  # of a beam: mean log-probability of its new tokens
    n_new: int = 0


class Widths:
    """Columns that the decoder layers really saw, by pass."""

    def __init__(self, model):
        self.passes: list[list[int]] = []
        layers = model.model.language_model.layers
        self.hooks = []
        for i, layer in enumerate(layers):
            self.hooks.append(layer.register_forward_pre_hook(self._hook(i), with_kwargs=True))

    def _hook(self, i: int):
        def note(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if i == 0:
                self.passes.append([])
            self.passes[-1].append(hidden.shape[1])

        return note

    def remove(self):
        for hook in self.hooks:
            hook.remove()


@dataclass
class Turn:
    """The prefill of one turn: what was reported about it and what layers saw."""

    batch: Batch
    lines: list[Line]
    kept: list[Any]
    report: dict[str, Any]
    extra: int | None
    widths: list[int]
    n_cached: list[int] | None


@dataclass
class Run:
    """One call of a case on a model, with an attachment or without."""

    case: Case
    model: Any
    batch: Batch
    attachment: Any = None
    told: list[Told] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    widths: Any = None
    lines: list[Line] = field(default_factory=list)
    first: int = 0  # where the batch is one row of a larger one: which

    def go(self) -> Run:
        self.lines = copy.deepcopy(self.batch.lines)
        self.widths = Widths(self.model)
        torch.manual_seed(self.case.seed)
        try:
            with torch.no_grad():
                WAYS[self.case.way](self, **(self.case.how or {}))
        finally:
            self.widths.remove()
        return self

    def note(self, batch: Batch, lines: list[Line], at: int, cache=None, extra: int | None = 0) -> None:
        """After the prefill of a turn: what was kept, into the pictures of its lines.

        Args:
            batch, lines: of the turn alone.
            at: number of its first pass.
            cache: behind that pass alone, or None.
            extra: tokens of the turn before that it passes again; None where that is not known.
        """
        if self.attachment is None:
            return
        kept = self.attachment.kept
        every = [image for line in lines for image in line.images]
        images = [i for i in every if not i.video] + [i for i in every if i.video]
        assert len(kept) == len(images), f"kept is of {len(kept)} pictures, the prompt shows {len(images)}"
        for image, found in zip(images, kept, strict=True):
            image.kept = found if isinstance(found, dict) else {0: found}
        lengths = None if cache is None else [layer.get_seq_length() for layer in cache.layers]
        numbers = self.attachment.report.to_dict()
        self.turns.append(Turn(batch, copy.deepcopy(lines), kept, numbers, extra, self.widths.passes[at], lengths))

    def tell(self, batch: Batch, lines: list[Line], logits: Tensor, columns: list[int], numbered: bool) -> None:
        """Logits (B, n, V) at columns of a batch, the last turn of the lines; numbered rows begin at position 0."""
        for r, line in enumerate(lines):
            start, n = batch.start(r), len(batch.lines[r].ids)
            inside = [(i, c - start) for i, c in enumerate(columns) if start <= c < start + n]
            before = len(line.ids) - n
            picked = logits[r, [i for i, _ in inside]]
            offset = 0 if numbered else start
            self.told.append(Told(r, copy.deepcopy(line), [before + c for _, c in inside], picked, offset))


def cache_in(out) -> Any:
    return out[tiny.CACHE]


def empty_cache(model) -> Any:
    return DynamicCache(config=model.config.get_text_config())


# ---------------------------------------------------------------------------------------- one forward pass


def forward(run, mask=True, cache="default", logits=0, embeds=False, states=False, numbered=False) -> None:
    batch, model, inputs = run.batch, run.model, run.batch.inputs()
    options: dict[str, Any] = {}
    if numbered:
        options["position_ids"] = counted(inputs["attention_mask"])
    if not mask and not batch.is_padded:
        del inputs["attention_mask"]
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    if cache in ("on", "off"):
        options["use_cache"] = cache == "on"
    if cache == "empty":
        options |= tiny.cached(empty_cache(model))
    columns = list(range(batch.width))
    if logits == "list":
        columns = sorted({batch.width - 1, batch.width // 2, 0})
        options["logits_to_keep"] = torch.tensor(columns)
    elif logits:
        n = batch.width if logits == "all" else min(logits, batch.width)
        columns, options["logits_to_keep"] = columns[-n:], n
    if states:
        options["output_hidden_states"] = True
    out = model(**inputs, **options)
    assert out.logits.shape[:2] == (len(batch.rows), len(columns)), f"logits are {tuple(out.logits.shape)}"
    if states:
        assert len(out.hidden_states) == 6
    used = cache_in(out) if cache != "off" else None
    run.note(batch, run.lines, len(run.widths.passes) - 1, used)
    run.tell(batch, run.lines, out.logits, columns, numbered)


def merged(run, via="embeds") -> None:
    """Pictures encoded and merged by hand."""
    batch, model, inputs = run.batch, run.model, run.batch.inputs()
    ids = inputs.pop("input_ids")
    pixels = {k: v for k, v in inputs.items() if k != "attention_mask"}
    videos = pixels.pop("pixel_values_videos", None)
    found = {}
    if pixels:
        found["image"] = model.model.get_image_features(**pixels)
    if videos is not None:
        found["video"] = model.model.get_video_features(pixel_values_videos=videos)
    if via == "outputs":
        out = model(input_ids=ids, attention_mask=inputs["attention_mask"], mm_encoder_outputs=found)
    else:
        embeds = model.get_input_embeddings()(ids)
        for name, placeholder in (("image", tiny.IMAGE), ("video", tiny.VIDEO)):
            if name in found:
                rows = torch.cat(list(found[name].pooler_output)).flatten(0, -2).to(embeds)
                embeds = embeds.masked_scatter((ids == placeholder)[..., None].expand_as(embeds), rows)
        out = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    run.note(batch, run.lines, len(run.widths.passes) - 1)
    run.tell(batch, run.lines, out.logits, list(range(batch.width)), False)


# ---------------------------------------------------------------------------------------- generate


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "uncached": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 24},
    "stopping": {},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def options_for(run: Run, mode: str, n_new: int, ids: Tensor) -> dict[str, Any]:
    options = {"do_sample": False, "max_new_tokens": n_new, "suppress_tokens": tiny.SUPPRESSED, **MODES[mode]}
    options |= {"return_dict_in_generate": True, "output_logits": "beams" not in mode, "output_scores": "beams" in mode}
    if mode == "stopping":
        options["stopping_criteria"] = StoppingCriteriaList([stop_at(ids, 2)])
    return options


def stop_at(prompt: Tensor, n_new: int) -> Callable:
    """Stops all rows; sees the user's ids, not shorter ones."""

    def stop(ids, scores, **ignored):
        n = prompt.shape[1]
        assert ids.shape[1] > n, f"a stopping criterion sees {ids.shape[1]} ids of {n} and new ones"
        assert torch.equal(ids[:, :n], prompt), "a stopping criterion sees other ids"
        return torch.full((len(ids),), ids.shape[1] >= n + n_new)

    return stop


def generate(run, mode="greedy", n_new=3, embeds=False) -> None:
    batch, model, inputs = run.batch, run.model, run.batch.inputs()
    ids, width = inputs["input_ids"], batch.width
    options = options_for(run, mode, n_new, ids)
    if embeds and mode != "stopping":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        width = 0
    out = model.generate(**inputs, **options)
    run.note(batch, run.lines, 0)
    tell_new(run, run.lines, out, width, mode)


def tell_new(run: Run, lines: list[Line], out, width: int, mode: str) -> None:
    """New tokens of every sequence, and the logits that they were drawn from."""
    sequences = out.sequences[:, width:]
    each = len(sequences) // len(lines)
    for s, new in enumerate(sequences.tolist()):
        line = copy.deepcopy(lines[s // each])
        n = len(line.ids)
        line.ids += new
        at = list(range(n - 1, n - 1 + len(new)))
        if "beams" in mode:
            score = float(out.sequences_scores[s])
            run.told.append(Told(s // each, line, at, torch.empty(0), 0, score, len(new)))
            continue
        logits = torch.stack([step[s] for step in out.logits[: len(new)]])
        greedy = mode not in ("sample", "several")
        if greedy:
            best = logits.float().clone()
            best[:, tiny.SUPPRESSED] = -torch.inf
            assert best.argmax(1).tolist() == new, "a greedy token is not the most probable one"
        run.told.append(Told(s // each, line, at, logits, n_new=len(new)))


def lookup(run) -> None:
    generate(run, "lookup", 6)


# ---------------------------------------------------------------------------------------- several turns


def second_batch(run: Run, number: int, rows: list, padded: bool) -> Batch:
    """The next turn of every row; with `padded` rows differ in length."""
    given = tuple((*rows[0], run.first + r + 1) if padded else rows[0] for r in range(len(run.batch.rows)))
    texts = tuple(text + 1000 * (number + 1) for text in run.batch.texts)
    return Batch(run.batch.kind, run.batch.dtype, given, texts, run.batch.side)


def turns(run, more=((3,),), padded=False, all_ids=False, **ways) -> None:
    if ways.get("generate"):
        return turns_of_generate(run, more, padded, all_ids)
    batch, model, lines = run.batch, run.model, run.lines
    mask, cache = batch.mask(), None
    for number in range(len(more) + 1):
        at = len(run.widths.passes)
        if number:
            batch = second_batch(run, number, [more[number - 1]], padded)
            mask = torch.cat([mask, batch.mask()], 1)
            fresh = copy.deepcopy(batch.lines)
        else:
            fresh = lines
        places = counted(mask)[:, -batch.width :]
        inputs = {"input_ids": batch.ids(), "attention_mask": mask, "position_ids": places, **batch.pixels()}
        out = model(**inputs, **(tiny.cached(cache) if cache is not None else {}), use_cache=True)
        cache = cache_in(out)
        if not number or any(line.images for line in fresh):
            run.note(batch, fresh, at)
        lines = [line.then(new) for line, new in zip(lines, fresh, strict=True)] if number else fresh
        run.tell(batch, lines, out.logits, list(range(batch.width)), True)
    return None


def turns_of_generate(run: Run, more, padded: bool, all_ids: bool) -> None:
    batch, model, lines, fresh = run.batch, run.model, run.lines, run.lines
    mask, ids, inputs, cache = batch.mask(), batch.ids(), batch.inputs(), None
    for number in range(len(more) + 1):
        at, width = len(run.widths.passes), inputs["input_ids"].shape[1]
        options = options_for(run, "greedy", 3, ids)
        out = model.generate(**inputs, **options, **(tiny.cached(cache) if cache is not None else {}))
        if not number:
            run.note(batch, fresh, at)
        elif any(line.images for line in fresh):
            run.note(batch, fresh, at, extra=None if all_ids else 1)
        lines = [line.then(new) for line, new in zip(lines, fresh, strict=True)] if number else fresh
        tell_new(run, lines, out, width, "greedy")
        if number == len(more):
            return
        lines = [told.line for told in run.told[-len(lines) :]]
        cache, new = cache_in(out), out.sequences[:, width:]
        batch = second_batch(run, number + 1, [more[number]], padded)
        fresh, ids = copy.deepcopy(batch.lines), torch.cat([ids, new], 1)
        mask = torch.cat([mask, torch.ones_like(new), batch.mask()], 1)
        passed = torch.cat([ids if all_ids else ids[:, -1:], batch.ids()], 1)
        ids = torch.cat([ids, batch.ids()], 1)
        inputs = {"input_ids": passed, "attention_mask": mask, **batch.pixels()}


# ---------------------------------------------------------------------------------------- decoding by hand


def by_hand(run, mask=True, numbered=False, pause=False) -> None:
    batch, model, lines = run.batch, run.model, run.lines
    whole, inputs = batch.mask(), batch.inputs()
    given = mask or batch.is_padded
    if not given:
        del inputs["attention_mask"]
    options = {"position_ids": counted(whole)} if numbered else {}
    out = model(**inputs, **options, use_cache=True)
    run.note(batch, lines, 0, cache_in(out))
    ends = [batch.start(r) + len(line.ids) - 1 for r, line in enumerate(lines)]
    logits = out.logits[torch.arange(len(ends)), ends]
    for r, line in enumerate(lines):
        offset = 0 if numbered else batch.start(r)
        run.told.append(Told(r, copy.deepcopy(line), [len(line.ids) - 1], logits[r : r + 1], offset))
    for step in range(3):
        best = logits.clone()
        best[:, tiny.SUPPRESSED] = -torch.inf
        new = best.argmax(1)
        whole = torch.cat([whole, torch.ones(len(new), 1).long()], 1)
        options = {"attention_mask": whole} if given else {}
        if numbered:
            options["position_ids"] = counted(whole)[:, -1:]
        pausing = pause and step == 1 and run.attachment is not None
        with run.attachment.paused() if pausing else contextlib.nullcontext():
            out = model(input_ids=new[:, None], **tiny.cached(cache_in(out)), **options, use_cache=True)
        logits = out.logits[:, -1]
        for r, line in enumerate(lines):
            line.ids.append(int(new[r]))
            offset = 0 if numbered else batch.start(r)
            run.told.append(Told(r, copy.deepcopy(line), [len(line.ids) - 1], logits[r : r + 1], offset))


WAYS: dict[str, Callable] = {
    "forward": forward,
    "merged": merged,
    "generate": generate,
    "lookup": lookup,
    "turns": turns,
    "by_hand": by_hand,
}
