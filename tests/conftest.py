"""Offline, and one thread a worker where pytest-xdist shares the cores."""

import importlib.util
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
from folders import write_folder

# They run in an environment of their own: make test-integrations.
collect_ignore = [] if importlib.util.find_spec("lmms_eval") else ["integrations"]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    """Of tests/fuzz; make fuzz runs more of them."""
    parser.addoption("--fuzz-cases", type=int, default=200, help="random cases to hold against the laws")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the first of them; each has the next")


@pytest.fixture
def interruptible():
    """An interrupt raises here, also where the shell that started the tests ignores it, as for background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's own questions about three pictures."""
    return write_folder(tmp_path)
