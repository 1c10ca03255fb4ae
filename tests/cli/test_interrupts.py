"""Ctrl-C in the first second of a command, while modules are still imported: exit code 130 and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOOK = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.environ["INTERRUPTED_AT"] = ""
            print("interrupted", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""
pytestmark = pytest.mark.slow

SCRIPT = [str(Path(sys.executable).with_name("tokprune"))]
MODULE = [sys.executable, "-m", "tokprune.cli"]
SHARED = [sys.executable, "-u", "-m", "tokprune.eval"]
COMPARE = ["compare", "--task", "findit", "--limit", "1", "--methods", "none"]
EARLY = ["tokprune.methods.base", "typer", "rich", "tokprune.cli.runs"]
LATE = ["torch", "numpy", "tokprune.eval.compare", "accelerate", "matplotlib", "transformers"]


def started(command: list[str], at: str, tmp_path: Path, handler) -> subprocess.CompletedProcess:
    """A real process that gets a real signal as it begins to import a module."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": at, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command,
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )


CASES = [(SCRIPT + ["methods"], at) for at in EARLY]
CASES += [(MODULE + ["methods"], at) for at in ("tokprune.methods", "typer")]
CASES += [(SCRIPT + COMPARE, at) for at in ("torch", "numpy")]
CASES += [(SHARED + COMPARE, at) for at in ("tokprune.cli", *LATE)]


@pytest.mark.parametrize(("command", "at"), CASES, ids=lambda v: v if isinstance(v, str) else Path(v[-1]).name)
def test_ctrl_c_while_importing_is_130_without_a_traceback(command, at, tmp_path):
    done = started(command, at, tmp_path, signal.default_int_handler)
    assert "interrupted" in done.stdout
    assert (done.returncode, done.stderr) == (130, "")


def test_where_the_signal_is_ignored_it_stays_ignored(tmp_path):
    """A shell starts background jobs like this; they are not to end when something else is interrupted."""
    done = started(SCRIPT + ["methods"], "typer", tmp_path, signal.SIG_IGN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "interrupted" in done.stdout
    assert "vtc_cls" in done.stdout


@pytest.mark.parametrize("code", ["import tokprune", "import tokprune.cli", "from tokprune.eval import run"])
def test_importing_the_package_leaves_signals_alone(code, tmp_path):
    """A notebook goes on after an interrupt."""
    caught = f"""
try:
    {code}
except KeyboardInterrupt:
    print("caught")
import signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = started([sys.executable, "-c", caught], "tokprune.methods", tmp_path, signal.default_int_handler)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["interrupted", "caught", "True"]


def test_an_interrupt_of_a_command_at_work_is_130_too(tmp_path):
    code = "import signal, sys, tokprune.cli.commands as c; c.estimate.shape_of = lambda name: signal.raise_signal(2); "
    code += "sys.argv = ['tokprune', 'flops', '--model', 'x']; c.main()"
    done = started([sys.executable, "-c", code], "nothing", tmp_path, signal.default_int_handler)
    assert (done.returncode, done.stderr) == (130, "")
