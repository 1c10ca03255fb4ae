"""The command line. Bad input gets one clear line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tokprune

from ..core.errors import RunError
from ..cost.flops import Ledger, Ops
from . import estimate, explaining, runs, tables
from . import new as templates
from .arguments import App, check_fraction, check_least, check_most, run
from .describe import method_page
from .extras import load_runner

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


app.add_typer(explaining.app)
app.add_typer(runs.app)


def main() -> None:
    """The console script."""
    run(app)


if __name__ == "__main__":
    main()
