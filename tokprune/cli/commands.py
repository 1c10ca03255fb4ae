"""The command line. Bad input gets one clear line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

import tokprune

from ..core.errors import RunError
from ..core.files import replacing
from ..cost.flops import Ledger, Ops
from ..prune.pictures import open_picture
from ..prune.videos import is_video as is_video_file
from ..prune.videos import open_clip
from . import estimate, runs, tables
from . import new as templates
from .arguments import App, check_fraction, check_least, check_most, run
from .describe import method_page
from .extras import eval_module, load_runner

app = App(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tokprune {tokprune.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """tokprune: fewer visual tokens for multimodal LLMs, without training."""


@app.command(short_help="List the methods, or describe one.")
def methods(
    name: Annotated[str, typer.Argument(help="A method, such as fopru, to show its options and source.")] = "",
) -> None:
    """List the methods, or show what one does, needs and takes."""
    if name:
        typer.echo(method_page(name))
    else:
        tables.console().print(tables.methods_table())


@app.command(short_help="Which methods run on which model families.")
def models(
    name: Annotated[str, typer.Argument(help="A model family, such as qwen2_5_vl, to list its methods.")] = "",
) -> None:
    """Show how many methods run on each model family, or which ones run on one."""
    tables.console().print(tables.model_table(name) if name else tables.support_table())


@app.command(no_args_is_help=True, short_help="What a prefill costs, before and after pruning.")
def flops(
    model: Annotated[str, typer.Option(help="A known shape such as llava-1.5-7b, a local folder, or a hub id.")],
    visual: Annotated[int | None, typer.Option(help="Visual tokens of the picture. Default: one crop's.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 64,
    keep: Annotated[float, typer.Option(help="Fraction of the visual tokens to keep.")] = 0.25,
    crops: Annotated[
        int | None, typer.Option(help="Crops encoded (of a video: frames). Default: as many as --visual fills.")
    ] = None,
    pixels: Annotated[
        str,
        typer.Option(help="Width and height of the picture, as 1500x2000, for models that take any size."),
    ] = "",
    frames: Annotated[int, typer.Option(min=0, help="Frames of a video of that size.")] = 0,
    method: Annotated[str, typer.Option(help="Include the cost of this method's selection.")] = "",
    layers: Annotated[bool, typer.Option("--layers", help="Show every decoder layer.")] = False,
) -> None:
    """Show the cost of a prefill by part, before and after pruning. A known shape needs no download."""
    shape = estimate.shape_of(model)
    if pixels or frames:
        if visual is not None or crops is not None:
            raise RunError("--pixels and --frames decide the tokens: leave --visual and --crops out")
        visual, crops = estimate.tokens_of(shape, pixels, frames)
    visual = shape.n_visual if visual is None else visual
    check_least(visual=visual, text=text, crops=crops)
    check_fraction("--keep", keep)
    for option, n in (("--visual", visual), ("--text", text), ("--crops", crops or 1)):
        check_most(option, n, estimate.MOST)
    found = estimate.kept(shape, method, keep, visual, text)
    columns = [n + text for n in found.by_layer]
    before = shape.picture(visual, crops) + shape.read(visual + text)
    after = shape.picture(visual, crops, found.signals) + shape.read(columns)
    after += Ledger(layers=(Ops(),) * shape.text.n_layers, selector=found.products)
    tables.console().print(tables.ledger_table(shape, (before, after), (visual + text, columns), layers))
    n_crops = crops or (1 if shape.any_size else -(-visual // shape.n_visual))
    what = "frame group" if frames else "picture" if shape.any_size else "crop"
    typer.echo(
        f"{visual} visual tokens ({n_crops} {what}{'s' * (n_crops > 1)}; change it with --visual)"
        + (f", keep {keep:g}." if found.budgeted else ", how many are kept is up to the method.")
    )
    share = before.before_llm.flops / before.prefill.flops
    typer.echo(f"Vision tower and projector are {100 * share:.1f} % of the unpruned prefill and cannot be saved.")


@app.command(no_args_is_help=True, short_help="Draw which visual tokens a method keeps.")
def explain(
    image: Annotated[Path, typer.Argument(help="A picture, a video, or a folder of frames.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Name or specification; repeatable, or separated by commas.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Fraction of the visual tokens to keep. Default: 0.25.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write. Default: kept.png, unless --json is given.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="The JSON file to write, with indices of kept tokens.")] = None,
    animation: Annotated[Path | None, typer.Option(help="The GIF to write, for a video.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to take of a video, evenly spaced.")] = 8,
    model: Annotated[
        str, typer.Option(help="tiny-llava, tiny-llava-next or tiny-qwen (embedded), a local folder, or a hub id.")
    ] = "tiny-llava",
    question: Annotated[str, typer.Option(help="The question to ask about the picture.")] = "what is in the image?",
) -> None:
    """Draw which visual tokens a method keeps: kept ones bright, dropped ones dim, several methods side by side."""
    explained = eval_module("report.explained", needs=())
    out = Path("kept.png") if out is None and json is None and animation is None else out
    _check_apart({"the picture": image, "--out": out, "--json": json, "--animation": animation})
    specs = [s.strip() for text in method or ["vtc_cls"] for s in text.split(",")]
    ratio = 0.25 if keep is None else keep
    check_fraction("--keep", ratio)
    decides = [s for s in specs if s != "blind" and not tokprune.get_method(s).takes_budget]
    if keep is not None and decides:
        raise RunError(
            f"{decides[0]!r} takes no budget: leave --keep out, or draw it separately{estimate.with_budget(decides[0])}"
        )
    budgets = [{"keep_ratio": ratio} if tokprune.get_method(s).takes_budget else {} for s in specs]
    is_video = is_video_file(image)
    picture = open_clip(image, frames) if is_video else open_picture(image)
    if animation is not None and not is_video:
        raise RunError(f"{image} is a picture, which cannot be animated; leave --animation out, or name a video")
    found = explained.asked(load_runner(model), picture, question, list(zip(specs, budgets, strict=True)))
    if json is not None:
        from . import doctor as checks

        here = checks.versions()
        versions = {name: here[name] for name in ("python", "tokprune", "torch", "transformers", "device")}
        asked = {"model": model, "image": str(image), "question": question, "versions": versions}
        with _writing(json, "--json"):
            found.write_json(json, **asked)
    if out is not None:
        with _writing(out, "--out"):
            sheet = found.sheet()
            with replacing(out) as new:
                sheet.save(new, format="PNG")
    if animation is not None:
        with _writing(animation, "--animation"):
            n_frames = found.write_animation(animation)
    for line in found.lines:
        typer.echo(line)
    if json is not None:
        typer.echo(f"{json}: kept indices of {len(specs)} method{'s' * (len(specs) > 1)}")
    if out is not None:
        typer.echo(f"{out}: {sheet.width} x {sheet.height} pixels")
    if animation is not None:
        typer.echo(f"{animation}: {n_frames} frames")


def _check_apart(named: Mapping[str, Path | None]) -> None:
    """Raise if two of the files are the same."""
    given = [(name, os.path.realpath(path)) for name, path in named.items() if path is not None]
    for (one, first), (other, second) in itertools.combinations(given, 2):
        if first == second or (os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)):
            raise RunError(f"{one} and {other} are both {first}: use another file for {other}")


@contextlib.contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    """Turn an OSError into a RunError that names the option."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; use another file for {option}") from error


@app.command(short_help="Check this installation.")
def doctor() -> None:
    """Show versions and check pruning on the embedded model; exit with 1 if a check fails."""
    from . import doctor as checks

    console = tables.console()
    for name, version in checks.versions().items():
        console.print(f"{name:14} {version}", highlight=False)
    failed = 0
    for finding in checks.findings(load_runner()):
        failed += not finding.ok
        console.print(f"{'ok    ' if finding.ok else 'FAILED'} {finding.what}: {finding.seen}", highlight=False)
    if failed:
        typer.echo(f"tokprune: {failed} checks failed; do not trust a number from this installation", err=True)
        raise typer.Exit(1)
    console.print("All checks passed.")


@app.command(no_args_is_help=True, short_help="Write a method or a task to begin with.")
def new(
    kind: Annotated[str, typer.Argument(help="method or task.")],
    name: Annotated[str, typer.Argument(help="Name of the file, such as my_method.")],
    folder: Annotated[Path, typer.Option(help="Where to write.")] = Path(),
) -> None:
    """Write a file to begin with, and a test that passes as it is.

    Example: tokprune new method longest && pytest test_longest.py
    """
    for path in templates.write(kind, name, folder):
        typer.echo(f"wrote {path}")


app.add_typer(runs.app)


def main() -> None:
    """The console script."""
    run(app)


if __name__ == "__main__":
    main()
