"""The prompt of every task is frozen: text, tokens and placeholders."""

from __future__ import annotations

import json

import prompt_snapshot
import pytest
from folders import write_folder

SNAPSHOT = json.loads(prompt_snapshot.SNAPSHOT.read_text())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompt_snapshot.by_harness(write_folder(tmp_path_factory.mktemp("folder")))


def test_every_task_and_model_is_in_the_snapshot(prompts):
    assert {model: set(tasks) for model, tasks in prompts.items()} == {m: set(tasks) for m, tasks in SNAPSHOT.items()}


@pytest.mark.parametrize(("model", "task"), [(model, task) for model, tasks in SNAPSHOT.items() for task in tasks])
def test_prompts_are_as_they_were(prompts, model, task):
    assert prompts[model][task] == SNAPSHOT[model][task]


def test_the_snapshot_says_what_a_model_sees():
    assert SNAPSHOT["tiny-llava"]["findit"][0] == {
        "prompt": "USER: <image>\nwhat color is the square? ASSISTANT:",
        "text": "<s> USER: what color is the square ? ASSISTANT:",
        "placeholders": 144,
    }
    assert all(len(rows) == prompt_snapshot.N_SAMPLES for tasks in SNAPSHOT.values() for rows in tasks.values())
