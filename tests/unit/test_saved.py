"""Saving an attachment and loading it: the same comes back, and nothing else is ever taken for it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import sys
import textwrap
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import specs
import tiny
import torch
from tokprune.eval.run.runner import EMBEDDED_MODEL, Runner
from tokprune.eval.tasks.findit import FindIt
from tokprune.integrations.transformers import family_of

import tokprune
from tokprune.core.errors import AlreadyAttachedError, BudgetError, OptionError, SavedError, UnsupportedModelError
from tokprune.core.schedules import Cosine, Explicit, Pyramid, Schedule, ScheduleFile, Sigmoid, Single, write_schedule
from tokprune.core.signals import Decoder
from tokprune.methods import METHODS, build_method
from tokprune.methods.base import RankMethod
from tokprune.methods.compose import Chain
from tokprune.methods.damro_filter import DAMROFilter
from tokprune.methods.fastv import FastV
from tokprune.methods.fopru import FoPru
from tokprune.methods.gates import Gates, write_gates
from tokprune.methods.sink_filter import SinkFilter
from tokprune.methods.vtc_cls import VTCCLS
from tokprune.prune import saved
from tokprune.prune.request import request_of

PAIRS = ["vtc_cls+fastv", "damro_filter+fopru:form=logits+sink_filter:dims=1/7+dart:pivots=2", "uniform+visual_exit"]
EXITS = ["visual_exit:layer=3", "visual_exit:threshold=0.2:patience=1"]
AFTER_THE_TOWER = [s for s in specs.SPECS if s not in specs.BEFORE_THE_TOWER]
EVERY = [*AFTER_THE_TOWER, *specs.CUTTING, *EXITS, *PAIRS]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.load(str(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def inputs(runner):
    pictures = [[FindIt().image(f"test-{i}")] for i in (3, 5)]
    text = [runner.prompt(q) for q in ("what color is the circle?", "how many?")]
    return runner.processor(images=pictures, text=text, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def decoder(runner) -> Decoder:
    with tokprune.attach(runner.model, "uniform", keep_ratio=1) as attachment:
        return attachment._family.decoder


def answer(model, inputs):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)


def same(a, b) -> bool:
    """Of what attachments kept."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b))


def round_trip(model, inputs, directory, method, **more):
    """Attach, answer, save; then load, answer, save again."""
    with tokprune.attach(model, method, **more) as first:
        tokens, kept, report = answer(model, inputs), first.kept, first.report.to_dict()
        first.save(directory)
    with tokprune.load(model, directory) as again:
        assert torch.equal(answer(model, inputs), tokens)
        assert same(again.kept, kept)
        assert {**again.report.to_dict(), "method": first.label} == report
        assert again.budget == first.budget
        assert (again.positions, again.newlines) == (first.positions, first.newlines)
        text = (directory / "tokprune.json").read_text()
        again.save(directory)
    assert (directory / "tokprune.json").read_text() == text
    return first, again


def hooks(model) -> tuple:
    """What attaching leaves on a model."""
    names = [n for n in vars(model.model) if n.startswith("get_")]
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return tuple(names), sum(modules)


# ---- what comes back


@pytest.mark.parametrize("spec", EVERY)
def test_what_is_loaded_prunes_and_answers_as_what_was_saved(spec, runner, inputs, tmp_path):
    spec = specs.scaled(spec)
    budget = {"keep_ratio": 0.3} if specs.build(spec).takes_budget else {}
    first, again = round_trip(runner.model, inputs, tmp_path / "a", spec, **budget)
    assert again.label == first.label == spec
    assert again.method == first.method
    assert os.listdir(tmp_path / "a") == ["tokprune.json"]


def test_every_registered_method_is_in_the_law():
    named = {part.split(":")[0] for spec in EVERY for part in spec.split("+")} - {"schedule", "dyvte"}
    of_qwen = {spec.split(":")[0] for spec in specs.BEFORE_THE_TOWER}  # in tests/contract/test_pixelprune.py
    assert named == set(METHODS.own_names()) - {"schedule", "dyvte"} - of_qwen


def others(cls, option) -> list:
    """Values of an option that are not its default, by its declared type and limits."""
    declared, default = typing.get_type_hints(cls)[option.name], option.default
    kinds = typing.get_args(declared) if not isinstance(declared, type) else (declared,)
    if typing.get_origin(declared) is typing.Literal:
        return [v for v in kinds if v != default]
    if Schedule in kinds:
        return [Single(-2), Pyramid((1, 3)), Cosine(0.3, 0.9), Sigmoid(0.1 + 0.2, 2.5), Explicit.of({2: 72, -1: 3})]
    least, most = cls.limits.get(option.name, (0, 3))
    if int in kinds:
        return [n for n in (2, 3, -2) if least <= n <= most and n != default] or [3]
    if float in kinds:
        return [least + (most - least) / 3]
    return {bool: [not default], str: ["1/7"]}[declared]


BESIDE = {("globalcom2", "ratio"): {"faithful": True}}
REFUSED_BY_METHOD = {("dart", "uniform"), ("schedule", "schedule"), ("schedule", "uniform")}
OPTIONS = [
    (name, option.name, value)
    for name in METHODS.table
    for option in fields(METHODS.load(name))
    if option.name != METHODS.load(name).needs_file and (name, option.name) not in REFUSED_BY_METHOD
    for value in others(METHODS.load(name), option)
]


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_every_option_of_every_method_comes_back(name, option, value, tmp_path):
    cls = METHODS.load(name)
    method = cls(**{option: value, **BESIDE.get((name, option), {})})
    assert getattr(method, option) != getattr(cls(), option)
    entry = json.loads(json.dumps({"name": saved._name_of(method), "options": saved._options_of(method)}))
    assert entry["options"].keys() == {f.name for f in fields(method)}  # so that a default may change
    again = saved._part_of(entry, tmp_path)
    assert again == method
    assert type(getattr(again, option)) is type(value)


def test_texts_of_schedules_are_read_as_they_were():
    draw = random.Random(0)
    found = [Single(), Single(-3), Pyramid(), Pyramid((8, -2)), Cosine(), Sigmoid(), Explicit.of({-1: 0, 2: 288, 8: 3})]
    for _ in range(200):
        ratios = sorted((draw.random() ** 9 for _ in range(3)), reverse=True)
        found += [
            Cosine(draw.random(), draw.random() or 1),
            Sigmoid(draw.random() * 10 ** draw.randint(-9, 9) or 1, draw.uniform(-40, 40)),
            Explicit.of(dict(zip((1, 4, 9), ratios, strict=True))),
        ]
    assert [Schedule.parse(s.text) for s in found] == found
    assert Schedule().text == ""


LLM = dict(flops_scope="llm", flops_text=64)
MORE = {
    "a count": ("fopru", dict(keep_tokens=17)),
    "FLOPs": ("vtc_cls", dict(flops_ratio=0.6, flops_scope="prefill", flops_text=9)),
    "two counts": ("vtc_cls+fastv", dict(keep_tokens=[72, 36])),
    "a ratio for both": ("vtc_cls+pyramiddrop", dict(keep_ratio=0.1)),
    "a budget for the first alone": ("vtc_cls+visual_exit:layer=2", dict(keep_ratio=0.2)),
    "a budget for the last alone": ("prumerge+fastv", dict(keep_ratio=0.2)),
    "options as keywords": ("fastv", dict(schedule={2: 72, 4: 20}, uniform=0.5)),
    "fractions by layer": ("dart", dict(schedule=Explicit.of({-6: 0.5, -2: 0.0}))),
    "an object": (FoPru(strategy="row", form="logits"), dict(keep_ratio=1 / 3)),
    "a list of objects and names": ([DAMROFilter(n_outliers=3), "vtc_cls", FastV(layer=3)], dict(keep_ratio=0.2)),
    "a chain": (Chain((DAMROFilter(),), VTCCLS(start_layer=1)), dict(keep_ratio=0.2)),
    "an alias": ("fastervlm", dict(keep_ratio=0.2)),
    "positions": ("vtc_cls", dict(keep_ratio=0.2, positions="original")),
    "everything": ("vtc_cls", dict(keep_ratio=1)),
    "numbers of numpy": ("vtc_cls", dict(keep_ratio=torch.tensor(0.2).numpy()[()])),
}


@pytest.mark.parametrize("what", MORE)
def test_budgets_lists_and_objects_come_back(what, runner, inputs, tmp_path):
    method, more = MORE[what]
    first, again = round_trip(runner.model, inputs, tmp_path / "a", method, **more)
    assert (again.label, again.method) == (first.label, first.method)


@pytest.mark.parametrize("newlines", ["auto", "keep", "drop"])
def test_newlines_come_back(newlines, tmp_path):
    model, inputs = tiny.model("llava_next"), tiny.batch(kind="llava_next")
    with tokprune.attach(model, "globalcom2:faithful=true", keep_ratio=0.2, newlines=newlines) as first:
        model(**inputs)
        kept = first.kept
        first.save(tmp_path)
    with tokprune.load(model, tmp_path) as again:
        model(**inputs)
        assert same(again.kept, kept)
        assert again.newlines == first.newlines


def test_salts_are_not_saved(runner, inputs, tmp_path):
    with tokprune.attach(runner.model, "random", keep_ratio=0.2) as first:
        runner.model(**inputs)
        kept, first.salts = first.kept, [5]
        first.save(tmp_path)
    with tokprune.load(runner.model, tmp_path) as again:
        runner.model(**inputs)
        assert same(again.kept, kept)


# ---- files of methods


def schedule_file(path: Path, decoder: Decoder, **changes) -> str:
    values = dict(score="fastv:uniform=0.25", layers={2: 0.5, 5: 0.1, 7: 0}, found={"seed": 0})
    write_schedule(
        path, ScheduleFile(n_layers=decoder.n_layers, fingerprint=decoder.fingerprint, **{**values, **changes})
    )
    return f"schedule:file={path}"


def gates_file(path: Path, decoder: Decoder, seed=0) -> str:
    generator = torch.Generator().manual_seed(seed)
    shapes = (6, 2 * decoder.width), (2, 6)
    weights = {layer: tuple(torch.randn(*s, generator=generator) for s in shapes) for layer in (0, 2, 5)}
    write_gates(path, Gates(decoder, weights, {"seed": seed}))
    return f"dyvte:gate={path}"


FILES = {"schedule": (schedule_file, "json"), "dyvte": (gates_file, "safetensors")}


@pytest.mark.parametrize("before", ["", "vtc_cls+"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_methods_are_saved_as_they_were_read(name, before, runner, inputs, decoder, tmp_path):
    """The file is gone, the folder moves, and the label names no file of this machine."""
    (write, suffix), model = FILES[name], runner.model
    spec = before + write(tmp_path / "given", decoder)
    with tokprune.attach(model, spec, **({"keep_ratio": 0.5} if before else {})) as first:
        (tmp_path / "given").write_bytes(b"something else by now")
        tokens, kept = answer(model, inputs), first.kept
        first.save(tmp_path / "a")
    (tmp_path / "given").unlink()
    (tmp_path / "a").rename(tmp_path / "b")
    (file,) = {p.name for p in (tmp_path / "b").iterdir()} - {"tokprune.json"}
    assert saved.FILE.fullmatch(file)
    assert file.startswith(name)
    assert file.endswith(suffix)
    assert len({p.stat().st_mode for p in (tmp_path / "b").iterdir()}) == 1  # readable by the same people
    assert str(tmp_path) not in (tmp_path / "b" / "tokprune.json").read_text()
    with tokprune.load(model, tmp_path / "b") as again:
        assert torch.equal(answer(model, inputs), tokens)
        assert same(again.kept, kept)
        assert again.label == spec.replace(str(tmp_path / "given"), file)
        again.save(tmp_path / "b")  # over what it was loaded from
    with tokprune.load(model, tmp_path / "b") as again:
        assert torch.equal(answer(model, inputs), tokens)
        assert again.label == spec.replace(str(tmp_path / "given"), file_in(tmp_path / "b").name)


@pytest.fixture
def with_file(runner, decoder, tmp_path) -> Path:
    """A folder with a schedule's file."""
    with tokprune.attach(runner.model, schedule_file(tmp_path / "s.json", decoder)) as attachment:
        attachment.save(tmp_path / "a")
    return tmp_path / "a"


def file_in(folder: Path) -> Path:
    (file,) = [p for p in folder.iterdir() if p.name != "tokprune.json"]
    return file


def test_links_of_the_hubs_cache_are_followed(runner, with_file, tmp_path):
    (tmp_path / "blobs").mkdir()
    for path in list(with_file.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    tokprune.load(runner.model, with_file).detach()


# ---- writing


def test_saving_again_replaces_what_was_saved_and_leaves_other_files(runner, decoder, tmp_path):
    folder = tmp_path / "deep" / "a"
    for seed in (0, 1):
        with tokprune.attach(runner.model, gates_file(tmp_path / "g", decoder, seed)) as attachment:
            attachment.save(str(folder))
        (folder / "config.json").write_text("{}")
        assert len(os.listdir(folder)) == 3  # the gates of before are gone
        assert tokprune.load(runner.model, folder).method.gates.notes == {"seed": seed}
        detach(runner.model)
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.5) as attachment:
        attachment.detach()
        attachment.save(folder)  # needs no hooks
    assert sorted(os.listdir(folder)) == ["config.json", "tokprune.json"]


def detach(model):
    vars(model.model)["get_image_features"]._tokprune_attachment.detach()


@pytest.mark.parametrize("step", range(4))
def test_a_save_that_fails_leaves_what_was_saved(step, runner, decoder, with_file, monkeypatch):
    """A full disk at each of the steps."""
    before = {p.name: p.read_bytes() for p in with_file.iterdir()}
    turns, replace = iter(range(9)), os.replace

    def full(source, target):
        if next(turns) >= step:
            raise OSError(28, "No space left on device")
        replace(source, target)

    spec = schedule_file(with_file.parent / "t.json", decoder, layers={3: 0.3})
    with tokprune.attach(runner.model, spec) as attachment, monkeypatch.context() as patch:
        patch.setattr(saved.os, "replace", full)
        with pytest.raises(SavedError, match="No space left.*name a folder"):
            attachment.save(with_file)
        with pytest.raises(SavedError, match="No space left"):
            attachment.save(with_file.parent / "new")
    assert {p.name: p.read_bytes() for p in with_file.iterdir()} == before
    assert not (with_file.parent / "new").exists()
    assert tokprune.load(runner.model, with_file).method.found.layers == {2: 0.5, 5: 0.1, 7: 0}
    detach(runner.model)


@pytest.mark.parametrize("content", ["{}", "", "[" * 9999, '{"format": "other"}', "\xff", None])
def test_another_tokprune_json_is_not_lost(content, runner, tmp_path):
    path = tmp_path / "tokprune.json"
    path.mkdir() if content is None else path.write_bytes(content.encode("latin-1"))
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.5) as attachment:
        with pytest.raises(SavedError, match="would be lost; name another folder"):
            attachment.save(tmp_path)
    assert content is None or path.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize("broken", ["methods", "options", "file"])
def test_a_broken_save_is_replaced(broken, runner, with_file):
    """Nothing outside of the folder is removed, whatever the old one names."""
    outside = with_file.parent / "s.json"
    values = json.loads((with_file / "tokprune.json").read_text())
    if broken == "methods":
        values["methods"] = 5
    elif broken == "options":
        values["methods"] = [7, {"options": 3}]
    else:
        values["methods"][0]["options"]["file"]["file"] = "../s.json"
    (with_file / "tokprune.json").write_text(json.dumps(values))
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.5) as attachment:
        attachment.save(with_file)
    assert outside.exists()
    tokprune.load(runner.model, with_file).detach()


class Unnamed(RankMethod):
    """Of no package."""


@pytest.mark.parametrize("place", ["/proc/no/folder", "FILE", "", "a\0b", None, 5])
def test_folders_that_cannot_be_written(place, runner, tmp_path):
    (tmp_path / "file").write_text("mine")
    place = str(tmp_path / "file") if place == "FILE" else place
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.5) as attachment:
        with pytest.raises(SavedError, match="name a folder that can be written|is not the path of a folder"):
            attachment.save(place)
    with pytest.raises(SavedError, match="no such file|is not the path of a folder"):
        tokprune.load(runner.model, place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_replay_is_not_saved(runner, inputs, tmp_path):
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.5) as attachment:
        runner.model(**inputs)
        kept = attachment.kept
    with tokprune.attach(runner.model, "vtc_cls", replay=kept) as attachment:
        with pytest.raises(SavedError, match="keep attachment.kept, and save what selected it"):
            attachment.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Tilted(Single):
    """A schedule of no name."""


REFUSED = {
    "no name": (Unnamed(), "entry point tokprune.methods"),
    "a filter of no name": ([type("Own", (DAMROFilter,), {})(), "vtc_cls"], "entry point tokprune.methods"),
    "a schedule of no name": (FastV(schedule=Tilted(2)), "does not come back"),
    "a schedule without a text": (FastV(schedule=Schedule()), "FastV: schedule=.*cannot be saved"),
    "another chain": (type("Mine", (Chain,), {})((DAMROFilter(),), VTCCLS()), "give attach\\(\\) a list"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_methods_that_cannot_be_told_by_name_and_options(what, runner, tmp_path):
    method, said = REFUSED[what]
    request = request_of(method, **({"keep_ratio": 0.5} if build_method(method)[0].takes_budget else {}))
    with pytest.raises(SavedError, match=said):
        saved.write_saved(tmp_path / "a", family_of(runner.model).facts, request)
    assert not (tmp_path / "a").exists()


# ---- methods of other packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with methods of its own, and a function that takes it away."""
    site = tmp_path / "site"
    (site / "ours-1.0.dist-info").mkdir(parents=True)
    (site / "ours-1.0.dist-info" / "METADATA").write_text("Name: ours\nVersion: 1.0\n")
    points = "[tokprune.methods]\nours = ours_:Ours\nbroken = no_such_module:X\nnothing = ours_:NOTHING\n"
    (site / "ours-1.0.dist-info" / "entry_points.txt").write_text(points)
    (site / "ours_impl.py").write_text(
        textwrap.dedent('''
        from dataclasses import dataclass
        from typing import ClassVar
        import torch
        from tokprune.methods.base import RankMethod

        @dataclass(frozen=True)
        class Ours(RankMethod):
            """Keeps the norm."""

            pair: tuple = (1, 2.5)
            scale: float = 1.0
            table: str = ""
            strict: bool = False
            needs_file: ClassVar[str] = "table"

            def __post_init__(self):
                super().__post_init__()
                1 / (self.scale - 7)

            def score(self, tokens):
                return tokens.features.float().norm(dim=-1)
        ''')
    )
    (site / "ours_.py").write_text("from ours_impl import Ours\nNOTHING = 5\n")
    monkeypatch.syspath_prepend(str(site))
    yield lambda: shutil.rmtree(site / "ours-1.0.dist-info")
    for name in ("ours_", "ours_impl"):
        sys.modules.pop(name, None)


def test_methods_of_other_packages_come_back(package, runner, inputs, tmp_path):
    (tmp_path / "t.txt").write_text('{"weights": [1, 2]}')
    spec = f"damro_filter+ours:table={tmp_path / 't.txt'}:scale=3"
    _, again = round_trip(runner.model, inputs, tmp_path / "a", spec, keep_ratio=0.2)
    file = file_in(tmp_path / "a")
    assert file.read_text() == '{"weights": [1, 2]}'
    assert again.method.method.table == str(file)
    with tokprune.attach(runner.model, "ours", keep_ratio=0.2, pair=((1, "x"), None, True)) as attachment:
        attachment.save(tmp_path / "b")
    assert tokprune.load(runner.model, tmp_path / "b").method.pair == ((1, "x"), None, True)
    detach(runner.model)
    values = json.loads((tmp_path / "b" / "tokprune.json").read_text())
    for name, said in (("broken", "correct the entry point"), ("nothing", "is not a subclass of")):
        values["methods"][0]["name"] = name
        assert said in refused(runner.model, tmp_path / "b", json.dumps(values))
    values["methods"][0] |= {"name": "ours", "options": {"scale": 7.0}}
    assert "cannot be made from its options" in refused(runner.model, tmp_path / "b", json.dumps(values))
    package()
    assert "no method named 'ours'" in (said := refused(runner.model, tmp_path / "a"))
    assert "If another package brings it, install that" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(pair=(10**30,)), "cannot be saved"),
        (dict(pair=(torch.ones(1),)), "cannot be saved"),
        (dict(table="PICKLE"), "neither safetensors nor JSON"),
        (dict(table="/no/such/file"), "No such file"),
    ],
)
def test_options_and_files_that_are_not_saved(more, said, package, runner, tmp_path):
    (tmp_path / "t.pt").write_bytes(pickle.dumps({"a": 1}))
    more = {k: str(tmp_path / "t.pt") if v == "PICKLE" else v for k, v in more.items()}
    with tokprune.attach(runner.model, "ours", keep_ratio=0.2, **more) as attachment:
        with pytest.raises(SavedError, match=said):
            attachment.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_number_that_json_has_not_is_refused_by_attach(package, runner):
    with pytest.raises(OptionError, match="scale=inf"):
        tokprune.attach(runner.model, "ours", keep_ratio=0.2, scale=float("inf"))


# ---- what is not taken for it


def refused(model, folder: Path, content: str | bytes | None = None) -> str:
    """The one line of a load that fails as it should, and leaves the model alone."""
    if content is not None:
        (folder / "tokprune.json").write_bytes(content.encode() if isinstance(content, str) else content)
    before = hooks(model)
    with pytest.raises(SavedError) as raised:
        tokprune.load(model, folder)
    assert hooks(model) == before
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 1200
    assert text.isprintable()
    return text


@pytest.fixture
def values(runner, with_file) -> dict:
    return json.loads((with_file / "tokprune.json").read_text())


def changed(values: dict, path: tuple, value) -> dict:
    """A copy with one value changed; DROP takes it away."""
    found = copy.deepcopy(values)
    at = found
    for key in path[:-1]:
        at = at[key]
    if value is DROP:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return found


DROP = object()
M = ("methods", 0)
F = (*M, "options", "file")
CHANGED = {
    "no format": (("format",), DROP, "not a JSON object with the format 'tokprune'"),
    "another format": (("format",), "peft", "not a JSON object with the format 'tokprune'"),
    "a newer format": (("format_version",), 2, "its format is 2 and this release reads 1 .*tokprune 0.*pip install -U"),
    "an older format": (("format_version",), 0, "its format_version is 0"),
    "a format that is true": (("format_version",), True, "its format_version is True"),
    "something new": (("quantised",), True, "'quantised', which this release does not know"),
    "something new in a method": ((*M, "device"), 0, "'device', which this release does not know"),
    "something missing": (("positions",), DROP, "the file has no 'positions'"),
    "no methods": (("methods",), [], "'methods' names 0"),
    "many methods": (("methods",), [{"name": "uniform", "options": {}}] * 65, "'methods' names 65"),
    "two methods": (("methods",), [{"name": "uniform", "options": {}}] * 2, "exactly one method"),
    "no object": (M, "vtc_cls", 'a method is "vtc_cls" and no object with name, options'),
    "a method of no package": ((*M, "name"), "vtc_csl", "Did you mean 'vtc_cls'.*install that"),
    "a specification": ((*M, "name"), "dyvte:gate=/etc/passwd", "no method named"),
    "an unknown option": ((*M, "options", "rows"), 1, "has no option 'rows'"),
    "an option of another type": ((*M, "options", "uniform"), "all", "uniform='all' is not a number"),
    "an option out of range": ((*M, "options", "uniform"), 3, "out of range"),
    "an object as option": ((*M, "options", "uniform"), {"a": 1}, "is not a value of an option"),
    "a list as option": ((*M, "options", "uniform"), [0.5], "is not a value of an option"),
    "another schedule": ((*M, "options", "schedule"), "single/2", "takes only file"),
    "a path": (F, "/etc/passwd", 'the file of a method is "/etc/passwd" and no object with file, sha256'),
    "a path upwards": ((*F, "file"), "../../etc/passwd", "files lie in the folder itself"),
    "an absolute path": ((*F, "file"), "/etc/passwd", "files lie in the folder itself"),
    "a nul": ((*F, "file"), "a\0-0123456789abcdef.json", "files lie in the folder itself"),
    "a file that is not there": ((*F, "file"), "schedule-0123456789abcdef.json", "is missing in the folder"),
    "another hash": ((*F, "sha256"), "0" * 64, "is not what was saved, by its SHA-256; fetch it again"),
    "two budgets": (
        ("budget",),
        dict(keep_ratio=0.5, keep_tokens=3, **LLM),
        "holds 2 of keep_ratio",
    ),
    "no budget in it": (("budget",), {}, "holds 0 of keep_ratio"),
    "a budget of nonsense": (
        ("budget",),
        dict(keep_ratio=[[1]], **LLM),
        "is not a fraction",
    ),
    "a budget too large": (("budget",), dict(keep_ratio=10**19, **LLM), "is not a fraction"),
    "a budget of text": (
        ("budget",),
        dict(keep_tokens="9", **LLM),
        "'keep_tokens' of 'budget' is \"9\"",
    ),
    "another scope": (("budget",), dict(keep_ratio=0.5, flops_scope="all", flops_text=64), "flops_scope='all'"),
    "a label with a control sequence": (("label",), "vtc\x1b[2J", "its label cannot be printed"),
    "a lonely surrogate": (("label",), "\ud800", "its label cannot be printed"),
    "a model of less": (("model", "decoder_width"), DROP, "'model' has no 'decoder_width'"),
    "versions that are numbers": (("versions", "torch"), 2, "'torch' of 'versions' is 2"),
    "another family": (("model", "model_type"), "internvl", "saved from a 'internvl' model of 8.*is a 'llava' model"),
    "another depth": (("model", "decoder_layers"), 32, "of 32 decoder layers.*this model is.* of 8 decoder layers"),
    "another width": (("model", "decoder_width"), 4096, "of width 4096 and.*this model is.*of width"),
    "another tower": (("model", "tower_has_cls"), False, "without \\[CLS\\].*this model is.*with \\[CLS\\]"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_file_is_one_clear_error(what, values, runner, with_file):
    path, value, said = CHANGED[what]
    text = refused(runner.model, with_file, json.dumps(changed(values, path, value)))
    assert re.search(said, text), text
    assert str(with_file) in text


TEXTS = {
    "nothing": (b"", "Expecting value"),
    "no JSON": (b"hello", "Expecting value"),
    "a pickle": (pickle.dumps({"format": "tokprune"}), "utf-8"),
    "not UTF-8": (b'{"format": "\xff"}', "utf-8"),
    "nesting": (b'{"format": ' + b"[" * 100_000, "recursion"),
    "NaN": (b'{"format": NaN}', "not a JSON object with the format"),
    "infinity": (b'{"format": 1e999}', "not a JSON object with the format"),
    "a huge number": (b'{"format": ' + b"9" * 50_000 + b"}", "Exceeds the limit"),
    "a huge file": (b'{"format": "' + b"a" * 2**22 + b'"}', "at most 4194304 bytes"),
    "a list": (b"[]", "not a JSON object with the format"),
    "a number": (b"5", "not a JSON object with the format"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_is_no_such_file_is_one_clear_error(what, runner, tmp_path):
    content, said = TEXTS[what]
    assert said in refused(runner.model, tmp_path, content)


def test_folders_that_hold_none(runner, tmp_path):
    assert "no such file; write the folder anew" in refused(runner.model, tmp_path / "none")
    (tmp_path / "file").write_text("{}")
    assert "no such file" in refused(runner.model, tmp_path / "file")
    (tmp_path / "tokprune.json").mkdir()
    assert "not a file" in refused(runner.model, tmp_path)
    (tmp_path / "tokprune.json").rmdir()
    os.mkfifo(tmp_path / "tokprune.json")
    assert "not a file" in refused(runner.model, tmp_path)


def pinned(folder: Path, values: dict, option=("methods", 0, "options", "file")) -> str:
    """The JSON with the hash that the file has by now, as who writes both would give it."""
    digest = hashlib.sha256(file_in(folder).read_bytes()).hexdigest()
    return json.dumps(changed(values, (*option, "sha256"), digest))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", pickle.dumps(print), b'{"format": "tokprune-schedule"}'])
def test_a_spoilt_file_is_one_clear_error(content, values, runner, with_file):
    file_in(with_file).write_bytes(content)
    assert "fetch it again" in refused(runner.model, with_file)
    before = hooks(runner.model)
    (with_file / "tokprune.json").write_text(pinned(with_file, values))
    with pytest.raises(tokprune.TokPruneError, match="neither safetensors nor JSON|is not a schedule"):
        tokprune.load(runner.model, with_file)
    assert hooks(runner.model) == before


def test_links_to_other_files_are_one_clear_error(values, runner, with_file):
    file = file_in(with_file)
    for target, said in (
        ("/etc/passwd", "by its SHA-256"),
        ("/dev/zero", "not a file"),
        (file.name, "symbolic links"),
        ("/no/such", "is missing in the folder"),
        ("..", "not a file"),
    ):
        file.unlink()
        file.symlink_to(target)
        assert said in refused(runner.model, with_file), target


def test_spoilt_gates_are_one_clear_error(runner, decoder, tmp_path):
    """Cut off anywhere in the header, or something else under the name."""
    model, folder = runner.model, tmp_path / "a"
    with tokprune.attach(model, gates_file(tmp_path / "g", decoder)) as attachment:
        attachment.save(folder)
    values, file = json.loads((folder / "tokprune.json").read_text()), file_in(folder)
    whole = file.read_bytes()
    bad = [whole[:n] for n in (0, 4, 8, 20, 500, len(whole) - 1)] + [pickle.dumps({"a": 1}), b"\xff" * 16, b"{}"]
    for content in bad:
        file.write_bytes(content)
        assert "fetch it again" in refused(model, folder, json.dumps(values))
        text = refused(model, folder, pinned(folder, values, ("methods", 0, "options", "gate")))
        assert "neither safetensors nor JSON" in text or "is not what its name says" in text


# ---- other models and states


def test_other_models_are_refused_by_name(tmp_path):
    with tokprune.attach(tiny.model("clip"), "fopru", keep_ratio=0.5) as attachment:
        attachment.save(tmp_path)
    assert "with [CLS]; this model is a 'llava' model" in (text := refused(tiny.model("siglip"), tmp_path))
    assert "without [CLS]" in text
    assert "this model is a 'llava_next' model" in refused(tiny.model("llava_next"), tmp_path)
    with pytest.raises(UnsupportedModelError):
        tokprune.load(torch.nn.Linear(2, 2), tmp_path)
    tokprune.load(tiny.model("clip").model, tmp_path).detach()  # without its head


def test_a_model_that_is_attached_is_refused(runner, tmp_path):
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.5) as attachment:
        attachment.save(tmp_path)
        before = hooks(runner.model)
        with pytest.raises(AlreadyAttachedError):
            tokprune.load(runner.model, tmp_path)
        assert hooks(runner.model) == before


def test_what_another_release_saved_is_loaded_and_named_in_errors(values, runner, with_file, recwarn):
    old = changed(values, ("versions", "tokprune"), "0.0.7")
    (with_file / "tokprune.json").write_text(json.dumps(old))
    tokprune.load(runner.model, with_file).detach()
    assert not recwarn.list
    worse = changed(old, (*M, "options", "new"), 1)
    assert f"(tokprune 0.0.7 saved it, this is {tokprune.__version__})" in refused(
        runner.model, with_file, json.dumps(worse)
    )
    without = changed(old, (*M, "options", "uniform"), DROP)  # an option that came later
    (with_file / "tokprune.json").write_text(json.dumps(without))
    tokprune.load(runner.model, with_file).detach()


# ---- whatever a file says


def loads_or_refuses(model, folder: Path, content: str) -> bool:
    """Nothing else than a load or one clear line; whether it was loaded."""
    (folder / "tokprune.json").write_text(content)
    before, said = hooks(model), ""
    try:
        tokprune.load(model, folder).detach()
    except tokprune.TokPruneError as error:
        said = str(error)
    assert hooks(model) == before
    assert len(said.splitlines()) <= 1
    return not said


def saved_tiny(folder: Path, spec: str, **more) -> str:
    with tokprune.attach(tiny.model(), spec, **more) as attachment:
        attachment.save(folder)
    return (folder / "tokprune.json").read_text()


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    text = saved_tiny(tmp_path, "damro_filter+vtc_cls+fastv:schedule=cosine", keep_ratio=0.2)
    loaded = [n for n in range(len(text)) if loads_or_refuses(tiny.model(), tmp_path, text[:n])]
    assert loaded == [len(text) - 1]  # without the last line break


def leaves(values, path=()):
    """Paths of all values, objects and lists among them."""
    yield path
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield from leaves(values[key], (*path, key))


WRONG = (None, True, 0, -1, 1, 10**19, 0.5, -1e300, "", "x", "none", [], {}, [0], ["x"], {"file": 1}, {"tuple": [1]})


@pytest.mark.parametrize(
    ("spec", "more"),
    [
        ("damro_filter+fopru+fastv:schedule=cosine", dict(keep_tokens=[20, 9])),
        ("globalcom2", dict(flops_ratio=0.8)),
        ("sink_filter:dims=1/7+dart", dict(keep_ratio=0.2)),
        ("visual_exit", {}),
    ],
)
def test_values_of_other_types_anywhere_load_or_are_refused(spec, more, tmp_path):
    values = json.loads(saved_tiny(tmp_path, spec, **more))
    tried = loaded = 0
    for path in leaves(values):
        for wrong in (DROP, *WRONG):
            content = wrong if not path else changed(values, path, wrong)
            if content is not DROP:
                tried += 1
                loaded += loads_or_refuses(tiny.model(), tmp_path, json.dumps(content))
    assert tried > 400
    assert 0 < loaded < tried / 4
    assert loads_or_refuses(tiny.model(), tmp_path, json.dumps(values))


def test_budgets_are_checked_against_the_methods(tmp_path):
    values = json.loads(saved_tiny(tmp_path, "visual_exit"))
    values["budget"] = {"keep_ratio": 0.5, "flops_scope": "llm", "flops_text": 64}
    (tmp_path / "tokprune.json").write_text(json.dumps(values))
    with pytest.raises(BudgetError, match="takes no budget"):
        tokprune.load(tiny.model(), tmp_path)


def test_a_file_that_is_not_named_is_refused(values, runner, with_file):
    (with_file / "tokprune.json").write_text(json.dumps(changed(values, F, "")))
    before = hooks(runner.model)
    with pytest.raises(OptionError, match="schedule needs a file"):
        tokprune.load(runner.model, with_file)
    assert hooks(runner.model) == before


def test_a_filter_of_its_own_is_refused(tmp_path):
    """Also where it acts between layers."""
    for part in (DAMROFilter(), SinkFilter()):
        with pytest.raises(tokprune.TokPruneError, match="is a filter and needs a method after it"):
            tokprune.attach(tiny.model(), part)
