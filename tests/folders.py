"""A user's own questions about three pictures, as a folder."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def write_folder(path: Path) -> Path:
    """Write pictures and metadata.jsonl."""
    lines = []
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (50 + 10 * i, 40), colour).save(path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "question": "what color is the shape?", "answer": colour})
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path
