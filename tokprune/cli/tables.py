"""Tables for the terminal: methods, models and ledgers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

import tokprune
from tokprune.eval.report.terminal import Grid

from ..core.tokens import Stage
from ..cost.flops import COMPAT, PARTS, Ledger, Ops, Shape
from ..methods import ALIAS_SOURCES, METHODS
from ..methods.described import parts_of, written
from ..prune.saved import is_saved

_PART_NAMES = {"vision": "vision tower", "decoder": "LLM decoder layers", "lm_head": "LM head"}

WHERE = {"pixels": "before the tower"}


def console(quiet: bool = False) -> Console:
    """A console for the terminal that prints brackets literally, not as markup."""
    return Console(markup=False, quiet=quiet, width=None if sys.stdout.isatty() else 150)


def methods_table() -> Grid:
    """What each method keeps, where it acts, and its source."""
    own, lines = METHODS.own_names(), []
    for name in METHODS.names():
        fault = "" if name in own else METHODS.fault(name)
        if fault:
            lines.append([name, fault, "-", "-", "-"])
            continue
        method = METHODS.build(name)
        preset = "" if str(method).endswith("()") else f" As {method}."
        count = "filter" if method.is_filter else "none" if name == "blind" else method.count.value
        where = "between layers" if method.stage is Stage.DECODER else WHERE.get(method.space, "before the LLM")
        said = "control" if name in own else _said_source(type(method))
        source = ALIAS_SOURCES.get(name) or method.source or said
        lines.append([name, _first_line(type(method)) + preset, where, count, source])
    header, words = ["method", "keeps", "where", "count", "source"], ["keeps", "where", "count", "source"]
    return Grid(header, lines, "Methods", leaving=["count", "where", "source"], text=["keeps"], left=words)


def _first_line(cls: type) -> str:
    return written(cls).partition("\n")[0] or "(no docstring)"


def _said_source(cls: type) -> str:
    """What the docstring has after "Source:", or "-"."""
    return next(iter(parts_of(cls).get("Source", "-").strip().splitlines()), "-")


def support_table() -> Grid:
    """How many methods run on each model family and vision tower."""
    answers: dict[tuple[str, str], Counter] = {}
    for pair in tokprune.list_support():
        answers.setdefault((pair.model, pair.tower), Counter())[_kind_of(pair.answer)] += 1
    header = ["model", "vision tower", "run", "with an option", "not"]
    lines = [[*names, *(str(n[kind] or "") for kind in ("yes", "option", "no"))] for names, n in answers.items()]
    return Grid(header, lines, "Methods by model; tokprune models NAME lists those of one", names=2, left=header[:2])


def _kind_of(answer: str) -> str:
    return answer if answer in ("yes", "no") else "option"


def model_table(name: str) -> Grid:
    """Which method runs on one model family, by vision tower.

    Raises:
        UnknownNameError: there is no such family.
    """
    from tokprune.integrations.transformers import FAMILIES

    FAMILIES.load(name)
    pairs = [pair for pair in tokprune.list_support() if pair.model == name]
    towers = list(dict.fromkeys(pair.tower for pair in pairs))
    answers = {(pair.tower, pair.method): pair.answer for pair in pairs}
    lines = [
        [method, *(answers[tower, method].removeprefix(f"{method}:") for tower in towers)]
        for method in dict.fromkeys(pair.method for pair in pairs)
    ]
    return Grid(["method", *towers], lines, f"{name}: an option is needed where one is shown", left=towers)


def ledger_table(shape: Shape, pair: tuple[Ledger, Ledger], columns: tuple[int, list[int]], layers: bool) -> Grid:
    """Parts of two ledgers side by side.

    Args:
        shape: the model.
        pair: unpruned and kept.
        columns: of the prompt, unpruned, and kept by decoder layer.
        layers: whether to show every decoder layer.
    """
    left = columns[1]
    mean = sum(left) / len(left)
    by_layer = "" if left[0] == left[-1] else f" ({mean:.1f} on average over layers)"
    title = f"{shape.name}: {columns[0]} -> {left[-1]} tokens{by_layer}; 1 MAC = 2 FLOPs, attention counted dense"
    lines, sections = [], []
    for part in PARTS:
        lines.append(_line(_PART_NAMES.get(part, part), pair[0].part(part), pair[1].part(part)))
        if part == "decoder" and layers:
            for i, (before, after) in enumerate(zip(pair[0].layers, pair[1].layers, strict=True)):
                lines.append(_line(f"  layer {i}", before, after))
    sections.append(len(lines))
    lines.append(_line("LLM", pair[0].llm, pair[1].llm))
    lines.append(_line("whole prefill", pair[0].prefill, pair[1].prefill))
    lines.append(_line("decode, per token", shape.decode(columns[0]), shape.decode(columns[1])))
    sections.append(len(lines))
    for name, formula in COMPAT.items():
        # The papers have one number of tokens for all layers.
        a, b = formula(shape.text, columns[0]).macs, formula(shape.text, round(mean)).macs
        lines.append([f"{name}'s formula (LLM alone)", f"{a / 1e9:,.2f}", "", f"{b / 1e9:,.2f}", "", _percent(a, b)])
    sections.append(len(lines))
    for dtype, size in (("half precision", 2), ("float32", 4)):
        a, b = (shape.read(n, bytes_per_value=size).kv_bytes for n in (columns[0], left))
        sizes = [f"{a / 2**20:.1f} MiB", "", f"{b / 2**20:.1f} MiB", ""]
        lines.append([f"KV cache, {dtype}", *sizes, _percent(a, b)])
    header = ["part", "GMACs", "GFLOPs", "kept: GMACs", "kept: GFLOPs", "kept / all"]
    return Grid(header, lines, title, leaving=["GFLOPs", "kept: GFLOPs"], sections=sections)


def budgets_table(
    shape: Shape,
    asked: Sequence[tuple[str, float]],
    pairs: Sequence[tuple[Ledger, Ledger]],
    n_before: int,
    columns: Sequence[Sequence[int]],
) -> Grid:
    """What every method and fraction leaves of the cost, a row each.

    Args:
        shape: the model.
        asked: method, or empty for none, and fraction; a saved folder has its own budget.
        pairs: ledgers, unpruned and kept.
        n_before: columns of the unpruned prompt.
        columns: of the prompt by decoder layer, for each.
    """
    lines = []
    for (method, ratio), (before, after), left in zip(asked, pairs, columns, strict=True):
        kv = [shape.read(n, bytes_per_value=2).kv_bytes for n in (n_before, left)]
        lines.append(
            [
                method or "any",
                "its own" if is_saved(method) else f"{ratio:g}",
                f"{left[-1]}",
                f"{after.llm.flops / 1e12:.2f}",
                _percent(before.llm.macs, after.llm.macs),
                f"{after.prefill.flops / 1e12:.2f}",
                _percent(before.prefill.macs, after.prefill.macs),
                _percent(*kv),
            ]
        )
    bare = pairs[0][0]
    title = (
        f"{shape.name}: {n_before} tokens unpruned, LLM {bare.llm.flops / 1e12:.2f} TFLOPs, "
        f"prefill {bare.prefill.flops / 1e12:.2f} TFLOPs"
    )
    header = ["method", "keep", "tokens", "LLM TFLOPs", "LLM kept", "prefill TFLOPs", "prefill kept", "KV kept"]
    return Grid(header, lines, title, names=2, leaving=["tokens", "LLM TFLOPs", "prefill TFLOPs"], left=["method"])


def _line(name: str, before: Ops, after: Ops) -> list[str]:
    numbers = [_giga(n) for ops in (before, after) for n in (ops.macs, ops.flops)]
    return [name, *numbers, _percent(before.macs, after.macs)]


def _giga(n: int) -> str:
    return "< 0.01" if 0 < n < 5e6 else f"{n / 1e9:,.2f}"


def _percent(before: int, after: int) -> str:
    return f"{100 * after / before:.1f} %" if before else ""
