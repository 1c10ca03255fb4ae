"""Everything that needs a GPU, in pieces that fit ten minutes together: laws, kernels, sweeps, decoding, threads.

make gpu        # python -m tokprune.eval.bench.gpu --out eval/results

Every piece runs in a process of its own, which is interrupted at its limit; what it has measured by then stays. A piece
that is done is not run again, so a second call goes on with the rest. Models have the sizes of real ones and random
weights; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import tokprune
from tokprune.core import attention, kernels
from tokprune.core.errors import TokPruneError
from tokprune.core.layout import grid_layout
from tokprune.core.tokens import VisualTokens

from ..run.rows import NONE, commit, device_name
from ..run.stopwatch import now
from . import shaped, sweep
from .settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PIECES, TIMES, THREADS = "gpu-pieces.jsonl", "gpu-kernels.jsonl", "gpu-threads.jsonl"
DONE, STOPPED, FAILED = "done", "stopped at its limit", "failed"
LIMIT_S, GRACE_S = 560, 20
TEXT_METHODS = ("divprune", "cdpruner", "fopru", "fastv")  # that every shape runs
SHAPES = {
    "llava-1.5-7b": ("vtc_cls", *TEXT_METHODS),
    "llava-next-7b": ("vtc_cls", *TEXT_METHODS),
    "internvl3-8b": ("vtc_cls", *TEXT_METHODS),
    "qwen2.5-vl-7b": TEXT_METHODS,
}
SHORT = "onevision-0.5b"  # whose steps of decoding are bound by launches
TOY = {"llava-1.5-7b": "tiny-llava", "llava-next-7b": "tiny-llava-next", "qwen2.5-vl-7b": "tiny-qwen"}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        batches: prompts at a time in a sweep.
        rounds, new_tokens: of a sweep.
        tokens: of the pictures that kernels select from.
        batch: pictures at a time there.
        width: of their features.
        heads: of the queries and keys of a sum.
        short_tokens: of an answer where steps are bound by launches.
        threads: of requests at a time.
        requests: of a thread.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = 6
    new_tokens: int = 16
    tokens: tuple[int, ...] = (576, 1296, 2880)
    batch: int = 8
    width: int = 4096
    heads: int = 16
    short_tokens: int = 64
    threads: tuple[int, ...] = (1, 4)
    requests: int = 4


SMALL = Size((1, 2), 1, 2, (20,), 2, 16, 1, 3, (1, 2), 1)


@dataclass(frozen=True)
class Place:
    """Where pieces run and what they write.

    Args:
        out: folder of the rows.
        device: "cuda" or "cpu".
        toy: small models and few rounds, to try the script.
    """

    out: Path
    device: str
    toy: bool

    @property
    def size(self) -> Size:
        return SMALL if self.toy else Size()

    def model(self, shape: str) -> dict[str, Any]:
        """What `Settings` is told of the model."""
        return {"model": TOY.get(shape, "tiny-llava")} if self.toy else {"shape": shape}

    def conditions(self) -> dict[str, Any]:
        """What all rows say."""
        device = torch.device(self.device)
        named = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        return {
            "device": device_name(named),
            "torch": torch.__version__,
            "commit": commit(),
            "date": time.strftime("%F"),
        }


@dataclass
class Piece:
    """How a piece ended.

    Args:
        name: of the piece.
        state: one of DONE, STOPPED and FAILED.
        seconds: it took.
        said: the last line that it printed.
    """

    name: str
    state: str
    seconds: float
    said: str
    device: str
    torch: str
    commit: str | None
    date: str


@dataclass
class KernelTime:
    """One selection or sum with the torch code and with the kernel, in milliseconds.

    Args:
        what: "divprune", "cdpruner" or "received".
        n_visual, n_kept, batch: its size; nothing is kept in a sum.
        torch_ms, kernel_ms: medians; None where no kernel runs here.
    """

    what: str
    n_visual: int
    n_kept: int | None
    batch: int
    torch_ms: float
    kernel_ms: float | None
    device: str
    torch: str
    commit: str | None
    date: str


@dataclass
class Threads:
    """Requests of several threads on one attached model.

    Args:
        model: its shape.
        method: or "none".
        keep_ratio: None for "none".
        threads: requests at a time.
        requests: measured.
        seconds: for all of them.
    """

    model: str
    method: str
    keep_ratio: float | None
    threads: int
    requests: int
    seconds: float
    device: str
    torch: str
    commit: str | None
    date: str


# ------------------------------------------------------------------------------------------ pieces


def laws(place: Place) -> str:
    """The tests that need a GPU, and those of the kernels; what pytest says last."""
    paths = ["tests/unit/test_kernels.py", "tests/contract/test_gpu.py", "tests/contract/test_methods.py"]
    chosen = "by_hand or keep_all" if place.toy else "gpu or greedy or attention or hand or golden or exhausted"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *paths[: 2 if place.toy else 3],
        "-k",
        chosen,
    ]
    if importlib.util.find_spec("xdist") is not None and not place.toy:
        command += ["-n", "4"]  # Triton compiles on the host
    environment = os.environ | ({"TOKPRUNE_GPU_LAWS": "cpu"} if place.device == "cpu" else {})
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    sys.stderr.write("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))) + "\n")
    said = lines[-1].strip("= ") if lines else shaped.first_line(RuntimeError(ran.stderr))
    if ran.returncode:
        raise TokPruneError(said)
    return said


def times_of_kernels(place: Place) -> str:
    """Selection and attention sums with the torch code and with the kernels."""
    size, rows = place.size, []
    for n in size.tokens:
        for batch in (1, size.batch):
            for what, run, n_kept in _sums(place, n, batch):
                torch_ms = _milliseconds(run, "off", place)
                kernel_ms = _milliseconds(run, "always", place) if _kernels_run(place) else None
                rows.append(KernelTime(what, n, n_kept, batch, torch_ms, kernel_ms, **place.conditions()))
                _write(place.out / TIMES, rows)
    return f"{len(rows)} rows"


def _kernels_run(place: Place) -> bool:
    """Whether there is a compiler or an interpreter for them."""
    there = importlib.util.find_spec("triton") is not None
    return there and (place.device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _sums(place: Place, n: int, batch: int) -> Iterator[tuple[str, Callable[[], Any], int | None]]:
    """What is timed: its name, the call, and how many tokens it keeps."""
    size, dtype = place.size, torch.bfloat16 if place.device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, n, size.width, generator=generator).to(place.device, dtype)
    relevance = torch.rand(batch, n, generator=generator).to(place.device)
    q, k = (
        torch.randn(batch, n, size.heads, 64, generator=generator).transpose(1, 2).to(place.device, dtype) for _ in "qk"
    )
    divprune, cdpruner = tokprune.get_method("divprune"), tokprune.get_method("cdpruner")
    tokens, keep = VisualTokens.of(features, grid_layout(1, n)), n // 4
    yield "divprune", lambda: divprune.order(tokens, keep), keep  # type: ignore[attr-defined]
    yield "cdpruner", lambda: cdpruner.order(features, relevance, keep), keep  # type: ignore[attr-defined]
    yield "received", lambda: attention.received(q, k, 0.125), None


@torch.no_grad()
def _milliseconds(run: Callable[[], Any], how: kernels.Use, place: Place) -> float:
    seconds, device = [], torch.device(place.device)
    with kernels.use(how):
        run()  # compiles
        for _ in range(place.size.rounds):
            since = now(device)
            run()
            seconds.append(now(device) - since)
    return 1000 * median(seconds)


def sweep_of(shape: str, place: Place) -> str:
    """Times of a model at all batch sizes that fit the memory."""
    size, methods = place.size, SHAPES[shape]
    settings = Settings(
        **place.model(shape),
        methods=methods[:1] if place.toy else methods,
        batch_sizes=size.batches,
        new_tokens=(size.new_tokens,),
        rounds=size.rounds,
        warmup=0 if place.toy else 1,
        device=place.device,
    )
    return _swept(settings, place.out / f"gpu-{shape}.jsonl")


def short_steps(place: Place) -> str:
    """Decoding with a small model and one prompt: steps are bound by launches, and host work shows."""
    settings = Settings(
        **place.model(SHORT),
        methods=["uniform", "fastv", "pyramiddrop"],
        new_tokens=(place.size.short_tokens,),
        rounds=place.size.rounds,
        warmup=0 if place.toy else 1,
        device=place.device,
    )
    return _swept(settings, place.out / "gpu-short-steps.jsonl")


def _swept(settings: Settings, out: Path) -> str:
    """Run a sweep, without the largest batches where these do not fit; raises if it was interrupted."""
    try:
        if not sweep.run(settings, out, True, Console(stderr=True)):
            raise KeyboardInterrupt
    except shaped.NoRoom:
        if len(settings.batch_sizes) == 1:
            raise
        return _swept(replace(settings, batch_sizes=settings.batch_sizes[:-1]), out)
    return f"batch sizes {', '.join(map(str, settings.batch_sizes))}"


def threads(place: Place) -> str:
    """Requests a second of one model that several threads use at a time."""
    size, shape = place.size, "llava-1.5-7b"
    settings = Settings(**place.model(shape), methods=["vtc_cls"], device=place.device)
    bench, rows = sweep.Bench(settings, Path(os.devnull), Console(stderr=True)), []
    model, inputs = bench.one_prompt()
    for method, keep in ((NONE, None), ("vtc_cls", 0.25)):
        attached = nullcontext() if keep is None else tokprune.attach(model, method, keep_ratio=keep)
        with attached:
            for n in size.threads:
                seconds = _answered(model, inputs, n, size)
                rows.append(Threads(shape, method, keep, n, n * size.requests, seconds, **place.conditions()))
                _write(place.out / THREADS, rows)
    return f"{len(rows)} rows"


def _answered(model: Any, inputs: dict, n_threads: int, size: Size) -> float:
    """Seconds in which every thread has its answers, after one to warm up."""

    @torch.no_grad()
    def answer(_: int) -> None:
        model.generate(**inputs, max_new_tokens=size.new_tokens, do_sample=False)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(answer, range(n_threads)))
        since = now(model.device)
        list(pool.map(answer, range(n_threads * size.requests)))
        return now(model.device) - since


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


# By name, with the seconds after which one is interrupted.
ALL: dict[str, tuple[float, Callable[[Place], str]]] = {
    "laws": (120, laws),
    "kernels": (60, times_of_kernels),
    "llava-1.5-7b": (120, lambda place: sweep_of("llava-1.5-7b", place)),
    "short steps": (45, short_steps),
    "qwen2.5-vl-7b": (75, lambda place: sweep_of("qwen2.5-vl-7b", place)),
    "llava-next-7b": (75, lambda place: sweep_of("llava-next-7b", place)),
    "threads": (40, threads),
    "internvl3-8b": (75, lambda place: sweep_of("internvl3-8b", place)),
}


# ------------------------------------------------------------------------------------------ all of them


def command_of(name: str, place: Place) -> list[str]:
    """What runs one piece."""
    flags = ["--device", place.device, *(["--toy"] if place.toy else [])]
    return [sys.executable, "-m", "tokprune.eval.bench.gpu", "--out", str(place.out), "--only", name, *flags]


def run_piece(name: str, place: Place, limit_s: float) -> Piece:
    """Run a piece in a process of its own and say how it ended."""
    since = time.monotonic()
    child = subprocess.Popen(command_of(name, place), stdout=subprocess.PIPE, text=True, start_new_session=True)
    state = DONE
    try:
        said, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        state = STOPPED
        child.send_signal(signal.SIGINT)  # whole rounds are written
        try:
            said, _ = child.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            said, _ = child.communicate()
    if state == DONE and child.returncode:
        state = FAILED
    last = (said.strip().splitlines() or [""])[-1]
    return Piece(name, state, round(time.monotonic() - since, 1), last, **place.conditions())


def ended(out: Path) -> list[Piece]:
    """How the pieces of earlier calls ended."""
    path = out / PIECES
    return [Piece(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(place: Place, names: Sequence[str], limit_s: float, again: bool = False) -> bool:
    """Run what is not done yet; whether all of it is done now."""
    begun = time.monotonic()
    place.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        before = {piece.name: piece for piece in ended(place.out)}
        if name in before and before[name].state == DONE and not again:
            continue
        left = limit_s - (time.monotonic() - begun)
        if left < min(15, limit_s / 2):
            typer.echo(f"{name}: no time left; call again to go on")
            continue
        piece = run_piece(name, place, min(ALL[name][0], left))
        typer.echo(f"{name}: {piece.state} after {piece.seconds:.0f} s: {piece.said}")
        _write(place.out / PIECES, [*(p for n, p in before.items() if n != name), piece])
    states = {piece.name: piece.state for piece in ended(place.out)}
    return all(states.get(name) == DONE for name in names)


def one_piece(name: str, place: Place) -> None:
    """Run a piece in this process, and print what it says as the last line."""
    try:
        typer.echo(ALL[name][1](place))
    except TokPruneError as error:
        typer.echo(shaped.first_line(error))
        raise typer.Exit(1) from error


def main(
    out: Annotated[Path, typer.Option(help="Folder of the rows.")] = ROOT / "eval" / "results",
    only: Annotated[str, typer.Option(help="One piece, in this process.")] = "",
    pieces: Annotated[str, typer.Option(help="Names, separated by commas. Default: all.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds for all pieces.")] = LIMIT_S,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script with --toy.")] = "cuda",
    toy: Annotated[bool, typer.Option(help="Small models and few rounds.")] = False,
    again: Annotated[bool, typer.Option(help="Also run what is done.")] = False,
) -> None:
    """Run the laws and measurements that need a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        typer.echo("make gpu needs a CUDA device, and torch finds none; --device cpu --toy tries the script", err=True)
        raise typer.Exit(2)
    names = [name for name in pieces.split(",") if name] or list(ALL)
    for name in [*names, *([only] if only else [])]:
        if name not in ALL:
            raise typer.BadParameter(f"no piece {name!r}; type some of {', '.join(ALL)}")
    place = Place(out, device, toy)
    if only:
        one_piece(only, place)
    elif not run_all(place, names, limit, again):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
