"""From a golden case to the registered method: builds visual tokens, asks the method, compares.

The harness decides nothing: it neither ranks nor counts. It turns stored arrays into the signals that the
method itself asks for, and takes the budget from the case or from the method's own `paper_count`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokprune
from tokprune import attention
from tokprune.budget import Budget
from tokprune.types import Kind, Signal, Tower, VisualTokens, grid_layout

FOLDER = Path(os.environ.get("TOKPRUNE_GOLDEN_DIR") or Path(__file__).parent / "data")

# Golden cases whose method is still to be built. The list only shrinks.
NOT_BUILT = frozenset(
    {
        "cdpruner",
        "dart",
        "divprune",
        "fastv",
        "globalcom2",
        "hired",
        "prumerge",
        "prumerge_plus",
        "pyramiddrop",
        "sparsevlm",
        "visionzip",
    }
)


@dataclass(frozen=True)
class Case:
    """One entry of index.json."""

    method: str
    label: str
    params: dict
    file: Path
    roles: dict[str, str]

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and expected outputs."""
        with np.load(self.file) as data:
            arrays = {name: torch.from_numpy(np.array(data[name])) for name in self.roles}
        return tuple({n: a for n, a in arrays.items() if self.roles[n] == role} for role in ("input", "output"))


def cases(folder: Path = FOLDER) -> list[Case]:
    """All cases of a folder; empty where there is no index."""
    index = folder / "index.json"
    if not index.is_file():
        return []
    return [
        Case(
            method=c["method"],
            label=c["case"],
            params={**c["params"], "variant": c.get("variant")},
            file=folder / c["file"],
            roles={name: a["role"] for name, a in c["arrays"].items()},
        )
        for c in json.loads(index.read_text())["cases"]
    ]


def check_cls_rows(case: Case) -> None:
    """vtc_cls and fastervlm: a stored [CLS] row of every layer, or of the one layer used, for every tile."""
    inputs, expected = case.load()
    rows = inputs["cls_attn"].mean(-2)[..., 1:]  # mean over heads, without the [CLS] column
    if case.method == "vtc_cls":
        method = tokprune.get_method("vtc_cls", start_layer=case.params["start_layer"])
        tower = Tower(n_layers=len(rows), has_cls=True)
        by_layer = dict(enumerate(rows[:, None]))  # one image
    else:
        method = tokprune.get_method("fastervlm")
        tower = Tower(n_layers=case.params.get("layer", 22) + 2, has_cls=True)
        by_layer = {tower.n_layers - 2: rows}  # tiles are compressed alike, each to the same count
    (signal,) = method.needs(tower)
    collected = {signal: torch.stack([by_layer[layer] for layer in signal.layers], 1)}
    n_visual = rows.shape[-1]
    out = select(method, collected, n_visual, Budget(keep_tokens=case.params["num_keep"]).n_keep(n_visual))
    torch.testing.assert_close(out.scores, expected["score"].reshape(out.scores.shape), rtol=1e-4, atol=0)
    assert_kept(out.keep, expected["kept"].reshape(len(out.keep), -1))


def check_fopru(case: Case) -> None:
    """fopru: queries and keys of one vision layer."""
    inputs, expected = case.load()
    q, k = inputs["q"][None], inputs["k"][None]
    form, strategy, n_visual = case.params["score"], case.params["strategy"], case.params["N"]
    method = tokprune.get_method("fopru", form=form, strategy=strategy)
    pair = attention.received_and_given(q, k, q.shape[-1] ** -0.5, form, n_special=1)
    received, given = pair
    values = {Kind.RECEIVED: received, Kind.GIVEN: given}
    signals: dict[Signal, Tensor] = {s: values[s.kind][:, None] for s in method.needs(Tower(24, True))}
    n_keep = method.paper_count(n_visual, case.params["ratio"], math.isqrt(n_visual))
    assert n_keep == len(expected["kept"])
    out = select(method, signals, n_visual, n_keep)
    assert torch.equal(out.scores, received if expected["gate_received"] else given)
    torch.testing.assert_close(torch.cat([received.var(1), given.var(1)]), expected["variances"], rtol=1e-4, atol=0)
    assert_kept(out.keep, expected["kept"][None])


CHECKS = {"vtc_cls": check_cls_rows, "fastervlm": check_cls_rows, "fopru": check_fopru}


def select(method, signals: dict[Signal, Tensor], n_visual: int, n_keep: int) -> VisualTokens:
    """The registered object's own selection, on a square grid; features play no part."""
    n_images = len(next(iter(signals.values())))
    side = math.isqrt(n_visual)
    tokens = VisualTokens.of(torch.zeros(n_images, n_visual, 1), grid_layout(side, n_visual // side), signals)
    return method.select(tokens, n_keep)


def assert_kept(keep: Tensor, expected: Tensor) -> None:
    """The same sets, with the same count; expected is (G, K), ascending."""
    assert keep.sum(1).tolist() == [expected.shape[1]] * len(keep)
    assert torch.equal(keep.nonzero()[:, 1].view(len(keep), -1), expected)
