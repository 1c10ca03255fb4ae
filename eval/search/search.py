"""Finds a schedule of cuts for a model: which decoder layers need how many visual tokens (arXiv 2412.00556).

G-Search finds the fewest tokens of every layer that answer as well as all of them; P-Sigmoid the best sigmoid of a
budget. Questions for it are kept apart from the test split. Accuracy is not monotone in the number of tokens, and that
of a few hundred questions has an interval of some percent: what is found held on these questions, and is measured anew
on the test split with `tokprune compare`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokprune.integrations.transformers import family_of

import tokprune
from tokprune.core.errors import RunError, TokPruneError
from tokprune.core.schedules import ScheduleFile, write_schedule
from tokprune.core.signals import Decoder
from tokprune.core.tokens import Stage

from ..compare import settings
from ..run.lines import counted
from ..run.rows import NONE, Config, conditions
from ..run.runner import Runner
from ..stats import wilson
from ..tasks import Sample, Task, load_task, stratified
from ..tasks.imagefolder import ImageFolder
from .algorithms import EVALUATIONS, TRIALS, best_single, g_search, p_sigmoid
from .trials import Counts, Point, Trials, key_of

# ---- the questions, and what is asked of them


@dataclass(frozen=True)
class Wanted:
    """What is searched for.

    Args:
        tolerance: of G-Search: accuracy that may be lost, of 1.
        budget: of P-Sigmoid: mean over all decoder layers of the fraction of visual tokens left.
        score: a specification of what ranks the tokens.
        samples: questions, at most.
        seed: of the draw of questions and of P-Sigmoid.
        trials: evaluations of a layer, or of P-Sigmoid; None is 6, or 30.
        batch_size: questions at a time.
        single: look for the best single cut instead, the control of G-Search.

    Raises:
        RunError: a value that is none, or a score that takes no schedule.
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
                "type --tolerance 0.01 for the fewest tokens that answer as well, or --budget 0.25 for the best "
                "sigmoid of so many; not both"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise RunError(f"--tolerance {self.tolerance:g} is no loss of accuracy; type --tolerance 0.01 for 1 %")
        if self.budget is not None and not 0 < self.budget < 1:
            raise RunError(f"--budget {self.budget:g} is no fraction of the tokens; type --budget 0.25")
        if min(self.samples, self.batch_size, 1 if self.trials is None else self.trials) < 1:
            raise RunError("--samples, --trials and --batch-size take whole numbers of at least 1")
        if self.seed < 0:
            raise RunError("--seed takes whole numbers of at least 0")
        try:
            built = tokprune.get_method(self.score)
            fits = built.stage is Stage.DECODER and hasattr(built, "schedule")
            if not fits or built.schedule is not None:
                raise RunError("it is no method between decoder layers without a schedule")
            tokprune.get_method(self.spec({1: 1}, 2))
        except TokPruneError as error:
            raise RunError(f"--score {self.score!r} cannot rank: {error}; type --score fastv, for instance") from error

    def spec(self, counts: Counts, n_visual: int) -> str:
        """What `attach` takes for a schedule; "none" for the empty one."""
        steps = "/".join(f"{layer}x{n / n_visual!r}" for layer, n in sorted(counts.items()))
        return f"{self.score}:schedule=layers/{steps}" if counts else NONE


def calibration_task(name: str, folder: str | None = None) -> Task:
    """Questions kept apart from the test questions of a task: its split for that, or a folder of the user's own.

    Raises:
        RunError: there is no such split and no other folder.
    """
    task = load_task(name)
    if folder is not None:
        other = ImageFolder(Path(folder))
        if isinstance(task, ImageFolder) and task.folder.resolve() == other.folder.resolve():
            raise RunError(f"--calibration {folder} is the task itself; name a folder that is not tested on")
        return other
    split = getattr(task, "calibration_split", None)
    if split is None:
        raise RunError(
            f"{name} has no questions apart from those it tests with; type --calibration FOLDER, another folder with "
            "pictures and a metadata.jsonl"
        )
    return type(task)(split)  # type: ignore[call-arg]


class Scorer:
    """Evaluates schedules on questions; processed pictures are kept.

    Args:
        runner: model and processor.
        task: where the pictures are.
        samples: the questions.
        wanted: with what score.
        trials: what is known already, and where it is noted.
        progress: called with every point that is new.
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

    def __call__(self, counts: Counts) -> Point:
        """Of one schedule; what does not fall is left out of it."""
        left, falling = self.n_visual, {}
        for layer, n in sorted(counts.items()):
            if n < left:
                falling[layer] = left = n
        key = key_of(falling)
        if key not in self.trials.points:
            self.trials.add(self._evaluated(key, falling))
            self.progress(self.trials.points[key])
        return self.trials.points[key]

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
    """Search, write the schedule file, and show it; a search that was cut off goes on.

    Args:
        runner: model and processor.
        model_name: as the user typed it.
        task: the questions, of which some are drawn.
        wanted: what is searched for.
        out: the schedule file; the evaluated points go to a file beside it.
        overwrite: start over.
        console: to show it on.

    Raises:
        RunError: it cannot be written, or is of a search with other settings.
    """
    if ":" in str(out):
        raise RunError(f"--out {out}: a colon ends the option schedule:file=...; name a file without one")
    samples = stratified(task.samples(), wanted.samples, wanted.seed)
    checksum = getattr(task, "checksum", None)
    pictures = 0 if checksum is None else zlib.crc32(repr([checksum(s.image_id) for s in samples]).encode())
    asked = {k: v for k, v in vars(wanted).items() if k != "trials"}  # with more trials it goes on
    facts = settings(runner, model_name, [(task, samples)], [], **asked, split=_split(task), pictures=pictures)
    with contextlib.closing(Trials(out, facts, overwrite)) as trials:
        if trials.damaged:
            then = "what it held is evaluated again", "what they held is evaluated again"
            console.print(counted(trials.damaged, trials.path, *then), markup=False, soft_wrap=True)
        if trials.points:
            console.print(f"{len(trials.points)} schedules are in {trials.path} already and are not evaluated again")
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
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
    _tell(console, out, scorer, points)
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
    counts, parameters = p_sigmoid(scorer, decoder, n_visual, float(wanted.budget or 0), trials, wanted.seed)
    return counts, {"search": "p-sigmoid", "trials": trials, **parameters}


def _file(scorer: Scorer, counts: Counts, found: dict[str, Any]) -> ScheduleFile:
    # Nothing to spare: a file has a layer all the same, and keeps everything there.
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


def _tell(console: Console, out: Path, scorer: Scorer, points: tuple[Point, Point]) -> None:
    """The table of what was found, and how to use it."""
    bare, found = points
    title = f"{out}: visual tokens by decoder layer"
    table = Table("layer", "tokens left", "ratio", title=title, title_justify="left")
    for layer, (n, before) in enumerate(zip(found.tokens, bare.tokens, strict=True)):
        table.add_row(str(layer), f"{n:.4g}", f"{n / before:.3f}")
    whole, left = mean(bare.tokens), mean(found.tokens)
    table.add_section()
    table.add_row("mean", f"{left:.4g}", f"{left / whole:.3f}")
    console.print(table)
    for name, point in (("unpruned", bare), ("found", found)):
        low, high = wilson(point.right, point.n)
        console.print(
            f"{name:8} {point.accuracy:.3f} [{low:.3f}, {high:.3f}] of {point.n} questions that are not test questions"
        )
    low, high = wilson(found.right, found.n)
    tolerance = scorer.wanted.tolerance
    if tolerance is not None and (high - low) / 2 > tolerance:
        console.print(
            f"{found.n} questions are known to +-{(high - low) / 2:.2f} alone, so a tolerance of {tolerance:g} may "
            "hold for them alone; --samples takes more, and tokprune compare measures on test questions"
        )
    console.print(f"{len(scorer.trials.points)} schedules were evaluated; they are in {scorer.trials.path}")
    console.print(f'Use it: tokprune.attach(model, "schedule:file={out}"), or --methods none,schedule:file={out}')
