"""What surrounds lmms-eval and needs none of it: arguments, scores, exports, rows. The rest is tests/integrations."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import tokprune_cli
from PIL import Image
from tokprune.eval.report import tables
from tokprune.eval.run import rows
from tokprune.eval.run.rows import Config
from tokprune.eval.suites import lmms
from tokprune.eval.suites import scores as lmms_scores
from tokprune.eval.suites.export import export, exported_name
from tokprune.eval.suites.lmms import Suite, reason
from tokprune.eval.suites.scores import Score, Source
from tokprune.eval.tasks import load_task
from tokprune.integrations.lmms_eval.options import Options, generation, merged, split_arguments
from tokprune.integrations.lmms_eval.prompts import pictures

import tokprune
from tokprune.core.errors import OptionError, RunError, TaskError


def test_without_lmms_eval_the_command_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    done = tokprune_cli("eval", "--suite", "lmms-eval", "--tasks", "findit", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tokprune: lmms-eval not installed; type pip install 'tokprune[lmms-eval]'")
    assert "--no-deps lmms-eval" in line
    assert not (tmp_path / "out").exists()


# ---- arguments


def test_specifications_survive_in_model_args():
    text = "pretrained=a/b,method=fastv:schedule=pyramid/2/4/6,keep_ratio=0.5,0.25, suffix= Be brief, please."
    text += ",dtype=float32"
    assert split_arguments(text) == {
        "pretrained": "a/b",
        "method": "fastv:schedule=pyramid/2/4/6",
        "keep_ratio": "0.5,0.25",
        "suffix": " Be brief, please.",
        "dtype": "float32",
    }
    options = Options.of(split_arguments(text))
    assert options.attach == {"keep_ratio": (0.5, 0.25)}
    assert Options.of({"pretrained": "a", "method": "vtc_cls", "keep_tokens": 64}).attach == {"keep_tokens": 64}
    for two in ("0.5/0.25", "0.5,0.25", "[0.5,0.25]", [0.5, 0.25], (0.5, 0.25)):
        assert Options.of({"pretrained": "a", "method": "fastv", "keep_ratio": two}).keep_ratio == (0.5, 0.25)
    assert Options.of({"pretrained": "a", "method": "fastv", "keep_tokens": "64/32"}).keep_tokens == (64, 32)
    as_none = Options.of({"pretrained": "a", "method": "fastv", "keep_ratio": "", "device": "none", "suffix": ""})
    assert as_none == Options("a", "fastv")
    values = Options.of({"pretrained": Path("a"), "batch_size": "8", "keep_ratio": 1, "method": "fastv"})
    assert (values.pretrained, values.batch_size, values.keep_ratio) == ("a", 8, 1)
    assert split_arguments("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrained", "'pretrained' in --model_args.*use name=value"),
        ("pretrained=a,pretrained=b", "twice"),
    ],
)
def test_malformed_model_args(text, message):
    with pytest.raises(OptionError, match=message):
        split_arguments(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "use --model_args pretrained="),
        ({"pretrained": "a", "keep": "0.25"}, r"keep_ratio=0\.25 or keep_tokens=64"),
        ({"pretrained": "a", "keep_ration": "0.25"}, "Did you mean 'keep_ratio'"),
        ({"pretrained": "a", "start_layer": "2"}, "method=vtc_cls:start_layer=2"),
        ({"pretrained": "a", "trust_remote_code": "true"}, "leave trust_remote_code out"),
        ({"pretrained": "a", "keep_ratio": "a lot", "method": "vtc_cls"}, r"a lot.*use keep_ratio=0\.25 or 0\.5/0\.25"),
        ({"pretrained": "a", "keep_ratio": "0.5/x", "method": "vtc_cls"}, r"use keep_ratio=0\.25"),
        ({"pretrained": "a", "keep_tokens": "1.5", "method": "vtc_cls"}, "use keep_tokens=64"),
        ({"pretrained": "a", "flops_ratio": "x", "method": "vtc_cls"}, r"use flops_ratio=0\.3"),
        ({"pretrained": "a", "flops_text": "x", "method": "vtc_cls"}, "use flops_text=64"),
        ({"pretrained": "a", "positions": "gaps", "method": "vtc_cls"}, "'contiguous', 'original'"),
        ({"pretrained": "a", "newlines": "some", "method": "vtc_cls"}, "'keep', 'drop', 'auto'"),
        ({"pretrained": "a", "batch_size": "auto"}, "use batch_size=8"),
        ({"pretrained": "a", "batch_size": 0}, "use batch_size=1 or more"),
        ({"pretrained": "a", "max_new_tokens": "2.0"}, "use max_new_tokens=16"),
        ({"pretrained": "a", "dtype": "float23"}, "use dtype=bfloat16"),
        ({"pretrained": "a", "keep_ratio": "0.25"}, "method=vtc_cls,keep_ratio=0.25"),
        ({"pretrained": "a", "method": "vtc"}, "Did you mean 'vtc_cls'"),
        ({"pretrained": "a", "method": "vtc_cls:x=1"}, "no option 'x'"),
    ],
)
def test_wrong_arguments_say_what_to_type(given, message):
    with pytest.raises(tokprune.TokPruneError, match=message) as error:
        Options.of(given)
    assert len(str(error.value).splitlines()) == 1


def test_flags_and_arguments_may_not_differ():
    assert merged({"batch_size": "8"}, {"batch_size": 1, "device": None}) == {"batch_size": "8"}
    assert merged({"a": "b"}, {"batch_size": "4", "device": "cpu"}) == {"a": "b", "batch_size": "4", "device": "cpu"}
    assert merged({"device": "cpu"}, {"device": "cpu"}) == {"device": "cpu"}
    with pytest.raises(OptionError, match="--device cuda and device=cpu.*leave one out"):
        merged({"device": "cpu"}, {"device": "cuda"})
    with pytest.raises(OptionError, match="use --batch_size 8"):
        merged({}, {"max_batch_size": 64})


def test_generation_settings_are_read_as_lmms_evals_own_models_read_them():
    greedy = {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert generation({}, 16, "</s>") == (greedy, [])
    assert generation({"temperature": 0, "top_p": None, "image_aspect_ratio": "pad"}, 16, "</s>") == (greedy, [])
    assert generation({"temperature": 0.7, "do_sample": False}, 16, "</s>") == (greedy, [])
    assert generation({"until": ["</s>", "", "\n\n"]}, 16, "</s>")[1] == ["\n\n"]
    sampled = {"temperature": 0.7, "top_p": 0.9, "num_beams": 2, "max_new_tokens": 3, "repetition_penalty": 1.1}
    assert generation(sampled, 16, "</s>")[0] == {**sampled, "do_sample": True}


LISTS = ([], [3], {}, (1, 2))
WORDS = ("a lot", "3.5.1", "9" * 5000)
BROKEN = {
    "max_new_tokens": (*LISTS[1:2], *WORDS, -1, 1.5, "1.5", True, "nan", float("inf"), 10**400),
    "num_beams": (*LISTS[1:2], *WORDS, -1, 1.5, True, 10**400),
    "temperature": (*LISTS[1:2], *WORDS[:2], -1, True, "nan", float("inf"), 10**400),
    "top_p": (*LISTS, *WORDS[:2], -0.1, 1.1, True, "nan"),
    "top_k": (*LISTS, *WORDS, -1, 0.5, True, 10**400),
    "repetition_penalty": (*LISTS, *WORDS[:2], 0, -1, True, "nan", float("inf")),
    "length_penalty": (*LISTS, *WORDS[:2], True, "nan", float("inf")),
    "no_repeat_ngram_size": (*LISTS, *WORDS, -1, 0.5, True),
    "do_sample": (*LISTS, *WORDS[:2], 3, 0.5),
    "until": (3, True, 0.5, [3], {"a": 1}, ["a", None]),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BROKEN.items() for v in values])
def test_generation_settings_of_a_wrong_type_are_one_line(name, value):
    given = {"temperature": 0.5, name: value}
    with pytest.raises(RunError, match=rf"^{name}=.*--gen_kwargs.*use --gen_kwargs {name}=") as error:
        generation(given, 16, "</s>")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400


def test_generation_settings_as_texts_are_read():
    texts = {"max_new_tokens": "3", "num_beams": "2", "temperature": "0.5", "top_p": "1", "top_k": 5.0}
    texts |= {"repetition_penalty": "1.5", "no_repeat_ngram_size": "0", "do_sample": "true", "until": "x"}
    numbers = {"max_new_tokens": 3, "num_beams": 2, "temperature": 0.5, "top_p": 1.0, "top_k": 5}
    numbers |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 0, "do_sample": True}
    assert generation(texts, 16, "</s>") == (numbers, ["x"])
    assert not generation({**texts, "do_sample": "false"}, 16, "</s>")[0]["do_sample"]
    assert generation({"max_new_tokens": 0, "num_beams": None}, 16, "</s>")[0]["max_new_tokens"] == 16


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize("name", ["method", "pretrained"])
def test_a_blank_name_is_not_taken_for_none(name, blank):
    with pytest.raises(OptionError, match=f"use .*{name}="):
        Options.of({"pretrained": "a", name: blank})


def test_pictures_of_documents():
    grey = Image.new("L", (4, 4))
    assert [p.mode for p in pictures([[grey], None, [grey]], "t")] == ["RGB", "RGB"]
    assert pictures(None, "t") == []


def test_reasons_are_found_in_the_output():
    assert reason("a\ntokprune: do this.\nb") == "do this"
    assert reason("\x1b[31mError during evaluation: too\nbad. Please set `--verbosity=DEBUG`\x1b[0m") == "too bad"
    assert reason("Traceback\nlmms_eval.Strange: x\npkg.SomeError: why\n") == "pkg.SomeError: why"
    assert reason("1%\r2%\nKilled\n\n") == "Killed"
    assert reason("") == ""


def test_the_command_starts_several_processes(tmp_path):
    command = Suite("tiny-llava", ["pope"], [], processes=2, limit=4, gen_kwargs="num_beams=2").command(
        Config("fastv", flops_ratio=0.5, flops_text=64), tmp_path, None
    )
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    assert f"method=fastv,flops_ratio=0.5,flops_text=64,record={tmp_path}" in " ".join(command)
    assert " ".join(command[-4:]) == "--limit 4 --gen_kwargs num_beams=2"


def test_nothing_to_export_is_an_error(tmp_path, folder):
    task = load_task(str(folder))
    assert exported_name(task).startswith("tokprune_")  # lmms-eval would take its own task of that name
    with pytest.raises(RunError, match="no questions"):
        export(task, [], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        export(task, task.samples(), tmp_path / "file")


# ---- numbers


def test_intervals_by_the_kind_of_metric():
    share = Score(0.5, None, {0: 1, 1: 0})
    assert share.interval[:2] == pytest.approx(lmms_scores.wilson(1, 2))
    percent = Score(50.0, None, {0: 1, 1: 0})
    assert percent.interval == pytest.approx(tuple(100 * v for v in share.interval))
    graded = Score(0.5, 9.0, {0: 0.25, 1: 0.75, 2: 0.5})
    error = 0.25 / 3**0.5
    assert graded.interval == pytest.approx((0.5 - 1.959964 * error, 0.5 + 1.959964 * error, error), abs=1e-6)
    assert Score(0.7, 0.1, {}).interval == pytest.approx((0.7 - 0.1959964, 0.7 + 0.1959964, 0.1), abs=1e-6)
    assert Score(1500.0, None, {}).interval == (None, None, None)


def test_values_are_taken_where_the_metric_is_their_mean():
    by_doc = {i: [{"acc": v, "f1": {"score": v}, "text": "a"}] for i, v in enumerate((1.0, 0.0, 1.0, 1.0))}
    numbers = {
        "alias": "x",
        "acc,none": 0.75,
        "acc_stderr,none": 0.2,
        "acc_stderr_clt,none": 0.2,
        "percent,none": 75.0,
        "f1,none": 0.6,
        "f1_stderr,none": "N/A",
        "text,none": "submitted",
        "acc,strict": 0.75,
    }
    scores = lmms_scores._scores(numbers, by_doc)
    assert set(scores) == {"acc", "percent", "f1", "acc (strict)"}
    assert scores["acc"] == Score(0.75, 0.2, {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0})
    assert scores["f1"] == Score(0.6, None, {})  # no mean of scores
    assert scores["percent"].values == {}
    several = {doc: group * 2 for doc, group in by_doc.items()}  # two filters: a line each, and no names
    assert lmms_scores._scores(numbers, several)["acc"].values == {}


def test_differences_by_the_kind_of_metric():
    bare, pruned = Score(0.5, None, {0: 1, 1: 0, 2: 1, 3: 0}), Score(0.25, None, {0: 1, 1: 0, 2: 0, 3: 0})
    found = lmms_scores._difference(pruned, bare)
    assert found["difference"] == -0.25
    assert found["p_value"] == 1
    graded = Score(0.5, None, {0: 0.5, 1: 0.25, 2: 1.0, 3: 0.25})
    found = lmms_scores._difference(graded, bare)
    assert found["difference"] == 0
    assert found["difference_low"] == -found["difference_high"] < 0
    assert "p_value" not in found
    assert lmms_scores._difference(Score(1500.0, None, {}), Score(1600.0, None, {})) == {}
    assert lmms_scores._difference(Score(7, None, {0: 7}), Score(6, None, {0: 6})) == {}
    assert lmms_scores._difference(Score(0.5, None, {0: 0.5}), Score(1, None, {0: 1})) == {}


def test_a_folder_of_results_is_no_task(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pope", "own"):
        (tmp_path / name).mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    suite = Suite("tiny-llava", ["pope", "own", "mme"], [])
    assert list(suite.own) == ["own"]
    assert [suite.name_of(task) for task in suite.tasks] == ["pope", "tokprune_own", "mme"]
    with pytest.raises(TaskError, match=r"has no metadata\.jsonl"):
        Suite("tiny-llava", [str(tmp_path / "pope")], [])


def test_weights_tell_models_apart(tmp_path):
    assert lmms._weights(Path("no/such/hub-id")) is None
    (tmp_path / "a").write_bytes(b"1" * 10)
    first = lmms._weights(tmp_path)
    (tmp_path / "a").write_bytes(b"2" * 10)
    assert lmms._weights(tmp_path) != first


def test_rows_without_an_interval_and_beyond_one_are_shown_and_pooled():
    row = dict.fromkeys(rows.Row.__dataclass_fields__, 0)
    row |= {"task": "mme", "n_samples": 10, "by_kind": {}, "costs": rows.Costs(), "low": None, "high": None}
    seeds = [rows.Row(**{**row, "method": f"random:seed={i}", "value": 1500 + i}) for i in range(2)]
    assert tables.accuracy(seeds[0]) == "1500.000"
    (pooled,) = rows.pooled(seeds)
    assert (pooled.value, pooled.low, pooled.high) == (1500.5, None, None)
    seeds = [rows.Row(**{**vars(s), "low": s.value - 10, "high": s.value + 10}) for s in seeds]
    (pooled,) = rows.pooled(seeds)
    assert (pooled.low, pooled.high) == (1490.5, 1510.5)


def test_every_metric_of_a_task_has_rows_of_its_own_and_a_place_in_the_report(tmp_path):
    """A share, and a score without an interval: tables, plots and the page take both."""
    line = {
        **{"request": "generate_until", "answer": "yes", "stopped": True, "n_images": 1, "batch_size": 1, "rank": 0},
        **{"n_visual_before": 10, "n_visual_after": 5, "n_visual_mean": 5.0, "costs": asdict(rows.Costs())},
        **{"llm_columns_before": 12, "llm_columns_after": 7, "prefill_s": 0.1, "decode_s_per_token": None},
        **dict.fromkeys(("revision", "gpu", "peak_bytes")),
        **dict.fromkeys(("device", "dtype", "attn_implementation", "positions", "torch", "transformers"), "x"),
        **{"tokprune": "x", "date": "2026-01-01"},
    }
    found = {}
    for config, right in ((Config("none"), (1.0, 1.0)), (Config("vtc_cls", 0.5), (1.0, 0.0))):
        values = dict(enumerate(right))
        result = lmms_scores.TaskResult(
            name="pope",
            split="test",
            scores={"acc": Score(sum(right) / 2, None, values), "f1": Score(0.9, None, {})},
            answers={doc: ("yes", "yes") for doc in values},
            records={doc: [{**line, "batch": doc}] for doc in values},
        )
        found[config] = [result]
    made = lmms_scores.rows("m", found, {})
    assert [(r.task, r.metric, r.value) for r in made] == [
        ("pope", "acc", 1),
        ("pope, f1", "f1", 0.9),
        ("pope", "acc", 0.5),
        ("pope, f1", "f1", 0.9),
    ]
    assert [r.difference for r in made] == [None, None, -0.5, None]
    assert made[1].ends == (0.9, 0.9)
    samples = [row for config, (r,) in found.items() for row in lmms_scores.sample_rows(config, r, Source("pope"))]
    for name, written in (("rows.jsonl", made), ("samples.jsonl", samples)):
        (tmp_path / name).write_text("".join(json.dumps(asdict(row)) + "\n" for row in written))
    (tmp_path / "times.jsonl").write_text("")
    (tmp_path / "run.json").write_text("{}")
    done = tokprune_cli("report", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "pope, f1" in (tmp_path / "report.html").read_text()
