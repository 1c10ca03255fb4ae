"""A local folder of pictures or videos with a `metadata.jsonl` or `metadata.csv`: what `datasets` calls imagefolder."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from tokprune.core.errors import TaskError
from tokprune.prune.pictures import open_picture
from tokprune.prune.videos import N_FRAMES, Clip, frame_files, is_video, open_clip

from ..run.lines import Damaged, shortened
from .base import Sample, lettered
from .grading import too_few
from .metadata import ANSWERS, FIELDS, Digits, metadata_file, records
from .metrics import FEWEST_ANSWERS, LETTERS, METRICS, normalise, plain

REPLACE = "replace it or remove its lines"
TEXT = {
    "file_name": 'write the name of a picture or video, as "a.png"',
    "question": 'write a text, as "what is it?"',
    "answer": 'write a text, as "a cat", or a list of texts of which any is right, as ["cat", "a cat"]',
    "kind": 'write a text, as "colour", or leave the field out',
    "choices": f'write a list of 2 to {len(LETTERS)} different texts, as ["a cat", "a dog"], or leave the field out',
    "metric": f"write one of {', '.join(METRICS)}, or leave the field out; a function of your own goes to --metric",
}


class ImageFolder:
    """The task: one question a line of `metadata.jsonl`, or a row of `metadata.csv` with these columns.

    {"file_name": ..., "question": ..., "answer": ..., "kind": optional, "choices": optional, "metric": optional}

    A file is a picture, a video, or a folder of frames. The fields are texts with something in them. An answer may be a
    list of texts, of which any is right; `answers` is another name of the field. A whole number, alone or in a list, is
    taken as the text of its digits. Other numbers are refused: 1.5 could be "1.5", "1.50" or "1,5". Choices are a list,
    shown below the question with letters; the answer is one of them or its letter. The metric is one of `METRICS`,
    never code. Other fields are ignored. A cell of a table holds a list as texts with | between them, or as JSON; an
    empty cell of an optional column is a field left out.

    Raises:
        TaskError: no file with questions, or both; a line that is no JSON object or no row of the table, lacks a field
            or names one twice; a field of another type, or with nothing in it; an answer that is none of the choices;
            or a missing file.
    """

    def __init__(self, folder: Path, n_frames: int = N_FRAMES, labelled: bool = True):
        self.folder, self.name, self.n_frames = folder, folder.resolve().name, n_frames
        self.metadata = metadata_file(folder)
        self._samples = _read(folder, self.metadata, labelled)

    def samples(self) -> list[Sample]:
        return self._samples

    def train_samples(self) -> None:
        """None: a folder has no training split."""
        return

    def image(self, image_id: str) -> Image.Image | Clip:
        path = self.folder / image_id
        return open_clip(path, self.n_frames, REPLACE) if is_video(path) else open_picture(path, REPLACE)

    def checksum(self, image_id: str) -> int:
        """Of the file or the frames: a run that goes on must see the pictures that it saw."""
        path, total = self.folder / image_id, 0
        try:
            for file in frame_files(path) if path.is_dir() else [path]:
                total = zlib.crc32(file.read_bytes(), total)
        except OSError as error:
            raise TaskError(f"cannot read the picture {path}: {error.strerror}; {REPLACE}") from error
        return total

    def where(self, sample: Sample) -> str:
        """File and line of a question."""
        return f"{self.metadata} line {sample.id}"


def _read(folder: Path, path: Path, labelled: bool) -> list[Sample]:
    """The questions; of those without a label, where that is allowed, the answer is "?"."""
    samples = []
    for number, row in records(path):
        try:
            if isinstance(row, Damaged):
                raise row
            unlabelled = not labelled and not any(name in row for name in ANSWERS)
            samples.append(_sample(folder, number, {**row, "answer": "?"} if unlabelled else row))
        except Damaged as damaged:
            raise TaskError(f"{path} line {number} {damaged}") from damaged
    if not samples:
        raise TaskError(f"{path} has no line; write one line a question with {', '.join(FIELDS)}")
    return samples


def _sample(folder: Path, number: int, row: dict[str, Any]) -> Sample:
    named = [name for name in ANSWERS if name in row]
    if len(named) > 1:
        raise Damaged("has both answer and answers; leave one of them out")
    missing = [f for f in FIELDS if f not in row and not (f in ANSWERS and named)]
    if missing:
        raise Damaged(f"lacks {', '.join(missing)}; every line needs {', '.join(FIELDS)}")
    name, question, kind = (_text(field, row.get(field, "all")) for field in ("file_name", "question", "kind"))
    if "<image>" in question:
        raise Damaged("names <image>: leave <image> out of the question; the prompt puts it in place")
    if name.strip("./") == "" or not _exists(folder / name):
        raise Damaged(f"names {shortened(name)}, which is not in {folder}")
    answers, choices = _answers(row[named[0]]), _choices(row["choices"]) if "choices" in row else ()
    metric = _metric(row["metric"], len(answers)) if "metric" in row else ""
    if choices:
        question = lettered(question, choices)
        answers = [text for answer in answers for text in _chosen(answer, choices)]
    return Sample(str(number), name, question, answers[0], kind, tuple(answers[1:]), choices, metric)


def _text(field: str, value: Any) -> str:
    """A text of Unicode characters with something in it."""
    if isinstance(value, Digits):
        raise Damaged(f"has the number {value:.20} as {field}; {TEXT[field]}")
    if not isinstance(value, str) or not value.strip():
        raise Damaged(f"has the {field} {shortened(value)}; {TEXT[field]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Damaged(f"has the {field} {shortened(value)}, which is not valid Unicode; {TEXT[field]}") from error
    return value


def _answers(value: Any) -> list[str]:
    given = value if isinstance(value, list) else [value]
    if not given:
        raise Damaged("has an empty list of answers; leave the line out, or name one")
    return [_answer(answer) for answer in given]


def _answer(value: Any) -> str:
    """One answer; a whole number is taken as its digits, since there is one way to write it."""
    value = _text("answer", str(value) if isinstance(value, Digits) else value)
    if not normalise(value):
        raise Damaged(f"has the answer {shortened(value)}, of which nothing is compared; {TEXT['answer']}")
    return value


def _choices(value: Any) -> tuple[str, ...]:
    """Choices that can be told apart, by their text and by their letter."""
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise Damaged(f"has the choices {shortened(value)}; {TEXT['choices']}")
    choices = tuple(_text("choices", str(choice) if isinstance(choice, Digits) else choice) for choice in value)
    if len(set(map(plain, choices))) < len(choices):
        raise Damaged(f"has the choices {shortened(value)}, of which two are alike; {TEXT['choices']}")
    for letter, text in zip(LETTERS, choices, strict=False):
        if text.strip().upper() in set(LETTERS[: len(choices)]) - {letter}:
            raise Damaged(f"has the choice {shortened(text)}, which is the letter of another one; write it out")
    return choices


def _chosen(answer: str, choices: tuple[str, ...]) -> tuple[str, str]:
    """The text and the letter of the choice that an answer names by either."""
    for letter, text in zip(LETTERS, choices, strict=False):
        if answer.strip() == letter or normalise(answer) == normalise(text):
            return text, letter
    shown = ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, choices, strict=False))
    raise Damaged(f"has the answer {shortened(answer)}, which is no choice; write one of {shortened(shown, 120)}")


def _metric(value: Any, n_answers: int) -> str:
    if not isinstance(value, str) or value.strip() not in METRICS:
        raise Damaged(f"has the metric {shortened(value)}; {TEXT['metric']}")
    if value.strip() == "vqa" and n_answers < FEWEST_ANSWERS:
        raise Damaged(too_few(n_answers))
    return value.strip()


def _exists(path: Path) -> bool:
    try:
        return path.is_file() or (path.is_dir() and bool(frame_files(path)))
    except OSError:  # too long for a name
        return False
