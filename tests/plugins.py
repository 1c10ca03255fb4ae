"""Packages of other people, as an installer leaves them: a module and its entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

NORM = '''
from dataclasses import dataclass
from tokprune.methods.base import ScoreMethod

@dataclass(frozen=True)
class Norm(ScoreMethod):
    """Keep long features.

    Source:   arXiv:0000.00000
    """

    power: int = 2

    def score(self, tokens):
        return tokens.features.float().norm(dim=-1) ** self.power

@dataclass(frozen=True)
class Bare(Norm):
    power: int = 3
'''


def write_package(folder: Path, entry_points: Mapping[str, str], code: str = "", group: str = "methods") -> None:
    """A package "norms" with a module of that name, and these entry points."""
    (folder / "norms.py").write_text(code or NORM)
    info = folder / "norms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norms\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {place}" for name, place in entry_points.items())
    (info / "entry_points.txt").write_text(f"[tokprune.{group}]\n{lines}\n")
