"""Benchmark suites: lmms-eval run for every configuration, its scores brought into rows of tokprune's own.

A run lies in one folder: `lmms-eval/CONFIGURATION/` holds what lmms-eval and its plug-in wrote, `tasks/` exported
tasks, `rows.jsonl` and `samples.jsonl` what became of it. A configuration whose results are there is not run again.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import tokprune
from tokprune.core.errors import RunError

from ..compare import chosen_samples, configurations
from ..models import path_of
from ..report.findings import named_alarms, task_table
from ..run.folder import RunFolder
from ..run.rows import DOWNSAMPLE, FRAMES, NONE, Config, Row, commit
from ..tasks import TASKS, Sample, Task, load_task
from ..tasks.grading import Grading
from ..tasks.metadata import is_task_folder
from ..tasks.metrics import METRICS
from . import export as lmms_export
from . import scores as lmms_scores
from .scores import Source, TaskResult

INSTALL = (
    "type pip install 'tokprune[lmms-eval]', or, where its torchvision does not fit this torch, "
    "pip install --no-deps lmms-eval==0.7.3 and then pip install loguru sacrebleu evaluate pytz tenacity pytablewriter"
)
# Results that are not there, not all of them, or of another form.
UNREADABLE = (RunError, KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError)
EXPLAINED = 500  # characters of an error that are shown


@dataclass(frozen=True)
class Suite:
    """What is run.

    Args:
        model: an embedded model by its name, a local folder, or a hub id.
        tasks: names that lmms-eval knows, or tasks of tokprune's own, which are exported.
        configs: the unpruned run first.
        limit: documents a task.
        batch_size: documents at a time.
        include_path: a folder with more tasks in lmms-eval's format.
        model_args: more arguments of the plug-in, such as dtype=bfloat16.
        gen_kwargs: lmms-eval's flag of that name.
        processes: data-parallel processes on this machine.
        metric: that grades tokprune's own tasks, by its name; empty for what each question asks for.
        prompts: options of the prompts of lmms-eval's tasks (`lmms_eval_specific_kwargs`), by task.

    Raises:
        RunError: tasks that cannot be run together, or a metric that cannot grade them.
        UnknownNameError: no such metric.
    """

    model: str
    tasks: Sequence[str]
    configs: Sequence[Config]
    limit: int | None = None
    batch_size: int = 1
    include_path: Path | None = None
    model_args: str = ""
    gen_kwargs: str = ""
    processes: int = 1
    metric: str = ""
    prompts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own: dict[str, tuple[Task, list[Sample]]] = field(default_factory=dict, init=False)

    def __post_init__(self):
        grading = Grading.load(self.metric)
        if grading.function is not None:
            raise RunError(
                f"--metric {self.metric} is a function of your own, which tokprune compare takes and lmms-eval does "
                f"not: use {', '.join(METRICS)}, or tokprune compare"
            )
        for name in self.tasks:
            if name in TASKS.names() or is_folder(name):
                task = load_task(name)
                samples = chosen_samples(task, self.limit)
                self.own[name] = task, [replace(s, metric=grading.name or s.metric) for s in samples]
        if grading.name and (others := [name for name in self.tasks if name not in self.own]):
            raise RunError(
                f"--metric {grading.name} grades tokprune's own tasks and folders; {', '.join(others)} of lmms-eval "
                "has metrics of its own: leave --metric out, or run it apart"
            )
        grading.check(list(self.own.values()))
        names = [self.name_of(name) for name in self.tasks]
        if len(set(names)) < len(names):
            raise RunError(f"two tasks are named alike ({', '.join(self.tasks)}); leave one out, or rename a folder")
        if self.written and self.include_path:
            raise RunError(
                f"--include-path cannot be given beside tasks that tokprune writes ({', '.join(self.written)}); run "
                "them apart"
            )
        if self.include_path and not self.include_path.is_dir():
            raise RunError(f"--include-path {self.include_path} is no folder; name the one that holds the tasks' YAML")

    @property
    def written(self) -> list[str]:
        """Tasks that lmms-eval is given as files: tokprune's own, and its own ones with other prompts."""
        return [*self.own, *(name for name in self.tasks if name in self.prompts)]

    def name_of(self, task: str) -> str:
        """The name of a task within lmms-eval."""
        if task in self.own:
            return lmms_export.exported_name(self.own[task][0])
        return f"{lmms_export.PREFIX}{task}" if task in self.prompts else task

    @property
    def sources(self) -> dict[str, Source]:
        """What was written, by its names within lmms-eval."""
        others = {self.name_of(name): Source(name) for name in self.written}
        return others | {self.name_of(name): Source(task.name, samples) for name, (task, samples) in self.own.items()}

    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on but its configuration, so that more of them can be added to a folder."""
        return {
            "suite": "lmms-eval",
            "model": self.model,
            "weights": _weights(Path(path_of(self.model))),
            "tasks": {n: lmms_export.checksum(*self.own[n]) if n in self.own else None for n in self.tasks},
            "limit": self.limit,
            "batch_size": self.batch_size,
            "include_path": None if self.include_path is None else str(self.include_path.resolve()),
            "model_args": self.model_args,
            "gen_kwargs": self.gen_kwargs,
            **({"metric": self.metric} if self.metric else {}),
            **({"prompts": self.prompts} if self.prompts else {}),
            "processes": self.processes,
            "lmms_eval": version("lmms-eval"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokprune": tokprune.__version__,
            "commit": commit(),
        }

    def exported(self, out: Path) -> Path | None:
        """Where tasks in lmms-eval's format lie, beside its own; those of tokprune are written to the run's folder."""
        for task, samples in self.own.values():
            lmms_export.export(task, samples, out / "tasks")
        for name in self.written:
            if name not in self.own:
                lmms_export.export_prompt(name, self.name_of(name), self.prompts[name], out / "tasks")
        tasks = out / "tasks" if self.written else self.include_path
        return None if tasks is None else tasks.resolve()

    def command(self, config: Config, folder: Path, tasks: Path | None) -> list[str]:
        """The command line of lmms-eval for one configuration.

        Args:
            config: what the plug-in attaches.
            folder: where results and record go.
            tasks: where tasks in lmms-eval's format lie, beside its own.
        """
        budget = [f"{name}={value}" for name, value in config.budget.items()]
        arguments = [f"pretrained={path_of(self.model)}", f"method={config.method}", *budget]
        arguments += [f"record={folder / 'record.jsonl'}", *([self.model_args] if self.model_args else [])]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        command = [sys.executable, *(launch if self.processes > 1 else []), "-m", "lmms_eval"]
        command += ["--model", "tokprune", "--model_args", ",".join(arguments), "--log_samples"]
        command += ["--tasks", ",".join(map(self.name_of, self.tasks)), "--output_path", str(folder / "out")]
        command += ["--batch_size", str(self.batch_size)]
        command += ["--limit", str(self.limit)] if self.limit else []
        command += ["--include_path", str(tasks)] if tasks else []
        return command + (["--gen_kwargs", self.gen_kwargs] if self.gen_kwargs else [])


def grid(methods: Sequence[str], ratios: Sequence[float], tokens: Sequence[int] = ()) -> list[Config]:
    """The configurations of `compare`, without its floors; the unpruned run is always there, and first.

    Every other one is compared with it on the same documents, and a folder that holds it does not run it again.

    Raises:
        TokPruneError: an unknown method or option, or a ratio that is none.
    """
    if changing := {DOWNSAMPLE, FRAMES}.intersection(methods):
        raise RunError(f"{changing.pop()} changes pictures or videos, which a benchmark's are not; leave it out")
    return [c for c in configurations([NONE, *methods], ratios, tokens=tokens) if not c.shuffled]


def run(suite: Suite, out: Path, console: Console, overwrite: bool = False) -> list[str]:
    """Run what is not there yet, and write and show the rows of all. Returns their alarms (`findings.alarms`).

    Args:
        suite: what to run.
        out: the folder.
        console: where tables go.
        overwrite: start over, whatever is there.

    Raises:
        RunError: lmms-eval is not installed, the folder cannot be used, or a run failed; what ran before is kept.
    """
    check_installed()
    folder = RunFolder(out, suite.settings(), overwrite)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    try:
        if overwrite:
            for name in ("lmms-eval", "tasks"):
                shutil.rmtree(out / name, ignore_errors=True)
        found: dict[Config, list[TaskResult]] = {}
        for number, config in enumerate(suite.configs, 1):
            own = out / "lmms-eval" / folder_name(config)
            there = _there(own, say)
            if there is None:
                say(f"{number}/{len(suite.configs)} {config.label}: see {own / 'log.txt'}")
                command = suite.command(config, own.resolve(), suite.exported(out))
                there = _ran(command, own, config.label, folder)
                say(lmms_table(own))
            else:
                say(f"{config.label} is in {own} already and is not run again")
            found[config] = there
            _write(suite, folder, found)
    finally:
        folder.close()
    made = lmms_scores.rows(suite.model, found, suite.sources)
    _show(made, console)
    return named_alarms(made)


def _write(suite: Suite, folder: RunFolder, found: dict[Config, list[TaskResult]]) -> None:
    folder.write_jsonl("rows.jsonl", map(asdict, lmms_scores.rows(suite.model, found, suite.sources)))
    pairs = [(config, result) for config, results in found.items() for result in results]
    samples = [
        row for c, r in pairs for row in lmms_scores.sample_rows(c, r, suite.sources.get(r.name, Source(r.name)))
    ]
    folder.write_jsonl("samples.jsonl", map(asdict, samples))


def _show(rows: Sequence[Row], console: Console) -> None:
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        name = task if own[0].metric in task else f"{task}, {own[0].metric}"
        console.print(task_table(name, own, None))


def _there(folder: Path, say: Callable[[str], None] = lambda text: None) -> list[TaskResult] | None:
    """The results of a configuration that was run to its end, or None; why there are none is said where some are."""
    try:
        return lmms_scores.read(folder)
    except UNREADABLE as error:
        if any(folder.glob("out/**/*_results.json")):
            say(f"what is in {folder} cannot be used ({error or type(error).__name__}) and is run again")
        return None


def _ran(command: list[str], folder: Path, label: str, run_folder: RunFolder) -> list[TaskResult]:
    """Run lmms-eval and read what it wrote; it ends with 0 after most errors, so that alone says nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    with run_folder.writing():
        folder.mkdir(parents=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    try:
        return lmms_scores.read(folder)
    except UNREADABLE as error:
        said = reason((folder / "log.txt").read_text(encoding="utf-8", errors="replace")) or str(error)
        raise RunError(
            f"lmms-eval did not finish {label} (it ended with {done.returncode}): {said}. Its output is in "
            f"{folder / 'log.txt'}; configurations before this one are kept"
        ) from error


# What an error looks like in the output, the most telling first.
_REASONS: tuple[Callable[[str], list[str]], ...] = (
    lambda log: re.findall(r"^tokprune: (.+)$", log, re.MULTILINE),
    lambda log: re.findall(r"Error during evaluation: (.+?)\.? Please set `--verbosity", log, re.DOTALL),
    lambda log: re.findall(r"^((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE),
    lambda log: re.findall(r"^lmms_eval.*: (error: .+)$", log, re.MULTILINE),
    lambda log: [line for line in log.splitlines() if line.strip()],
)


def reason(log: str) -> str:
    """Why a run of lmms-eval failed, in one line, from what it printed; empty where it printed nothing."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log).replace("\r", "\n")
    found = next((hits for find in _REASONS if (hits := find(log))), [""])
    return " ".join(found[-1].split())[:EXPLAINED].rstrip(".")


def lmms_table(folder: Path) -> str:
    """lmms-eval's own table, from its output."""
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    return "\n".join(line for line in log.splitlines() if line.startswith("|"))


def folder_name(config: Config) -> str:
    """A name for a folder, unique for a configuration."""
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', config.label)[:80]}-{zlib.crc32(config.label.encode()):08x}"


def check_installed() -> None:
    """Raise RunError unless lmms-eval is there and finds the plug-in."""
    missing = [name for name in ("lmms_eval", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{' and '.join(missing).replace('_', '-')} not installed; {INSTALL}")
    if "tokprune" not in entry_points(group="lmms_eval.models").names:
        raise RunError(
            "lmms-eval finds plug-ins of installed packages alone, and tokprune runs from a folder here; type "
            "pip install -e . in it"
        )


def is_folder(name: str) -> bool:
    """Whether a task is meant to be a folder: it looks like a path, or holds questions; results may lie in `pope/`."""
    return Path(name).is_dir() and (len(Path(name).parts) > 1 or is_task_folder(Path(name)))


def _weights(path: Path) -> int | None:
    """A checksum of the files of a local model: sizes, and what is small or at the beginning; None for a hub id."""
    if not path.is_dir():
        return None
    total = 0
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        with file.open("rb") as opened:
            head = opened.read(2**20)
        total = zlib.crc32(json.dumps([file.name, file.stat().st_size]).encode() + head, total)
    return total
