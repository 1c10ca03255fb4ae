"""The command line. Bad input gets one clear line on stderr and exit code 2."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import tokprune

from .errors import RunError, TokPruneError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """tokprune: fewer visual tokens for multimodal LLMs, without training."""


@app.command()
def methods() -> None:
    """List the methods, with what they promise and where they come from."""
    table = Table("method", "keeps", "count", "source", title="Methods", title_justify="left")
    for name in tokprune.list_methods():
        method = tokprune.get_method(name)
        first = (type(method).__doc__ or "").strip().splitlines()[0]
        table.add_row(name, first, method.count.value, method.source or "control")
    Console().print(table)


@app.command()
def models() -> None:
    """List the model families, by `config.model_type`."""
    for name in tokprune.list_models():
        typer.echo(name)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="Local folder or hub id; the embedded model by default.")] = "",
    task: Annotated[
        list[str] | None, typer.Option(help="easyvqa, findit, or a folder with metadata.jsonl; repeatable.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Names or specifications, with commas.")] = "",
    keep: Annotated[str, typer.Option(help="Ratios kept, with commas.")] = "0.5,0.25,0.11",
    out: Annotated[Path, typer.Option(help="Folder for rows, samples and the plot.")] = Path("runs/compare"),
    limit: Annotated[int | None, typer.Option(help="So many questions a task, for a quick look.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All questions instead of the fixed 800 a task.")] = False,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    suffix: Annotated[str, typer.Option(help="Added to every question, for models that talk too much.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = 8,
) -> None:
    """Compare methods and ratios on accuracy, tokens and prefill time."""
    compared = _eval("compare")
    tasks = _eval("tasks")
    run = _eval("run")
    if batch_size < 1 or max_new_tokens < 1 or (limit is not None and limit < 1):
        raise RunError("--batch-size, --max-new-tokens and --limit take whole numbers of at least 1")
    names = methods.split(",") if methods else list(compared.METHODS)
    configs = compared.configurations([n.strip() for n in names], _ratios(keep))
    loaded = [tasks.load_task(name) for name in task or sorted(tasks.TASKS)]
    if len({t.name for t in loaded}) < len(loaded):
        raise RunError(
            f"two tasks are named alike ({', '.join(t.name for t in loaded)}); rename a folder, or run them apart"
        )
    chosen = [(t, compared.chosen_samples(t, limit, full)) for t in loaded]
    console = Console() if sys.stdout.isatty() else Console(width=130)
    runner = run.Runner.load(model or str(run.EMBEDDED_MODEL), max_new_tokens=max_new_tokens, suffix=suffix)
    missing = runner.missing(configs)
    if missing and methods:
        raise RunError(next(iter(missing.values())))
    if missing:
        console.print(f"Left out, because this model cannot run them: {', '.join(missing)}")
        configs = [c for c in configs if c.method not in missing]
    comparison = compared.Comparison(runner, model or run.EMBEDDED_MODEL.name, out, configs, batch_size)
    comparison.run(chosen, console)
    for t, _ in chosen:
        rows = [r for r in comparison.rows if r.task == t.name]
        console.print(compared.table(t.name, rows, comparison.floors[t.name]))
    if not model:
        console.print(
            "A model this small shows that things work and what they save, not which method is better on large models."
        )
    compared.plot(comparison.rows, comparison.floors, out / "accuracy.png")
    console.print(f"rows.jsonl, samples.jsonl and accuracy.png are in {out}")


def _eval(module: str):
    """A module of tokprune.eval, which needs the extra of that name."""
    missing = [name for name in ("accelerate", "easy_vqa", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{', '.join(missing)} not installed; type pip install 'tokprune[eval]'")
    return importlib.import_module(f"tokprune.eval.{module}")


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RunError(f"--keep {text!r} is no list of ratios; type --keep 0.5,0.25") from error


def main() -> None:
    """The console script."""
    try:
        sys.exit(app(standalone_mode=False))
    except TokPruneError as error:
        _fail(str(error))
    except Exception as error:
        # Usage errors of the command-line library, which may be vendored: told apart by what they carry.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} Type tokprune --help, or tokprune COMMAND --help")


def _fail(message: str) -> None:
    typer.echo(f"tokprune: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
