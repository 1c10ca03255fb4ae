"""Metrics against values worked out by hand; what a run makes of values between right and wrong."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from tokprune.eval.report import answers
from tokprune.eval.run import rows
from tokprune.eval.stats import Paired, difference, mean_interval, wilson
from tokprune.eval.tasks.base import Sample, lettered
from tokprune.eval.tasks.grading import Grading
from tokprune.eval.tasks.metrics import METRICS, distance, number, plain

from tokprune.core.errors import PluginError, TaskError, UnknownNameError

PLAIN = {
    "The Cat": "cat",
    " a  cat. ": "cat",
    "an apple, a pear!": "apple pear",
    "It's": "its",
    "u.s.": "us",
    "T-shirt": "t shirt",
    "T shirt": "t shirt",
    "two": "2",
    "Two dogs": "2 dogs",
    "1,000": "1000",
    "1,5": "1 5",
    "3.50": "3.50",
    "3.": "3",
    "-3": "-3",
    "\u22123": "-3",
    "10-20": "10 20",
    "50 %": "50 %",
    "$5": "$5",
    "A": "a",  # a letter, not an article of something
    "A.": "a",
    "The A": "the a",
    "?!": "?!",
    "(red)": "red",
    "\uff32ed": "red",  # a full-width letter
    "e\u0301te\u0301": "\u00e9t\u00e9",
}


@pytest.mark.parametrize("text", PLAIN)
def test_plain_words_by_hand(text):
    assert plain(text) == PLAIN[text]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_words_stay_as_they_are(text):
    assert plain(plain(text)) == plain(text)


# metric, answer, expected answers, value
BY_HAND = [
    ("exact", " Red. ", ["red"], 1),
    ("exact", "the red", ["red"], 0),
    ("exact", "2", ["two"], 0),
    ("normalized", "The red!", ["blue", "red"], 1),
    ("normalized", "2", ["two"], 1),
    ("normalized", "red ball", ["red"], 0),
    ("normalized", "-3", ["3"], 0),
    ("normalized", "", ["red"], 0),
    ("contains", "The ring is red.", ["red"], 1),
    ("contains", "The ring is reddish.", ["red"], 0),
    ("contains", "It is a dark red ring", ["dark red"], 1),
    ("contains", "dark and red", ["dark red"], 0),
    ("contains", "There are three rings", ["3"], 1),
    ("contains", "No, there is no cat.", ["no"], 1),
    ("contains", "Yes, there is no doubt.", ["no"], 0),
    ("contains", "Yes, there is no doubt.", ["yes"], 1),
    ("contains", "There is a cat.", ["yes"], 0),
    ("choice", "B", ["blue", "B"], 1),
    ("choice", "b.", ["blue", "B"], 1),
    ("choice", "(B)", ["blue", "B"], 1),
    ("choice", "(b) blue", ["blue", "B"], 1),
    ("choice", "B. blue", ["blue", "B"], 1),
    ("choice", "B: blue", ["blue", "B"], 1),
    ("choice", "B blue", ["blue", "B"], 1),
    ("choice", "The blue.", ["blue", "B"], 1),
    ("choice", "The answer is B.", ["blue", "B"], 1),
    ("choice", "Answer: (B)", ["blue", "B"], 1),
    ("choice", "**B**", ["blue", "B"], 1),
    ("choice", "A", ["blue", "B"], 0),
    ("choice", "A. blue", ["blue", "B"], 0),  # the letter decides
    ("choice", "A blue ball", ["a ball", "A"], 0),  # an article
    ("choice", "Option A's colour", ["x", "A"], 0),
    ("choice", "The answer is a cat", ["red", "A"], 0),
    ("choice", "blueish", ["blue", "B"], 0),
    ("choice", "", ["blue", "B"], 0),
    ("choice", "c", ["C"], 1),  # letters in the question itself
    ("choice", "B.C.", ["x", "B"], 0),
    ("choice", "C", ["blue", "B", "cyan", "C"], 1),
    ("relaxed", "105", ["100"], 1),
    ("relaxed", "1.05", ["1"], 1),
    ("relaxed", "106", ["100"], 0),
    ("relaxed", "95", ["100"], 1),
    ("relaxed", "94.9", ["100"], 0),
    ("relaxed", "-100", ["100"], 0),
    ("relaxed", "-104", ["-100"], 1),
    ("relaxed", "1,020", ["1000"], 1),
    ("relaxed", "51%", ["0.5"], 1),
    ("relaxed", "50", ["50%"], 0),  # as ChartQA has it
    ("relaxed", "0.0", ["0"], 1),
    ("relaxed", "0.01", ["0"], 0),
    ("relaxed", "Yes.", ["yes"], 1),
    ("relaxed", "7", ["1", "7.2"], 1),
    ("relaxed", "nan", ["nan"], 1),  # a text
    ("relaxed", "inf", ["5"], 0),
    ("vqa", "red", ["red"] * 10, 1),
    ("vqa", "Red!", ["the red"] * 4 + ["blue"] * 6, 1),
    ("vqa", "red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
    ("vqa", "red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
    ("vqa", "red", ["red"] + ["blue"] * 9, (0 + 9 * 1 / 3) / 10),
    ("vqa", "red", ["blue"] * 10, 0),
    ("anls", "kitten", ["kitten"], 1),
    ("anls", "Kitten ", ["KITTEN"], 1),
    ("anls", "kitten", ["sitting"], 1 - 3 / 7),
    ("anls", "ab", ["ax"], 0),  # a half is too much
    ("anls", "abc", ["abx"], 1 - 1 / 3),
    ("anls", "abc", ["zzz", "abd"], 1 - 1 / 3),
    ("anls", "", ["abc"], 0),
]


@pytest.mark.parametrize(("metric", "answer", "expected", "value"), BY_HAND)
def test_values_by_hand(metric, answer, expected, value):
    assert METRICS[metric](answer, expected) == pytest.approx(value, abs=1e-12)


def test_vqa_is_the_mean_over_leaving_each_person_out():
    """The definition, word by word, for every split of the answers of up to ten people."""
    for n, agreeing in ((size, a) for size in (4, 7, 10) for a in range(size + 1)):
        people = ["red"] * agreeing + [f"other {i}" for i in range(n - agreeing)]
        terms = []
        for i in range(n):
            others = people[:i] + people[i + 1 :]
            terms.append(min(1, sum(other == "red" for other in others) / 3))
        assert METRICS["vqa"]("red", people) == pytest.approx(sum(terms) / n)


def words(seed: int, n: int = 200) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice("aBc1. ,-%'") for _ in range(draw.randrange(8))) for _ in range(n)]


@pytest.mark.parametrize("metric", METRICS)
def test_every_value_is_from_0_to_1_and_more_answers_lose_nothing(metric):
    for answer, one, other in zip(words(1), words(2), words(3), strict=True):
        value = METRICS[metric](answer, [one])
        assert 0 <= value <= 1
        if metric != "vqa":  # which is a vote
            assert METRICS[metric](answer, [one, other]) >= value
            assert METRICS[metric](answer, [other, one]) == METRICS[metric](answer, [one, other])


@pytest.mark.parametrize("metric", [m for m in METRICS if m != "vqa"])
@pytest.mark.parametrize("text", ["red", "top left", "7", "-1.5", "yes", "no", "B", "10 %", "1,000", "été"])
def test_an_expected_answer_is_right(metric, text):
    assert METRICS[metric](text, [text]) == METRICS[metric](f" {text} ", [text]) == 1
    assert METRICS[metric](f"{text}.", [text]) == 1 or metric == "anls"  # which counts every character


def test_edit_distance_is_that_of_trying_all_edits():
    """Breadth first over single edits, for all short words of two letters."""
    short = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]

    def edits(word):
        for i in range(len(word) + 1):
            yield from (word[:i] + c + word[i:] for c in "ab")
        for i in range(len(word)):
            yield word[:i] + word[i + 1 :]
            yield from (word[:i] + c + word[i + 1 :] for c in "ab")

    for start in short:
        away, front = {start: 0}, {start}
        for step in range(1, 4):
            front = {e for word in front for e in edits(word) if len(e) < 5} - away.keys()
            away |= dict.fromkeys(front, step)
        assert all(distance(start, other) == away[other] for other in short)


def test_numbers():
    by_hand = {"1": 1, "+1.5": 1.5, "1,000": 1000, "1,234,567.5": 1234567.5, "5 %": 0.05, "50%": 0.5, ".5": 0.5}
    by_hand |= {"1e3": 1000, "3.": 3, "-7": -7, " 2 ": 2}
    assert {text: number(text) for text in by_hand} == by_hand
    assert not [
        t for t in ("", "-", "%", "e5", "1,5", "1 2", "one", "nan", "inf", "1e999", "²", "٣") if number(t) is not None
    ]


# ---- questions and runs


def test_choices_are_shown_with_letters_and_make_the_metric():
    sample = Sample("1", "a", lettered("what is it?", ["red", "blue"]), "blue", also=("B",), choices=("red", "blue"))
    assert sample.question == "what is it?\nA. red\nB. blue"
    assert sample.rule == "choice"
    assert all(map(sample.is_right, ("B", "(b)", "B. blue", "Blue")))
    assert not any(map(sample.is_right, ("A", "A. red", "red")))
    assert Sample("1", "a", "q", "x").rule == "exact"
    with pytest.raises(TaskError, match="metric 'exct'; use one of exact, normalized"):
        Sample("1", "a", "q", "x", metric="exct")


def test_the_metric_of_a_run_wins_over_that_of_a_question():
    sample = Sample("1", "a", "q", "red", metric="contains")
    assert Grading().value(sample, "it is red") == 1
    assert Grading.load("exact").value(sample, "it is red") == 0
    assert (Grading().name_of(sample), Grading.load("exact").name_of(sample)) == ("contains", "exact")


def own(tmp_path, body: str, name: str = "f") -> str:
    (tmp_path / "own.py").write_text(f"def {name}(answer, expected):\n    {body}\n")
    return f"{tmp_path / 'own.py'}:{name}"


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    sample = Sample("1", "a", "q", "red", also=("crimson",))
    name = own(tmp_path, "return 0.5 if answer in expected else True if answer == 'ruby' else 0")
    assert [Grading.load(name).value(sample, a) for a in ("crimson", "ruby", "x")] == [0.5, 1, 0]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Grading.load("own:f").value(sample, "red") == 0.5


@pytest.mark.parametrize("value", ["1.5", "-0.1", "float('nan')", "None", "'1'", "[1]"])
def test_what_a_function_may_not_return_is_said(value, tmp_path):
    grading = Grading.load(own(tmp_path, f"return {value}"))
    with pytest.raises(PluginError, match="return a number from 0 to 1"):
        grading.value(Sample("1", "a", "q", "red"), "red")


def test_a_function_that_raises_is_said(tmp_path):
    grading = Grading.load(own(tmp_path, "return 1 / 0"))
    with pytest.raises(PluginError, match="ZeroDivisionError: division by zero .*metric.answer: str, expected"):
        grading.value(Sample("1", "a", "q", "red"), "red")


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("anl", UnknownNameError, "Did you mean 'anls'"),
        ("else", UnknownNameError, "exact, normalized, contains, choice, relaxed, vqa, anls, or file.py:function"),
        ("nothing.py:f", PluginError, "No such file"),
        ("no_such_module_here:f", PluginError, "cannot be imported"),
        ("statistics:meen", PluginError, "it has: mean"),
        ("{own}:g", PluginError, "has no g; it has: f"),
        ("{broken}:f", PluginError, "SyntaxError"),
    ],
)
def test_a_metric_that_cannot_be_loaded_is_said(name, error, told, tmp_path):
    own(tmp_path, "return 1")
    (tmp_path / "broken.py").write_text("def")
    with pytest.raises(error, match=told):
        Grading.load(name.format(own=tmp_path / "own.py", broken=tmp_path / "broken.py"))


def test_settings_tell_metrics_apart_and_say_nothing_of_the_usual_one(tmp_path):
    usual = [(None, [Sample("1", "a", "q", "red")])]
    mixed = [(None, [Sample("1", "a", "q", "red"), Sample("2", "a", "q", "red", metric="anls")])]
    assert Grading().settings(usual) == Grading.load("exact").settings(mixed) == {}
    assert Grading().settings(mixed) == {"metric": "anls and exact"}
    name = own(tmp_path, "return 1")
    first = Grading.load(name).settings(usual)
    own(tmp_path, "return 0")
    assert name in first["metric"]
    assert Grading.load(name).settings(usual) != first


def test_too_few_answers_for_a_vote_are_refused_before_a_run():
    class Task:
        name = "mine"

    with pytest.raises(TaskError, match="question 7 of mine has 1 answer, too few for the metric vqa"):
        Grading.load("vqa").check([(Task(), [Sample("7", "a", "q", "red")])])


# ---- numbers of a run


def test_intervals_of_means_by_hand():
    assert mean_interval([True] * 8 + [False] * 2)[:2] == wilson(8, 10)
    assert mean_interval([1.0, 0.0])[2] == pytest.approx((0.25 / 2) ** 0.5)
    # Of 0, 0.3, 0.6: mean 0.3, standard deviation 0.3.
    low, high, error = mean_interval([0, 0.3, 0.6])
    assert error == pytest.approx(0.3 / 3**0.5)
    assert (low, high) == pytest.approx((0, 0.3 + 1.959964 * 0.3 / 3**0.5), abs=1e-6)  # cut off at 0
    assert mean_interval([0.9] * 20)[:2] == pytest.approx(wilson(18, 20))  # alike is not certain
    assert mean_interval([0.5])[:2] == pytest.approx(wilson(0.5, 1))


def test_the_interval_of_a_difference_is_one_formula():
    """With a gain and a loss added, the normal interval is Bonett and Price's for zeros and ones."""
    gains = [1.0] * 12 + [-1.0] * 4 + [0.0] * 84
    exact = difference([max(g, 0) for g in gains], [max(-g, 0) for g in gains])
    assert (exact.low, exact.high) == Paired(100, 12, 4).interval
    assert exact.p_value == Paired(100, 12, 4).p_value
    # Nearly zeros and ones, so graded.
    nearly = difference([max(g, 0) * (1 - 1e-9) for g in gains], [max(-g, 0) for g in gains])
    assert (nearly.value, nearly.low, nearly.high) == pytest.approx((exact.value, exact.low, exact.high), abs=1e-6)
    assert nearly.p_value is None
    same = difference([0.5] * 9, [0.5] * 9)
    assert same.low == -same.high < 0 == same.value


def answer(i: int, value: float | None, right: bool = False, metric: str = "exact") -> rows.SampleRow:
    row = dict.fromkeys(rows.SampleRow.__dataclass_fields__, 0)
    return rows.SampleRow(**{**row, "sample": str(i), "right": right, "value": value, "metric": metric})


def test_a_graded_row_is_compared_by_values():
    bare = [answer(i, 0.9, True) for i in range(10)]
    found = rows.compared(
        rows.Row(**dict.fromkeys(rows.Row.__dataclass_fields__)), [answer(i, 0.6, True) for i in range(10)], bare
    )
    assert found.difference == pytest.approx(-0.3)
    assert found.difference_low < -0.3 < found.difference_high
    assert found.p_value is None


@pytest.mark.parametrize(
    ("said", "stopped", "metric", "told"),
    [
        (["it is red", "red it is", "red"], True, "exact", "2 of 3 answers"),
        (["it is red", "red", "red"], True, "exact", ""),
        (["it is blue"] * 3, True, "exact", ""),
        (["it is red"] * 3, True, "contains", ""),
        (["it is red"] * 3, True, "normalized", "3 of 3 answers"),
        (["the color of", "the color of", "red"], False, "exact", "2 of 3 answers .* cut off"),
        (["the color of", "red", "red"], False, "exact", ""),
        (["it is blue", "it is blue", "A"], True, "choice", "2 of 3 answers .* no letter"),
        (["B", "B", "it is blue"], True, "choice", ""),
    ],
)
def test_the_hint_is_for_most_answers_alone(said, stopped, metric, told):
    samples = [Sample(str(i), "a", "q", "red") for i in range(len(said))]
    given = [answer(i, None, text == "red", metric) for i, text in enumerate(said)]
    for row, text in zip(given, said, strict=True):
        row.answer, row.stopped = text, stopped
    found = answers.hint(samples, given)
    assert re.match(told, found) if told else not found


def test_the_name_of_a_rows_metric():
    assert rows.metric_of([answer(0, None)]) == "exact_match"
    assert rows.metric_of([answer(0, 1.0, metric="vqa")]) == "vqa"
    assert rows.metric_of([answer(0, None), answer(1, 1.0, metric="choice")]) == "choice and exact"


def test_seeds_of_graded_answers_keep_the_intervals_of_their_values():
    common = dict.fromkeys(rows.Row.__dataclass_fields__, 0) | {"task": "t", "by_kind": {}, "n_samples": 100}
    common |= {"costs": rows.Costs(), "value": 0.5}
    seeds = [
        rows.Row(**common | {"method": f"random:seed={i}", "low": 0.48, "high": 0.52, "stderr": 0.01}) for i in range(3)
    ]
    (pooled,) = rows.pooled(seeds)
    assert (pooled.low, pooled.high) == pytest.approx((0.48, 0.52))
    shares = [
        rows.Row(**common | {"method": f"random:seed={i}", "low": 0.4, "high": 0.6, "stderr": 0.05}) for i in range(3)
    ]
    (pooled,) = rows.pooled(shares)
    assert (pooled.low, pooled.high) == pytest.approx(wilson(50, 100))
