"""Offline, and one thread a worker where pytest-xdist shares the cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
