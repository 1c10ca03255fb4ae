"""Rows: one answer, the times of a batch, and one configuration on one task as tables show it."""

from __future__ import annotations

import datetime
import math
import platform
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import transformers
from tokprune.integrations.transformers import attention_implementation

import tokprune
from tokprune.cost.flops import Ops, Shape

from ..stats import difference, mean_interval, percentile, wilson
from . import checks
from .lines import Damaged, typed

NONE = "none"
DOWNSAMPLE = "downsample"  # the bare model on smaller pictures, `controls.smaller`
FRAMES = "frames"  # the bare model on some of the frames of a video
LESS = (DOWNSAMPLE, FRAMES)  # controls that show less in place of pruning
BARE = (NONE, *LESS)
SHUFFLED = "shuffled pictures"
EXACT_MATCH = "exact_match"
TRANSFORMERS, VLLM = "transformers", "vllm"  # backends: what runs the model


@dataclass(frozen=True)
class Config:
    """What is compared: a method specification (or "none") with its budget, on the right or on other pictures."""

    method: str
    keep_ratio: float | None = None
    shuffled: bool = False
    flops_ratio: float | None = None
    flops_text: int = 0  # text tokens that a FLOPs budget is solved beside
    keep_tokens: int | None = None

    @property
    def label(self) -> str:
        """A name unique within a run."""
        keep = "" if self.keep_ratio is None else f"@{float(self.keep_ratio)!r}"
        tokens = "" if self.keep_tokens is None else f"@{self.keep_tokens}tokens"
        flops = "" if self.flops_ratio is None else f"@flops{float(self.flops_ratio)!r}"
        return (SHUFFLED if self.shuffled else self.method) + keep + tokens + flops

    @property
    def budget(self) -> dict[str, Any]:
        """What `tokprune.attach` is given."""
        if self.flops_ratio is not None:
            return {"flops_ratio": self.flops_ratio, "flops_text": self.flops_text}
        if self.keep_tokens is not None:
            return {"keep_tokens": self.keep_tokens}
        return {} if self.keep_ratio is None else {"keep_ratio": self.keep_ratio}


class Crops(NamedTuple):
    """What the tower encodes for a picture or video: crops (or frames), and patches of each where its size decides."""

    n: int
    n_patches: int | None = None


@dataclass
class Costs:
    """FLOPs of language model and prefill, and KV bytes, before and after; of one prompt without padding."""

    llm_flops_before: float | None = None
    llm_flops_after: float | None = None
    prefill_flops_before: float | None = None
    prefill_flops_after: float | None = None
    kv_bytes_before: float | None = None
    kv_bytes_after: float | None = None

    @classmethod
    def of(
        cls,
        shape: Shape | None,
        columns: tuple[int, int | Sequence[int]],
        spent: Ops,
        bytes_per_value: int,
        crops: tuple[Crops, Crops] = (Crops(1), Crops(1)),
    ) -> Costs:
        """Of one picture, unknown for no shape.

        Args:
            shape: the model.
            columns: of the prompt before, and after in every decoder layer or by layer.
            spent: what selecting computed, less what tower and projector were spared.
            bytes_per_value: of keys and values.
            crops: that the tower encodes before and after.
        """
        if shape is None:
            return cls()
        bare, pruned = (
            shape.prefill(n, crops=c.n, n_patches=c.n_patches, bytes_per_value=bytes_per_value)
            for n, c in zip(columns, crops, strict=True)
        )
        return cls(
            llm_flops_before=bare.llm.flops,
            llm_flops_after=pruned.llm.flops,
            prefill_flops_before=bare.prefill.flops,
            prefill_flops_after=(pruned.prefill + spent).flops,
            kv_bytes_before=bare.kv_bytes,
            kv_bytes_after=pruned.kv_bytes,
        )


@dataclass
class SampleRow:
    """One answer. Columns are of the prompt row alone, without padding."""

    task: str
    config: str
    batch: int
    method: str
    keep_ratio: float | None
    sample: str
    kind: str
    expected: str
    answer: str
    right: bool  # the whole answer, and nothing after it
    words_right: bool  # it begins with the expected words
    stopped: bool  # the stop token came
    n_visual_before: int
    n_visual_after: int
    n_visual_mean: float  # over decoder layers
    llm_columns_before: int
    llm_columns_after: int
    costs: Costs
    flops_ratio: float | None = None
    keep_tokens: int | None = None
    value: float | None = None  # of a metric that knows more than right and wrong
    metric: str = "exact"  # that graded the answer
    question: str = ""  # as asked, without the suffix of the run; empty in rows of earlier runs
    backend: str = TRANSFORMERS

    @property
    def score(self) -> float:
        """What the answer is worth, 0..1: `value`, or else whether it is right."""
        return self.right if self.value is None else self.value


@dataclass
class BatchTime:
    """One batch of one configuration: to the first token, and for each token after it (None where there is none).

    `pictures` is a checksum of the picture files of a task that can change; 0 elsewhere. `device` is where it ran.
    """

    task: str
    config: str
    batch: int
    size: int
    prefill_s: float
    decode_s_per_token: float | None
    peak_bytes: int | None  # of the GPU
    pictures: int = 0
    device: str = ""


@dataclass(repr=False)
class Row:
    """One configuration on one task, as it is written to rows.jsonl.

    `value` is the mean of `metric`, for exact_match the share of whole answers right, with its 95 % interval and
    standard error (`stats.mean_interval`); `difference` is what it has more than the unpruned run on the same
    questions, with its 95 % interval (`stats.difference`) and, for right and wrong answers, the p-value of McNemar's
    exact test; `words_value` is the share that begins with the expected words, for exact_match alone; `n_visual_after`
    and `llm_columns_after` are of the last decoder layer, `n_visual_mean` over all of them; `params` are the method's
    options; `hard_value` is the value, with its 95 % interval, over the `hard_n` questions that the control
    `downsample` at the same budget gets wrong; `n_changed` is how many answers are another text than the unpruned
    run's, `commonest` the share of the commonest text and `commonest_bare` that of the unpruned run; `suffix` is the
    text that was added to every question; `backend` is what ran the model; `by_kind` holds value and number of
    questions by kind; counts, FLOPs and bytes are means over questions;
    times are of full batches; `peak_gib` and `gpu` are empty on a CPU. What a harness does not know is None.
    """

    model: str
    revision: str | None
    method: str
    params: dict[str, Any]
    config: str
    keep_ratio: float | None
    n_visual_before: float
    n_visual_after: float
    n_visual_mean: float
    llm_columns_before: float
    llm_columns_after: float
    task: str
    split: str
    n_samples: int
    metric: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    words_value: float | None
    stop_rate: float | None
    by_kind: dict[str, dict[str, float]]
    costs: Costs
    prefill_ms_p20: float
    prefill_ms_p50: float
    prefill_ms_p80: float
    prefill_ratio: float | None
    decode_ms_per_token_p50: float | None
    peak_gib: float | None
    gpu: str | None
    device: str
    dtype: str
    batch_size: int
    attn_implementation: str
    positions: str
    torch: str
    transformers: str
    tokprune: str
    commit: str | None
    seed: int | None
    date: str
    flops_ratio: float | None = None
    keep_tokens: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    hard_value: float | None = None
    hard_low: float | None = None
    hard_high: float | None = None
    hard_n: int | None = None
    n_changed: float | None = None
    commonest: float | None = None
    commonest_bare: float | None = None
    suffix: str | None = None
    backend: str = TRANSFORMERS

    def __repr__(self) -> str:
        tokens = f"{self.n_visual_before:g} -> {self.n_visual_after:g} visual tokens"
        return f"Row({self.task}, {self.config}: {self.metric} {self.value:.3f}, {tokens})"

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; the value itself where none is known."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high

    @property
    def is_noise(self) -> bool:
        """Whether the 95 % interval of the difference from the unpruned run holds zero."""
        return self.difference_low is not None and self.difference_low <= 0 <= (self.difference_high or 0)

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Row:
        """From one line of rows.jsonl.

        Raises:
            Damaged: it is none.
        """
        before_cuts = {"n_visual_mean": fields.get("n_visual_after")}  # in rows that are as old as that
        row = typed(cls, {**before_cuts, **fields})
        if any(part.keys() != {"value", "n_samples"} for part in row.by_kind.values()):
            raise Damaged("has a by_kind without values or numbers of questions")
        return row


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


def conditions(model: torch.nn.Module) -> dict[str, Any]:
    """Where and with what something runs; the columns of a row that describe it."""
    device, config = model.device, model.config
    return {
        "revision": getattr(config, "_commit_hash", None),
        "gpu": device_name(device) if device.type == "cuda" else None,
        "device": device_name(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": attention_implementation(model),
        "positions": "auto",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokprune": tokprune.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from, or None where it is installed without one."""
    root = Path(tokprune.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


@dataclass
class Summariser:
    """Makes a task's rows out of its answers and times; `where` is what `conditions` says."""

    model_name: str
    where: dict[str, Any]
    task: str
    split: str
    suffix: str | None = None

    def rows(self, answers: dict[Config, list[SampleRow]], times: dict[Config, list[BatchTime]]) -> list[Row]:
        """One row a configuration. A last batch smaller than the others is not timed."""
        full = max(t.size for batches in times.values() for t in batches)
        timed = {c: {t.batch: t for t in batches if t.size == full} for c, batches in times.items()}
        bare = next((c for c in answers if c.method == NONE and not c.shuffled), None)
        small = {_place(c): rows for c, rows in answers.items() if c.method == DOWNSAMPLE and c.budget}
        shared = {**self.where, "batch_size": full}
        found = []
        for config, rows in answers.items():
            if rows:
                devices = {t.device for t in times[config] if t.device}
                shared["device"] = " and ".join(sorted(devices)) or shared["device"]
                row = self._row(config, rows, timed[config], timed[bare] if bare else None, shared)
                if bare and config != bare:
                    row = compared(row, rows, answers[bare])
                if config.method != DOWNSAMPLE and _place(config) in small:
                    row = replace(row, **checks.hard(rows, small[_place(config)]))
                found.append(row)
        return found

    def _row(self, config: Config, rows: list[SampleRow], timed: dict, bare: dict | None, shared: dict) -> Row:
        values, metric = [r.score for r in rows], metric_of(rows)
        low, high, stderr = mean_interval(values)
        ordered = sorted(1000 * t.prefill_s for t in timed.values())
        steps = [1000 * t.decode_s_per_token for t in timed.values() if t.decode_s_per_token is not None]
        peaks = [t.peak_bytes for t in timed.values() if t.peak_bytes is not None]
        params = {} if config.method in BARE else asdict_of_method(config.method)
        return Row(
            model=self.model_name,
            method=SHUFFLED if config.shuffled else config.method,
            params=params,
            config=config.label,
            keep_ratio=config.keep_ratio,
            flops_ratio=config.flops_ratio,
            keep_tokens=config.keep_tokens,
            **{name: mean(getattr(r, name) for r in rows) for name in COUNTS},
            task=self.task,
            split=self.split,
            n_samples=len(rows),
            metric=metric,
            value=sum(values) / len(rows),
            low=low,
            high=high,
            stderr=stderr,
            words_value=mean(r.words_right for r in rows) if metric == EXACT_MATCH else None,
            stop_rate=mean(r.stopped for r in rows),
            by_kind=_by_kind(rows),
            costs=mean_costs([r.costs for r in rows]),
            prefill_ms_p20=percentile(ordered, 0.2),
            prefill_ms_p50=percentile(ordered, 0.5),
            prefill_ms_p80=percentile(ordered, 0.8),
            prefill_ratio=median(t.prefill_s / bare[b].prefill_s for b, t in timed.items()) if bare else None,
            decode_ms_per_token_p50=median(steps) if steps else None,
            peak_gib=max(peaks) / 2**30 if peaks else None,
            seed=params.get("seed"),
            suffix=self.suffix,
            backend=rows[0].backend,
            **shared,
        )


def _place(config: Config) -> tuple[float | None, int | None]:
    """The budget, whatever a ratio is of."""
    return config.keep_ratio or config.flops_ratio, config.keep_tokens


def compared(row: Row, rows: Sequence[SampleRow], bare: Sequence[SampleRow]) -> Row:
    """The row with its difference from the unpruned run, and changed answers, on the questions that both answered."""
    scores = {r.sample: r.score for r in bare}
    both = [(r.score, scores[r.sample]) for r in rows if r.sample in scores]
    if not both:
        return row
    apart = difference(*zip(*both, strict=True))
    ends = {"difference_low": apart.low, "difference_high": apart.high}
    texts = checks.changed(*({r.sample: r.answer for r in some} for some in (rows, bare)))
    return replace(row, difference=apart.value, **ends, p_value=apart.p_value, **texts)


def metric_of(rows: Sequence[SampleRow]) -> str:
    """The metric of a mean over answers, as "choice and exact" where questions have different ones."""
    names = sorted({r.metric for r in rows})
    return EXACT_MATCH if names == ["exact"] else " and ".join(names)


CHECKED = ("hard_value", "hard_low", "hard_high", "n_changed", "commonest", "commonest_bare")
COUNTS = ("n_visual_before", "n_visual_after", "n_visual_mean", "llm_columns_before", "llm_columns_after")


def asdict_of_method(spec: str) -> dict[str, Any]:
    """The options of a method."""
    return asdict(tokprune.get_method(spec))


def _by_kind(rows: Sequence[SampleRow]) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for r in rows:
        kinds[r.kind].append(r.score)
    return {kind: {"value": mean(values), "n_samples": len(values)} for kind, values in sorted(kinds.items())}


def mean_costs(costs: Sequence[Costs]) -> Costs:
    """Means by field; unknown where any is."""
    return Costs(**{name: _mean_or_none([getattr(c, name) for c in costs]) for name in Costs.__dataclass_fields__})


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if len(known) == len(values) else None


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows with the seeds of `random` put together: means, with the interval of one seed's number of questions.

    Seeds answer the same questions, so their answers are not independent: three seeds are not three times the data.
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        parts = row.method.split(":")
        name = ":".join(p for p in parts if not p.startswith("seed=")) if parts[0] == "random" else row.method
        groups[row.model, row.task, name, row.keep_ratio, row.flops_ratio, row.keep_tokens].append(row)
    return [group[0] if len(group) == 1 else _pool(name, group) for (_, _, name, *_), group in groups.items()]


def is_graded(row: Row) -> bool:
    """Whether some answers were neither right nor wrong: then the standard error is not that of a share."""
    if row.stderr is None or not 0 <= row.value <= 1:
        return False
    return not math.isclose(row.stderr, math.sqrt(row.value * (1 - row.value) / row.n_samples), rel_tol=1e-6)


def _pool(name: str, group: list[Row]) -> Row:
    first, value = group[0], mean(r.value for r in group)
    low, high = (_mean_or_none([getattr(r, key) for r in group]) for key in ("low", "high"))
    if low is not None and 0 <= value <= 1 and not all(map(is_graded, group)):
        low, high = wilson(value * first.n_samples, first.n_samples)
    ratios = [r.prefill_ratio for r in group if r.prefill_ratio is not None]
    means = {key: mean(getattr(r, key) for r in group) for key in COUNTS}
    maybe = ("words_value", "stop_rate", "difference", "difference_low", "difference_high", *CHECKED)
    means |= {key: _mean_or_none([getattr(r, key) for r in group]) for key in maybe}
    common = [kind for kind in first.by_kind if all(kind in r.by_kind for r in group)]
    kinds = {k: {**first.by_kind[k], "value": mean(r.by_kind[k]["value"] for r in group)} for k in common}
    changed = {
        "method": f"{name}, {len(group)} seeds",
        "value": value,
        "low": low,
        "high": high,
        "prefill_ratio": mean(ratios) if ratios else None,
        "by_kind": kinds,
        "costs": mean_costs([r.costs for r in group]),
        "seed": None,
        "p_value": None,
    }
    return Row(**{**vars(first), **means, **changed})
