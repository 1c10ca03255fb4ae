"""Processes of the environment with vLLM: `make test-vllm`. Elsewhere what needs vLLM is skipped."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import KINDS, make
from server import ENV

HERE = Path(__file__).parent


def run(script: str, *arguments: str, given=None) -> subprocess.CompletedProcess:
    """A script of this folder in a process of its own, which has JSON for input."""
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=ENV, check=False)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where a model is: the name of an embedded one, or a folder with one that is made for the tests."""

    @functools.cache
    def of(model: str) -> str:
        return str(make(model, tmp_path_factory.mktemp("made"))) if model in KINDS else model

    return of


@pytest.fixture
def note():
    """Adds figures to the file that EQUALITY_ROWS names, if it does: what the documentation shows is made of it."""

    def add(**row) -> None:
        if path := os.environ.get("EQUALITY_ROWS"):
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")

    return add


@pytest.fixture(scope="session")
def answers(tmp_path_factory, place):
    """What a script answers, once for the same question."""
    found: dict[str, object] = {}

    def of(script: str, model: str, n: int, given):
        key = json.dumps([script, model, n, given])
        if key not in found:
            out = tmp_path_factory.mktemp("answers") / "rows.json"
            done = run(script, place(model), str(n), str(out), given=given)
            assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
            found[key] = json.loads(out.read_text())
        return found[key]

    return of
