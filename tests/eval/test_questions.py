"""Questions of a user's folder: answers that could never be right, or always, are refused by the line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import jsonl, refusal, tokprune_cli
from folders import write_folder
from PIL import Image
from tokprune.eval.suites import export as lmms_export
from tokprune.eval.tasks import load_task
from tokprune.eval.tasks.base import Sample
from tokprune.eval.tasks.metrics import METRICS

from tokprune.core.errors import RunError, TaskError

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
    "answer and answers": (field("answers", '["a"]'), "both answer and answers"),
    **{
        f"choices {text}": (field("choices", text), "choices")
        for text in ("null", '"a cat"', "[]", '["a cat"]', '["a cat", ""]', '["a cat", 1.5]', '["a cat", "A cat."]')
    },
    "27 choices": (field("choices", json.dumps(["a cat", *map(str, range(26))])), "2 to 26"),
    "a choice that is another's letter": (field("choices", '["B", "a cat"]'), "letter of another"),
    "an answer that is no choice": (field("choices", '["dog", "bird"]'), "A: dog, B: bird"),
    "a letter without a choice": (field("choices", '["dog", "bird"]').replace("a cat", "C"), "is no choice"),
    **{f"metric {text}": (field("metric", text), "exact, normalized") for text in ("null", "1", '""', '"x.py:f"')},
    "too few for a vote": (field("metric", '"vqa"'), "has 1 answer, too few"),
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


def test_choices_are_shown_and_taken_by_letter_or_text(folder):
    line = field("choices", '["a dog", "a cat", 3]')
    for answer in ('"a cat"', '"A cat."', '"B"', '["B"]'):
        *_, sample = load_task(str(with_line(folder, line.replace('"a cat"', answer, 1)))).samples()
        assert sample.question == "what is it?\nA. a dog\nB. a cat\nC. 3"
        assert (sample.answers, sample.rule) == (("a cat", "B"), "choice")
        assert sample.expected == "a cat | B"
        assert all(map(sample.is_right, ("b", "B. a cat", "Cat")))
        assert not sample.is_right("A. a dog")
    *_, sample = load_task(str(with_line(folder, line.replace('"a cat"', '["C", "a dog"]', 1)))).samples()
    assert sample.answers == ("3", "C", "a dog", "A")


def test_a_question_names_its_metric(folder):
    people = json.dumps(["red"] * 3 + ["blue"] * 7)
    line = field("answers", people).replace('"answer": "a cat", ', "")
    *_, sample = load_task(str(with_line(folder, line[:-1] + ', "metric": "vqa"}'))).samples()
    assert (sample.rule, sample.expected, len(sample.answers)) == ("vqa", "red | blue", 10)
    assert sample.value("Red.") == pytest.approx(0.9)


# ---- tables


HEAD = "file_name,question,answer,kind,choices,metric\n"
ROW = "0.png,what color is it?,red,colour,,\n"


def with_table(folder: Path, text: str | bytes) -> Path:
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    (folder / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_table_is_a_task(folder):
    rows = [
        ROW,
        "\n",
        '1.png,"what is it, and ""where""?",a cat | cat,,,\n',
        '2.png,which?,"[""one"", 1]",,,normalized\n',
        "0.png,which?,B,,red|green | blue,\n",
        '1.png,"two\nlines",1.5,,,relaxed\n',
        "2.png,how many?,2,,,",
    ]
    first, second, third, fourth, fifth, sixth = load_task(str(with_table(folder, HEAD + "".join(rows)))).samples()
    assert (first.image_id, first.question, first.answers, first.kind) == (
        "0.png",
        "what color is it?",
        ("red",),
        "colour",
    )
    assert (second.question, second.answers, second.kind) == ('what is it, and "where"?', ("a cat", "cat"), "all")
    assert (third.answers, third.rule) == (("one", "1"), "normalized")
    assert (fourth.question, fourth.answers) == ("which?\nA. red\nB. green\nC. blue", ("green", "B"))
    assert (fifth.question, fifth.answers, fifth.rule) == ("two\nlines", ("1.5",), "relaxed")
    assert [s.id for s in (first, second, third, fourth, fifth, sixth)] == ["2", "4", "5", "6", "7", "9"]  # lines


@pytest.mark.parametrize("delimiter", [";", "\t", ", "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_other_programs(delimiter, end, folder):
    """With a byte order mark, other ends of lines, and other columns between and before those that count."""
    lines = ["split,answers,note,question,file_name", "train,red|crimson,,what color is it?,0.png"]
    text = end.join(line.replace(",", delimiter) for line in lines)
    (sample,) = load_task(str(with_table(folder, b"\xef\xbb\xbf" + text.encode()))).samples()
    assert (sample.image_id, sample.question, sample.answers) == ("0.png", "what color is it?", ("red", "crimson"))


BAD_TABLES = {
    "no answer": ("file_name,question\n0.png,q\n", 1, "lacks answer; a table needs file_name, question, answer"),
    "a column twice": ("file_name,question,answer,answer\n", 1, "'answer' twice"),
    "a comma": (HEAD + ROW + "0.png,what, exactly?,red,,,\n", 3, "has 7 cells, and the first row names 6 columns"),
    "too few": (HEAD + ROW + "0.png,what?,red\n", 3, "has 3 cells"),
    "no text": (HEAD + ROW + "\n0.png,what?,,,,\n", 4, "has the answer"),
    "an empty answer of several": (HEAD + "0.png,what?,red||blue,,,\n", 2, "has the answer"),
    "half a list": (HEAD + '0.png,what?,"[""red""",,,\n', 2, "begins as a JSON list"),
    "a number in a list": (HEAD + '0.png,what?,"[1.5]",,,\n', 2, "has the answer 1.5"),
    "one choice": (HEAD + "0.png,what?,red,,red,\n", 2, "has the choices"),
    "an answer that is no choice": (HEAD + "0.png,what?,red,,green|blue,\n", 2, "is no choice"),
    "an unknown metric": (HEAD + "0.png,what?,red,,,exct\n", 2, "exact, normalized"),
    "a file that is not there": (HEAD + ROW + "9.png,what?,red,,,\n", 3, 'names "9.png"'),
    "behind lines in a cell": (HEAD + '0.png,"a\nb",red,,,\n9.png,what?,red,,,\n', 4, 'names "9.png"'),
    "an open quote": (HEAD + '0.png,"what?,red,,,\n', 2, "is not a row of a table"),
    "a quote inside": (HEAD + '0.png,"what" is?,red,,,\n', 2, "is not a row of a table"),
    "a placeholder": (HEAD + "0.png,<image> what?,red,,,\n", 2, "leave <image> out"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_what_is_no_row_is_refused_with_its_line(what, folder):
    text, number, told = BAD_TABLES[what]
    with pytest.raises(TaskError) as raised:
        load_task(str(with_table(folder, text)))
    assert f"{folder / 'metadata.csv'} line {number} " in str(raised.value)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"), [("", "has no line"), (HEAD, "has no line"), (b"file_name\xff", "is not UTF-8")]
)
def test_what_is_no_table_is_refused(text, told, folder):
    with pytest.raises(TaskError, match=told):
        load_task(str(with_table(folder, text)))


def test_one_file_of_questions_a_folder(folder):
    (folder / "metadata.csv").write_text(HEAD + ROW)
    with pytest.raises(TaskError, match=r"both metadata.jsonl and metadata.csv; remove one"):
        load_task(str(folder))
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).unlink()
    with pytest.raises(TaskError, match=r"no metadata.jsonl and no metadata.csv; write one line a question"):
        load_task(str(folder))


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


COMPARE = ("compare", "--methods", "none,uniform", "--keep", "0.25")


def said_to(folder: Path, out: Path) -> list[str]:
    """What the model answers to the questions of a folder."""
    assert tokprune_cli(*COMPARE, "--task", str(folder), "--out", str(out)).returncode == 0
    return [row["answer"] for row in jsonl(out / "samples.jsonl") if row["config"] == "none"]


def test_a_metric_of_ones_own_grades_a_run(folder, tmp_path):
    said = said_to(folder, tmp_path / "first")
    (tmp_path / "own.py").write_text("def half(answer, expected):\n    return 0.5 if 'e' in answer else 0.25\n")
    run = [*COMPARE, "--task", str(folder), "--out", str(tmp_path / "out"), "--metric", f"{tmp_path / 'own.py'}:half"]
    done = tokprune_cli(*run)
    assert done.returncode == 0, done.stderr
    assert "own.py:half" in "".join(done.stdout.split())  # in the caption, which may be cut into lines
    values = [0.5 if "e" in answer else 0.25 for answer in said]
    (row,) = [r for r in jsonl(tmp_path / "out" / "rows.jsonl") if r["method"] == "none"]
    assert (row["value"], row["metric"]) == (pytest.approx(sum(values) / 3), run[-1])
    answers = [r for r in jsonl(tmp_path / "out" / "samples.jsonl") if r["config"] == "none"]
    assert [(r["value"], r["right"]) for r in answers] == [(v, v >= 0.5) for v in values]
    told = refusal(tokprune_cli(*run[:-2]))
    assert "other settings (metric" in told
    told = refusal(tokprune_cli(*run[:-1], "contains"))
    assert '"contains" now' in told
    (tmp_path / "own.py").write_text("def half(answer, expected):\n    return 2\n")
    assert "return a number from 0 to 1" in refusal(tokprune_cli(*run))


def test_without_a_metric_rows_are_as_ever(folder, tmp_path):
    said_to(folder, tmp_path / "out")
    assert {r["value"] for r in jsonl(tmp_path / "out" / "samples.jsonl")} == {None}
    assert {r["metric"] for r in jsonl(tmp_path / "out" / "rows.jsonl")} == {"exact_match"}
    assert "metric" not in json.loads((tmp_path / "out" / "run.json").read_text())
    assert "split, tiny-llava" in (tmp_path / "out" / "table.md").read_text()  # the caption


def test_wrong_answers_are_shown_and_sentences_are_noticed(folder, tmp_path):
    """Answers of the embedded model are words, so the expected ones are cut down to one of several words."""
    lines = [
        {"file_name": f"{i % 3}.png", "question": "where is the red circle?", "answer": "left", "kind": f"[b]{i}"}
        for i in range(7)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = said_to(folder, tmp_path / "first")
    assert all(len(answer.split()) == 2 for answer in said)  # "top left"
    for line, answer in zip(lines, said, strict=True):
        line["answer"] = answer.split()[1]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = [*COMPARE, "--task", str(folder), "--out", str(tmp_path / "second")]
    shown = tokprune_cli(*run).stdout
    assert "Wrong answers of the unpruned model, 5 of 7:" in shown
    assert shown.count("where is the red circle?") == 5
    hints = [line for line in shown.splitlines() if line.startswith("Hint: ")]
    assert hints == [
        "Hint: 7 of 7 answers of the unpruned model contain the expected answer and are not equal to it: use --suffix "
        "' Answer with one word.' or --metric contains"
    ]
    shown = tokprune_cli(*run[:-1], str(tmp_path / "third"), "--metric", "contains").stdout
    assert "Hint" not in shown
    assert "Wrong" not in shown
    shown = tokprune_cli(*run[:-1], str(tmp_path / "fourth"), "--max-new-tokens", "1").stdout
    assert "were cut off before their end" in shown


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
EXAMPLES = re.findall(r"```(json|csv)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("i", range(len(EXAMPLES)))
def test_examples_of_the_page_are_tasks(i, tmp_path):
    kind, text = EXAMPLES[i]
    for name in re.findall(r"\w\.png", text):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "yard.mp4").touch()  # opened when it is shown
    (tmp_path / "street").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "street" / "000.png")
    (tmp_path / f"metadata.{'jsonl' if kind == 'json' else 'csv'}").write_text(text)
    assert len(load_task(str(tmp_path)).samples()) == len(text.splitlines()) - (kind == "csv")


def test_there_are_three_examples_and_every_metric_is_described():
    assert [kind for kind, _ in EXAMPLES] == ["json", "csv", "json"]
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(METRICS)


# ---- videos


def write_clips(folder: Path) -> Path:
    """Four clips of a task of tokprune: three folders of frames and a video file."""
    task, samples = load_task("watchit"), {}
    for sample in load_task("watchit").samples():
        samples.setdefault(sample.image_id, sample)
    lines = []
    for i, sample in enumerate(list(samples.values())[:4]):
        frames = task.image(sample.image_id).frames
        name = f"{i}.mp4" if i == 3 else f"clip-{i}"
        if i == 3:
            write_video(folder / name, frames)
        else:
            (folder / name).mkdir(parents=True)
            for n, frame in enumerate(frames):
                frame.save(folder / name / f"{n:03}.png")
        lines.append({"file_name": name, "question": sample.question, "answer": sample.answer})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_video(path: Path, frames) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def test_a_folder_of_clips_is_compared_and_exported(tmp_path):
    folder, out = write_clips(tmp_path / "clips"), tmp_path / "out"
    run = ["compare", "--model", "tiny-qwen", "--task", str(folder), "--methods", "none,uniform,frames"]
    done = tokprune_cli(*run, "--no-controls", "--keep", "0.5", "--limit", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = {r["config"]: r for r in jsonl(out / "rows.jsonl")}
    assert {r["n_samples"] for r in rows.values()} == {3}
    counts = {config: (r["n_visual_before"], r["n_visual_after"]) for config, r in rows.items()}
    assert counts == {c: (64, 64 if "@" not in c else 32) for c in counts}
    assert set(counts) == {"none", "shuffled pictures", "uniform@0.5", "frames@0.5"}
    task = load_task(str(folder))
    name = lmms_export.export(task, task.samples(), tmp_path / "tasks")
    visuals = [shown_by(tmp_path / "tasks" / name, i) for i in range(4)]
    assert visuals == [[str((folder / s.image_id).resolve())] for s in task.samples()]


def test_clips_made_by_code_are_exported_as_frames(tmp_path):
    from tokprune.prune.videos import Clip, open_clip

    task = load_task("watchit")
    samples = task.samples()[:2]
    name = lmms_export.export(task, samples, tmp_path)
    for i, sample in enumerate(samples):
        (path,) = shown_by(tmp_path / name, i)
        assert open_clip(Path(path)) == task.image(sample.image_id)

    class Faster:
        name = "faster"

        def image(self, image_id):
            return Clip(task.image(samples[0].image_id).frames, 24.0)

    with pytest.raises(RunError, match="24 frames a second.*write them to a folder as video files"):
        lmms_export.export(Faster(), samples, tmp_path)


def test_an_exported_question_keeps_its_metric(folder, tmp_path):
    people = ["red"] * 3 + ["blue"] * 7
    lines = [
        {"file_name": "0.png", "question": "q", "answer": people, "metric": "vqa"},
        {"file_name": "1.png", "question": "q", "answer": "B", "choices": ["red", "blue"]},
        {"file_name": "2.png", "question": "q", "answer": "red"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task(str(folder))
    name = lmms_export.export(task, task.samples(), tmp_path / "tasks")
    assert "- metric: score\n" in (tmp_path / "tasks" / name / f"{name}.yaml").read_text()
    own = tmp_path / "tasks" / name
    assert exported(own, 0, "Red!") == pytest.approx(0.9)
    assert [exported(own, 1, a) for a in ("(B)", "blue", "A")] == [1, 1, 0]
    assert [exported(own, 2, a) for a in ("Red.", "the red")] == [1, 0]


def shown_by(folder: Path, i: int) -> list:
    """What lmms-eval shows of a document."""
    return functions(folder)["doc_to_visual"](documents(folder)[i])


def documents(folder: Path):
    import datasets

    return datasets.Dataset.from_parquet(str(folder / "test.parquet"), cache_dir=str(folder / "cache"))


def functions(folder: Path) -> dict:
    namespace: dict = {}
    exec((folder / "utils.py").read_text(), namespace)
    return namespace


def jsonl_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines() if line]


def exported(folder: Path, i: int, answer: str) -> float:
    """What lmms-eval makes of an answer to a document."""
    (value,) = functions(folder)["process_results"](documents(folder)[i], [answer]).values()
    return value
