"""One process at an output: who comes second is refused, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tokprune.core.errors import RunError
from tokprune.core.files import is_special


def hold(lock: FileLock, output: Path) -> None:
    """Take a lock, which the caller releases.

    Raises:
        RunError: another process has it; `output` is what that one writes to.
        OSError: its file cannot be written.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another process writes to {output}; name another file or folder with --out") from error


@contextlib.contextmanager
def alone_at(output: Path) -> Iterator[None]:
    """Be the only process that writes to a file; its folder is made, and a device has no lock.

    Raises:
        RunError: another process writes to it, or the lock beside it cannot be written.
    """
    if is_special(output):
        yield
        return
    lock = FileLock(_beside(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        hold(lock, output)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror or error}; name another with --out") from error
    try:
        yield
    finally:
        lock.release()


def refuse_busy(output: Path) -> None:
    """Raise RunError where another process writes to a file now; nothing is written for that."""
    if _beside(output).exists():
        with alone_at(output):
            pass


def _beside(output: Path) -> Path:
    return Path(f"{output}.lock")
