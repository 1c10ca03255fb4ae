"""Ctrl-C during the imports of a command: the process ends with exit code 130, without a traceback.

Importing this module sets that up if Python was started as a command of this package. In a notebook or a script it
changes nothing: Ctrl-C raises KeyboardInterrupt. A signal that is ignored stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

CODE = 130  # 128 + the number of the signal, as in shells
_MODULES = ("tokprune.cli", "tokprune.eval")


def is_command() -> bool:
    """Whether this process runs the console script or `python -m` with one of our commands."""
    first = sys.argv[0] if getattr(sys, "argv", None) else ""
    if first == "-m":  # until Python has found the module
        typed = sys.orig_argv
        return "-m" in typed[:-1] and typed[typed.index("-m") + 1] in _MODULES
    return os.path.basename(first) in ("tokprune", "tokprune.exe", "tokprune-script.py")


def end_at_once(*ignored: Any) -> None:
    """Handle the signal. Nothing needs cleaning up yet, and libraries may swallow an exception."""
    os._exit(CODE)


def begin() -> None:
    """From now on Ctrl-C ends the process, unless the signal already has another handler."""
    if threading.current_thread() is threading.main_thread() and _handler() is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if _handler() is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handler() -> Any:
    return signal.getsignal(signal.SIGINT)


if is_command():
    begin()
