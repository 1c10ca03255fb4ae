"""The questions that both sides answer."""

from __future__ import annotations

import zlib

import numpy as np
from tokprune.eval.tasks import load_task

N_TOKENS = 8
TASKS = {"tiny-llava": "findit", "tiny-llava-next": "findit_hd"}


def asked(task_name, n):
    """(sample, picture, prompt), n of them over the whole task."""
    task = load_task(task_name)
    samples = task.samples()
    samples = samples[:: max(1, len(samples) // n)][:n]
    return [(s, task.image(s.image_id), f"USER: <image>\n{s.question} ASSISTANT:") for s in samples]


def salt(image):
    """What the plug-in draws with for a picture, written out here by hand."""
    return zlib.crc32(np.asarray(image).tobytes())
