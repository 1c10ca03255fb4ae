"""Finds a schedule of cuts for a model: how many visual tokens every decoder layer needs (arXiv 2412.00556).

G-Search finds the fewest tokens per layer that keep the accuracy; P-Sigmoid finds the best sigmoid for a budget. The
questions are not those of the test split. Accuracy is not monotone in the number of tokens, and on a few hundred
questions its interval is some percent wide. So the result holds for these questions; measure it on the test split with
`tokprune compare`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from optuna.trial import Trial
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from tokprune.integrations.transformers import family_of

import tokprune
from tokprune.core.errors import RunError, TokPruneError
from tokprune.core.schedules import ScheduleFile, write_schedule
from tokprune.core.signals import Decoder
from tokprune.core.tokens import Stage

from ..compare import settings
from ..report.progress import Elapsed
from ..report.terminal import Grid
from ..run.plan import Plan
from ..run.rows import NONE, Config, conditions
from ..run.runner import Runner
from ..stats import wilson
from ..tasks import Sample, Task, load_task, stratified
from ..tasks.imagefolder import ImageFolder
from .algorithms import EVALUATIONS, TRIALS, best_single, g_search, p_sigmoid
from .trials import Counts, Point, Trials, key_of, opened

# ---- settings and questions


@dataclass(frozen=True)
class Wanted:
    """What to search for.

    Args:
        tolerance: for G-Search, the accuracy that may be lost, from 0 to 1.
        budget: for P-Sigmoid, the ratio of visual tokens left, mean over all decoder layers.
        score: specification of the method that ranks the tokens.
        samples: number of questions, at most.
        seed: for drawing the questions, and for P-Sigmoid.
        trials: evaluations per layer (G-Search, 6 by default) or in all (P-Sigmoid, 30 by default).
        batch_size: questions at a time.
        single: search for the best single cut instead, the control of G-Search.

    Raises:
        RunError: a value is invalid, or the score takes no schedule.
    """

    tolerance: float | None = None
    budget: float | None = None
    score: str = "fastv"
    samples: int = 200
    seed: int = 0
    trials: int | None = None
    batch_size: int = 32
    single: bool = False

    def __post_init__(self):
        if self.single and self.tolerance is None:
            raise RunError("--single is the control of --tolerance; type --tolerance 0.01 --single")
        if (self.tolerance is None) == (self.budget is None):
            raise RunError(
                "type --tolerance 0.01 for the fewest tokens that keep the accuracy, or --budget 0.25 for the best "
                "sigmoid with that mean ratio; not both"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise RunError(f"invalid --tolerance {self.tolerance:g}; type --tolerance 0.01 to lose at most 1 %")
        if self.budget is not None and not 0 < self.budget < 1:
            raise RunError(f"--budget {self.budget:g} is not between 0 and 1; type --budget 0.25")
        if min(self.samples, self.batch_size, 1 if self.trials is None else self.trials) < 1:
            raise RunError("--samples, --trials and --batch-size take whole numbers of at least 1")
        if self.seed < 0:
            raise RunError("--seed takes whole numbers of at least 0")
        try:
            built = tokprune.get_method(self.score)
            fits = built.stage is Stage.DECODER and hasattr(built, "schedule")
            if not fits or built.schedule is not None:
                raise RunError("it has to prune between decoder layers, and to be named without a schedule")
            tokprune.get_method(self.spec({1: 1}, 2))
        except TokPruneError as error:
            raise RunError(f"invalid --score {self.score!r}: {error}; type --score fastv, for instance") from error

    def spec(self, counts: Counts, n_visual: int) -> str:
        """What `attach` takes for a schedule; "none" for the empty one."""
        steps = "/".join(f"{layer}x{n / n_visual!r}" for layer, n in sorted(counts.items()))
        return f"{self.score}:schedule=layers/{steps}" if counts else NONE


def calibration_task(name: str, folder: str | None = None) -> Task:
    """Questions that are not test questions of a task: its calibration split, or a folder of the user.

    Raises:
        RunError: the task has no such split and no folder is named, or the folder is the task itself.
    """
    task = load_task(name)
    if folder is not None:
        other = ImageFolder(Path(folder))
        if isinstance(task, ImageFolder) and task.folder.resolve() == other.folder.resolve():
            raise RunError(f"--calibration {folder} is the task itself; name another folder")
        return other
    split = getattr(task, "calibration_split", None)
    if split is None:
        raise RunError(
            f"{name} has no other questions than its test questions; type --calibration FOLDER, another folder with "
            "pictures and a metadata.jsonl or metadata.csv"
        )
    return type(task)(split)  # type: ignore[call-arg]


class Scorer:
    """Evaluates schedules on questions, each schedule once. Pictures are processed once.

    Args:
        runner: model and processor.
        task: gives the pictures.
        samples: the questions.
        wanted: gives the score and the batch size.
        trials: the schedules evaluated so far; takes new ones.
        progress: called with the figures of every new schedule.
    """

    def __init__(
        self,
        runner: Runner,
        task: Task,
        samples: Sequence[Sample],
        wanted: Wanted,
        trials: Trials,
        progress: Callable[[Point], None] = lambda point: None,
    ):
        self.runner, self.wanted, self.trials, self.progress = runner, wanted, trials, progress
        size = wanted.batch_size
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        self.batches = [(part, runner.prepare(task, part, [s.image_id for s in part])) for part in parts]
        self.decoder: Decoder = family_of(runner.model).decoder
        self.n_visual_of: list[int] = []
        for _, inputs in self.batches:
            with tokprune.attach(runner.model, "uniform", keep_ratio=1) as attachment:
                runner.model(**inputs, logits_to_keep=1)
                self.n_visual_of += [image.n_visual for image in attachment.report.encoded]
        self.n_visual = max(self.n_visual_of)

    def __call__(self, counts: Counts, trial: Trial | None = None) -> Point:
        """The figures of a schedule, without the layers at which nothing falls; told to the trial that proposed it."""
        left, falling = self.n_visual, {}
        for layer, n in sorted(counts.items()):
            if n < left:
                falling[layer] = left = n
        key = key_of(falling)
        known = self.trials.points.get(key)
        point = known or self._evaluated(key, falling)
        if trial is not None or known is None:
            self.trials.add(point, trial)
        if known is None:
            self.progress(point)
        return point

    def _evaluated(self, key: str, counts: Counts) -> Point:
        config = Config(self.wanted.spec(counts, self.n_visual))
        n_layers, right, by_layer = self.decoder.n_layers, 0, []
        for part, inputs in self.batches:
            salts = [zlib.crc32(s.id.encode()) for s in part]
            tokens, report, _ = self.runner.answer(inputs, config, salts)
            texts = self.runner.processor.batch_decode(tokens, skip_special_tokens=True)
            right += sum(s.is_right(t) for t, s in zip(texts, part, strict=True))
            if report is not None:
                by_layer += [image.n_by_layer(n_layers) for image in report.encoded]
        by_layer = by_layer or [[n] * n_layers for n in self.n_visual_of]
        return Point(
            key,
            right,
            sum(len(part) for part, _ in self.batches),
            tuple(float(mean(n)) for n in zip(*by_layer, strict=True)),
        )


# ---- the command


def search(
    runner: Runner, model_name: str, task: Task, wanted: Wanted, out: Path, overwrite: bool, console: Console
) -> ScheduleFile:
    """Search, write the schedule file and print it. An interrupted search resumes.

    Args:
        runner: model and processor.
        model_name: as the user typed it.
        task: the questions, of which some are drawn.
        wanted: what to search for.
        out: the schedule file; the evaluated schedules go to a file next to it.
        overwrite: start over.
        console: to print on.

    Raises:
        RunError: a file cannot be written, or belongs to a search with other settings.
    """
    if ":" in str(out):
        raise RunError(f"--out {out}: a colon would end the option schedule:file=...; name a file without one")
    samples = stratified(task.samples(), wanted.samples, wanted.seed)
    checksum = getattr(task, "checksum", None)
    pictures = 0 if checksum is None else zlib.crc32(repr([checksum(s.image_id) for s in samples]).encode())
    asked = {k: v for k, v in vars(wanted).items() if k != "trials"}  # more trials resume it
    plan = Plan([(task, [samples])], [])
    facts = settings(runner, model_name, plan, **asked, split=_split(task), pictures=pictures)
    with opened(out, facts, overwrite) as trials:
        if trials.points:
            console.print(f"The search resumes: {len(trials.points)} schedules in {trials.path} are evaluated already")
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), Elapsed()
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"{task.name}: {len(samples)} pictures", total=None)
            scorer = Scorer(runner, task, samples, wanted, trials, lambda p: _show(progress, bar, trials, p))
            counts, more = _found(scorer, wanted)
        points = scorer({}), scorer(counts)
        file = _file(scorer, counts, {**_provenance(model_name, runner, task, samples, wanted, points), **more})
        try:
            write_schedule(out, file)
        except OSError as error:
            raise RunError(f"cannot write {out}: {error.strerror or error}; type the same command again") from error
    _print(console, out, scorer, points)
    return file


def _found(scorer: Scorer, wanted: Wanted) -> tuple[Counts, dict[str, Any]]:
    decoder, n_visual = scorer.decoder, scorer.n_visual
    if wanted.tolerance is not None:
        evaluations = wanted.trials or EVALUATIONS
        name, strategy = ("single", best_single) if wanted.single else ("g-search", g_search)
        counts = strategy(scorer, decoder.n_layers, n_visual, wanted.tolerance, evaluations)
        return counts, {"search": name, "evaluations_a_layer": evaluations}
    trials = wanted.trials or TRIALS
    scorer({})
    study, budget = scorer.trials.study, float(wanted.budget or 0)
    counts, parameters = p_sigmoid(scorer, study, decoder, n_visual, budget, trials, wanted.seed)
    return counts, {"search": "p-sigmoid", "trials": trials, **parameters}


def _file(scorer: Scorer, counts: Counts, found: dict[str, Any]) -> ScheduleFile:
    # A file needs a layer, also where nothing can be pruned: it keeps everything there.
    ratios = {layer: n / scorer.n_visual for layer, n in counts.items()} or {1: 1.0}
    decoder = scorer.decoder
    return ScheduleFile(scorer.wanted.score, ratios, decoder.n_layers, decoder.fingerprint, found)


def _provenance(
    model_name: str, runner: Runner, task: Task, samples: Sequence[Sample], wanted: Wanted, points: tuple[Point, Point]
) -> dict[str, Any]:
    where = conditions(runner.model)
    bare, found = points
    return {
        "model": model_name,
        "weights": runner.fingerprint(),
        "task": task.name,
        "split": _split(task),
        "tolerance": wanted.tolerance,
        "budget": wanted.budget,
        "seed": wanted.seed,
        "metric": "exact_match",
        "unpruned": bare.accuracy,
        "value": found.accuracy,
        "n_samples": found.n,
        "tokens": list(found.tokens),
        "tokens_unpruned": list(bare.tokens),
        **{name: where[name] for name in ("date", "device", "dtype", "torch", "transformers", "tokprune", "commit")},
        "samples": [s.id for s in samples],
    }


def _split(task: Task) -> str:
    return getattr(task, "split", "")


def _show(progress: Progress, bar: Any, trials: Trials, point: Point) -> None:
    text = f"{len(trials.points)} schedules; {point.key or 'unpruned'}: {point.accuracy:.3f}"
    progress.update(bar, description=text)


def _print(console: Console, out: Path, scorer: Scorer, points: tuple[Point, Point]) -> None:
    """Print the schedule, its accuracy, and how to use it."""
    bare, found = points
    pairs = list(zip(found.tokens, bare.tokens, strict=True))
    lines = [[str(layer), f"{n:.4g}", f"{n / before:.3f}"] for layer, (n, before) in enumerate(pairs)]
    whole, left = mean(bare.tokens), mean(found.tokens)
    lines.append(["mean", f"{left:.4g}", f"{left / whole:.3f}"])
    console.print(f"Visual tokens by decoder layer, in {out}:")
    console.print(Grid(["layer", "tokens left", "ratio"], lines, sections=[len(pairs)]))
    console.print(f"Accuracy [95 % interval] on {found.n} questions that are not test questions:")
    for name, point in (("unpruned", bare), ("found", found)):
        low, high = wilson(point.right, point.n)
        console.print(f"{name:8} {point.accuracy:.3f} [{low:.3f}, {high:.3f}]")
    half, tolerance = (high - low) / 2, scorer.wanted.tolerance
    if tolerance is not None and half > tolerance:
        console.print(
            f"The accuracy is known to +-{half:.2f}, so a tolerance of {tolerance:g} may not hold on other questions. "
            "Use more (--samples), and measure on test questions with tokprune compare"
        )
    console.print(f"{len(scorer.trials.points)} schedules were evaluated; their figures are in {scorer.trials.path}")
    console.print(f'Use it: tokprune.attach(model, "schedule:file={out}"), or --methods none,schedule:file={out}')
