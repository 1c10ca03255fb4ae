"""The command line in this process, and what it wrote."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokprune import cli


def tokprune_cli(*arguments: str) -> SimpleNamespace:
    """Exit code, output and errors of the console script."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tokprune", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return SimpleNamespace(code=ended.value.code or 0, out=out.getvalue(), err=err.getvalue())


def lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
