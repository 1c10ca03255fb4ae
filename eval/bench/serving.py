"""Throughput and time to first token of a vLLM server at several concurrencies, pruned and not.

One server answers under all budgets, which go with the requests, so that they are measured in turn: in every round, at
every concurrency, each budget once. Every request has a picture of its own, so no cache helps. Predicted is what the
ledger counts for the prefill of one request.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from tokprune.integrations.vllm import KEY, conditions_of, plan_of, quiet, refuse_without_vllm, release
from transformers import AutoConfig

from tokprune.core.errors import RunError
from tokprune.core.files import write_text

from ..models import path_of
from ..report.progress import following, progress
from ..report.terminal import Grid
from ..run.locks import alone_at, refuse_busy
from ..run.rows import commit, device_name
from . import shaped
from .break_even import length_of_saving
from .server import Server, Timed, body_of, random_model

RANDOM = "llava-134m"
SAVING = 0.05
WORDS = "what color is the circle "
Spread = list[float]  # least, median and most of the rounds


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        model: an embedded model, a local folder or a hub id; empty for a small LLaVA with random weights.
        method: that the server prunes with.
        keep: fractions; the unpruned model, 1, is added.
        concurrency: requests at a time.
        new_tokens: of every answer.
        n_text: words of a question.
        rounds, warmup: measured rounds, and rounds before them that are not measured.
        dtype: of the weights, as vLLM takes it; empty for bfloat16 with random weights, else auto.
    """

    model: str = ""
    method: str = "vtc_cls"
    keep: Sequence[float] = (0.25, 0.11)
    concurrency: Sequence[int] = (1, 4, 16, 64)
    new_tokens: int = 16
    n_text: int = 48
    rounds: int = 3
    warmup: int = 1
    dtype: str = ""

    @property
    def budgets(self) -> list[float]:
        """Fractions to measure, the unpruned model first."""
        return list(dict.fromkeys([1.0, *self.keep]))

    def check(self) -> None:
        """Raise RunError if a setting is invalid."""
        numbers = {"--concurrency": self.concurrency, "--new-tokens": [self.new_tokens], "--rounds": [self.rounds]}
        for option, values in {**numbers, "--text": [self.n_text]}.items():
            if not values or min(values) < 1:
                raise RunError(f"{option} takes whole numbers of at least 1")
        if max(self.concurrency) > 1024:
            raise RunError("--concurrency takes at most 1024 requests at a time")
        if self.new_tokens < 2:
            raise RunError("--new-tokens takes at least 2 with --serve: the first token and one after it are timed")


@dataclass
class Row:
    """One budget at one concurrency.

    Args:
        model, weights: its name, and "random" or "real".
        n_requests: in a round.
        n_image, n_prompt: tokens of a request, as the server counts them.
        requests_s, tokens_s, first_ms, token_ms: of every round; the times are medians over its requests.
        prefill_flops_ratio: predicted by the ledger for one request.
        under_saving: output length from which less than 5 % of the time is saved; None where none is too long.
        load: load averages of the machine over a minute, before each round.
    """

    model: str
    weights: str
    method: str
    keep_ratio: float
    concurrency: int
    n_requests: int
    n_image: int
    n_prompt: int
    new_tokens: int
    requests_s: list[float]
    tokens_s: list[float]
    first_ms: list[float]
    token_ms: list[float]
    prefill_flops_ratio: float | None
    under_saving: int | None
    load: list[float]
    cores: int
    device: str
    dtype: str
    vllm: str
    torch: str
    commit: str | None
    date: str


@dataclass
class ServeBench:
    """A measurement.

    Args:
        settings: what to measure.
        out: the file of the rows.
        console: for progress.
        overwrite: whether rows in the file may be deleted.
    """

    settings: Settings
    out: Path
    console: Console
    overwrite: bool = False
    loads: list[float] = field(default_factory=list)
    _n_pictures: int = 0

    def run(self) -> list[Row]:
        """Measure, and write the rows.

        Raises:
            RunError: vLLM is not installed or does not serve this, a setting is invalid, or the file holds rows.
        """
        self.settings.check()
        refuse_without_vllm()
        refuse_busy(self.out)
        if self.out.exists() and self.out.stat().st_size and not self.overwrite:
            raise RunError(
                f"{self.out} holds rows of an earlier run; name another file with --out, or type --overwrite"
            )
        with alone_at(self.out), _folder(self.settings.model) as (folder, more), quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            plans = {keep: plan_of(config, self._key(keep)) for keep in self.settings.budgets}  # refused at once
            self.console.print(f"Starting vLLM {release()} with {self.settings.model or RANDOM}")
            with Server(folder, *self._arguments(), *more) as server:
                found = self._measure(server)
            rows = self._rows(found, config, plans)
            write_text(self.out, "".join(json.dumps(asdict(row)) + "\n" for row in rows), "replace")
        return rows

    def _key(self, keep: float) -> dict[str, Any]:
        return {"method": self.settings.method, "keep_ratio": keep}

    @property
    def _dtype(self) -> str:
        return self.settings.dtype or ("auto" if self.settings.model else "bfloat16")

    def _arguments(self) -> list[str]:
        most = max(self.settings.concurrency)
        key = json.dumps({KEY: self._key(min(self.settings.budgets))})
        words = ["--dtype", self._dtype, "--max-num-seqs", str(most), "--enforce-eager", "--max-model-len", "-1"]
        words += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--trust-request-mm-kwargs"]
        return [*words, "--enable-prompt-tokens-details", "--mm-processor-kwargs", key]

    def _measure(self, server: Server) -> dict[tuple[int, float], list[list[Timed]]]:
        """Requests by concurrency, budget and round."""
        s, found = self.settings, {}
        turns = [f"{n} at a time" for _ in range(s.warmup + s.rounds) for n in s.concurrency for _ in s.budgets]
        with progress(self.console) as bars:
            advance = following(bars, bars.add_task("requests", total=len(turns)), "serving", turns)
            for number in range(s.warmup + s.rounds):
                self.loads += [os.getloadavg()[0]] if number >= s.warmup else []
                for n in s.concurrency:
                    for keep in self._order(number):
                        asked = server.ask_all(self._bodies(server, n, keep), n)
                        if number >= s.warmup:
                            found.setdefault((n, keep), []).append(asked)
                        advance(1)
        return found

    def _order(self, number: int) -> list[float]:
        """Of the budgets in a round."""
        turn = number % len(self.settings.budgets)
        return [*self.settings.budgets[turn:], *self.settings.budgets[:turn]]

    def _bodies(self, server: Server, concurrency: int, keep: float) -> list[bytes]:
        """Requests, each with a picture that was not seen before; made before the clock runs."""
        s, n = self.settings, requests_of(concurrency)
        question = " ".join((WORDS * s.n_text).split()[: s.n_text])
        start, self._n_pictures = self._n_pictures, self._n_pictures + n
        return [
            body_of(server.model, picture, question, s.new_tokens, {"keep_ratio": keep}) for picture in noise(start, n)
        ]

    def _rows(self, found: dict[tuple[int, float], list[list[Timed]]], config: Any, plans: dict) -> list[Row]:
        whole = {n: found[n, 1.0] for n in self.settings.concurrency}
        return [
            self._row(n, keep, rounds, whole[n], config, plans)
            for (n, keep), rounds in sorted(found.items(), key=_place)
        ]

    def _row(self, n: int, keep: float, rounds: Sequence, whole: Sequence, config: Any, plans: dict) -> Row:
        s, one = self.settings, rounds[0][0]
        n_text = one.n_prompt - one.n_image
        first, token, bare_first, bare_token = (
            median(of(r) for r in some) for some in (rounds, whole) for of in (first_ms, token_ms)
        )
        costs = [p.prefill(p.family.largest, n_text) for p in (plans[keep], plans[1.0]) if p.family.shape]
        return Row(
            model=s.model or RANDOM,
            weights="real" if s.model else "random",
            method=s.method,
            keep_ratio=keep,
            concurrency=n,
            n_requests=len(rounds[0]),
            n_image=one.n_image,
            n_prompt=one.n_prompt,
            new_tokens=s.new_tokens,
            requests_s=[len(r) / seconds(r) for r in rounds],
            tokens_s=[sum(t.n_new for t in r) / seconds(r) for r in rounds],
            first_ms=[first_ms(r) for r in rounds],
            token_ms=[token_ms(r) for r in rounds],
            prefill_flops_ratio=costs[0].prefill.flops / costs[1].prefill.flops if costs else None,
            under_saving=length_of_saving((first, token), (bare_first, bare_token), SAVING) if keep < 1 else 1,
            load=[round(load, 2) for load in self.loads],
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            device=conditions_of().get("device") or device_name(torch.device("cpu")).partition(",")[0],
            dtype=self._dtype,
            vllm=str(release()),
            torch=torch.__version__,
            commit=commit(),
            date=datetime.date.today().isoformat(),
        )


def _place(cell: tuple[tuple[int, float], Any]) -> tuple[int, float]:
    """Where a cell stands in tables: the unpruned requests of a concurrency first."""
    (concurrency, keep), _ = cell
    return concurrency, -keep


def requests_of(concurrency: int) -> int:
    """How many requests a round asks at a concurrency: two for each place, but not more than 64 or than there are."""
    return max(4, concurrency, min(2 * concurrency, 64))


def seconds(asked: Sequence[Timed]) -> float:
    """From the first request to the last token."""
    return max(t.last_s for t in asked) - min(t.begun_s for t in asked)


def first_ms(asked: Sequence[Timed]) -> float:
    """Milliseconds to the first token, median."""
    return 1000 * median(t.first_s - t.begun_s for t in asked)


def token_ms(asked: Sequence[Timed]) -> float:
    """Milliseconds for each token after the first, median."""
    return 1000 * median((t.last_s - t.first_s) / (t.n_new - 1) for t in asked)


def noise(start: int, n: int) -> Iterator[Any]:
    """Pictures of smooth noise, which differ by their number."""
    for number in range(start, start + n):
        generator = torch.Generator().manual_seed(number)
        values = torch.rand(1, 3, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(values, (336, 336), mode="bilinear")
        yield shaped.as_picture(smooth[0])


@contextmanager
def _folder(model: str) -> Iterator[tuple[str, list[str]]]:
    """Where the model is, and more arguments of vLLM."""
    if model:
        yield path_of(model), []
        return
    with tempfile.TemporaryDirectory(prefix="tokprune-") as made:
        folder = Path(made) / RANDOM
        random_model(folder, _write_processor)
        yield str(folder), ["--load-format", "dummy"]


def _write_processor(folder: Path) -> None:
    shutil.copytree(path_of("tiny-llava"), folder, ignore=shutil.ignore_patterns("*.safetensors"))


# ---- tables


def shown(values: Sequence[float], form: str = "{:.3g}") -> str:
    """Median with least and most."""
    low, middle, high = (form.format(v) for v in (min(values), median(values), max(values)))
    return f"{middle} [{low}, {high}]"


HEADER = (
    *("at a time", "keep", "prompt tokens", "prefill FLOPs", "requests / s", "x", "output tokens / s"),
    *("first token, ms", "later tokens, ms", "saves 5 % up to"),
)


def lines_of(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of a table, a line for each row."""
    bare = {r.concurrency: r for r in rows if r.keep_ratio == 1}
    found = []
    for r in rows:
        times = [a / b for a, b in zip(r.requests_s, bare[r.concurrency].requests_s, strict=True)]
        ratio = "" if r.prefill_flops_ratio is None else f"{r.prefill_flops_ratio:.2f}"
        upto = "" if r.keep_ratio == 1 else "any length" if r.under_saving is None else f"{r.under_saving - 1:,} tokens"
        cells = [str(r.concurrency), f"{r.keep_ratio:g}", str(r.n_prompt), ratio, shown(r.requests_s)]
        cells += [shown(times, "{:.2f}"), shown(r.tokens_s), shown(r.first_ms, "{:,.0f}"), shown(r.token_ms), upto]
        found.append(cells)
    return found


def conditions_line(rows: Sequence[Row]) -> str:
    """Model, machine and versions."""
    r = rows[0]
    loads = ", ".join(f"{load:g}" for load in r.load)
    return (
        f"{r.model} ({r.weights} weights), {r.method}, {r.device}, {r.cores} cores, {r.dtype}, vLLM {r.vllm}, torch "
        f"{r.torch}, {r.new_tokens} output tokens, {len(r.requests_s)} rounds, load average before each {loads}, "
        f"{r.date}."
    )


def legend() -> str:
    """What the columns mean."""
    return (
        "Median of the rounds [least, most]; x: requests a second relative to the unpruned requests of the same round. "
        "Prefill FLOPs: predicted by the ledger for one request, relative to the unpruned one. Saves 5 % up to: the "
        "output length up to which at least 5 % of the time of a request is saved, from the medians."
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    console.print(conditions_line(rows), highlight=False)
    console.print(Grid([name.replace(", ", ",\n") for name in HEADER], lines_of(rows), "", names=2))
    console.print(legend(), highlight=False)


def run(settings: Settings, out: Path, overwrite: bool, console: Console) -> None:
    """Measure, write and print."""
    rows = ServeBench(settings, out, console, overwrite).run()
    show(rows, console)
    console.print(f"{len(rows)} rows are in {out}")
