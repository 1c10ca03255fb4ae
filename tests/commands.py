"""The command line in this process, and what it wrote."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tokprune import cli


def tokprune_cli(*arguments: str) -> subprocess.CompletedProcess:
    """The console script with these arguments, in this process: starting one takes seconds."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tokprune", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, out.getvalue(), err.getvalue())


def refusal(done: subprocess.CompletedProcess) -> str:
    """The one line of a command that failed as it should."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tokprune:")]
    return line


def changed(run: Sequence[str], *more: str) -> list[str]:
    """A command line in which other values, in pairs of option and value, take the place of those that are there."""
    found = list(run)
    for option, value in zip(more[::2], more[1::2], strict=True):
        if option in found:
            found[found.index(option) + 1] = value
        else:
            found += [option, value]
    return found


def jsonl(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
