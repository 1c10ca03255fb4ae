"""The command line. Bad input gets one clear line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tokprune

from ..core.errors import RunError
from ..prune import estimate as pruning
from ..prune.saved import is_saved
from . import estimate, explaining, runs, serving, tables
from . import new as templates
from .arguments import App, check_least, check_most, names, ratios, run, saved_folders
from .describe import method_page
from .extras import load_runner
from .options import METHODS, MODEL, OUTPUT, Keep, Saved, option

PROMPT = "Prompt"

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
    model: Annotated[
        str,
        option(
            MODEL,
            "A known shape such as llava-1.5-7b, tiny-qwen (embedded), a local folder, or a hub id.",
            "--model",
            "--shape",
        ),
    ],
    visual: Annotated[int | None, option(PROMPT, "Visual tokens of the picture. Default: one crop's.")] = None,
    text: Annotated[int, option(PROMPT, "Text tokens of the prompt.")] = 64,
    crops: Annotated[
        int | None, option(PROMPT, "Crops encoded (of a video: frames). Default: as many as --visual fills.")
    ] = None,
    pixels: Annotated[
        str, option(PROMPT, "Width and height of the picture, as 1500x2000, for models that take any size.")
    ] = "",
    frames: Annotated[int, option(PROMPT, "Frames of a video of that size.", min=0)] = 0,
    method: Annotated[
        str,
        option(METHODS, "Include the cost of selecting by these, separated by commas.", "--method", "--methods"),
    ] = "",
    config: Saved = None,
    keep: Keep = "0.25",
    layers: Annotated[bool, option(OUTPUT, "Show every decoder layer.", "--layers")] = False,
) -> None:
    """Show the cost of a prefill by part, before and after pruning. A known shape needs no download.

    Several methods or fractions share a table with a row each.

    Example: tokprune flops --model qwen2.5-vl-7b --pixels 1500x2000 --keep 0.5,0.25,0.1
    """
    shape = estimate.shape_of(model)
    if pixels or frames:
        if visual is not None or crops is not None:
            raise RunError("--pixels and --frames decide the tokens: leave --visual and --crops out")
        visual, crops = estimate.tokens_of(shape, pixels, frames)
    visual = shape.n_visual if visual is None else visual
    check_least(visual=visual, text=text, crops=crops)
    for name, n in (("--visual", visual), ("--text", text), ("--crops", crops or 1)):
        check_most(name, n, estimate.MOST)
    folders = saved_folders(config)
    asked = [(m, ratio) for m in names(method) or ([] if folders else [""]) for ratio in ratios(keep)]
    asked += [(folder, 1.0) for folder in folders]
    found = [pruning.kept(shape, m, ratio, visual, text) for m, ratio in asked]
    pairs = [pruning.costs(shape, one, visual, text, crops) for one in found]
    columns = [[n + text for n in one.by_layer] for one in found]
    console = tables.console()
    if len(asked) == 1:
        console.print(tables.ledger_table(shape, pairs[0], (visual + text, columns[0]), layers))
    else:
        console.print(tables.budgets_table(shape, asked, pairs, visual + text, columns))
    n_crops = crops or (1 if shape.any_size else -(-visual // shape.n_visual))
    what = "frame group" if frames else "picture" if shape.any_size else "crop"
    typer.echo(
        f"{visual} visual tokens ({n_crops} {what}{'s' * (n_crops > 1)}; change it with --visual)"
        + _kept_text(asked[0], found[0], len(asked))
    )
    before = pairs[0][0].prefill.flops
    share, left = (100 * ledger.before_llm.flops / before for ledger in pairs[0])
    in_tower = {one.in_tower for one in found}
    saved = " and cannot be saved" if in_tower == {visual} else f"; {left:.1f} % are left" if len(found) == 1 else ""
    typer.echo(f"Vision tower and projector are {share:.1f} % of the unpruned prefill{saved}.")


def _kept_text(asked: tuple[str, float], found: pruning.Kept, n_asked: int) -> str:
    """How many tokens are kept, in words, where there is one answer."""
    if n_asked > 1 or is_saved(asked[0]):
        return "."
    return f", {found.decided.format(keep=asked[1])}."


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


@app.command(no_args_is_help=True, short_help="Write a method, a task or a model family to begin with.")
def new(
    kind: Annotated[str, typer.Argument(help="method, task or family.")],
    name: Annotated[str, typer.Argument(help="Name of the file, such as my_method; of a family, the model_type.")],
    folder: Annotated[Path, typer.Option(help="Where to write.")] = Path(),
) -> None:
    """Write a file to begin with, and a test that passes as it is.

    Example: tokprune new method longest && pytest test_longest.py
    """
    for path in templates.write(kind, name, folder):
        typer.echo(f"wrote {path}")


app.add_typer(explaining.app)
app.add_typer(runs.app)
app.add_typer(serving.app)


def main() -> None:
    """The console script."""
    run(app)


if __name__ == "__main__":
    main()
