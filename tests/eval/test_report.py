"""The report of a comparison: every figure is that of the rows, pictures are of real losses, nothing is fetched."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
import zlib
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import jsonl, refusal, tokprune_cli
from matplotlib.figure import Figure
from PIL import Image
from tokprune.eval.models import path_of
from tokprune.eval.report import findings, losses, pareto, tables
from tokprune.eval.report import html as report
from tokprune.eval.report.exports import csv_table, markdown_tables
from tokprune.eval.report.render import read_rows
from tokprune.eval.report.tables import accuracy, budget, difference
from tokprune.eval.run.folder import RunFolder
from tokprune.eval.run.rows import Costs, Row, pooled
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import load_task

import tokprune
from tokprune.core.errors import RunError
from tokprune.methods import METHODS

VOID = {"meta", "img", "wbr", "br", "link", "input", "hr"}
RUN = [
    "--task",
    "findit",
    "--limit",
    "24",
    "--methods",
    "none,blind,random,vtc_cls,fastv,prumerge",
    "--keep",
    "0.5,0.11",
    "--no-controls",
]


class Page(HTMLParser):
    """A page as a browser reads it: tags, tables, figures, text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: list[dict] = []
        self._table: list[list[str]] | None = None
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(dict(attributes)["class"], [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._cell = []
        elif tag == "figure" and "data-sample" in dict(attributes):
            self.figures.append({**dict(attributes), "images": [], "text": []})
        elif tag == "img" and self.figures:
            self.figures[-1]["images"].append(dict(attributes)["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag in ("td", "th") and self._cell is not None:
            self._table[-1].append("".join(self._cell).strip())
            self._cell = None
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
            if self._cell is not None:
                self._cell.append(data)
            if self.figures and "figure" in self.open:
                self.figures[-1]["text"].append(data)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def rows_of(folder: Path) -> list[Row]:
    return [Row.read(line) for line in jsonl(folder / "rows.jsonl") if line["method"] != "question only"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    done = tokprune_cli("compare", *RUN, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    return out


@pytest.fixture
def copy(compared, tmp_path) -> Path:
    return Path(shutil.copytree(compared, tmp_path / "copy"))


# ---- one file


def assert_self_contained(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:80]
            assert not re.search(r"url\((?!#)|@import", value or ""), value
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not page.open  # every tag is closed


def test_report_is_one_file_that_fetches_nothing(compared):
    page = page_of(compared)
    assert_self_contained(page)
    text = (compared / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert (compared / "report.html").stat().st_size < 6e6
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    named |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert named <= set(ids)


def test_a_page_that_fetches_is_seen(compared):
    text = (compared / "report.html").read_text()
    for bad in ('<img src="https://example.org/a.png">', "<script>1</script>", '<p style="background: url(//a)">x</p>'):
        with pytest.raises(AssertionError):
            assert_self_contained(Page(text.replace("<footer", f"{bad}<footer")))


def test_report_is_readable_without_eyes(compared):
    page = page_of(compared)
    assert [t for t, _ in page.tags if t == "h1"] == ["h1"]
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")
    assert sum(t == "caption" for t, _ in page.tags) == sum(t == "table" for t, _ in page.tags) == 3
    assert dict(page.tags)["html"]["lang"] == "en"
    figures = [a for t, a in page.tags if t == "figure" and a.get("role") == "group"]
    assert [a["aria-label"].removeprefix("Accuracy against ") for a in figures] == list(pareto.COSTS)
    *plots, legend = [a["alt"] for t, a in page.tags if t == "img"][:5]
    assert all("question only 29.2 %" in alt and " of 8 configurations, " in alt for alt in plots)
    assert legend.startswith("Legend: none; random, 3 seeds; vtc_cls; ")


# ---- figures of the rows


def test_all_configurations_are_in_the_table_with_the_figures_of_the_rows(compared):
    header, *lines = page_of(compared).tables["configurations"]
    shown = {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}
    rows = pooled(rows_of(compared))
    assert len(lines) == len(shown) == len(rows) + 1  # and the most frequent training answer
    assert sum(len(r.method.split(",")) > 1 for r in rows) == 2  # random, 3 seeds, at two budgets
    for row in rows:
        cells = shown[row.method, budget(row)]
        assert cells["accuracy [95 %]"] == accuracy(row) == f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
        assert cells["points from unpruned [95 %]"] == difference(row)
        assert cells["visual tokens"].replace("→", "->").split()[2] == f"{row.n_visual_after:.4g}"
        assert cells["mean over layers"] == f"{row.n_visual_mean:.4g}"
        c = row.costs
        assert cells["LLM FLOPs"] == f"{c.llm_flops_after / c.llm_flops_before:.2f}"
        assert cells["prefill FLOPs"] == f"{c.prefill_flops_after / c.prefill_flops_before:.2f}"
        assert cells["KV bytes"] == f"{c.kv_bytes_after / c.kv_bytes_before:.2f}"
        assert cells["prefill time"] == f"{row.prefill_ratio:.2f}"


def test_no_loss_is_seen_exactly_where_the_interval_holds_zero(compared):
    header, *lines = page_of(compared).tables["configurations"]
    at, place = header.index("points from unpruned [95 %]"), header.index("that is")
    verdicts = []
    for line in lines:
        found = re.fullmatch(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", line[at])
        assert bool(found) == (line[0] not in ("none", "question only"))
        holds = bool(found) and float(found[2]) <= 0 <= float(found[3])
        said = f"no loss seen; at most {-float(found[2]):.1f} points (95 %)" if holds else ""
        assert line[place] == said
        verdicts.append(holds)
    assert {True, False} <= set(verdicts)


def test_findings_are_those_of_the_rows(compared):
    page, rows = " ".join("".join(page_of(compared).text).split()), rows_of(compared)
    by_name = {(r.method, budget(r)): r for r in pooled(rows)}
    none = by_name["none", ""]
    assert f"answers {100 * none.value:.1f} % of 24 questions right" in page
    assert f"no visual token: {100 * by_name['blind', ''].value:.1f} %" in page
    alike = [r for r in by_name.values() if budget(r) == "0.5" and r.is_noise]
    best = max(alike, key=lambda r: r.value)
    most = f"at most {-100 * best.difference_low:.1f} points lost (95 %)"
    assert f"No loss is seen with {best.method} with {100 * best.value:.1f} %, {most}" in page
    assert "24 questions are too few" in page


def test_missing_controls_are_named(compared):
    rows = rows_of(compared)
    (missing,) = [f for f in findings.findings(rows, None) if f.label == "Missing"]
    assert missing.text == "This run lacks these controls: pool or downsample."
    few = [r for r in rows if r.method not in ("none", "blind") and not r.method.startswith("random:seed=2")]
    (missing,) = [f for f in findings.findings(few, None) if f.label == "Missing"]
    assert "none, blind, random with three seeds (2 here)" in missing.text
    assert "was not run unpruned" in findings.headline(few)
    assert "pool or downsample" in "".join(page_of(compared).text)


def test_a_task_that_a_blind_model_solves_is_called_so(compared):
    rows = rows_of(compared)
    assert not findings.findings(rows, 0.3)[0].is_warning
    level = [dataclasses.replace(r, difference=0, difference_low=-0.1, difference_high=0.1) for r in rows]
    (floors, *others) = findings.findings(level, 0.3)
    assert floors.is_warning
    assert "cannot tell methods apart" in floors.text
    assert any("Random tokens are among these" in f.text for f in others)
    lost = [dataclasses.replace(r, difference=-0.3, difference_low=-0.4, difference_high=-0.2) for r in rows]
    texts = [f.text for f in findings.findings(lost, 0.3)]
    assert any("All 3 methods differ measurably from unpruned" in text for text in texts)
    assert not any("No loss is seen" in text or "Random" in text for text in texts)
    pruned = [r for r in rows if r.method not in ("blind", "shuffled pictures")]
    assert "not known whether this task needs pictures" in findings.findings(pruned, None)[0].text


# ---- what went wrong


def test_pictures_are_of_questions_that_the_method_loses(compared):
    right: dict[str, dict[str, bool]] = defaultdict(dict)
    answers = {}
    for s in jsonl(compared / "samples.jsonl"):
        right[s["config"]][s["sample"]] = s["right"]
        answers[s["config"], s["sample"]] = s
    figures = page_of(compared).figures
    assert 0 < len(figures) <= losses.MAX_PICTURES
    assert {f["data-config"] for f in figures} <= {"random:seed=0@0.11", "vtc_cls@0.11", "fastv@0.11", "prumerge"}
    questions = {s.id: s.question for s in load_task("findit").samples()}
    for f in figures:
        config, sample = f["data-config"], f["data-sample"]
        assert right["none"][sample]
        assert not right[config][sample]
        text = "".join(f["text"])
        for part in (questions[sample], answers["none", sample]["answer"], answers[config, sample]["expected"]):
            assert part in text
        assert answers[config, sample]["answer"] in text
        assert len(f["images"]) == 2
        for source in f["images"]:
            assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    lost = [sum(right["none"][s] and not r for s, r in right[c].items()) for c in ("random:seed=0@0.11", "prumerge")]
    won = [sum(r and not right["none"][s] for s, r in right[c].items()) for c in ("random:seed=0@0.11", "prumerge")]
    text = "".join(page_of(compared).text)
    assert f"random:seed=0, keep 0.11: {lost[0]} of 24 lost, {won[0]} won" in text
    assert f"prumerge: {lost[1]} of 24 lost, {won[1]} won" in text
    shown = [f["data-sample"] for f in figures if f["data-config"] == "random:seed=0@0.11"]
    assert shown == sorted(shown, key=lambda s: zlib.crc32(s.encode()))


def test_pictures_show_the_tokens_of_the_run(compared):
    """Drawn again from the seed of the run: bright cells are what the method keeps for this very question."""
    runner = Runner.load(path_of("tiny-llava"))
    task = load_task("findit")
    samples = {s.id: s for s in task.samples()}
    figure = next(f for f in page_of(compared).figures if f["data-config"] == "random:seed=0@0.11")
    sample = samples[figure["data-sample"]]
    text = [runner.prompt(sample.question)]
    inputs = runner.processor(images=[task.image(sample.image_id)], text=text, return_tensors="pt")
    kept = {}
    for salt in (zlib.crc32(sample.id.encode()), 0):
        with tokprune.attach(runner.model, "random:seed=0", keep_ratio=0.11) as attachment:
            attachment.salts = [salt]
            runner.model(**inputs)
            kept[salt] = set(attachment.report.images[0].kept.tolist())
    seen, dimmed = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).convert("L"), dtype=float)
        for s in figure["images"]
    )
    edges = np.linspace(0, seen.shape[0], 13).round().astype(int)
    bright = {
        12 * i + j
        for i in range(12)
        for j in range(12)
        if (cell := np.s_[edges[i] + 3 : edges[i + 1] - 3, edges[j] + 3 : edges[j + 1] - 3])
        and dimmed[cell].mean() > 0.65 * seen[cell].mean()
    }
    assert bright == kept[zlib.crc32(sample.id.encode())] != kept[0]


def test_few_pictures_of_many_methods(compared):
    """Never more than the limit, each method at its smallest budget, floors and the bare model never."""
    run = report.Run.read(compared)
    found = losses.changes(run.samples)
    rows = [r for r in run.rows if r.config == "random:seed=0@0.11"]
    many = [dataclasses.replace(rows[0], method=f"method{i}") for i in range(30)]
    chosen = losses.shown(many, found)
    assert len(chosen) == 30
    assert [len(some) for _, some in chosen] == [1] * losses.MAX_PICTURES + [0] * 6
    some = losses.shown(run.rows, found)
    assert {r.method for r, _ in some} == {"random, 3 seeds", "vtc_cls", "fastv", "prumerge"}
    assert all(len(answers) <= losses.MAX_A_METHOD for _, answers in some)
    assert losses.shown([r for r in run.rows if r.method in ("none", "blind")], found) == []
    assert losses.changes([s for s in run.samples if s.config != "none"]) == {}


def test_heavy_pictures_are_left_out():
    big = "A" * (losses.MAX_BYTES // 4)
    pictures = {("t", "c", str(i)): losses.Picture("t", "c", str(i), "q", big, big) for i in range(3)}
    seen = [bool(p.seen) for p in report._within(pictures).values()]
    assert seen == [True, True, False]


# ---- the same again


def test_report_is_the_same_twice_and_without_the_model(copy, compared, monkeypatch):
    before = {name: (compared / name).read_bytes() for name in ("report.html", "table.md", "table.csv")}
    for name in before:
        (copy / name).unlink()
    monkeypatch.setattr(Runner, "load", None)  # nobody loads a model
    done = tokprune_cli("report", str(copy))
    assert done.returncode == 0, done.stderr
    assert {name: (copy / name).read_bytes() for name in before} == before
    page = tokprune_cli("report", str(copy), "--out", str(copy / "page.html"))
    assert page.returncode == 0
    assert (copy / "page.html").read_bytes() == before["report.html"]


def test_without_stored_pictures_the_page_says_so_and_pictures_can_be_drawn(copy, compared):
    (copy / "pictures.jsonl").unlink()
    assert tokprune_cli("report", str(copy)).returncode == 0
    page = page_of(copy)
    assert page.figures
    assert not any(f["images"] for f in page.figures)
    assert "written without the model" in "".join(page.text)
    done = tokprune_cli("report", str(copy), "--pictures")
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_bytes() == (compared / "report.html").read_bytes()


def test_overwriting_removes_reports_and_pictures(copy):
    """Pictures of the run before would pass for those of the new one, and its report until that is there."""
    assert {"report.html", "table.md", "table.csv", "pictures.jsonl"} <= {p.name for p in copy.iterdir()}
    RunFolder(copy, {}, overwrite=True).close()
    assert {p.name for p in copy.iterdir()} == {".lock", "run.json", "samples.jsonl", "times.jsonl"}


def state_of(folder: Path) -> dict:
    """Of every file and of the folder itself: bytes, and when they were changed."""
    return {p.name: (p.is_file() and p.read_bytes(), p.stat().st_mtime_ns) for p in (folder, *folder.iterdir())}


@pytest.mark.parametrize("what", ["nothing drawn", "drawn", "no tables there"])
def test_with_out_nothing_in_the_folder_changes(what, copy, compared, tmp_path):
    out = tmp_path / "elsewhere" / "page.html"
    out.parent.mkdir()
    if what != "nothing drawn":
        (copy / "pictures.jsonl").unlink()
    if what == "no tables there":
        for name in ("table.md", "table.csv", "report.html", "accuracy.png"):
            (copy / name).unlink()
    before = state_of(copy)
    pictures = ["--pictures"] if what == "drawn" else []
    done = tokprune_cli("report", str(copy), "--out", str(out), *pictures)
    assert done.returncode == 0, done.stderr
    assert state_of(copy) == before
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]
    assert (out.read_bytes() == (compared / "report.html").read_bytes()) == (what != "no tables there")
    assert "table" not in done.stdout


@pytest.mark.parametrize("name", report.FILES[:-1])
@pytest.mark.parametrize("linked", [False, True])
def test_a_file_of_the_run_is_not_written_over(name, linked, copy, tmp_path):
    out = copy / name
    if linked:
        out = tmp_path / "link.html"
        out.symlink_to(copy / name)
    before = state_of(copy)
    assert "use another file with --out" in refusal(tokprune_cli("report", str(copy), "--out", str(out)))
    assert state_of(copy) == before


# ---- texts that others wrote

FOLDER = "<b>a$\\q$ & |b"
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'x' </p></figure>\nsecond line \u202e\u05d0\u05d1\u05d2 漢字 \x01"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run on a folder of somebody's questions, in which pruning loses one with certainty."""
    folder = tmp_path_factory.mktemp("tasks") / FOLDER
    folder.mkdir()
    task = load_task("findit")
    lines = []
    for s in task.samples()[:40]:
        task.image(s.image_id).save(folder / f"{s.image_id}.png")
        lines.append({"file_name": f"{s.image_id}.png", "question": s.question, "answer": s.answer, "kind": "=<i>&"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path_factory.mktemp("hostile")
    command = ["compare", "--task", str(folder), "--methods", "none,random:seed=0", "--keep", "0.05", "--out", str(out)]
    done = tokprune_cli(*command)
    assert done.returncode == 0, done.stderr
    return out


def test_names_of_folders_and_kinds_are_escaped(hostile):
    page = page_of(hostile)
    assert_self_contained(page)
    assert not [t for t, _ in page.tags if t == "b"]
    assert FOLDER in "".join(page.text)
    assert (hostile / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "\\<b\\>a$\\\\q$ & \\|b" in (hostile / "table.md").read_text()
    done = tokprune_cli("report", str(hostile), "--pictures")
    assert "does not store the path of the task" in refusal(done)


def test_questions_and_answers_are_escaped_and_cut(hostile, tmp_path):
    out = Path(shutil.copytree(hostile, tmp_path / "out"))
    pictures = jsonl(out / "pictures.jsonl")
    assert len(pictures) >= 2
    pictures[0]["question"] = HOSTILE
    pictures[1]["question"] = "x" * 5000
    (out / "pictures.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pictures))
    lines = jsonl(out / "samples.jsonl")
    for line in lines:
        line["answer"] += HOSTILE + "\ud800"
    (out / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tokprune_cli("report", str(out)).returncode == 0
    page = page_of(out)
    assert_self_contained(page)
    text = "".join(page.text)
    assert HOSTILE.replace("\x01", "\ufffd") in text
    assert "\x01" not in text
    assert f"{'x' * 300} … (5,000 characters)" in text
    assert "x" * 301 not in text


# ---- exports


def test_csv_holds_every_figure_of_the_rows(compared):
    with (compared / "table.csv").open(newline="", encoding="utf-8") as file:
        floor, *lines = csv.DictReader(file)
    assert (floor["method"], floor["task"], floor["config"]) == ("question only", "findit", "")
    rows = rows_of(compared)
    assert [line["config"] for line in lines] == [r.config for r in rows]
    for line, row in zip(lines, rows, strict=True):
        fields = dataclasses.asdict(row)
        fields |= fields.pop("costs")
        assert set(line) == set(fields) | {"is_noise"}
        assert line["is_noise"] == ("" if row.difference is None else str(row.is_noise).lower())
        for name, value in fields.items():
            if value is None:
                assert line[name] == ""
            elif isinstance(value, dict):
                assert json.loads(line[name]) == value
            else:
                assert type(value)(line[name]) == value


def test_csv_is_no_formula():
    fields = dataclasses.asdict(Row.read(read_rows("compare-tiny-llava.jsonl")[-1]))
    row = Row.read({**fields, "task": "=HYPERLINK()", "model": "+1", "split": "@a", "difference": -0.5})
    (line,) = csv.DictReader(io.StringIO(csv_table([row], {})))
    assert (line["task"], line["model"], line["split"]) == ("'=HYPERLINK()", "'+1", "'@a")
    assert line["difference"] == "-0.5"  # a number stays one


def squeezed(text: str) -> str:
    """Without the padding of cells."""
    return re.sub(" +", " ", text)


def test_markdown_is_the_table_of_the_terminal(compared):
    text = (compared / "table.md").read_text()
    rows = pooled(rows_of(compared))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 3  # header, rule, question only
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    for row in rows:
        assert any(f"| {accuracy(row)} |".replace("[", "\\[").replace("]", "\\]") in squeezed(line) for line in lines)
    odd = dataclasses.replace(rows[0], task="a|b\n# c", method="x:y=`|`")
    assert "a\\|b \\# c" in (found := markdown_tables([odd], {}))
    assert "| x:y=\\`\\|\\` |" in squeezed(found)


# ---- points, fronts, plots


def row(method: str, cost: float, value: float, **more) -> Row:
    empty = dict.fromkeys(Row.__dataclass_fields__) | {"by_kind": {}, "task": "t", "model": "m", "n_samples": 10}
    costs = Costs(100, cost, 100, cost, 100, cost)
    counts = {
        "n_visual_mean": cost,
        "n_visual_after": cost / 2,
        "prefill_ms_p50": 2 * cost,
        "low": value,
        "high": value,
    }
    return Row(**{**empty, **counts, "method": method, "value": value, "costs": costs, **more})


def test_front_by_hand():
    a, b, c = row("a", 10, 0.5), row("b", 20, 0.7), row("c", 30, 0.7)  # c costs more than b for nothing
    d, e, f = row("d", 40, 0.6), row("e", 50, 0.9), row("f", 10, 0.4)  # d is worse and dearer; f worse at a's cost
    g = row("g", 20, 0.7)  # as good as b in both
    unknown = row("h", 1, 1.0, costs=Costs())
    found = pareto.front([e, d, c, g, b, a, f, unknown], pareto.LLM_FLOPS.of)
    assert [r.method for r in found] == ["a", "g", "b", "e"]
    assert pareto.front([], pareto.TOKENS.of) == []


def test_tokens_of_a_plot_are_the_mean_over_layers():
    assert pareto.TOKENS.of(row("a", 10, 0.5)) == 10


def test_methods_without_a_budget_are_points_and_floors_are_lines(compared):
    rows = rows_of(compared)
    names = [r.method for r in pareto.points(rows)]
    assert {"none", "prumerge", "random, 3 seeds"} <= set(names)
    assert not {"blind", "shuffled pictures"} & set(names)
    assert set(pareto.floors_of(rows, 0.3)) == {"question only", "blind", "shuffled pictures"}
    floors, axis = pareto.floors_of(rows, 0.3), pareto.PREFILL_FLOPS
    canvas = Figure().subplots()
    pareto._draw(canvas, rows, floors, axis, pareto.styles(rows))
    assert canvas.get_xlabel() == axis.label
    below, *budgets = (t.get_text().replace("\n", " ") for t in canvas.texts)
    assert below.startswith("below: question only 30 %, ")
    assert set(budgets) == {"0.5", "0.11"}
    bottom = canvas.get_ylim()[0]
    assert canvas.get_ylabel() == f"accuracy (the axis begins at {100 * bottom:.0f} %)"
    assert all(bottom < r.ends[0] for r in pareto.points(rows))
    expected = sorted((axis.of(r), r.value) for r in pareto.points(rows))
    marked = [line for line in canvas.lines if line.get_marker() not in ("None", "")]
    assert sorted(map(tuple, np.concatenate([line.get_xydata() for line in marked]))) == expected
    front = [(axis.of(r), r.value) for r in pareto.front(pareto.points(rows), axis.of)]
    (stepped,) = [line for line in canvas.lines if line.get_drawstyle() != "default"]
    assert list(map(tuple, stepped.get_xydata())) == front
    bars = sorted(tuple(bar[:, 1]) for lines in canvas.collections for bar in lines.get_segments())
    assert np.allclose(bars, sorted(r.ends for r in pareto.points(rows)))


def test_an_axis_from_zero_does_not_say_that_it_is_cut():
    rows = [dataclasses.replace(told("a", 0.03), low=0.0, n_visual_mean=10)]
    canvas = Figure().subplots()
    pareto._draw(canvas, rows, {}, pareto.TOKENS, pareto.styles(rows))
    assert canvas.get_ylabel() == "accuracy"


def test_budgets_are_written_once_for_points_beside_each_other():
    placed = [("0.5", 50, 0.9), ("0.5", 51, 0.95), ("0.5", 80, 0.7), ("", 52, 0.99), ("0.25", 51, 0.8)]
    assert pareto.budget_labels(placed, reach=2) == [("0.5", 51, 0.95), ("0.5", 80, 0.7), ("0.25", 51, 0.8)]
    assert pareto.budget_labels(placed, reach=30) == [("0.5", 51, 0.95), ("0.25", 51, 0.8)]
    assert pareto.budget_labels([("", 1, 1.0)], reach=2) == []


def test_labels_do_not_lie_on_each_other():
    """Letters of 1 x 10: the second goes below its point, the third has no room at all."""
    labels = [("aaaa", 10, 100), ("bbbb", 12, 101), ("cccc", 11, 101), ("dddd", 30, 100)]
    found = pareto.without_overlaps(labels, letter=1, line=10)
    assert found == [("aaaa", 10, 100, True), ("bbbb", 12, 101, False), ("dddd", 30, 100, True)]


def test_bands_and_lines_do_not_show_through_points():
    rows = [told("none", 0.9), told("uniform", 0.9, 0.0, 0.5)]
    for look in pareto.styles(rows).values():
        assert look.line["markerfacecolor"] not in ("none", None)


def test_plots_of_a_page_are_pictures(compared):
    rows = rows_of(compared)
    plots, legend = pareto.plots(rows, 0.3, pareto.styles(rows))
    assert list(plots) == list(pareto.COSTS)
    for plot in (*plots.values(), legend):
        with Image.open(io.BytesIO(base64.b64decode(plot.png))) as picture:
            assert picture.width > picture.height > 50
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert plots["prefill FLOPs"].front[-1] == "vtc_cls 0.5"
    assert pareto.plots([r for r in rows if r.method == "blind"], 0.3, {}) == ({}, None)


def test_costs_that_are_not_known_have_no_plot():
    known = [row("none", 100, 0.9), row("a", 10, 0.5)]
    names = [axis.name for axis in pareto.axes_of(known)]
    assert names == ["prefill FLOPs", "LLM FLOPs", "prefill time", "visual tokens"]
    assert pareto.axes_of(known)[2] is pareto.MILLISECONDS
    related = [dataclasses.replace(r, prefill_ratio=0.5) for r in known]
    assert pareto.axes_of(related)[2] is pareto.TIME
    one_without = [known[0], dataclasses.replace(known[1], costs=Costs(), prefill_ms_p50=float("nan"))]
    assert [axis.name for axis in pareto.axes_of(one_without)] == ["visual tokens"]


def test_rows_without_costs_make_a_page(copy):
    lines = jsonl(copy / "rows.jsonl")
    for line in lines:
        if "costs" in line:
            line["costs"] = dict.fromkeys(line["costs"])
            line["prefill_ratio"] = None
    (copy / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tokprune_cli("report", str(copy)).returncode == 0
    page = page_of(copy)
    text = " ".join("".join(page.text).split())
    assert "There is no plot against prefill FLOPs or LLM FLOPs: it is not known for every configuration." in text
    header = page.tables["configurations"][0]
    assert "LLM FLOPs" not in header
    assert "prefill ms" in header
    pareto.write_png([Row.read(x) for x in lines if "costs" in x], {}, copy / "plot.png")
    assert (copy / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_floors_alone_make_a_page_without_plots(copy):
    floors = [line for line in jsonl(copy / "rows.jsonl") if line["method"] in ("blind", "question only")]
    (copy / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in floors))
    assert tokprune_cli("report", str(copy)).returncode == 0
    text = "".join(page_of(copy).text)
    assert "there is nothing to plot" in text
    assert "was not run unpruned" in text
    pareto.write_png([Row.read(line) for line in floors if "costs" in line], {}, copy / "none.png")
    assert not (copy / "none.png").exists()


def test_forty_eight_methods_look_different_and_controls_are_grey():
    rows = [row(f"method{i}", i + 1, 0.5) for i in range(48)]
    rows += [row(name, 5, 0.5) for name in ("none", "uniform", "pool:a=1", "downsample", "random")]
    looks = pareto.styles(rows)
    assert len(set(looks.values())) == len(rows)
    greys = {name for name, look in looks.items() if look.colour == pareto._GREY}
    assert greys == {"none", "uniform", "pool:a=1", "downsample", "random"}
    controls = {name for name in METHODS.own_names() if not tokprune.get_method(name).source}
    assert controls <= {*tables.CONTROLS, *tables.FLOORS}


# ---- folders that are no run


BAD_RUNS = {
    "no folder": (lambda f: shutil.rmtree(f), "holds no run"),
    "no settings": (lambda f: (f / "run.json").unlink(), "name the folder that tokprune compare --out wrote"),
    "broken settings": (lambda f: (f / "run.json").write_text("{oops"), "--overwrite"),
    "settings of another kind": (lambda f: (f / "run.json").write_text("[1]"), "--overwrite"),
    "not finished": (lambda f: (f / "rows.jsonl").unlink(), "is not finished"),
    "empty": (lambda f: (f / "rows.jsonl").write_text(""), "holds no configuration"),
    "broken row": (lambda f: (f / "rows.jsonl").write_text('{"method": "a"}\n'), "holds no configuration"),
    "no object": (lambda f: (f / "rows.jsonl").write_text("3\n"), "holds no configuration"),
    "text for a number": (
        lambda f: (f / "rows.jsonl").write_text(
            re.sub(r'(?<="low": )([\d.]+)', r'"\1"', (f / "rows.jsonl").read_text())
        ),
        "holds no configuration",
    ),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_folder_that_is_no_run_is_refused_in_one_line(copy, what):
    spoil, message = BAD_RUNS[what]
    spoil(copy)
    before = {p.name: p.read_bytes() for p in copy.iterdir()} if copy.exists() else {}
    assert message in refusal(tokprune_cli("report", str(copy)))
    assert ({p.name: p.read_bytes() for p in copy.iterdir()} if copy.exists() else {}) == before


def test_file_that_cannot_be_written_is_one_line(copy):
    assert "use another file with --out" in refusal(tokprune_cli("report", str(copy), "--out", "/no/such/a.html"))


def test_pictures_of_another_model_are_refused(copy):
    settings = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**settings, "weights": "0"}))
    assert "the weights of tiny-llava changed since the run" in refusal(tokprune_cli("report", str(copy), "--pictures"))
    with pytest.raises(RunError, match="the prompt of"):
        runner = Runner.load(path_of("tiny-llava"))
        losses.Artist.of_settings(runner, {**settings, "prompt": "0"})


def test_question_that_is_gone_and_method_that_fails_are_named_beside_the_rest(compared):
    task = load_task("findit")
    artist = losses.Artist(Runner.load(path_of("tiny-llava")), [(task, task.samples())])
    answer = next(s for s in report.Run.read(compared).samples if s.config == "vtc_cls@0.11")
    assert "does not have this question any more" in artist.draw(dataclasses.replace(answer, sample="?")).why
    assert "does not have this question any more" in artist.draw(dataclasses.replace(answer, expected="?")).why
    assert "it could not be drawn: " in artist.draw(dataclasses.replace(answer, method="no_such")).why
    assert artist.draw(answer).seen


def test_budgets_in_words():
    half, flops = row("a", 10, 0.5, keep_ratio=0.5), row("a", 10, 0.5, flops_ratio=0.5)
    assert [findings.in_words(budget(r)) for r in (half, flops, row("a", 10, 0.5))] == ["keep 0.5", "FLOPs 0.5", ""]


def told(method: str, value: float, difference: float | None = None, keep: float | None = None) -> Row:
    """A row of 800 questions whose difference is known to two points."""
    empty = {**dict.fromkeys(Row.__dataclass_fields__), "by_kind": {}, "costs": Costs(), "n_samples": 800}
    known = {"model": "m", "task": "t", "method": method, "value": value, "low": value - 0.02, "high": value + 0.02}
    spread = {} if difference is None else dict(difference_low=difference - 0.02, difference_high=difference + 0.02)
    return Row(**empty | known | spread | {"difference": difference, "keep_ratio": keep})


@pytest.mark.parametrize(
    ("blind", "question_only", "says"),
    [
        (0.2, 0.3, "is clearly better"),
        (
            0.59,
            0.3,
            "is seen between the unpruned model and blind. So this task cannot tell methods apart",
        ),
        (0.8, 0.3, "is not measurably better than blind. So this task cannot tell methods apart"),
        (
            0.2,
            0.9,
            "is not measurably better than the most frequent training answer. So this task cannot tell methods apart",
        ),
        (0.2, 0.59, "is not measurably better than the most frequent training answer"),
    ],
)
def test_floors_that_the_unpruned_model_does_not_pass_are_a_warning(blind, question_only, says):
    floors = findings.findings([told("none", 0.6), told("blind", blind, blind - 0.6)], question_only)[0]
    assert says in floors.text
    assert floors.is_warning == (blind != 0.2 or question_only > 0.3)


def test_methods_better_than_unpruned_are_named_and_nearest_is_nearest():
    bare = [told("none", 0.6), told("blind", 0.2, -0.4)]
    apart = findings.findings([*bare, told("a", 0.75, 0.15, 0.25), told("b", 0.55, -0.05, 0.25)], None)[1].text
    assert "The nearest is b with 55.0" in apart
    assert apart.endswith("Measurably better than unpruned: a.")
    one = findings.findings([*bare, told("a", 0.75, 0.15, 0.25), told("b", 0.59, -0.01, 0.25)], None)[1].text
    assert one.startswith("No loss is seen with b with ")
    assert one.endswith("Measurably better than unpruned: a.")


# ---- the verdict, by hand


def priced(method: str, prefill: float, low: float | None, keep: float | None = 0.25, llm: float = 30, **more) -> Row:
    """A row of 800 questions that spends so many of 100 prefill FLOPs and may lose `-low` points of a hundred."""
    costs = Costs(100, llm, 100, prefill, 100, 29)
    spread = {} if low is None else dict(difference=low + 0.02, difference_low=low, difference_high=low + 0.04)
    return dataclasses.replace(
        told(method, 0.8, None, keep), **{"costs": costs, "n_visual_mean": prefill} | spread | more
    )


BARE = dataclasses.replace(told("none", 0.9), costs=Costs(100, 100, 100, 100, 100, 100))


def test_the_cheapest_that_is_safe_is_recommended():
    dear, cheap, lossy = priced("a", 60, -0.01, 0.5), priced("b", 48, -0.05), priced("c", 40, -0.051, 0.11)
    controls = [priced(name, 1, 0.0) for name in ("random", "uniform", "pool:a=1", "downsample", "blind")]
    rows = [BARE, dear, cheap, lossy, *controls]
    assert findings.recommended(rows) is cheap  # c may lose 5.1 points
    assert findings.recommended(rows, points=5.2) is lossy
    assert findings.recommended(rows, points=4) is dear
    assert findings.recommended(rows, points=0.5) is None
    assert findings.recommended([BARE, cheap, priced("d", 48, -0.03)]).method == "d"  # as cheap, and may lose less
    assert findings.recommended([BARE, *controls]) is None
    assert findings.recommended([BARE, priced("e", 48, None)]) is None  # not compared with the unpruned run


def test_without_known_flops_the_fewest_tokens_are_the_cheapest():
    a, b = (priced(name, tokens, -0.01, costs=Costs()) for name, tokens in (("a", 60), ("b", 40)))
    assert findings.recommended([BARE, a, b]) is b
    assert findings.verdict([BARE, a, b], None).startswith("Use b at 0.25: loses at most 1.0 points (")


def test_the_verdict_is_a_sentence():
    rows = [BARE, told("blind", 0.3, -0.6), priced("vtc_cls", 48, -0.043, prefill_ratio=0.43)]
    assert findings.verdict(rows, 0.3) == (
        "Use vtc_cls at 0.25: prefill FLOPs x 0.48, KV x 0.29, time x 0.43; loses at most 4.3 points (the cheapest "
        "of those that lose at most 5, at 95 %)."
    )
    better = priced("a", 48, 0.01, None, prefill_ratio=None)
    assert findings.verdict([BARE, better], None).startswith(
        "Use a: prefill FLOPs x 0.48, KV x 0.29; loses at most 0.0"
    )


def test_without_a_safe_method_the_verdict_says_so():
    rows = [BARE, priced("a", 48, -0.08), priced("b", 60, -0.063, 0.5), priced("uniform", 40, 0.0)]
    assert findings.verdict(rows, None) == (
        "No method is safe at 5 points (95 %): the nearest, b at 0.5, may lose 6.3. More questions narrow this; a "
        "larger budget loses less."
    )
    assert findings.verdict([BARE, priced("uniform", 40, 0.0)], None) == ""


def test_a_task_without_need_of_pictures_recommends_nothing():
    rows = [BARE, told("blind", 0.89, -0.01), priced("a", 48, -0.01)]
    assert findings.verdict(rows, None).startswith("No method can be recommended: ")


def test_unequal_costs_at_one_budget_are_said():
    before, between = priced("vtc_cls", 48, -0.01, llm=27), priced("fastv", 60, -0.01, llm=44)
    said = findings.unequal([BARE, before, between, priced("c", 60, -0.01, 0.5, llm=90)])
    assert said == (
        "Equal budgets are not equal costs: at keep 0.25, fastv spends LLM FLOPs x 0.44 and vtc_cls x 0.27. To compare "
        "at equal FLOPs, use --match flops."
    )
    assert findings.unequal([before, priced("fastv", 60, -0.01, llm=29.7)]) == ""  # 10 % more
    assert findings.unequal([before, priced("fastv", 60, -0.01, llm=29.8)])
    assert findings.unequal([before, priced("fastv", 60, -0.01, 0.5, llm=44)]) == ""  # at another budget
    assert findings.unequal([before, priced("prumerge", 60, -0.01, None, llm=44)]) == ""  # has no budget
    matched = [dataclasses.replace(r, keep_ratio=None, flops_ratio=0.5) for r in (before, between)]
    assert findings.unequal(matched) == ""
    assert findings.unequal([before, dataclasses.replace(between, costs=Costs())]) == ""


def test_losses_in_words():
    seen, unseen = told("a", 0.8, -0.041), told("a", 0.8, -0.01)
    assert tables.loss(seen) == "-4.1 points [-6.1, -2.1]"
    assert tables.loss(unseen) == "no loss seen; at most 3.0 points (95 %)"
    assert tables.loss(told("a", 0.8, 0.05)) == "+5.0 points [+3.0, +7.0]"
    assert tables.loss(told("none", 0.8)) == ""
    at_zero = dataclasses.replace(seen, difference=0.02, difference_low=0.0, difference_high=0.04)
    assert tables.loss(at_zero) == "no loss seen; at most 0.0 points (95 %)"


def test_the_terminal_and_the_page_end_with_the_verdict(compared):
    said = findings.verdict(rows_of(compared), 0.29)
    assert said in " ".join("".join(page_of(compared).text).split())
    assert findings.task_table("t", rows_of(compared), 0.29).notes[-1] == said
