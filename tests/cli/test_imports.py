"""Commands that need no tensor import neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "PIL")
PRINT = f"""
import contextlib, io, sys
import tokprune.cli
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    tokprune.cli.main()
assert len(shown.getvalue()) > 200, shown.getvalue()
print([name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "compare --help",
        "methods",
        "methods fopru",
        "models",
        "flops --model llava-1.5-7b --method vtc_cls,fastv",
    ],
)
def test_no_tensor_library_is_imported(command):
    ran = subprocess.run([sys.executable, "-c", PRINT, *command.split()], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_neither_is_it_by_the_front_door():
    code = "import sys, tokprune; tokprune.list_methods(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
