"""Real lmms-eval, real documents, the embedded model."""

from __future__ import annotations

import os

os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from lmms_requests import MODEL, N_SAMPLES
from tokprune.eval.compare import chosen_samples
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import load_task
from tokprune.integrations.lmms_eval.model import TokPrune

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of what is started here


@pytest.fixture(scope="session")
def findit():
    task = load_task("findit")
    return task, chosen_samples(task, N_SAMPLES)


@pytest.fixture(scope="session")
def runner() -> Runner:
    return Runner.load("tiny-llava")


@pytest.fixture
def docs(findit) -> list[dict]:
    """Documents with one picture, two, and none, in turn; long and short texts."""
    task, samples = findit
    pictures = [task.image(s.image_id) for s in samples]
    made = []
    for i, sample in enumerate(samples[:9]):
        images = [[pictures[i]], [pictures[i], pictures[i + 1]], []][i % 3]
        made.append({"text": sample.question * (1 + i % 2), "images": images})
    return made


@pytest.fixture(scope="session")
def load():
    """The plug-in on the embedded model, with these arguments as texts."""

    def loaded(**arguments) -> TokPrune:
        return TokPrune(**{"pretrained": MODEL, "device": "cpu", **arguments})

    return loaded
