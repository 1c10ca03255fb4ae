"""Tasks of tokprune in lmms-eval's format: questions and pictures in a parquet file, the metric in a file beside it.

Videos are written as folders of frames, or named where they lie, which the model `tokprune` of lmms-eval takes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokprune.core.errors import RunError
from tokprune.prune.videos import FOLDER_FPS, Clip

from ..tasks import Sample, Task, metrics
from ..tasks.base import EXACT
from ..tasks.imagefolder import ImageFolder

PREFIX = "tokprune_"  # lmms-eval takes its own task where two have one name
METRIC = "exact_match"
KWARGS = "lmms_eval_specific_kwargs"
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

# Behind a copy of the module `metrics`.
_UTILS = """

def doc_to_visual(doc):
    return [doc["video"]] if doc["video"] else [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {{"{metric}": METRICS[doc["metric"]](results[0].strip(), [doc["answer"], *doc["also"]])}}
"""


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
        RunError: no samples, the folder cannot be written, or videos that cannot be exported.
        TaskError: a picture cannot be read.
    """
    import datasets

    if not samples:
        raise RunError(f"no questions of {task.name} to export; ask for at least one")
    name = exported_name(task)
    own = (folder / name).resolve()
    try:
        own.mkdir(parents=True, exist_ok=True)
        _write_documents(datasets, task, samples, own)
        metric = metric_name(samples)
        about = {"name": name, "parquet": json.dumps(str(own / "test.parquet")), "max_new_tokens": max_new_tokens}
        (own / f"{name}.yaml").write_text(_YAML.format(metric=metric, **about), encoding="utf-8")
        (own / "utils.py").write_text(inspect.getsource(metrics) + _UTILS.format(metric=metric), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {own}: {error.strerror or error}; name another folder with --out") from error
    return name


def export_prompt(task: str, name: str, options: Mapping[str, Any], folder: Path) -> None:
    """Write a task of lmms-eval under another name with other options of its prompt.

    Args:
        task: of lmms-eval, in a file of its name.
        name: of what is written.
        options: that are changed, as `{"ocr": True}`.
        folder: where `name.yaml` goes.

    Raises:
        RunError: lmms-eval has no such task, or its prompt has no such option.
    """
    import lmms_eval
    from lmms_eval.utils import load_yaml_config

    found = sorted(Path(lmms_eval.__file__).parent.glob(f"tasks/**/{task}.yaml"))
    if not found:
        raise RunError(f"lmms-eval has no task {task!r} in a file of that name")
    default = load_yaml_config(yaml_path=str(found[0]), mode="simple").get(KWARGS, {}).get("default", {})
    if unknown := options.keys() - default.keys():
        raise RunError(f"the prompt of lmms-eval's {task} has no option {', '.join(unknown)}; it has {list(default)}")
    written = {"include": str(found[0]), "task": name, KWARGS: {"default": {**default, **options}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(json.dumps(written, indent=1), encoding="utf-8")  # JSON is YAML


def metric_name(samples: Sequence[Sample]) -> str:
    """What lmms-eval calls the metric of these questions; "score" where they have several."""
    rules = {s.rule for s in samples}
    if rules == {EXACT}:
        return METRIC
    return rules.pop() if len(rules) == 1 else "score"


def _write_documents(datasets: Any, task: Task, samples: Sequence[Sample], own: Path) -> None:
    """Questions, answers and pictures as a parquet file; frames of videos into folders next to it."""
    shown = {i: _visual(task, i, own / "videos") for i in dict.fromkeys(s.image_id for s in samples)}
    columns = {
        "id": [s.id for s in samples],
        "question": [s.question for s in samples],
        "answer": [s.answer for s in samples],
        "also": [list(s.also) for s in samples],
        "kind": [s.kind for s in samples],
        "metric": [s.rule for s in samples],
        "video": [v if isinstance(v := shown[s.image_id], str) else "" for s in samples],
        "image": [None if isinstance(v := shown[s.image_id], str) else {"bytes": v, "path": None} for s in samples],
    }
    text = datasets.Value("string")
    others = {"also": datasets.Sequence(text), "image": datasets.Image()}
    features = datasets.Features(dict.fromkeys(columns, text) | others)
    with _quiet(datasets):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(own / "test.parquet")


def _visual(task: Task, image_id: str, videos: Path) -> bytes | str:
    """A picture as PNG, or the path of a video: where it lies, else a folder of frames that is written.

    Raises:
        RunError: a video made by code at another speed than that of a folder of frames.
    """
    shown = task.image(image_id)
    if not isinstance(shown, Clip):
        return _png(shown)
    if isinstance(task, ImageFolder):
        return str((task.folder / image_id).resolve())
    if shown.fps != FOLDER_FPS:
        raise RunError(
            f"{task.name} shows videos of {shown.fps:g} frames a second, which cannot be exported to lmms-eval: write "
            f"them to a folder as video files with a metadata.jsonl, show {FOLDER_FPS:g} frames a second, or use "
            "tokprune compare"
        )
    path = videos / f"{zlib.crc32(image_id.encode()):08x}"
    path.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(shown.frames):
        (path / f"{i:04}.png").write_bytes(_png(frame))
    return str(path)


def checksum(task: Task, samples: Sequence[Sample]) -> int:
    """Of questions, answers and pictures: tells one export from another."""
    pictures = {i: _checksum(task.image(i)) for i in {s.image_id for s in samples}}
    return zlib.crc32(repr([(s, pictures[s.image_id]) for s in samples]).encode())


def _checksum(shown: Image.Image | Clip) -> int:
    total = 0
    for frame in shown.frames if isinstance(shown, Clip) else (shown,):
        total = zlib.crc32(_png(frame), total)
    return total


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


def _png(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()
