"""Methods and tasks of other packages: found by their entry points, and told of in one line where they are broken."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from commands import jsonl, refusal, tokprune_cli
from plugins import write_package
from tokprune.eval.tasks import TASKS, load_task

import tokprune
from tokprune.core.errors import PluginError, UnknownNameError
from tokprune.core.registry import Registry
from tokprune.methods import METHODS
from tokprune.methods.base import Method

BROKEN = {
    "no such module": ("my_packag:Norm", "my_packag"),
    "no such class": ("norms:Normm", "Normm"),
    "no class": ("norms", "subclass of tokprune.methods.base.Method"),
    "another class": ("pathlib:Path", "subclass of tokprune.methods.base.Method"),
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package for the length of a test."""

    def install(entry_points, code="", group="methods"):
        write_package(tmp_path, entry_points, code, group)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("norms", None)


@pytest.mark.parametrize(("place", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_entry_point_is_one_line_that_names_it(place, said, installed):
    installed({"norm": place})
    with pytest.raises(PluginError, match=f"method 'norm' .*norms.*{said}.*correct the entry point or uninstall"):
        tokprune.get_method("norm")
    assert f"method 'norm' ({place}" in refusal(tokprune_cli("explain", "docs/scene.png", "--method", "norm"))
    assert f"method 'norm' ({place}" in refusal(tokprune_cli("compare", "--methods", "norm"))


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemError('no')", "import nowhere"])
def test_listings_mark_a_package_that_fails_when_imported(code, installed):
    installed({"norm": "norms:Norm"}, code)
    for command in ("methods", "models"):
        done = tokprune_cli(command)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    listed = tokprune_cli("methods").stdout
    assert all(name in listed for name in [*METHODS.own_names(), "norm"])
    assert "cannot be" in listed
    assert {p.method for p in tokprune.list_support()} == set(METHODS.own_names())


def test_a_class_that_cannot_be_built_is_marked_too(installed):
    code = "from tokprune.methods.base import Method\nclass Norm(Method):\n    def __init__(self):\n        1 / 0\n"
    installed({"norm": "norms:Norm"}, code)
    assert "ZeroDivisionError" in METHODS.fault("norm")
    assert tokprune_cli("methods").returncode == 0
    assert "norm" not in METHODS.working()


def test_doctor_marks_a_broken_package_and_goes_on(installed):
    installed({"another": "norms:Norm", "norm": "my_packag:Norm"})
    done = tokprune_cli("doctor")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert "method 'norm' (my_packag:Norm" in line
    assert "ok     another prunes" in done.stdout
    assert "ok     detaching restores the model" in done.stdout
    assert done.returncode == 1


def test_the_list_of_methods_has_source_and_first_line_of_a_package(installed):
    installed({"norm": "norms:Norm", "norm_bare": "norms:Bare"})
    lines = tokprune_cli("methods").stdout.splitlines()
    norm, bare, random = (next(x for x in lines if x.split()[:1] == [name]) for name in ("norm", "norm_bare", "random"))
    assert "Keep long features." in norm
    assert norm.split()[-1] == "arXiv:0000.00000"
    assert "(no docstring)" in bare
    assert bare.split()[-1] == "-"
    assert "control" in random


def test_an_entry_point_with_the_name_of_a_method_is_warned_about_once(installed):
    installed({"uniform": "norms:Norm"})
    methods = Registry("method", METHODS.table, METHODS.aliases, METHODS.group, base=Method)
    with pytest.warns(UserWarning, match="'uniform' of norms .* is ignored.*rename the entry point"):
        assert methods.load("uniform").__name__ == "Uniform"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert methods.load("uniform").__name__ == "Uniform"
        methods.names()


# ---- tasks

TASK = """
from PIL import Image
from tokprune.eval.tasks import Sample

class Colours:
    name = "colours"

    def samples(self):
        return [Sample(name, name, "what color is the circle?", name) for name in ("red", "green", "blue")]

    def image(self, image_id):
        return Image.new("RGB", (96, 96), image_id)

    def train_samples(self):
        return None

class Other(Colours):
    def __init__(self):
        raise OSError("no such disk")
"""


def test_a_task_of_a_package_is_compared_by_its_name(installed, tmp_path):
    installed({"colours": "norms:Colours"}, TASK, "tasks")
    done = tokprune_cli("compare", "--task", "colours", "--methods", "none", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = jsonl(tmp_path / "out" / "rows.jsonl")
    assert {r["task"] for r in rows} == {"colours"}
    assert {s["sample"] for s in jsonl(tmp_path / "out" / "samples.jsonl")} == {"red", "green", "blue"}
    with pytest.raises(UnknownNameError, match="Did you mean 'colours'.*colours, easyvqa, findit"):
        load_task("colors")


@pytest.mark.parametrize(
    ("name", "place", "use"),
    [
        ("mine", "my_packag:Task", "my_packag.*correct the entry point"),
        ("mine", "norms:Colours", "name = 'mine'"),
        ("mine", "norms:Other", "no such disk"),
        ("mine", "pathlib:Path", "has no samples, image, train_samples; write what tokprune.eval.tasks.base.Task"),
    ],
)
def test_a_broken_task_is_one_line(name, place, use, installed, tmp_path):
    installed({name: place}, TASK, "tasks")
    with pytest.raises(PluginError, match=f"task '{name}' .*{use}"):
        load_task(name)
    assert f"task '{name}'" in refusal(tokprune_cli("compare", "--task", name, "--out", str(tmp_path / "out")))


def test_a_task_named_like_an_embedded_one_is_warned_about(installed, monkeypatch):
    installed({"findit": "norms:Colours"}, TASK, "tasks")
    monkeypatch.setattr(TASKS, "_hidden", set())
    monkeypatch.setattr(TASKS, "_looked", False)
    with pytest.warns(UserWarning, match="task 'findit' of norms"):
        assert type(load_task("findit")).__name__ == "FindIt"


# ---- model families

FAMILY = """
from tokprune.integrations.transformers.families.llava import Llava

class Mine(Llava):
    model_type = "mine"
"""


def test_a_family_of_a_package_is_listed_with_what_runs(installed):
    installed({"mine": "norms:Mine", "broken": "norms:Nothing", "llava": "norms:Mine"}, FAMILY, "families")
    with pytest.warns(UserWarning, match="'llava' of norms .* is ignored"):
        assert "mine" in tokprune.list_models()
    pairs = {(p.method, p.tower): p.works for p in tokprune.list_support() if p.model == "mine"}
    assert pairs["divprune", "SigLIP"]
    assert not pairs["vtc_cls", "SigLIP"]
    assert not [p for p in tokprune.list_support() if p.model == "broken"]
    assert "vtc_cls" in tokprune_cli("models", "mine").stdout


def test_a_broken_family_is_one_line_where_its_model_is_attached_to(installed):
    installed({"mine": "norms:Nothing", "other": "pathlib:Path"}, FAMILY, "families")
    for name, said in (("mine", "cannot be imported"), ("other", "is not a subclass of .*ModelFamily")):
        model = torch.nn.Module()
        model.config = SimpleNamespace(model_type=name)
        with pytest.raises(PluginError, match=f"model family '{name}' .*{said}"):
            tokprune.attach(model, "divprune", keep_ratio=0.5)
