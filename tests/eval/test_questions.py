"""Questions of a user's folder: answers that could never be right, or always, are refused by the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import jsonl, refusal, tokprune_cli
from folders import write_folder
from tokprune.eval.suites import export as lmms_export
from tokprune.eval.tasks import load_task
from tokprune.eval.tasks.base import Sample

from tokprune.core.errors import TaskError

DEEP = "[" * 100_000


def with_line(folder: Path, line: str | bytes) -> Path:
    """A third line behind two good ones, of which one is empty."""
    good = json.dumps({"file_name": "0.png", "question": "what color is it?", "answer": "red"})
    content = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    (folder / "metadata.jsonl").write_bytes(good.encode() + b"\n\n" + content + b"\n")
    return folder


def field(name: str, value: str) -> str:
    """A whole line but for one field, which is given as JSON."""
    values = {"file_name": '"1.png"', "question": '"what is it?"', "answer": '"a cat"', name: value}
    return "{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}"


NO_TEXT = ["null", "true", "false", "{}", '{"a": "b"}', "NaN", "-Infinity", "1e999", "1.5"]
NO_TEXT += ['""', '" "', '"\\t\\n"', "[]"]
BAD = {
    **{f"answer {text}": (field("answer", text), "answer") for text in NO_TEXT},
    **{f"question {text}": (field("question", text), "question") for text in (*NO_TEXT, "3", '["a"]')},
    **{f"kind {text}": (field("kind", text), "kind") for text in (*NO_TEXT, "3", '["a"]')},
    **{f"file_name {text}": (field("file_name", text), "file_name") for text in (*NO_TEXT, "3", '["a"]')},
    **{
        f"answer {text}": (field("answer", text), "answer")
        for text in ('["a", 1.5]', '["a", null]', '["a", ""]', '["a", ["b"]]', '["a", "."]', '["a", true]')
    },
    "answer of a full stop": (field("answer", '"."'), "answer"),
    "half a character": (field("question", '"\\ud800"'), "question"),
    "half a character in the answer": (field("answer", '"\\ud800"'), "answer"),
    "a field twice": ('{"answer": "a", "file_name": "1.png", "question": "b", "answer": "c"}', "'answer' twice"),
    "a field twice inside": (field("more", '{"a": 1, "a": 2}'), "'a' twice"),
    "too deep": (DEEP, "nested"),
    "too deep inside": (field("more", DEEP), "nested"),
    "a list": ("[1]", "object"),
    "a number": ("3", "object"),
    "half a line": (field("answer", '"a"')[:-3], "not JSON"),
    "no answer": ('{"file_name": "1.png", "question": "q"}', "lacks answer"),
    "a name that is too long": (field("file_name", json.dumps("a" * 5000)), "a" * 50),
    "a name that cannot be": (field("file_name", '"a\\u0000b"'), "which is not in"),
    "a name of a folder": (field("file_name", '"."'), "which is not in"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_question_is_refused_with_its_line(what, folder, tmp_path):
    line, told = BAD[what]
    out = tmp_path / "out"
    said = refusal(tokprune_cli("compare", "--task", str(with_line(folder, line)), "--out", str(out)))
    assert f"{folder / 'metadata.jsonl'} line 3" in said
    assert told in said
    assert len(said) < 1000
    assert not out.exists()


@pytest.mark.parametrize("what", ["search", "eval"])
def test_other_commands_refuse_it_too(what, folder, tmp_path):
    with_line(folder, field("answer", "null"))
    command = {
        "search": ["search", "--calibration", str(folder), "--tolerance", "0.1", "--out", str(tmp_path / "a.json")],
        "eval": ["eval", "--suite", "lmms-eval", "--tasks", str(folder), "--out", str(tmp_path / "out")],
    }[what]
    refusal(tokprune_cli(*command))
    with pytest.raises(TaskError, match="line 3"):
        load_task(str(folder))


GOOD = {
    '"a cat"': ("a cat",),
    "7": ("7",),
    "-7": ("-7",),
    "0": ("0",),
    "9" * 5000: ("9" * 5000,),
    '["red", "crimson"]': ("red", "crimson"),
    '["one", 1]': ("one", "1"),
    '["red"]': ("red",),
    '["red", "Red."]': ("red", "Red."),
    '"\\u00e9t\\u00e9"': ("été",),
}


@pytest.mark.parametrize("text", GOOD, ids=lambda text: text[:20])
def test_texts_whole_numbers_and_lists_of_them_are_answers(text, folder):
    *_, sample = load_task(str(with_line(folder, field("answer", text)))).samples()
    assert sample.answers == GOOD[text]
    assert all(sample.is_right(f" {answer.upper()}. ") for answer in GOOD[text])
    assert not sample.is_right("something else")


def test_other_fields_are_let_be(folder):
    *_, sample = load_task(str(with_line(folder, field("license", "[1.5, null, NaN]")))).samples()
    assert (sample.answers, sample.kind) == (("a cat",), "all")


def test_of_several_answers_any_is_right():
    sample = Sample("1", "a", "q", "dark red", also=("crimson", "red"))
    assert all(map(sample.is_right, ("Dark  red.", "crimson", "red")))
    assert not any(map(sample.is_right, ("dark", "red red", "")))
    assert all(map(sample.begins_right, ("red red", "dark red and more")))
    assert not any(map(sample.begins_right, ("redder", "dark", "")))
    assert sample.expected == "dark red | crimson | red"
    assert Sample("1", "a", "q", "red").expected == "red"


def rights(out: Path) -> list[bool]:
    return [row["right"] for row in jsonl(out / "samples.jsonl") if row["config"] == "none"]


def test_compare_and_lmms_eval_take_any_of_several_answers(tmp_path):
    """What the model says, beside something else, is right; something else alone is not."""
    write_folder(tmp_path)
    command = ["compare", "--task", str(tmp_path), "--methods", "none,uniform", "--out"]
    assert tokprune_cli(*command, str(tmp_path / "first")).returncode == 0
    said = [row["answer"] for row in jsonl(tmp_path / "first" / "samples.jsonl") if row["config"] == "none"]
    lines = jsonl_lines(tmp_path)
    wanted = [["nothing", said[0]], [said[1], "nothing"], ["nothing", "no"]]
    for line, answers in zip(lines, wanted, strict=True):
        line["answer"] = answers
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = tokprune_cli(*command, str(tmp_path / "second"))
    assert done.returncode == 0, done.stderr
    assert rights(tmp_path / "second") == [True, True, False]
    assert f"nothing | {said[0]}" in [row["expected"] for row in jsonl(tmp_path / "second" / "samples.jsonl")]
    task = load_task(str(tmp_path))
    name = lmms_export.export(task, task.samples(), tmp_path / "tasks")
    assert [exported(tmp_path / "tasks" / name, i, said[i]) for i in range(3)] == [1, 1, 0]


def jsonl_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines() if line]


def exported(folder: Path, i: int, answer: str) -> float:
    """What lmms-eval makes of an answer to a document."""
    import datasets

    rows = datasets.Dataset.from_parquet(str(folder / "test.parquet"), cache_dir=str(folder / "cache"))
    namespace: dict = {}
    exec((folder / "utils.py").read_text(), namespace)
    return namespace["process_results"](rows[i], [answer])["exact_match"]
