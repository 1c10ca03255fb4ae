"""Ratios of times: what is compared, and when a rise is one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from tokprune.eval.bench import ratios
from tokprune.eval.report import render
from typer.testing import CliRunner

STORED = ratios.Ratio("select", "uniform", "N x N x D product", 1.0, 0.9, 1.1, 2.0, 7, "x", 1, "t", "2026-01-01")


@pytest.mark.parametrize(
    ("ratio", "low", "said"),
    [
        (1.0, 0.9, ""),
        (0.5, 0.4, ""),
        (1.14, 1.13, ""),  # within the margin
        (1.3, 1.05, ""),  # the spreads overlap
        (1.3, 1.2, "slower"),
    ],
)
def test_a_ratio_has_risen_beyond_the_margin_and_both_spreads(ratio, low, said):
    assert ratios.verdict(replace(STORED, ratio=ratio, low=low), STORED) == said
    assert ratios.verdict(replace(STORED, ratio=ratio, low=low), None) == "new"


def test_both_sides_take_turns_and_the_first_round_does_not_count():
    asked, times = [], iter([100.0, 1.0, 6.0, 2.0, 1.0, 5.0])

    def side(name):
        return lambda: (asked.append(name), next(times))[1]

    found = ratios.Pair("g", "a", "b", side("a"), side("b")).measure(2)
    assert asked == ["b", "a", "a", "b", "b", "a"]
    assert (found.ratio, found.low, found.high) == (4.0, 3.0, 5.0)
    assert found.ms == 5500.0


def run(*arguments):
    asked = CliRunner().invoke(ratios.APP, [*arguments, "--groups", "select", "--of", "uniform", "--rounds", "1"])
    return asked.exit_code, asked.output


def test_measured_stored_and_compared(tmp_path):
    stored = tmp_path / "ratios.jsonl"
    assert run("--out", str(stored))[0] == 0
    row = next(iter(ratios.read(stored).values()))
    for factor, code, said in ((1e3, 0, "none slower"), (1e-3, 1, "1 slower")):
        scaled = {name: getattr(row, name) * factor for name in ("ratio", "low", "high")}
        stored.write_text(json.dumps(asdict(replace(row, **scaled))) + "\n")
        found, text = run("--check", str(stored))
        assert (found, said in text) == (code, True)
    other = replace(STORED, of="divprune")
    stored.write_text(json.dumps(asdict(other)) + "\n")
    assert run("--out", str(stored))[0] == 0
    assert [r.of for r in ratios.read(stored).values()] == ["divprune", "uniform"]


def test_a_wrong_group_is_named():
    asked = CliRunner().invoke(ratios.APP, ["--groups", "selct"])
    assert asked.exit_code == 2
    assert "no group 'selct'" in asked.output


def test_every_group_has_a_meaning_and_a_table(tmp_path, monkeypatch):
    assert set(ratios.MEANINGS) == set(ratios.GROUPS)
    rows = [replace(STORED, group=group) for group in ratios.GROUPS]
    (tmp_path / "now.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in rows))
    (tmp_path / "old.jsonl").write_text(json.dumps(asdict(replace(rows[0], ratio=3.0))) + "\n")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = render.ratios("old.jsonl,now.jsonl")
    assert text.count("not measured") == len(ratios.GROUPS) - 1
    assert all(f"--groups {group}" in text for group in ratios.GROUPS)
    assert "3 [0.9, 1.1]" in text


def test_the_prompt_by_hand_has_as_many_columns_as_the_pruned_one():
    model = ratios.random_model(n_layers=3)
    inputs, seen = ratios.prompts(model, 2, padded=False), []
    model.model.language_model.layers[-1].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    with ratios.torch.no_grad():
        ratios._short_pass(model, inputs)
        ratios._attached(model, inputs, "uniform")
    assert seen[0] == seen[1] < inputs["input_ids"].shape[1]
