"""Every law seen failing: broken methods for the methods' laws, broken parts for the adapters'."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tokprune.integrations.transformers import caches as columns
from tokprune.integrations.transformers import observer
from tokprune.integrations.transformers import shorten as shorten
from torch._subclasses.fake_tensor import DataDependentOutputException

from tokprune.core import budget
from tokprune.core.layout import grid_layout
from tokprune.cost import flops
from tokprune.methods import METHODS

HERE = Path(__file__).parent


def load(name: str, folder: Path = HERE):
    """A sibling test module, whose laws are called with what is broken."""
    spec = importlib.util.spec_from_file_location(f"laws_{name}", folder / f"test_{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


methods, adapters, attachment = load("methods"), load("adapters"), load("attachment")
costs = load("flops", HERE.parent / "unit")

SQUARE = grid_layout(6, 6)
METHOD_LAWS = {
    "scores": lambda s: methods.test_scores_are_finite_float32_and_leave_inputs_alone(s),
    "count": lambda s: methods.test_select_keeps_what_its_count_class_promises(s, SQUARE),
    "ties": lambda s: methods.test_equal_scores_go_to_the_lower_index(s),
    "group": lambda s: methods.test_a_group_equals_its_images_one_by_one(s, "6x6"),
    "highest": lambda s: methods.test_select_keeps_the_highest_scores(s),
    "bfloat16": lambda s: methods.test_bfloat16_features_stay_bfloat16_and_scores_float32(s),
    "no values": lambda s: methods.test_runs_without_values(s, "6x6"),
    "needs": lambda s: methods.test_needs_is_honest(s),
}
BROKEN_METHODS = [
    ("DoubleScores", "scores"),
    ("InfiniteScores", "scores"),
    ("WritesToItsInput", "scores"),
    ("OneTooMany", "count"),
    ("LastAmongEquals", "ties"),
    ("LooksAtItsNeighbours", "group"),
    ("KeepsTheWorst", "highest"),
    ("HalfScores", "bfloat16"),
    ("ReadsTheDevice", "no values"),
    ("TakesWhatItDidNotAskFor", "needs"),
]


@pytest.mark.parametrize(("name", "law"), BROKEN_METHODS)
def test_broken_method_fails_its_law(monkeypatch, name, law):
    monkeypatch.setitem(METHODS.table, "broken", f"twins:{name}")
    with pytest.raises((AssertionError, DataDependentOutputException)):
        METHOD_LAWS[law]("broken")


@pytest.mark.parametrize("law", METHOD_LAWS)
def test_honest_method_passes_every_law(monkeypatch, law):
    monkeypatch.setitem(METHODS.table, "honest", "twins:Honest")
    METHOD_LAWS[law]("honest")


def test_every_method_law_has_a_twin():
    assert {law for _, law in BROKEN_METHODS} == set(METHOD_LAWS)


# ---- what the adapters' laws guard, broken one part at a time


def mask_left_long(self, mask, n_outer):
    """What transformers itself would do: the first columns of the user's mask."""
    return None if mask is None else mask[:, : self.up_to(n_outer)[0].shape[1]]


def positions_without_shift(self, past, new):
    longer = EXTENDED(self, past, new)
    return dataclasses.replace(longer, shift=longer.shift * 0)


def fill_with_the_first_column(source, valid, n_columns):
    return source.new_zeros(len(source), n_columns)


def keep_the_marks(features, keep):
    return torch.where(keep[..., None], features, 0)


def one_column_less(self, ran):
    AFTER_PREFILL(self, dataclasses.replace(ran, n_inner=ran.n_inner - 1))


def without_attention(self, n_query, n_key):
    return LAYER(self, n_query, 0)


def without_the_text(self, n_visual, flops, least):
    return AFFORDABLE(self, n_visual, lambda n: flops(n) - flops(0), least)


def leave_everything(self):
    pass


EXTENDED = columns.Columns.extended
LAYER, AFFORDABLE = flops.Stack.layer, budget.Budget._affordable
AFTER_PREFILL = observer.Observer.after_prefill
ATTACHMENT = attachment.tokprune.Attachment
BREAKS = {
    "decode mask": (
        (columns.Columns, "inner_mask", mask_left_long),
        lambda: adapters.test_batch_equals_its_rows_one_by_one("clip", "contiguous", "greedy"),
    ),
    "decode positions": (
        (columns.Columns, "extended", positions_without_shift),
        lambda: adapters.test_cached_generation_equals_recomputing_the_short_sequence("clip", "sdpa", "contiguous"),
    ),
    "expansion": (
        (shorten, "forward_fill", fill_with_the_first_column),
        lambda: adapters.test_loss_equals_the_loss_of_the_short_sequence("clip", "contiguous"),
    ),
    "report": (
        (observer.Observer, "after_prefill", one_column_less),
        lambda: adapters.test_report_equals_the_lengths_the_layers_saw("clip", {"keep_ratio": 0.3}),
    ),
    "ledger": (
        (flops.Stack, "layer", without_attention),
        lambda: costs.test_report_ledger_equals_the_counter_part_by_part("fopru", 0.25, "clip", "sdpa"),
    ),
    "budget in FLOPs": (
        (budget.Budget, "_affordable", without_the_text),
        lambda: costs.test_flops_ratio_keeps_the_most_that_it_pays_for("uniform", "llm"),
    ),
    "detach": (
        (ATTACHMENT, "detach", leave_everything),
        lambda: attachment.test_detach_restores_everything("clip", "vtc_cls"),
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_broken_part_fails_its_law(monkeypatch, what):
    (owner, name, broken), law = BREAKS[what]
    tiny.model.cache_clear()
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        law()
    tiny.model.cache_clear()


def test_marks_that_do_not_mark_are_noticed(monkeypatch):
    """Zeros in place of marks: nothing would be pruned, and the model would still answer."""
    monkeypatch.setattr("tokprune.integrations.transformers.encode.mark_dropped", keep_the_marks)
    with pytest.raises(ValueError, match="nothing was dropped"):
        adapters.test_pruned_forward_equals_the_short_sequence("clip", "sdpa", "contiguous")
    tiny.model.cache_clear()


def test_keep_all_law_sees_a_pruned_model():
    """One token fewer than all is no longer bit-identical."""
    model, inputs = tiny.model(), tiny.batch()
    with torch.no_grad():
        bare = model(**inputs).logits
        with attachment.tokprune.attach(model, "vtc_cls", keep_tokens=35):
            assert not torch.equal(model(**inputs).logits, bare)
