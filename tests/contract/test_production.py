"""What a service needs: which image is of which request, logs, callbacks, budgets for each request, threads."""

from __future__ import annotations

import logging
import threading

import pytest
import tiny
import torch

import tokprune
from tokprune.core.errors import BudgetError, OptionError

N = 36  # visual tokens of a picture


@pytest.fixture
def model():
    return tiny.fresh_model()


def generate(model, inputs, **options):
    return tiny.generate(model, inputs, max_new_tokens=3, **options)


# ---- rows


@pytest.mark.parametrize("beams", [1, 2])
def test_images_are_told_by_row(model, beams):
    """tiny.batch has rows of one picture, two pictures, and text."""
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        generate(model, tiny.batch(), num_beams=beams)
        assert attachment.report.rows == attachment.report.to_dict()["rows"] == [0, 1, 1]


# ---- logs and callbacks


def test_a_call_is_one_line_at_info_and_silent_otherwise(model, caplog):
    with tokprune.attach(model, "uniform", keep_ratio=0.5):
        generate(model, tiny.batch())
        assert not caplog.records
        with caplog.at_level(logging.INFO, "tokprune"):
            generate(model, tiny.batch())
            with torch.no_grad():
                model(**tiny.batch())
    assert [r.name for r in caplog.records] == ["tokprune"] * 2
    assert all("36 -> 18" in r.getMessage() for r in caplog.records)
    assert all("\n" not in r.getMessage() for r in caplog.records)


def test_a_method_of_an_attachment_is_not_overwritten(model):
    with (
        tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment,
        pytest.raises(AttributeError, match=r"call attachment\.paused\(\)"),
    ):
        attachment.paused = True


def test_every_call_of_the_user_is_told_once(model):
    seen = []
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        handle = attachment.on_call(lambda report: seen.append(report.to_dict()["n_kept"]))
        generate(model, tiny.batch())
        assert seen == [[18, 18, 18]]
        with torch.no_grad():
            model(**tiny.batch())
        assert len(seen) == 2
        with attachment.paused():
            generate(model, tiny.batch())
        assert len(seen) == 2
        handle.remove()
        generate(model, tiny.batch())
    assert len(seen) == 2


def test_steps_by_hand_are_of_one_call(model):
    seen = []
    with torch.no_grad(), tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        attachment.on_call(seen.append)
        out = model(**tiny.batch(), use_cache=True)
        for _ in range(2):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), **{tiny.CACHE: out.past_key_values})
    assert len(seen) == 1


def test_a_callback_that_fails_leaves_the_call_alone(model, caplog):
    def fails(report):
        raise ValueError("no")

    want = generate(tiny.fresh_model(), tiny.batch(), do_sample=False).shape
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        with attachment.on_call(fails):
            assert generate(model, tiny.batch()).shape == want
        generate(model, tiny.batch())
    assert [r.getMessage() for r in caplog.records] == ["a callback of on_call failed"]


def test_a_call_that_fails_is_not_told(model):
    seen = []
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        attachment.on_call(seen.append)
        bad = {**tiny.batch(), "pixel_values": torch.full_like(tiny.batch()["pixel_values"], float("nan"))}
        with pytest.raises(tokprune.TokPruneError):
            generate(model, bad)
        assert seen == []
        generate(model, tiny.batch())
    assert len(seen) == 1


# ---- budgets for each request


def kept(attachment, model) -> list[int]:
    with torch.no_grad():
        model(**tiny.batch())
    return attachment.report.to_dict()["n_kept"]


def test_another_budget_for_a_request(model):
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        with attachment.using(keep_tokens=9):
            assert kept(attachment, model) == [9] * 3
            assert attachment.report.budget == "keep_tokens=9"
            with attachment.using(keep_ratio=0.75):
                assert kept(attachment, model) == [27] * 3
            assert kept(attachment, model) == [9] * 3
        with pytest.raises(ZeroDivisionError), attachment.using(keep_tokens=9):
            1 / 0  # noqa: B018
        assert kept(attachment, model) == [18] * 3
        assert attachment.report.budget == "keep_ratio=0.5"


def test_it_keeps_what_an_attachment_of_that_budget_keeps(model):
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.25) as attachment:
        kept(attachment, model)
        want = attachment.kept
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.5) as attachment, attachment.using(keep_ratio=0.25):
        kept(attachment, model)
        assert all(torch.equal(a, b) for a, b in zip(attachment.kept, want, strict=True))


@torch.no_grad()
def test_a_budget_of_everything_is_the_bare_model(model):
    bare = model(**tiny.batch()).logits
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.5) as attachment, attachment.using(keep_ratio=1):
        assert torch.equal(model(**tiny.batch()).logits, bare)


def test_budgets_that_attach_refuses_are_refused(model):
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        for budget in ({}, {"keep_ratio": 2}, {"keep_ratio": 0.5, "keep_tokens": 3}):
            with pytest.raises(BudgetError), attachment.using(**budget):
                pass
    with tokprune.attach(model, "fastv", keep_ratio=0.5) as attachment:
        with pytest.raises(OptionError, match="attach with another budget"), attachment.using(keep_ratio=0.25):
            pass


def test_a_budget_counts_for_its_thread(model):
    found = {}

    def request(name, budget):
        with attachment.using(keep_tokens=budget):
            barrier.wait()
            found[name] = kept(attachment, model)
            barrier.wait()

    barrier = threading.Barrier(2)
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        threads = [threading.Thread(target=request, args=pair) for pair in (("a", 9), ("b", 12))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert kept(attachment, model) == [18] * 3
    assert {name: set(n) for name, n in found.items()} == {"a": {9}, "b": {12}}


# ---- times


def test_times_of_a_call(model):
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.5) as attachment:
        assert attachment.report.prefill_s is None
        generate(model, tiny.batch())
        report = attachment.report
    assert 0 < report.encode_s < 60
    assert 0 < report.prefill_s < 60
