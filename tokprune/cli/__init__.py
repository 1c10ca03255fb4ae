"""The command line. Needs the extra `cli`.

Read `commands` and `runs` first, which hold the commands. `arguments` checks what was typed, `tables` prints,
`estimate` knows models by their configuration, `doctor` checks an installation, `extras` imports `tokprune.eval`.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """The console script."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"tokprune: the command line needs {' and '.join(missing)}: pip install 'tokprune[cli]'\n")
        sys.exit(2)
    from .commands import main as run_commands

    run_commands()
