"""The harness: tasks, subsets, answers, intervals, the command line; with the embedded model where it matters."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch
from tokprune.eval import compare
from tokprune.eval import stats as intervals
from tokprune.eval.models import EMBEDDED
from tokprune.eval.run import rows
from tokprune.eval.run.rows import Config
from tokprune.eval.run.runner import EMBEDDED_MODEL, Runner, _other_pictures
from tokprune.eval.tasks import Sample, load_task, stratified
from tokprune.eval.tasks.findit import KINDS, FindIt, draw

import tokprune
from tokprune.core.errors import TaskError, UnknownNameError

# ---- tasks


def test_findit_is_the_same_everywhere():
    """Pixels and questions are frozen: a number measured on them means the same next year."""
    image, shapes = draw("test", 7)
    assert image.shape == (96, 96, 3)
    assert int(image.astype(int).sum()) == FROZEN["pixels"]
    assert [s.question for s in FindIt(n_scenes=2).samples()] == FROZEN["questions"]
    assert len(shapes) == FROZEN["shapes"]


FROZEN = {
    "pixels": 5169306,
    "questions": [
        "what color is the square?",
        "what shape is blue?",
        "is there a yellow triangle?",
        "how many yellow shapes are there?",
        "where is the yellow square?",
        "what color is the cross?",
        "what shape is purple?",
        "is there a red square?",
        "how many crosses are there?",
        "where is the purple circle?",
    ],
    "shapes": 3,
}


def test_findit_answers_are_true():
    """Every question, answered again from the shapes by other code."""
    words = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross", "rings": "ring"}
    for s in FindIt(n_scenes=200).samples():
        _, shapes = draw("test", int(s.image_id.split("-")[1]))
        asked = s.question.rstrip("?").split()
        if s.kind == "colour":
            assert [o.colour for o in shapes if o.kind == asked[-1]] == [s.answer]
        elif s.kind == "shape":
            assert [o.kind for o in shapes if o.colour == asked[-1]] == [s.answer]
        elif s.kind == "existence":
            assert any((o.colour, o.kind) == (asked[-2], asked[-1]) for o in shapes) == (s.answer == "yes")
        elif s.kind == "count":
            name = asked[2]
            matches = [o for o in shapes if words.get(name, name) in (o.kind, o.colour)]
            assert len(matches) == int(s.answer)
        else:
            (shape,) = [o for o in shapes if (o.colour, o.kind) == (asked[-2], asked[-1])]
            vertical, horizontal = s.answer.split()
            assert (vertical == "top") == (shape.y < 48)
            assert (horizontal == "left") == (shape.x < 48)


def test_findit_splits_are_different_scenes():
    assert not (draw("train", 0)[0] == draw("test", 0)[0]).all()


def test_easyvqa_is_the_packages_own_test_split():
    samples = load_task("easyvqa").samples()
    assert len(samples) == 9673
    assert collections.Counter(s.kind for s in samples)["yes/no"] == 7136
    assert load_task("easyvqa").image(samples[0].image_id).size == (64, 64)


@pytest.mark.parametrize("name", ["findit", "easyvqa"])
def test_subset_is_stratified_and_stable(name):
    samples = load_task(name).samples()
    subset = stratified(samples, 800)
    assert len(subset) == len({s.id for s in subset}) == 800
    assert subset == stratified(list(reversed(samples)), 800)[::-1]
    share = collections.Counter(s.kind for s in samples)
    for kind, n in collections.Counter(s.kind for s in subset).items():
        assert abs(n - 800 * share[kind] / len(samples)) < 1
    published = (Path(compare.__file__).parent / "tasks" / f"subset-{name}.txt").read_text().split()
    assert [s.id for s in subset] == published


def test_stratified_takes_all_when_asked_for_more():
    samples = [Sample(str(i), "a", "q", "a") for i in range(3)]
    assert stratified(samples, 5) == samples


def test_folder_is_a_task(folder):
    task = load_task(str(folder))
    assert [s.answer for s in task.samples()] == ["red", "green", "blue"]
    assert task.image("1.png").size == (60, 40)
    assert task.train_samples() is None


BAD_FOLDERS = {
    "no metadata": (lambda f: (f / "metadata.jsonl").unlink(), "has no metadata.jsonl"),
    "empty metadata": (lambda f: (f / "metadata.jsonl").write_text(""), "has no line"),
    "no JSON": (lambda f: (f / "metadata.jsonl").write_text("{oops"), "line 1 is not JSON"),
    "no object": (lambda f: (f / "metadata.jsonl").write_text("[1]"), "line 1 is no JSON object"),
    "missing field": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png", "question": "q"}'),
        "line 1 lacks answer",
    ),
    "not UTF-8": (lambda f: (f / "metadata.jsonl").write_bytes(b'{"question": "\xff"}'), "is not UTF-8"),
    "placeholder": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png", "question": "<image> q", "answer": "a"}'),
        "leave <image> out",
    ),
    "missing picture": (lambda f: (f / "2.png").unlink(), 'line 3 names "2.png"'),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_folder_says_where(folder, what):
    spoil, message = BAD_FOLDERS[what]
    spoil(folder)
    with pytest.raises(TaskError, match=message):
        load_task(str(folder))


def test_unreadable_picture_says_which(folder):
    (folder / "1.png").write_bytes(b"not a picture")
    with pytest.raises(TaskError, match=r"cannot read the picture .*1\.png"):
        load_task(str(folder)).image("1.png")


def test_unknown_task_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'findit'"):
        load_task("findt")


# ---- answers and numbers


@pytest.mark.parametrize(
    ("text", "expected", "right", "words"),
    [
        ("top left", "top left", True, True),
        (" Top  LEFT.", "top left", True, True),
        ("red red", "red", False, True),
        ("reddish", "red", False, False),
        ("", "red", False, False),
    ],
)
def test_answers_are_compared_by_words(text, expected, right, words):
    sample = Sample("1", "a.png", "q", expected)
    assert (sample.is_right(text), sample.begins_right(text)) == (right, words)


def test_shuffled_pictures_are_other_pictures():
    samples = FindIt(n_scenes=6).samples()
    others = _other_pictures(samples)
    assert all(other != s.image_id for other, s in zip(others, samples, strict=True))
    assert set(others) <= {s.image_id for s in samples}


def test_question_only_floor_is_the_training_majority():
    class Toy:
        name = "toy"

        def train_samples(self):
            pairs = [("q", "a"), ("q", "a"), ("q", "b"), ("other", "c")]
            return [Sample(str(i), "x", q, a, "k") for i, (q, a) in enumerate(pairs)]

    samples = [Sample("1", "x", "q", "a", "k"), Sample("2", "x", "q", "b", "k"), Sample("3", "x", "new", "a", "k")]
    assert compare.question_only(Toy(), samples) == pytest.approx(2 / 3)


def test_grid_of_configurations():
    usual = EMBEDDED["tiny-llava"]
    grid = compare.configurations(usual.methods, usual.ratios)
    labels = [c.label for c in grid]
    assert len(labels) == len(set(labels)) == 2 + 1 + 4 * 3 + 3 * 3
    assert "random:seed=2@0.11" in labels
    assert compare.configurations(["vtc_cls:start_layer=2"], [0.5]) == [Config("vtc_cls:start_layer=2", 0.5)]
    for methods, ratios in ((["vtc"], [0.5]), (["vtc_cls"], [50]), (["vtc_cls:x=1"], [0.5])):
        with pytest.raises(tokprune.TokPruneError):
            compare.configurations(methods, ratios)


def test_seeds_are_pooled_into_one_row():
    row = dict.fromkeys(rows.Row.__dataclass_fields__, 0) | {"task": "t", "keep_ratio": 0.5, "n_samples": 100}
    row |= {"stderr": None}  # as of right and wrong answers
    seeds = [
        rows.Row(
            **row
            | {"method": f"random:seed={i}", "value": a, "by_kind": {"k": {"value": a, "n_samples": 100}}}
            | {"costs": rows.Costs(prefill_flops_after=a)}
        )
        for i, a in enumerate((0.5, 0.6, 0.7))
    ]
    (pooled,) = rows.pooled(seeds)
    assert (pooled.method, pooled.n_samples) == ("random, 3 seeds", 100)  # the same 100 questions three times
    assert pooled.value == pytest.approx(0.6)
    assert pooled.by_kind["k"] == {"value": pytest.approx(0.6), "n_samples": 100}
    assert pooled.costs.prefill_flops_after == pytest.approx(0.6)
    assert pooled.costs.llm_flops_after is None
    assert (pooled.low, pooled.high) == pytest.approx(intervals.wilson(60, 100))
    assert compare.configurations(["random", "random:seed=0"], [0.5, 0.5]) == [
        Config(f"random:seed={i}", 0.5) for i in range(3)
    ]


# ---- the embedded model


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.load(str(EMBEDDED_MODEL))


def test_embedded_model_is_small_and_genuine(runner):
    assert sum(f.stat().st_size for f in EMBEDDED_MODEL.iterdir()) < 12e6
    assert type(runner.model).__name__ == "LlavaForConditionalGeneration"
    assert type(runner.processor).__name__ == "LlavaProcessor"
    assert runner.model.config.text_config.num_hidden_layers >= 8
    assert runner.prompt("is there a red ring?") == "USER: <image>\nis there a red ring? ASSISTANT:"


@pytest.mark.slow
def test_embedded_model_beats_its_floors_and_survives_pruning(runner):
    task = load_task("findit")
    samples = stratified(task.samples(), 100)
    configs = compare.configurations(["none", "blind", "vtc_cls", "random"], [0.25], seeds=1)
    right = collections.Counter()
    for config, answers, _ in runner.run(task, samples, configs, batch_size=50):
        right[config.label] += sum(r.right for r in answers)
        assert all(r.n_visual_before == 144 for r in answers)
        kept = {"none": 144, "shuffled pictures": 144, "blind": 0}.get(config.label, 36)
        assert {r.n_visual_after for r in answers} == {kept}
        assert {r.llm_columns_before - r.llm_columns_after for r in answers} == {144 - kept}
    assert right["none"] > right["shuffled pictures"] + 20
    assert right["vtc_cls@0.25"] > right["blind"] + 20


def test_batches_answer_as_single_questions_do(runner):
    task = load_task("findit")
    samples = stratified(task.samples(), 12)
    configs = [Config("none"), Config("vtc_cls", 0.25), Config("random:seed=1", 0.11)]
    answers = []
    for batch_size in (12, 1):
        given = [row for _, part, _ in runner.run(task, samples, configs, batch_size) for row in part]
        answers.append({(r.config, r.sample): (r.answer, r.costs) for r in given})
    assert answers[0] == answers[1]


def test_matched_flops_are_what_methods_really_spend(runner):
    """Equal ratios of the language model's FLOPs beside the text that the questions have, to a token's worth."""
    task = load_task("findit")
    samples = stratified(task.samples(), 16)
    methods = ["none", "vtc_cls", "fastv", "pyramiddrop", "random", "vtc_cls+fastv", "prumerge"]
    asked = compare.configurations(methods, [0.5, 0.25], seeds=1)
    configs, left_out = compare.matched(runner, [(task, samples)], asked)
    assert set(left_out) == {"vtc_cls+fastv@flops0.5", "vtc_cls+fastv@flops0.25", "pyramiddrop@flops0.25"}
    assert "use flops_ratio=0.3" in left_out["pyramiddrop@flops0.25"]
    assert {c.flops_text for c in configs if c.flops_ratio} == {runner.text_tokens(samples)} == {9}
    assert [c.label for c in configs if not c.flops_ratio] == ["none", "shuffled pictures", "prumerge"]
    spent = collections.defaultdict(list)
    for config, answers, _ in runner.run(task, samples, configs, batch_size=8):
        spent[config] += [r.costs.llm_flops_after / r.costs.llm_flops_before for r in answers]
        assert {r.flops_ratio for r in answers} == {config.flops_ratio}
    for config, ratios in spent.items():
        if config.flops_ratio:
            assert config.flops_ratio - 0.02 < sum(ratios) / len(ratios) < config.flops_ratio + 0.01


def test_offloaded_weights_change_neither_fingerprint_nor_answers(runner):
    from accelerate import cpu_offload

    spread = Runner.load(str(EMBEDDED_MODEL))
    cpu_offload(spread.model)
    assert spread.model.device.type == "meta"
    assert spread.fingerprint() != Runner.load("tiny-llava-next").fingerprint()
    task = load_task("findit")
    samples = stratified(task.samples(), 4)
    configs = [Config("none"), Config("fastv", 0.25)]
    answers = [[r.answer for _, rows, _ in x.run(task, samples, configs) for r in rows] for x in (runner, spread)]
    assert answers[0] == answers[1]
    changed = Runner.load(str(EMBEDDED_MODEL))
    with torch.no_grad():
        changed.model.lm_head.weight[0, 0] += 1
    cpu_offload(changed.model)
    assert changed.fingerprint() != spread.fingerprint()


def test_reach_is_tried_on_every_size_of_picture(tmp_path):
    """A wide picture has fewer crops than a large one, and text weighs more beside it."""
    from PIL import Image

    lines = []
    for name, size in (("large", (300, 300)), ("small", (40, 40))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        lines.append(f'{{"file_name": "{name}.png", "question": "what color is it?", "answer": "red"}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    task, next_ = load_task(str(tmp_path)), Runner.load("tiny-llava-next")
    configs = [Config("uniform", flops_ratio=r / 1000, flops_text=9) for r in range(10, 60, 2)]
    reasons = [set(next_.out_of_reach(task, part, configs)) for part in ([s] for s in task.samples())]
    assert reasons[0] != reasons[1]
    assert set(next_.out_of_reach(task, task.samples(), configs)) == reasons[0] | reasons[1]


def test_kinds_cover_the_task():
    assert {s.kind for s in FindIt(n_scenes=20).samples()} == set(KINDS)


def test_model_on_a_folder_runs_in_another_dtype(runner):
    half = Runner(runner.model.bfloat16(), runner.processor)
    task = load_task("findit")
    samples = stratified(task.samples(), 10)
    given = [r for _, part, _ in half.run(task, samples, [Config("vtc_cls", 0.25)]) for r in part]
    runner.model.to(torch.float32)
    assert {r.n_visual_after for r in given} == {36}
    assert {r.costs.kv_bytes_after / r.llm_columns_after for r in given} == {2 * 8 * 160 * 2}
