"""Folders of a user: questions about three pictures, and a model that brings code along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tokprune.eval.models import path_of

CODE = "from pathlib import Path\nPath({marker!r}).write_text('this ran')\nclass Mine: pass\n"
AUTO = {
    "config.json": {"AutoConfig": "own.Mine", "AutoModel": "own.Mine", "AutoModelForImageTextToText": "own.Mine"},
    "processor_config.json": {"AutoProcessor": "own.Mine"},
    "preprocessor_config.json": {"AutoProcessor": "own.Mine", "AutoImageProcessor": "own.Mine"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.Mine", "own.Mine"], "AutoProcessor": "own.Mine"},
}


def write_folder(path: Path) -> Path:
    """Write pictures and metadata.jsonl."""
    lines = []
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (50 + 10 * i, 40), colour).save(path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "question": "what color is the shape?", "answer": colour})
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def write_model(path: Path, files: Iterable[str], **changes: str) -> Path:
    """The embedded model with code of its own in some of its files; it writes a marker file when it is imported."""
    shutil.copytree(path_of("tiny-llava"), path)
    (path / "own.py").write_text(CODE.format(marker=str(path / "marker")))
    for name in dict.fromkeys(files):
        values = json.loads((path / name).read_text())
        changed = {**values, **(changes if name == "config.json" else {}), "auto_map": AUTO[name]}
        (path / name).write_text(json.dumps(changed))
    return path
