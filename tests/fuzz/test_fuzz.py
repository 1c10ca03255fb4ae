"""Random attachments, each from its seed: pytest tests/fuzz --fuzz-seed 17 --fuzz-cases 1 runs one again."""

from __future__ import annotations

import pytest
from fuzz.cases import draw
from fuzz.laws import Broken, check
from fuzz.methods import OPTIONS, registered_options

from tokprune.methods import METHODS

CHUNK = 10


def pytest_generate_tests(metafunc):
    if "seeds" in metafunc.fixturenames:
        first, n = (metafunc.config.getoption(name) for name in ("fuzz_seed", "fuzz_cases"))
        chunks = [range(a, min(a + CHUNK, first + n)) for a in range(first, first + n, CHUNK)]
        metafunc.parametrize("seeds", chunks, ids=[f"seeds{c.start}to{c.stop - 1}" for c in chunks])


@pytest.mark.slow
def test_cases(seeds):
    broken = []
    for seed in seeds:
        try:
            check(draw(seed))
        except Broken as error:
            broken.append(str(error))
    assert not broken, "\n\n".join(broken)


def test_every_method_and_option_is_drawn():
    assert {name: set(options) for name, options in OPTIONS.items()} == registered_options()
    assert set(OPTIONS) == set(METHODS.own_names())
