"""Latency truth: what pruning saves in time and memory, beside what the ledger predicts, and when it pays.

Every cell of a sweep (a resolution and a batch size) runs all configurations in turn in every round, the bare model
among them on the same inputs, attention implementation and dtype; ratios are taken within a round. Whole runs of
`generate` are timed, to the full length; a shorter output's time is read off the same run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import tokprune
from tokprune.core.budget import Budget
from tokprune.core.errors import MissingSignalError, RunError, UnsupportedModelError

from ..models import EMBEDDED
from ..run.locks import alone_at, refuse_busy
from ..run.rows import NONE, Config
from ..run.runner import Runner
from . import shaped
from .cells import Cell, Row, Subject
from .tables import NOTES, RANDOM, REAL, conditions_line, sentences, tables

METHODS = ("uniform", "vtc_cls", "divprune", "fastv")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDEST = 16384  # pixels a side


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Args:
        shape: a known shape, built with random weights; empty for `model`.
        model: an embedded model, a local folder or a hub id.
        methods: beside the bare model; empty for the usual ones that the model can run.
        keep: ratios.
        batch_sizes, new_tokens, resolutions: lists to sweep over; no resolution is the family's usual one.
        n_text: tokens of text in a prompt.
        rounds, warmup: counted, and before that not counted.
        dtype, attn, device: empty for float32 on a CPU and bfloat16 on a GPU, for sdpa, and for the GPU if any.
        layers, vision_layers: fewer than a shape has, of the same widths.
    """

    shape: str = ""
    model: str = ""
    methods: Sequence[str] = ()
    keep: Sequence[float] = (0.25,)
    batch_sizes: Sequence[int] = (1,)
    new_tokens: Sequence[int] = (16,)
    resolutions: Sequence[int] = ()
    n_text: int = 64
    rounds: int = 6
    warmup: int = 1
    dtype: str = ""
    attn: str = "sdpa"
    device: str = ""
    layers: int | None = None
    vision_layers: int | None = None

    def check(self) -> None:
        """Raise RunError where something is no setting."""
        if bool(self.shape) == bool(self.model):
            raise RunError("give a shape or a model: --shape llava-1.5-7b (random weights) or --model tiny-llava")
        if self.model and (self.layers or self.vision_layers):
            raise RunError("--layers and --vision-layers scale a shape; leave them out with --model")
        numbers = {"--batch-size": self.batch_sizes, "--new-tokens": self.new_tokens, "--resolution": self.resolutions}
        for option, values in {**numbers, "--text": [self.n_text], "--rounds": [self.rounds]}.items():
            if any(n < 1 for n in values):
                raise RunError(f"{option} takes whole numbers of at least 1")
        if max(self.resolutions, default=0) > WIDEST:
            raise RunError(f"--resolution takes at most {WIDEST} pixels a side")
        if self.n_text < 2 or self.warmup < 0:
            raise RunError("--text takes at least 2 tokens, before the picture and behind it, and --warmup at least 0")
        if self.dtype and self.dtype not in DTYPES:
            raise RunError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def torch_device(self) -> torch.device:
        """Where it runs.

        Raises:
            RunError: there is no such device here.
        """
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise RunError(f"--device {self.device!r} is none; type cpu or cuda") from error
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise RunError(f"--device {self.device!r}: torch finds none here; type --device cpu")
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and cache."""
        return DTYPES[self.dtype or ("bfloat16" if self.torch_device.type == "cuda" else "float32")]


@dataclass
class Bench:
    """A sweep.

    Args:
        settings: of it.
        out: the file that rows are appended to as cells finish.
        console: where progress and remarks go.
        overwrite: whether rows that are in the file may go.
    """

    settings: Settings
    out: Path
    console: Console
    overwrite: bool = False
    rows: list[Row] = field(default_factory=list)

    def run(self) -> list[Row]:
        """All cells.

        Raises:
            TokPruneError: something cannot be measured here; before anything is built.
            KeyboardInterrupt: rows of what was measured are in `rows` and in the file then.
        """
        s = self.settings
        s.check()
        refuse_busy(self.out)
        self._refuse_rows()
        configs = configurations(s.methods or METHODS, s.keep)
        if len(configs) == 1:
            raise RunError("there is nothing to compare the bare model with; type --methods vtc_cls,fastv")
        subjects = self._subjects(configs)
        if not s.methods:
            configs = self._runnable(subjects[0], configs)
        with self._begun():
            self._sweep(subjects, configs)
        return self.rows

    def _sweep(self, subjects: list[Subject], configs: list[Config]) -> None:
        """All cells, with a bar."""
        s = self.settings
        n_runs = len(subjects) * len(s.batch_sizes) * (s.rounds + s.warmup) * len(configs)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            bar = progress.add_task("runs", total=n_runs)
            for subject in self._built(subjects):
                for size in s.batch_sizes:
                    self._measure(Cell(s, subject, size, configs), lambda: progress.advance(bar))

    def _measure(self, cell: Cell, advance: Callable[[], None]) -> None:
        """One cell, interrupted or not, by its whole rounds. Its reports, which hold the model, are let go here."""
        try:
            cell.measure(advance)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise RunError(f"out of memory at batch size {cell.batch_size}; {shaped.SCALED}") from error
        finally:
            self._write(cell.rows())

    def _refuse_rows(self) -> None:
        """Raise where the file holds rows that are to stay."""
        if self.out.exists() and self.out.stat().st_size and not self.overwrite:
            raise RunError(
                f"{self.out} holds rows of an earlier run; name another file with --out, or type --overwrite"
            )

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """An empty file of this process alone, once it is known that the sweep can be run."""
        with alone_at(self.out):
            self._refuse_rows()  # of another process, that has come to its end meanwhile
            with self._writing("name another with --out"):
                self.out.write_text("", encoding="utf-8")
            yield

    @contextmanager
    def _writing(self, instead: str) -> Iterator[None]:
        """One line where the file cannot be written."""
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write {self.out}: {error.strerror or error}; {instead}") from error

    def _write(self, rows: list[Row]) -> None:
        self.rows += rows
        with self._writing("make room"), self.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)

    # ------------------------------------------------------------------------------- what is measured

    def _subjects(self, configs: list[Config]) -> list[Subject]:
        """One a resolution, checked and not built."""
        s = self.settings
        if s.model:
            return self._loaded(configs)
        whole = shaped.config_of(s.shape, s.layers, s.vision_layers)
        usual = shaped.crop_side(whole) * (1 + shaped.takes_any_size(whole))
        subjects = []
        for side in s.resolutions or (usual,):
            config = whole
            if not shaped.takes_any_size(whole):
                config = shaped.config_of(s.shape, s.layers, s.vision_layers, side)
            skeleton = shaped.skeleton(config, s.torch_dtype, s.attn)
            processor = shaped.image_processor_of(config)
            n = shaped.placeholders(skeleton, shaped.encoded(processor, side, 1))
            longest = n + s.n_text + max(s.new_tokens)
            shaped.refuse_too_large(skeleton, s.torch_device, max(s.batch_sizes), longest, s.shape)
            subjects.append(Subject(config, side, processor, n, skeleton))
        self._check(subjects[0], configs)
        return subjects

    def _loaded(self, configs: list[Config]) -> list[Subject]:
        """The same of a model with weights."""
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
                f"--resolution changes nothing here: {s.model} makes every picture {side} pixels a side; leave it out"
            )
        usual = side * (1 + shaped.takes_any_size(config))
        subjects = [
            Subject(config, side, processor, shaped.placeholders(model, shaped.encoded(processor, side, 1)), model)
            for side in s.resolutions or (usual,)
        ]
        longest = max(subject.n_placeholders for subject in subjects) + s.n_text + max(s.new_tokens)
        with suppress(UnsupportedModelError):  # nobody knows what it needs
            shaped.refuse_too_large(model, s.torch_device, max(s.batch_sizes), longest, s.model, loaded=True)
        self._check(subjects[0], configs)
        return subjects

    def _check(self, subject: Subject, configs: list[Config]) -> None:
        """Raise where a configuration that was asked for cannot run."""
        for config in configs if self.settings.methods else ():
            _try(subject.model, config)

    def _runnable(self, subject: Subject, configs: list[Config]) -> list[Config]:
        """The usual configurations without those that this model cannot run."""
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
        """Every subject with a model of its own configuration; one at a time is in memory."""
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
    """Measure, write and print; whether it came to its end.

    Args:
        settings: of the sweep.
        out: the JSONL file of its rows.
        overwrite: whether rows that are there may go.
        console: for tables and sentences.

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
        console.print(f"Interrupted: {len(bench.rows)} rows of whole rounds are in {out}; the rest was not measured")
    else:
        console.print(f"{len(bench.rows)} rows are in {out}")
    return finished


def show(rows: Sequence[Row], console: Console) -> None:
    """Tables, then when pruning pays, then what to know about it."""
    console.print(conditions_line(rows[0]), soft_wrap=True)
    for table in tables(rows):
        console.print()
        console.print(table)
    console.print()
    for line in (*sentences(rows), "", *NOTES, RANDOM if rows[0].weights == "random" else REAL):
        console.print(line, soft_wrap=True, highlight=False)


def configurations(methods: Sequence[str], keep: Sequence[float]) -> list[Config]:
    """The bare model, and every method at every ratio; once where it takes no budget.

    Raises:
        TokPruneError: an unknown method, or a ratio that is none.
    """
    for value in keep:
        Budget(keep_ratio=value)
    found = [Config(NONE)]
    for spec in methods:
        if spec != NONE:
            found += [Config(spec, k) for k in keep] if tokprune.get_method(spec).takes_budget else [Config(spec)]
    return list(dict.fromkeys(found))


def _try(model: Any, config: Config) -> None:
    if config.method != NONE:
        budget = {} if config.keep_ratio is None else {"keep_ratio": config.keep_ratio}
        tokprune.attach(model, config.method, **budget).detach()
