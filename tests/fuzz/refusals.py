"""Where an attachment may refuse a call that the bare model takes; anything else that is refused is a fault."""

from __future__ import annotations

import re

from fuzz.cases import Case
from fuzz.methods import needs_whole_prompt, options_of, parts_of


def is_allowed(case: Case, message: str) -> bool:
    """Whether this refusal follows from what is documented."""
    how, before = case.how or {}, parts_of(case.method)[0]
    reasons = [
        ("out of reach", "flops_ratio" in (case.budget or {})),
        ("its minimum here is", bool(before) and options_of(before or "").get("strategy") == "row"),
        ("its minimum here is", "rule" in options_of(before or "")),  # one token a frame
        ("without prefill_chunk_size|needs? it in one pass|prefill_chunk_size", how.get("mode") == "chunked"),
        ("pass the whole prompt at once", how.get("mode") == "chunked" and needs_whole_prompt(case.method, case.kind)),
        ("keep at least one visual token", drops_everything(case)),
        ("", case.around in ("compiled", "replaced")),
        ("", case.way == "merged" and needs_whole_prompt(case.method, case.kind)),
    ]
    return any(holds and re.search(pattern, message) for pattern, holds in reasons)


def drops_everything(case: Case) -> bool:
    """A row without text, of which nothing may be left."""
    return any(not any(isinstance(item, int) for item in row) for row in case.rows)
