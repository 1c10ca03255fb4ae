"""Where an attachment is paused: by thread, by what is started from there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

_DEPTHS: ContextVar[Mapping[int, int]] = ContextVar("tokprune_pauses", default={})  # noqa: B039 - never changed


class Pauses:
    """Blocks in which an attachment is paused.

    A block counts for its thread, for what runs in a copy of its context (asyncio.to_thread), and, in the thread that
    made the attachment, for threads that are started while it is open (a streamer's).
    """

    def __init__(self) -> None:
        self._holder = threading.current_thread()
        self._alive: list[set[threading.Thread]] = []  # threads that were there when the holder's blocks were opened

    @property
    def is_holder(self) -> bool:
        """Whether this is the thread that made the attachment."""
        return threading.current_thread() is self._holder

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Paused inside of this block."""
        self._add(1)
        alive = set(threading.enumerate()) if self.is_holder else None
        if alive is not None:
            self._alive.append(alive)
        try:
            yield
        finally:
            self._add(-1)
            if alive is not None:
                self._alive.remove(alive)

    @property
    def hold_here(self) -> bool:
        """Whether what runs here is paused."""
        if _DEPTHS.get().get(id(self)):
            return True
        if not self._alive:
            return False
        this = threading.current_thread()
        return any(this not in alive for alive in self._alive)

    def _add(self, n: int) -> None:
        depths = dict(_DEPTHS.get())
        depths[id(self)] = depths.get(id(self), 0) + n
        _DEPTHS.set({key: depth for key, depth in depths.items() if depth})
