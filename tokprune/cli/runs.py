"""Commands that run a model over questions: what they write goes to a folder and can be gone on with."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import RunError
from . import tables
from .arguments import App, check_most
from .extras import EVAL_NEEDS, eval_module, load_runner

app = App()


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
    match: Annotated[
        str, typer.Option(help="What --keep is a ratio of: tokens, or flops (of the language model's prefill).")
    ] = "tokens",
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads a large model over GPUs, memory and disk, as transformers does.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")] = False,
) -> None:
    """Compare methods and ratios on accuracy, tokens, FLOPs, KV bytes and time.

    A run that was cut off goes on where it stopped when the same command is typed again. Several processes share one:
    torchrun --nproc_per_node 2 -m tokprune.eval compare ...
    """
    compared, embedded = eval_module("compare"), eval_module("models")
    if batch_size < 1 or max_new_tokens < 1 or (limit is not None and limit < 1):
        raise RunError("--batch-size, --max-new-tokens and --limit take whole numbers of at least 1")
    usual = embedded.EMBEDDED.get(model, embedded.EMBEDDED[embedded.DEFAULT])
    names = methods.split(",") if methods else usual.methods
    if match not in ("tokens", "flops"):
        raise RunError(f"--match {match!r} is neither tokens nor flops")
    configs = compared.configurations([n.strip() for n in names], _ratios(keep) if keep else usual.ratios)
    chosen = compared.chosen_tasks(task or usual.tasks, limit, full)
    processes = eval_module("run.processes").Processes.started()
    console = tables.console(quiet=not processes.is_main)
    runner = load_runner(model, device_map=device_map, max_new_tokens=max_new_tokens, suffix=suffix)
    configs = compared.runnable(runner, chosen, configs, match == "flops", bool(methods), console)
    settings = compared.settings(runner, model, chosen, configs, batch_size=batch_size)
    questions = compared.questions(chosen, batch_size)
    with contextlib.closing(
        eval_module("run.folder").RunFolder(out, settings, overwrite, processes, questions)
    ) as results:
        compared.Comparison(runner, model, results, configs, batch_size).run(chosen, console)
    processes.end()
    if model in embedded.EMBEDDED:
        console.print(
            "A model this small shows that things work and what they save, not which method is better on large models."
        )
    console.print(f"report.html, table.md, table.csv, accuracy.png, rows.jsonl and samples.jsonl are in {out}")


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

    An interrupted fit resumes when the same command is typed again.
    """
    fitting, tasks = eval_module("search.fit_exit"), eval_module("tasks")
    settings = fitting.Settings(steps, hidden, samples, seed, batch_size, lr, kl)
    runner, console = load_runner(model, suffix=suffix), tables.console()
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

    An interrupted search resumes when the same command is typed again.
    """
    searched = eval_module("search.search", needs=(*EVAL_NEEDS, "optuna"))
    if max_new_tokens < 1:
        raise RunError("--max-new-tokens takes a whole number of at least 1")
    wanted = searched.Wanted(tolerance, budget, score, samples, seed, trials, batch_size, single)
    questions = searched.calibration_task(task, calibration)
    runner = load_runner(model, max_new_tokens=max_new_tokens, suffix=suffix)
    searched.search(runner, model, questions, wanted, out, overwrite, tables.console())


@app.command("eval")
def eval_(
    tasks: Annotated[
        str, typer.Option(help="With commas: tasks of lmms-eval such as pope,gqa; easyvqa, findit, findit_hd; folders.")
    ],
    suite: Annotated[str, typer.Option(help="lmms-eval; no other is offered.")] = "lmms-eval",
    model: Annotated[
        str, typer.Option(help="tiny-llava or tiny-llava-next (embedded), a local folder, or a hub id.")
    ] = "tiny-llava",
    methods: Annotated[
        str, typer.Option(help="Names or specifications, with commas; the unpruned run (none) is always there.")
    ] = "vtc_cls",
    keep: Annotated[str, typer.Option(help="Ratios kept, with commas.")] = "0.25",
    out: Annotated[Path, typer.Option(help="Folder for what lmms-eval writes, rows and samples.")] = Path("runs/eval"),
    limit: Annotated[int | None, typer.Option(help="So many documents a task, for a quick look.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents at a time.")] = 8,
    include_path: Annotated[Path | None, typer.Option(help="A folder with more tasks in lmms-eval's format.")] = None,
    model_args: Annotated[
        str, typer.Option(help="More arguments of the plug-in, such as dtype=bfloat16,attn_implementation=eager.")
    ] = "",
    gen_kwargs: Annotated[str, typer.Option(help="As lmms-eval takes it, such as max_new_tokens=16.")] = "",
    processes: Annotated[int, typer.Option(help="Processes of this machine that share the documents.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")] = False,
) -> None:
    """Run benchmarks of a suite for several methods and ratios, each against the unpruned run on the same documents.

    A configuration whose results are in the folder is not run again; more methods and ratios can be added to it.
    """
    if suite != "lmms-eval":
        raise RunError(f"--suite takes lmms-eval; {suite!r} is not offered")
    if min(batch_size, processes, 1 if limit is None else limit) < 1:
        raise RunError("--batch-size, --processes and --limit take whole numbers of at least 1")
    check_most("--processes", processes, 256)
    lmms = eval_module("suites.lmms", needs=("easy_vqa", "filelock"))
    lmms.check_installed()
    configs = lmms.grid(_names(methods), _ratios(keep))
    wanted = lmms.Suite(
        model, _names(tasks), configs, limit, batch_size, include_path, model_args, gen_kwargs, processes
    )
    lmms.run(wanted, out, tables.console(), overwrite)
    tables.console().print(f"rows.jsonl and samples.jsonl are in {out}")


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What tokprune compare --out wrote.")],
    out: Annotated[Path | None, typer.Option(help="The only file to write, a page of HTML.")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Load the model of the run and draw pictures that are not stored.")
    ] = False,
) -> None:
    """Write the report of a comparison and its tables again, from what its folder holds.

    The page needs no network. Without --out it goes to the folder as report.html, and the tables beside it as table.md
    and table.csv; with --out nothing in the folder changes.
    """
    reports = eval_module("report.html")

    def artist(run):
        runner = load_runner(str(run.settings.get("model")), suffix=str(run.settings.get("suffix", "")))
        return eval_module("report.losses").Artist.of_settings(runner, run.settings)

    try:
        run = reports.write(folder, artist if pictures else None, out)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; name another file with --out, or "
            "make room"
        ) from error
    for said in run.remarks:
        typer.echo(f"tokprune: {said}", err=True)
    typer.echo(f"{out} is written" if out else f"report.html, table.md and table.csv are written in {folder}")


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="A known shape with random weights, such as llava-1.5-7b.")] = "",
    model: Annotated[
        str, typer.Option(help="Or a model with weights: tiny-llava, tiny-llava-next, a local folder, or a hub id.")
    ] = "",
    layers: Annotated[int | None, typer.Option(help="Of a shape: so many decoder layers, of the same width.")] = None,
    vision_layers: Annotated[int | None, typer.Option(help="Of a shape: so many layers of the vision tower.")] = None,
    methods: Annotated[str, typer.Option(help="Names or specifications, with commas; none is always there.")] = "",
    keep: Annotated[str, typer.Option(help="Ratios kept, with commas.")] = "0.25",
    batch_size: Annotated[str, typer.Option(help="Prompts at a time, with commas.")] = "1",
    new_tokens: Annotated[str, typer.Option(help="Output lengths, with commas.")] = "16",
    resolution: Annotated[
        str,
        typer.Option(
            help="Pixels a side of a square picture, with commas. A model of any resolution cuts it into its crops; "
            "llava-1.5 is built with a tower that takes it, so its patches grow in number."
        ),
    ] = "",
    text: Annotated[int, typer.Option(help="Text tokens of a prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds counted; six are the fewest for 95 % intervals.")] = 6,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU.")] = "",
    attn: Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2, of all configurations.")] = "sdpa",
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU where there is one.")] = "",
    out: Annotated[Path, typer.Option(help="The JSONL file that rows are written to.")] = Path("runs/bench.jsonl"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start a file over that holds rows.")] = False,
) -> None:
    """Measure what pruning saves in time and memory, beside what the ledger predicts, and when it pays."""
    sweep = eval_module("bench.sweep", needs=("psutil", "filelock"))
    lists = {
        "batch_sizes": _numbers("--batch-size", batch_size),
        "new_tokens": _numbers("--new-tokens", new_tokens),
        "resolutions": _numbers("--resolution", resolution) if resolution else (),
    }
    specs = [m.strip() for m in methods.split(",")] if methods else ()
    settings = sweep.Settings(
        **lists,
        shape=shape,
        model=model,
        methods=specs,
        keep=_ratios(keep),
        n_text=text,
        rounds=rounds,
        warmup=warmup,
        dtype=dtype,
        attn=attn,
        device=device,
        layers=layers,
        vision_layers=vision_layers,
    )
    if not sweep.run(settings, out, overwrite, tables.console()):
        raise typer.Exit(130)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise RunError(f"{option} {_short(text)} is no list of whole numbers; type {option} 1,8") from error
    for number in numbers:
        check_most(option, number)
    return numbers


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RunError(f"--keep {_short(text)} is no list of ratios; type --keep 0.5,0.25") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
