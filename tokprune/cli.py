"""The command line. Bad input gets one clear line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import tokprune

from . import counting, terminal
from .budget import Budget
from .errors import RunError, TokPruneError
from .flops import Ledger, Ops

EVAL_NEEDS = ("accelerate", "easy_vqa", "filelock", "matplotlib")

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """tokprune: fewer visual tokens for multimodal LLMs, without training."""


@app.command()
def methods() -> None:
    """List the methods, with what they promise and where they come from."""
    _console().print(terminal.methods_table())


@app.command()
def models() -> None:
    """Show which method runs on which model family and vision tower."""
    _console().print(terminal.support_table())


@app.command()
def flops(
    model: Annotated[str, typer.Option(help="A known shape such as llava-1.5-7b, a local folder, or a hub id.")],
    visual: Annotated[int | None, typer.Option(help="Visual tokens of the picture; one crop by default.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 64,
    keep: Annotated[float, typer.Option(help="Ratio of the visual tokens kept.")] = 0.25,
    crops: Annotated[int | None, typer.Option(help="Crops encoded; by default as many as the tokens fill.")] = None,
    method: Annotated[str, typer.Option(help="Count the signals of this method as selector.")] = "",
    layers: Annotated[bool, typer.Option("--layers", help="Show every decoder layer.")] = False,
) -> None:
    """Show what a prefill costs, part by part, before and after pruning; nothing is run or downloaded for a shape."""
    shape = counting.shape_of(model)
    visual = shape.n_visual if visual is None else visual
    if min(visual, text, 1 if crops is None else crops) < 1:
        raise RunError("--visual, --text and --crops take whole numbers of at least 1")
    found = counting.kept(shape, method, keep, visual, text)
    columns = [n + text for n in found.by_layer]
    before = shape.picture(visual, crops) + shape.read(visual + text)
    after = shape.picture(visual, crops, found.signals) + shape.read(columns)
    after += Ledger(layers=(Ops(),) * shape.text.n_layers, selector=found.products)
    _console().print(terminal.ledger_table(shape, (before, after), (visual + text, columns), layers))
    n_crops = crops or -(-visual // shape.n_visual)
    typer.echo(
        f"{visual} visual tokens ({n_crops} crop{'s' * (n_crops > 1)}; --visual takes another number)"
        + (f", keep {keep:g}." if found.budgeted else ", as many kept as the method says.")
    )
    share = before.before_llm.flops / before.prefill.flops
    typer.echo(f"Vision tower and projector are {100 * share:.1f} % of the unpruned prefill and cannot be saved.")


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Name or specification; repeatable, or several with commas.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Ratio of the visual tokens kept; 0.25 by default.")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("kept.png"),
    model: Annotated[
        str, typer.Option(help="tiny-llava or tiny-llava-next (embedded), a local folder, or a hub id.")
    ] = "tiny-llava",
    question: Annotated[str, typer.Option(help="Asked beside the picture.")] = "what is in the image?",
) -> None:
    """Draw which visual tokens a method keeps: kept ones bright, dropped ones dim, several methods side by side."""
    explained = _eval("explained", needs=())
    specs = [s.strip() for text in method or ["vtc_cls"] for s in text.split(",")]
    ratio = 0.25 if keep is None else keep
    Budget(keep_ratio=ratio)
    decides = [s for s in specs if s != "blind" and not tokprune.get_method(s).takes_budget]
    if keep is not None and decides:
        raise RunError(
            f"{decides[0]!r} takes no budget; leave --keep out, or draw it apart{counting.with_budget(decides[0])}"
        )
    budgets = [{"keep_ratio": ratio} if tokprune.get_method(s).takes_budget else {} for s in specs]
    picture = explained.open_picture(image)
    runner = _runner(model)
    sheet, lines = explained.explained(runner, picture, question, list(zip(specs, budgets, strict=True)))
    try:
        sheet.save(out, format="PNG")
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; name another file with --out") from error
    for line in lines:
        typer.echo(line)
    typer.echo(f"{out}: {sheet.width} x {sheet.height} pixels")


@app.command()
def doctor() -> None:
    """Show versions, check on the embedded model that pruning prunes, and exit with 1 where it does not."""
    from . import doctor as checks

    console = _console()
    for name, version in checks.versions().items():
        console.print(f"{name:14} {version}", highlight=False)
    failed = 0
    for finding in checks.findings(_runner()):
        failed += not finding.ok
        console.print(f"{'ok    ' if finding.ok else 'FAILED'} {finding.what}: {finding.seen}", highlight=False)
    if failed:
        typer.echo(f"tokprune: {failed} checks failed; do not trust a number from this installation", err=True)
        raise typer.Exit(1)
    console.print("All checks passed.")


@app.command()
def compare(
    model: Annotated[
        str, typer.Option(help="tiny-llava or tiny-llava-next (embedded), a local folder, or a hub id.")
    ] = "tiny-llava",
    task: Annotated[
        list[str] | None,
        typer.Option(help="easyvqa, findit, findit_hd, or a folder with metadata.jsonl; repeatable."),
    ] = None,
    methods: Annotated[str, typer.Option(help="Names or specifications, with commas.")] = "",
    keep: Annotated[
        str, typer.Option(help="Ratios kept, with commas; 0.5,0.25,0.11 unless the model has its own.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for rows, samples and the plot.")] = Path("runs/compare"),
    limit: Annotated[int | None, typer.Option(help="So many questions a task, for a quick look.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All questions instead of the fixed 800 a task.")] = False,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    suffix: Annotated[str, typer.Option(help="Added to every question, for models that talk too much.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")] = False,
) -> None:
    """Compare methods and ratios on accuracy, tokens, FLOPs, KV bytes and time.

    A run that was cut off goes on where it stopped when the same command is typed again.
    """
    compared, tasks, embedded = _eval("compare"), _eval("tasks"), _eval("models")
    if batch_size < 1 or max_new_tokens < 1 or (limit is not None and limit < 1):
        raise RunError("--batch-size, --max-new-tokens and --limit take whole numbers of at least 1")
    usual = embedded.EMBEDDED.get(model, embedded.EMBEDDED[embedded.DEFAULT])
    names = methods.split(",") if methods else usual.methods
    configs = compared.configurations([n.strip() for n in names], _ratios(keep) if keep else usual.ratios)
    loaded = [tasks.load_task(name) for name in task or usual.tasks]
    if len({t.name for t in loaded}) < len(loaded):
        raise RunError(
            f"two tasks are named alike ({', '.join(t.name for t in loaded)}); rename a folder, or run them apart"
        )
    chosen = [(t, compared.chosen_samples(t, limit, full)) for t in loaded]
    console = _console()
    runner = _runner(model, max_new_tokens=max_new_tokens, suffix=suffix)
    missing = runner.missing(configs)
    if missing and methods:
        raise RunError(next(iter(missing.values())))
    if missing:
        console.print(f"Left out, because this model cannot run them: {', '.join(missing)}")
        configs = [c for c in configs if c.method not in missing]
    settings = compared.settings(runner, model, chosen, configs, batch_size=batch_size)
    with contextlib.closing(_eval("folder").RunFolder(out, settings, overwrite)) as results:
        compared.Comparison(runner, model, results, configs, batch_size).run(chosen, console)
    if model in embedded.EMBEDDED:
        console.print(
            "A model this small shows that things work and what they save, not which method is better on large models."
        )
    console.print(f"rows.jsonl, samples.jsonl and accuracy.png are in {out}")


@app.command()
def fit_exit(
    task: Annotated[str, typer.Option(help="Whose training questions: findit, findit_hd or easyvqa.")],
    out: Annotated[Path, typer.Option(help="The gate file to write, for dyvte:gate=FILE.")],
    model: Annotated[
        str, typer.Option(help="tiny-llava or tiny-llava-next (embedded), a local folder, or a hub id.")
    ] = "tiny-llava",
    steps: Annotated[int, typer.Option(help="Steps, each at one layer.")] = 2000,
    hidden: Annotated[int, typer.Option(help="Width of a gate; the paper's is 2048 for 7B.")] = 256,
    samples: Annotated[int, typer.Option(help="Questions to fit to; a quarter as many more to validate on.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of questions, first weights and steps.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate; the paper's is 6e-5 for 7B.")] = 1e-3,
    kl: Annotated[float, typer.Option(help="Nats by which a fixed exit may change the answers.")] = 0.01,
    suffix: Annotated[str, typer.Option(help="Added to every question, as in compare.")] = "",
) -> None:
    """Fit the gates of dyvte to a model, and find the layer that it can do without visual tokens from.

    A fit that was cut off goes on where it stopped when the same command is typed again.
    """
    fitting, tasks = _eval("fit_exit"), _eval("tasks")
    settings = fitting.Settings(steps, hidden, samples, seed, batch_size, lr, kl)
    runner, console = _runner(model, suffix=suffix), _console()
    fitting.Fit(runner, model, tasks.load_task(task), settings, out).run(console)
    console.print(f"Use it as dyvte:gate={out}")


@app.command()
def search(
    model: Annotated[
        str, typer.Option(help="tiny-llava or tiny-llava-next (embedded), a local folder, or a hub id.")
    ] = "tiny-llava",
    task: Annotated[str, typer.Option(help="easyvqa, findit, findit_hd, or a folder with metadata.jsonl.")] = "findit",
    tolerance: Annotated[
        float | None, typer.Option(help="G-Search: the fewest tokens that lose at most so much accuracy, 0.01 for 1 %.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="P-Sigmoid: the best sigmoid of this ratio, the mean over all decoder layers.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The schedule file; what was evaluated goes beside it.")] = Path(
        "schedule.json"
    ),
    score: Annotated[str, typer.Option(help="A method between decoder layers that ranks the tokens.")] = "fastv",
    samples: Annotated[int, typer.Option(help="Questions, none of them of the test split.")] = 200,
    calibration: Annotated[
        str | None, typer.Option(help="A folder with metadata.jsonl to take the questions from instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of questions, and of P-Sigmoid.")] = 0,
    single: Annotated[
        bool,
        typer.Option("--single", help="The best single cut within --tolerance instead: what G-Search has to beat."),
    ] = False,
    trials: Annotated[
        int | None, typer.Option(help="Evaluations of a layer (G-Search; 6), or in all (P-Sigmoid; 30).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    suffix: Annotated[str, typer.Option(help="Added to every question, for models that talk too much.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over where a search was begun.")] = False,
) -> None:
    """Find how many visual tokens every decoder layer of a model needs, for the method schedule:file=OUT.

    A search that was cut off goes on where it stopped when the same command is typed again.
    """
    searched = _eval("search", needs=(*EVAL_NEEDS, "optuna"))
    if max_new_tokens < 1:
        raise RunError("--max-new-tokens takes a whole number of at least 1")
    wanted = searched.Wanted(tolerance, budget, score, samples, seed, trials, batch_size, single)
    questions = searched.calibration_task(task, calibration)
    runner = _runner(model, max_new_tokens=max_new_tokens, suffix=suffix)
    searched.search(runner, model, questions, wanted, out, overwrite, _console())


def _runner(model: str = "tiny-llava", **options: Any):
    """A loaded model with its processor; an embedded one without a progress bar."""
    from transformers.utils import logging

    run = _eval("run", needs=())
    if model in _eval("models", needs=()).EMBEDDED:
        logging.disable_progress_bar()
    return run.Runner.load(model, **options)


def _console() -> Console:
    # What users type is shown as it is: brackets are no markup.
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=140)


def _eval(module: str, needs: tuple[str, ...] = EVAL_NEEDS):
    """A module of tokprune.eval, which needs the extra of that name."""
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
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
