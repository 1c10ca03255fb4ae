"""A local folder of pictures with a `metadata.jsonl`: what the `datasets` library calls imagefolder."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from PIL import Image

from tokprune.errors import TaskError
from tokprune.pictures import open_picture

from .base import Sample

FIELDS = ("file_name", "question", "answer")
REPLACE = "replace it or remove its lines"


class ImageFolder:
    """The task: one question a line, {"file_name": ..., "question": ..., "answer": ..., "kind": optional}.

    Raises:
        TaskError: no metadata.jsonl, a line that is no JSON object, a missing field, or a missing picture.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.resolve().name
        self._samples = _read(folder)

    def samples(self) -> list[Sample]:
        """All lines, in order."""
        return self._samples

    def train_samples(self) -> None:
        """None: a folder has no training split."""
        return

    def image(self, image_id: str) -> Image.Image:
        """The picture, RGB."""
        return open_picture(self.folder / image_id, REPLACE)

    def checksum(self, image_id: str) -> int:
        """Of the file: a run that goes on must see the pictures that it saw."""
        path = self.folder / image_id
        try:
            return zlib.crc32(path.read_bytes())
        except OSError as error:
            raise TaskError(f"cannot read the picture {path}: {error.strerror}; {REPLACE}") from error


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
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{path} line {number} is not JSON ({error.msg}); write one object a line") from error
    missing = [f for f in FIELDS if not (isinstance(row, dict) and f in row)]
    if missing:
        raise TaskError(f"{path} line {number} lacks {', '.join(missing)}; every line needs {', '.join(FIELDS)}")
    if "<image>" in str(row["question"]):
        raise TaskError(f"{path} line {number}: leave <image> out of the question; the prompt puts it in place")
    name, question, answer = (str(row[f]) for f in FIELDS)
    if not (folder / name).is_file():
        raise TaskError(f"{path} line {number} names {name}, which is not in {folder}")
    return Sample(str(number), name, question, answer, str(row.get("kind", "all")))
