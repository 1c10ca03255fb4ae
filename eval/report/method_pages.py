"""A section a method, from its docstring, for docs/methods.md."""

from __future__ import annotations

import inspect
import re

from tokprune.methods import METHODS

FIELD = re.compile(r"^(Source|Faithful|Differs|Needs|Args):[ \t]*", re.MULTILINE)
SAYS_NOTHING = ("a control; no paper.", "nothing to be faithful to.", "nothing known.")


def escaped(text: str) -> str:
    """Markdown that shows a docstring as it is written; code stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\_*<|])", r"\\\1", part) for part in parts)


def joined(text: str) -> str:
    """One line a paragraph."""
    return escaped(" ".join(text.split()))


def options(args: str) -> list[str]:
    """A list item for each option of a docstring's Args."""
    entries = re.split(r"^(?=\w[\w, ]*: )", inspect.cleandoc(args), flags=re.MULTILINE)
    split = (entry.partition(": ") for entry in entries if entry.strip())
    return [f"    - `{name.replace(', ', '`, `')}`: {joined(meaning)}" for name, _, meaning in split]


def section(name: str) -> str:
    """What a method keeps, its source, what it needs and costs, and its options."""
    if name in METHODS.aliases:
        return f"### {name}\n\nAlias of `{METHODS.aliases[name]}`.\n"
    idea, *found = FIELD.split(inspect.getdoc(METHODS.load(name)) or "")
    fields = dict(zip(found[::2], found[1::2], strict=True))
    needs, _, cost = fields.get("Needs", "").partition("Cost:")
    shown = {
        "Source": fields.get("Source", ""),
        "Faithful": fields.get("Faithful", ""),
        "Differs": fields.get("Differs", ""),
        "Needs": needs,
        "Cost": cost,
    }
    lines = [
        f"- **{title}**: {joined(text)}"
        for title, text in shown.items()
        if text.strip() and " ".join(text.split()).lower() not in SAYS_NOTHING
    ]
    if "Args" in fields:
        lines += ["- **Options**:", *options(fields["Args"])]
    paragraphs = [joined(paragraph) for paragraph in idea.strip().split("\n\n")]
    return "\n\n".join((f"### {name}", *paragraphs, "\n".join(lines))) + "\n"


def sections() -> str:
    """All methods, by name."""
    return "\n".join(map(section, METHODS.own_names()))
