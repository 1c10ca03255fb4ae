"""A method or a task of one's own, by its file or module, in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import jsonl, refusal, tokprune_cli
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import load_task

import tokprune
from tokprune.core.errors import PluginError, SavedError, UnknownNameError
from tokprune.methods import METHODS

METHOD = '''
from dataclasses import dataclass
from tokprune.methods.base import ScoreMethod

@dataclass(frozen=True)
class Norm(ScoreMethod):
    """Keep long rows.

    Source:   none, an example.
    """

    power: float = 2.0

    def score(self, tokens):
        return tokens.features.float().norm(p=self.power, dim=-1)

NOTHING = 1
class Other: pass
'''
TASK = """
from PIL import Image
from tokprune.eval.tasks import Sample

class Colours:
    name = "colours"
    def samples(self):
        return [Sample(c, image_id=c, question="what color is the circle?", answer=c) for c in ("red", "green")]
    def image(self, image_id):
        return Image.new("RGB", (96, 96), image_id)
    def train_samples(self):
        return None
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "norm.py").write_text(METHOD)
    (tmp_path / "colours.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = {
    "compare": ["--methods", "none,./norm.py:Norm:power=1", "--task", "./colours.py:Colours", "--keep", "0.5"],
    "explain": ["PICTURE", "--method", "./norm.py:Norm"],
    "flops": ["--model", "llava-1.5-7b", "--method", "./norm.py:Norm"],
    "bench": [
        "--model",
        "tiny-llava",
        "--methods",
        "./norm.py:Norm",
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--new-tokens",
        "1",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_class_of_a_file(command, place):
    picture = Path(__file__).parents[2] / "docs" / "scene.png"
    done = tokprune_cli(command, *(str(picture) if word == "PICTURE" else word for word in COMMANDS[command]))
    assert done.returncode == 0, done.stderr


def test_compare_keeps_what_was_typed_and_notices_a_change(place):
    run = ["compare", *COMMANDS["compare"], "--out", "run"]
    assert tokprune_cli(*run).returncode == 0
    row = next(r for r in jsonl(place / "run" / "rows.jsonl") if r["method"] == "./norm.py:Norm:power=1")
    assert (row["task"], row["params"]) == ("colours", {"power": 1.0})
    assert tokprune_cli(*run).returncode == 0
    (place / "norm.py").write_text(METHOD.replace("return tokens", "return -tokens"))
    assert "code" in refusal(tokprune_cli(*run))


def test_options_go_by_the_class(place):
    assert METHODS.build("./norm.py:Norm:power=1").power == 1.0
    assert METHODS.parts("./norm.py:Norm:power=1") == ["./norm.py:Norm", "power=1"]
    assert METHODS.parts("vtc_cls:start_layer=1") == ["vtc_cls", "start_layer=1"]


def test_modules_are_found_as_python_finds_them(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    assert METHODS.build("norm:Norm").power == 2.0
    assert load_task("colours:Colours").name == "colours"


def test_a_changed_file_is_another_class(place):
    before = METHODS.load("./norm.py:Norm")
    assert METHODS.load("./norm.py:Norm") is before
    (place / "norm.py").write_text(METHOD.replace("2.0", "3.0"))
    assert METHODS.build("./norm.py:Norm").power == 3.0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("./norm.py:Nrom", "it has: Norm, Other"),
        ("./norm.py:NOTHING", "is not a subclass of"),
        ("./norm.py:Other", "is not a subclass of"),
        ("./gone.py:Norm", "cannot be imported: FileNotFoundError"),
        ("absent:Norm", "use ./absent.py"),
        ("./broken.py:Norm", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_used_is_one_error(spec, said, place):
    (place / "broken.py").write_text("1 / 0\n")
    (place / "absent.py").write_text(METHOD)
    with pytest.raises(PluginError, match=said):
        METHODS.build(spec)


def test_a_file_without_its_class_says_how_to_name_it(place):
    with pytest.raises(UnknownNameError, match=r"use \./norm\.py:CLASS"):
        METHODS.build("./norm.py")


def test_a_saved_folder_never_runs_a_file(place):
    """Whoever wrote the folder would choose the code."""
    model = Runner.load("tiny-llava").model
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        attachment.save(place / "saved")
    path = place / "saved" / "tokprune.json"
    values = json.loads(path.read_text())
    (place / "evil.py").write_text("open('marker', 'w').close()\nclass Norm: pass\n")
    values["methods"][0]["name"] = "./evil.py:Norm"
    path.write_text(json.dumps(values))
    with pytest.raises(SavedError, match="only names of"):
        tokprune.load(model, place / "saved")
    assert not (place / "marker").exists()
    with tokprune.attach(model, "./norm.py:Norm", keep_ratio=0.5) as attachment:
        with pytest.raises(SavedError):
            attachment.save(place / "own")


@torch.no_grad()
def test_it_prunes_as_a_method_object_does(place):
    runner = Runner.load("tiny-llava")
    task = load_task("findit")
    sample = task.samples()[0]
    inputs = runner.prepare(task, [sample], [sample.image_id])
    kept = []
    for method in ("./norm.py:Norm", METHODS.load("./norm.py:Norm")()):
        with tokprune.attach(runner.model, method, keep_ratio=0.25) as attachment:
            runner.model(**inputs)
            kept.append(attachment.kept[0])
    assert torch.equal(*kept)
