"""A section a method, from its docstring, for docs/methods.md."""

from __future__ import annotations

import re

from tokprune.methods import METHODS
from tokprune.methods.described import options_of, parts_of

SAYS_NOTHING = ("a control; no paper.", "nothing to be faithful to.", "nothing known.")


def escaped(text: str) -> str:
    """Markdown that shows a docstring as it is written; code stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\_*<|])", r"\\\1", part) for part in parts)


def joined(text: str) -> str:
    """One line a paragraph."""
    return escaped(" ".join(text.split()))


def section(name: str) -> str:
    """What a method keeps, its source, what it needs and costs, and its options."""
    if name in METHODS.aliases:
        return f"### {name}\n\nAlias of `{METHODS.aliases[name]}`.\n"
    parts = parts_of(METHODS.load(name))
    shown = {title: parts.get(title, "") for title in ("Source", "Faithful", "Differs", "Needs", "Cost")}
    lines = [
        f"- **{title}**: {joined(text)}"
        for title, text in shown.items()
        if text.strip() and " ".join(text.split()).lower() not in SAYS_NOTHING
    ]
    options = options_of(parts.get("Args", ""))
    lines += ["- **Options**:"] * bool(options)
    lines += [f"    - `{'`, `'.join(names)}`: {escaped(meaning)}" for names, meaning in options]
    paragraphs = [joined(paragraph) for paragraph in parts.get("", "").split("\n\n")]
    return "\n\n".join((f"### {name}", *paragraphs, "\n".join(lines))) + "\n"


def sections() -> str:
    """All methods, by name."""
    return "\n".join(map(section, METHODS.own_names()))
