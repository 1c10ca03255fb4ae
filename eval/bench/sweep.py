"""Measures what pruning saves in time and memory, next to what the ledger predicts.

A cell of a sweep is a resolution and a batch size. In every round it runs all configurations in turn, the unpruned
model among them, on the same inputs and with the same attention implementation and dtype. Ratios are taken within a
round. `generate` runs to the longest output; the times of shorter outputs are read from the same run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

import tokprune
from tokprune.core.budget import Budget
from tokprune.core.errors import MissingSignalError, RunError, UnsupportedModelError
from tokprune.prune.saved import takes_budget

from ..models import EMBEDDED
from ..report.progress import following, progress
from ..run.locks import alone_at, refuse_busy
from ..run.rows import NONE, Config
from ..run.runner import Runner
from . import shaped
from .cells import Cell, Row, Subject
from .settings import METHODS, Settings
from .tables import conditions_line, legend, tables


@dataclass
class Bench:
    """A sweep.

    Args:
        settings: what to measure.
        out: the file to which rows are appended as cells finish.
        console: for progress and remarks.
        overwrite: whether rows in the file may be deleted.
    """

    settings: Settings
    out: Path
    console: Console
    overwrite: bool = False
    rows: list[Row] = field(default_factory=list)

    def run(self) -> list[Row]:
        """Measure all cells.

        Raises:
            TokPruneError: something cannot be measured here; raised before anything is built.
            KeyboardInterrupt: the rows measured so far are in `rows` and in the file.
        """
        s = self.settings
        s.check()
        refuse_busy(self.out)
        self._refuse_rows()
        configs = configurations(s.methods or METHODS, s.keep)
        if len(configs) == 1:
            raise RunError("there is nothing to compare with the unpruned model; type --methods vtc_cls,fastv")
        subjects = self._subjects(configs)
        if not s.methods:
            configs = self._runnable(subjects[0], configs)
        with self._begun():
            self._sweep(subjects, configs)
        return self.rows

    def one_prompt(self) -> tuple[Any, dict[str, Any]]:
        """The model at its first resolution, built, and a batch of one prompt."""
        configs = configurations(self.settings.methods, self.settings.keep)
        subject = next(self._built(self._subjects(configs)[:1]))
        return subject.model, Cell(self.settings, subject, 1, configs).inputs()

    def _sweep(self, subjects: list[Subject], configs: list[Config]) -> None:
        """Measure all cells, with a progress bar."""
        s = self.settings
        n_runs = len(subjects) * len(s.batch_sizes) * (s.rounds + s.warmup) * len(configs)
        with progress(self.console) as bars:
            bar = bars.add_task("runs", total=n_runs)
            for subject in self._built(subjects):
                for size in s.batch_sizes:
                    cell = Cell(s, subject, size, configs)
                    turns = [config.label for turn in range(s.warmup + s.rounds) for config in cell.order(turn)]
                    self._measure(cell, following(bars, bar, f"batch {size}", turns))

    def _measure(self, cell: Cell, advance: Callable[[], None]) -> None:
        """Measure a cell and write its whole rounds, also if interrupted. The cell, which holds the model, is freed."""
        try:
            cell.measure(advance)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise RunError(f"out of memory at batch size {cell.batch_size}; {shaped.SCALED}") from error
        finally:
            self._write(cell.rows())

    def _refuse_rows(self) -> None:
        """Raise if the file holds rows and may not be overwritten."""
        if self.out.exists() and self.out.stat().st_size and not self.overwrite:
            raise RunError(
                f"{self.out} holds rows of an earlier run; name another file with --out, or type --overwrite"
            )

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Empty the file and lock it, once it is known that the sweep can run."""
        with alone_at(self.out):
            self._refuse_rows()  # another process may have finished meanwhile
            with self._writing("name another with --out"):
                self.out.write_text("", encoding="utf-8")
            yield

    @contextmanager
    def _writing(self, instead: str) -> Iterator[None]:
        """Say in one line why the file cannot be written."""
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write {self.out}: {error.strerror or error}; {instead}") from error

    def _write(self, rows: list[Row]) -> None:
        self.rows += rows
        with self._writing("free some space"), self.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)

    # ------------------------------------------------------------------------------- what is measured

    def _subjects(self, configs: list[Config]) -> list[Subject]:
        """One per resolution, checked but not built."""
        s = self.settings
        if s.model:
            return self._loaded(configs)
        whole = shaped.config_of(s.shape, s.layers, s.vision_layers)
        usual = shaped.crop_side(whole) * (1 + shaped.takes_any_size(whole))
        subjects = []
        for side in self._sides(usual):
            config = whole
            if not shaped.takes_any_size(whole):
                config = shaped.config_of(s.shape, s.layers, s.vision_layers, side)
            skeleton = shaped.skeleton(config, s.torch_dtype, s.attn)
            processor = shaped.image_processor_of(config)
            n = shaped.placeholders(skeleton, shaped.encoded(processor, shaped.pictures(side, 1, s.picture)))
            longest = n + s.n_text + max(s.new_tokens)
            shaped.refuse_too_large(skeleton, s.torch_device, max(s.batch_sizes), longest, s.shape)
            subjects.append(Subject(config, side, processor, n, skeleton))
        self._check(subjects[0], configs)
        return subjects

    def _sides(self, usual: int) -> Sequence[int]:
        """Sides of the pictures in pixels; of a user's own, the longer one."""
        if self.settings.picture:
            return [max(shaped.pictures(usual, 1, self.settings.picture)[0].size)]
        return self.settings.resolutions or [usual]

    def _loaded(self, configs: list[Config]) -> list[Subject]:
        """The same for a model with weights."""
        s = self.settings
        if s.model in EMBEDDED:
            transformers.utils.logging.disable_progress_bar()
        runner = Runner.load(s.model)
        model = runner.model.to(s.torch_device, s.torch_dtype)
        try:
            model.set_attn_implementation(s.attn)
        except (ImportError, ValueError) as error:
            raise RunError(f"--attn {s.attn}: {shaped.first_line(error)} Type --attn sdpa") from error
        config, processor = shaped.endless(model).config, runner.processor.image_processor
        side = shaped.crop_side(config)
        if s.resolutions and not shaped.takes_any_size(config):
            raise RunError(
                f"--resolution has no effect: {s.model} resizes every picture to {side} x {side} pixels; leave it out"
            )
        usual = side * (1 + shaped.takes_any_size(config))
        subjects = [
            Subject(
                config,
                side,
                processor,
                shaped.placeholders(model, shaped.encoded(processor, shaped.pictures(side, 1, s.picture))),
                model,
            )
            for side in self._sides(usual)
        ]
        longest = max(subject.n_placeholders for subject in subjects) + s.n_text + max(s.new_tokens)
        with suppress(UnsupportedModelError):  # its memory cannot be estimated
            shaped.refuse_too_large(model, s.torch_device, max(s.batch_sizes), longest, s.model, loaded=True)
        self._check(subjects[0], configs)
        return subjects

    def _check(self, subject: Subject, configs: list[Config]) -> None:
        """Raise if the model cannot run a configuration that the user named."""
        for config in configs if self.settings.methods else ():
            _try(subject.model, config)

    def _runnable(self, subject: Subject, configs: list[Config]) -> list[Config]:
        """The default configurations that this model can run."""
        found = []
        for config in configs:
            with suppress(MissingSignalError):
                _try(subject.model, config)
                found.append(config)
        missing = dict.fromkeys(c.method for c in configs if c not in found)
        if missing:
            self.console.print(f"Left out, because this model cannot run them: {', '.join(missing)}")
        return found

    def _built(self, subjects: list[Subject]) -> Iterator[Subject]:
        """Every subject with its model built; one model at a time is in memory."""
        s, model, config = self.settings, None, None
        for subject in subjects:
            if s.shape and subject.config is not config:
                model = subject.model = None
                gc.collect()
                model, config = shaped.build(subject.config, s.torch_dtype, s.attn, s.torch_device), subject.config
            subject.model = model if s.shape else subject.model
            yield subject
            if s.shape:
                subject.model = None


def run(settings: Settings, out: Path, overwrite: bool, console: Console) -> bool:
    """Measure, write and print; whether the sweep was finished.

    Args:
        settings: what to measure.
        out: the JSONL file for the rows.
        overwrite: whether rows in the file may be deleted.
        console: for the tables.

    Raises:
        TokPruneError: something cannot be measured here, or the file cannot be written.
    """
    bench, finished = Bench(settings, out, console, overwrite), True
    try:
        bench.run()
    except KeyboardInterrupt:
        finished = False
    if bench.rows:
        show(bench.rows, console)
    if not finished:
        console.print(f"Interrupted: {len(bench.rows)} rows of whole rounds are in {out}")
    else:
        console.print(f"{len(bench.rows)} rows are in {out}")
    return finished


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the tables and their legend."""
    console.print(conditions_line(rows[0]), highlight=False)
    for table in tables(rows):
        console.print()
        console.print(table.grid())
    console.print()
    for line in legend(rows):
        console.print(line, highlight=False)


def configurations(methods: Sequence[str], keep: Sequence[float]) -> list[Config]:
    """The unpruned model, and every method at every ratio, or once if it takes no budget.

    Raises:
        TokPruneError: a method is unknown, or a ratio is invalid.
    """
    for value in keep:
        Budget(keep_ratio=value)
    found = [Config(NONE)]
    for spec in methods:
        if spec != NONE:
            found += [Config(spec, k) for k in keep] if takes_budget(spec) else [Config(spec)]
    return list(dict.fromkeys(found))


def _try(model: Any, config: Config) -> None:
    if config.method != NONE:
        budget = {} if config.keep_ratio is None else {"keep_ratio": config.keep_ratio}
        tokprune.attach(model, config.method, **budget).detach()
