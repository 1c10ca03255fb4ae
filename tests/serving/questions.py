"""The questions that both sides answer."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from tokprune.eval.tasks import load_task

N_TOKENS = 8
TASKS = {"tiny-llava": "findit", "tiny-llava-next": "findit_hd", "tiny-qwen": "findit"}
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = ((128, 64), (64, 128), (96, 96), (64, 112))  # of pictures for models that take any


def task_of(model_name):
    """Of an embedded model, or of a folder by its name."""
    return TASKS[Path(model_name).name]


def asked(task_name, n):
    """(sample, picture, prompt), n of them over the whole task."""
    task = load_task(task_name)
    samples = task.samples()
    samples = samples[:: max(1, len(samples) // n)][:n]
    return [(s, task.image(s.image_id), f"USER: <image>\n{s.question} ASSISTANT:") for s in samples]


def shown(model_name, samples):
    """(sample, pictures, prompt) as a model takes them: for Qwen of several sizes, and two in every fourth prompt."""
    if "qwen" not in Path(model_name).name:
        return [(sample, [image], prompt) for sample, image, prompt in samples]
    found = []
    for i, (sample, image, prompt) in enumerate(samples):
        pictures = [image.resize(SIZES[j % 4]) for j in ((i, i + 1) if i % 4 == 3 else (i,))]
        found.append((sample, pictures, prompt.replace("<image>", QWEN * len(pictures))))
    return found


def salt(image):
    """What the plug-in draws with for a picture, written out here by hand."""
    return zlib.crc32(np.asarray(image).tobytes())
