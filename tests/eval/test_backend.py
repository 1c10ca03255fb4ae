"""The backend vllm of comparisons, where there is no engine: refusals, the order of questions, counts of pictures."""

from __future__ import annotations

from typing import ClassVar

import pytest
from commands import refusal, tokprune_cli
from tokprune.eval import api
from tokprune.eval.models import path_of
from tokprune.eval.run import served
from tokprune.eval.run.rows import Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import load_task
from tokprune.integrations.transformers import family_of
from tokprune.integrations.vllm import plan_of
from tokprune.integrations.vllm.engine import Reply
from transformers import AutoConfig

import tokprune
from tokprune.core.errors import RunError
from tokprune.core.layout import grid_layout

ASKED = dict(task="findit", methods=["vtc_cls"], keep=[0.25], limit=4)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(served, "refuse_without_vllm", lambda: None)
    monkeypatch.setattr(api, "refuse_without_vllm", lambda: None)


def test_without_vllm_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("tokprune.integrations.vllm.engine.release", lambda: None)
    with pytest.raises(RunError, match="pip install 'vllm==") as refused:
        tokprune.compare("tiny-llava", backend="vllm", out=tmp_path / "run", **ASKED)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [(["--backend", "sglang"], "use transformers or vllm"), (["--backend", "vllm", "--suite", "x"], "leave --backend")],
)
def test_backends_that_cannot_ask_are_refused(tmp_path, more, word):
    assert word in refusal(tokprune_cli("compare", "--out", str(tmp_path / "run"), *more))


def test_a_loaded_model_and_options_of_transformers_are_refused(installed):
    runner = Runner.load("tiny-llava")
    with pytest.raises(RunError, match="backend='transformers'"):
        tokprune.compare(runner.model, runner.processor, backend="vllm", **ASKED)
    with pytest.raises(RunError, match="leave --attn out"):
        tokprune.compare("tiny-llava", backend="vllm", attn="eager", **ASKED)


def test_processes_that_share_a_run_are_refused(installed, monkeypatch):
    monkeypatch.setattr(api.Processes, "started", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(RunError, match="without torchrun"):
        tokprune.compare("tiny-llava", backend="vllm", **ASKED)


def test_methods_that_vllm_cannot_serve_have_a_reason(installed):
    runner = served.ServedRunner.load("tiny-llava")
    asked = [Config("none"), Config("vtc_cls", 0.25), Config("fastv", 0.25), Config("cdpruner", 0.25)]
    reasons = runner.missing(asked)
    assert list(reasons) == ["fastv", "cdpruner"]
    assert "cuts between decoder layers" in reasons["fastv"]
    assert "reads the question" in reasons["cdpruner"]
    assert all("leave --backend vllm out" in reason for reason in reasons.values())


def test_budgets_of_flops_out_of_reach_have_a_reason(installed):
    runner, task = served.ServedRunner.load("tiny-llava"), load_task("findit")
    asked = [Config("vtc_cls", flops_ratio=ratio, flops_text=9) for ratio in (0.5, 0.001)]
    assert list(runner.out_of_reach(task, task.samples()[:2], asked)) == [asked[1].label]


def test_a_method_is_asked_about_all_batches_before_the_next(installed):
    runner = served.ServedRunner.load("tiny-llava")
    bare, half, quarter, other = Config("none"), Config("vtc_cls", 0.5), Config("vtc_cls", 0.25), Config("fopru", 0.5)
    todo = [(0, [half, bare, quarter]), (1, [quarter, bare, other])]
    found = runner.ordered(todo)
    assert found == [(0, [half, quarter]), (1, [quarter]), (0, [bare]), (1, [bare]), (1, [other])]
    assert runner.backend == "vllm"


N_TEXT = 7


class Told:
    """In place of an engine: says that it ran so many placeholders as it was told to, and notes what it was told."""

    alive: ClassVar[list[Told]] = []
    started: ClassVar[list] = []
    asked: ClassVar[list] = []

    def __init__(self, path, given, dtype):
        self.given, self.placeholder = given, AutoConfig.from_pretrained(path).image_token_id
        self.alive.append(self)
        self.started.append((given, dtype))

    def answer(self, prompts, pictures, budget, n_new):
        self.asked.append((self.given, budget, n_new))
        n = 144 if self.given is None else round(144 * budget["keep_ratio"])
        ids = [self.placeholder] * n + [5] * N_TEXT
        return [
            Reply(ids, list(range(3 + i)), stopped=bool(i), scheduled_s=1.0 + i, first_s=3.0 + i, last_s=8.0 + i)
            for i in range(len(prompts))
        ]

    def close(self):
        self.alive.remove(self)


def test_a_method_has_one_engine_and_what_it_ran_is_counted(installed, monkeypatch):
    for noted in (Told.alive, Told.started, Told.asked):
        noted.clear()
    monkeypatch.setattr(served, "Engine", Told)
    runner, task = served.ServedRunner.load("tiny-llava", max_new_tokens=6), load_task("findit")
    samples, family = task.samples()[:2], family_of(Runner.load("tiny-llava").model)
    configs = [Config("none"), Config("vtc_cls", 0.5), Config("vtc_cls", 0.25), Config("fopru", 0.5)]
    for config, n in zip(configs, (144, 72, 36, 72), strict=True):
        asked = runner.asked_about(task, samples, [s.image_id for s in samples], config)
        found = runner.replies(samples, config, asked)
        assert (found.n_kept, found.columns) == ([n, n], [[n + N_TEXT]] * 2)
        assert (found.tokens, found.stopped) == ([[0, 1, 2], [0, 1, 2, 3]], [False, True])
        assert (found.prefill_s, found.decode_s_per_token) == (3.0, pytest.approx(5 / 3))  # 4 - 1, (9 - 4) / 3
        assert len(Told.alive) == 1
        plan = None if config.method == "none" else runner.plan(config)
        layout = grid_layout(12, 12)
        assert [s.flops for s in found.spent] == [plan.spent(layout, family.shape).flops if plan else 0] * 2
    first = [None, {"method": "vtc_cls", "keep_ratio": 0.5}, {"method": "fopru", "keep_ratio": 0.5}]
    assert Told.started == [(given, "float32") for given in first]
    assert Told.asked == [
        (None, None, 6),
        *((first[1], {"keep_ratio": keep}, 6) for keep in (0.5, 0.25)),
        (first[2], {"keep_ratio": 0.5}, 6),
    ]
    runner.close()
    assert not Told.alive


@pytest.mark.parametrize(("model", "task"), [("tiny-llava", "findit"), ("tiny-llava-next", "findit_hd")])
def test_pictures_are_counted_without_weights_as_with_them(installed, model, task):
    ours, theirs, questions = served.ServedRunner.load(model), Runner.load(model), load_task(task)
    samples = questions.samples()[:3]
    ids = [s.image_id for s in samples]
    got, want = (runner.asked_about(questions, samples, ids) for runner in (ours, theirs))
    assert (got.columns, got.n_visual, got.crops) == (want.columns, want.n_visual, want.crops)
    assert all(p.is_meta for p in ours.model.parameters())
    assert ours.shape == theirs.shape


def test_selection_is_counted_where_the_engine_knows_no_shape():
    """DivPrune compares the 36 tokens of a picture with each other, at the width of the language model."""
    config = AutoConfig.from_pretrained(path_of("tiny-qwen"))
    plan = plan_of(config, {"method": "divprune", "keep_ratio": 0.25})
    shape = family_of(Runner.load("tiny-qwen").model).shape
    assert plan.family.shape is None
    assert plan.spent(grid_layout(6, 6), shape).flops == 2 * 36 * 36 * config.text_config.hidden_size
    assert plan.spent(grid_layout(6, 6), None).flops == 0
