"""A local folder of pictures or videos with a `metadata.jsonl`: what the `datasets` library calls imagefolder."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from tokprune.core.errors import TaskError
from tokprune.prune.pictures import open_picture
from tokprune.prune.videos import N_FRAMES, Clip, frame_files, is_video, open_clip

from ..run.lines import Damaged, parsed, shortened
from .base import Sample, normalise

FIELDS = ("file_name", "question", "answer")
REPLACE = "replace it or remove its lines"
TEXT = {
    "file_name": 'write the name of a picture or video, as "a.png"',
    "question": 'write a text, as "what is it?"',
    "answer": 'write a text, as "a cat", or a list of texts of which any is right, as ["cat", "a cat"]',
    "kind": 'write a text, as "colour", or leave the field out',
}


class ImageFolder:
    """The task: one question a line, {"file_name": ..., "question": ..., "answer": ..., "kind": optional}.

    A file is a picture, a video, or a folder of frames. The fields are texts with something in them. An answer may be a
    list of texts, of which any is right; a whole number, alone or in a list, is taken as the text of its digits. Other
    numbers are refused: 1.5 could be "1.5", "1.50" or "1,5". Other fields are ignored.

    Raises:
        TaskError: no metadata.jsonl; a line that is no JSON object, lacks a field or names one twice; a field of
            another type, or with nothing in it; or a missing file.
    """

    def __init__(self, folder: Path, n_frames: int = N_FRAMES):
        self.folder, self.name, self.n_frames = folder, folder.resolve().name, n_frames
        self._samples = _read(folder)

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


def _read(folder: Path) -> list[Sample]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise TaskError(
            f"{folder} has no metadata.jsonl; write one line a question: "
            '{"file_name": "a.png", "question": "what is it?", "answer": "a cat"}'
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at U+2028
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    samples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            samples.append(_sample(folder, path, number, line))
    if not samples:
        raise TaskError(f"{path} has no line; write one line a question with {', '.join(FIELDS)}")
    return samples


def _sample(folder: Path, path: Path, number: int, line: str) -> Sample:
    try:
        row = parsed(line, integer=_Digits)
        if missing := [f for f in FIELDS if f not in row]:
            raise Damaged(f"lacks {', '.join(missing)}; every line needs {', '.join(FIELDS)}")
        name, question, kind = (_text(field, row.get(field, "all")) for field in ("file_name", "question", "kind"))
        given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not given:
            raise Damaged("has an empty list of answers; leave the line out, or name one")
        answer, *also = map(_answer, given)
    except Damaged as damaged:
        raise TaskError(f"{path} line {number} {damaged}") from damaged
    if "<image>" in question:
        raise TaskError(f"{path} line {number}: leave <image> out of the question; the prompt puts it in place")
    if name.strip("./") == "" or not _exists(folder / name):
        raise TaskError(f"{path} line {number} names {shortened(name)}, which is not in {folder}")
    return Sample(str(number), name, question, answer, kind, tuple(also))


class _Digits(str):
    """A whole number as it was written."""


def _text(field: str, value: Any) -> str:
    """A text of Unicode characters with something in it."""
    if isinstance(value, _Digits):
        raise Damaged(f"has the number {value:.20} as {field}; {TEXT[field]}")
    if not isinstance(value, str) or not value.strip():
        raise Damaged(f"has the {field} {shortened(value)}; {TEXT[field]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Damaged(f"has the {field} {shortened(value)}, which is not valid Unicode; {TEXT[field]}") from error
    return value


def _answer(value: Any) -> str:
    """One answer; a whole number is taken as its digits, since there is one way to write it."""
    value = _text("answer", str(value) if isinstance(value, _Digits) else value)
    if not normalise(value):
        raise Damaged(f"has the answer {shortened(value)}, of which nothing is compared; {TEXT['answer']}")
    return value


def _exists(path: Path) -> bool:
    try:
        return path.is_file() or (path.is_dir() and bool(frame_files(path)))
    except OSError:  # too long for a name
        return False
