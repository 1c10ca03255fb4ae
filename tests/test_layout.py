"""The house: who may know whom, what is packaged, and what importing does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokprune

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "tokprune": ROOT / "tokprune",
    "tokprune.integrations": ROOT / "integrations",
    "tokprune.eval": ROOT / "eval",
}
GROUND = {"types", "errors", "ops", "attention", "budget", "registry", "report", "explain", "flops", "shapes"}
GROUND |= {
    "call",
    "compat",
    "files",
    "hooks",
    "passes",
    "pauses",
    "schedule",
    "gates",
    "spans",
    "pictures",
    "interrupts",
}
CLI_NAMES = ("arguments", "cli", "counting", "doctor", "eval.__main__", "experiments", "loading", "terminal")
CLI = tuple(f"tokprune.{name}" for name in CLI_NAMES)


def modules() -> dict[str, Path]:
    """Every module of the house by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Modules of the house that a module names in its imports, wherever in the file."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            names |= {target, *(f"{target}.{a.name}" for a in node.names)}
    known = modules()
    return {n for n in names if n in known} - {name}


def room(name: str) -> str:
    parts = name.split(".")
    if name in CLI:
        return "tokprune.cli"
    if name in ("tokprune.between", "tokprune.chooser", "tokprune.columns", "tokprune.turns"):
        return "tokprune.compaction"
    if name == "tokprune.observer":
        return "tokprune.attachment"
    if name in ("tokprune.plan", "tokprune.seen"):
        return "tokprune.cuts"
    if name == "tokprune.saving":
        return "tokprune.saved"
    if name in ("tokprune", "tokprune.attachment", "tokprune.compaction", "tokprune.compatibility"):
        return name
    if parts[1] in GROUND:
        return "ground"
    if parts[1] == "integrations":
        return ".".join(parts[:3])
    return ".".join(parts[:2])


PUBLIC = {"tokprune", "ground"}
MAY_KNOW = {
    "ground": {"ground"},
    "tokprune.methods": {"ground", "tokprune.methods"},
    "tokprune.integrations": set(),
    "tokprune.integrations.lmms_eval": {"tokprune", "ground", "tokprune.integrations.lmms_eval"},
    "tokprune.integrations.transformers": {"ground", "tokprune.integrations.transformers"},
    "tokprune.compaction": {"ground", "tokprune.compaction"},
    "tokprune.compatibility": {
        "ground",
        "tokprune.methods",
        "tokprune.integrations",
        "tokprune.integrations.transformers",
    },
    "tokprune.prompt": {"ground"},
    "tokprune.stages": {"ground", "tokprune.methods"},
    "tokprune.saved": {"ground", "tokprune.methods", "tokprune.stages", "tokprune.saved"},
    "tokprune.selection": {"ground", "tokprune.methods", "tokprune.compaction", "tokprune.stages"},
    "tokprune.cuts": {
        "ground",
        "tokprune.methods",
        "tokprune.compaction",
        "tokprune.prompt",
        "tokprune.selection",
        "tokprune.stages",
        "tokprune.cuts",
        "tokprune.integrations",
        "tokprune.integrations.transformers",
    },
    "tokprune.attachment": {
        "ground",
        "tokprune.attachment",
        "tokprune.methods",
        "tokprune.compaction",
        "tokprune.compatibility",
        "tokprune.prompt",
        "tokprune.saved",
        "tokprune.selection",
        "tokprune.stages",
        "tokprune.cuts",
        "tokprune.integrations",
        "tokprune.integrations.transformers",
    },
    "tokprune": {
        "ground",
        "tokprune.attachment",
        "tokprune.saved",
        "tokprune.compatibility",
        "tokprune.methods",
        "tokprune.integrations",
        "tokprune.integrations.transformers",
    },
    "tokprune.eval": {"tokprune", "ground", "tokprune.eval"},
    "tokprune.cli": {"tokprune", "ground", "tokprune.eval", "tokprune.cli"},
}
OUTSIDE = ("tokprune.eval", "tokprune.cli", "tokprune.integrations.lmms_eval")  # these use the public API alone
PUBLIC_MODULES = {"compat", "types", "errors", "budget", "flops", "gates", "schedule", "shapes", "spans", "report"}
PUBLIC_MODULES |= {"explain", "files", "interrupts", "pictures"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_knows_only_whom_it_may(name):
    known = imports(name, modules()[name])
    rooms = {room(other) for other in known}
    # `from . import ops` names the package beside the module; that is no arrow to its front door.
    if room(name) not in OUTSIDE:
        rooms -= {"tokprune"}
    rooms -= {"tokprune.eval", "tokprune.integrations"} - MAY_KNOW[room(name)] - {"tokprune.eval"}
    assert rooms <= MAY_KNOW[room(name)], f"{name} imports {known}"


@pytest.mark.parametrize("name", sorted(n for n in modules() if room(n) in OUTSIDE))
def test_eval_cli_and_plug_ins_use_the_public_api(name):
    known = imports(name, modules()[name]) - {"tokprune"}
    outside = {n for n in known if room(n) != room(name) and not n.startswith("tokprune.eval")}
    mine = {n for n in CLI if room(name) == "tokprune.cli"}
    assert {n.split(".")[1] for n in outside - mine} <= PUBLIC_MODULES


def test_a_forbidden_arrow_is_seen(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from ..compaction import Columns\n")
    assert "tokprune.compaction" in imports("tokprune.methods.bad", path)
    assert "tokprune.compaction" not in MAY_KNOW["tokprune.methods"]


def test_packages_are_what_is_on_disk():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert listed == on_disk
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} of {package} has no __init__.py"
    for mapped in ("eval", "integrations"):
        assert not (ROOT / "tokprune" / mapped).exists()  # it would shadow the mapped folder


def test_front_door_is_small_and_every_name_is_there():
    assert len(tokprune.__all__) <= 12
    assert all(getattr(tokprune, name).__doc__ for name in tokprune.__all__)


def test_files_and_functions_are_small():
    for name, path in modules().items():
        source = path.read_text()
        assert len(source.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                doc = len((ast.get_docstring(node) or "").splitlines()) + 2
                assert node.end_lineno - node.lineno - doc <= 50, f"{name}.{node.name}"


def run(code: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)


def test_import_patches_nothing_and_loads_no_method():
    code = """
import sys, warnings, logging, torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
before = dict(ALL_ATTENTION_FUNCTIONS), list(warnings.filters), logging.getLogger().level
import tokprune
assert (dict(ALL_ATTENTION_FUNCTIONS), list(warnings.filters), logging.getLogger().level) == before
loaded = {m for m in sys.modules if m.startswith("tokprune.")}
assert not [m for m in loaded if m.startswith(("tokprune.eval", "tokprune.integrations", "tokprune.cli"))], loaded
shared = {"tokprune.methods." + name for name in ("base", "chain", "decoder", "mosaic")}
assert {m for m in loaded if m.startswith("tokprune.methods.")} == shared, loaded
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["eval", "integrations"])
def test_bare_import_of_a_mapped_folder_says_what_to_type(folder):
    done = run(f"import {folder}", cwd=ROOT)
    assert f"import tokprune.{folder}, not {folder}" in done.stderr


def test_base_install_never_names_torchvision_or_flash_attn():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("torchvision", "flash_attn")], name


def test_every_method_has_a_readme_row():
    readme = (ROOT / "README.md").read_text()
    for name in tokprune.list_methods():
        assert f"| `{name}` |" in readme
    for name in tokprune.list_models():
        assert f"| `{name}`, " in readme
