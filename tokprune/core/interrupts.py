"""Ctrl-C while a command is still importing: the process ends with exit code 130 and says nothing.

Importing this module does it where Python was started as a command of this package, and nothing anywhere else: whoever
imports tokprune in a notebook or a script gets a KeyboardInterrupt as ever. A signal that is ignored stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

CODE = 130  # 128 and the number of the signal, as shells have it
_MODULES = ("tokprune.cli", "tokprune.eval")


def is_command() -> bool:
    """Whether the console script or `python -m` with a module of commands runs, and is still being imported."""
    first = sys.argv[0] if getattr(sys, "argv", None) else ""
    if first == "-m":  # until Python has found the module
        typed = sys.orig_argv
        return "-m" in typed[:-1] and typed[typed.index("-m") + 1] in _MODULES
    return os.path.basename(first) in ("tokprune", "tokprune.exe", "tokprune-script.py")


def end_at_once(*ignored: Any) -> None:
    """Handle the signal: nothing was begun that could be left undone, and libraries may swallow an exception."""
    os._exit(CODE)


def begin() -> None:
    """End at once from here on, unless somebody else said what the signal does."""
    if threading.current_thread() is threading.main_thread() and _handler() is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end() -> None:
    """Raise KeyboardInterrupt again from here on."""
    if _handler() is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handler() -> Any:
    return signal.getsignal(signal.SIGINT)


if is_command():
    begin()
