"""The command that draws what methods keep of a picture or a video, and what the model then answers."""

from __future__ import annotations

import contextlib
import itertools
import json as json_
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import RunError
from ..core.files import replacing, write_text
from ..prune.estimate import with_budget
from ..prune.saved import is_saved, takes_budget
from .arguments import App, check_least, names, ratios, saved_folders
from .extras import eval_module, load_runner
from .options import (
    METHODS,
    OUTPUT,
    QUESTIONS,
    Attn,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Saved,
    option,
)

app = App()


@app.command(no_args_is_help=True, short_help="Draw which visual tokens a method keeps.")
def explain(
    images: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of frames.")],
    model: Model = "tiny-llava",
    dtype: Dtype = "",
    attn: Attn = "",
    device: Device = "",
    method: Annotated[
        list[str] | None,
        option(
            METHODS,
            "Name, specification or ./file.py:Class; repeatable, or separated by commas. Default: vtc_cls, or fopru "
            "where the vision tower has no [CLS] token.",
            "--method",
            "--methods",
        ),
    ] = None,
    config: Saved = None,
    keep: Annotated[
        str, option(METHODS, "Fractions of the visual tokens to keep, separated by commas. Default: 0.25.")
    ] = "",
    question: Annotated[str, option(QUESTIONS, "The question to ask about the picture.")] = "what is in the image?",
    max_new_tokens: MaxNewTokens = 8,
    frames: Annotated[int, option(QUESTIONS, "Frames to take of a video, evenly spaced.", min=1)] = 8,
    scores: Annotated[
        bool, option(OUTPUT, "Show the scores of methods that rank single tokens, as colours.", "--scores")
    ] = False,
    out: Annotated[Path | None, option(OUTPUT, "The PNG to write. Default: kept.png, unless --json is given.")] = None,
    json: Annotated[Path | None, option(OUTPUT, "The JSON file to write, with indices of kept tokens.")] = None,
    animation: Annotated[Path | None, option(OUTPUT, "The GIF to write, for a video.")] = None,
) -> None:
    """Draw which visual tokens a method keeps, and show what the model answers with and without the others.

    Kept tokens are bright, dropped ones dim; those into which others were merged have a frame. Several methods,
    ratios and pictures share one sheet.

    Example: tokprune explain docs/scene.png --method vtc_cls,fopru --keep 0.5,0.1 --question "is there a red ring?"
    """
    from ..prune.pictures import open_picture
    from ..prune.videos import is_video, open_clip

    explained = eval_module("report.explained", needs=())
    out = Path("kept.png") if out is None and json is None and animation is None else out
    named = {("the picture" if len(images) == 1 else f"picture {i}"): path for i, path in enumerate(images, 1)}
    _check_apart(named, {"--out": out, "--json": json, "--animation": animation})
    check_least(max_new_tokens=max_new_tokens)
    chosen = [*names(",".join(method or ())), *saved_folders(config)]
    each = _ratios(chosen, keep)
    configurations = explained.with_ratios(chosen, each)
    shown = [open_clip(path, frames) if is_video(path) else open_picture(path) for path in images]
    _check_animation(animation, images)
    runner = load_runner(model, max_new_tokens=max_new_tokens, dtype=dtype, attn=attn, device=device)
    configurations = configurations or explained.with_ratios([explained.usual_method(runner.model)], each)
    found = [
        explained.asked(runner, picture, question, configurations, answers=True, scores=scores) for picture in shown
    ]
    if json is not None:
        with _writing(json, "--json"):
            _write_json(json, images, found, {"model": model, "question": question})
    if out is not None:
        with _writing(out, "--out"):
            sheet = eval_module("report.drawing", needs=()).stacked_sheets([one.sheet() for one in found])
            with replacing(out) as new:
                sheet.save(new, format="PNG")
    if animation is not None:
        with _writing(animation, "--animation"):
            n_frames = found[0].write_animation(animation)
    for path, one in zip(images, found, strict=True):
        for line in ([f"{path}:"] if len(images) > 1 else []) + one.answers + one.lines:
            typer.echo(line)
    if json is not None:
        n = len(configurations)
        typer.echo(f"{json}: kept indices of {n} method{'s' * (n > 1)}")
    if out is not None:
        typer.echo(f"{out}: {sheet.width} x {sheet.height} pixels")
    if animation is not None:
        typer.echo(f"{animation}: {n_frames} frames")


def _ratios(specs: Sequence[str], keep: str) -> list[float]:
    """The ratios that were asked for.

    Raises:
        RunError: one is invalid, or a method takes no budget.
    """
    decides = [s for s in specs if s != "blind" and not is_saved(s) and not takes_budget(s)]
    if keep and decides:
        raise RunError(
            f"{decides[0]!r} takes no budget: leave --keep out, or draw it separately{with_budget(decides[0])}"
        )
    return list(ratios(keep)) if keep else [0.25]


def _check_animation(animation: Path | None, images: Sequence[Path]) -> None:
    """Raise where there is nothing, or more than one thing, to animate."""
    from ..prune.videos import is_video

    if animation is not None and len(images) > 1:
        raise RunError(f"--animation takes one video, not {len(images)}; name one")
    if animation is not None and not is_video(images[0]):
        raise RunError(f"{images[0]} is a picture, which cannot be animated; leave --animation out, or name a video")


def _write_json(path: Path, images: Sequence[Path], found: Sequence[Any], asked: Mapping[str, Any]) -> None:
    """One picture as it is; of several, a list of them under "pictures"."""
    from . import doctor as checks

    here = checks.versions()
    versions = {name: here[name] for name in ("python", "tokprune", "torch", "transformers", "device")}
    each = [
        one.to_dict(model=asked["model"], image=str(image), question=asked["question"], versions=versions)
        for image, one in zip(images, found, strict=True)
    ]
    values = (
        each[0]
        if len(each) == 1
        else {"format": each[0]["format"], "format_version": each[0]["format_version"], "pictures": each}
    )
    write_text(path, json_.dumps(values, indent=1) + "\n")


def _check_apart(pictures: Mapping[str, Path], files: Mapping[str, Path | None]) -> None:
    """Raise if a file to write is a picture, or two of them are the same."""
    given = [(name, os.path.realpath(path)) for name, path in {**pictures, **files}.items() if path is not None]
    for (one, first), (other, second) in itertools.combinations(given, 2):
        if other in pictures:
            continue
        if first == second or (os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)):
            raise RunError(f"{one} and {other} are both {first}: use another file for {other}")


@contextlib.contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    """Turn an OSError into a RunError that names the option."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; use another file for {option}") from error
