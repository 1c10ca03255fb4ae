"""Methods and ratios side by side: accuracy with its interval beside what the language model really saw."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from tokprune.core import own_code
from tokprune.core.budget import Budget
from tokprune.core.errors import RunError
from tokprune.methods import METHODS
from tokprune.prune.saved import NAME, is_saved, takes_budget
from tokprune.prune.videos import N_FRAMES, Clip

from .report import answers, pareto
from .report import html as report
from .report.findings import task_table
from .report.losses import Artist
from .report.progress import following, progress
from .report.rankings import rankings
from .run.folder import RunFolder
from .run.lines import counted
from .run.plan import Plan
from .run.processes import launched_alone
from .run.rows import (
    DOWNSAMPLE,
    FRAMES,
    LESS,
    NONE,
    TRANSFORMERS,
    BatchTime,
    Config,
    Row,
    SampleRow,
    Summariser,
)
from .run.runner import Runner, batches
from .tasks import Sample, Task, load_task, stratified
from .tasks.grading import AS_ASKED, Grading
from .tasks.prompted import Prompted
from .tasks.subset import SUBSET_SIZE

RANDOM_SEEDS = 3
CONDITIONS = ("dtype", "attn_implementation", "torch", "transformers", "tokprune", "commit")


def configurations(
    methods: Sequence[str], ratios: Sequence[float], seeds: int = RANDOM_SEEDS, tokens: Sequence[int] = ()
) -> list[Config]:
    """The grid: methods with a budget at every ratio and number of tokens, `random` once a seed.

    Beside "none" are pictures of other questions.

    Raises:
        TokPruneError: an unknown method or option, or an invalid budget.
    """
    budgets = [{"keep_ratio": ratio} for ratio in ratios] + [{"keep_tokens": n} for n in tokens]
    for budget in budgets:
        Budget(**budget)
    grid = []
    for spec in methods:
        if spec in LESS:
            grid += [Config(spec, **budget) for budget in budgets]
            continue
        if spec == NONE:
            grid += [Config(NONE), Config(NONE, shuffled=True)]
            continue
        is_random = spec == "random" or (spec.startswith("random:") and "seed=" not in spec)
        specs = [f"{spec}:seed={seed}" for seed in range(seeds)] if is_random else [spec]
        budgeted = [takes_budget(s) for s in specs]
        grid += [Config(s, **budget) for s, b in zip(specs, budgeted, strict=True) if b for budget in budgets]
        grid += [Config(s) for s, b in zip(specs, budgeted, strict=True) if not b]
    return list(dict.fromkeys(grid))


def matched(
    runner: Runner, tasks: Sequence[tuple[Task, list[Sample]]], configs: Sequence[Config]
) -> tuple[list[Config], dict[str, str]]:
    """The same ratios of the language model's FLOPs instead of the tokens; and those out of reach, with the reason.

    Solved beside the median text of the questions, so that what methods really spend is as equal as tokens are whole.
    """
    n_text = runner.text_tokens([s for _, samples in tasks for s in samples])
    same = [
        c
        if c.keep_ratio is None or c.method in LESS
        else replace(c, keep_ratio=None, flops_ratio=c.keep_ratio, flops_text=n_text)
        for c in configs
    ]
    reasons: dict[str, str] = {}
    for task, samples in tasks:
        reasons |= runner.out_of_reach(task, samples, same)
    return [c for c in same if c.label not in reasons], reasons


def runnable(
    runner: Runner,
    tasks: Sequence[tuple[Task, list[Sample]]],
    configs: Sequence[Config],
    match_flops: bool,
    named: bool,
    console: Console,
) -> list[Config]:
    """The configurations that this model can run; what is left out is said.

    Args:
        runner: the model.
        tasks: with the samples to answer.
        configs: asked for.
        match_flops: read ratios as ratios of the language model's FLOPs.
        named: a user named the methods, so that one that cannot run is an error.
        console: where it is said.

    Raises:
        RunError: nothing is left, or not what was named.
    """
    missing = runner.missing(configs)
    if not any(shows_videos(*part) for part in tasks):
        missing |= {c.method: "frames needs a task about videos; leave it out" for c in configs if c.method == FRAMES}
    if missing and named:
        raise RunError(next(iter(missing.values())))
    if missing:
        console.print(f"Left out, because this model cannot run them: {', '.join(missing)}")
    left = [c for c in configs if c.method not in missing]
    if match_flops:
        left, reasons = matched(runner, tasks, left)
        for label, reason in reasons.items():
            console.print(f"Left out: {label}: {reason}")
    if not left:
        raise RunError("nothing is left to compare; name other methods with --methods, or larger ratios with --keep")
    return left


def controls(tasks: Sequence[tuple[Task, list[Sample]]]) -> list[str]:
    """What pruning is compared with unless it is left out: smaller pictures, and of videos also fewer frames."""
    return [DOWNSAMPLE, *([FRAMES] if any(shows_videos(*part) for part in tasks) else [])]


def shows_videos(task: Task, samples: Sequence[Sample]) -> bool:
    """Whether a task is about videos; its first question tells."""
    return bool(samples) and isinstance(task.image(samples[0].image_id), Clip)


def question_only(task: Task, samples: Sequence[Sample], grading: Grading = AS_ASKED) -> float | None:
    """Accuracy of the answer that training questions of the same words have most often; None without training."""
    train = task.train_samples()
    if train is None:
        return None
    answers: dict[str, Counter] = defaultdict(Counter)
    for s in train:
        answers[s.question][s.answer] += 1
        answers[f"kind {s.kind}"][s.answer] += 1
    guesses = [(answers.get(s.question) or answers[f"kind {s.kind}"]).most_common(1)[0][0] for s in samples]
    return mean(grading.value(s, guess) for guess, s in zip(guesses, samples, strict=True))


class Comparison:
    """A run of `tokprune compare`: answers go to a folder as they come, rows.jsonl follows at the end.

    Args:
        runner: model and processor.
        model_name: as the user typed it.
        folder: where it is written; what is there already is not asked again.
        plan: what is asked.
    """

    def __init__(self, runner: Runner, model_name: str, folder: RunFolder, plan: Plan):
        self.runner, self.model_name, self.folder, self.plan = runner, model_name, folder, plan
        self.configs = plan.configs
        self.rows: list[Row] = []
        self.floors: dict[str, float | None] = {}

    def run(self, console: Console) -> None:
        """Answer every question under every configuration, write rows and plot, and show the tables."""
        tasks = self.plan.tasks
        processes = self.folder.processes
        if processes.n > 1:
            console.print(f"{processes.n} processes share the questions")
        if launched_alone():
            console.print(
                "accelerate launched one process; for two type torchrun --nproc_per_node 2 -m tokprune.eval compare ..."
            )
        for path, n in self.folder.damaged.items():
            told = counted(n, path, "its batch is asked again", "their batches are asked again")
            console.print(told, markup=False, soft_wrap=True)
        if self.folder.answers:
            n_done = sum(len(rows) for rows in self.folder.answers.values())
            console.print(f"{n_done} answers are in {self.folder.path} already and are not asked for again")
        for task, samples in tasks:
            console.print(
                f"Asking {len(samples)} questions of {task.name} under {len(self.plan.configs)} configurations"
            )
        with progress(console) as bars:
            work = [(task, samples, self._todo(task, samples)) for task, samples in tasks]
            numbers = [bars.add_task(**self._bar(*part)) for part in work]
            for number, (task, samples, todo) in zip(numbers, work, strict=True):
                turns = [config.label for _, configs in todo for config in configs]
                self._answer(task, samples, todo, following(bars, number, task.name, turns))
        self.folder.gather()
        if processes.is_main:
            self._check_complete(tasks)
            self._write(tasks, console)

    def _check_complete(self, tasks: Sequence[tuple[Task, list[Sample]]]) -> None:
        """Raise where answers are not here, as those of processes on another machine that writes elsewhere."""
        for task, samples in tasks:
            if left := self._left(task, samples):
                raise RunError(
                    f"{len(left)} batches of {task.name} are not in {self.folder.path} at the end of the run; all "
                    "processes have to write to one folder. Type the same command again to answer what is missing"
                )

    def _write(self, tasks: Sequence[tuple[Task, list[Sample]]], console: Console) -> None:
        for task, samples in tasks:
            self.floors[task.name] = question_only(task, samples, self.runner.grading)
            self.rows += self._summaries(task)
        floors = [
            {"task": name, "method": "question only", "value": floor}
            for name, floor in self.floors.items()
            if floor is not None
        ]
        self.folder.write_jsonl("rows.jsonl", [*floors, *(asdict(row) for row in self.rows)])
        with self.folder.writing():
            pareto.write_png(self.rows, self.floors, self.folder.path / "accuracy.png")
            texts = max((c.flops_text for c in self.configs), default=0)
            draws = self.runner.backend == TRANSFORMERS  # where the model is in this process
            run = report.write(self.folder.path, (lambda run: Artist(self.runner, tasks, texts)) if draws else None)
        for path, n in run.damaged.items():  # of pictures alone: the other files have just been written
            told = counted(n, path, "its picture is drawn again", "their pictures are drawn again")
            console.print(told, markup=False, soft_wrap=True)
        for task, samples in tasks:
            console.print(task_table(task.name, [r for r in self.rows if r.task == task.name], self.floors[task.name]))
            self._print_wrong(task, samples, console)
        for ranking in rankings(self.rows):
            console.print(ranking)

    def _print_wrong(self, task: Task, samples: Sequence[Sample], console: Console) -> None:
        """The first wrong answers of the unpruned model, and a hint where most are not in the form that is graded."""
        rows = [r for key, some in self.folder.answers.items() if key[:2] == (task.name, NONE) for r in some]
        if found := answers.wrong(rows):
            console.print(found)
        if said := answers.hint(samples, rows):
            console.print(f"Hint: {said}", markup=False, soft_wrap=True)

    def _seen(self, task: Task) -> dict[tuple[str, int], BatchTime]:
        return {key[1:]: time for key, time in self.folder.times.items() if key[0] == task.name}

    def _todo(self, task: Task, samples: list[Sample]) -> list[tuple[int, list[Config]]]:
        """This process' share of the batches that are not answered."""
        return self._left(task, samples)[self.folder.processes.share]

    def _left(self, task: Task, samples: list[Sample]) -> list[tuple[int, list[Config]]]:
        """The batches that are not answered, with the configurations that have not."""
        todo = batches(len(self.plan.of(task)), self._configs(task, samples), self._seen(task))
        return self.runner.ordered(todo)

    def _configs(self, task: Task, samples: list[Sample]) -> list[Config]:
        """What is compared on a task: fewer frames only of videos."""
        return [c for c in self.configs if c.method != FRAMES or shows_videos(task, samples)]

    def _bar(self, task: Task, samples: list[Sample], todo: list[tuple[int, list[Config]]]) -> dict[str, Any]:
        n_done = sum(t.size for t in self._seen(task).values())
        n_mine = sum(len(self.plan.of(task)[batch]) * len(configs) for batch, configs in todo)
        return dict(description=f"{task.name}, {len(samples)} questions", total=n_done + n_mine, completed=n_done)

    def _answer(self, task: Task, samples: list[Sample], todo: list[tuple[int, list[Config]]], advance) -> None:
        for time in self._seen(task).values():
            if time.pictures != self._pictures(task, time.batch):
                raise RunError(
                    f"pictures of {task.name} have changed since {self.folder.path} was begun; name another folder "
                    "with --out, or start over with --overwrite"
                )
        n = self.folder.processes.n
        device = self.runner.conditions()["device"] + (f", one of {n} processes" if n > 1 else "")
        for config, rows, time in self.runner.run_batches(task, self.plan.of(task), todo):
            time = replace(time, pictures=self._pictures(task, time.batch), device=device)
            self.folder.add((task.name, config.label, time.batch), rows, time)
            advance(len(rows))

    def _pictures(self, task: Task, batch: int) -> int:
        """A checksum of the picture files of a batch; 0 for a task whose pictures cannot change."""
        checksum = getattr(task, "checksum", None)
        part = self.plan.of(task)[batch]
        return 0 if checksum is None else zlib.crc32(repr([checksum(s.image_id) for s in part]).encode())

    def _summaries(self, task: Task) -> list[Row]:
        given: dict[Config, list[SampleRow]] = {}
        times: dict[Config, list[BatchTime]] = {}
        for config in self.configs:
            keys = sorted(k for k in self.folder.answers if k[:2] == (task.name, config.label))
            given[config] = [row for key in keys for row in self.folder.answers[key]]
            times[config] = [self.folder.times[key] for key in keys]
        split = getattr(task, "split", "")
        suffix = getattr(task, "suffix", self.runner.suffix)
        return Summariser(self.model_name, self.runner.conditions(), task.name, split, suffix).rows(given, times)


def settings(runner: Runner, model_name: str, plan: Plan, **more: Any) -> dict[str, Any]:
    """Everything that an answer of a run depends on."""
    where = runner.conditions()
    return {
        "model": model_name,
        "weights": runner.fingerprint(),
        **plan.stored(),
        "code": code_of([c.method for c in plan.configs]),
        "flops_text": max((c.flops_text for c in plan.configs), default=0),
        "max_new_tokens": runner.max_new_tokens,
        "suffix": runner.suffix,
        **runner.grading.settings(plan.tasks),
        "prompt": runner.prompt_fingerprint(),
        **more,
        "device": where["gpu"] or "cpu",  # how many threads it has changes no answer
        **{name: where[name] for name in CONDITIONS},
    }


def code_of(specs: Sequence[str]) -> dict[str, int]:
    """Checksums of the files of a user's own methods and of saved folders, by what was typed."""
    folders = {spec: zlib.crc32((Path(spec) / NAME).read_bytes()) for spec in specs if is_saved(spec)}
    parts = [METHODS.parts(part)[0] for spec in specs if spec not in folders for part in spec.split("+")]
    return {part: own_code.checksum(part) for part in dict.fromkeys(parts) if ":" in part} | folders


def chosen_tasks(
    names: Sequence[str | Task], limit: int | None = None, full: bool = False, n_frames: int = N_FRAMES
) -> list[tuple[Task, list[Sample]]]:
    """Tasks by name or folder, or themselves, with the samples to answer.

    Of videos in a folder up to `n_frames` frames are taken.

    Raises:
        UnknownNameError, TaskError: there is no such task.
        RunError: two have one name.
    """
    loaded = [load_task(name, n_frames) if isinstance(name, str) else name for name in names]
    if len({t.name for t in loaded}) < len(loaded):
        raise RunError(
            f"two tasks are named alike ({', '.join(t.name for t in loaded)}); rename a folder, or run them apart"
        )
    return [(task, chosen_samples(task, limit, full)) for task in loaded]


def prompted(tasks: Sequence[tuple[Task, list[Sample]]], suffixes: Sequence[str]) -> list[tuple[Task, list[Sample]]]:
    """The same questions of every task once for each text that is added to them."""
    found: list[tuple[Task, list[Sample]]] = []
    for task, samples in tasks:
        for own in (Prompted(task, suffix) for suffix in suffixes):
            found.append((own, own.asked(samples)))
    return found


def chosen_samples(task: Task, limit: int | None = None, full: bool = False) -> list[Sample]:
    """The published subset of 800 questions; all with `full`; `limit` of them for a quick look."""
    samples = task.samples()
    if not full:
        samples = stratified(samples, SUBSET_SIZE)
    return samples if limit is None else stratified(samples, limit)
