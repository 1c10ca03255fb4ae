"""Drawings of what methods keep of a picture or a video, made by running a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokprune.integrations.transformers import family_of

import tokprune
from tokprune.core.errors import RunError
from tokprune.core.files import replacing, write_text
from tokprune.core.layout import Layout, Region
from tokprune.core.scores import Scored, listen
from tokprune.prune.explain import (
    dimmed,
    dimmed_frames,
    enlarged,
    frames_of,
    row_of,
    seen,
    side_by_side,
    stacked,
)
from tokprune.prune.report import ImageReport, Report
from tokprune.prune.saved import takes_budget
from tokprune.prune.videos import Clip

from ..run.runner import Runner
from . import drawing
from .drawing import Panel

FORMAT, VERSION = "tokprune-kept", 1
A_ROW = 4  # methods beside each other on a sheet
_ROUNDED = 1e-4  # of a row's length: what rounding alone may change in float32; in half precision it is more

Draw = Callable[[Image.Image, Region], Image.Image]


@dataclass(frozen=True, repr=False)
class Shown:
    """One method on one picture.

    Args:
        spec: the method as `attach` takes it.
        budget: as keywords of `attach`; empty for a method that takes none.
        kept: the entry of `attachment.kept`: indices, or indices by layer.
        report: of the call.
        answer: with these tokens; None where it was not asked for.
        merged: kept rows that the language model is given changed, mostly since others were merged into them.
        scores: of each row, from the first selection that ranks single tokens; empty where none does.
    """

    spec: str
    budget: dict[str, Any]
    kept: torch.Tensor | dict[int, torch.Tensor]
    report: Report
    answer: str | None = None
    merged: Sequence[int] = ()
    scores: Mapping[int, float] = field(default_factory=dict)

    @property
    def image(self) -> ImageReport:
        """The report of the picture."""
        (image,) = self.report.images
        return image

    @property
    def name(self) -> str:
        """Method and budget, as in tables."""
        return " ".join([self.spec, *(f"{value:g}" for value in self.budget.values())])

    def __repr__(self) -> str:
        answer = "" if self.answer is None else f", {self.answer!r}"
        return f"Shown({self.name}, {self.image.n_visual} -> {self.image.n_kept}{answer})"

    def to_dict(self) -> dict[str, Any]:
        """An entry of "methods" in `Explained.to_dict`."""
        image, layout = self.image, self.image.layout
        by_layer = isinstance(self.kept, dict)
        left = image.left.tolist()
        tokens = [i for i in left if layout.crop[i] >= 0]
        return {
            "spec": self.spec,
            "budget": self.budget,
            "report": str(self.report),
            "n_rows": len(layout.crop),
            "n_visual": image.n_visual,
            "n_kept": image.n_kept,
            "kept": {str(k): v.tolist() for k, v in self.kept.items()} if by_layer else self.kept.tolist(),
            "tokens": [
                {"index": i, "crop": layout.crop[i], "row": layout.row[i], "column": layout.column[i]} for i in tokens
            ],
            "newlines": [i for i in left if layout.crop[i] < 0],
            "grids": [[region.height, region.width] for region in layout.regions],
            "merged": list(self.merged),
            **({} if self.answer is None else {"answer": self.answer}),
            **({"scores": [self.scores.get(i) for i in range(len(layout.crop))]} if self.scores else {}),
        }


@dataclass(frozen=True, repr=False)
class Explained:
    """What methods keep of a picture, to draw, print or write.

    Args:
        picture: the original, a video for a clip.
        pixels: (crops, 3, H, W), the input of the model; None where it is given patches.
        runner: the model with its processor.
        shown: one entry for each method and budget.
        question: as asked.
        answer: of the unpruned model; None where it was not asked for.
        with_scores: whether a panel shows the scores of each method.
    """

    picture: Image.Image | Clip
    pixels: torch.Tensor | None
    runner: Runner
    shown: list[Shown]
    question: str = ""
    answer: str | None = None
    with_scores: bool = False

    @property
    def lines(self) -> list[str]:
        """The reports."""
        return [str(one.report) for one in self.shown]

    def __repr__(self) -> str:
        return "\n  ".join([f"Explained({self.question!r}, unpruned {self.answer!r})", *map(repr, self.shown)])

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.sheet().save(file, format="PNG")
        return file.getvalue()

    @property
    def answers(self) -> list[str]:
        """The question, and the answers without and with pruning, a line each; empty where they were not asked for."""
        if self.answer is None:
            return []
        lines = [f"question: {self.question}", f"unpruned: {self.answer}"]
        return lines + [f"{one.name}: {one.answer}{self._unlike(one)}" for one in self.shown]

    def _unlike(self, one: Shown) -> str:
        return "" if one.answer == self.answer else " (another answer)"

    def sheet(self, marks: bool = True) -> Image.Image:
        """The picture as the model sees it, and next to it what each method keeps; of a video frame by frame.

        Args:
            marks: whether crops are numbered and merged tokens framed.
        """
        first, *others = self._panels(marks)
        if isinstance(self.picture, Clip):
            return drawing.sheet([[panel] for panel in (first, *others) if panel])
        n_budgets = max((sum(other.spec == one.spec for other in self.shown) for one in self.shown), default=1)
        each = 1 + self.with_scores
        return drawing.sheet(drawing.in_rows(first, others, each * n_budgets if n_budgets > 1 else A_ROW))

    def panels(self) -> list[tuple[str, Image.Image]]:
        """The picture, and what each method keeps of it, with their titles and without marks."""
        return [(_title(None), self._drawn(self.shown[0]))] + [
            (_title(one), self._drawn(one, one.image.left)) for one in self.shown
        ]

    def _panels(self, marks: bool) -> list[Panel | None]:
        """The parts of `sheet`; None where there are no scores to show."""
        asked = [self.question] if self.question else []
        asked += [] if self.answer is None else [f"unpruned: {self.answer}"]
        label = self._label if marks else None
        found: list[Panel | None] = [Panel(_title(None), self._drawn(self.shown[0], draw=label), asked)]
        for one in self.shown:
            found.append(self._kept_panel(one, marks))
            found += [self._scores_panel(one) if one.scores else None] if self.with_scores else []
        return found

    def _kept_panel(self, one: Shown, marks: bool) -> Panel:
        said = [] if one.answer is None else [f"answer: {one.answer or '(empty)'}{self._unlike(one)}"]
        if one.merged:
            said.append(f"{len(one.merged)} of them hold merged tokens (framed)")
        if self.with_scores and not one.scores:
            said.append("it has no scores of single tokens")

        def draw(picture: Image.Image, region: Region) -> Image.Image:
            left = set(one.image.left.tolist())
            return drawing.framed(picture, region, [i for i in one.merged if i in left])

        drawn = self._drawn(one, one.image.left, draw if marks and one.merged else None)
        return Panel(_title(one), drawn, said, differs=one.answer != self.answer)

    def _scores_panel(self, one: Shown) -> Panel:
        ranks = drawing.ranks_of(one.scores)
        drawn = self._drawn(one, draw=lambda picture, region: drawing.heated(picture, region, ranks))
        return Panel(f"scores of {one.name}, by rank", drawn, ["dark blue: lowest; yellow: highest"])

    def _label(self, picture: Image.Image, region: Region) -> Image.Image:
        """With the numbers of crops; of frames, those of the steps of time in which they share tokens."""
        layout = self.shown[0].image.layout
        if not isinstance(self.picture, Clip):
            return drawing.labelled(picture, layout, region)
        picture = picture.copy()
        drawing.tag(ImageDraw.Draw(picture), (0, 0), f"{layout.crops.index(layout.crop[region.index[0]]) + 1}")
        return picture

    def _drawn(self, one: Shown, kept: torch.Tensor | None = None, draw: Draw | None = None) -> Image.Image:
        """The picture, dropped tokens dim unless `kept` is None, with what `draw` does to each region or frame."""
        layout = one.image.layout
        if isinstance(self.picture, Clip):
            frames = [enlarged(f, 112) for f in dimmed_frames(self.picture.frames, layout, kept)]
            tokens = frames_of(layout)
            per_step = -(-len(frames) // len(tokens))
            regions = [_region_of(layout, tokens[number // per_step]) for number in range(len(frames))]
            return row_of([draw(*pair) if draw else pair[0] for pair in zip(frames, regions, strict=True)])
        order = list(dict.fromkeys(crop for crop in layout.crop if crop >= 0))
        whole = self._whole(order, self.picture)
        if (kept is not None or draw) and len(order) == 1 and self.pixels is not None:
            whole = _covered(whole, layout, self._patch)
        parts = [whole, self.picture][: len(layout.regions)] if 0 in layout.crops else [self.picture]
        if kept is not None:
            parts = [dimmed(p, layout, kept, region=r) for p, r in zip(parts, layout.regions, strict=True)]
        parts = _as_wide(list(map(enlarged, parts)))
        parts = [draw(*pair) if draw else pair[0] for pair in zip(parts, layout.regions, strict=False)]
        return parts[0] if len(parts) == 1 else stacked(*parts)

    def animation(self) -> list[Image.Image]:
        """For every frame of a video what `sheet` shows of a picture.

        Raises:
            RunError: it is a picture.
        """
        films = self._films(self._clip)
        moments = zip(*(frames for _, frames in films), strict=True)
        titles = [title for title, _ in films]
        return [side_by_side(list(zip(titles, map(enlarged, moment), strict=True))) for moment in moments]

    def write_animation(self, path: Path) -> int:
        """`animation` as a GIF at the speed of the video; gives the number of frames.

        Raises:
            RunError: it is a picture.
            OSError: it cannot be written.
        """
        first, *others = self.animation()
        with replacing(path) as new:
            duration = 1000 / self._clip.fps
            first.save(new, format="GIF", save_all=True, append_images=others, loop=0, duration=duration)
        return 1 + len(others)

    @property
    def _clip(self) -> Clip:
        if not isinstance(self.picture, Clip):
            raise RunError("only a video can be animated; leave --animation out, or name a video")
        return self.picture

    def _films(self, clip: Clip) -> list[tuple[str, list[Image.Image]]]:
        """The frames of a video, and those that show what each method keeps, with their titles."""
        films = [(_title(None), list(clip.frames))]
        films += [(_title(one), dimmed_frames(clip.frames, one.image.layout, one.image.left)) for one in self.shown]
        return films

    @property
    def _patch(self) -> int:
        """Pixels a side of a patch."""
        patch = self.runner.model.config.vision_config.patch_size
        return patch if isinstance(patch, int) else patch[0]

    def _whole(self, order: Sequence[int], picture: Image.Image) -> Image.Image:
        """The thumbnail or only crop; a model that is given patches sees the picture itself."""
        if self.pixels is None:
            return picture
        processor = self.runner.processor.image_processor
        return seen(self.pixels[order.index(0) if 0 in order else 0], processor.image_mean, processor.image_std)

    def to_dict(self, **asked: Any) -> dict[str, Any]:
        """Plain numbers, lists and text. `asked` adds entries such as the picture, the question and the model.

        For each method:

        - `spec`, `budget`: as `attach` takes them; `report`: as text.
        - `n_rows`: placeholders of the picture. `n_visual` of them show a patch, and `n_kept` of those are left at the
          end.
        - `kept`: indices among the placeholders, from 0, with rows that show no patch. For methods that cut between
          decoder layers, an object: for each layer what is left from there on, 0 for before the first layer.
        - `tokens`: those left at the end, with index, crop, row and column as in `Layout`. Crop 0 is the thumbnail or
          the only crop; rows and columns of other crops count in their mosaic.
        - `newlines`: indices of the rows left at the end that show no patch.
        - `grids`: rows and columns of the thumbnail or only crop, then of the mosaic, if they exist.
        - `merged`: kept indices into which others were merged before the language model.
        - `answer`: with these tokens; `answer` beside `methods` is that of the unpruned model. Both may be absent.
        - `scores`: of every placeholder, null where it has none; absent unless they were asked for and exist.

        What was kept can be replayed on the same prompt, unless the method merges tokens:

            kept = values["methods"][0]["kept"]
            if isinstance(kept, dict):
                replay = {int(layer): torch.tensor(rows, dtype=torch.int64) for layer, rows in kept.items()}
            else:
                replay = torch.tensor(kept, dtype=torch.int64)
            tokprune.attach(model, values["methods"][0]["spec"], replay=[replay])
        """
        answer = {} if self.answer is None else {"answer": self.answer}
        methods = [one.to_dict() for one in self.shown]
        return {"format": FORMAT, "format_version": VERSION, **asked, **answer, "methods": methods}

    def write_json(self, path: Path, **asked: Any) -> None:
        """Write `to_dict` to a file, complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(**asked), indent=1) + "\n")


Methods = Sequence[tuple[str, dict[str, Any]]]


def with_ratios(specs: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with their budgets: each at every ratio, once where it takes none."""
    each: list[dict[str, Any]] = [{"keep_ratio": ratio} for ratio in dict.fromkeys(ratios)]
    return [(spec, budget) for spec in specs for budget in (each if takes_budget(spec) else [{}])]


@torch.no_grad()
def asked(
    runner: Runner,
    picture: Image.Image | Clip,
    question: str,
    methods: Methods,
    salt: int = 0,
    answers: bool = False,
    scores: bool = False,
) -> Explained:
    """What each method with its budget keeps of a picture or video with a question.

    Args:
        runner: a model.
        picture: what is asked about.
        question: as asked.
        methods: with their budgets.
        salt: mixed in by seeded methods: a run has one for each question, see `tokprune.Attachment.salts`.
        answers: whether the model answers, without pruning and with each method.
        scores: whether methods' scores are kept and drawn.
    """
    inputs = runner.inputs([question], [picture])
    merges = any(_merges(spec) for spec, _ in methods)
    bare = _entering(runner.model, inputs) if merges else None
    bare_answer = _answer(runner, inputs) if answers else None
    shown = []
    for spec, budget in methods:
        with tokprune.attach(runner.model, spec, **budget) as attachment:
            attachment.salts = [salt]
            with listen() as scored:
                entered = _entering(runner.model, inputs)
            (kept,), report = attachment.kept, attachment.report
            (image,) = report.images
            merged = _changed(runner, inputs, image, bare, entered) if bare is not None and _merges(spec) else ()
            answer = _answer(runner, inputs) if answers else None
            found = _scores(scored, image.layout) if scores else {}
            shown.append(Shown(spec, budget, kept, report, answer, merged, found))
    pixels = inputs.get("pixel_values")
    crops = None if pixels is None or pixels.ndim < 4 else pixels.flatten(0, -4)
    return Explained(picture, crops, runner, shown, question, bare_answer, scores)


def usual_method(model: Any) -> str:
    """The method to begin with: vtc_cls, or fopru where the vision tower has no [CLS] token."""
    return "vtc_cls" if family_of(model).tower.has_cls else "fopru"


def _merges(spec: str) -> bool:
    """Whether a method merges tokens before the language model."""
    before = tokprune.get_method(spec).stages[0]
    return before is not None and not all(part.keeps_features for part in before.members)


def _entering(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
    """(S, D): what the first decoder layer is given of one prompt."""
    found: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].float())

    hook = family_of(model).language_model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return found[0]


def _changed(
    runner: Runner, inputs: Any, image: ImageReport, before: torch.Tensor, after: torch.Tensor
) -> tuple[int, ...]:
    """Kept tokens that the language model is not given as they were, at their own place or at another's.

    Where [CLS] has the place of a token, that token is among them.

    Args:
        runner: the model.
        inputs: of one prompt with one picture.
        image: its report.
        before: (S, D), what the first decoder layer is given without pruning.
        after: (K, D), with it.
    """
    place = runner.placeholders(inputs["input_ids"][0])
    stays = torch.ones_like(place)
    if int(place.sum()) != len(image.keep):
        return ()
    stays[place] = image.keep.to(place.device)
    if len(after) != int(stays.sum()):
        return ()
    own, given = before[place], after[place[stays]]
    rounded = max(_ROUNDED, torch.finfo(runner.model.dtype).eps)
    same = torch.cdist(given, own, compute_mode="donot_use_mm_for_euclid_dist") <= rounded * own.norm(dim=1)
    there = set(same.any(0).nonzero()[:, 0].tolist())
    return tuple(i for i in image.kept.tolist() if i not in there)


def _answer(runner: Runner, inputs: Any) -> str:
    out = runner.model.generate(**inputs, max_new_tokens=runner.max_new_tokens, do_sample=False)
    (text,) = runner.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def _scores(found: Sequence[Scored], layout: Layout) -> dict[int, float]:
    """Of the first selection, by row; empty where no tokens were ranked."""
    if not found:
        return {}
    index = layout.visual if found[0].index is None else found[0].index[0].tolist()
    return dict(zip(index, found[0].scores[0].float().tolist(), strict=True))


def explained(
    runner: Runner, picture: Image.Image | Clip, question: str, methods: Methods, marks: bool = True
) -> tuple[Image.Image, list[str]]:
    """`Explained.sheet` and `Explained.lines` of a picture with a question."""
    found = asked(runner, picture, question, methods, answers=True)
    return found.sheet(marks), found.lines


def _title(one: Shown | None) -> str:
    return f"{one.name}: {one.image.n_visual} -> {one.image.n_kept}" if one else "as the model sees it"


def _region_of(layout: Layout, tokens: tuple[int, ...]) -> Region:
    """The grid of one frame."""
    n_columns = 1 + max(layout.column[i] for i in tokens)
    return Region(len(tokens) // n_columns, n_columns, tokens)


def _as_wide(parts: list[Image.Image]) -> list[Image.Image]:
    """All as wide as the widest."""
    width = max(p.width for p in parts)
    return [p.resize((width, p.height * width // p.width), Image.Resampling.NEAREST) for p in parts]


def _covered(whole: Image.Image, layout: Layout, patch: int) -> Image.Image:
    """Without the pixels at the end of a side that no token shows, if the side is no multiple of the patch."""
    cell = patch * max(1, whole.width // patch // layout.width)  # a token may show several patches
    return whole.crop((0, 0, layout.width * cell, layout.height * cell))
