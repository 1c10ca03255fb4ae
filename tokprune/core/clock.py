"""Timing of the library's own work: named parts of a pass that a listener can time.

    with listen() as parts:
        model.generate(**inputs, max_new_tokens=1)
    print(parts.seconds)  # {"signals": 0.004, "select": 0.002, "shorten": 0.001}

Without a listener a part costs less than a microsecond, a fifteenth of `torch.profiler.record_function`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

# What selecting tokens consists of, in the order in which it happens.
PARTS = {
    "signals": "scores read off the vision tower's queries and keys",
    "select": "signals packed like the picture, tokens scored, selected and merged, dropped ones marked",
    "shorten": "dropped columns removed before the language model, and put back after it",
    "cut": "tokens scored, selected and gathered between decoder layers",
}


class Parts:
    """Seconds by part; time in a nested part counts for that part alone, so all parts add up.

    Args:
        now: the clock in seconds; on a GPU it waits for the device first.

    Attributes:
        seconds: by name.
        counts: how often a part ran.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.seconds, self.counts = now, Counter[str](), Counter[str]()
        self._open: list[str] = []
        self._since = 0.0

    def begin(self, name: str) -> None:
        self._charge()
        self._open.append(name)
        self.counts[name] += 1

    def end(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        """Add the time since the last change to the innermost open part."""
        at = self.now()
        if self._open:
            self.seconds[self._open[-1]] += at - self._since  # type: ignore[assignment]
        self._since = at


class _Listening(threading.local):
    parts: Parts | None = None


_LOCAL = _Listening()


@contextlib.contextmanager
def listen(now: Callable[[], float] = time.perf_counter) -> Iterator[Parts]:
    """Time the parts that run in this thread inside a `with` block; only the innermost listener counts them."""
    before, _LOCAL.parts = _LOCAL.parts, Parts(now)
    try:
        yield _LOCAL.parts
    finally:
        _LOCAL.parts = before


class span(contextlib.ContextDecorator):
    """A part of a pass, as a `with` block or a decorator.

    Args:
        name: of the part.
    """

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        if _LOCAL.parts is not None:
            _LOCAL.parts.begin(self.name)

    def __exit__(self, *exception) -> None:
        if _LOCAL.parts is not None:
            _LOCAL.parts.end()
