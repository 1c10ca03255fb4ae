"""What pruning costs against what it cannot go below: pairs of times as ratios, each pair measured in turns.

python -m tokprune.eval.bench.ratios --out eval/results/ratios.jsonl      # measure and write
python -m tokprune.eval.bench.ratios --check eval/results/ratios.jsonl    # measure and compare; fails where one rose

Times are CPU times of one thread, or of a child process, so that other work on the machine counts little. Both sides of
a pair take turns in one process, and a ratio is the median of those of the turns.
"""

from __future__ import annotations

import functools
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList

import tokprune
from tokprune.core.files import write_text

from . import selection_times
from .decode_steps import MODELS, measured, prompts, random_model, sharing
from .selection_times import WIDTH, conditions_of_machine, layout_of, selection
from .shaped import endless

Seconds = Callable[[], float]
KEEP, MARGIN, NEW_TOKENS, LEAST = 0.25, 1.15, 24, 0.02
N_TOKENS, FIRST_LAYERS = 576, 4


@dataclass(frozen=True)
class Ratio:
    """One pair, as it was measured.

    Args:
        group: "start", "select", "prefill", "decode" or "static".
        of, to: what was divided by what.
        ratio: median over rounds.
        low, high: quartiles.
        ms: milliseconds of `of`, median; for the reader alone, they are of this machine.
    """

    group: str
    of: str
    to: str
    ratio: float
    low: float
    high: float
    ms: float
    rounds: int
    device: str
    threads: int
    torch: str
    date: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What is compared with what is stored."""
        return self.group, self.of, self.to


@dataclass(frozen=True)
class Pair:
    """Two things to be timed in turns; each call measures once and returns its seconds."""

    group: str
    of: str
    to: str
    ours: Seconds
    theirs: Seconds

    def measure(self, rounds: int) -> Ratio:
        """One round warms up and is not counted."""
        found = []
        for turn in range(rounds + 1):
            sides = (self.ours, self.theirs) if turn % 2 else (self.theirs, self.ours)
            seconds = [side() for side in sides]
            found.append(seconds if turn % 2 else seconds[::-1])
        ratios = sorted(ours / theirs for ours, theirs in found[1:])
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        ms = 1000 * median(ours for ours, _ in found[1:])
        middle = (round(x, 4) for x in (median(ratios), low, high, ms))
        return Ratio(self.group, self.of, self.to, *middle, rounds, **conditions_of_machine())


def cpu_of(run: Callable[[], Any]) -> Seconds:
    """CPU time of this thread; short calls are repeated."""

    def seconds() -> float:
        begun, n = time.thread_time(), 0
        while (took := time.thread_time() - begun) < LEAST or not n:
            run()
            n += 1
        return took / n

    return seconds


# ------------------------------------------------------------------------------------------ groups


def start() -> Iterator[Pair]:
    """Commands that need no tensor, to an import of torch."""

    def command(*arguments: str) -> Seconds:
        def seconds() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return seconds

    for words in ("--help", "methods", "models", "flops --model llava-1.5-7b"):
        ours = command("-m", "tokprune", *words.split())
        yield Pair("start", f"tokprune {words}", "import torch", ours, command("-c", "import torch"))


def select() -> Iterator[Pair]:
    """Every method on one picture, to one product of all its tokens with each other."""
    rows = torch.randn(N_TOKENS, WIDTH)
    for name in selection_times.names():
        spec = selection_times.BUDGETED.get(name, name)
        run = selection(spec, layout_of(name, N_TOKENS))
        yield Pair("select", spec, "N x N x D product", cpu_of(run), cpu_of(lambda: rows @ rows.T))


def prefill() -> Iterator[Pair]:
    """First passes, to that of the same model on a prompt as short, and to the unpruned one."""
    model = random_model(n_layers=FIRST_LAYERS)
    for batch_size, methods in ((1, ("uniform", "vtc_cls", "fastv", "pyramiddrop")), (4, ("vtc_cls", "fastv"))):
        inputs = prompts(model, batch_size, padded=False)
        bare = cpu_of(functools.partial(_first_pass, model, inputs))
        short = cpu_of(functools.partial(_short_pass, model, inputs))
        for method in methods:
            ours = cpu_of(functools.partial(_attached, model, inputs, method))
            rows = f"{method}, batch {batch_size}"
            if method in ("uniform", "vtc_cls"):
                yield Pair("prefill", rows, "short prompt by hand", ours, short)
            yield Pair("prefill", rows, "unpruned", ours, bare)


def _first_pass(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs, use_cache=True, logits_to_keep=1)


def _attached(model: Any, inputs: dict[str, Tensor], method: str) -> None:
    with tokprune.attach(model, method, keep_ratio=KEEP):
        _first_pass(model, inputs)


def _short_pass(model: Any, inputs: dict[str, Tensor]) -> None:
    """The tower, and the language model on every fourth visual token."""
    ids, image = inputs["input_ids"], model.config.image_token_id
    features = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    n_kept = int(KEEP * features.shape[1])
    text = model.get_input_embeddings()(ids[ids != image].view(len(ids), -1))
    before = int((ids[0] == image).nonzero()[0])
    embeds = torch.cat([text[:, :before], features[:, :: features.shape[1] // n_kept], text[:, before:]], 1)
    model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), use_cache=True, logits_to_keep=1)


def decode(rounds: int) -> Iterator[Ratio]:
    """Steps after the prefill, to those on a cache as short that was made by hand, and to the unpruned model's."""
    model = MODELS["tiny-llava"]()
    for batch_size in (1, 8):
        for method in ("vtc_cls", "fastv", "pyramiddrop"):
            steps = measured("tiny-llava", model, method, batch_size, False, max(rounds, 2), 32)
            rows, ms = f"{method}, batch {batch_size}", steps.us["tokprune"] / 1000
            said = {"ms": ms, "rounds": steps.rounds, **conditions_of_machine()}
            for to, found in (("short cache by hand", steps.ratio), ("unpruned", steps.to_bare)):
                if found is not None:
                    yield Ratio("decode", rows, to, *found, **said)


def static() -> Iterator[Pair]:
    """Steps of generate() on static caches, as they are and compiled, to other ways of the same model."""
    model = endless(random_model(n_layers=FIRST_LAYERS))
    pruned, inputs = sharing(model), prompts(model, 1, padded=False)
    compiled = CompileConfig(backend="inductor", mode=None, fullgraph=True)
    compiled._compile_all_devices = True  # transformers compiles on graphics processors alone
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "compiled": {"cache_implementation": "static", "compile_config": compiled},
    }

    def steps(way: str, of: Any) -> Seconds:
        return functools.partial(_step_s, of, inputs, ways[way])

    with tokprune.attach(pruned, "vtc_cls", keep_ratio=KEEP):  # once: attach forgets what was compiled
        for way in ("static", "compiled"):
            yield Pair("static", f"vtc_cls, {way}", "vtc_cls, dynamic", steps(way, pruned), steps("dynamic", pruned))
        for way in ways:
            yield Pair("static", f"vtc_cls, {way}", f"unpruned, {way}", steps(way, pruned), steps(way, model))


def _step_s(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> float:
    """The median step after the first."""
    ticks: list[float] = []

    def tick(ids: Tensor, scores: Tensor) -> Tensor:
        ticks.append(time.thread_time())
        return scores

    processors = LogitsProcessorList([tick])
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=processors, **options)
    return median(b - a for a, b in itertools.pairwise(ticks[1:]))


PAIRS: dict[str, Callable[[], Iterator[Pair]]] = {
    "start": start,
    "select": select,
    "prefill": prefill,
    "static": static,
}
GROUPS = (*PAIRS, "decode")
MEANINGS = {
    "start": "a command to `import torch`",
    "select": "selecting a quarter of 576 tokens to one product of all tokens with each other",
    "prefill": "the first pass",
    "static": "a step of `generate` on a static cache, as it is or compiled",
    "decode": "a step after the prefill",
}


def ratios(groups: Sequence[str], rounds: int, of: str = "") -> Iterator[Ratio]:
    """Measure groups; with `of`, only what begins with it."""
    with torch.no_grad():
        for group in groups:
            if group == "decode":
                yield from decode(rounds)
                continue
            for pair in PAIRS[group]():
                if pair.of.startswith(of):
                    yield pair.measure(rounds)


# ------------------------------------------------------------------------------------------ comparison


def verdict(now: Ratio, before: Ratio | None) -> str:
    """Of a ratio and the stored one: "", "new", or "slower" where it rose beyond the margin and both spreads."""
    if before is None:
        return "new"
    return "slower" if now.ratio > MARGIN * before.ratio and now.low > before.high else ""


def read(path: Path) -> dict[tuple[str, str, str], Ratio]:
    """Stored ratios by what they compare."""
    rows = [Ratio(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.key: row for row in rows}


APP = typer.Typer(add_completion=False)


@APP.command()
def main(
    out: Annotated[Path | None, typer.Option(help="Where to write rows as JSONL; those of other groups stay.")] = None,
    check: Annotated[Path | None, typer.Option(help="Rows to compare with; ends with 1 where a ratio rose.")] = None,
    groups: Annotated[str, typer.Option(help=f"Of {','.join(GROUPS)}. Default: all.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each pair.")] = 7,
    of: Annotated[str, typer.Option(help="Only pairs that begin with this, such as vtc_cls.")] = "",
) -> None:
    """Measure ratios of times, and compare them with stored ones."""
    chosen = [name for name in groups.split(",") if name] or list(GROUPS)
    unknown = [name for name in chosen if name not in GROUPS]
    if unknown:
        raise typer.BadParameter(f"no group {unknown[0]!r}; type some of {','.join(GROUPS)}")
    torch.set_num_threads(1)
    stored = read(check) if check else {}
    table = Table("group", "ratio of", "to", "stored", "now", "")
    console, slower = Console(), 0
    for now in ratios(chosen, rounds, of):
        before = stored.get(now.key)
        said = verdict(now, before) if check else ""
        slower += said == "slower"
        table.add_row(*now.key, span_of(before) if before else "", span_of(now), said)
        console.print(f"{now.group}: {now.of} to {now.to}: {span_of(now)} {said}", highlight=False)
        if out:
            rows = {**(read(out) if out.exists() else {}), now.key: now}
            write_text(out, "".join(json.dumps(asdict(row)) + "\n" for row in rows.values()))
    if check:
        console.print(table)
        console.print(f"{slower} slower than stored" if slower else "none slower than stored")
    raise typer.Exit(1 if slower else 0)


def span_of(found: Ratio) -> str:
    """Median and quartiles."""
    return span([found.ratio, found.low, found.high])


def span(of: Sequence[float]) -> str:
    """Median and quartiles of a ratio."""
    middle, low, high = of
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


if __name__ == "__main__":
    APP()
