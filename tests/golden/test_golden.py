"""Kept indices from the authors' own code, one test a case. TOKPRUNE_GOLDEN_DIR names another folder."""

from __future__ import annotations

import re
from pathlib import Path

import golden_harness
import pytest
from golden_harness import FOLDERS, NOT_BUILT, assert_kept, cases
from golden_pictures import PICTURE_CHECKS
from golden_videos import VIDEO_CHECKS

import tokprune
from tokprune.methods import METHODS

CASES = [case for folder in FOLDERS for case in cases(folder)]
CHECKS = {**golden_harness.CHECKS, **PICTURE_CHECKS, **VIDEO_CHECKS}


def marked(case):
    not_built = pytest.mark.xfail(strict=True, raises=tokprune.TokPruneError, reason=f"{case.method} is to be built")
    marks = [not_built] if case.method in NOT_BUILT else []
    return pytest.param(case, id=f"{case.method}-{case.label}", marks=marks)


@pytest.mark.parametrize("case", [marked(c) for c in CASES])
def test_golden(case):
    if case.method in NOT_BUILT:
        tokprune.get_method(case.method)  # raises until the method is there; then the list has to shrink
    assert case.method in CHECKS, f"no check for golden method {case.method!r}: write one"
    CHECKS[case.method](case)


def test_golden_there_are_cases():
    assert all(cases(folder) for folder in FOLDERS), f"no golden cases in {' or '.join(map(str, FOLDERS))}"


def test_golden_list_of_methods_to_build_is_current():
    assert not NOT_BUILT & set(METHODS.own_names())
    assert not NOT_BUILT & set(CHECKS)


def test_golden_harness_decides_nothing():
    for name in ("golden_harness.py", "golden_pictures.py", "golden_videos.py"):
        source = (Path(__file__).parent / name).read_text()
        assert not re.findall(r"\b(topk|sort|argsort|sorted|argmax|msort|kthvalue)\b", source)


def test_golden_comparison_sees_one_swapped_index():
    import torch

    keep = torch.tensor([[True, False, True]])
    assert_kept(keep, torch.tensor([[0, 2]]))
    with pytest.raises(AssertionError):
        assert_kept(keep, torch.tensor([[0, 1]]))
