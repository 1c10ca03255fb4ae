"""Imports from tokprune.eval, made only by the commands that need them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..core.errors import RunError

EVAL_NEEDS = ("accelerate", "easy_vqa", "filelock", "jinja2", "matplotlib", "pandas", "tabulate")


def load_runner(model: str = "tiny-llava", **options: Any) -> Any:
    """A loaded model with its processor; an embedded one without a progress bar."""
    from transformers.utils import logging

    run = eval_module("run.runner", needs=())
    if model in eval_module("models", needs=()).EMBEDDED:
        logging.disable_progress_bar()
    return run.Runner.load(model, **options)


def eval_module(module: str, needs: tuple[str, ...] = EVAL_NEEDS) -> Any:
    """A module of tokprune.eval, which needs the extra of that name.

    Raises:
        RunError: the extra is not installed.
    """
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{', '.join(missing)} not installed: use pip install 'tokprune[eval]'")
    return importlib.import_module(f"tokprune.eval.{module}")
