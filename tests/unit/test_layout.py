"""The package: which room imports which, what is in the wheel, and what importing it does."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from house import FOLDERS, ROOMS, ROOT, imports, modules, room, tree

import tokprune

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

HOST = "tokprune.integrations.transformers"
TRAINING = ROOT / "eval" / "models" / "training"  # how the embedded models were made; not in the wheel


def upward(name: str, path) -> set[str]:
    """Modules that a module imports although their room is above its own."""
    mine = ROOMS.index(room(name))
    return {other for other in imports(name, path) if ROOMS.index(room(other)) > mine}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    found = upward(name, modules()[name])
    # The front door imports the host inside of its functions, and nothing else above it.
    assert not found, f"{name} imports {found}"


def test_an_import_upward_is_seen(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from ..prune.select import Selector\n")
    assert upward("tokprune.methods.bad", path) == {"tokprune.prune.select"}


@pytest.mark.parametrize("name", sorted(n for n in modules() if ROOMS.index(room(n)) > ROOMS.index("tokprune")))
def test_outside_of_the_library_only_the_door_of_a_host_is_used(name):
    assert not {other for other in imports(name, modules()[name]) if other.startswith(f"{HOST}.")}


def test_packages_are_what_is_on_disk():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {n for n, path in modules().items() if path.name == "__init__.py" and TRAINING not in path.parents}
    assert listed == on_disk
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} of {package} has no __init__.py"
    for mapped in ("eval", "integrations"):
        assert not (ROOT / "tokprune" / mapped).exists()  # it would shadow the mapped folder


def test_front_door_is_small_and_every_name_is_there():
    assert len(tokprune.__all__) <= 12
    assert all(getattr(tokprune, name).__doc__ for name in tokprune.__all__)


def run(code: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.slow
def test_import_patches_nothing_and_loads_no_method():
    code = """
import sys, warnings, logging, torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
before = dict(ALL_ATTENTION_FUNCTIONS), list(warnings.filters), logging.getLogger().level
import tokprune
assert (dict(ALL_ATTENTION_FUNCTIONS), list(warnings.filters), logging.getLogger().level) == before
loaded = {m for m in sys.modules if m.startswith("tokprune.")}
assert not [m for m in loaded if m.startswith(("tokprune.eval", "tokprune.integrations", "tokprune.cli"))], loaded
shared = {"tokprune.methods." + name for name in ("base", "compose", "crops", "decoder")}
assert {m for m in loaded if m.startswith("tokprune.methods.")} == shared, loaded
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("missing", [("typer", "rich"), ("rich",), ()])
def test_only_the_command_line_needs_its_extra(missing):
    code = f"""
import sys
sys.modules |= dict.fromkeys({missing}, None)  # as if they were not installed
import tokprune
assert tokprune.list_support() and tokprune.get_method("vtc_cls")
assert not [name for name in sys.modules if name.split(".")[0] in ("typer", "rich") and sys.modules[name]]
sys.argv = ["tokprune", "--help"]
from tokprune.cli import main
main()
"""
    done = run(code)
    if not missing:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert " and ".join(missing) in line
    assert "pip install 'tokprune[cli]'" in line


def test_eval_and_dev_bring_the_command_line():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {part.partition(">")[0] for part in extras["cli"]} == {"typer", "rich"}
    assert "tokprune[cli]" in extras["eval"]
    assert "tokprune[eval]" in extras["dev"]


@pytest.mark.parametrize("folder", ["eval", "integrations"])
def test_bare_import_of_a_mapped_folder_says_what_to_type(folder):
    done = run(f"import {folder}", cwd=ROOT)
    assert f"import tokprune.{folder}, not {folder}" in done.stderr


def test_base_install_never_names_torchvision_or_flash_attn():
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("torchvision", "flash_attn")], name
