"""The modules of the package, and which of them each names in its imports."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "tokprune": ROOT / "tokprune",
    "tokprune.integrations": ROOT / "integrations",
    "tokprune.eval": ROOT / "eval",
}
# From the ground up: a room imports those below it, and itself.
ROOMS = [
    "tokprune.core",
    "tokprune.cost",
    "tokprune.methods",
    "tokprune.prune",
    "tokprune.integrations.transformers",
    "tokprune.integrations.vllm",
    "tokprune",  # the front door
    "tokprune.integrations.lmms_eval",
    "tokprune.eval",
    "tokprune.cli",
]


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse(path.read_text())


def imports(name: str, path: Path) -> set[str]:
    """Modules that a module names in its imports, wherever in the file they stand."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            names |= {target, *(f"{target}.{a.name}" for a in node.names)}
    return {n for n in names if n in modules()} - {name}


def room(name: str) -> str:
    """The room of a module."""
    if name in ("tokprune.__main__", "tokprune.eval.__main__"):
        return "tokprune.cli"  # starts the command line
    parts = name.split(".")
    return next((".".join(parts[:n]) for n in (3, 2) if ".".join(parts[:n]) in ROOMS), "tokprune")
