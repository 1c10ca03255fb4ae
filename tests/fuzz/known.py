"""Faults that are being mended: cases that fail for one of them are passed over. To go with the last of them."""

from __future__ import annotations

import re

from fuzz.cases import Case


def known(case: Case, message: str) -> str | None:
    """Which known fault a failure is, or None."""
    how, several = case.how or {}, len(case.rows) > 1
    faults = [
        ("compiled after attach", case.around == "compiled", ""),
        ("modules replaced after attach", case.around == "replaced", ""),
        ("nested calls", case.around == "nested", ""),
        ("report from another thread", case.around == "thread", "the thread's call"),
        ("features merged by hand", case.way == "merged", "kept is of 0"),
        ("logits_to_keep and an empty cache", how.get("cache") == "empty" and how.get("logits") in (3, "all"), ""),
        ("eager in double", case.attn == "eager" and case.dtype == "float64" and several, "nan|not finite"),
        ("dart in a padded batch", "dart" in case.method and several, "alone"),
        ("second turn with all ids", bool(how.get("all_ids")), "do not match|refused"),
        ("F1 equal rows with a cache", len(set(case.rows)) < len(case.rows), "kept is of"),
        ("F2 a chunk of padding", how.get("mode") == "chunked", "keep at least one"),
        ("F3 salts of pictures and videos", "v" in str(case.rows), "salts for"),
        ("F4 chunks and cuts on InternVL", how.get("mode") == "chunked", "no picture was encoded"),
        ("F5 pictures that were never used", case.around == "abandoned", "kept is of|rows were encoded"),
        ("F6 text of a second turn", "cdpruner" in case.method and case.way == "turns", "alone"),
    ]
    return next((name for name, holds, said in faults if holds and re.search(said, message)), None)
