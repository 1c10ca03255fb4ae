"""Tasks of tokprune in lmms-eval's format: questions and pictures in a parquet file, the metric in a file beside it."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokprune.core.errors import RunError

from ..tasks import Sample, Task, normalise

PREFIX = "tokprune_"  # lmms-eval takes its own task where two have one name
METRIC = "exact_match"
MAX_NEW_TOKENS = 8

_YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_UTILS = '''\
"""Written by tokprune: an answer is right when it is an expected one, apart from case, spaces and a full stop."""


{normalise}

def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {{"{metric}": float(normalise(results[0]) in map(normalise, [doc["answer"], *doc["also"]]))}}
'''


def exported_name(task: Task) -> str:
    """The name of a task within lmms-eval."""
    return PREFIX + re.sub(r"\W+", "_", task.name)


def export(task: Task, samples: Sequence[Sample], folder: Path, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """Write a task for lmms-eval, for `--include_path`; whatever model then answers it.

    Args:
        task: any of tokprune's, such as `load_task("findit")`.
        samples: of the task; their order numbers them.
        folder: a folder of the task's name is made in it, over an older one.
        max_new_tokens: where an answer is cut.

    Returns:
        The name to type after `--tasks`.

    Raises:
        RunError: no samples, or the folder cannot be written.
        TaskError: a picture cannot be read.
    """
    import datasets

    if not samples:
        raise RunError(f"no questions of {task.name} to export; ask for at least one")
    name = exported_name(task)
    columns = {
        "id": [s.id for s in samples],
        "question": [s.question for s in samples],
        "answer": [s.answer for s in samples],
        "also": [list(s.also) for s in samples],
        "kind": [s.kind for s in samples],
        "image": [{"bytes": _png(task, s.image_id), "path": None} for s in samples],
    }
    text = datasets.Value("string")
    others = {"also": datasets.Sequence(text), "image": datasets.Image()}
    features = datasets.Features(dict.fromkeys(columns, text) | others)
    own = (folder / name).resolve()
    try:
        own.mkdir(parents=True, exist_ok=True)
        with _quiet(datasets):
            datasets.Dataset.from_dict(columns, features=features).to_parquet(own / "test.parquet")
        about = {"name": name, "parquet": json.dumps(str(own / "test.parquet")), "max_new_tokens": max_new_tokens}
        (own / f"{name}.yaml").write_text(_YAML.format(metric=METRIC, **about), encoding="utf-8")
        utils = _UTILS.format(normalise=inspect.getsource(normalise), metric=METRIC)
        (own / "utils.py").write_text(utils, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {own}: {error.strerror or error}; name another folder with --out") from error
    return name


def checksum(task: Task, samples: Sequence[Sample]) -> int:
    """Of questions, answers and pictures: tells one export from another."""
    pictures = {s.image_id: zlib.crc32(_png(task, s.image_id)) for s in samples}
    return zlib.crc32(repr([(s, pictures[s.image_id]) for s in samples]).encode())


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the progress bars of the library, and with them afterwards where they were there."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _png(task: Task, image_id: str) -> bytes:
    held = io.BytesIO()
    task.image(image_id).save(held, "PNG")
    return held.getvalue()
