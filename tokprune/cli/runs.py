"""Commands that run a model over questions; they write to a folder, and interrupted runs resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.errors import RunError, shown
from ..cost.shapes import KNOWN
from . import estimate, tables
from .arguments import App, check_least, check_most, names, numbers, ratios, saved_folders
from .extras import EVAL_NEEDS, eval_module, load_runner
from .options import (
    METHODS,
    MODEL,
    OUTPUT,
    QUESTIONS,
    RUNNING,
    Attn,
    Backend,
    BatchSize,
    Device,
    DeviceMap,
    Dtype,
    Form,
    Frames,
    Keep,
    KeepTokens,
    Limit,
    MaxNewTokens,
    Methods,
    Metric,
    Model,
    Overwrite,
    Saved,
    Strict,
    Suffix,
    option,
)

app = App()

INPUTS, FITTING = "Pictures and prompts", "Fitting"


@app.command(short_help="Methods and budgets side by side, on questions.")
def compare(
    model: Model = "tiny-llava",
    device_map: DeviceMap = None,
    dtype: Dtype = "",
    attn: Attn = "",
    device: Device = "",
    methods: Methods = "",
    config: Saved = None,
    keep: Annotated[
        str, option(METHODS, "Fractions to keep, separated by commas. Default: 0.5,0.25,0.11, or those of the model.")
    ] = "",
    keep_tokens: KeepTokens = "",
    match: Annotated[
        str, option(METHODS, "What --keep is a fraction of: tokens, or flops (of the language model's prefill).")
    ] = "tokens",
    no_baseline: Annotated[
        bool, option(METHODS, "Leave out the unpruned model, which every method is compared with.", "--no-baseline")
    ] = False,
    no_controls: Annotated[
        bool,
        option(
            METHODS,
            "Leave out the controls: smaller pictures (downsample), fewer frames (frames).",
            "--no-controls",
        ),
    ] = False,
    task: Annotated[
        list[str] | None,
        option(
            QUESTIONS,
            "easyvqa, findit, findit_hd, findone, watchit, a package's task, a folder with metadata.jsonl or "
            "metadata.csv, or ./file.py:Class; repeatable.",
            "--task",
            "--tasks",
        ),
    ] = None,
    limit: Limit = None,
    full: Annotated[bool, option(QUESTIONS, "Use all questions instead of the fixed 800 per task.", "--full")] = False,
    frames: Frames = 8,
    suffix: Annotated[
        list[str] | None,
        option(
            QUESTIONS,
            "Text added to every question, such as ' Answer with one word.'; repeatable: every question is asked "
            "with each, and methods are ranked under each.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 8,
    metric: Metric = "",
    suite: Annotated[
        str,
        option(QUESTIONS, "lmms-eval: run benchmarks of that suite; tokprune eval has its further options."),
    ] = "",
    batch_size: BatchSize = 32,
    backend: Backend = "transformers",
    out: Annotated[
        Path,
        option(OUTPUT, "Output folder. More methods, budgets and questions are added to a run that it holds."),
    ] = Path("runs/compare"),
    form: Form = "",
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare methods and ratios on accuracy, tokens, FLOPs, KV bytes and time.

    Interrupted runs resume: run the same command again. More methods, budgets or questions are added to what the
    folder holds. To share a run between processes: torchrun --nproc_per_node 2 -m tokprune.eval compare ...

    Example: tokprune compare --methods vtc_cls,fopru --keep 0.5,0.25 --limit 100
    """
    check_least(batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit)
    if match not in ("tokens", "flops"):
        raise RunError(f"invalid --match {match!r}: use tokens or flops")
    _check_form(form)
    if strict and no_baseline:
        raise RunError("--strict compares answers with the unpruned run's: leave --no-baseline out")
    if suite and suffix:
        raise RunError("--suffix cannot be given with --suite, whose tasks have prompts of their own; leave it out")
    if suite and backend != "transformers":
        raise RunError("--suite runs its benchmarks with transformers: leave --backend out")
    if suite:
        return eval_(
            tasks=",".join(task or ()),
            suite=suite,
            model=model,
            dtype=dtype,
            attn=attn,
            device=device,
            methods=methods,
            config=config,
            keep=keep,
            keep_tokens=keep_tokens,
            out=out,
            limit=limit,
            batch_size=batch_size,
            metric=metric,
            strict=strict,
            overwrite=overwrite,
        )
    api = eval_module("api")
    is_main = eval_module("run.processes").Processes.started().is_main
    console = Console(stderr=True, quiet=True) if form else tables.console(quiet=not is_main)
    done = api.compare(
        model,
        task=task,
        methods=[*names(methods), *saved_folders(config)] or None,
        keep=ratios(keep) if keep else (),
        keep_tokens=_tokens(keep_tokens) if keep_tokens else (),
        match=match,
        limit=limit,
        full=full,
        batch_size=batch_size,
        frames=frames,
        suffixes=suffix or (),
        max_new_tokens=max_new_tokens,
        metric=metric,
        baseline=not no_baseline,
        controls=not no_controls,
        device_map=device_map,
        dtype=dtype,
        attn=attn,
        device=device,
        backend=backend,
        out=out,
        overwrite=overwrite,
        console=console,
    )
    if form and is_main:
        typer.echo({"latex": done.to_latex, "markdown": done.to_markdown, "csv": done.to_csv}[form](), nl=False)
    if model in eval_module("models").EMBEDDED:
        console.print(
            "A model this small shows that pruning works and what it saves, not which method is best on large models."
        )
    console.print(f"report.html, table.md, table.csv, accuracy.png, rows.jsonl and samples.jsonl are in {out}")
    _end(done.alarms if strict else ())


def _check_form(form: str) -> None:
    if form not in ("", "latex", "markdown", "csv"):
        raise RunError(f"invalid --format {form!r}: use latex, markdown or csv")


def _end(alarms: Sequence[str]) -> None:
    """End with exit code 1 for alarms, one a line."""
    for said in alarms:
        typer.echo(f"tokprune: {said}", err=True)
    if alarms:
        raise typer.Exit(1)


@app.command(no_args_is_help=True, short_help="Fit the gates of dyvte.")
def fit_exit(
    task: Annotated[str, option(QUESTIONS, "The task to take training questions from: findit, findit_hd or easyvqa.")],
    out: Annotated[Path, option(OUTPUT, "The gate file to write, for dyvte:gate=FILE.")],
    model: Model = "tiny-llava",
    steps: Annotated[int, option(FITTING, "Training steps, each at one layer.")] = 2000,
    hidden: Annotated[int, option(FITTING, "Hidden width of a gate. The paper uses 2048 for 7B.")] = 256,
    samples: Annotated[
        int, option(QUESTIONS, "Questions to fit to, plus a quarter as many for validation.", "--samples", "--limit")
    ] = 2048,
    seed: Annotated[int, option(QUESTIONS, "Seed for questions, initial weights and steps.")] = 0,
    batch_size: Annotated[int, option(FITTING, "Questions per step.")] = 16,
    lr: Annotated[float, option(FITTING, "Learning rate. The paper uses 6e-5 for 7B.")] = 1e-3,
    kl: Annotated[float, option(FITTING, "Largest KL divergence of the answers after a fixed exit.")] = 0.01,
    suffix: Suffix = "",
) -> None:
    """Fit the gates of dyvte to a model, and find the layer from which it no longer needs visual tokens.

    Interrupted runs resume: run the same command again.

    Example: tokprune fit-exit --task findit --out gates.safetensors
    """
    fitting, tasks = eval_module("search.fit_exit"), eval_module("tasks")
    settings = fitting.Settings(steps, hidden, samples, seed, batch_size, lr, kl)
    runner, console = load_runner(model, suffix=suffix), tables.console()
    fitting.Fit(runner, model, tasks.load_task(task), settings, out).run(console)
    console.print(f"Use it as dyvte:gate={out}")


@app.command(no_args_is_help=True, short_help="Find how many tokens each layer needs.")
def search(
    model: Model = "tiny-llava",
    task: Annotated[str, option(QUESTIONS, "easyvqa, findit, findit_hd, or a folder with metadata.jsonl.")] = "findit",
    tolerance: Annotated[
        float | None,
        option(METHODS, "G-Search: find the fewest tokens that lose at most this accuracy (0.01: 1 %)."),
    ] = None,
    budget: Annotated[
        float | None,
        option(METHODS, "P-Sigmoid: find the best sigmoid that keeps this fraction, averaged over layers."),
    ] = None,
    out: Annotated[Path, option(OUTPUT, "The schedule file; evaluations are written next to it.")] = Path(
        "schedule.json"
    ),
    score: Annotated[str, option(METHODS, "The method between decoder layers that ranks the tokens.")] = "fastv",
    samples: Annotated[
        int, option(QUESTIONS, "Number of questions, none from the test split.", "--samples", "--limit")
    ] = 200,
    calibration: Annotated[
        str | None, option(QUESTIONS, "A folder with metadata.jsonl to take the questions from instead.")
    ] = None,
    seed: Annotated[int, option(QUESTIONS, "Seed for the questions and for P-Sigmoid.")] = 0,
    single: Annotated[
        bool,
        option(METHODS, "Find the best single cut within --tolerance instead, G-Search's baseline.", "--single"),
    ] = False,
    trials: Annotated[
        int | None,
        option(METHODS, "Evaluations per layer (G-Search, 6) or in total (P-Sigmoid, 30)."),
    ] = None,
    batch_size: BatchSize = 32,
    suffix: Suffix = "",
    max_new_tokens: MaxNewTokens = 8,
    overwrite: Overwrite = False,
) -> None:
    """Find how many visual tokens every decoder layer of a model needs, for the method schedule:file=OUT.

    Interrupted runs resume: run the same command again.

    Example: tokprune search --model tiny-llava --task findit --tolerance 0.01
    """
    searched = eval_module("search.search", needs=(*EVAL_NEEDS, "optuna"))
    check_least(max_new_tokens=max_new_tokens)
    wanted = searched.Wanted(tolerance, budget, score, samples, seed, trials, batch_size, single)
    questions = searched.calibration_task(task, calibration)
    runner = load_runner(model, max_new_tokens=max_new_tokens, suffix=suffix)
    searched.search(runner, model, questions, wanted, out, overwrite, tables.console())


@app.command(no_args_is_help=True, short_help="Find the cheapest configuration within a loss.")
def tune(
    task: Annotated[
        str,
        option(
            QUESTIONS,
            "A folder with metadata.jsonl or metadata.csv, easyvqa, findit, findit_hd, findone, watchit, or "
            "./file.py:Class. Of the embedded tasks, questions that are not test questions.",
            "--task",
            "--tasks",
        ),
    ],
    model: Model = "tiny-llava",
    device_map: DeviceMap = None,
    dtype: Dtype = "",
    attn: Attn = "",
    device: Device = "",
    max_loss: Annotated[
        str, option(METHODS, "The accuracy that may be lost, as 1% or 0.01: lost less won questions, of all.")
    ] = "1%",
    confidence: Annotated[float, option(METHODS, "How sure the promise is, between 0 and 1.")] = 0.95,
    goal: Annotated[
        str, option(METHODS, "What to save: latency (measured here), flops or memory.", "--for")
    ] = "latency",
    agree: Annotated[
        bool, option(METHODS, "Compare with the unpruned model's answers; the questions need no labels.", "--agree")
    ] = False,
    methods: Methods = "",
    keep: Annotated[str, option(METHODS, "Fractions to keep, separated by commas. Default: 0.75,0.5,0.25,0.11.")] = "",
    keep_tokens: KeepTokens = "",
    limit: Limit = None,
    frames: Frames = 8,
    suffix: Suffix = "",
    max_new_tokens: MaxNewTokens = 8,
    metric: Metric = "",
    batch_size: BatchSize = 32,
    out: Annotated[
        Path, option(OUTPUT, "Output folder: tokprune.json to attach, tune.html to read, and the answers in run/.")
    ] = Path("deploy"),
    overwrite: Overwrite = False,
) -> None:
    """Find the cheapest method and budget whose loss on your questions is within a tolerance, with stated confidence.

    A quarter of the questions races all configurations. The others test the best of them, from the safest to the
    cheapest, until one fails; the cheapest that passed is saved. If none did, the command ends with exit code 1.
    Interrupted runs resume.

    Example: tokprune tune --task my-pictures --max-loss 2% --for flops --out deploy
    """
    check_least(batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit)
    door = eval_module("tune.door", needs=(*EVAL_NEEDS, "scipy"))
    console = tables.console(quiet=not eval_module("run.processes").Processes.started().is_main)
    found = door.tune(
        model,
        task=task,
        max_loss=_share(max_loss),
        confidence=confidence,
        goal=goal,
        agree=agree,
        methods=names(methods),
        keep=ratios(keep) if keep else (),
        keep_tokens=_tokens(keep_tokens) if keep_tokens else (),
        limit=limit,
        frames=frames,
        suffix=suffix,
        max_new_tokens=max_new_tokens,
        metric=metric,
        batch_size=batch_size,
        device_map=device_map,
        dtype=dtype,
        attn=attn,
        device=device,
        out=out,
        overwrite=overwrite,
        console=console,
    )
    for said in found.sentences:
        console.print(said, soft_wrap=True)
    console.print(f"{out / 'tune.html'} has the questions that are lost, with pictures")
    if not found.promised:
        raise typer.Exit(1)
    console.print(f'Use it: tokprune.attach(model, "{out}/"), or --config {out}', markup=False)


def _share(text: str) -> float:
    """The share that --max-loss names, as 1% or 0.01."""
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise RunError(f"--max-loss {shown(text)} is not a share: use --max-loss 1% or 0.01") from error
    return number / 100 if text.strip().endswith("%") else number


@app.command("eval", no_args_is_help=True, short_help="Benchmarks of lmms-eval.")
def eval_(
    tasks: Annotated[
        str,
        option(
            QUESTIONS,
            "Tasks of lmms-eval, easyvqa, findit, findit_hd, or folders, separated by commas.",
            "--tasks",
            "--task",
        ),
    ],
    suite: Annotated[str, option(QUESTIONS, "Only lmms-eval for now.")] = "lmms-eval",
    limit: Annotated[int | None, option(QUESTIONS, "Limit the documents per task, for a quick look.")] = None,
    include_path: Annotated[Path | None, option(QUESTIONS, "A folder with more tasks in lmms-eval's format.")] = None,
    gen_kwargs: Annotated[str, option(QUESTIONS, "lmms-eval's generation settings, such as max_new_tokens=16.")] = "",
    metric: Annotated[
        str,
        option(
            QUESTIONS,
            "How answers to tokprune's own tasks and folders are graded: exact, normalized, contains, choice, "
            "relaxed, vqa or anls. Default: what each question asks for, else exact.",
        ),
    ] = "",
    model: Model = "tiny-llava",
    dtype: Dtype = "",
    attn: Attn = "",
    device: Device = "",
    model_args: Annotated[str, option(MODEL, "More arguments of the plug-in, such as device_map=auto,frames=16.")] = "",
    methods: Annotated[
        str,
        option(
            METHODS,
            "Names or specifications, separated by commas; the unpruned run (none) is included. Default: vtc_cls.",
            "--methods",
            "--method",
        ),
    ] = "",
    config: Saved = None,
    keep: Annotated[str, option(METHODS, "Fractions to keep, separated by commas. Default: 0.25.")] = "",
    keep_tokens: KeepTokens = "",
    batch_size: Annotated[int, option(RUNNING, "Documents per batch.")] = 8,
    processes: Annotated[int, option(RUNNING, "Processes on this machine that share the documents.")] = 1,
    out: Annotated[Path, option(OUTPUT, "Output folder, for lmms-eval's files too.")] = Path("runs/eval"),
    overwrite: Overwrite = False,
    strict: Strict = False,
) -> None:
    """Run benchmarks of a suite for several methods and ratios, each against the unpruned run on the same documents.

    Configurations that the folder already holds are not run again; add methods and ratios by running it again.

    Example: tokprune eval --tasks mme,pope --model llava-hf/llava-1.5-7b-hf --methods vtc_cls,fopru --limit 100
    """
    if suite != "lmms-eval":
        raise RunError(f"invalid --suite {suite!r}: use lmms-eval")
    check_least(batch_size=batch_size, processes=processes, limit=limit)
    check_most("--processes", processes, 256)
    chosen = [*names(methods), *saved_folders(config)] or ["vtc_cls"]
    lmms = eval_module("suites.lmms", needs=("easy_vqa", "filelock"))
    lmms.check_installed()
    counts = _tokens(keep_tokens) if keep_tokens else ()
    configs = lmms.grid(chosen, ratios(keep) if keep else () if counts else (0.25,), counts)
    arguments = _plugin_arguments(dtype, attn, device, model_args)
    wanted = lmms.Suite(
        model, names(tasks), configs, limit, batch_size, include_path, arguments, gen_kwargs, processes, metric
    )
    alarms = lmms.run(wanted, out, tables.console(), overwrite)
    tables.console().print(f"rows.jsonl and samples.jsonl are in {out}")
    _end(alarms if strict else ())


@app.command(no_args_is_help=True, short_help="Measure published scores anew.")
def reproduce(
    model: Annotated[str, typer.Argument(help="Of published scores: llava-1.5-7b, llava-next-7b or qwen2.5-vl-7b.")],
    checkpoint: Annotated[
        str, option(MODEL, "Its weights: a local folder, a hub id or an embedded model. Default: the usual hub id.")
    ] = "",
    dtype: Dtype = "",
    attn: Attn = "",
    device: Device = "",
    methods: Methods = "fastv,divprune",
    budgets: Annotated[
        str,
        option(
            METHODS,
            "Visual tokens to keep, as 128,64, or shares of them, as 25%,10%. Default: those of the tables.",
            "--budgets",
            "--keep-tokens",
        ),
    ] = "",
    tasks: Annotated[
        str,
        option(
            QUESTIONS,
            "Tasks of lmms-eval, findit and others of ours, or folders, separated by commas. Default: pope, gqa, "
            "textvqa_val and mme, as far as there are published scores.",
            "--tasks",
            "--task",
        ),
    ] = "",
    limit: Limit = None,
    batch_size: Annotated[int, option(RUNNING, "Documents per batch.")] = 8,
    processes: Annotated[int, option(RUNNING, "Processes on this machine that share the documents.")] = 1,
    out: Annotated[Path, option(OUTPUT, "Output folder.")] = Path("runs/reproduce"),
    dry_run: Annotated[bool, option(OUTPUT, "Show the plan and its cost, and stop.", "--dry-run")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure published scores anew through lmms-eval, and show them beside what others print.

    The default of llava-1.5-7b is the yardstick on which independent sources agree: FastV and DivPrune at 128 and 64
    tokens. Interrupted runs resume. To rank the scores of several runs, put their reproduced.jsonl files into a folder
    and use tokprune report.

    Example: tokprune reproduce llava-1.5-7b --dry-run
    """
    check_least(batch_size=batch_size, processes=processes, limit=limit)
    reproduction = eval_module("reproduce", needs=("easy_vqa", "filelock", "jinja2", "pandas", "scipy", "tabulate"))
    wanted = reproduction.Wanted(model, names(methods), names(tasks), names(budgets), checkpoint, limit)
    if dry_run:
        return reproduction.plan(wanted, tables.console(), estimate.shape_of(checkpoint) if checkpoint else None)
    lmms = eval_module("suites.lmms")
    lmms.check_installed()
    arguments = _plugin_arguments(dtype, attn, device, "")
    suite = reproduction.suite_of(wanted, batch_size, arguments, processes)
    reproduction.run(wanted, suite, out, tables.console(), overwrite)


def _plugin_arguments(dtype: str, attn: str, device: str, more: str) -> str:
    """Arguments of the plug-in of lmms-eval from options of a command."""
    loading = {"dtype": dtype, "attn_implementation": attn, "device": device}
    return ",".join([*(f"{name}={value}" for name, value in loading.items() if value), *([more] if more else [])])


@app.command(no_args_is_help=True, short_help="Write the report of a comparison, or a leaderboard.")
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="The output folder of tokprune compare, or a folder of files that tokprune reproduce wrote."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write one HTML file here instead.")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Load the model of the run and draw pictures that are not stored.")
    ] = False,
    form: Form = "",
) -> None:
    """Write the report and the tables of a comparison again from its folder.

    The page needs no network. Without --out, report.html, table.md and table.csv are written to the folder; with --out,
    nothing in the folder changes. Of a folder of JSONL files that tokprune reproduce wrote, leaderboard.html is
    written: it ranks methods as far as their differences are not noise.

    Example: tokprune report runs/compare --format latex
    """
    _check_form(form)
    is_run = any((folder / name).is_file() for name in ("run.json", "samples.jsonl"))  # what is left of one, too
    if not is_run and any(folder.glob("*.jsonl")):
        if form or pictures:
            raise RunError("a leaderboard is a page alone: leave --format and --pictures out")
        board = eval_module("report.leaderboard")
        return typer.echo(f"wrote {board.write(board.read(folder), out or folder / board.NAME)}")
    reports = eval_module("report.html")
    if form:
        if out or pictures:
            raise RunError("--format prints a table and writes no page: leave --out and --pictures out")
        run = eval_module("report.stored").Run.read(folder)
        return typer.echo(eval_module("report.exports").text_of(form, run.rows, run.question_only), nl=False)

    def artist(run):
        runner = load_runner(str(run.settings.get("model")), suffix=str(run.settings.get("suffix", "")))
        return eval_module("report.losses").Artist.of_settings(runner, run.settings)

    try:
        run = reports.write(folder, artist if pictures else None, out)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; use another file with --out, or "
            "free some space"
        ) from error
    for said in run.remarks:
        typer.echo(f"tokprune: {said}", err=True)
    typer.echo(f"wrote {out}" if out else f"wrote report.html, table.md and table.csv to {folder}")


@app.command(no_args_is_help=True, short_help="Measure time and memory.")
def bench(
    shape: Annotated[str, option(MODEL, "A known shape with random weights, such as llava-1.5-7b.")] = "",
    model: Annotated[
        str,
        option(
            MODEL, "Or a model with weights: tiny-llava, tiny-llava-next or tiny-qwen (embedded), a folder, a hub id."
        ),
    ] = "",
    layers: Annotated[int | None, option(MODEL, "With --shape: number of decoder layers.")] = None,
    vision_layers: Annotated[int | None, option(MODEL, "With --shape: number of vision tower layers.")] = None,
    dtype: Annotated[str, option(MODEL, "float32, bfloat16 or float16. Default: bfloat16 on a GPU.")] = "",
    attn: Attn = "sdpa",
    device: Device = "",
    methods: Methods = "",
    config: Saved = None,
    keep: Keep = "0.25",
    batch_size: Annotated[str, option(INPUTS, "Batch sizes, separated by commas.")] = "1",
    new_tokens: Annotated[str, option(INPUTS, "Output lengths in tokens, separated by commas.")] = "16",
    resolution: Annotated[
        str,
        option(
            INPUTS,
            "Sides of a square picture in pixels, separated by commas. Any-resolution models cut it into crops; "
            "llava-1.5 gets a vision tower of that size, with more patches.",
        ),
    ] = "",
    picture: Annotated[
        Path | None, option(INPUTS, "A picture to measure on, such as a page; default: smooth noise.", "--picture")
    ] = None,
    text: Annotated[int, option(INPUTS, "Text tokens per prompt.")] = 64,
    serve: Annotated[
        bool,
        option(
            RUNNING,
            "Throughput of a vLLM server instead: one method (vtc_cls), the fractions of --keep in turn, --new-tokens "
            "once. Without --model, a small LLaVA with random weights.",
            "--serve",
        ),
    ] = False,
    concurrency: Annotated[
        str, option(RUNNING, "With --serve: requests at a time, separated by commas.")
    ] = "1,4,16,64",
    rounds: Annotated[int, option(RUNNING, "Measured rounds; 95 % intervals need at least six.")] = 6,
    warmup: Annotated[int, option(RUNNING, "Warm-up rounds before the measured ones.")] = 1,
    out: Annotated[Path, option(OUTPUT, "The JSONL file to write rows to.")] = Path("runs/bench.jsonl"),
    overwrite: Overwrite = False,
) -> None:
    """Measure time and memory saved by pruning, compare with the predicted cost, and find the break-even point.

    Example: tokprune bench --model tiny-llava --methods vtc_cls,fopru --keep 0.5,0.25 --batch-size 1,8
    """
    if serve:
        given = {"--shape": shape, "--attn": attn != "sdpa", "--device": device, "--resolution": resolution}
        given |= {"--layers": layers, "--vision-layers": vision_layers, "--picture": picture, "--config": config}
        _refuse_with_serve({**given, "--batch-size": batch_size != "1"})
        serving = eval_module("bench.serving", needs=("psutil", "filelock"))
        return serving.run(
            serving.Settings(
                model=model,
                method=_only("--methods", names(methods) or ["vtc_cls"]),
                keep=ratios(keep),
                concurrency=numbers("--concurrency", concurrency),
                new_tokens=_only("--new-tokens", numbers("--new-tokens", new_tokens)),
                n_text=text,
                rounds=rounds,
                warmup=warmup,
                dtype=dtype,
            ),
            out,
            overwrite,
            tables.console(),
        )
    sweep = eval_module("bench.sweep", needs=("psutil", "filelock"))
    lists = {
        "batch_sizes": numbers("--batch-size", batch_size),
        "new_tokens": numbers("--new-tokens", new_tokens),
        "resolutions": numbers("--resolution", resolution) if resolution else (),
    }
    specs = [*names(methods), *saved_folders(config)]
    if not shape and model in KNOWN:
        shape, model = model, ""
    settings = sweep.Settings(
        **lists,
        shape=shape,
        model=model,
        methods=specs,
        keep=ratios(keep),
        picture=picture,
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


def _refuse_with_serve(given: dict[str, object]) -> None:
    """Raise RunError for an option that a server does not take."""
    if name := next((name for name, value in given.items() if value), None):
        raise RunError(f"{name} cannot be given with --serve; leave it out")


def _only(flag: str, values: Sequence[Any]) -> Any:
    """The one value of an option that takes several elsewhere."""
    if len(values) != 1:
        raise RunError(f"{flag} takes one value with --serve, not {len(values)}")
    return values[0]


PRESETS = {"llava-1.5": (192, 128, 64), "llava-next": (640, 320, 160)}


def _tokens(text: str) -> list[int]:
    """Numbers of tokens, or those of a preset."""
    if text in PRESETS:
        return list(PRESETS[text])
    try:
        counts = numbers("--keep-tokens", text)
    except RunError as error:
        raise RunError(
            f"--keep-tokens {shown(text)} is not a list of whole numbers: use --keep-tokens 192,128,64, or a "
            f"preset: {', '.join(PRESETS)}"
        ) from error
    check_least(keep_tokens=min(counts))
    return counts
