"""Steps of decoding: nothing is done again that was known, and what changes between them is noticed."""

from __future__ import annotations

import importlib.metadata

import pytest
import tiny
import torch

import tokprune

METHODS = ("divprune", "fastv")


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_step_reads_no_package_metadata(method, monkeypatch):
    model, inputs, read = tiny.model(), tiny.batch(), []
    original = importlib.metadata.version
    with tokprune.attach(model, method, keep_ratio=0.3):
        tiny.generate(model, inputs)  # what is found out once has been
        monkeypatch.setattr(importlib.metadata, "version", lambda name: read.append(name) or original(name))
        tiny.generate(model, inputs)
    assert not read
