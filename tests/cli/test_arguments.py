"""What every command asks of its arguments: typed once, naming something, of a size that a number can have."""

from __future__ import annotations

import inspect

import pytest
import typer
from commands import refusal, tokprune_cli
from PIL import Image
from tokprune.eval.tasks import TASKS, load_task
from tokprune.eval.tasks.findit import FindIt

import tokprune
from tokprune.cli.commands import app
from tokprune.core.errors import OptionError, UnknownNameError
from tokprune.methods import METHODS, build_method


def declared(name: str, parameter: str) -> str:
    """How the function of a command declares one, as text."""
    return str(inspect.signature(inspect.unwrap(COMMANDS[name].callback)).parameters[parameter].annotation)


def is_number(name: str, p) -> bool:
    return p.name != "help" and declared(name, p.name).startswith(("Annotated[int", "Annotated[float"))


COMMANDS = typer.main.get_command(app).commands
OPTIONS = [(name, p) for name, c in COMMANDS.items() for p in c.params if p.param_type_name == "option"]
ONCE = [(name, p) for name, p in OPTIONS if not p.multiple and not p.is_eager]
FREE = {"suffix", "question", "model_args", "gen_kwargs"}  # texts that are not the name of anything
NAMING = [
    (name, p)
    for name, c in COMMANDS.items()
    for p in c.params
    if p.name not in FREE and not getattr(p, "is_flag", False) and not is_number(name, p)
]
NUMBERS = [(name, p) for name, p in OPTIONS if is_number(name, p)]


def ids(pairs) -> list[str]:
    return [f"{name} {p.opts[0]}" for name, p in pairs]


def words(name: str, *more: str) -> list[str]:
    """A command line with all arguments that are asked for."""
    parts = [name]
    for p in COMMANDS[name].params:
        if p.required and p.opts[0] not in more:
            parts += ["x"] if p.param_type_name == "argument" else [p.opts[0], "x"]
    return [*parts, *more]


# ---- once


@pytest.mark.parametrize(("name", "option"), ONCE, ids=ids(ONCE))
def test_an_option_typed_twice_is_refused(name, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = option.opts[0]
    given = [flag, flag] if option.is_flag else [flag, "1", f"{flag}=2"]
    line = refusal(tokprune_cli(*words(name, *given)))
    assert f"{flag} is given 2 times" in line
    assert "use it once" in line
    assert not list(tmp_path.iterdir())


def test_options_of_several_values_are_listed():
    saved = {(name, "config") for name in ("bench", "compare", "eval", "explain", "flops")}
    listed = {("compare", "task"), ("compare", "suffix"), ("explain", "method"), *saved}
    assert {(name, p.name) for name, p in OPTIONS if p.multiple} == listed


TWICE = ["vtc_cls:start_layer=1:start_layer=2", "fopru:strategy=row:form=logits:strategy=row", "fastv:layer=2:layer=2"]


TWICE += ["fastervlm:split=even:split=even", "damro_filter+vtc_cls:split=even:split=even"]


@pytest.mark.parametrize("spec", TWICE)
def test_an_option_of_a_method_written_twice_is_refused(spec):
    with pytest.raises(OptionError, match="twice.*use it once"):
        build_method(spec)


def test_an_option_in_the_text_and_as_a_keyword_is_refused():
    with pytest.raises(OptionError, match="twice"):
        tokprune.get_method("vtc_cls:start_layer=1", start_layer=2)


def test_an_alias_is_still_changed_by_an_option_of_its_own():
    assert tokprune.get_method("fastervlm:start_layer=3").start_layer == 3
    assert tokprune.get_method("fastervlm", start_layer=3).start_layer == 3


# ---- blank

LISTED = dict.fromkeys(("method", "methods", "score"), "blind, cdpruner, ")
BEFORE = {("new", "name"): ["method"], ("serve", "more"): ["tiny-llava"]}  # arguments that come before
LISTED |= {"task": "findit", "tasks": "findit", "model": "llava", "shape": "llava-1.5-7b, "}


@pytest.mark.slow
@pytest.mark.parametrize("blank", ["", "  ", "\t", ","], ids=repr)
@pytest.mark.parametrize(("name", "option"), NAMING, ids=ids(NAMING))
def test_a_blank_name_is_one_line_that_lists_what_exists(name, option, blank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = option.opts[0]
    if option.param_type_name == "argument":
        given, named = [name, *BEFORE.get((name, named), []), blank], named.upper()
    else:
        given = words(name, named, blank)
    line = refusal(tokprune_cli(*given))
    assert f"{named} is blank" in line
    assert LISTED.get(option.name, option.help.rstrip(".")) in line
    assert not list(tmp_path.iterdir())


def test_one_blank_task_of_several_is_refused():
    assert "--task is blank" in refusal(tokprune_cli("compare", "--task", "findit", "--task", ""))


@pytest.mark.parametrize("name", ["", " ", "\n"], ids=repr)
def test_a_blank_task_is_none(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UnknownNameError, match=", ".join(TASKS.names())):
        load_task(name)


# ---- numbers

HUGE = ("9" * 400, str(2**62), "-" + "9" * 400)
VALUES = (*HUGE, "-1", "0", "nan", "inf", "-inf", "1e400")


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """By command, arguments with which it does little and ends well."""

    class Few(FindIt):
        def __init__(self, split="test", n_scenes=12):
            super().__init__(split, n_scenes)

    monkeypatch.setattr("tokprune.eval.tasks.findit.FindIt", Few)
    Image.new("RGB", (96, 96)).save(folder / "scene.png")
    out = ["--out", str(tmp_path / "out")]
    return {
        "flops": {"--model": "llava-next-7b", "--method": "globalcom2"},
        "explain": {"": str(folder / "scene.png"), **dict([out])},
        "compare": {"--task": str(folder), "--methods": "none", **dict([out])},
        "fit-exit": {
            **dict([out]),
            "--task": "findit",
            "--steps": "3",
            "--samples": "4",
            "--hidden": "4",
            "--batch-size": "4",
        },
        "reproduce": {"": "llava-1.5-7b", "--tasks": "findit", "--dry-run": "", **dict([out])},
        "tune": {"--task": "findit", "--max-loss": "90%", "--methods": "uniform", "--limit": "20", **dict([out])},
        "search": {"--task": "findit", "--samples": "2", "--trials": "1", **dict([out])},
        "eval": {"--tasks": "findit", **dict([out])},
        "serve": {"": "tiny-llava", "--method": "vtc_cls", "--show": ""},
        "bench": {"--model": "tiny-llava", "--methods": "uniform", "--rounds": "1", "--new-tokens": "2", **dict([out])},
    }


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES, ids=lambda v: v[:4] + str(len(v)))
@pytest.mark.parametrize(("name", "option"), NUMBERS, ids=ids(NUMBERS))
def test_a_number_is_one_line_or_works(name, option, value, small):
    given = {**small[name], option.opts[0]: value}
    if name == "search" and option.opts[0] not in ("--tolerance", "--budget"):
        given["--budget"] = "0.6"
    if name == "bench" and "layers" in option.opts[0]:
        given = {**{k: v for k, v in given.items() if k != "--model"}, "--shape": "llava-1.5-7b"}
    done = tokprune_cli(name, *(part for pair in given.items() for part in pair if part))
    if done.returncode:
        assert option.opts[0] in refusal(done) or "not installed" in done.stderr
    else:
        assert value in ("0", "-1") or (value in HUGE and "float" in declared(name, option.name))
        assert not done.stderr


LISTS = [("bench", "--batch-size"), ("bench", "--new-tokens"), ("bench", "--resolution"), ("bench", "--keep")]
LISTS += [("compare", "--keep"), ("eval", "--keep")]


@pytest.mark.parametrize("value", [*VALUES, "0.5,nan"], ids=lambda v: v[:4] + str(len(v)))
@pytest.mark.parametrize(("name", "option"), LISTS)
def test_a_list_of_numbers_is_one_line(name, option, value, small):
    given = {**small[name], option: value}
    line = refusal(tokprune_cli(name, *(part for pair in given.items() for part in pair)))
    assert option in line or "not installed" in line
    assert "keep_ratio" not in line


LARGE = {
    "tokens": "flops --model llava-next-7b --method globalcom2 --visual 2147483647",
    "text": "flops --model llava-next-7b --method fastv --text 2147483647",
    "crops": "flops --model llava-next-7b --crops 2147483647",
    "gates": "fit-exit --task findit --samples 4 --hidden 2147483647 --out OUT",
    "a side": "bench --shape llava-1.5-7b --methods uniform --resolution 2147483640 --out OUT",
    "crops of a side": "bench --shape llava-next-7b --methods uniform --resolution 2147483640 --out OUT",
    "a prompt": "bench --model tiny-llava --methods uniform --text 2147483647 --out OUT",
    "a prompt of a shape": "bench --shape llava-1.5-7b --layers 2 --methods uniform --text 2147483647 --out OUT",
    "a batch": "bench --model tiny-llava --methods uniform --batch-size 2147483647 --out OUT",
    "an output": "bench --model tiny-llava --methods uniform --new-tokens 2147483647 --out OUT",
    "processes": "eval --tasks findit --processes 2147483647 --out OUT",
}


@pytest.mark.parametrize("what", LARGE)
def test_what_no_machine_holds_is_refused_before_anything_is_written(what, small, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    line = refusal(tokprune_cli(*(str(tmp_path / "out") if w == "OUT" else w for w in LARGE[what].split())))
    assert "type " in line or "at most" in line or "not installed" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [n for n in METHODS.own_names() if n not in ("dyvte", "schedule")])
def test_numbers_of_methods_are_refused_in_one_line_or_taken(name):
    """Whole numbers fit 64 bits, others are finite, whatever an option stands for."""
    built = tokprune.get_method(name)
    for option, value in vars(built).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for text in (*HUGE[::2], "nan", "inf", "-inf", "1e400"):
            with pytest.raises(OptionError, match=option):
                tokprune.get_method(f"{name}:{option}={text}")
