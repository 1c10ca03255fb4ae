"""The help of every command as Markdown: `python -m tokprune.cli.reference` writes it into docs/cli.md."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from .commands import app

PAGE = Path("docs/cli.md")
BLOCK = re.compile(r"(<!-- commands -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> str:
    """A heading and the help of every command."""
    parts = []
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        with command.make_context(f"tokprune {name}", [], resilient_parsing=True, terminal_width=100) as context:
            parts.append(f"### tokprune {name}\n\n```text\n{command.get_help(context).strip()}\n```\n")
    return "\n".join(parts)


def rendered(text: str) -> str:
    """A page with its block of commands filled in."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{commands()}\n{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
