"""`tokprune tune`: race configurations on a user's questions, test the best in order, save the cheapest that holds.

Answers go to a folder as those of `tokprune compare` do, so that an interrupted run resumes and processes share it. The
questions are in a seeded order, pictures together; the first ones are the race's and the last ones the test's.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from rich.console import Console

import tokprune
from tokprune.core import own_code
from tokprune.core.errors import RunError, TokPruneError
from tokprune.core.files import write_text
from tokprune.core.tokens import Count
from tokprune.methods import METHODS, build_method
from tokprune.prune.saved import NAME

from ..bench.break_even import Ranges, by_output_length, ratio
from ..compare import configurations, settings, shows_videos
from ..models import OF_VIDEOS
from ..report.progress import following, progress
from ..run.folder import RunFolder
from ..run.plan import Plan
from ..run.processes import Processes
from ..run.rows import NONE, BatchTime, Config, SampleRow
from ..run.runner import Runner, batches
from ..tasks import Sample, Task, load_task, normalise
from ..tasks.imagefolder import ImageFolder
from .promise import Outcome, holds, most_loss, questions_at, questions_needed
from .race import Entry, Finish, Parts, Rule, chosen, fewest, in_order, parts_of, race, smallest

GOALS = ("latency", "flops", "memory")
KEEP = (0.75, 0.5, 0.25, 0.11)
ROUNDS = 8  # in which the choice is timed beside the unpruned model
NEVER = ("blind", "random")  # controls that nobody deploys
# A second test of the same questions would spend the error twice.
AGAIN = "take other questions and another --out, or start over with --overwrite and trust the result less"


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Args:
        rule: the loss that may be, and the confidence.
        goal: what is saved: "latency", "flops" of the prefill, or "memory" of the KV cache.
        new_tokens: length of the answers, for latency and the break-even point.
        agree: compare with the unpruned model's answers instead of labels.
        batch_size: questions at a time.
    """

    rule: Rule
    goal: str = "latency"
    new_tokens: int = 8
    agree: bool = False
    batch_size: int = 32

    def __post_init__(self):
        if self.goal not in GOALS:
            raise RunError(f"invalid --for {self.goal!r}: use {', '.join(GOALS)}")
        if not 0 < self.rule.tolerance < 1:
            raise RunError(f"invalid --max-loss {self.rule.tolerance:g}: use --max-loss 1% or 0.01")
        if not 0 < self.rule.error < 1:
            raise RunError(f"invalid --confidence {1 - self.rule.error:g}: use a number between 0 and 1, as 0.95")


@dataclass
class Tested:
    """What the test of a configuration showed.

    Args:
        config: its label.
        seen: its answers.
        bound: the loss that is not exceeded, with the confidence asked for.
        promised: whether that is within the tolerance.
        cost: what is to be saved, relative to the unpruned run.
        more: about how many questions would have been enough; None where more do not help, or are not needed.
    """

    config: str
    seen: Outcome
    bound: float
    promised: bool
    cost: float
    more: int | None = None


@dataclass
class Tuned:
    """What was found.

    Args:
        finish: of the race.
        tests: in their order; at most the last one failed.
        config: the cheapest that passed, or the first one tested where none did; None where nothing was worth testing.
        test: of this configuration.
        saves: cost relative to the unpruned run by goal, in the test; what is unknown is left out.
        first, total: time to the first token and of the whole answer relative to the unpruned run, with 95 % interval.
        gains, losses: ranges of output lengths at which time is saved or lost.
        asked: answers that were asked for.
        grid: answers of all configurations to all questions.
        lost: its answers in the test that are worth less than the unpruned ones.
    """

    finish: Finish
    tests: list[Tested] = field(default_factory=list)
    config: Config | None = None
    test: Tested | None = None
    saves: dict[str, float] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    gains: Ranges = field(default_factory=list)
    losses: Ranges = field(default_factory=list)
    asked: int = 0
    grid: int = 0
    lost: list[SampleRow] = field(default_factory=list)

    @property
    def promised(self) -> bool:
        """Whether the configuration is within the tolerance, with the confidence asked for."""
        return self.test is not None and self.test.promised


# ---- questions and configurations


def questions_of(name: str, agree: bool, n_frames: int) -> Task:
    """A task by its name or folder; of one that has questions to find settings on, these, and none of its test."""
    if agree and Path(name).is_dir():
        return ImageFolder(Path(name), n_frames, labelled=False)
    task = load_task(name, n_frames)
    split = getattr(task, "calibration_split", None)
    return task if split is None else type(task)(split)  # type: ignore[call-arg]


def ordered(samples: Sequence[Sample], limit: int | None, rule: Rule) -> tuple[list[Sample], Parts]:
    """Questions in a seeded order in which those of a picture stay together, and their parts.

    Raises:
        RunError: they are too few to promise the tolerance.
    """
    found = sorted(samples, key=lambda s: (zlib.crc32(f"tune {s.image_id}".encode()), s.image_id, s.id))[:limit]
    n, confidence = len(found), f"{100 * (1 - rule.error):g} %"
    if n < fewest(rule):
        of_test, reachable = questions_needed(rule.tolerance, rule.error), 100 * smallest(n, rule.error)
        raise RunError(
            f"{n} questions cannot promise a loss of at most {100 * rule.tolerance:g} % with {confidence} confidence, "
            f"even if no answer changes: that takes {fewest(rule)}, of which {of_test} are for the test. {n} can "
            f"promise {reachable:.1f} %: use a larger --max-loss, more questions, or a lower --confidence"
        )
    parts = parts_of(n)
    start = n - parts.test
    looks = parts.looks[:-1]
    while found[start - 1].image_id == found[start].image_id and start > sum(looks):
        start -= 1  # a picture of the race is not in the test
    return found, Parts((*looks, start - sum(looks)), n - start)


def candidates(runner: Runner, task: Task, samples: Sequence[Sample], methods: Sequence[str], keep: Sequence[float],
               tokens: Sequence[int], console: Console) -> list[Config]:  # fmt: skip
    """Configurations that this model can run and that can be saved; by default of every method that takes a budget.

    Raises:
        TokPruneError: a method that was named does not exist, cannot run here or cannot be saved.
    """
    if own := next((part for spec in methods for part in spec.split("+") if own_code.is_reference(part)), None):
        raise RunError(f"{own} cannot be saved in a folder: register it as a plug-in of a package, then use its name")
    configs = configurations(list(methods) or usual(shows_videos(task, samples)), keep or (() if tokens else KEEP),
                             tokens=tokens)  # fmt: skip
    first, reasons, found = samples[0], dict[str, str](), []
    inputs = runner.prepare(task, [first], [first.image_id])
    todo = [c for c in configs if c.method != NONE]
    console.print(f"{len(todo)} configurations, each tried on one question first")
    for config in todo:
        try:
            runner.answer(inputs, config, (0,), max_new_tokens=1)
        except TokPruneError as error:
            if methods:
                raise
            reasons[config.method] = str(error)
        else:
            found.append(config)
    if reasons:
        console.print(f"Left out, because this model cannot run them: {', '.join(reasons)}")
    if not found:
        raise RunError("nothing is left to tune; name other methods with --methods, or larger ratios with --keep")
    return found


def usual(of_videos: bool) -> list[str]:
    """Methods that take a budget and need no file; those about frames only where there are any."""
    frames = {spec.partition(":")[0] for spec in OF_VIDEOS} if not of_videos else set()
    found = []
    for name in METHODS.own_names():
        method = build_method(name)[0]
        if method.takes_budget and not method.needs_file and method.count is not Count.CONTENT:
            found.append(name)
    return [name for name in found if name not in NEVER and name not in frames]


# ---- the run


class Tuning:
    """A run of `tokprune tune`.

    Args:
        runner: model and processor.
        task: gives the pictures.
        plan: the batches of all parts, the race's first.
        ends: numbers of the batch before which every look ends.
        parts: of the questions.
        folder: where answers go.
        wanted: what is looked for.
    """

    rounds = ROUNDS

    def __init__(
        self,
        runner: Runner,
        task: Task,
        plan: Plan,
        ends: Sequence[int],
        parts: Parts,
        folder: RunFolder,
        wanted: Wanted,
    ):
        self.runner, self.task, self.plan, self.ends = runner, task, plan, ends
        self.parts, self.folder, self.wanted = parts, folder, wanted
        self.configs = {c.label: c for c in plan.configs}

    def run(self, console: Console) -> Tuned:
        """Race, test in the order that the race gives, and time what is chosen."""
        names = [label for label in self.configs if label != NONE]
        with progress(console) as self.bars:
            finish = race(names, self.parts, self.wanted.rule, self._look)
            seen = in_order(finish.sequence, self.wanted.rule, self._test)
            found = self.folder.processes.told(self._found(finish, seen) if self.folder.processes.is_main else None)
        found.grid = sum(map(len, self._batches)) * len(self.configs)
        if self.folder.processes.is_main:
            found.asked = sum(time.size for time in self.folder.times.values())
        return found

    @property
    def _batches(self) -> list[list[Sample]]:
        return self.plan.of(self.task)

    def _look(self, look: int, names: list[str]) -> Mapping[str, Entry]:
        """Ask the questions of a look; what was seen of these configurations so far, the same in every process."""
        start = self.ends[look - 1] if look else 0
        self._answer(f"race {look + 1} of {len(self.parts.looks)}", range(start, self.ends[look]), names)
        entries = None
        if self.folder.processes.is_main:
            within = range(self.ends[look])
            entries = {n: self._entry(n, within) for n in names}
        return self.folder.processes.told(entries)

    def _entry(self, name: str, within: range) -> Entry:
        cost = self.cost(name, within, self.wanted.goal)
        return Entry(self.outcome(name, within), cost, self.configs[name].method)

    def _test(self, name: str) -> Outcome:
        """Ask a configuration the questions of the test; the same in every process."""
        self._answer(f"test of {name}", self._of_test, [name])
        main = self.folder.processes.is_main
        return self.folder.processes.told(self.outcome(name, self._of_test) if main else None)

    @property
    def _of_test(self) -> range:
        """The batches of the test."""
        return range(self.ends[-1], len(self._batches))

    def _answer(self, what: str, within: range, names: Sequence[str]) -> None:
        """This process' share of the batches that these configurations and the unpruned model have not answered."""
        configs = [self.configs[NONE], *(self.configs[name] for name in names)]
        done = {key[1:] for key in self.folder.times}
        todo = [(b, c) for b, c in batches(within.stop, configs, done) if b in within][self.folder.processes.share]
        turns = [c.label for _, some in todo for c in some]
        total = sum(len(self._batches[b]) * len(some) for b, some in todo)
        bar = self.bars.add_task(what, total=total)
        advance = following(self.bars, bar, f"{what}, {len(names)} left", turns)
        n = self.folder.processes.n
        device = self.runner.conditions()["device"] + (f", one of {n} processes" if n > 1 else "")
        for config, rows, time in self.runner.run_batches(self.task, self._batches, todo):
            self.folder.add((self.task.name, config.label, time.batch), rows, replace(time, device=device))
            advance(len(rows))
        self.folder.gather()

    def _rows(self, name: str, within: range) -> list[SampleRow]:
        return [row for b in within for row in self.folder.answers[self.task.name, name, b]]

    def pairs(self, name: str, within: range) -> list[tuple[float, float]]:
        """What the answers of the unpruned model and of a configuration are worth."""
        both = zip(self._rows(NONE, within), self._rows(name, within), strict=True)
        if self.wanted.agree:
            return [(1.0, float(normalise(b.answer) == normalise(p.answer))) for b, p in both]
        return [(float(b.score), float(p.score)) for b, p in both]

    def outcome(self, name: str, within: range) -> Outcome:
        """Of some batches."""
        return Outcome.of(self.pairs(name, within))

    def cost(self, name: str, within: range, goal: str) -> float:
        """Relative to the unpruned model; times are paired by batch.

        Raises:
            RunError: FLOPs and bytes of this model are not known.
        """
        if goal == "latency":
            return median(self._seconds(name, b) / self._seconds(NONE, b) for b in within)
        kind = {"flops": "prefill_flops", "memory": "kv_bytes"}[goal]
        costs = [row.costs for row in self._rows(name, within)]
        before, after = ([getattr(c, f"{kind}_{when}") for c in costs] for when in ("before", "after"))
        if None in before or None in after:
            raise RunError(f"the {goal} of this model are not counted: use --for latency")
        return sum(after) / sum(before)

    def _seconds(self, name: str, batch: int) -> float:
        time: BatchTime = self.folder.times[self.task.name, name, batch]
        return time.prefill_s + (self.wanted.new_tokens - 1) * (time.decode_s_per_token or 0.0)

    def _found(self, finish: Finish, seen: Mapping[str, Outcome]) -> Tuned:
        """What the tests showed, with the choice and its times."""
        within, rule = self._of_test, self.wanted.rule
        costs = {name: self.cost(name, within, self.wanted.goal) for name in seen}
        found = Tuned(finish, [self._tested(name, of, costs[name]) for name, of in seen.items()])
        name = chosen(seen, rule, costs.__getitem__) or next(iter(seen), None)
        if name is None:
            return found
        found.config = config = self.configs[name]
        found.test = next(test for test in found.tests if test.config == name)
        known = self._rows(name, within)[0].costs.kv_bytes_before is not None
        found.saves = {goal: self.cost(name, within, goal) for goal in GOALS if known or goal == "latency"}
        worse = [p < b for b, p in self.pairs(name, within)]
        found.lost = [row for row, is_worse in zip(self._rows(name, within), worse, strict=True) if is_worse]
        self._time(found, config, self._batches[within.start])
        return found

    def _tested(self, name: str, seen: Outcome, cost: float) -> Tested:
        tolerance, error = self.wanted.rule.tolerance, self.wanted.rule.error
        is_held = holds(seen, tolerance, error)
        more = None if is_held else questions_at(seen, tolerance, error)
        return Tested(name, seen, most_loss(seen, error), is_held, cost, more)

    def _time(self, found: Tuned, config: Config, part: Sequence[Sample]) -> None:
        """Time the choice beside the unpruned model, in turn."""
        inputs = self.runner.prepare(self.task, part, [s.image_id for s in part])
        salts, bare, n = [0] * len(part), self.configs[NONE], self.wanted.new_tokens
        firsts: list[list[float]] = []
        tokens: list[list[float]] = []
        for turn in range(self.rounds + 1):  # the first one warms up
            pair = (config, bare) if turn % 2 else (bare, config)
            watches = {c: self.runner.answer(inputs, c, salts, n)[2] for c in pair}
            if turn:
                ticks = [watches[c].ticks for c in (config, bare)]
                firsts.append([t[0] for t in ticks])
                tokens.append([(t[-1] - t[0]) / max(len(t) - 1, 1) for t in ticks])
        whole = [[f + (n - 1) * t for f, t in zip(*both, strict=True)] for both in zip(firsts, tokens, strict=True)]
        found.first, found.total = (ratio(*zip(*some, strict=True)) for some in (firsts, whole))
        more = [(f[0] - f[1], t[0] - t[1]) for f, t in zip(firsts, tokens, strict=True)]
        found.gains, found.losses = by_output_length(more, n).values()


def cut_by(samples: Sequence[Sample], parts: Parts, size: int) -> tuple[list[list[Sample]], list[int]]:
    """Batches of which none is of two parts, and the number of the batch before which each look ends."""
    cut: list[list[Sample]] = []
    ends, start = [], 0
    for n in (*parts.looks, parts.test):
        part = samples[start : start + n]
        cut += [list(part[i : i + size]) for i in range(0, n, size)]
        start += n
        ends.append(len(cut))
    return cut, ends[:-1]


def tune(
    runner: Runner,
    model_name: str,
    task: Task,
    configs: Sequence[Config],
    questions: tuple[list[Sample], Parts],
    wanted: Wanted,
    out: Path,
    overwrite: bool,
    console: Console,
) -> Tuned:
    """Find the cheapest configuration within the tolerance and save it to `out`, with a page about it.

    Args:
        runner: model and processor.
        model_name: as the user typed it.
        task: gives the pictures.
        configs: that race.
        questions: and their parts, as `ordered` gives them.
        wanted: what is looked for.
        out: gets tokprune.json if the promise can be made, tune.json, tune.html, and the answers in run/.
        overwrite: start over.
        console: where progress and the result are printed.

    Raises:
        RunError: the folder cannot be written, or holds a run with other settings.
    """
    from .page import write

    samples, parts = questions
    cut, ends = cut_by(samples, parts, wanted.batch_size)
    plan = Plan([(task, cut)], [Config(NONE), *configs])
    rule = asdict(wanted.rule)
    pictures = getattr(task, "checksum", None)
    checksum = 0 if pictures is None else zlib.crc32(repr([pictures(s.image_id) for s in samples]).encode())
    more = {"goal": wanted.goal, "agree": wanted.agree, "new_tokens": wanted.new_tokens, "pictures": checksum}
    facts = settings(runner, model_name, plan, **rule, **more)
    processes = Processes.started()
    quiet = console if processes.is_main else Console(quiet=True)
    with closing(RunFolder(out / "run", facts, overwrite, processes, plan.questions, AGAIN)) as folder:
        if folder.answers:
            quiet.print(f"{sum(map(len, folder.answers.values()))} answers are in {folder.path} already")
        found = Tuning(runner, task, plan, ends, parts, folder, wanted).run(quiet)
        if processes.is_main:
            with folder.writing():
                if overwrite or not found.promised:
                    (out / NAME).unlink(missing_ok=True)
                if found.promised and found.config is not None:
                    with tokprune.attach(runner.model, found.config.method, **found.config.budget) as attachment:
                        attachment.save(out)
                figures = {"promised": found.promised, **asdict(found)}
                write_text(out / "tune.json", json.dumps(figures, indent=1) + "\n", "replace")
                write(out / "tune.html", runner, model_name, task, samples, parts, wanted, found)
    processes.end()
    return found
