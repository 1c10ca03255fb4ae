"""One JSON line per request: the answer, the tokens that the language model saw, and the cost."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from tokprune.integrations.transformers import family_of, shape_from_config

import tokprune
from tokprune.core.errors import RunError, UnsupportedModelError
from tokprune.cost.flops import Ops, Shape
from tokprune.prune.report import ImageReport, Report


@dataclass(frozen=True)
class Seen:
    """A request as the model saw it.

    `n_visual_after` and `llm_columns_after` are of the last decoder layer, `n_visual_mean` over all of them;
    special tokens (newline, [CLS]) count. FLOPs and bytes are of one prompt without padding, or None if the model's
    cost is not known.
    """

    n_images: int
    n_visual_before: int
    n_visual_after: int
    n_visual_mean: float
    llm_columns_before: int
    llm_columns_after: int
    costs: dict[str, float | None]


COSTS = tuple(f"{part}_{when}" for part in ("llm_flops", "prefill_flops", "kv_bytes") for when in ("before", "after"))


def seen(inputs: Any, n_images: Sequence[int], model: torch.nn.Module, report: Report | None) -> list[Seen]:
    """Tokens and cost of every row of a batch.

    Args:
        inputs: of the batch, with `input_ids` and `attention_mask`, (B, S).
        n_images: pictures of every row.
        model: the bare model.
        report: of the pass; None if nothing was attached.
    """
    before = inputs["attention_mask"].sum(1).tolist()
    n_visual = _placeholders(inputs, model)
    if report is None:
        unknown = dict.fromkeys(COSTS)
        return [Seen(i, v, v, v, c, c, unknown) for i, v, c in zip(n_images, n_visual, before, strict=True)]
    images, columns = _by_row(report, n_images), _columns(report, before)
    shape, found = _shape(model), []
    for i, (own, layers) in enumerate(zip(images, columns, strict=True)):
        found.append(
            Seen(
                n_images=n_images[i],
                n_visual_before=n_visual[i],
                n_visual_after=sum(image.n_kept + image.n_special_kept for image in own),
                n_visual_mean=sum(mean(image.placeholders_by_layer(report.n_layers)) for image in own),
                llm_columns_before=before[i],
                llm_columns_after=layers[-1],
                costs=_costs(shape, (before[i], layers), own, report.bytes_per_value),
            )
        )
    return found


def _columns(report: Report, before: Sequence[int]) -> list[list[int]]:
    """Columns of every row in every decoder layer; of the beams of one request, the first."""
    given = report.prefills[0].rows or list(before)
    step = max(1, len(given) // len(before))
    return report.row_layers(0, given)[::step]


def _by_row(report: Report, n_images: Sequence[int]) -> list[list[ImageReport]]:
    """The pictures of every row; of the copies for beams, the first."""
    total = sum(n_images)
    images = report.encoded[:: max(1, len(report.encoded) // total)] if total else []
    ends = [sum(n_images[: i + 1]) for i in range(len(n_images))]
    return [images[end - n : end] for end, n in zip(ends, n_images, strict=True)]


def _placeholders(inputs: Any, model: torch.nn.Module) -> list[int]:
    ids = inputs["input_ids"]
    if model.config.model_type not in tokprune.list_models():
        return [0] * len(ids)
    return family_of(model).is_placeholder(ids).sum(1).tolist()


def _shape(model: torch.nn.Module) -> Shape | None:
    try:
        return shape_from_config(model.config)
    except UnsupportedModelError:
        return None


def _costs(
    shape: Shape | None, columns: tuple[int, Sequence[int]], images: Sequence[ImageReport], bytes_per_value: int
) -> dict[str, float | None]:
    if shape is None:
        return dict.fromkeys(COSTS)
    bare, pruned = (shape.read(n, bytes_per_value=bytes_per_value) for n in columns)
    for image in images:
        encoded = shape.encode(image.layout.n_crops, image.n_patches)
        bare, pruned = bare + encoded, pruned + encoded
    spent = sum((image.spent_before_llm(shape) for image in images), Ops())
    values = (
        bare.llm.flops,
        pruned.llm.flops,
        bare.prefill.flops,
        (pruned.prefill + spent).flops,
        bare.kv_bytes,
        pruned.kv_bytes,
    )
    return dict(zip(COSTS, values, strict=True))


class Recorder:
    """Appends lines to a file; every rank has its own.

    Args:
        path: the file; `.rank1` goes before its suffix on rank 1 of several.
        rank, world_size: of this process.

    Raises:
        RunError: it cannot be written.
    """

    def __init__(self, path: str, rank: int = 0, world_size: int = 1):
        at = Path(path)
        self.path = at.with_name(f"{at.stem}.rank{rank}{at.suffix}") if world_size > 1 else at
        self.n_batches = 0
        self.write([])

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}; use another file with record=FILE"
            ) from error

    def add(
        self, requests: Sequence[dict[str, Any]], rows: Sequence[Seen], watch: Stopwatch, shared: dict[str, Any]
    ) -> None:
        """Add a batch: the key and answer of every request, and what the model saw."""
        batch = {"batch": self.n_batches, "batch_size": len(rows), **watch.times(), **shared}
        self.write([{**request, **asdict(row), **batch} for request, row in zip(requests, rows, strict=True)])
        self.n_batches += 1


def conditions(model: torch.nn.Module, positions: str) -> dict[str, Any]:
    """Device, dtype, attention and versions of this run."""
    device = model.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "revision": getattr(model.config, "_commit_hash", None),
        "gpu": gpu,
        "device": gpu or f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "positions": positions,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokprune": tokprune.__version__,
        "date": datetime.date.today().isoformat(),
    }


class Stopwatch:
    """Seconds up to the end of the first forward pass in a `with` block, and after it."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.prefill_s, self.decode_s, self.n_new = model, math.nan, math.nan, 0

    def __enter__(self) -> Stopwatch:
        self.hook = self.model.register_forward_hook(self._forward_ended)
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        self._synchronise()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()
        self._synchronise()
        self.decode_s = time.perf_counter() - self.started - self.prefill_s

    def times(self) -> dict[str, float | None]:
        """Times and peak memory to record; None if not measured."""
        on_gpu = self.model.device.type == "cuda"
        return {
            "prefill_s": None if math.isnan(self.prefill_s) else self.prefill_s,
            "decode_s_per_token": self.decode_s / (self.n_new - 1) if self.n_new > 1 else None,
            "peak_bytes": torch.cuda.max_memory_allocated(self.model.device) if on_gpu else None,
        }

    def _forward_ended(self, *ignored) -> None:
        if math.isnan(self.prefill_s):
            self._synchronise()
            self.prefill_s = time.perf_counter() - self.started

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def world() -> tuple[int, int, int]:
    """Rank, local rank and number of processes, from the launcher's environment."""
    rank, local, size = (int(os.environ.get(name, default)) for name, default in RANKS.items())
    return rank, local, size


RANKS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
