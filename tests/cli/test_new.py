"""`tokprune new` writes what passes as it is, and replaces nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import refusal, tokprune_cli


@pytest.mark.parametrize(("kind", "name"), [("method", "longest"), ("task", "my_colours"), ("family", "my_llava")])
def test_what_is_written_passes_its_test(kind, name, tmp_path):
    done = tokprune_cli("new", kind, name, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.py", f"test_{name}.py"]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{name}.py"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model", "mine"], "use method, task or family"),
        (["family", "llava"], "a model family 'llava' already"),
        (["method", "9lives"], "small letters"),
        (["method", "class"], "small letters"),
        (["task", "Mine"], "small letters"),
    ],
)
def test_what_cannot_be_written_is_one_line(given, said, tmp_path):
    assert said in refusal(tokprune_cli("new", *given, "--folder", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced(tmp_path):
    (tmp_path / "test_mine.py").write_text("kept")
    assert "is there already" in refusal(tokprune_cli("new", "method", "mine", "--folder", str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["test_mine.py"]
    assert "cannot write" in refusal(tokprune_cli("new", "method", "mine", "--folder", "/proc/nowhere"))
