"""Offline, and one thread a worker where pytest-xdist shares the cores."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's own questions about three pictures."""
    lines = []
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (50 + 10 * i, 40), colour).save(tmp_path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "question": "what color is the shape?", "answer": colour})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return tmp_path
