"""What lmms-eval wrote about one configuration, checked for completeness, and the rows that it becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from tokprune.core.errors import RunError

from ..run.checks import changed
from ..run.lines import Damaged, counted, parsed, rows_of, typed
from ..run.rows import BARE, COUNTS, NONE, Config, Costs, Row, SampleRow, asdict_of_method, commit, mean_costs
from ..stats import Z95, difference, percentile, wilson
from ..tasks import Sample
from ..tasks.base import RIGHT

NO_FILTER = "none"


@dataclass(frozen=True)
class Score:
    """One metric of a task.

    Args:
        value: as lmms-eval put the documents' values together.
        stderr: lmms-eval's own; None where it has none.
        values: of every document, where they are numbers whose mean (or 100 times it) is the value; empty elsewhere.
    """

    value: float
    stderr: float | None
    values: dict[int, float]

    @property
    def interval(self) -> tuple[float | None, float | None, float | None]:
        """Low and high end of the 95 % interval, and the standard error; None where nothing is known.

        Wilson's where every value is 0 or 1, else from the standard error of the values, else from lmms-eval's own.
        """
        n, values = len(self.values), list(self.values.values())
        if n and set(values) <= {0, 1}:
            low, high = wilson(sum(values), n)
            p = mean(values)
            return low * self._scale, high * self._scale, math.sqrt(p * (1 - p) / n) * self._scale
        error = stdev(values) / math.sqrt(n) * self._scale if n > 1 else self.stderr
        return (None, None, None) if error is None else (self.value - Z95 * error, self.value + Z95 * error, error)

    @property
    def _scale(self) -> int:
        return 100 if self.values and not math.isclose(mean(self.values.values()), self.value, abs_tol=1e-9) else 1


@dataclass(frozen=True)
class Document:
    """A line of lmms-eval's own samples, as far as its form is known."""

    doc_id: int


@dataclass(frozen=True)
class Record:
    """A line that the plug-in recorded, as far as it is read here; see `integrations.lmms_eval.record`."""

    task: str
    doc_id: int
    batch: int
    batch_size: int
    stopped: bool | None
    prefill_s: float | None
    decode_s_per_token: float | None
    peak_bytes: int | None
    n_visual_before: int
    n_visual_after: int
    n_visual_mean: float
    llm_columns_before: int
    llm_columns_after: int
    costs: Costs
    revision: str | None
    gpu: str | None
    device: str
    dtype: str
    attn_implementation: str
    positions: str
    torch: str
    transformers: str
    tokprune: str
    date: str


@dataclass(frozen=True)
class TaskResult:
    """One task under one configuration.

    Args:
        name: within lmms-eval.
        split: of the data set.
        scores: by metric.
        answers: of every document what was expected and what was answered.
        records: of every document what the plug-in recorded, a line a request.
    """

    name: str
    split: str
    scores: dict[str, Score]
    answers: dict[int, tuple[str, str]]
    records: dict[int, list[dict[str, Any]]]

    @property
    def batches(self) -> dict[tuple, dict[str, Any]]:
        """One recorded line a batch, by rank and number."""
        return {(line["rank"], line["batch"]): line for lines in self.records.values() for line in lines}


def read(folder: Path) -> list[TaskResult]:
    """The tasks of a run of lmms-eval with `--log_samples`.

    Args:
        folder: with `out/`, which lmms-eval wrote, and `record*.jsonl`, which the plug-in did.

    Raises:
        RunError: no results, or not all of them.
    """
    found = sorted((folder / "out").glob("**/*_results.json"))
    if not found:
        raise RunError(f"no results of lmms-eval in {folder}")
    results, stem = _json(found[-1]), found[-1].name.removesuffix("_results.json")
    if not results["configs"]:
        raise RunError(f"no tasks in {found[-1]}")
    records = _records(folder)
    return [
        _task(name, results, found[-1].with_name(f"{stem}_samples_{name}.jsonl"), records)
        for name in results["configs"]
    ]


def documents(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """What lmms-eval wrote about every document of a task, from a folder that `read` takes."""
    path = sorted((folder / "out").glob(f"**/*_samples_{name}.jsonl"))[-1]
    return {line["doc_id"]: line for line in _whole(path, Document)}


def _task(name: str, results: dict, path: Path, records: dict[tuple[str, int], list]) -> TaskResult:
    expected = int(results["n-samples"][name]["effective"])
    by_doc: dict[int, list[dict]] = {}
    for line in _whole(path, Document):
        by_doc.setdefault(line["doc_id"], []).append(line)
    own = {doc: records[name, doc] for doc in by_doc if (name, doc) in records}
    if not expected == len(by_doc) == len(own):
        raise RunError(f"{name}: {min(len(by_doc), len(own))} of {expected} answers are there")
    config = results["configs"][name]
    return TaskResult(
        name=name,
        split=str(config.get("test_split") or config.get("validation_split") or ""),
        scores=_scores(results["results"][name], by_doc),
        answers={doc: (str(group[0].get("target", "")), _answer(group[0])) for doc, group in by_doc.items()},
        records=own,
    )


def _scores(numbers: dict[str, Any], by_doc: dict[int, list[dict]]) -> dict[str, Score]:
    """Every metric that is a finite number; those that lmms-eval only submits elsewhere are none."""
    scores = {}
    for key, value in numbers.items():
        metric, comma, name = key.partition(",")
        if not comma or "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            continue
        error = numbers.get(f"{metric}_stderr,{name}")
        one_line = all(len(group) == 1 for group in by_doc.values())  # with several filters, a line each
        values = _values(metric, by_doc, float(value)) if one_line else {}
        own = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
        scores[metric if name == NO_FILTER else f"{metric} ({name})"] = Score(float(value), own, values)
    return scores


def _values(metric: str, by_doc: dict[int, list[dict]], value: float) -> dict[int, float]:
    """A number for every document, where the metric is their mean: an F1 score is none."""
    found = {}
    for doc, (line, *_) in by_doc.items():
        own = line.get(metric)
        own = own.get("score") if isinstance(own, dict) else own
        if not isinstance(own, (int, float)):
            return {}
        found[doc] = float(own)
    middle = mean(found.values())
    same = any(math.isclose(scale * middle, value, rel_tol=1e-6, abs_tol=1e-9) for scale in (1, 100))
    return found if same else {}


def _answer(line: dict) -> str:
    given = line.get("filtered_resps", line.get("resps", ""))
    return given if isinstance(given, str) else json.dumps(given)


def _records(folder: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Recorded lines by task and document; the rank is that of the file."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for rank, path in enumerate(sorted(folder.glob("record*.jsonl"))):
        for line in _whole(path, Record):
            found.setdefault((line["task"], line["doc_id"]), []).append({**line, "rank": rank})
    return found


def _whole(path: Path, kind: type[Document] | type[Record]) -> list[dict[str, Any]]:
    """The lines of a file as they are, all with the fields of `kind`: lmms-eval answers all documents or none.

    Raises:
        RunError: some are damaged.
    """

    def checked(line: dict[str, Any]) -> dict[str, Any]:
        typed(kind, line, others=True)
        return line

    read = list(rows_of(path, checked, foreign=kind is Document))
    lines = [line for line in read if isinstance(line, dict)]
    if len(lines) < len(read):
        raise RunError(counted(len(read) - len(lines), path, "its configuration has to be run again"))
    return lines


def _json(path: Path) -> dict[str, Any]:
    try:
        return parsed(path.read_bytes(), foreign=True)
    except Damaged as damaged:
        raise RunError(f"{path} is cut off or damaged: it {damaged}") from damaged


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Source:
    """Where a task of lmms-eval comes from.

    Args:
        name: as it was typed.
        samples: of a task of tokprune's own, in the order of the documents; None for another.
    """

    name: str
    samples: Sequence[Sample] | None = None


def rows(model: str, found: dict[Config, list[TaskResult]], sources: dict[str, Source]) -> list[Row]:
    """One row a task, metric and configuration, with its difference from the unpruned run.

    Metrics behind a task's first one have their name in that of the task, so that tables and plots keep them apart.

    Args:
        model: as it was typed.
        found: what every configuration came to, the unpruned one first.
        sources: tasks of tokprune's own by their names within lmms-eval.
    """
    bare = {r.name: r for config, results in found.items() if config.method == NONE for r in results}
    made = []
    for config, results in found.items():
        for result in results:
            source = sources.get(result.name, Source(result.name))
            for metric in result.scores:
                made.append(_row(model, config, result, metric, source, bare.get(result.name)))
    return made


def _row(model: str, config: Config, result: TaskResult, metric: str, source: Source, bare: TaskResult | None) -> Row:
    score, lines = result.scores[metric], [group[0] for group in result.records.values()]
    low, high, stderr = score.interval
    is_first = metric == next(iter(result.scores))
    params = {} if config.method in BARE else asdict_of_method(config.method)
    stopped = [line["stopped"] for line in lines if line["stopped"] is not None]
    shared = ("revision", "gpu", "device", "dtype", "attn_implementation", "positions", "torch", "transformers")
    return Row(
        model=model,
        method=config.method,
        params=params,
        config=config.label,
        keep_ratio=config.keep_ratio,
        flops_ratio=config.flops_ratio,
        keep_tokens=config.keep_tokens,
        **{name: mean(line[name] for line in lines) for name in COUNTS},
        task=source.name if is_first else f"{source.name}, {metric}",
        split=result.split,
        n_samples=len(lines),
        metric=metric,
        value=score.value,
        low=low,
        high=high,
        stderr=stderr,
        words_value=None,
        stop_rate=mean(stopped) if stopped else None,
        by_kind=_by_kind(score, source),
        costs=mean_costs([Costs(**line["costs"]) for line in lines]),
        **_times(result, bare),
        **{name: lines[0][name] for name in (*shared, "tokprune")},
        commit=commit(),
        seed=params.get("seed"),
        date=lines[0]["date"],
        **(_difference(score, bare.scores.get(metric)) if bare and config.method != NONE else {}),
        **(changed(_texts(result), _texts(bare)) if bare and is_first and config.method != NONE else {}),
    )


def _texts(result: TaskResult) -> dict[str, str]:
    return {str(doc): answer for doc, (_, answer) in result.answers.items()}


def _times(result: TaskResult, bare: TaskResult | None) -> dict[str, Any]:
    """Of full batches; a process's first one, which is slow, and a last one smaller than the others are not timed."""
    full = max(line["batch_size"] for line in result.batches.values())
    every = {key: line for key, line in result.batches.items() if line["batch_size"] == full and line["prefill_s"]}
    timed = {key: line for key, line in every.items() if key[1]} or every
    ordered = sorted(1000 * line["prefill_s"] for line in timed.values())
    steps = [1000 * s for line in timed.values() if (s := line["decode_s_per_token"]) is not None]
    peaks = [line["peak_bytes"] for line in timed.values() if line["peak_bytes"] is not None]
    there = {key: line["prefill_s"] for key, line in bare.batches.items() if line["prefill_s"]} if bare else {}
    ratios = [line["prefill_s"] / there[key] for key, line in timed.items() if key in there]
    return {
        **{f"prefill_ms_p{q}": percentile(ordered, q / 100) for q in (20, 50, 80)},
        "prefill_ratio": median(ratios) if ratios else None,
        "decode_ms_per_token_p50": median(steps) if steps else None,
        "peak_gib": max(peaks) / 2**30 if peaks else None,
        "batch_size": full,
    }


def _by_kind(score: Score, source: Source) -> dict[str, dict[str, float]]:
    if source.samples is None:
        return {}
    kinds: dict[str, list[float]] = {}
    for doc, value in score.values.items():
        kinds.setdefault(source.samples[doc].kind, []).append(value)
    return {kind: {"value": mean(values), "n_samples": len(values)} for kind, values in sorted(kinds.items())}


def _difference(score: Score, bare: Score | None) -> dict[str, Any]:
    """From the unpruned run on the same documents, where both have values in 0..1."""
    both = [(v, bare.values[doc]) for doc, v in score.values.items() if doc in bare.values] if bare else []
    if not both or not all(0 <= v <= 1 for pair in both for v in pair):
        return {}
    found = difference(*zip(*both, strict=True))
    if found.p_value is None and len(both) < 2:
        return {}
    p_value = {} if found.p_value is None else {"p_value": found.p_value}
    return {"difference": found.value, "difference_low": found.low, "difference_high": found.high, **p_value}


def sample_rows(config: Config, result: TaskResult, source: Source) -> list[SampleRow]:
    """One row a document, by the task's first metric; right where its value is 1, of tokprune's from `RIGHT` on."""
    score = next(iter(result.scores.values()), None)
    made = []
    for doc, (target, answer) in sorted(result.answers.items()):
        line, own = result.records[doc][0], source.samples[doc] if source.samples is not None else None
        value = score.values.get(doc) if score else None
        is_right = value is not None and value >= RIGHT if own else value == 1
        made.append(
            SampleRow(
                task=source.name,
                config=config.label,
                batch=line["batch"],
                method=config.method,
                keep_ratio=config.keep_ratio,
                flops_ratio=config.flops_ratio,
                keep_tokens=config.keep_tokens,
                sample=own.id if own else str(doc),
                kind=own.kind if own else "all",
                expected=own.expected if own else target,
                answer=answer,
                right=is_right,
                words_right=is_right,
                stopped=bool(line["stopped"]),
                **{name: line[name] for name in COUNTS},
                costs=Costs(**line["costs"]),
                value=value,
                metric=own.rule if own else next(iter(result.scores), ""),
                question=own.question if own else "",
            )
        )
    return made
