"""Golden cases of 2026, videos: from a case to the registered method. It decides nothing, as `golden_harness`."""

from __future__ import annotations

from collections.abc import Callable

from golden_harness import Case

VIDEO_CHECKS: dict[str, Callable[[Case], None]] = {}
